"""What each launcher's environment means, and which are refused because N trainings would know nothing of each other."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import pytest

from distllm.node_names import expand, tasks_of
from distllm.rank_facts import RankFacts, node_name, rank_facts

MEET = {"MASTER_ADDR": "n1", "MASTER_PORT": "29400"}
TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", **MEET,
}  # fmt: skip
DEEPSPEED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2", **MEET}
SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "12", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "12", "SLURM_NNODES": "2"}


@pytest.mark.parametrize(
    ("environment", "facts"),
    [
        ({}, None),
        (TORCHRUN, RankFacts("torchrun", 3, 4, 1, 2, "env://", "n1", 29400)),
        (DEEPSPEED, RankFacts("deepspeed", 3, 4, 1, 2, "env://", "n1", 29400)),
        (SRUN | MEET, RankFacts("srun", 3, 4, 1, 2, "env://", "n1", 29400)),
        (SRUN, RankFacts("srun", 3, 4, 1, 2, "env://", "n1", 20372)),  # 20000 + 31 * 12
        (SRUN | {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}, RankFacts("srun", 3, 4, 1, 4, "env://", "127.0.0.1", 20372)),
        (BATCH, None),  # the batch script itself is no rank
        (BATCH | {"SLURM_STEP_ID": "4294967291"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "DISTLLM_INIT_METHOD": "file:///x"}, RankFacts("distllm", 1, 2, 0, 1, "file:///x", "127.0.0.1", 29500)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, RankFacts("mpirun", 1, 2, 1, 2, "env://", "127.0.0.1", 29500)),
        ({"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", **MEET}, RankFacts("mpirun", 0, 4, 0, 2, "env://", "n1", 29400)),
        (TORCHRUN | SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}, RankFacts("torchrun", 3, 4, 1, 2, "env://", "n1", 29400)),
        (TORCHRUN | {"DISTLLM_RANKS": "4"}, RankFacts("torchrun", 3, 4, 1, 2, "env://", "n1", 29400)),
    ],
)  # fmt: skip
def test_the_facts(environment: dict[str, str], facts: RankFacts | None) -> None:
    assert rank_facts(environment) == facts


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"DISTLLM_RANKS": "2", "ACCELERATE_USE_CPU": "true"}, "DISTLLM_RANKS=2: the job was planned for 2 ranks and this process is in a world of 1, so the launcher started another number, or processes that know nothing of each other (accelerate launch --cpu does); nearest: start 2 ranks, or unset DISTLLM_RANKS"),
        (TORCHRUN | {"DISTLLM_RANKS": "8"}, "DISTLLM_RANKS=8: the job was planned for 8 ranks and this process is in a world of 4"),
        ({"WORLD_SIZE": "1", "RANK": "0"} | SRUN, "SLURM_NTASKS=4: srun started 4 tasks, but this one is in a world of 1, so each would train by itself; nearest: torchrun --nnodes=$SLURM_NNODES --node-rank=$SLURM_NODEID, or srun with one task"),
        (TORCHRUN | {"GROUP_WORLD_SIZE": "1"} | SRUN | {"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_NTASKS=2: srun started 2 tasks, but this one is in a torchrun of 1 node, so each"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: is set, but RANK is not; nearest: unset WORLD_SIZE, or start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2: must be below WORLD_SIZE=2; nearest: 1"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT=x: must be a whole number; nearest: unset MASTER_PORT"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=4: mpirun started ranks on several nodes, and MASTER_ADDR does not say where they meet"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[2-1]"}, "node list 'n[2-1]': the range 2-1 does not count up to 100,000; nearest: n[01-03,7]"),
    ],
)
def test_what_is_refused(environment: dict[str, str], line: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        rank_facts(environment)
    assert str(caught.value).startswith(line)


def test_a_node_has_slurms_name_where_there_is_one() -> None:
    assert node_name({"SLURMD_NODENAME": "node2"}) == "node2" and node_name({}) != ""


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]), ("n1,n2", ["n1", "n2"]), ("n[01-03,7]", ["n01", "n02", "n03", "n7"]), ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("a[1-2]b[1,3],c", ["a1b1", "a1b3", "a2b1", "a2b3", "c"]), ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"]),
    ],
)  # fmt: skip
def test_node_lists(text: str, names: list[str]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize("text", ["", "n[1-", "n]1[", "n[]", "n[a-b]", "n[1-9999999]", "n[1-2][", "-n", "n;x", "n[1--2]", "n 1", "[1-2]x y"])
def test_node_lists_that_do_not_parse(text: str) -> None:
    with pytest.raises(ValueError, match="nearest: n\\[01-03,7\\]"):
        expand(text)


def test_tasks_per_node() -> None:
    assert tasks_of("2(x3),1") == [2, 2, 2, 1] and tasks_of("4") == [4]
    with pytest.raises(ValueError, match="does not parse"):
        tasks_of("2(y3)")
