"""What a rank says of itself is what it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from distllm import comm
from distllm.comm import Place, World
from distllm.watch.beat import Beat, Pulse
from distllm.watch.process import Process
from distllm.watch.slots import FileSlots, StoreSlots
from tests.ranks import on_ranks


def while_doing(world: World, work: Callable[[], object], *, moment_s: float = 0.3) -> list[Beat]:
    """Two beats of the main thread while it does `work`."""
    clock = iter(range(100))
    pulse = Pulse(world, thread=threading.get_ident(), clock=lambda: float(next(clock)))
    beats: list[Beat] = []

    def watch() -> None:
        time.sleep(moment_s)
        beats.extend([pulse.take(), pulse.take()])

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    thread.join()
    return beats


def test_one_that_waits_in_a_collective_names_it_and_is_ahead(tmp_path: Path) -> None:
    def rank(world: World) -> tuple[object, ...]:
        group = dist.new_group([0, 1], group_desc="mesh_dp_shard")
        dist.all_reduce(torch.ones(2), group=group)
        dist.barrier()
        late: Callable[[], object] = lambda: time.sleep(1.0)  # noqa: E731
        work = late if world.rank == 1 else lambda: dist.all_reduce(torch.ones(2), group=group)
        _, beat = while_doing(world, work)
        if world.rank == 1:
            dist.all_reduce(torch.ones(2), group=group)
        return beat.waits, str(beat.collective), beat.entered[group.group_name], beat.at.split(" in ")[-1], beat.still_s

    waiting, late = on_ranks(rank, 2, tmp_path)
    assert waiting[:3] == (True, "all_reduce #2 of dp_shard", 2) and waiting[4] == 1.0
    assert late[0] is False and late[2:] == (1, "<lambda>", 1.0)


def test_rank_0_alone_at_work_and_those_who_wait_for_it_are_patient(tmp_path: Path) -> None:
    def rank(world: World) -> list[bool]:
        world.place.enter("step")
        world.place.enter("step")
        alone = while_doing(world, lambda: comm.main_first(lambda: time.sleep(1.0), world))[1].patient
        return [alone, while_doing(world, lambda: time.sleep(0.6))[1].patient]

    assert on_ranks(rank, 2, tmp_path) == [[True, False]] * 2


def test_compiling_is_patient_and_running_what_was_compiled_is_not() -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    world.place.enter("step")
    world.place.enter("step")

    def slow(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        time.sleep(0.6)
        return lambda *given: (time.sleep(0.6), graph(*given))[1]

    compiled = torch.compile(lambda x: x + 1, backend=slow)
    beat = while_doing(world, lambda: compiled(torch.ones(2)), moment_s=0.3)[1]
    assert beat.patient
    assert not while_doing(world, lambda: compiled(torch.ones(2)), moment_s=0.3)[1].patient


def test_the_phase_of_a_step_is_read_from_the_stack() -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    world.place.enter("step")

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.6)
            return x * 2

    x = torch.ones(2, requires_grad=True)
    assert while_doing(world, lambda: Slow()(x))[1].phase == "forward"
    y = (x * 2).sum()
    x.register_hook(lambda gradient: time.sleep(0.6))
    assert while_doing(world, lambda: y.backward())[1].phase == "backward"
    assert while_doing(world, lambda: time.sleep(0.6))[1].phase == "step"
    world.place.enter("evaluation")
    assert while_doing(world, lambda: Slow()(x))[1].phase == "evaluation"


def test_the_first_time_in_a_phase_is_marked() -> None:
    place = Place()
    seen = []
    for phase in ("data", "step", "data", "step", "evaluation", "step"):
        place.enter(phase)
        seen.append(place.first)
    assert seen == [True, True, False, False, True, False] and place.moves == 6


def test_the_end_of_a_process_is_seen_by_its_signal() -> None:
    script = (
        "from distllm.watch.process import Process; p = Process.own(); "
        "print(p.machine, p.pid, p.born, sep='|', flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdin is not None
    machine, pid, born = child.stdout.readline().strip().split("|")
    process = Process(machine, int(pid), born)
    assert process.end() is None and not process.stopped()
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert process.stopped() and process.end() is None
    process.go_on()
    os.waitid(os.P_PID, child.pid, os.WCONTINUED | os.WNOWAIT)
    assert not process.stopped()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.end() == "was ended by SIGKILL (often: the machine is out of memory)"
    child.wait()
    assert process.end() == "died"
    child.stdin.close()
    child.stdout.close()
    assert Process("another boot", os.getpid(), "0").end() is None  # nothing is known of another machine's
    assert Process(Process.own().machine, os.getpid(), "0").end() == "died"  # another process has its number now


def test_slots_of_files_and_of_a_store_do_the_same(tmp_path: Path) -> None:
    def use(slots: FileSlots | StoreSlots, world: World) -> list[object]:
        slots.put(b"long %d" % world.rank)
        slots.put(b"%d" % world.rank)
        dist.barrier()
        got = [data.rstrip() for data in slots.get([0, 1])]
        before = slots.told()
        dist.barrier()
        first = slots.mark_told()
        dist.barrier()
        after = slots.told()
        dist.barrier()
        slots.close()
        return [got, before, first, after]

    def rank(world: World) -> list[list[object]]:
        (tmp_path / "store.told").touch()  # of an earlier attempt
        dist.barrier()
        files = FileSlots(str(tmp_path / "store"), rank=world.rank)
        dist.barrier()
        return [use(files, world), use(StoreSlots(rank=world.rank, attempt="a", patience_s=5.0), world)]

    answers = on_ranks(rank, 2, tmp_path / "ranks")
    for way in (0, 1):
        assert [answer[way][:2] + answer[way][3:] for answer in answers] == [[[b"0", b"1"], False, True]] * 2
        assert sorted(answer[way][2] for answer in answers) == [False, True]
    assert [path.name for path in tmp_path.glob("store*")] == ["store.told"]
