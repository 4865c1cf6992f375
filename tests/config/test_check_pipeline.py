"""What a schedule asks for is told with a value that works."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules

from distllm.config.check_pipeline import SCHEDULES, needs_gathered, schedule_problems, stage_owners, virtual_stages
from distllm.config.errors import ConfigError
from distllm.config.schedule_csv import Work, owners_of, read_order


def problems(
    schedule: str, *, pp: int = 4, virtual: int | None = None, microbatches: int = 8, compiled: bool = False
) -> list[str]:
    stages = virtual_stages(schedule, "auto" if virtual is None else virtual)
    return list(schedule_problems(schedule, pp=pp, virtual=stages, microbatches=microbatches, compiled=compiled))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eight_microbatches_over_four_ranks_suit_every_schedule(schedule: str) -> None:
    assert problems(schedule) == []


def test_too_few_microbatches() -> None:
    assert problems("1f1b", microbatches=3) == [
        "train.accumulation=3: 1f1b over layout.pp=4 needs at least 4 micro-batches a step; nearest: 4, or "
        "layout.pp_schedule=gpipe"
    ]
    (line,) = problems("dualpipev", microbatches=7)
    assert line.endswith("needs at least 8 micro-batches a step; nearest: 8, or layout.pp_schedule=gpipe")


def test_rounds_that_do_not_divide() -> None:
    assert problems("interleaved_1f1b", microbatches=9) == [
        "train.accumulation=9: interleaved_1f1b runs 2 rounds of 4 or more, so it must be a multiple of 2; nearest: 10"
    ]


def test_stages_of_a_rank() -> None:
    assert problems("1f1b", virtual=2) == [
        "layout.pp_virtual=2: 1f1b has one stage a rank; nearest: 1, or layout.pp_schedule=interleaved_1f1b"
    ]
    assert problems("zbv", virtual=3) == ["layout.pp_virtual=3: zbv has two stages a rank; nearest: 2"]


def test_compiled_blocks_and_halved_backward_passes() -> None:
    assert problems("1f1b", compiled=True) == []
    for schedule in ("interleaved_zero_bubble", "zbv", "dualpipev", "csv"):
        assert needs_gathered(schedule)
        (line,) = problems(schedule, compiled=True)
        assert line.startswith("train.compile=true: ") and line.endswith("nearest: false, or layout.pp_schedule=interleaved_1f1b")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_nearest_value_works(schedule: str) -> None:
    for pp in (2, 3, 4, 7, 8):
        for microbatches in range(1, 40):
            for line in problems(schedule, pp=pp, microbatches=microbatches):
                near = int(re.search(r"nearest: (\d+)", line)[1])  # type: ignore[index]
                assert problems(schedule, pp=pp, microbatches=near) == []


TORCH = {
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}


@pytest.mark.parametrize("schedule", TORCH)
def test_what_passes_is_what_torch_takes(schedule: str) -> None:
    single = schedule == "1f1b"
    for pp in (2, 3, 4):
        for microbatches in range(1, 14):
            stages = [
                SimpleNamespace(group_size=pp, group_rank=0, num_stages=pp * (2 - single), stage_index=0, submod=None)
                for _ in range(2 - single)
            ]
            try:
                TORCH[schedule](stages[0] if single else stages, microbatches)  # type: ignore[arg-type]
                taken = True
            except ValueError:
                taken = False
            assert (problems(schedule, pp=pp, microbatches=microbatches) == []) == taken, (pp, microbatches)


def test_who_holds_which_stage() -> None:
    assert stage_owners("1f1b", pp=3, virtual=1) == (0, 1, 2)
    assert stage_owners("interleaved_1f1b", pp=2, virtual=3) == (0, 1, 0, 1, 0, 1)
    assert stage_owners("zbv", pp=3, virtual=2) == (0, 1, 2, 2, 1, 0)


def write(folder: Path, *lines: str) -> Path:
    file = folder / "schedule.csv"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


GOOD = ("0F0,0F1,,0B0,0B1", ",1F0,1I0,1W0,1F1,1B1")


def test_a_file_of_torchs_form_is_read(tmp_path: Path) -> None:
    order = read_order(write(tmp_path, *GOOD), pp=2, microbatches=2)
    assert order[1][1] == (Work(1, "I", 0),) and [len(row) for row in order] == [4, 5]
    assert owners_of(order) == (0, 1)
    both = read_order(write(tmp_path, "0F0,0F1,0B0,0B1", "1F0,(1F1;1B0)OVERLAP_F_B,1B1"), pp=2, microbatches=2)
    assert both[1][1] == (Work(1, "F", 1), Work(1, "B", 0))


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        (GOOD[:1], "has 1 lines, and layout.pp=2 needs one a rank; nearest: layout.pp=1"),
        (("0F0,0B0,0F1,0X1", "1F0"), "line 1: '0X1' is no work; nearest: 0F0, 0B0, 0I0, 0W0 or nothing"),
        (("0F0,0F1,0B0,0B1", "1F0,1B0,1F1"), "stage 1 has F for micro-batch 1; nearest: F and then B, or F, I and W"),
        (("0F0,0F1,0B0,0B1", "1F0,1W0,1I0,1F1,1B1"), "stage 1 has FWI for micro-batch 0; nearest: F and then B, or F, I and W"),
        (("0F1,0F0,0B0,0B1", "1F0,1B0,1F1,1B1"), "0F1 comes before 0F0: each stage takes micro-batches in order"),
        (("0F0,0B0,0F1,0B1", "1F0,1F1,1B0,1B1"), "0B0 waits for what comes after it"),
        (("0F0,0F1,0B0,0B1,1F0", "1F1"), "stage 1 is on line 1 and on line 2"),
        (("0F0,0F1,0B0,0B1", "2F0,2B0,2F1,2B1"), "has the stages [0, 2]; nearest: 0 to 1"),
        (("0F0,0F1,0F2,0B0,0B1,0B2", "1F0,1B0,1F1,1B1,1F2,1B2"),
         "has micro-batch 2, and train.accumulation=2; nearest: train.accumulation=3"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_run_is_refused(lines: tuple[str, ...], rule: str, tmp_path: Path) -> None:
    file = write(tmp_path, *lines)
    with pytest.raises(ConfigError) as error:
        read_order(file, pp=2, microbatches=2)
    assert str(error.value) == f"layout.pp_csv={file}: {rule}"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; nearest: the folder .*, or layout.pp_schedule=1f1b$"):
        read_order(tmp_path / "none.csv", pp=2, microbatches=2)
