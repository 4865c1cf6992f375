#!/usr/bin/env bash
# quickstart on 2 nodes by ssh: 2 nodes x 8 ranks, started by torchrun.
# `distllm launch --on ssh` runs the same commands, after it has tried every node, and ends them together.
set -uo pipefail

# The variables that the ranks may see. Their values go to the nodes and are never printed.
names=(HF_HOME HF_TOKEN PATH PYTHONPATH WANDB_API_KEY WANDB_MODE)
environment() {
  for name in "${names[@]}"; do
    if [ -n "${!name+set}" ]; then printf 'export %s=%q\n' "$name" "${!name}"; fi
  done
}

# node 0
{ environment; cat <<'NODE'
cd -- '/home/me/my runs'
mkdir -p -- runs/.launch/quickstart/ssh
export DISTLLM_RANKS=16  # a launcher that starts another number, or single processes, is refused
export DISTLLM_LAUNCH=runs/.launch/quickstart/ssh  # each rank writes here how it ended, so that the first failure is told first
export DISTLLM_PREFLIGHT=1  # versions, an all-reduce and the shared folder are tried before training
export MASTER_ADDR=node1  # the first node, where the ranks meet
export MASTER_PORT=29500  # a port of it that was free just now
export OMP_NUM_THREADS=12  # the cores of a node, shared by its ranks
export GLOO_SOCKET_IFNAME=eth0  # the interface that was asked for
export NCCL_SOCKET_IFNAME=eth0  # the interface that was asked for
export NCCL_DEBUG=WARN  # a failure of the network names its cause; nothing else is said
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3  # a hung collective ends its rank, and a broken one never goes on
export TORCH_FR_BUFFER_SIZE=2000  # the last 2,000 collectives are remembered
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # and written down when one times out: it names the rank that is missing
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # the agent lets ranks save for so many seconds, not 30
trap '' USR1
exec python -m torch.distributed.run --nnodes=2 --nproc-per-node=8 --node-rank=0 --master-addr=node1 --master-port=29500 \
  --max-restarts=0 -m distllm train configs/quickstart.yaml
NODE
} | ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 node1 bash -s &

# node 1
{ environment; cat <<'NODE'
cd -- '/home/me/my runs'
mkdir -p -- runs/.launch/quickstart/ssh
export DISTLLM_RANKS=16  # a launcher that starts another number, or single processes, is refused
export DISTLLM_LAUNCH=runs/.launch/quickstart/ssh  # each rank writes here how it ended, so that the first failure is told first
export DISTLLM_PREFLIGHT=1  # versions, an all-reduce and the shared folder are tried before training
export MASTER_ADDR=node1  # the first node, where the ranks meet
export MASTER_PORT=29500  # a port of it that was free just now
export OMP_NUM_THREADS=12  # the cores of a node, shared by its ranks
export GLOO_SOCKET_IFNAME=eth0  # the interface that was asked for
export NCCL_SOCKET_IFNAME=eth0  # the interface that was asked for
export NCCL_DEBUG=WARN  # a failure of the network names its cause; nothing else is said
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3  # a hung collective ends its rank, and a broken one never goes on
export TORCH_FR_BUFFER_SIZE=2000  # the last 2,000 collectives are remembered
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # and written down when one times out: it names the rank that is missing
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # the agent lets ranks save for so many seconds, not 30
trap '' USR1
exec python -m torch.distributed.run --nnodes=2 --nproc-per-node=8 --node-rank=1 --master-addr=node1 --master-port=29500 \
  --max-restarts=0 -m distllm train configs/quickstart.yaml
NODE
} | ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 me@node2 bash -s &

code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit "$code"
