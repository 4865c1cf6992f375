"""Where ranks leave their beats for each other: files of one machine, or the store of the rendezvous."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

from distllm import comm
from distllm.comm import World

_BYTES = 4096  # a page: more than a beat has


class Slots(Protocol):
    """A slot a rank, which it alone writes, and one mark: the end has been told."""

    def put(self, data: bytes) -> None:
        """Write this rank's slot."""

    def get(self, ranks: Sequence[int]) -> list[bytes]:
        """The slots of some ranks, in their order."""

    def mark_told(self) -> bool:
        """Set the mark; whether this rank is the first who did."""

    def told(self) -> bool:
        """Whether the mark is set."""

    def close(self) -> None:
        """Leave nothing behind."""


class FileSlots:
    """A file a rank beside the rendezvous file of the local launcher, overwritten in place.

    A FileStore would do the same and grow for as long as the run lasts: it appends every value.
    """

    def __init__(self, store: str, *, rank: int) -> None:
        self._store, self._rank = store, rank
        self._files: dict[int, int] = {rank: os.open(self._name(rank), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)}
        if rank == 0:  # of an earlier attempt, where ranks are started by hand
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{store}.told")

    def put(self, data: bytes) -> None:
        assert len(data) <= _BYTES
        os.pwrite(self._files[self._rank], data.ljust(_BYTES), 0)

    def get(self, ranks: Sequence[int]) -> list[bytes]:
        return [os.pread(file, _BYTES, 0) if (file := self._file(rank)) is not None else b"" for rank in ranks]

    def mark_told(self) -> bool:
        try:
            os.close(os.open(f"{self._store}.told", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return False
        except FileNotFoundError:  # the launcher has cleared up: all is over
            return False
        return True

    def told(self) -> bool:
        return os.path.exists(f"{self._store}.told")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._name(self._rank))

    def _name(self, rank: int) -> str:
        return f"{self._store}.rank-{rank}"

    def _file(self, rank: int) -> int | None:
        if rank not in self._files:  # kept open: it can be read after its rank has cleared it away
            try:
                self._files[rank] = os.open(self._name(rank), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
        return self._files[rank]


class StoreSlots:
    """Keys in the store of the rendezvous, over a connection of its own: a wait of the training thread holds up none."""

    def __init__(self, *, rank: int, attempt: str, patience_s: float) -> None:
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=patience_s))
        # A restarted job may meet in the store of the attempt before.
        self._store, self._rank = dist.PrefixStore(f"distllm/watch/{attempt}", store), rank

    def put(self, data: bytes) -> None:
        self._store.set(str(self._rank), data.decode())

    def get(self, ranks: Sequence[int]) -> list[bytes]:
        return self._store.multi_get([str(rank) for rank in ranks])

    def mark_told(self) -> bool:
        return self._store.add("told", 1) == 1

    def told(self) -> bool:
        return self._store.check(["told"])

    def close(self) -> None:
        pass


def open_slots(world: World, *, patience_s: float) -> Slots:
    """The slots of this world's ranks. A collective call.

    Args:
        world: more than one rank.
        patience_s: seconds after which a store that does not answer is an error.
    """
    path = comm.local_store()
    attempt = comm.broadcast(os.urandom(4).hex(), world)
    slots: Slots = (
        FileSlots(path, rank=world.rank)
        if path is not None
        else StoreSlots(rank=world.rank, attempt=attempt, patience_s=patience_s)
    )
    return slots
