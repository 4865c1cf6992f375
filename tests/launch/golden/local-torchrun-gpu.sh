#!/usr/bin/env bash
# quickstart on this machine: 8 ranks, started by torchrun.
# Copy it and edit it, or let `distllm launch ... --on local --print` write it.
set -euo pipefail

DISTLLM_MEET=$(mktemp -d)
export DISTLLM_MEET
trap 'rm -rf -- "$DISTLLM_MEET"' EXIT
export DISTLLM_RANKS=8  # a launcher that starts another number, or single processes, is refused
export DISTLLM_LAUNCH="$DISTLLM_MEET"  # each rank writes here how it ended, so that the first failure is told first
export DISTLLM_PREFLIGHT=1  # versions, an all-reduce and the shared folder are tried before training
export DISTLLM_INIT_METHOD=file://"$DISTLLM_MEET"/store  # the ranks meet in a file: no port is opened
export OMP_NUM_THREADS=1  # the cores of a node, shared by its ranks
export GLOO_SOCKET_IFNAME=lo  # gloo's connections stay on this machine
export NCCL_SOCKET_IFNAME=lo  # NCCL's first contact stays on this machine; data goes over NVLink
export NCCL_DEBUG=WARN  # a failure of the network names its cause; nothing else is said
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3  # a hung collective ends its rank, and a broken one never goes on
export TORCH_FR_BUFFER_SIZE=2000  # the last 2,000 collectives are remembered
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # and written down when one times out: it names the rank that is missing
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # the agent lets ranks save for so many seconds, not 30
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # the agent opens no port either

# SIGUSR1 asks the ranks to save and end. The launcher must not die of it, and would leave them behind.
trap '' USR1
python -m torch.distributed.run --nnodes=1 --nproc-per-node=8 --rdzv-backend=c10d \
  --rdzv-endpoint="$DISTLLM_MEET"/agents --rdzv-conf=store_type=file --max-restarts=0 -m distllm train \
  configs/quickstart.yaml layout.dp_shard=2 device=cpu
