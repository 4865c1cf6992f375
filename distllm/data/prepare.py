"""Text to a token store: in parallel, restartable, and the same bytes whatever the number of workers.

A prepared folder, `data.store`/DIGEST, holds `meta.json`, `tokenizer/` and a store for each text source: `train-000.bin`,
`train-000.idx`, ..., `validation-000.bin`, ..., or for a task of examples a folder `train-000/` of stores (prepare_examples.py).
DIGEST is of the sources' content, the tokenizer's settings and this format, so a changed text or tokenizer is another folder.
It is made in `.preparing-DIGEST` under a lock and renamed when whole: a folder with its final name is complete. What a killed
run finished is used by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distllm.config.errors import DataError
from distllm.config.machine import flush
from distllm.config.places import make_folder
from distllm.config.schema import Config, SourceConfig
from distllm.data.clean import cleans
from distllm.data.dedup import drops
from distllm.data.encode import load_encoder
from distllm.data.example_store import ExampleStore
from distllm.data.prepare_examples import (
    Translate,
    content_facts,
    is_examples,
    make_examples,
    open_examples,
    training_texts,
)
from distllm.data.prepare_text import clip, make_packed, store_prefix
from distllm.data.source import Source, check_files, open_source
from distllm.data.store import TokenStore, bin_path, idx_path
from distllm.data.survey import Labels, survey
from distllm.data.tokenizer import folder_digest, make_tokenizer, spec_digest

FORMAT = 1  # raise it when the same text would give other bytes
# Settings of a source that came after stores were made: at their defaults they are not in the recipe of a store.
LATER = (
    "target_path", "pair_column", "label_column", "target_column", "messages_column", "names", "prefix", "task",
)  # fmt: skip
log = logging.getLogger("distllm.data")


@dataclass(frozen=True)
class Prepared:
    """Tokens that are ready to train on."""

    stores: tuple[TokenStore, ...]
    """The training sources in the order of the config."""
    validation_stores: tuple[TokenStore, ...]
    """Those of data.validation.sources; empty if validation is held out of the training sources."""
    tokenizer_folder: Path
    vocab_size: int
    digest: str
    examples: tuple[ExampleStore, ...] = ()
    """For a task of examples, in place of `stores`."""
    validation_examples: tuple[ExampleStore, ...] = ()
    """Those of data.validation.sources; empty if validation is held out of the training examples."""
    labels: Labels = field(default_factory=dict)
    """The label names of each task with a head, the only task being named ""; () where the head gives a number or tokens."""


@dataclass(frozen=True)
class _Plan:
    """What has to be there for a config."""

    configs: tuple[tuple[str, SourceConfig], ...]
    """Store name and source: ("train-000", ...)."""
    sources: dict[str, Source]
    """The text sources among them."""
    folder: Path
    recipe: str
    """The digest of the settings alone: equal for an older state of the same text."""
    digest: str


def prepare(config: Config, *, progress: bool = False, translate: Translate | None = None) -> Prepared:
    """Make the tokenizer and the stores of a config, unless they are there.

    Args:
        config: its `task` and `data` parts decide; `data.workers` processes tokenise packed text.
        progress: show a bar on a terminal, or lines now and then in the log.
        translate: texts to their translations by data.augment.translators, for data.augment.back_translation.

    Raises:
        DataError: a source or tokenizer cannot be used.
        OSError: the disk is full or read-only; nothing half-written is ever taken for whole.
    """
    plan = _plan(config)
    meta, staging = plan.folder / "meta.json", plan.folder.with_name(f".preparing-{plan.digest}")
    if not meta.is_file():
        if _older(plan) is not None:
            log.info("the text of an earlier store has changed: preparing it again as %s", plan.folder)
        make_folder(plan.folder.parent, key="data.store", value=config.data.store, near="data_store")
        with _lock(plan.folder.with_name(f".lock-{plan.digest}")):
            if not meta.is_file():
                _make(plan, config, staging, progress=progress, translate=translate)
    shutil.rmtree(staging, ignore_errors=True)  # also what a run left that was killed after the rename
    return _open(plan, config)


def open_prepared(config: Config) -> Prepared:
    """Open what `prepare` made, without making anything.

    Raises:
        DataError: it is missing, is of an earlier state of the text, or does not fit its tokenizer.
    """
    plan = _plan(config)
    if not (plan.folder / "meta.json").is_file():
        older = _older(plan)
        if older is not None:
            raise DataError(f"{older}: stale, the text has changed since it was prepared; run `distllm prepare CONFIG` again")
        raise DataError(f"{plan.folder}: these sources are not prepared with this tokenizer; run `distllm prepare CONFIG` first")
    return _open(plan, config)


def _plan(config: Config) -> _Plan:
    data = config.data
    named = [(f"train-{i:03d}", s) for i, s in enumerate(data.sources)]
    named += [(f"validation-{i:03d}", s) for i, s in enumerate(data.validation.sources)]
    if not data.sources:
        raise DataError("data.sources: is empty; give at least one source")
    check_files(config)
    roles = config.task.kind != "causal_lm"
    tokenizer = spec_digest(data.tokenizer, roles=roles)
    facts: dict[str, Any] = {"format": FORMAT, "tokenizer": tokenizer}
    facts |= {"clean": data.clean.model_dump()} if cleans(data.clean) else {}
    facts |= {"dedup": data.dedup.model_dump()} if drops(data.dedup) else {}
    settings = [(name, _settings(s)) for name, s in named]
    place = Path(data.store)
    if is_examples(config):
        example_facts = content_facts(config, named)
        recipe = _digest({**facts, "sources": settings, "task": config.task.kind})
        digest = _digest({**facts, **example_facts})
        return _Plan(tuple(named), {}, place / digest, recipe, digest)
    # A text that is cleaned is read whole, as a tag or a run of white space may lie across a cut, and so is a repeated one.
    splittable = data.tokenizer.kind != "hf" and not cleans(data.clean) and not drops(data.dedup)
    sources = {name: open_source(s, splittable=splittable, clean=data.clean) for name, s in named if s.kind != "tokens"}
    recipe = _digest({**facts, "sources": settings})
    # Where a text lies does not matter; what it is, and how it is cut into documents, does.
    content = [
        (
            name, s.kind, "" if s.kind in ("embedded", "text", "tokens") else s.column, s.document if s.kind == "text" else "",
            sources[name].fingerprint if name in sources else _pair(s), *([s.names] if s.names else []),
        )
        for name, s in named
    ]  # fmt: skip
    digest = _digest({**facts, "sources": content})
    return _Plan(tuple(named), sources, place / digest, recipe, digest)


def _settings(source: SourceConfig) -> dict[str, Any]:
    usual = SourceConfig()
    later = {key for key in LATER if getattr(source, key) == getattr(usual, key)}
    return source.model_dump(exclude={"weight", "hint"} | later)


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _pair(source: SourceConfig) -> list[Any]:
    """What names a token store that somebody else made: its path, sizes and times, as it may be terabytes."""
    prefix = store_prefix(source)
    stats = [path.stat() for path in (bin_path(prefix), idx_path(prefix))]
    return [str(prefix.absolute()), [(s.st_size, s.st_mtime_ns) for s in stats]]


def _older(plan: _Plan) -> Path | None:
    """A store of the same settings and another text."""
    for meta in sorted(plan.folder.parent.glob("*/meta.json")):
        with contextlib.suppress(OSError, ValueError):
            if json.loads(meta.read_text(encoding="utf-8")).get("recipe") == plan.recipe:
                return meta.parent
    return None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process prepare a store at a time; the system lets go of it when the process dies, however it dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is preparing this store: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(plan: _Plan, config: Config, staging: Path, *, progress: bool, translate: Translate | None) -> None:
    """Make the folder of a plan in `staging`, as far as it is not there yet, and rename it."""
    final = staging / "final"
    shutil.rmtree(final, ignore_errors=True)
    staging.mkdir(parents=True, exist_ok=True)
    final.mkdir()
    if is_examples(config):
        meta = _make_examples(plan, config, staging, progress=progress, translate=translate)
    else:
        meta = make_packed(
            config, plan.configs, plan.sources, staging=staging, final=final, progress=progress
        )
    tokenizer = staging / "tokenizer"
    shutil.copytree(tokenizer, final / "tokenizer")
    facts = {"format": FORMAT, "digest": plan.digest, "recipe": plan.recipe, "vocab_size": meta["vocab_size"]}
    facts |= {"tokenizer": folder_digest(tokenizer), **meta}
    _write_flushed(final / "meta.json", json.dumps(facts, indent=1))
    final.rename(plan.folder)
    flush(plan.folder.parent)


def _make_examples(
    plan: _Plan, config: Config, staging: Path, *, progress: bool, translate: Translate | None
) -> dict[str, Any]:
    """Make the tokenizer and the stores of a task of examples and say what is for meta.json."""
    found = survey(config, plan.configs)
    tokenizer = staging / "tokenizer"
    if not tokenizer.is_dir():
        log.info("making the tokenizer")
        texts = training_texts(config, plan.configs, found)
        limit = config.data.tokenizer.train_bytes if config.data.tokenizer.kind == "bpe" else sys.maxsize
        make_tokenizer(config.data.tokenizer, clip(texts, limit), tokenizer, roles=True)
    vocab_size = load_encoder(tokenizer, fast=False).vocab_size
    stores = make_examples(
        config, plan.configs, found, tokenizer=tokenizer, staging=staging, final=staging / "final", translate=translate,
        progress=progress,
    )  # fmt: skip
    return {"vocab_size": vocab_size, "labels": found.labels, "stores": stores}


def _write_flushed(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _open(plan: _Plan, config: Config) -> Prepared:
    """Open a whole folder and check that it is as it was made."""
    again = f"delete {plan.folder} and prepare again"
    try:
        meta = json.loads((plan.folder / "meta.json").read_text(encoding="utf-8"))
        made, tokenizer, vocab_size = meta["stores"], meta["tokenizer"], int(meta["vocab_size"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{plan.folder / 'meta.json'}: damaged; {again}") from None
    folder = plan.folder / "tokenizer"
    if folder_digest(folder) != tokenizer:
        raise DataError(f"{folder}: not the tokenizer that made this store (it was changed since); {again}")
    cut = len(config.data.sources)
    if is_examples(config):
        opened_examples = tuple(open_examples(plan.folder / name, config, source) for name, source in plan.configs)
        labels = {task: tuple(names) for task, names in meta["labels"].items()}
        return Prepared((), (), folder, vocab_size, plan.digest, opened_examples[:cut], opened_examples[cut:], labels)
    stores: dict[str, TokenStore] = {}
    for name, source in plan.configs:
        stores[name] = TokenStore.open(store_prefix(source) if source.kind == "tokens" else plan.folder / name)
        found = [stores[name].n_documents, stores[name].n_tokens]
        if found != [made[name]["documents"], made[name]["tokens"]]:
            binary = bin_path(stores[name].prefix)
            raise DataError(f"{binary}: {found[1]} tokens, but {made[name]['tokens']} were prepared; {again}")
    opened = [stores[name] for name, _ in plan.configs]
    return Prepared(tuple(opened[:cut]), tuple(opened[cut:]), folder, vocab_size, plan.digest)
