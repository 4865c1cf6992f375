"""CPU-seconds of a distllm step against a hand-written loop, for classification and translation.

    python docs/benchmarks/overhead_tasks.py --data data

Both sides run in one process, in turns, from equal weights, on the same examples with the same fused AdamW and clipping. The
hand-written side has its token ids in lists and pads them step by step; the distllm side is its loader (whose thread's CPU
time counts), the engine's step, the meter and the signal agreement. The figure is process CPU time.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import distllm
from distllm.comm import Agreement, World
from distllm.config.check import resolve_layout
from distllm.config.schema import Config
from distllm.data.loader import Step, open_samples, step_batches
from distllm.data.prepare import prepare
from distllm.data.tokenizer import roles_of
from distllm.models.build import resolve_spec
from distllm.parallel.mesh import AXES, build_mesh
from distllm.track.meter import Meter
from distllm.train.build_native import build_engine
from distllm.train.folder import read_tokenizer
from distllm.train.host import keep_memory
from distllm.train.optim import decaying_names
from distllm.train.tasks import make_task, outputs_of

IGNORED = -100


def config_of(task: str, data: Path, store: str) -> Config:
    """A model of the size of the shipped configs."""
    bert = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    marian = {
        "d_model": 256, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 512, "decoder_ffn_dim": 512,
    }  # fmt: skip
    table = {"kind": "tsv", "path": f"{data}/sst2/train.tsv", "names": ["text", "label"]}
    pairs = {"kind": "parallel", "path": f"{data}/multi30k/train.de", "target_path": f"{data}/multi30k/train.en"}
    classifies = task == "classification"
    return Config.model_validate({
        "task": {"kind": task},
        "model": {"type": "bert" if classifies else "marian", "sizes": bert if classifies else marian, "dropout": 0.0},
        "data": {"sources": [table if classifies else pairs], "tokenizer": {"vocab_size": 4000}, "seq_len": 128, "store": store},
        "train": {"micro_batch": 32, "steps": 1000, "eval_every": 0}, "optim": {"lr": 1e-4}, "schedule": {"warmup": 0},
    })  # fmt: skip


def lists(step: Step) -> list[dict[str, list[list[int]]]]:
    """The token ids and labels of a step without padding, as a hand-written loop would keep them."""
    kept = []
    for batch in step.microbatches:
        one: dict[str, list[list[int]]] = {}
        for name, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            if name in batch.inputs:
                rows = zip(batch.inputs[name], batch.inputs[mask], strict=True)
                one[name] = [row[seen.bool()].tolist() for row, seen in rows]
        labels = batch.targets["labels"]
        one["labels"] = [[x for x in row if x != IGNORED] for row in labels.reshape(len(labels), -1).tolist()]
        kept.append(one)
    return kept


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    """Rows of one length, int64 [B, longest]."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def bare_loop(model: torch.nn.Module, config: Config, pad: int) -> Callable[[list[dict[str, list[list[int]]]]], None]:
    """The loop that one would write by hand."""
    decays, named, o = decaying_names(model, embeddings=False), dict(model.named_parameters()), config.optim
    groups = [
        {"params": [p for n, p in named.items() if n in decays], "weight_decay": o.weight_decay},
        {"params": [p for n, p in named.items() if n not in decays], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)
    model.train()

    def step(batches: list[dict[str, list[list[int]]]]) -> None:
        for rows in batches:
            ids = padded(rows["input_ids"], pad)
            inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < _lengths(rows["input_ids"])).long()}
            if "decoder_input_ids" in rows:
                inputs["decoder_input_ids"] = padded(rows["decoder_input_ids"], pad)
                seen = torch.arange(inputs["decoder_input_ids"].shape[1]) < _lengths(rows["decoder_input_ids"])
                inputs["decoder_attention_mask"] = seen.long()
            labels = padded(rows["labels"], IGNORED)
            logits = model(**inputs).logits
            F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels.flatten(), ignore_index=IGNORED).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _lengths(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([len(row) for row in rows])[:, None]


def compare(task: str, data: Path, store: str, *, rounds: int, steps: int) -> dict[str, Any]:
    """Time both sides in turns."""
    config = config_of(task, data, store)
    prepared = prepare(config)
    tokenizer, world = read_tokenizer(prepared.tokenizer_folder), World(0, 1, 0, 1, torch.device("cpu"))
    roles = roles_of(tokenizer)
    spec = resolve_spec(config, vocab_size=prepared.vocab_size, labels=outputs_of(prepared.labels), roles=roles)
    samples = open_samples(
        prepared, config, resolved=resolve_layout(config, 1), tokenizer=tokenizer, decoder_start=spec.decoder_start,
        token_types=spec.token_types,
    )  # fmt: skip
    engine = build_engine(config, world, mesh=build_mesh(world, sizes=dict.fromkeys(AXES, 1)), spec=spec, task=make_task(config))
    bare = bare_loop(copy.deepcopy(engine.parallel.model), config, roles.pad or 0)
    meter, agreement = Meter(flops_per_token=None, peak=None, devices=1), Agreement(world, flags=3)

    def stream() -> Any:
        return step_batches(samples, start=0, dp_rank=0, dp_size=1, prefetch=16, pin=False)

    every = (rounds + 1) * steps
    source = stream()
    kept = [lists(step) for step in islice(source, every)]
    source.close()
    ours, at = stream(), 0
    seconds: dict[str, list[float]] = {"bare": [], "distllm": []}
    for number in range(rounds + 1):
        for side in ("bare", "distllm") if number % 2 == 0 else ("distllm", "bare"):
            begin = time.process_time()
            for i in range(steps):
                if side == "bare":
                    bare(kept[at + i])
                else:
                    with meter.waiting():
                        step = next(ours)
                    engine.train_step(step.microbatches, samples=step.samples)
                    meter.step(step.tokens)
                    agreement.exchange([False, False, False])
            if number:  # the first round warms up
                seconds[side].append((time.process_time() - begin) / steps)
        at += steps
    ours.close()
    ratios = [a / b for a, b in zip(seconds["distllm"], seconds["bare"], strict=True)]
    return {
        "task": task, "parameters": sum(p.numel() for p in engine.parallel.model.parameters()), **seconds, "ratios": ratios,
        "ratio_median": statistics.median(ratios), "ratio_of_sums": sum(seconds["distllm"]) / sum(seconds["bare"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds sst2/ and multi30k/")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as store:
        results = [
            compare(task, args.data, store, rounds=args.rounds, steps=args.steps) for task in ("classification", "seq2seq")
        ]
    record = {
        "what": "CPU-seconds a training step, distllm with its loader against a hand-written loop, interleaved",
        "command": f"python docs/benchmarks/overhead_tasks.py --data data --rounds {args.rounds} --steps {args.steps}",
        "date": date.today().isoformat(),
        "versions": {"distllm": distllm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "threads": 1}, "results": results,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for result in results:
        told = f"of the sums {result['ratio_of_sums']:.4f}; the bound is 1.03"
        print(f"{result['task']}: median {result['ratio_median']:.4f}, {told}")


if __name__ == "__main__":
    main()
