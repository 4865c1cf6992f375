"""Collectives by hand: the same answer on every rank, errors on every rank, nothing on a world of one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distllm import comm
from distllm.comm import Agreement, World
from distllm.config.errors import ConfigError, DataError
from distllm.interfaces import interface_toward
from tests.ranks import on_ranks

ONE = World(0, 1, 0, 1, torch.device("cpu"))


def test_a_world_of_one_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    assert comm.broadcast(5, ONE) == 5 and comm.gather(5, ONE) == [5] and comm.any_rank(True, ONE)
    assert comm.main_first(lambda: 7, ONE) == 7
    assert comm.first_error(None, ONE) is None
    assert Agreement(ONE, flags=2).exchange([True, False]) == [True, False]
    tensor = torch.tensor([2.0])
    assert comm.sum_over(tensor, None).item() == 2.0


def test_ranks_get_the_same_answers(tmp_path: Path) -> None:
    def rank(world: World) -> list[object]:
        r = world.rank
        error = DataError("broken") if r == 1 else None
        return [
            comm.broadcast(f"from {r}", world), comm.gather(r * r, world), comm.any_rank(r == 2, world),
            comm.any_rank(False, world), str(comm.first_error(error, world)),
            comm.sum_over(torch.tensor([float(r)]), dist.group.WORLD).item(),
        ]  # fmt: skip

    assert on_ranks(rank, 3, tmp_path) == [["from 0", [0, 1, 4], True, False, "broken", 3.0]] * 3


def test_the_main_rank_goes_first_and_the_others_wait_longer_than_a_collective_may(tmp_path: Path) -> None:
    def rank(world: World) -> tuple[str, bool]:
        done = tmp_path / "done"

        def work() -> str:
            time.sleep(1.0)
            done.write_text("x")
            return "result"

        answer = comm.main_first(work, world)
        return answer, done.exists()

    assert on_ranks(rank, 2, tmp_path / "ranks") == [("result", True)] * 2


def test_an_error_of_the_main_rank_is_raised_on_all(tmp_path: Path) -> None:
    def rank(world: World) -> str:
        def work() -> None:
            raise ConfigError(["a=1: wrong; nearest: 2"])

        with pytest.raises(ConfigError) as caught:
            comm.main_first(work, world)
        return str(caught.value)

    assert on_ranks(rank, 2, tmp_path) == ["a=1: wrong; nearest: 2"] * 2


def test_agreement_comes_one_call_later_and_on_all_ranks_at_once(tmp_path: Path) -> None:
    def rank(world: World) -> list[list[bool]]:
        agreement = Agreement(world, flags=2)
        answers = [agreement.exchange([world.rank == 1 and step == 2, step == 3]) for step in range(5)]
        return [*answers, agreement.last()]

    no = [False, False]
    assert on_ranks(rank, 2, tmp_path) == [[no, no, no, [True, False], [False, True], no]] * 2


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda: no CUDA device is available here; use device=cpu"):
        comm.start("cuda")
    assert comm.start("auto").device == torch.device("cpu")


def test_the_meeting_point_is_served_on_its_own_address_alone() -> None:
    with comm._listener("127.0.0.1", 0) as listener:
        address, port = listener.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(ValueError, match=f"MASTER_PORT={port}: another program listens there on 127.0.0.1; nearest: "):
            comm._listener("127.0.0.1", port)
    with comm._listener("192.0.2.1", 0) as listener:  # of a documentation network: no interface here has it
        assert listener.getsockname()[0] == "0.0.0.0"
    with pytest.raises(ValueError, match=r"MASTER_ADDR=no-such\.invalid: this name has no address here"):
        comm._listener("no-such.invalid", 0)


def test_the_interface_is_the_one_that_leads_to_the_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    if interface_toward("127.0.0.1") is None:  # another system than Linux: gloo chooses by itself
        return
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    comm._use_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,lo")
    comm._use_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo,lo"  # the user's choice stands
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,no-such")
    with pytest.raises(ValueError, match=r"^GLOO_SOCKET_IFNAME=no-such: this machine has no such network interface; nearest: "):
        comm._use_interface("127.0.0.1")
    assert interface_toward("no-such.invalid") is None


def test_a_rank_whose_launcher_started_another_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTLLM_RANKS", "2")
    with pytest.raises(ValueError, match="DISTLLM_RANKS=2: the job was planned for 2 ranks and this process is in a world of 1"):
        comm.start("cpu")
