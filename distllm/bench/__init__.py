"""`distllm bench`: how fast each layout trains, what memory it takes and what it sends, on this machine or in this job.

`asked` reads the command line, `cells` makes a config of each point of the grid, `measure` runs one in a rank, `figures` and
`flops` are arithmetic, `table`, `record` and `picture` show, `compare` and `against` set side by side, `job` is for launchers.
"""
