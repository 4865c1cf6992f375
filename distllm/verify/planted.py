"""Known kinds of bug, planted one at a time into a live layout: each must be caught, or the comparison is worth nothing.

A bug is planted in the processes of one trial only. It changes what the ranks train (`case`), replaces a function while the
model is built and trained (`around`), or breaks the engine after it is built (`on`). All have been seen in real frameworks.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from distllm.comm import World
from distllm.config.errors import DistllmError
from distllm.data.batch import IGNORE, Batch
from distllm.engine import local, native
from distllm.engine.base import LossTerms
from distllm.engine.native import NativeEngine
from distllm.parallel import data, expert, tensor, tensor_styles
from distllm.parallel.mesh import Mesh
from distllm.parallel.pipeline import Pipeline
from distllm.verify.engines import NATIVE, EngineChoice
from distllm.verify.swap import swapped
from distllm.verify.trial import Arrays, Case

NO_PLACE = "this model has no place for it"
KEYS_AND_VALUES = ("k_proj", "v_proj", "k", "v", "key", "value")
"""What families call the projections of keys and values."""
Patch = Callable[[World], AbstractContextManager[None]]
Break = Callable[[Any, World, Arrays], None]
"""(the engine of its layout, this rank's facts, the first weights) -> a broken one."""


@dataclass(frozen=True)
class Fault:
    """One kind of bug."""

    name: str
    what: str
    layout: Mapping[str, Any]
    """In which it is planted."""
    changes: Callable[[Case, World], Case] | None = None
    patch: Patch | None = None
    breaks: Break | None = None
    engine: EngineChoice = NATIVE
    """Under which it is planted."""

    def case(self, case: Case, world: World) -> Case:
        """What this rank trains."""
        return case if self.changes is None else self.changes(case, world)

    def around(self, world: World, case: Case) -> AbstractContextManager[None]:
        """Entered before the mesh is built and left after the last step."""
        return contextlib.nullcontext() if self.patch is None else self.patch(world)

    def on(self, engine: Any, world: World, case: Case, starts: Arrays) -> None:
        """Called between building and the first step."""
        if self.breaks is not None:
            self.breaks(engine, world, starts)


def objective_changed(change: Callable[[LossTerms, Batch], LossTerms]) -> Callable[[Case, World], Case]:
    """A bug in the objective: what it gives is changed."""

    def changes(case: Case, world: World) -> Case:
        true = case.task.objective

        def wrong(outputs: Any, batch: Batch) -> LossTerms:
            return change(true(outputs, batch), batch)

        return replace(case, task=replace(case.task, objective=wrong))

    return changes


# --- the objective and the data ----------------------------------------------------------------------------------------


def mean_of_its_own(terms: LossTerms, batch: Batch) -> LossTerms:
    count = terms.count.clamp(min=1)
    return LossTerms(terms.sum / count, torch.ones_like(terms.count), terms.parts)


def _doubled(terms: LossTerms, batch: Batch) -> LossTerms:
    return LossTerms(terms.sum * 2, terms.count, terms.parts)


def _all_places(terms: LossTerms, batch: Batch) -> LossTerms:
    return LossTerms(terms.sum, torch.full_like(terms.count, batch.targets["labels"].numel()), terms.parts)


def _other_seed(case: Case, world: World) -> Case:
    if world.rank != world.size - 1:
        return case
    return replace(case, config=case.config.model_copy(update={"seed": case.config.seed + 1}))


def _same_samples(world: World) -> AbstractContextManager[None]:
    return swapped(Mesh, "dp_rank", property(lambda mesh: 0))


def _lost_microbatch(engine: NativeEngine, world: World, starts: Arrays) -> None:
    if world.rank != world.size - 1:
        return
    train = engine.train_step

    def wrong(microbatches: Sequence[Batch], **options: Any) -> Any:
        *others, last = microbatches
        targets = {n: torch.full_like(t, IGNORE) if n == "labels" else t for n, t in last.targets.items()}
        return train([*others, Batch(last.inputs, targets, last.sample_ids)], **options)

    engine.train_step = wrong  # type: ignore[method-assign]


# --- gradients and norms -----------------------------------------------------------------------------------------------


def _dropped_all_reduce(world: World) -> AbstractContextManager[None]:
    def unsent(group: Any, bucket):  # type: ignore[no-untyped-def]  # DDP looks at these annotations
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    unsent.__annotations__.clear()
    return swapped(data, "_add_bucket", unsent)


def _never_last(world: World) -> AbstractContextManager[None]:
    true = native.set_last_microbatch

    def wrong(forward: nn.Module, last: bool, *, readable: bool = False) -> None:
        true(forward, False, readable=readable or last)

    return swapped(native, "set_last_microbatch", wrong)


def _replicas_apart(world: World) -> AbstractContextManager[None]:
    true = dist.all_reduce

    def wrong(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        group = options.get("group")
        between = group is not None and dist.get_world_size(group) < world.size
        return None if between and tensor.numel() > 1 else true(tensor, *args, **options)

    return swapped(dist, "all_reduce", wrong)


def _averaged_shards(engine: NativeEngine, world: World, starts: Arrays) -> None:
    for part in engine.parallel.parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(float(world.size))


def _counted_twice(world: World) -> AbstractContextManager[None]:
    true = local._sharding_groups
    return swapped(local, "_sharding_groups", lambda p: true(p) or (dist.group.WORLD,))


def _own_norm(world: World) -> AbstractContextManager[None]:
    return swapped(local, "_sharding_groups", lambda p: ())


# --- weights -----------------------------------------------------------------------------------------------------------


def _untied(engine: NativeEngine, world: World, starts: Arrays) -> None:
    seen: set[int] = set()
    for part in engine.parallel.parts:
        for name, parameter in list(part.named_parameters(remove_duplicate=False)):
            if id(parameter) in seen:
                owner, _, attribute = name.rpartition(".")
                setattr(part.get_submodule(owner), attribute, nn.Parameter(parameter.detach().clone()))
                return
            seen.add(id(parameter))
    raise DistllmError(NO_PLACE)


def _wrong_slice(engine: NativeEngine, world: World, starts: Arrays) -> None:
    if world.rank != world.size - 1:
        return
    for name, own in engine.parameters.local.items():
        whole = starts.get(name)
        if whole is not None and own.dim() == 2 and 0 < own.shape[0] < whole.shape[0]:
            with torch.no_grad():
                own.copy_(torch.from_numpy(whole[: own.shape[0], : own.shape[1]]))
            return
    raise DistllmError(NO_PLACE)


def _no_update(times: int, *, from_rank: int) -> Break:
    """The update of some ranks is left out the first so many times."""

    def breaks(engine: NativeEngine, world: World, starts: Arrays) -> None:
        if world.rank < from_rank:
            return
        step, left = engine.optimizer.step, [times]

        def wrong(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            return None if left[0] >= 0 else step(*args, **options)

        engine.optimizer.step = wrong  # type: ignore[method-assign]

    return breaks


def _other_rate(engine: NativeEngine, world: World, starts: Arrays) -> None:
    if world.rank == world.size - 1:
        rate = engine._schedule
        engine._schedule = lambda step: 1.01 * rate(step)


def _all_decay(engine: NativeEngine, world: World, starts: Arrays) -> None:
    groups = [group for group in engine.optimizer.param_groups if not group["weight_decay"]]
    if not groups:
        raise DistllmError(NO_PLACE)
    for group in groups:
        group["weight_decay"] = 0.1


def _swapped_heads(engine: NativeEngine, world: World, starts: Arrays) -> None:
    """Keys and values of two tp ranks change places, those of the queries stay."""
    place, ranks = engine.parallel.mesh.coordinates()["tp"], engine.parallel.mesh.sizes["tp"]
    found = False
    for name, own in engine.parameters.local.items():
        whole, module = starts.get(name), name.split(".")[-2] if "." in name else ""
        if whole is not None and module in KEYS_AND_VALUES and own.shape[0] * ranks == whole.shape[0]:
            first = (place + 1) % ranks * own.shape[0]
            with torch.no_grad():
                own.copy_(torch.from_numpy(whole[first : first + own.shape[0]]))
            found = True
    if not found:
        raise DistllmError(NO_PLACE)


def _other_layer(engine: NativeEngine, world: World, starts: Arrays) -> None:
    """The last matrix of the last rank's layers gets the numbers of layer 0."""
    if world.rank != world.size - 1:
        return
    for name, own in reversed(list(engine.parameters.local.items())):
        first = re.sub(r"\.(\d+)\.", ".0.", name, count=1)
        if first != name and first in starts and starts[first].shape == tuple(own.shape) and own.dim() == 2:
            with torch.no_grad():
                own.copy_(torch.from_numpy(starts[first]))
            return
    raise DistllmError(NO_PLACE)


# --- computing ---------------------------------------------------------------------------------------------------------


def _last_block(engine: NativeEngine) -> nn.Module:
    lists = [m for part in engine.parallel.parts for m in part.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise DistllmError(NO_PLACE)
    largest: nn.ModuleList = max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))
    return largest[-1]


def _rounded(engine: NativeEngine, world: World, starts: Arrays) -> None:
    if world.rank != world.size - 1:
        return

    def rounding(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        rounded = first.to(torch.float16).to(first.dtype)
        return (rounded, *output[1:]) if isinstance(output, tuple) else rounded

    _last_block(engine).register_forward_hook(rounding)


def _extra_sum(engine: NativeEngine, world: World, starts: Arrays) -> None:
    def send(module: nn.Module, args: Any) -> None:
        dist.all_reduce(torch.zeros(1))

    engine.parallel.forward.register_forward_pre_hook(send)


def _unsummed_parts(world: World) -> AbstractContextManager[None]:
    return swapped(tensor_styles, "reduce_from", lambda part, group: part)


def _unsummed_norms(world: World) -> AbstractContextManager[None]:
    return swapped(tensor, "_summed", lambda ranks, slots: contextlib.nullcontext())


def _later_position(engine: NativeEngine, world: World, starts: Arrays) -> None:
    if world.rank != world.size - 1:
        return

    def shift(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        positions = kwargs.get("position_ids")
        assert positions is not None, "context-parallel ranks are given their positions"
        return args, {**kwargs, "position_ids": positions + 1}

    engine.parallel.forward.register_forward_pre_hook(shift, with_kwargs=True)


def _label_at_a_cut(case: Case, world: World) -> Case:
    """Labels shifted after the cut: the last place of a rank's tokens is asked for its own first token."""
    true = case.task.objective

    def wrong(outputs: Any, batch: Batch) -> LossTerms:
        labels = batch.targets["labels"].clone()
        labels[:, -1] = torch.where(labels[:, -1] == IGNORE, IGNORE, batch.inputs["input_ids"][:, 0])
        return true(outputs, Batch(batch.inputs, {**batch.targets, "labels": labels}, batch.sample_ids))

    return replace(case, task=replace(case.task, objective=wrong))


def _lost_expert(world: World) -> AbstractContextManager[None]:
    """The rows of the first expert of the last rank come back as zeros."""
    true = expert.grouped_linear

    def wrong(rows: torch.Tensor, weight: torch.Tensor, *, counts: list[int], ends: torch.Tensor) -> torch.Tensor:
        out = true(rows, weight, counts=counts, ends=ends)
        if world.rank != world.size - 1:
            return out
        kept = torch.ones(len(out), 1, dtype=out.dtype)
        kept[: counts[0]] = 0.0
        return out * kept

    return swapped(expert, "grouped_linear", wrong)


def _ties_apart(world: World) -> AbstractContextManager[None]:
    return swapped(Pipeline, "sum_tied_gradients", lambda pipeline: None)


DDP, FSDP, HSDP = {"dp_replicate": 2}, {"dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 2}
TP, PLAIN_TP, CP, EP, PP = {"tp": 2}, {"tp": 2, "sequence_parallel": False}, {"cp": 2}, {"ep": 2}, {"pp": 2}

FAULTS: tuple[Fault, ...] = (
    Fault("dropped all-reduce", "gradients of replicas are not added", DDP, patch=_dropped_all_reduce),
    Fault("mean of means", "each micro-batch is divided by its own count", DDP, changes=objective_changed(mean_of_its_own)),
    Fault("dropped padding weights", "places without a target are counted", FSDP, changes=objective_changed(_all_places)),
    Fault("missing gradient sync", "the last micro-batch is treated like the others", DDP, patch=_never_last),
    Fault("averaged shards", "gradients of shards are averaged and not added", FSDP, breaks=_averaged_shards),
    Fault("replicas apart", "shards are not added over the replicas", HSDP, patch=_replicas_apart),
    Fault("counted twice", "the norm adds replicated parameters over ranks", DDP, patch=_counted_twice),
    Fault("own norm", "each rank clips by the norm of its own shards", FSDP, patch=_own_norm),
    Fault("untied copy", "a tied weight becomes two", DDP, breaks=_untied),
    Fault("wrong slice", "a rank starts from another rank's slice of a matrix", FSDP, breaks=_wrong_slice),
    Fault("mis-seeded rank", "one rank draws its weights from another seed", FSDP, changes=_other_seed),
    Fault("same samples", "all ranks read what the first one reads", DDP, patch=_same_samples),
    Fault("lost micro-batch", "one rank leaves out its last micro-batch", FSDP, breaks=_lost_microbatch),
    Fault("skip on one rank", "one rank alone leaves an update out", FSDP, breaks=_no_update(1, from_rank=1)),
    Fault("another rate", "one rank has another learning rate", FSDP, breaks=_other_rate),
    Fault("norms decay", "weight decay reaches norms and embeddings", DDP, breaks=_all_decay),
    Fault("rounded activation", "one rank computes a layer's output in fp16", FSDP, breaks=_rounded),
    Fault("extra collective", "something is sent that changes no number", FSDP, breaks=_extra_sum),
    Fault("loss x tp", "each tp rank's loss counts as one of its own", TP, changes=objective_changed(_doubled)),
    Fault("unsummed parts", "the parts of row-parallel products are not added", PLAIN_TP, patch=_unsummed_parts),
    Fault("unsummed norms", "each tp rank keeps the gradient of its own tokens' norms", TP, patch=_unsummed_norms),
    Fault("swapped KV heads", "two tp ranks have each other's keys and values", TP, breaks=_swapped_heads),
    Fault("later position", "a cp rank numbers its tokens from one too high", CP, breaks=_later_position),
    Fault("label at a cut", "labels are shifted after the sequence is cut", CP, changes=_label_at_a_cut),
    Fault("lost expert", "an expert on another rank gives nothing back", EP, patch=_lost_expert),
    Fault("another's numbers", "a stage's layer starts with the numbers of the first", PP, breaks=_other_layer),
    Fault("stale stage", "a stage goes on with its weights of before the update", PP, breaks=_no_update(1, from_rank=1)),
    Fault("ties apart", "the two stages of a tied weight do not add their gradients", PP, patch=_ties_apart),
)  # fmt: skip
