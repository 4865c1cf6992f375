"""Bugs of an engine that stands on DeepSpeed, planted as those of the native one are."""

from __future__ import annotations

from typing import Any

from distllm.comm import World
from distllm.config.errors import DistllmError
from distllm.engine.deepspeed import DeepSpeedEngine
from distllm.verify.engines import EngineChoice
from distllm.verify.planted import FSDP, NO_PLACE, Fault, mean_of_its_own, objective_changed
from distllm.verify.trial import Arrays, Case


def _mean_on_one_rank(case: Case, world: World) -> Case:
    """The last rank hands DeepSpeed means of its micro-batches, and the others sums."""
    return objective_changed(mean_of_its_own)(case, world) if world.rank == world.size - 1 else case


def _mean_over_ranks(engine: DeepSpeedEngine, world: World, starts: Arrays) -> None:
    """DeepSpeed's own division by the ranks is not undone: targets divide once more."""
    optimizer, update = engine._engine.optimizer, engine._passes.step

    def wrong() -> None:
        optimizer.loss_scale = optimizer.loss_scale * world.size
        update()

    engine._passes.step = wrong  # type: ignore[method-assign]


def _never_clips(engine: DeepSpeedEngine, world: World, starts: Arrays) -> None:
    optimizer, update = engine._engine.optimizer, engine._passes.step
    told, optimizer.clip_grad = optimizer.clip_grad, 0.0

    def wrong() -> None:
        update()
        if engine.updates == 0 and not 0 < told < engine._engine.get_global_grad_norm():
            raise DistllmError(NO_PLACE)  # there was nothing to clip

    engine._passes.step = wrong  # type: ignore[method-assign]


def _lost_update(engine: DeepSpeedEngine, world: World, starts: Arrays) -> None:
    """The last rank's flat piece is not stepped once, and the others gather it as it was."""
    if world.rank != world.size - 1:
        return
    step, left = engine.optimizer.step, [1]

    def wrong(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        return None if left[0] >= 0 else step(*args, **options)

    engine.optimizer.step = wrong  # type: ignore[method-assign]


ZERO_1, ZERO_2, ZERO_3 = (EngineChoice("deepspeed", stage) for stage in (1, 2, 3))

DEEPSPEED_FAULTS: tuple[Fault, ...] = (
    Fault("one rank's mean", "one rank counts micro-batches by their means", FSDP, changes=_mean_on_one_rank, engine=ZERO_2),
    Fault("divided twice", "a mean over ranks is divided by all targets too", FSDP, breaks=_mean_over_ranks, engine=ZERO_3),
    Fault("never clipped", "DeepSpeed leaves out the clipping that it was told", FSDP, breaks=_never_clips, engine=ZERO_1),
    Fault("lost update", "one rank's flat piece misses an update", FSDP, breaks=_lost_update, engine=ZERO_3),
)  # fmt: skip
