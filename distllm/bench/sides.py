"""The loops that distllm is set beside: one written by hand, and the Trainer of transformers."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distllm.comm import World
from distllm.config.schema import Config
from distllm.data.batch import Batch
from distllm.train.optim import decaying_names

PERIOD = 1000
"""Steps of the cosine that the learning rate follows."""


@dataclass(frozen=True)
class Setting:
    """What every side is given."""

    config: Config
    world: World
    model: nn.Module
    """Its own, on the device."""
    micro: Sequence[Batch]
    """The micro-batches of a step, on the device."""
    folder: Path
    """For files that it wants to write."""


def groups_of(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Parameters that decay, and those that do not, as distllm has them."""
    decays = decaying_names(model, embeddings=config.optim.decay_embeddings)
    named = dict(model.named_parameters())
    return [
        {"params": [p for n, p in named.items() if n in decays], "weight_decay": config.optim.weight_decay},
        {"params": [p for n, p in named.items() if n not in decays], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """The optimizer of the bare loop and of Accelerate's."""
    o = config.optim
    return torch.optim.AdamW(groups_of(model, config), lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def cosine(peak: float, step: int) -> float:
    """A learning rate that changes at every step."""
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step % PERIOD) / PERIOD))


def bare(setting: Setting) -> Callable[[], None]:
    """The loop that one would write by hand, with DistributedDataParallel where there are several ranks."""
    config, world, micro = setting.config, setting.world, setting.micro
    optimizer = adamw(setting.model, config)
    model: Any = setting.model
    if world.size > 1:
        ids = [world.local_rank] if world.device.type == "cuda" else None
        model = DistributedDataParallel(setting.model, device_ids=ids, gradient_as_bucket_view=True)
    half = config.precision.compute == "bf16"
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        for group in optimizer.param_groups:
            group["lr"] = cosine(config.optim.lr, count)
        for number, batch in enumerate(micro):
            last = world.size == 1 or number == len(micro) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                with torch.autocast(world.device.type, torch.bfloat16, enabled=half):
                    logits = model(input_ids=batch.inputs["input_ids"], use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets["labels"].flatten()) / len(micro)
                loss.backward()
        if config.optim.clip:
            torch.nn.utils.clip_grad_norm_(setting.model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def as_a_launcher_says(world: World) -> None:
    """Tell this process, which was forked, by environment what a launcher tells its ranks: Trainer and Accelerate read it."""
    if world.size > 1:
        facts = {
            "RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank, "LOCAL_WORLD_SIZE": world.local_size,
        }  # fmt: skip
        os.environ |= {name: str(value) for name, value in facts.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def hf_trainer(setting: Setting) -> Callable[[int], tuple[float, float]]:
    """The Trainer as one uses it, with its own loader over the same samples in memory.

    Timed from the end of its first step to the end of its last, so that what it does once does not count.
    """
    import transformers

    config, world = setting.config, setting.world
    as_a_launcher_says(world)
    clock = _clock(world.device)
    t, o = config.train, config.optim
    rows = [row for batch in setting.micro for row in batch.inputs["input_ids"].cpu()]
    data = [{"input_ids": row, "labels": row} for row in rows]

    def run(steps: int) -> tuple[float, float]:
        arguments = transformers.TrainingArguments(
            output_dir=str(setting.folder / "trainer"), max_steps=steps + 1, per_device_train_batch_size=t.micro_batch,
            gradient_accumulation_steps=len(setting.micro), learning_rate=o.lr, adam_beta1=o.betas[0], adam_beta2=o.betas[1],
            adam_epsilon=o.eps, weight_decay=o.weight_decay, max_grad_norm=o.clip, optim="adamw_torch_fused",
            lr_scheduler_type="cosine", bf16=config.precision.compute == "bf16", use_cpu=world.device.type == "cpu",
            report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, ddp_find_unused_parameters=False,
            dataloader_pin_memory=world.device.type == "cuda", remove_unused_columns=False,
        )  # fmt: skip
        assert arguments.world_size == world.size
        clock.at.clear()
        repeated: Any = data * (steps + 1) * world.size  # the Trainer deals rows to ranks
        transformers.Trainer(
            model=setting.model, args=arguments, train_dataset=repeated, data_collator=_stack, callbacks=[clock]
        ).train()
        (cpu, wall), (last_cpu, last_wall) = clock.at[0], clock.at[-1]
        assert len(clock.at) == steps + 1
        return last_cpu - cpu, last_wall - wall

    return run


def _stack(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _clock(device: torch.device) -> Any:
    """A callback of the Trainer that notes (CPU-seconds, seconds) at the end of every step."""
    import transformers

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.at: list[tuple[float, float]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.at.append((time.process_time(), time.perf_counter()))

    return Clock()
