"""Some steps of one layout: what one process computes, whole, and how far every piece of a rank is from it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from distllm.comm import World
from distllm.config.check import resolve_layout
from distllm.config.schema import Config
from distllm.data.batch import IGNORE, Batch
from distllm.data.loader import step_batches
from distllm.engine.base import Engine
from distllm.engine.local import local_part
from distllm.engine.native import NativeEngine
from distllm.models.build import meta_model, resolve_spec
from distllm.models.spec import ModelSpec
from distllm.parallel.expert import expert_modules
from distllm.parallel.mesh import AXES, Mesh, build_mesh
from distllm.parallel.parallelize import Parallel
from distllm.train.build_native import build_engine
from distllm.train.tasks import Labels, Task, make_task, outputs_of
from distllm.train.tune import first_tensors, tuned_spec
from distllm.verify.boxes import boxes as boxes_of
from distllm.verify.collectives import Recorder, Traffic
from distllm.verify.data import Data, row_digests, samples_of, thinned
from distllm.verify.precise import InFp64

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """What every rank of one layout and its reference train."""

    config: Config
    """Shrunk, with this layout."""
    data: Data
    labels: Labels
    plain: ModelSpec
    spec: ModelSpec
    """The model that trains; with adapters where they do."""
    task: Task
    steps: int
    uneven: bool
    fold: int | None

    @property
    def exact(self) -> bool:
        return self.config.precision.compute == "fp64"


@dataclass(frozen=True)
class Trace:
    """What one process computed."""

    losses: Sequence[float]
    norms: Sequence[float]
    factors: Sequence[float]
    """What the gradient of the loss sum was multiplied by: the clip factor, divided by the count of targets."""
    starts: Arrays
    """Weights before the first step."""
    gradients: Sequence[Arrays]
    """Of the loss sum, before clipping, at each step."""
    weights: Arrays
    """After the last step."""
    rows: Sequence[Mapping[int, str]]
    """At each step, sample number -> digest."""


@dataclass(frozen=True)
class Piece:
    """How far one rank's piece of one tensor is from the reference."""

    error: float
    """max |own - reference|; infinite where one is not finite."""
    numbers: int
    boxes: tuple[tuple[tuple[int, int], ...], ...]
    """Where the piece lies in the whole: (start, stop) for each dim."""


Pieces = Mapping[str, Piece]


@dataclass(frozen=True)
class Micro:
    """The shape of one micro-batch of one rank, and where its rows went."""

    rows: int
    tokens: int
    """Of `input_ids`, before cp cuts it."""
    outputs: int
    """Places of a row that get logits: those of the decoder, where there is one."""
    targets: int
    """Places with a label."""
    routed: tuple[tuple[int, ...], ...] = ()
    """For each layer of experts that this rank ran, the rows for each expert."""


@dataclass(frozen=True)
class RankReport:
    """What one rank found."""

    rank: int
    place: Mapping[str, int]
    """Its coordinates."""
    losses: Sequence[float]
    norms: Sequence[float]
    factors: Sequence[float | None]
    """None on a rank that holds no gradient."""
    starts: Pieces
    gradients: Sequence[Pieces]
    weights: Pieces
    rows: Sequence[Mapping[int, str]]
    traffic: Traffic | None
    """Of the last step; None where it is another engine's own business."""
    micro: Sequence[Micro]
    """Its micro-batches of that step."""


class Planted(Protocol):
    """A bug for one trial: in what is trained, around the building, and on the engine after it."""

    def case(self, case: Case, world: World) -> Case:
        """What this rank trains."""
        ...

    def around(self, world: World, case: Case) -> AbstractContextManager[None]:
        """Entered before the mesh is built and left after the last step."""
        ...

    def on(self, engine: Any, world: World, case: Case, starts: Arrays) -> None:
        """Called between building and the first step; what a bug breaks is an engine's own, so it knows which."""
        ...


def make_case(config: Config, data: Data, *, steps: int, uneven: bool, fold: int | None) -> Case:
    """Describe the model of a shrunk config, as `train.build` does.

    Raises:
        ConfigError: sizes that cannot be.
    """
    labels = data.prepared.labels
    vocab = data.prepared.vocab_size if fold is None else fold
    plain = resolve_spec(
        config, vocab_size=vocab, labels=outputs_of(labels), roles=data.roles, label_names=labels.get("", ())
    )
    spec = tuned_spec(plain, config.tune)
    return Case(config, data, labels, plain, spec, make_task(config), steps, uneven, fold)


