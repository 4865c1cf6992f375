"""Packed text to token stores: repeats dropped, a tokenizer learned, and the text tokenised by several processes."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distllm.config.errors import DataError
from distllm.config.schema import Config, SourceConfig, TokenizerConfig
from distllm.data.bar import Bar
from distllm.data.dedup import Repeats, drops
from distllm.data.documents import documents
from distllm.data.encode import agrees_on, load_encoder
from distllm.data.order import key_of, permute
from distllm.data.source import Shard, Source
from distllm.data.store import TokenStore, bin_path, dtype_for, idx_path, largest_id, prefix_of, write_index
from distllm.data.tokenise import Task, ids_path, lengths_path, tokenise_all
from distllm.data.tokenizer import folder_digest, make_tokenizer

SAMPLE_CHARACTERS = 200_000  # on which the fast encoder is compared with `tokenizers` before it is used
log = logging.getLogger("distllm.data")


def make_packed(
    config: Config,
    configs: Sequence[tuple[str, SourceConfig]],
    sources: dict[str, Source],
    *,
    staging: Path,
    final: Path,
    progress: bool,
) -> dict[str, Any]:
    """Make the tokenizer and the token stores of packed text.

    Args:
        config: its `task` and `data` parts decide.
        configs: store name and source.
        sources: the text sources among them, found and cut.
        staging: where what a killed run finished is kept.
        final: where the stores go; the tokenizer is left in `staging`.
        progress: show a bar on a terminal, or lines now and then in the log.

    Returns:
        What is for meta.json.
    """
    tokenizer = staging / "tokenizer"
    sources = _without_repeats(sources, config) if drops(config.data.dedup) else sources
    if not tokenizer.is_dir():
        log.info("making the tokenizer")
        texts = _learn_from(sources, config.data.tokenizer)
        make_tokenizer(config.data.tokenizer, texts, tokenizer, roles=config.task.kind != "causal_lm")
    encoder = load_encoder(tokenizer)
    sample = list(clip(_spread(sources.values(), seed=1), SAMPLE_CHARACTERS))
    fast = agrees_on(encoder, tokenizer, sample)
    if encoder.reason or not fast:
        reason = encoder.reason or f"{encoder.method} gives other ids on this text"
        log.warning("tokenising with `tokenizers`, several times slower than the fast way: %s", reason)
    tasks = {
        name: [
            Task(shard, staging / f"{name}-{i:05d}", tokenizer, folder_digest(tokenizer), dtype_for(encoder.vocab_size), fast)
            for i, shard in enumerate(source.shards)
        ]
        for name, source in sources.items()
    }
    _tokenise(tasks, workers=config.data.workers, progress=progress)
    stores = {name: _merge(parts, final / name, label=sources[name].label) for name, parts in tasks.items()}
    stores |= {name: _examine(s, encoder.vocab_size) for name, s in configs if s.kind == "tokens"}
    tokenised_by = encoder.method if fast else "tokenizers"
    return {"vocab_size": encoder.vocab_size, "tokenised_by": tokenised_by, "stores": stores}


def _without_repeats(sources: dict[str, Source], config: Config) -> dict[str, Source]:
    """The sources, the training ones without the documents that repeat an earlier one of any of them.

    All training documents are read once more for it, in this process, as what repeats depends on all before it.
    """
    repeats, found = Repeats(config.data.dedup), dict(sources)
    for name, source in sources.items():
        if not name.startswith("train"):
            continue
        shards, dropped, count = [], 0, 0
        for shard in source.shards:
            again = [repeats.seen(text) for text in documents(shard)]
            shards.append(replace(shard, dropped=frozenset(i for i, repeated in enumerate(again) if repeated)))
            dropped, count = dropped + sum(again), count + len(again)
        if 0 < count == dropped:
            rule = f"all {count} documents repeat earlier ones, and data.dedup drops them; leave the source out"
            raise DataError(f"{source.label}: {rule}")
        log.info("%s: %d of %d documents repeat an earlier one and are dropped", source.label, dropped, count)
        found[name] = replace(source, shards=tuple(shards))
    return found


def _tokenise(tasks: dict[str, list[Task]], *, workers: int, progress: bool) -> None:
    every = [t for parts in tasks.values() for t in parts]
    size = sum(t.shard.n_bytes for t in every)

    def amount(task: Task) -> int:
        return task.shard.n_bytes if size else 1

    with Bar("tokenising", total=size or len(every), unit="B" if size else "shards", show=progress) as bar:
        bar.advance(sum(amount(t) for t in every if t.done))
        for task in tokenise_all(every, workers=workers):
            bar.advance(amount(task))


def _merge(parts: Sequence[Task], prefix: Path, *, label: str) -> dict[str, Any]:
    """Join the parts of a source, in order, into a store; a document that goes on in the next part is one document."""
    lengths: list[np.ndarray] = []
    with bin_path(prefix).open("wb") as out:
        for task in parts:
            mine = np.load(lengths_path(task.part), allow_pickle=False)
            if task.shard.continues and lengths and len(mine):
                lengths[-1][-1] += mine[0]
                mine = mine[1:]
            if len(mine):
                lengths.append(mine)
            with ids_path(task.part).open("rb") as part:
                shutil.copyfileobj(part, out, 16 << 20)
        out.flush()
        os.fsync(out.fileno())
    if not lengths:
        raise DataError(f"{label}: there is no text in it, every document is empty")
    every = np.concatenate(lengths)
    write_index(idx_path(prefix), document_lengths=every, dtype=parts[0].dtype)
    return {"documents": len(every), "tokens": int(every.sum()), "bytes": bin_path(prefix).stat().st_size}


def _examine(source: SourceConfig, vocab_size: int) -> dict[str, Any]:
    """Check a token store that somebody else made: its whole index, and that the tokenizer has all its ids."""
    store = TokenStore.open(store_prefix(source))
    store.check(whole=True)
    largest = largest_id(store)
    if largest >= vocab_size:
        raise DataError(
            f"{bin_path(store.prefix)}: holds the id {largest}, but the tokenizer has {vocab_size} ids: it is not the one that "
            "made this store; set data.tokenizer.kind=hf and data.tokenizer.path to that one"
        )
    return {"documents": store.n_documents, "tokens": store.n_tokens, "bytes": bin_path(store.prefix).stat().st_size}


def _spread(sources: Any, *, seed: int) -> Iterator[str]:
    """Documents of the sources, shard by shard in a mixed order, so that the first ones stand for all."""
    shards: list[Shard] = [shard for source in sources for shard in source.shards]
    for i in permute(np.arange(len(shards)), size=max(1, len(shards)), key=key_of(seed)):
        yield from documents(shards[int(i)])


def _learn_from(sources: Mapping[str, Source], config: TokenizerConfig) -> Iterator[str]:
    """The documents a tokenizer learns from: for chars all, for bpe `train_bytes` of the training sources."""
    if config.kind == "chars":
        return _spread(sources.values(), seed=0)
    training = [s for name, s in sources.items() if name.startswith("train")]
    return clip(_spread(training, seed=0), config.train_bytes)


def clip(texts: Iterator[str], size: int) -> Iterator[str]:
    """Texts up to about `size` bytes of UTF-8 in all."""
    for text in texts:
        yield text[:size]
        size -= len(text.encode("utf-8"))
        if size <= 0:
            return


def store_prefix(source: SourceConfig) -> Path:
    """The path of a token store without `.bin`.

    Raises:
        DataError: the source names none.
    """
    if not source.path:
        raise DataError("data.sources: kind=tokens needs the path of a .bin/.idx pair, without .bin, in `path`")
    return prefix_of(source.path)
