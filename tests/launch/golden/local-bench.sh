#!/usr/bin/env bash
# quickstart-bench on this machine: 2 ranks, started by torchrun.
# Copy it and edit it, or let `distllm launch ... --on local --print` write it.
set -euo pipefail

DISTLLM_MEET=$(mktemp -d)
export DISTLLM_MEET
trap 'rm -rf -- "$DISTLLM_MEET"' EXIT
export DISTLLM_RANKS=2  # a launcher that starts another number, or single processes, is refused
export DISTLLM_LAUNCH="$DISTLLM_MEET"  # each rank writes here how it ended, so that the first failure is told first
export DISTLLM_INIT_METHOD=file://"$DISTLLM_MEET"/store  # the ranks meet in a file: no port is opened
export OMP_NUM_THREADS=1  # the cores of a node, shared by its ranks
export GLOO_SOCKET_IFNAME=lo  # gloo's connections stay on this machine
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # the agent lets ranks save for so many seconds, not 30
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # the agent opens no port either

python -m torch.distributed.run --nnodes=1 --nproc-per-node=2 --rdzv-backend=c10d \
  --rdzv-endpoint="$DISTLLM_MEET"/agents --rdzv-conf=store_type=file --max-restarts=0 -m distllm bench \
  configs/quickstart.yaml device=cpu --grid 'ranks=1,2,4 layout.dp_shard=auto'
