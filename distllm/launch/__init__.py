"""Starting the ranks of a job: on this machine, on several by ssh, or by SLURM."""

from distllm.launch.local import local_commands, local_ranks

__all__ = ["local_commands", "local_ranks"]
