#!/usr/bin/env bash
# quickstart on this machine: 2 ranks, started by accelerate.
# Copy it and edit it, or let `distllm launch ... --on local --print` write it.
set -euo pipefail

DISTLLM_MEET=$(mktemp -d)
export DISTLLM_MEET
trap 'rm -rf -- "$DISTLLM_MEET"' EXIT
export DISTLLM_RANKS=2  # a launcher that starts another number, or single processes, is refused
export DISTLLM_LAUNCH="$DISTLLM_MEET"  # each rank writes here how it ended, so that the first failure is told first
export DISTLLM_PREFLIGHT=1  # versions, an all-reduce and the shared folder are tried before training
export DISTLLM_INIT_METHOD=file://"$DISTLLM_MEET"/store  # the ranks meet in a file: no port is opened
export OMP_NUM_THREADS=1  # the cores of a node, shared by its ranks
export GLOO_SOCKET_IFNAME=lo  # gloo's connections stay on this machine
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # the agent lets ranks save for so many seconds, not 30
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # the agent opens no port either
export PET_RDZV_ENDPOINT="$DISTLLM_MEET"/agents  # the file in which accelerate's torchrun meets itself
export ACCELERATE_USE_CPU=true  # without it, accelerate looks for GPUs

# SIGUSR1 asks the ranks to save and end. The launcher must not die of it, and would leave them behind.
trap '' USR1
python -m accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --main_process_port=0 \
  --rdzv_backend=c10d --rdzv_conf=store_type=file --mixed_precision=no --dynamo_backend=no --max_restarts=0 --module \
  distllm train configs/quickstart.yaml layout.dp_shard=2 device=cpu
