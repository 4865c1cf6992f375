"""The begin and end of an attempt: where to meet, what is told first, and when a job stops asking for more."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from distllm.launch import attempt
from distllm.launch.reports import Report, first_failure, outcome, read_reports, tell_torchrun, write_report


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A launch's folder in a job of one node, in an environment without SLURM's commands."""
    for name in [n for n in os.environ if n.startswith(("SLURM_", "DISTLLM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setenv("DISTLLM_RANKS", "2")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "launch"


def saved(folder: Path, step: int) -> None:
    (folder / "run" / "checkpoints" / f"step-{step}").mkdir(parents=True)


def begin(job: Path, attempts: int = 2) -> int:
    run = str(job.parent / "run")
    return attempt.main(["begin", str(job), "--run", run, "--attempts", str(attempts), "--slots", "4"])


def end(job: Path, code: int = 0, *more: str) -> int:
    return attempt.main(["end", str(job), "--run", str(job.parent / "run"), "--code", str(code), "--attempts", "2", *more])


def stub(job: Path, name: str, code: int = 0) -> None:
    script = job.parent / "bin" / name
    script.write_text(f'#!/bin/sh\necho "{name} $*" >> {job.parent}/called\nexit {code}\n')
    script.chmod(0o755)


def test_ranks_of_one_node_meet_on_loopback_at_a_free_port(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert begin(job) == 0
    address, port = capsys.readouterr().out.split()
    assert address == "127.0.0.1" and int(port) == 20_372
    with socket.create_server(("127.0.0.1", 20_372)):
        assert begin(job) == 0
    assert capsys.readouterr().out.split() == ["127.0.0.1", "20373"]
    assert (job / "hostfile").read_text() == "n1 slots=4\n"


def test_ranks_of_several_nodes_meet_at_the_first(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempt.meeting_point({"SLURM_JOB_NODELIST": "localhost,n2", "SLURM_JOB_ID": "1"}) == ("localhost", 20_031)
    stub(job, "scontrol")
    (job.parent / "bin" / "scontrol").write_text("#!/bin/sh\necho NodeName=no-such-1 NodeAddr=10.1.2.3 Port=1\n")
    assert attempt.meeting_point({"SLURM_JOB_NODELIST": "no-such-[1-2]", "SLURM_JOB_ID": "1"})[0] == "10.1.2.3"


def test_a_job_without_progress_stops_at_its_begin(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(job.parent, 5)
    assert [begin(job), begin(job)] == [0, 0]
    assert begin(job) == 10
    told = capsys.readouterr().err
    assert told.startswith("distllm: no progress: the last 2 attempts all began at step 5 and saved nothing further, so the job stops")
    saved(job.parent, 6)
    assert begin(job) == 0
    assert [json.loads(line)["step"] for line in (job / "attempts.jsonl").read_text().splitlines()] == [5, 5, 6]


def test_a_line_that_was_cut_off_ends_no_attempt(job: Path) -> None:
    saved(job.parent, 5)
    assert begin(job) == 0
    with (job / "attempts.jsonl").open("a") as file:
        file.write('{"step": 5, "rest')  # the node died in the midst of it
    assert begin(job) == 0 and begin(job) == 10
    assert (job / "attempts.jsonl").read_text().splitlines()[1:] == ['{"step": 5, "rest', '{"step": 5, "restart": 0}']


def test_a_stop_on_request_is_requeued_by_scontrol(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub(job, "scontrol")
    assert begin(job) == 0
    saved(job.parent, 7)
    for rank in range(2):
        write_report(job, Report(rank, "n1", 75))
    assert end(job, 1) == 75  # torchrun says 1 for everything
    assert (job.parent / "called").read_text() == "scontrol requeue 12\n"
    assert "stopped at step 7 before the time limit; asking SLURM to requeue job 12" in capsys.readouterr().err


def test_without_scontrol_the_script_is_given_to_sbatch_again(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(job, "sbatch")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert begin(job) == 0
    saved(job.parent, 7)
    write_report(job, Report(0, "n1", 75))
    script = job.parent / "slurm_script"
    script.write_text("#!/bin/sh\n")
    assert end(job, 75, "--script", str(script)) == 0
    assert (job.parent / "called").read_text() == f"sbatch --array=3 {job}/again.sbatch\n"
    assert (job / "again.sbatch").read_text() == "#!/bin/sh\n"


def test_without_either_the_exit_code_asks(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub(job, "scontrol", 1)
    stub(job, "sbatch", 1)
    assert begin(job) == 0
    saved(job.parent, 7)
    write_report(job, Report(0, "n1", 75))
    assert end(job, 75, "--script", __file__) == 75
    assert "neither scontrol nor sbatch works here: exit code 75 (RequeueExit in slurm.conf requeues it)" in capsys.readouterr().err


def test_other_nodes_than_asked_for_are_not_started_on(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub(job, "scontrol")
    run = ["--run", str(job.parent / "run"), "--nodes", "2", "--attempts", "2"]
    assert attempt.main(["begin", str(job), *run]) == 75
    assert capsys.readouterr() == (
        "", "distllm: SLURM gave 1 node (n1) where 2 were asked for; asking SLURM to requeue job 12\n"
    )  # fmt: skip
    assert (job.parent / "called").read_text() == "scontrol requeue 12\n"
    assert attempt.main(["begin", str(job), *run]) == 10
    assert attempt.main(["begin", str(job), *run]) == 10
    assert (job.parent / "called").read_text() == "scontrol requeue 12\n"  # once
    stub(job, "scontrol", 1)
    stub(job, "sbatch")
    saved(job.parent, 7)
    script = ["--script", str(job.parent / "bin" / "sbatch")]
    assert attempt.main(["begin", str(job), *run, *script]) == 75  # a new job goes on, and this script must not


def test_ranks_that_were_not_started_are_requeued(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub(job, "scontrol")
    assert begin(job) == 0
    assert end(job, attempt.NO_STEP) == 75
    assert (job.parent / "called").read_text() == "scontrol requeue 12\n"
    assert "SLURM did not start the ranks on all nodes, see srun's line above; asking" in capsys.readouterr().err
    assert end(job, attempt.NO_STEP, "--asked", "TERM") == attempt.NO_STEP  # scancel while srun waits
    write_report(job, Report(1, "n2", 8, ("out of memory",)))
    assert end(job, attempt.NO_STEP) == 8
    assert begin(job) == 0
    assert end(job, attempt.NO_STEP) == 10
    assert (job.parent / "called").read_text() == "scontrol requeue 12\n"


def test_a_dead_node_is_told_from_a_killed_rank(job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stub(job, "scontrol")
    stub(job, "srun")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    begin(job)
    write_report(job, Report(0, "n1", 7, ("lost another rank",)))
    assert end(job, 7) == 7
    asked = "srun --overlap --immediate=20 --nodes=2 --ntasks=2 --ntasks-per-node=1 true\n"
    assert (job.parent / "called").read_text().endswith(asked)
    stub(job, "srun", 1)
    assert end(job, 7, "--asked", "TERM") == 7  # scancel
    assert end(job, 7) == 75
    assert "not all nodes answer any more; asking SLURM to requeue job 12" in capsys.readouterr().err
    assert (job.parent / "called").read_text().endswith(asked + "scontrol requeue 12\n")
    (job.parent / "bin" / "srun").write_text("#!/bin/sh\necho \"srun: unrecognized option '--overlap'\" >&2\nexit 1\n")
    assert end(job, 7) == 7
    stub(job, "srun", 1)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    assert end(job, 7) == 7
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    write_report(job, Report(1, "n2", 8, ("out of memory",)))  # it said why
    assert end(job, 1) == 8


def test_a_bench_is_never_requeued(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub(job, "scontrol")
    run = ["--run", str(job.parent / "run"), "--once"]
    assert attempt.main(["begin", str(job), *run, "--nodes", "2"]) == 7
    assert capsys.readouterr().err == "distllm: SLURM gave 1 node (n1) where 2 were asked for; nearest: submit it again\n"
    for _ in range(4):  # what it saves is no checkpoint
        assert attempt.main(["begin", str(job), *run, "--nodes", "1"]) == 0
    for code in (attempt.NO_STEP, 75, 11):
        assert attempt.main(["end", str(job), *run, "--code", str(code)]) == code
    write_report(job, Report(0, "n1", 11))
    write_report(job, Report(1, "n1", 11))
    assert attempt.main(["end", str(job), *run, "--code", "1"]) == 11
    assert not (job.parent / "called").exists()


def test_without_progress_nothing_is_requeued(job: Path) -> None:
    stub(job, "scontrol")
    assert [begin(job), begin(job)] == [0, 0]
    write_report(job, Report(0, "n1", 75))
    assert end(job, 75) == 10
    assert not (job.parent / "called").exists()


def test_scancel_is_obeyed(job: Path) -> None:
    stub(job, "scontrol")
    assert begin(job) == 0
    saved(job.parent, 7)
    write_report(job, Report(0, "n1", 75))
    assert end(job, 75, "--asked", "TERM") == 75
    assert not (job.parent / "called").exists()


def test_reports_of_an_earlier_attempt_are_forgotten(job: Path) -> None:
    job.mkdir()
    write_report(job, Report(0, "n1", 5, ("boom",)))
    assert begin(job) == 0 and read_reports(job) == []


def test_the_first_failure_is_told_first(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(job)
    write_report(job, Report(0, "n1", 7, ("lost the connection to another rank",), at=1.0))
    write_report(job, Report(1, "n2", 8, ("out of memory",), at=2.0))
    capsys.readouterr()
    assert end(job, 1) == 8
    assert capsys.readouterr().err.splitlines()[0] == "distllm: rank 1 on n2 failed first, with exit code 8: out of memory"


def test_outcomes() -> None:
    ok, lost, data = Report(0, "n", 0), Report(0, "n", 7, ("lost",), 1.0), Report(1, "n", 3, ("bad file",), 2.0)
    assert outcome([ok, Report(1, "n", 0)], code=0, size=2) == (0, [])
    assert outcome([ok, Report(1, "n", 75)], code=1, size=2) == (75, [])
    assert outcome([lost, data], code=1, size=2)[0] == 3
    assert first_failure([lost, data]) == data and first_failure([ok]) is None
    code, lines = outcome([lost], code=1, size=2)  # rank 1 was killed, and rank 0 only lost it
    assert code == 7 and lines[0].startswith("rank 1 ended without a word: killed (often: out of memory)")
    assert outcome([], code=2, size=2)[0] == 2
    assert outcome([], code=1, size=2)[0] == outcome([ok], code=1, size=2)[0] == 7  # torchrun's 1 of ranks killed by SIGKILL
    assert outcome([], code=137, size=2)[0] == 137


def test_torn_reports_are_left_out_and_a_gone_folder_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "rank-0.json").write_text('{"rank": 0')
    (tmp_path / "rank-1.json").write_text('{"rank": 1, "x": 2, "lines": []}')
    assert read_reports(tmp_path) == []
    (tmp_path / "file").write_text("")
    write_report(tmp_path / "file" / "x", Report(0, "n", 0))


def test_torchruns_summary_gets_our_words(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    tell_torchrun(["bad file"], file=str(file), code=3)
    assert json.loads(file.read_text())["message"]["message"] == "bad file"
    file.unlink()
    tell_torchrun([], file=str(file), code=75)
    tell_torchrun(["x"], file=None, code=3)
    assert not file.exists()
