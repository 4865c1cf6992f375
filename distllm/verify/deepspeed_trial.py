"""One rank of a layout under DeepSpeed, compared with what one process of the native engine computes.

What DeepSpeed shows is read where every layout of it has the same: weights are the boxes that a checkpoint gets, which share
the memory of ZeRO's flat pieces, and a gradient is what torch's optimizer is given for those pieces as it begins to step. By then
it is divided and clipped, so it is set against the reference's times the reference's own factor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from distllm.checkpoint.chunk import Chunk
from distllm.comm import World
from distllm.config.check import resolve_layout
from distllm.engine.deepspeed import DeepSpeedEngine
from distllm.models.build import meta_model
from distllm.parallel.mesh import Mesh, build_mesh
from distllm.train.build_deepspeed import build_deepspeed
from distllm.train.tune import first_tensors
from distllm.verify.boxes import Box
from distllm.verify.trial import (
    Arrays,
    Case,
    Piece,
    Planted,
    RankReport,
    Trace,
    array_of,
    first_names,
    take_steps,
    without_dropout,
)

NOT_EXPOSED = {
    "gradient": "seen as the optimizer is given it, divided and clipped; not before that",
    "clip": "DeepSpeed clips and divides in one; the factor is judged within the gradient, the norm by itself",
    "collectives": "DeepSpeed's own, in buckets of its choice; not judged",
}
"""What is not to be seen of DeepSpeed as it is of the native engine, and how it is judged instead."""
MODEL = "model."


def load_compiler() -> None:
    """Load what DeepSpeed makes torch load at its start, though nothing is compiled: once here, not in every rank (2 s)."""
    import torch._inductor.compile_fx  # noqa: F401


def run_rank(case: Case, world: World, reference: Trace, *, planted: Planted | None = None) -> RankReport:
    """Train as one rank under DeepSpeed, and compare every piece it holds with the reference.

    Args:
        case: with layout and engine.
        world: this rank's facts.
        reference: what one process of the native engine computed in the same precision.
        planted: a bug to plant.

    Returns:
        The errors; of traffic and clip factors nothing is known. A collective call, once in a process.
    """
    case = case if planted is None else planted.case(case, world)
    with planted.around(world, case) if planted is not None else contextlib.nullcontext():
        engine, mesh = _built(case, world)
        if planted is not None:
            planted.on(engine, world, case, reference.starts)
        known = _Known(case)
        starts = known.compare(_weights(engine), reference.starts)
        gradients = _watch(engine, known, reference)
        outs, rows, _, micro = take_steps(case, engine, mesh, world, record=False)
        weights = known.compare(_weights(engine), reference.weights)
    gradients += [{}] * (len(outs) - len(gradients))  # a step that was not taken shows none
    return RankReport(
        world.rank, mesh.coordinates(), [o[0] for o in outs], [o[1] for o in outs], [None] * len(outs), starts, gradients,
        weights, rows, None, micro,
    )  # fmt: skip


def _built(case: Case, world: World) -> tuple[DeepSpeedEngine, Mesh]:
    """The engine of a case, by the same functions as a training run; a collective call."""
    mesh = build_mesh(world, sizes=resolve_layout(case.config, world.size).sizes())
    tensors = partial(first_tensors, case.plain, case.spec, seed=case.config.seed)
    engine = build_deepspeed(case.config, world, mesh=mesh, spec=case.spec, task=case.task, tensors=tensors)
    without_dropout(engine._model)
    return engine, mesh


def _weights(engine: DeepSpeedEngine) -> dict[str, Chunk]:
    """This rank's boxes of the fp32 weights, by name#number."""
    state = engine.state().items()
    return {name.removeprefix(MODEL): chunk for name, chunk in state if name.startswith(MODEL)}


def _watch(engine: DeepSpeedEngine, known: _Known, reference: Trace) -> list[dict[str, Piece]]:
    """Compare the gradients at each step, as torch's optimizer begins; it is called for one flat piece after another.

    Returns:
        A list to which every step appends.
    """
    steps: list[dict[str, Piece]] = []
    chunks = _weights(engine)
    train = engine.train_step

    def begins(optimizer: torch.optim.Optimizer, *_: object) -> None:
        flats = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        given = dict(_given(chunks, flats))
        step = len(steps) - 1
        steps[-1] |= known.compare(given, reference.gradients[step], times=reference.factors[step])

    def counted(*args: object, **options: object) -> object:
        steps.append({})
        return train(*args, **options)  # type: ignore[arg-type]

    engine.train_step = counted  # type: ignore[method-assign, assignment]
    engine.optimizer.register_step_pre_hook(begins)
    return steps


def _given(chunks: Mapping[str, Chunk], flats: Sequence[torch.Tensor]) -> Iterator[tuple[str, Chunk]]:
    """The boxes of the gradients of some flat pieces: they lie there as the weights lie in the pieces."""
    for name, chunk in chunks.items():
        for flat in flats:
            at = chunk.data.storage_offset() - flat.storage_offset()
            if chunk.data.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() and 0 <= at < flat.numel():
                assert flat.grad is not None
                gradient = flat.grad.as_strided(chunk.data.shape, chunk.data.stride(), flat.grad.storage_offset() + at)
                yield name, Chunk(gradient, chunk.shape, chunk.offset, chunk.write)


class _Known:
    """The names that boxes have, and the parameters that these are."""

    def __init__(self, case: Case) -> None:
        self._first = first_names(case.spec)
        self._buffers = {name for name, _ in meta_model(case.spec).named_buffers()}

    def compare(self, chunks: Mapping[str, Chunk], whole: Arrays, *, times: float = 1.0) -> dict[str, Piece]:
        """Compare boxes with `times` what lies in their places in whole tensors; one that has no place is infinitely wrong.

        Errors are told in the unit of the whole tensors: a divisor that is wrong shows as it would before the division.
        """
        found: dict[str, Piece] = {}
        for key, chunk in chunks.items():
            name = key.partition("#")[0]
            if name in self._buffers or not chunk.data.numel():
                continue
            reference = whole.get(name, whole.get(self._first.get(name, name)))
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offset, chunk.data.shape, strict=True))
            piece = Piece(math.inf, chunk.data.numel(), ())
            if reference is not None and tuple(reference.shape) == tuple(chunk.shape):
                piece = Piece(_error(chunk.data, reference, box, times), chunk.data.numel(), (_corners(box),))
            found[name] = _together(found[name], piece) if name in found else piece
        return found


def _error(own: torch.Tensor, whole: np.ndarray, box: Box, times: float) -> float:
    wanted = whole[box].astype(np.float64) * times
    difference = np.abs(array_of(own).astype(np.float64) - wanted).max() / (times or 1.0)
    return float(difference) if np.isfinite(difference) else math.inf


def _corners(box: Box) -> tuple[tuple[int, int], ...]:
    return tuple((side.start, side.stop) for side in box)


def _together(a: Piece, b: Piece) -> Piece:
    return Piece(max(a.error, b.error), a.numbers + b.numbers, (*a.boxes, *b.boxes))
