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
    with run.meter.pause(), run.engine.averaged():
        batches = validation_batches(
            run.samples, micro_batch=run.resolved.micro_batch, dp_rank=run.mesh.dp_rank, dp_size=run.mesh.dp_size,
            limit=limit,
        )  # fmt: skip
        result = evaluate(
            run.engine.eval_step, batches, figures=run.task.figures, group=run.mesh.loss_group, device=run.world.device
        )
        if run.config.task.metrics:
            result = replace(result, figures={**result.figures, **score_written(run, limit=limit)})
        # Ranks that share samples computed it side by side. What is decided by it, they decide alike to the last bit.
        result = broadcast(result, run.world)
    figures = result.as_metrics()
    run.tracker.log(step, figures)
    run.log.info(f"step {step}: validation {told(result.loss, result.figures)}")
    t = run.config.train
    judgement = judge(at.best, figures, metric=t.best_metric, step=step, patience=t.patience)
    return replace(at, best=judgement.best), result, judgement
