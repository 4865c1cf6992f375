"""Measuring a run on its validation samples, and what follows from it."""

from __future__ import annotations

from dataclasses import replace

from distllm.comm import broadcast
from distllm.data.loader import validation_batches
from distllm.evaluate import Evaluation, evaluate
from distllm.track.summary import told
from distllm.train.build import Position, Run
from distllm.train.stopping import Judgement, judge
from distllm.train.written import score_written


def validate(run: Run, step: int, at: Position, *, limit: int) -> tuple[Position, Evaluation, Judgement]:
    """Evaluate on the validation samples, with the averaged weights where they are kept, and record the result.

    What is compared with the best so far is measured on the same samples each time. So after the last step, which is told
    of all of them, the `train.eval_batches` of the evaluations before are looked at once more.

    Args:
        run: the run.
        step: the present step.
        at: the position, for the best figure so far.
        limit: micro-batches a rank evaluates; 0: all.

    Returns:
        The position with the best figure brought up to date, the evaluation, and whether it is the best, or one too many
        that is not.
    """
    run.world.place.enter("evaluation")
    t, usual = run.config.train, _usual(run)
    with run.meter.pause(), run.engine.averaged():
        result = _measured(run, limit)
        compared = result if _taken(run, limit) == _taken(run, usual) else _measured(run, usual)
    run.tracker.log(step, result.as_metrics())
    run.log.info(f"step {step}: validation {told(result.loss, result.figures)}")
    judgement = judge(at.best, compared.as_metrics(), metric=t.best_metric, step=step, patience=t.patience)
    return replace(at, best=judgement.best), result, judgement


def part_compared(run: Run) -> tuple[int, int]:
    """On how many validation samples the best evaluation is chosen, and how many there are."""
    return _taken(run, _usual(run)), run.samples.validation_size


def _usual(run: Run) -> int:
    """The limit of the evaluations on the way; of the whole set where there are none."""
    return run.config.train.eval_batches if run.config.train.eval_every else 0


def _measured(run: Run, limit: int) -> Evaluation:
    batches = validation_batches(
        run.samples, micro_batch=run.resolved.micro_batch, dp_rank=run.mesh.dp_rank, dp_size=run.mesh.dp_size, limit=limit
    )
    result = evaluate(
        run.engine.eval_step, batches, figures=run.task.figures, group=run.mesh.loss_group, device=run.world.device
    )
    if run.config.task.metrics:
        result = replace(result, figures={**result.figures, **score_written(run, limit=limit)})
    # Ranks that share samples computed it side by side. What is decided by it, they decide alike to the last bit.
    return broadcast(result, run.world)


def _taken(run: Run, limit: int) -> int:
    """How many validation samples an evaluation of `limit` micro-batches a rank takes."""
    every = run.samples.validation_size
    return min(every, limit * run.resolved.micro_batch * run.mesh.dp_size) if limit else every