def built(case: Case, world: World) -> tuple[NativeEngine, Mesh]:
    """The engine of a case on the ranks of `world`, by the same functions as a training run; a collective call."""
    resolved = resolve_layout(case.config, world.size)
    mesh = build_mesh(world, sizes={axis: getattr(resolved, axis) for axis in AXES})
    tensors = first_tensors(case.plain, case.spec, seed=case.config.seed)
    engine = build_engine(case.config, world, mesh=mesh, spec=case.spec, task=case.task, tensors=tensors)
    for part in engine.parallel.parts:
        without_dropout(part)
    return engine, mesh


def without_dropout(module: nn.Module) -> None:
    """Switch dropout off: a module of the user's own may have some that no key of the config reaches."""
    for inner in module.modules():
        if isinstance(inner, nn.modules.dropout._DropoutNd):
            inner.p = 0.0


@dataclass
class _Seen:
    """What is noted between backward and update."""

    gradients: list[Any] = field(default_factory=list)
    factors: list[float | None] = field(default_factory=list)
    before: float = 0.0


def _watch(engine: NativeEngine, note: Callable[[Mapping[str, torch.Tensor]], Any]) -> _Seen:
    """Note the gradients as the norm is about to be taken, and by what they were multiplied when the update begins.

    Args:
        engine: whose next steps are watched.
        note: given the local gradients by name; what it returns is kept.
    """
    seen, parameters = _Seen(), engine.parameters
    measure = parameters.squared_norm

    def noting() -> torch.Tensor:
        gradients = {name: p.grad for name, p in parameters.local.items() if p.grad is not None}
        seen.gradients.append(note(gradients))
        seen.before = _size(parameters.gradients())
        return measure()

    def at_update(*_: Any) -> None:
        after = _size(parameters.gradients())
        seen.factors.append(after / seen.before if seen.before else None)

    parameters.squared_norm = noting  # type: ignore[method-assign]
    engine.optimizer.register_step_pre_hook(at_update)
    return seen


def _size(tensors: Sequence[torch.Tensor]) -> float:
    return sum(float(tensor.detach().double().abs().sum()) for tensor in tensors)


def take_steps(
    case: Case, engine: Engine, mesh: Mesh, world: World, *, record: bool
) -> tuple[list[Any], list[dict[int, str]], Traffic, list[Micro]]:
    """Take the steps; the last one is recorded."""
    resolved = resolve_layout(case.config, world.size)
    samples = samples_of(case.data, case.config, resolved=resolved, spec=case.spec)
    outs, rows = [], []
    shapes: list[Micro] = []
    traffic: Traffic = {}
    batches = step_batches(samples, start=0, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, prefetch=1, pin=False)
    with contextlib.closing(batches), InFp64() if case.exact else contextlib.nullcontext():
        for number in range(case.steps):
            data = next(batches)
            micro = [thinned(batch, uneven=case.uneven, fold=case.fold) for batch in data.microbatches]
            rows.append(row_digests(micro))
            last = record and number == case.steps - 1
            with Recorder(mesh) if last else contextlib.nullcontext() as recorder, routes(case.spec, engine) as routed:
                out = engine.train_step(micro, samples=data.samples)
            engine.settle()
            if recorder is not None:
                traffic = dict(recorder.traffic)
            outs.append((float(out.loss), float(out.grad_norm)))
            shapes = shapes_of(micro, routed)
    return outs, rows, traffic, shapes


def shapes_of(batches: Sequence[Batch], routed: Sequence[tuple[int, ...]]) -> list[Micro]:
    """The shapes of some micro-batches.

    Args:
        batches: those of a step.
        routed: what `routes` saw of it: as many layers for each micro-batch.
    """
    layers, found = len(routed) // len(batches), []
    for number, batch in enumerate(batches):
        ids, labels = batch.inputs["input_ids"], batch.targets.get("labels")
        whole = labels is not None and labels.dim() == 2
        found.append(
            Micro(
                ids.shape[0], ids.shape[1], labels.shape[1] if labels is not None and whole else ids.shape[1],
                int((labels != IGNORE).sum()) if labels is not None else 0,
                tuple(routed[number * layers : (number + 1) * layers]),
            )
        )  # fmt: skip
    return found


