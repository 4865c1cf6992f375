"""CPU-seconds of a distllm step against a hand-written loop over the same module and the same batches.

    make bench                              # writes docs/benchmarks/overhead.json
    python docs/benchmarks/overhead.py --rounds 12 --steps 8

Both sides run in one process, in turns (A B B A ...), from equal weights, with the same fused AdamW, the same clipping
and the same allocator settings. The distllm side is what its loop does at every step: the engine's step, the meter, the
signal agreement and the bookkeeping. The figure is process CPU time, which other work on the machine does not enter.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

import distllm
from distllm.comm import Agreement, World
from distllm.config.schema import Config, DataConfig, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig
from distllm.data.batch import Batch
from distllm.models.build import resolve_spec
from distllm.parallel.mesh import AXES, build_mesh
from distllm.track.meter import Meter
from distllm.train.build import Position
from distllm.train.build_native import build_engine
from distllm.train.host import keep_memory
from distllm.train.loop import due
from distllm.train.optim import decaying_names
from distllm.train.tasks import make_task

SIZES = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8,
}  # fmt: skip


def bare_loop(model: torch.nn.Module, config: Config) -> Callable[[list[torch.Tensor], torch.Tensor, int], None]:
    """The loop that one would write by hand."""
    decays = decaying_names(model, embeddings=False)
    named = dict(model.named_parameters())
    o = config.optim
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n in decays], "weight_decay": o.weight_decay},
            {"params": [p for n, p in named.items() if n not in decays], "weight_decay": 0.0},
        ],
        lr=o.lr, betas=o.betas, eps=o.eps, fused=True,
    )  # fmt: skip
    model.train()

    def step(inputs: list[torch.Tensor], labels: torch.Tensor, number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = o.lr * 0.5 * (1 + math.cos(math.pi * number / 1000))
        for ids, answers in zip(inputs, labels, strict=True):
            logits = model(input_ids=ids).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), answers.flatten()) / len(inputs)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def distllm_loop(config: Config, world: World, spec: object) -> tuple[torch.nn.Module, Callable[[list[Batch], int], None]]:
    """The lines that distllm's loop runs at every step that does not log."""
    mesh = build_mesh(world, sizes=dict.fromkeys(AXES, 1))
    engine = build_engine(config, world, mesh=mesh, spec=spec, task=make_task(config))  # type: ignore[arg-type]
    meter = Meter(flops_per_token=None, peak=None, devices=1)
    agreement = Agreement(world, flags=3)
    at, t = Position(), config.train

    def step(batches: list[Batch], number: int) -> None:
        nonlocal at
        with meter.waiting():
            pass
        out = engine.train_step(batches, samples=range(at.samples, at.samples + t.micro_batch))
        assert out.grad_norm is not None
        tokens = sum(batch.inputs["input_ids"].numel() for batch in batches)
        meter.step(tokens)
        at = replace(at, samples=at.samples + t.micro_batch, tokens=at.tokens + tokens)
        agreement.exchange([False, False, False])
        if due(number, 10**9) or due(number, t.eval_every) or due(number, t.sample_every):
            raise AssertionError

    return engine.parallel.model, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="pairs of measurements")
    parser.add_argument("--steps", type=int, default=6, help="steps of one measurement")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1, help="more than one adds the waiting of threads to CPU time")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(args.threads)
    config = Config(
        model=ModelConfig(type="llama", sizes=SIZES), data=DataConfig(seq_len=args.seq_len),
        optim=OptimConfig(lr=1e-4), schedule=ScheduleConfig(warmup=0),
        train=TrainConfig(steps=1000, micro_batch=args.micro_batch, eval_every=0),
    )  # fmt: skip
    world = World(0, 1, 0, 1, torch.device("cpu"))
    spec = resolve_spec(config, vocab_size=args.vocab)
    ours_model, ours = distllm_loop(config, world, spec)
    bare_model = copy.deepcopy(ours_model)
    bare = bare_loop(bare_model, config)
    generator = torch.Generator().manual_seed(1)
    shape = (args.micro_batch, args.seq_len + 1)
    tokens = [torch.randint(0, args.vocab, shape, generator=generator) for _ in range(args.accumulation)]
    inputs, labels = [t[:, :-1].contiguous() for t in tokens], [t[:, 1:].contiguous() for t in tokens]
    ids = tuple(range(args.micro_batch))
    batches = [Batch({"input_ids": i}, {"labels": a}, ids) for i, a in zip(inputs, labels, strict=True)]

    def measure(side: str) -> float:
        begin = time.process_time()
        for number in range(1, args.steps + 1):
            if side == "distllm":
                ours(batches, number)
            else:
                bare(inputs, labels, number)
        return (time.process_time() - begin) / args.steps

    for side in ("bare", "distllm"):
        measure(side)  # warm up
    seconds: dict[str, list[float]] = {"bare": [], "distllm": []}
    ratios = []
    for number in range(args.rounds):
        order = ("bare", "distllm") if number % 2 == 0 else ("distllm", "bare")
        pair = {side: measure(side) for side in order}
        for side, value in pair.items():
            seconds[side].append(value)
        ratios.append(pair["distllm"] / pair["bare"])
        print(f"round {number + 1}/{args.rounds}: bare {pair['bare']:.4f}, distllm {pair['distllm']:.4f} CPU-s a step, "
              f"ratio {ratios[-1]:.4f}", flush=True)  # fmt: skip
    record = {
        "what": "CPU-seconds a training step, distllm against a hand-written loop, interleaved",
        "command": " ".join(["python", "docs/benchmarks/overhead.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "versions": {"distllm": distllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "parameters": sum(p.numel() for p in ours_model.parameters()),
        "tokens_per_step": args.micro_batch * args.seq_len * args.accumulation,
        "bare_cpu_s": seconds["bare"], "distllm_cpu_s": seconds["distllm"], "ratios": ratios,
        "ratio_median": statistics.median(ratios), "ratio_of_sums": sum(seconds["distllm"]) / sum(seconds["bare"]),
        "ratio_min": min(ratios), "ratio_max": max(ratios),
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"distllm / bare: median {record['ratio_median']:.4f} (min {min(ratios):.4f}, max {max(ratios):.4f}), "
          f"of the sums {record['ratio_of_sums']:.4f}; the bound is 1.02; record in {args.out}")  # fmt: skip


if __name__ == "__main__":
    main()
