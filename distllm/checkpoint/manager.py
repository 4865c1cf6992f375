"""When a checkpoint is complete, where it lies, and which one a run continues from.

A save, on N ranks:
1. Every rank copies its pieces (the only part that the training step waits for); the rest is done by a thread.
2. Every rank writes `rank-K.safetensors` into `.tmp-step-S-...`, flushed and fsynced, and after it `rank-K.json`.
3. Rank 0 waits for all records by looking into the folder (a thread must not enter a collective), writes `config.yaml`
   and `manifest.json`, fsyncs them and the folder, renames the folder to `step-S` and fsyncs its parent.
4. Only then are older checkpoints deleted, each by a rename to `.trash-...` first.
5. Where the step is the best so far, the link `best` is made to name it, after it is in place and by one rename.

So a folder is a checkpoint if and only if its manifest verifies, and a process may die at any moment: what it leaves
is a `.tmp-` or `.trash-` folder, which the next start removes. A step that is saved again (after a fallback to an older
checkpoint) goes by way of `step-S.new`, which readers prefer, so that one good folder of the step always exists.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distllm.checkpoint import sharded
from distllm.checkpoint.chunk import Chunk
from distllm.checkpoint.commit import Save, write
from distllm.checkpoint.durable import storage_error
from distllm.checkpoint.find import BEST, Found, candidates, first_good, meant, step_folder, unreadable
from distllm.checkpoint.manifest import Manifest, NewerFormat, check_files, read_manifest, to_json
from distllm.checkpoint.retention import hold, link_best, retire, set_aside, tidy
from distllm.checkpoint.staging import Staging
from distllm.comm import World, any_rank, broadcast, first_error, gather, main_first
from distllm.config.errors import CheckpointError
from distllm.config.schema import CheckpointConfig

_BREATH_S = 10.0  # between two signs of life while ranks wait for each other, well under any time-out of a collective


class CheckpointManager:
    """Saves, keeps, finds and loads the checkpoints of one run.

    Except where said, its methods are collective: every rank calls them at the same point, and an error of one rank is
    raised on all.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: CheckpointConfig,
        world: World,
        attempt: str,
        logger: logging.Logger,
        timeout_s: float = 600.0,
    ) -> None:
        """Take the folder, and remove what a dead attempt left in it.

        Args:
            folder: of this run's checkpoints, on a file system that all ranks share; it is created.
            config: what is kept, and whether writing is asynchronous.
            world: this rank; a world of one needs no process group.
            attempt: the name of this start of the run, the same on all ranks.
            logger: told of bad checkpoints.
            timeout_s: seconds that rank 0 waits for the other ranks' files.

        Raises:
            CheckpointError: another live process writes there.
            StorageError: the folder cannot be created or written.
        """
        self.folder = folder
        self._config, self._world, self._attempt = config, world, attempt
        self._logger, self._timeout_s = logger, timeout_s
        self._staging = Staging()
        # Of ordinary priority: a lower one makes the write many times longer on busy cores, at the same cost to the
        # training in all, and a starved thread that holds the interpreter's lock would hold up the step too.
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._saving: Save | None = None
        self._linking: Future[None] | None = None
        self._saves = 0
        self._lock: int | None = None
        self._newest_writing: str | None = None
        self._good: set[str] = set()  # names of checkpoints that were written or checked by this process
        main_first(self._take_folder, world)  # checks of a second writing and big deletions take longer than a collective may

    def reserve(self, chunks: Mapping[str, Chunk]) -> None:
        """Take the memory for asynchronous saves now, so that the first is as quick as the others. Not collective."""
        if self._config.asynchronous:
            self._staging.reserve(chunks)

    def save(
        self,
        step: int,
        chunks: Mapping[str, Chunk],
        *,
        facts: dict[str, Any],
        rng: Mapping[str, torch.Tensor],
        layout: dict[str, Any],
        config_yaml: str,
        config_digest: str,
    ) -> None:
        """Save the state; when this returns the state may change, and when `wait` returns it is on the disk.

        Args:
            step: optimizer steps taken.
            chunks: the state by name.
            facts: what else the run needs, as JSON (no NaN); the same on all ranks.
            rng: this rank's random-number states by name.
            layout: sizes of the mesh axes.
            config_yaml: the resolved config.
            config_digest: the digest of what decides the run's result.

        Raises:
            StorageError: an earlier save, or this one when not asynchronous, could not be written.
            CheckpointError: another rank's files did not come in time.
            ValueError: `facts` or `layout` is no JSON.
        """
        self.wait()
        to_json([facts, layout])
        self._saves += 1
        self._saving = Save(
            self.folder,
            step,
            tag=f"{self._attempt}-{self._saves}",  # used once: what a failed save leaves is not taken for a later one's
            rank=self._world.rank,
            world_size=self._world.size,
            timeout_s=self._timeout_s,
            facts=facts,
            layout=layout,
            config_yaml=config_yaml,
            config_digest=config_digest,
        )
        if self._config.asynchronous:
            chunks = self._staging.copy(chunks)
            rng = {name: value.clone() for name, value in rng.items()}
        self._pending = self._writer.submit(self._write, self._saving, chunks, rng)
        if not self._config.asynchronous:
            self.wait()

    def mark_best(self, step: int) -> None:
        """Let `best`, a link in the folder, name the checkpoint of this step as soon as it is in place; it then stays.

        Call it on all ranks after `save` of that step, the last one or an earlier. Waits for nothing. When the checkpoint
        cannot be written, or the file system has no links, the old link stays and the log says so.
        """
        self._linking = self._writer.submit(self._link, step)

    def wait(self) -> None:
        """Wait until the last save is on the disk, and named if it is the best; raises what kept it from being so."""
        doing = [future for future in (self._pending, self._linking) if future is not None]
        if not doing:
            return
        while any_rank(bool(wait_for(doing, timeout=_BREATH_S).not_done), self._world):
            pass
        if self._linking is not None:
            linking, self._linking = self._linking, None
            assert linking.exception() is None, linking.exception()
        if self._pending is not None:
            self._settle()

    def write_failed(self) -> bool:
        """Whether this rank's background write is known to have failed. Not collective, and waits for nothing.

        When any rank says so, all ranks call `wait`, which raises the reason on each.
        """
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def newest(self) -> Found | None:
        """The newest checkpoint that verifies, or None if there is none.

        Each bad one is named in the log, with the file and the reason, and renamed to `bad-step-N`.

        Raises:
            CheckpointError: the newest is of a later format.
        """
        for step, folder in main_first(lambda: candidates(self.folder), self._world):
            manifest, problem = self._check_together(folder)
            if problem is None and manifest is not None:
                self._good.add(folder.name)
                return Found(folder, step, manifest)
            if isinstance(problem, NewerFormat):
                raise problem
            if self._world.is_main:
                set_aside(folder, problem, logger=self._logger)
        return None

    def find(self, path: Path) -> Found:
        """The checkpoint at a path, the same on every rank, each of which checks a share; for the rest see `find.find`."""
        folders = main_first(lambda: meant(path), self._world)
        logger = self._logger if self._world.is_main else None
        return first_good(path, folders, check=self._found_together, logger=logger)

    def load(
        self, found: Found, chunks: Mapping[str, Chunk], *, layout: dict[str, Any], optional: Sequence[str] = ()
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
        """Fill the state in place from a checkpoint of any layout.

        Args:
            found: what `newest` or `find` gave.
            chunks: this rank's state by name, of the layout of now.
            layout: sizes of the mesh axes of now.
            optional: prefixes of names of which the checkpoint, or the state of now, may have none; such chunks are left
                as they are.

        Returns:
            The facts, and this rank's random-number states, or None when the layout or the number of ranks is another.

        Raises:
            CheckpointError: the checkpoint is of another model or optimizer, or a file is not what it should be.
        """
        manifest = found.manifest
        for prefix in optional:
            here = any_rank(any(name.startswith(prefix) for name in chunks), self._world)
            there = any(name.startswith(prefix) for name in manifest.tensors)
            if here != there:
                chunks = {name: chunk for name, chunk in chunks.items() if not name.startswith(prefix)}
                tensors = {name: tensor for name, tensor in manifest.tensors.items() if not name.startswith(prefix)}
                manifest = replace(manifest, tensors=tensors)
        expected = self._names_together({sharded.tensor_name(key) for key in chunks})  # a rank's boxes are its own
        error: BaseException | None = None
        rng: dict[str, torch.Tensor] | None = None
        try:
            sharded.read(found.folder, manifest, chunks, expected=expected)
            if manifest.world_size == self._world.size and manifest.layout == layout:
                rng = sharded.read_rng(found.folder, manifest, rank=self._world.rank)
        except CheckpointError as failure:
            error = failure
        self._agree(error)
        return dict(manifest.facts), rng

    def _take_folder(self) -> None:
        """Lock the folder and remove what a dead attempt left in it; on rank 0."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.folder)
            tidy(self.folder, logger=self._logger)
        except OSError as error:
            raise storage_error(error, doing="opening the folder of checkpoints", path=self.folder) from error

    def _agree(self, error: BaseException | None) -> None:
        """Raise the first rank's error on every rank."""
        first = first_error(error, self._world)
        if first is not None:
            raise first

    def _settle(self) -> None:
        """Take note of a finished write."""
        assert self._pending is not None and self._saving is not None
        pending, save, self._pending, self._saving = self._pending, self._saving, None, None
        error = first_error(pending.exception(), self._world)
        if error is None:
            return
        # Again: a slow rank may have written into it after rank 0 gave up.
        main_first(lambda: shutil.rmtree(save.temporary, ignore_errors=True), self._world)
        raise error

    def _check_together(self, folder: Path) -> tuple[Manifest | None, BaseException | None]:
        """Check a checkpoint's digests, each rank a share of the files; the same answer on every rank."""
        manifest: Manifest | None = None
        problem: BaseException | None = None
        if self._world.is_main:
            try:
                manifest = read_manifest(folder)
            except (CheckpointError, OSError) as error:
                problem = error
        manifest, problem = broadcast((manifest, problem), self._world)
        if manifest is None:
            return None, problem
        by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
        blocks = check_files(folder, manifest.files, by_size[self._world.rank :: self._world.size])
        unfinished = True
        while unfinished:
            rest, deadline = False, time.monotonic() + _BREATH_S
            try:
                for _ in blocks:
                    if rest := time.monotonic() > deadline:
                        break
            except (CheckpointError, OSError) as error:
                problem = error
            unfinished = any_rank(rest, self._world)
        return manifest, first_error(problem, self._world)

    def _found_together(self, folder: Path) -> Found:
        """`_check_together` in the shape of `find.check`."""
        manifest, problem = self._check_together(folder)
        if isinstance(problem, OSError):
            raise unreadable(problem, folder=folder) from problem
        if problem is not None:
            raise problem
        assert manifest is not None
        return Found(folder, manifest.step, manifest)

    def _names_together(self, names: set[str]) -> set[str]:
        """The names that all ranks hold together; sent only when they differ, as thousands of ranks' would fill gigabytes."""
        digest = hashlib.sha256(to_json(sorted(names))).digest()
        if not any_rank(digest != broadcast(digest, self._world), self._world):
            return names
        return names.union(*gather(names, self._world))

    def _write(self, save: Save, chunks: Mapping[str, Chunk], rng: Mapping[str, torch.Tensor]) -> None:
        """What the background thread does; it enters no collective."""
        write(save, chunks, rng)
        if not self._world.is_main:
            return
        new, log = save.target.name, self._logger
        self._good.add(new)
        self._newest_writing = new
        try:
            retire(self.folder, config=self._config, just_written=new, good=self._good, tag=save.tag, logger=log)
        except OSError as error:  # the new checkpoint is in place; there is only more on the disk than asked for
            log.warning("older checkpoints could not be deleted: %s: %s", error.filename, error.strerror)

    def _link(self, step: int) -> None:
        """What the background thread does for `mark_best`, after the writes that were asked for before."""
        if not self._world.is_main:
            return
        target, log = step_folder(self.folder, step), self._logger
        try:
            link_best(target, known_good=target.name in self._good, tag=f"{self._attempt}-{self._saves}")
            if self._newest_writing is not None:  # the one that was the best may have stayed for that alone
                retire(
                    self.folder, config=self._config, just_written=self._newest_writing, good=self._good,
                    tag=f"{self._attempt}-{self._saves}-best", logger=log,
                )  # fmt: skip
        except (CheckpointError, OSError) as error:
            log.warning("%s could not be made to name %s: %s", self.folder / BEST, target.name, error)
