"""`python -m distllm` is `distllm`."""

from distllm.cli import main

main()