@contextlib.contextmanager
def routes(spec: ModelSpec, engine: Engine) -> Iterator[list[tuple[int, ...]]]:
    """See which experts the routers choose: for each call of a layer of experts, the rows for each expert."""
    seen: list[tuple[int, ...]] = []

    def look(module: nn.Module, args: Any) -> None:
        count = next(module.parameters()).shape[0]
        seen.append(tuple(torch.bincount(args[1].flatten(), minlength=count).tolist()))

    parts = engine.parallel.parts if isinstance(engine, NativeEngine) else ()
    modules = [m for part in parts for m in expert_modules(part, plan=spec.ep_plan).values()]
    hooks = [module.register_forward_pre_hook(look) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def trace(case: Case, world: World) -> Trace:
    """Train on one process and keep everything, whole.

    Args:
        case: with a layout of one process.
        world: of one rank.
    """
    engine, mesh = built(case, world)
    seen = _watch(engine, lambda gradients: {name: array_of(g) for name, g in gradients.items()})
    starts = {name: array_of(p) for name, p in engine.parallel.model.named_parameters()}
    outs, rows, _, _ = take_steps(case, engine, mesh, world, record=False)
    weights = {name: array_of(p) for name, p in engine.parallel.model.named_parameters()}
    factors = [factor or 0.0 for factor in seen.factors]
    return Trace([o[0] for o in outs], [o[1] for o in outs], factors, starts, seen.gradients, weights, rows)


def run_rank(case: Case, world: World, reference: Trace, *, planted: Planted | None = None) -> RankReport:
    """Train as one rank of the layout, and compare every piece it holds with the reference.

    Args:
        case: with the layout.
        world: this rank's facts.
        reference: what one process computed.
        planted: a bug to plant.

    Returns:
        The errors, and what was sent at the last step. A collective call.
    """
    case = case if planted is None else planted.case(case, world)
    with planted.around(world, case) if planted is not None else contextlib.nullcontext():
        engine, mesh = built(case, world)
        parallel, names = engine.parallel, first_names(case.spec)
        if planted is not None:
            planted.on(engine, world, case, reference.starts)
        step = iter(range(case.steps))

        def note(gradients: Mapping[str, torch.Tensor]) -> Pieces:
            whole = reference.gradients[next(step)]
            return _pieces(gradients, whole, engine.parameters.whole, parallel, names=names)

        seen = _watch(engine, note)
        places = dict(parallel.model.named_parameters())
        local = {name: local_part(p) for name, p in places.items()}
        starts = _pieces(local, reference.starts, places, parallel, names=names)
        outs, rows, traffic, micro = take_steps(case, engine, mesh, world, record=True)
        engine.parameters.refresh()
        places = dict(parallel.model.named_parameters())
        local = {name: local_part(p) for name, p in places.items()}
        weights = _pieces(local, reference.weights, places, parallel, names=names)
    return RankReport(
        world.rank, mesh.coordinates(), [o[0] for o in outs], [o[1] for o in outs], seen.factors, starts, seen.gradients,
        weights, rows, traffic, micro,
    )  # fmt: skip


def _pieces(
    local: Mapping[str, torch.Tensor],
    whole: Arrays,
    places: Mapping[str, torch.Tensor],
    parallel: Parallel,
    *,
    names: Mapping[str, str],
) -> dict[str, Piece]:
    """Compare local tensors with their places in whole ones; one that the reference lacks is infinitely wrong."""
    found: dict[str, Piece] = {}
    for name, tensor in local.items():
        reference = whole.get(name, whole.get(names.get(name, name)))
        if reference is None:
            found[name] = Piece(math.inf, tensor.numel(), ())
            continue
        error, boxes = 0.0, []
        for inside, box in boxes_of(places[name], parallel, name):
            own = array_of(tensor)[inside]
            if own.size:
                difference = np.abs(own.astype(np.float64) - reference[box].astype(np.float64)).max()
                error = max(error, float(difference)) if np.isfinite(difference) else math.inf
                boxes.append(tuple((s.start, s.stop) for s in box))
        found[name] = Piece(error, tensor.numel(), tuple(boxes))
    return found


def first_names(spec: ModelSpec) -> dict[str, str]:
    """Every name of a tied parameter -> the first, by which the reference has it."""
    model = meta_model(spec)
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """A copy as numpy, of the local values."""
    plain = local_part(tensor).cpu()
    return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy().copy()
