"""A loop with Accelerate, as its documentation shows it. The one file of this room that imports it."""

from __future__ import annotations

from collections.abc import Callable

import accelerate
import torch.nn.functional as F

from distllm.bench.sides import Setting, adamw, as_a_launcher_says, cosine


def accelerated(setting: Setting) -> Callable[[], None]:
    """One step under `Accelerator.accumulate`."""
    config, micro = setting.config, setting.micro
    as_a_launcher_says(setting.world)
    accelerator = accelerate.Accelerator(
        cpu=setting.world.device.type == "cpu", mixed_precision="bf16" if config.precision.compute == "bf16" else "no",
        gradient_accumulation_steps=len(micro),
    )  # fmt: skip
    assert accelerator.num_processes == setting.world.size
    model, optimizer = accelerator.prepare(setting.model, adamw(setting.model, config))
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        for group in optimizer.param_groups:
            group["lr"] = cosine(config.optim.lr, count)
        for batch in micro:
            with accelerator.accumulate(model):
                logits = model(input_ids=batch.inputs["input_ids"], use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets["labels"].flatten())
                accelerator.backward(loss)
                if accelerator.sync_gradients and config.optim.clip:
                    accelerator.clip_grad_norm_(model.parameters(), config.optim.clip)
                optimizer.step()
                optimizer.zero_grad()

    return step
