"""`distllm verify`: whether every layout computes what one process computes, shown on a small model of the user's own kind.

config -> shrink -> layouts -> trial (ranks of one layout, and one process) -> judge -> table, record, picture.
"""
