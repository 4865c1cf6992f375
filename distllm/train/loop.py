"""The training loop, read from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

from distllm.comm import Agreement
from distllm.config.errors import EXIT_BUG, EXIT_OK, EXIT_STOPPED, DivergedError
from distllm.data.loader import Step, step_batches
from distllm.engine.base import Skipped, StepOut
from distllm.track.node_use import NodeUse
from distllm.track.noise import NoiseScale
from distllm.track.progress import Progress, clock_face
from distllm.train.build import Position, Run, close, save
from distllm.train.ending import sample_text, tell_end, tell_if_done, tell_nodes
from distllm.train.signals import StopRequest
from distllm.train.stopping import out_of_patience
from distllm.train.validate import validate


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens at `step`."""
    return every > 0 and step % every == 0


def train(run: Run) -> int:
    """Train the run, and close its files and its W&B run however it ends; returns and errors as in `train_steps`."""
    run.world.place.folder = run.folder.path
    try:
        code = EXIT_OK if tell_if_done(run) else train_steps(run)
    except BaseException as error:
        close(run, code=getattr(error, "exit_code", EXIT_BUG))
        raise
    close(run, code=code)
    return code


def train_steps(run: Run) -> int:
    """Train until the last step, or until asked to stop; the state is saved either way.

    Returns:
        EXIT_OK after the last step, EXIT_STOPPED when a signal stopped it.

    Raises:
        DivergedError: `train.max_skips` steps in a row were not finite; the last good checkpoint stands.
    """
    t, every, engine, meter = run.config.train, run.config.checkpoint.every, run.engine, run.meter
    at, step, clock, place = run.start, engine.updates, _Clock(run.start.seconds, engine.updates), run.world.place
    agreement, stopping, saved = Agreement(run.world, flags=3), False, False
    enough = out_of_patience(t, at.best)
    noise_scale, node_use = NoiseScale(), NodeUse()
    keeps_best = t.keep_best or t.patience > 0
    rhythms = (t.log_every, t.eval_every, t.sample_every, every)
    bar = Progress(t.steps, start=step, terminal=run.world.is_main)
    with StopRequest() as request, bar, closing(_step_batches(run)) as batches:
        while step < t.steps and not stopping and not enough:
            place.step = step + 1
            place.enter("data")
            with meter.waiting():
                data = next(batches)
            place.enter("step")
            noise = run.config.track.noise_scale and due(step + 1, t.log_every)
            out = engine.train_step(data.microbatches, samples=data.samples, noise=noise)
            meter.step(data.tokens)
            at = replace(at, samples=data.samples.stop, tokens=at.tokens + data.tokens)
            at = _tell_skips(run, at, out.skipped, clock)
            late = clock.late(run.config.checkpoint.every_minutes)
            stopping, late, torn = agreement.exchange([request.received is not None, late, run.checkpoints.write_failed()])
            late = late and not saved  # the answer is a step old: it may have been obeyed already
            if stopping or late or torn or engine.step >= t.steps or any(due(engine.step, n) for n in rhythms):
                at = _tell_skips(run, at, engine.settle(), clock)  # whether this step was taken is known before it is acted on
            before, step, saved = step, engine.step, False
            fresh, best = step > before, False  # a skipped step is as if it had never been taken: what was due was done
            bar.advance(step)
            if torn:
                run.checkpoints.wait()  # raises what kept the last checkpoint from being written
            if fresh and (due(step, t.log_every) or step == t.steps):
                bar.advance(step, _log_step(run, step, at, out, clock, noise_scale))
            if fresh and due(step, t.eval_every) and step < t.steps:
                at, _, judgement = validate(run, step, at, limit=t.eval_batches)
                best, enough = keeps_best and judgement.improved, judgement.stop
            if fresh and due(step, t.sample_every) and step < t.steps:
                sample_text(run, step)
            if (fresh and (due(step, every) or step == t.steps)) or late or stopping or best or enough:
                with meter.pause():
                    save(run, position=replace(at, seconds=clock.total()))
                    if best:
                        run.checkpoints.mark_best(step)
                saved = clock.saved()
        agreement.last()
        last, sample = None, None
        if not stopping:
            at, last, judgement = validate(run, step, at, limit=0)
            if keeps_best and judgement.improved:
                save(run, position=replace(at, seconds=clock.total()))
                run.checkpoints.mark_best(step)
            sample = sample_text(run, step)
        place.enter("end")
        run.checkpoints.wait()
    code = EXIT_STOPPED if stopping else EXIT_OK
    tell_nodes(run, node_use)
    tell_end(run, at, last, sample, seconds=clock.total(), stopped=(request.received or "another rank") if stopping else None)
    return code


