"""The mean of the weights of several checkpoints of one run, one tensor at a time.

The mean of the last few checkpoints of a run often answers better than any of them (Vaswani et al. 2017, arXiv
1706.03762, section 6.1; Izmailov et al. 2018, arXiv 1803.05407).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from distllm.checkpoint import sharded
from distllm.checkpoint.find import Found, candidates, check
from distllm.checkpoint.manifest import NewerFormat, TensorRecord
from distllm.config.errors import CheckpointError, ConfigError


def last_checkpoints(run: Path, count: int, *, logger: logging.Logger) -> list[Found]:
    """The newest good checkpoints of a run, the newest first.

    Args:
        run: a run folder, or its folder of checkpoints.
        count: how many.
        logger: told of each bad one that is passed over.

    Raises:
        CheckpointError: there are fewer; says how many, and how to keep more.
    """
    found: dict[int, Found] = {}
    for step, folder in candidates(run / "checkpoints") or candidates(run):
        if len(found) == count:
            break
        if step in found:  # the first of two writings of the step
            continue
        try:
            found[step] = check(folder)
        except NewerFormat:
            raise
        except CheckpointError as error:
            logger.warning("passing over a bad checkpoint: %s", error)
    if len(found) < count:
        raise CheckpointError(
            f"{run}: {len(found)} good checkpoints, and the average is of {count}; train with checkpoint.keep={count}, "
            f"or average {max(len(found), 1)}"
        )
    return list(found.values())


def average(
    checkpoints: Sequence[Found], *, weights: Sequence[float] | None = None, names_prefix: str = "model."
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weighted mean of the tensors of several checkpoints; to be used like `find.read_full`.

    Sums are fp64; the mean has the tensor's own number format. What is no floating number (a table of positions) is
    taken from the first checkpoint.

    Args:
        checkpoints: of one model, at least one; written by any number of ranks each.
        weights: one for each, not negative; they are divided by their sum. None: equal.
        names_prefix: which part of the state.

    Returns:
        (name without the prefix, whole tensor on the CPU), one at a time: a few copies of one tensor are in memory.

    Raises:
        CheckpointError: they are not of one model.
        ConfigError: the weights do not fit.
    """
    shares = _shares(weights, len(checkpoints))
    tables = [{n: t for n, t in c.manifest.tensors.items() if n.startswith(names_prefix)} for c in checkpoints]
    for found, table in zip(checkpoints[1:], tables[1:], strict=True):
        _refuse_other(found, table, first=checkpoints[0], wanted=tables[0])
    return _means(checkpoints, list(tables[0]), shares, names_prefix)


def _means(
    checkpoints: Sequence[Found], names: list[str], shares: list[float], prefix: str
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        mean: torch.Tensor | None = None
        for found, share in zip(checkpoints, shares, strict=True):
            ((_, tensor),) = sharded.read_full(found.folder, found.manifest, [name])
            if not tensor.is_floating_point():
                mean = tensor
                break
            mean = torch.zeros_like(tensor, dtype=torch.float64) if mean is None else mean
            mean.add_(tensor, alpha=share)
        assert mean is not None
        yield name.removeprefix(prefix), mean.to(tensor.dtype)


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    assert count > 0, "an average of nothing"
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise ConfigError([f"weights of an average: {len(weights)} for {count} checkpoints; give one for each"])
    if min(weights) < 0.0 or not sum(weights) > 0.0:
        raise ConfigError([f"weights of an average: {list(weights)}; none may be negative, and one must be above 0"])
    return [weight / sum(weights) for weight in weights]


def _refuse_other(
    found: Found, table: Mapping[str, TensorRecord], *, first: Found, wanted: Mapping[str, TensorRecord]
) -> None:
    """Refuse to average different models, naming the first tensor that differs."""
    for name in sorted(wanted.keys() | table.keys()):
        mine, theirs = table.get(name), wanted.get(name)
        if mine is None or theirs is None:
            what = f"{name} is in only one of them"
        elif (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            what = f"{name} is {_told(mine)} here and {_told(theirs)} there"
        else:
            continue
        raise CheckpointError(f"{found.folder}: not of the same model as {first.folder}, so no average; {what}")


def _told(record: TensorRecord) -> str:
    return f"[{', '.join(map(str, record.shape))}] {record.dtype}"
