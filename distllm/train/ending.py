"""What a run tells its user besides numbers: samples of text on the way, and the summary at the end."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys

import torch

from distllm import generate
from distllm.checkpoint.find import candidates
from distllm.comm import broadcast, gather
from distllm.config.trust import own_code
from distllm.data.chat import prompt_text
from distllm.data.clean import clean
from distllm.evaluate import Evaluation
from distllm.rank_facts import node_name
from distllm.track.node_use import NodeUse, node_summaries
from distllm.track.summary import Summary, render_summary
from distllm.train.build import Position, Run
from distllm.train.stopping import Best, out_of_patience
from distllm.train.tasks import WRITES
from distllm.train.validate import part_compared


def sample_text(run: Run, step: int) -> str | None:
    """Let the model continue each of `train.sample_prompts`, and write it to `samples.txt` and the log.

    With task.kind=sft each is what the user says, and what is written is the conversation.

    All ranks run it, because a sharded model answers only together; they draw from equal generators, so they agree.

    Returns:
        The last sample's text; None when samples are switched off.
    """
    t = run.config.train
    if t.sample_tokens == 0 or not t.sample_prompts or run.task.kind not in WRITES:
        return None
    run.world.place.enter("sample")
    prompts, chat = [clean(prompt, run.config.data.clean) for prompt in t.sample_prompts], run.task.kind == "sft"
    if chat:
        prompts = [prompt_text([{"role": "user", "content": prompt}], run.tokenizer) for prompt in prompts]
    shown = prompts if chat else t.sample_prompts
    with run.meter.pause(), run.engine.averaged(), run.engine.inference() as model:
        texts = generate.sample_text(
            model, tokenizer=run.tokenizer, prompts=prompts, max_len=run.spec.max_seq_len,
            sampling=generate.Sampling(t.sample_tokens, t.sample_temperature), device=run.world.device,
            to_the_end=run.world.size > 1, chat=chat,
            generator=torch.Generator(run.world.device).manual_seed(run.config.seed),
        )  # fmt: skip
    if run.world.is_main:
        with run.folder.samples.open("a", encoding="utf-8") as file:
            for prompt, before, text in zip(t.sample_prompts, shown, texts, strict=True):
                file.write(f"--- step {step}, prompt {prompt!r}\n{before}{text}\n")
    run.log.info(f"step {step}: sample: {shown[-1] + texts[-1]!r}")
    return texts[-1]


def tell_if_done(run: Run) -> bool:
    """Say so, and touch nothing, when the run has already taken and evaluated its last step."""
    steps, figures = run.config.train.steps, run.folder.path / "summary.json"
    done, step = False, run.engine.updates
    if (step >= steps or out_of_patience(run.config.train, run.start.best)) and figures.exists():
        last = json.loads(figures.read_text(encoding="utf-8"))
        done = last.get("steps") == step and "val_loss" in last  # without it a signal came in the last step
    if done := broadcast(done, run.world):
        what = f"{steps} steps" if step >= steps else f"it stopped early at step {step}"
        run.log.info(f"{run.folder.path} is done, {what}; to train on: {_again(run, run.start.best, more=True)}")
    return done


def _again(run: Run, best: Best, *, more: bool) -> str:
    """The command that continues the run, or trains it for as many steps, or as much patience, again."""
    t = run.config.train
    trust = " --trust" if own_code(run.config) is not None else ""
    key = f" train.patience={best.bad + t.patience}" if out_of_patience(t, best) else ""
    key += f" train.steps={2 * t.steps}" if run.engine.updates >= t.steps else ""
    return f"distllm train {shlex.quote(str(run.folder.path))}{trust}{key if more else ''}"


def _activation() -> str | None:
    """What to type before `distllm` is found, if it is not."""
    inside = sys.prefix != sys.base_prefix and shutil.which("distllm") is None
    return f"source {shlex.quote(os.path.relpath(sys.prefix))}/bin/activate" if inside else None


def tell_nodes(run: Run, use: NodeUse) -> None:
    """Record what each node gave to the run; all ranks call it, and rank 0 writes."""
    peak = int(torch.cuda.max_memory_allocated(run.world.device)) if run.world.device.type == "cuda" else None
    run.tracker.summary(node_summaries(gather(use.read(node=node_name(), device_peak=peak), run.world)))


def tell_end(
    run: Run, at: Position, last: Evaluation | None, sample: str | None, *, seconds: float, stopped: str | None
) -> None:
    """Write the summary: to the terminal, to the log, and as `summary.json`."""
    if not run.world.is_main:
        return
    if run.engine.unused:
        run.log.warning(f"{len(run.engine.unused)} parameters got no gradient: {', '.join(run.engine.unused[:5])}")
    step = run.engine.updates
    total, again = run.config.train.steps, _again(run, at.best, more=not stopped)
    newest = next((folder for _, folder in candidates(run.folder.checkpoints)), None)
    summary = Summary(
        run_folder=run.folder.path, steps=step, total_steps=total, seconds=seconds, tokens=at.tokens,
        metrics=run.folder.path / "metrics.jsonl", resume_command=again,
        val_loss=last.loss if last else None, figures=dict(last.figures) if last else {},
        unigram_loss=run.samples.unigram_loss() if last else None,
        best_metric=at.best.metric, best_value=at.best.value, best_step=at.best.step, best_of=part_compared(run),
        skipped=at.skipped, checkpoint=newest,
        prompt=run.config.train.sample_prompts[-1] if sample else "", sample=sample,
        tokens_per_s=at.tokens / max(seconds, 1e-9), stopped=stopped, own_code=own_code(run.config) is not None,
        activate=_activation(), writes=run.task.kind in WRITES,
    )  # fmt: skip
    figures = {f"val_{name}": value for name, value in summary.figures.items()}
    run.tracker.summary({k: v for k, v in vars(summary).items() if isinstance(v, int | float)} | figures)
    print(render_summary(summary, terminal=sys.stdout.isatty()), flush=True)
