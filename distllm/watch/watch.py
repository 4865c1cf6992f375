"""The thread of each rank that says where the rank is, looks at the others, and ends the process when one holds up all.

A collective that waits for a dead or stalled rank cannot be interrupted from Python, so the thread tells the reason and
leaves by `os._exit`. Nothing is lost by that: metrics and logs are written line by line, and checkpoints appear by a rename.

Each rank beats once a look. Ranks of one machine look at all slots. Elsewhere rank 0 does, and the others look at rank 0
and at the mark that says that the end has been told: one key is written and two are read by a rank a second, and rank 0
reads all of them, so a large world costs the store little.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from distllm.checkpoint.find import candidates
from distllm.comm import World
from distllm.config.errors import EXIT_LOST, LostError
from distllm.watch.beat import FAILED, LEFT, RUNS, STUCK, Beat, Pulse, from_bytes
from distllm.watch.slots import FileSlots, Slots, open_slots
from distllm.watch.verdict import Seen, Verdict, judge, tell

T = TypeVar("T")

GRACE_S = 5.0  # for a rank that can still end by itself when the end has been told
_FAILED_GRACE_S = 30.0  # for one that tells its own error, and may have a W&B run to close
_ECHO_S = 0.6  # how long an error of any kind waits for the news that it only follows from another rank's end
_DISK_S = 2.0  # a file system that hangs does not hold up the end


class Watch:
    """Watches over the ranks of a world until `stop`; of a world of one it does nothing."""

    def __init__(
        self, world: World, *, lost_s: float, stall_s: float, leaving: Callable[[], None] | None = None
    ) -> None:
        """Begin. A collective call, from the thread that trains.

        Args:
            world: this rank, whose process group has been started.
            lost_s: seconds without a sign of life after which a rank is lost.
            stall_s: seconds after which a rank is blamed that stands still while another waits for it.
            leaving: called before the watch ends this process, which nothing after it can be.
        """
        self._leaving = leaving
        self._world, self._lost_s, self._stall_s = world, lost_s, stall_s
        self._look_s = min(1.0, lost_s / 5)
        self._stopping = threading.Event()
        self._failed = False
        self._slots: Slots | None = None
        if world.size == 1:
            return
        self._now, self._last = 0.0, time.monotonic()
        self._known: dict[int, tuple[Beat, float]] = {}  # rank -> its last beat, and when that came
        self._silent_since: float | None = None  # since when the store does not answer
        self._failed_since: float | None = None  # since when a rank is known to tell its own error
        self._pulse = Pulse(world, thread=threading.get_ident(), clock=lambda: self._now)
        self._slots = open_slots(world, patience_s=lost_s / 2)
        self._slots.put(self._pulse.take().to_bytes())
        dist.barrier()  # from here on every slot holds a beat of this attempt
        self._thread = threading.Thread(target=self._run, name="distllm-watch", daemon=True)
        self._thread.start()

    def explain(self, error: BaseException, *, lost: bool, timed_out: bool) -> LostError | None:
        """Find out whether this rank's error only follows from another rank's end, and which.

        Args:
            error: what this rank met.
            lost: whether it is the loss of a connection; then it waits for the news as long as it may take.
            timed_out: whether a collective waited too long; then a rank that stands still is blamed whatever it does.

        Returns:
            The error to tell instead, without a text where another rank tells it; None where nothing is known: then this
            rank's own error is told, and the others are quiet.
        """
        if self._slots is None:
            return None
        self._end_thread()
        until = time.monotonic() + (self._lost_s + 2 * self._look_s if lost else _ECHO_S)
        try:
            while time.monotonic() < until:
                self._put(STUCK, error)
                seen = self._see(range(self._world.size))
                if self._slots.told() or any(s.beat.status == FAILED for s in seen):
                    return LostError("")
                stall_s = 0.0 if timed_out else float("inf")
                verdict = judge(seen, lost_s=self._lost_s, stall_s=stall_s, patient=not timed_out)
                if verdict is not None:
                    line = self._line(verdict)
                    return LostError(line if self._claim(line, verdict) else "")
                time.sleep(0.1)
        except (RuntimeError, OSError):
            pass  # the store has gone with its host
        self.fail()
        return None

    def stop(self) -> None:
        """End the watch: this rank leaves, and is missed by nobody."""
        if self._slots is None:
            return
        self._end_thread()
        try:
            if not self._failed:
                self._put(LEFT)
            elif self._world.is_main and not isinstance(self._slots, FileSlots):
                time.sleep(2 * self._look_s)  # the store may live in this process: the others see first that it tells its error
        except (RuntimeError, OSError):
            pass  # whoever keeps the store has gone
        self._slots.close()

    def fail(self) -> None:
        """Let the others know that this rank has an error of its own, and tells it."""
        if self._slots is None:
            return
        self._end_thread()
        self._failed = True
        with contextlib.suppress(RuntimeError, OSError):
            self._put(FAILED)

    def _end_thread(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=2 * self._lost_s)

    def _run(self) -> None:
        while not self._stopping.wait(self._look_s):
            try:
                self._look()
                self._silent_since = None
            except (RuntimeError, OSError):
                self._without_store()

    def _look(self) -> None:
        """Beat, and see whether all others do."""
        assert self._slots is not None
        self._put(RUNS)
        everyone = range(self._world.size)
        seen = self._see(everyone if self._world.is_main or isinstance(self._slots, FileSlots) else [0])
        if self._slots.told():
            self._follow()
        verdict = judge(seen, lost_s=self._lost_s, stall_s=self._stall_s)
        if verdict is not None and len(seen) < self._world.size:
            verdict = judge(self._see(everyone), lost_s=self._lost_s, stall_s=self._stall_s)
        if verdict is not None:
            self._end(verdict)
        if any(s.beat.status == FAILED for s in seen):
            self._failed_since = self._now if self._failed_since is None else self._failed_since
            if self._now - self._failed_since >= _FAILED_GRACE_S and not self._stopping.is_set():
                self._slots.mark_told()
                self._follow()

    def _put(self, status: str, error: BaseException | None = None) -> None:
        """Beat. Time counts in looks, so that a process, or a machine, that was itself stopped blames nobody for it."""
        assert self._slots is not None
        now = time.monotonic()
        self._now += min(now - self._last, 2 * self._look_s)
        self._last = now
        self._slots.put(self._pulse.take(status, error=error).to_bytes())

    def _see(self, ranks: Sequence[int]) -> list[Seen]:
        assert self._slots is not None
        for rank, data in zip(ranks, self._slots.get(ranks), strict=True):
            beat = from_bytes(data)
            known = self._known.get(rank)
            if beat is not None and (known is None or known[0].number != beat.number):
                self._known[rank] = (beat, self._now)
        seen = []
        for rank in ranks:
            if rank in self._known:
                beat, since = self._known[rank]
                seen.append(Seen(beat, self._now - since, beat.process.end(), beat.process.stopped()))
        return seen

    def _end(self, verdict: Verdict) -> None:
        """Tell it, if no other rank has, and leave."""
        assert self._slots is not None
        if self._stopping.is_set():  # the training thread has met an error, and looks for its reason itself
            return
        line = self._line(verdict)
        if self._claim(line, verdict):
            self._show(line)
        self._leave()

    def _claim(self, line: str, verdict: Verdict) -> bool:
        """Whether this rank is the one that tells; then the line is in its log."""
        assert self._slots is not None
        self._world.place.telling = True  # before the mark: with it, and without the line, nobody would tell
        if not self._slots.mark_told():
            self._world.place.telling = False
            return False
        _in_time(lambda: self._log(line), None)
        verdict.culprit.beat.process.go_on()  # one that was stopped sees the mark, and ends too
        return True

    def _follow(self) -> None:
        """The end has been told: leave, if the training thread has not done so in a while."""
        if not self._stopping.wait(GRACE_S):
            self._leave()

    def _without_store(self) -> None:
        """The store does not answer: where rank 0 keeps it, rank 0 is gone, or its machine."""
        self._silent_since = time.monotonic() if self._silent_since is None else self._silent_since
        if time.monotonic() - self._silent_since < self._lost_s or self._stopping.is_set() or 0 not in self._known:
            return
        beat = self._known[0][0]
        if beat.status not in (FAILED, LEFT) and self._world.local_rank == 0:  # the machines cannot agree on who tells
            verdict = Verdict(Seen(beat, self._lost_s), "stopped answering, and the rendezvous with it,", ())
            line = self._line(verdict)
            _in_time(lambda: self._log(line), None)
            self._show(line)
        self._leave()

    def _line(self, verdict: Verdict) -> str:
        folder = self._world.place.folder
        newest = _in_time(lambda: _newest(folder), None) if folder else None
        return tell(verdict, checkpoint=newest)

    def _show(self, line: str) -> None:
        """Write to the standard error stream, without its locks, which the training thread may hold."""
        os.write(2, (("\n" if os.isatty(2) else "") + f"distllm: {line}\n").encode())

    def _log(self, line: str) -> None:
        folder = self._world.place.folder
        if folder is not None:
            record = logging.LogRecord("distllm", logging.ERROR, "", 0, line, None, None)
            text = logging.Formatter("%(asctime)s error: %(message)s").format(record)
            with (folder / "logs" / f"rank-{self._world.rank}.log").open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def _leave(self) -> None:
        assert self._slots is not None
        try:
            self._put(LEFT)
            self._slots.close()
        except (RuntimeError, OSError):
            pass
        _in_time(sys.stdout.flush, None)
        if self._leaving is not None:
            _in_time(self._leaving, None)
        os._exit(EXIT_LOST)


def _newest(run: Path) -> Path | None:
    return next((folder for _, folder in candidates(run / "checkpoints")), None)


def _in_time(work: Callable[[], T], otherwise: T) -> T:
    """What `work` returns, or `otherwise` where it fails or takes too long."""
    answer = [otherwise]

    def run() -> None:
        with contextlib.suppress(OSError):
            answer[0] = work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_DISK_S)
    return answer[0]