def _step_batches(run: Run) -> Generator[Step]:
    return step_batches(
        run.samples, start=run.start.samples, dp_rank=run.mesh.dp_rank, dp_size=run.mesh.dp_size,
        prefetch=run.config.data.prefetch, pin=run.world.device.type == "cuda",
    )  # fmt: skip


def _log_step(run: Run, step: int, at: Position, out: StepOut, clock: _Clock, noise_scale: NoiseScale) -> str:
    """Record a step's figures; the one place where the host waits for the device. Returns the progress bar's text."""
    loss, norm = float(out.loss), float(out.grad_norm)
    speed = run.meter.read()
    if out.noise is not None:
        noise_scale.update(*out.noise.tolist())
    run.tracker.log(
        step,
        {"samples": at.samples, "tokens": at.tokens, "loss": loss, "grad_norm": norm, "lr": out.lr, **speed,
         "skipped": at.skipped, "time_s": clock.total(), "noise_scale": noise_scale.value()},
    )  # fmt: skip
    rate, wait = speed.get("tokens_per_s"), speed.get("data_wait_share")
    text = f"loss {loss:.4f}" + (f", {rate:,.0f} tokens/s" if rate else "")
    mfu = speed.get("mfu")
    line = f"step {step}/{run.config.train.steps}: {text}, gradient norm {norm:.3f}, lr {out.lr:.3g}"
    line += f", data wait {100 * wait:.2f} %" if wait is not None else ""
    line += f", MFU {100 * mfu:.1f} %" if mfu else ""
    run.log.info(line + clock.left(step, of=run.config.train.steps))
    return text


def _tell_skips(run: Run, at: Position, skipped: tuple[Skipped, ...], clock: _Clock) -> Position:
    """Log skipped steps with their samples, and end the run when there are too many in a row."""
    for skip in skipped:
        run.log.warning(
            f"step {run.engine.updates + 1} skipped: {skip.reason}; samples {skip.samples.start} to {skip.samples.stop - 1}"
        )
    at = replace(at, skipped=at.skipped + len(skipped))
    # Not by the count alone: a diverged run that goes on begins with it, and on a GPU its first step is not judged yet.
    if skipped and run.engine.skips_in_a_row >= run.config.train.max_skips:
        run.engine.settle()
        save(run, position=replace(at, seconds=clock.total()))  # the weights are those before the first of them
        run.checkpoints.wait()
        raise DivergedError(
            f"{run.engine.skips_in_a_row} steps in a row had a loss or gradient that is not finite (train.max_skips="
            f"{run.config.train.max_skips}); the state before them is saved as step {run.engine.updates} in "
            f"{run.folder.checkpoints}; try a lower optim.lr, or look at the samples named in {run.folder.path / 'logs'}"
        )
    return at


class _Clock:
    """Seconds of this attempt and of the whole run, and whether a checkpoint by time is due."""

    def __init__(self, before: float, step: int) -> None:
        self._before, self._first = before, step
        self._began = self._saved = time.monotonic()

    def attempt(self) -> float:
        return time.monotonic() - self._began

    def total(self) -> float:
        return self._before + self.attempt()

    def left(self, step: int, *, of: int) -> str:
        """The time to the last step, at this attempt's mean speed, for the end of a line of the log."""
        return f", {clock_face(self.attempt() * (of - step) / (step - self._first))} left" if self._first < step < of else ""

    def saved(self) -> bool:
        self._saved = time.monotonic()
        return True

    def late(self, minutes: float) -> bool:
        return minutes > 0 and time.monotonic() - self._saved >= 60.0 * minutes
