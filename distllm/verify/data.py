"""A few real batches of the user's own data: from the store when there is one, else from the first part of the sources."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distllm.config.check import Resolved
from distllm.config.check_task import packed
from distllm.config.errors import DataError
from distllm.config.roles import Roles
from distllm.config.schema import Config, SourceConfig
from distllm.data.batch import IGNORE, Batch
from distllm.data.documents import documents
from distllm.data.loader import open_samples
from distllm.data.prepare import Prepared, open_prepared, prepare
from distllm.data.samples import Samples
from distllm.data.source import check_source, open_source
from distllm.data.tokenizer import check_roles, roles_of
from distllm.models.spec import ModelSpec
from distllm.train.folder import read_tokenizer

PART_CHARACTERS = 400_000
"""Text of each source that is read where nothing is prepared."""


@dataclass(frozen=True)
class Data:
    """Tokens, and what made them."""

    config: Config
    """Whose sources and store these are: the user's, or one of the first part of them."""
    prepared: Prepared
    tokenizer: Any
    roles: Roles


def open_data(config: Config, folder: Path) -> Data:
    """Open the config's tokens, or make some of the first part of its text.

    Args:
        config: `data` and `task` are read.
        folder: where a part is kept.

    Raises:
        DataError: the sources cannot be used.
    """
    try:
        prepared = open_prepared(config)
    except DataError:
        config = _part(config, folder) if packed(config) else config
        prepared = prepare(config)
    tokenizer = read_tokenizer(prepared.tokenizer_folder)
    roles = roles_of(tokenizer)
    check_roles(roles, config)
    return Data(config, prepared, tokenizer, roles)


def _part(config: Config, folder: Path) -> Config:
    """The config with the first PART_CHARACTERS of each source, as tables in `folder`."""
    sources, folder = [], folder / "text"
    for number, source in enumerate(config.data.sources):
        check_source(source, key=f"data.sources.{number}")
        if source.kind == "tokens":  # nothing to tokenise
            sources.append(source)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number:03d}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for text in _first(source, config, PART_CHARACTERS):
                file.write(json.dumps({"text": text}) + "\n")
        sources.append(SourceConfig(kind="jsonl", path=str(path), weight=source.weight))
    validation = config.data.validation.model_copy(update={"sources": [], "fraction": 0.05})
    part = {"sources": sources, "validation": validation, "store": str(folder.parent / "store")}
    return config.model_copy(update={"data": config.data.model_copy(update=part)})


def _first(source: SourceConfig, config: Config, characters: int) -> Iterator[str]:
    """Documents from the start of a source, the last one cut, up to so many characters."""
    for shard in open_source(source, splittable=False, clean=config.data.clean).shards:
        for text in documents(shard):
            yield text[:characters]
            characters -= len(text)
            if characters <= 0:
                return


def samples_of(data: Data, config: Config, *, resolved: Resolved, spec: ModelSpec) -> Samples:
    """The samples as a layout deals them; `config` gives their length."""
    return open_samples(
        data.prepared, config, resolved=resolved, tokenizer=data.tokenizer, decoder_start=spec.decoder_start,
        token_types=spec.token_types,
    )  # fmt: skip


def thinned(batch: Batch, *, uneven: bool, fold: int | None) -> Batch:
    """The batch with fewer targets in some rows than in others, and with a huge vocabulary folded.

    Real packed text has a target at almost every place; then a mean of means is equal to a mean, and proves nothing.

    Args:
        batch: real data.
        uneven: drop targets; how many is a function of the sample's number alone, so that layouts agree.
        fold: ids become id modulo this; None: they stay.
    """
    inputs, targets = dict(batch.inputs), dict(batch.targets)
    if fold is not None:
        inputs["input_ids"] = inputs["input_ids"] % fold
        targets["labels"] = torch.where(targets["labels"] == IGNORE, IGNORE, targets["labels"] % fold)
    if uneven:
        labels = targets["labels"].clone()
        for row, number in enumerate(batch.sample_ids):
            if labels.dim() == 2:
                labels[row, : (5 * number + 2) % 7 * labels.shape[1] // 10] = IGNORE
            elif number % 5 == 3:
                labels[row] = IGNORE
        targets["labels"] = labels
    return Batch(inputs, targets, batch.sample_ids)


def row_digests(batches: Sequence[Batch]) -> dict[int, str]:
    """Sample number -> digest of all that the model is given of it and asked for; padded rows are left out."""
    found: dict[int, str] = {}
    for batch in batches:
        tensors = [*sorted(batch.inputs.items()), *sorted(batch.targets.items())]
        for row, number in enumerate(batch.sample_ids):
            if number >= 0:
                told = hashlib.sha256()
                for name, tensor in tensors:
                    told.update(name.encode() + tensor[row].contiguous().numpy().tobytes())
                found[number] = told.hexdigest()[:16]
    return found
