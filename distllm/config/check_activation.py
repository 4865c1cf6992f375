"""What activation checkpointing cannot be together with."""

from __future__ import annotations

from collections.abc import Iterator

from distllm.config.kinds import shown
from distllm.config.schema import ActivationConfig, Config


def activation_problems(config: Config) -> Iterator[str]:
    """What is wrong with the `activation` section."""
    activation, usual = config.activation, ActivationConfig()
    if activation.keep != usual.keep and activation.mode != "selective":
        keep = shown(activation.keep)
        yield f"activation.keep={keep}: is for mode selective, not {activation.mode}; nearest: activation.mode=selective"
    if not activation.keep and activation.mode == "selective":
        yield "activation.keep=[]: selective needs at least one operator to keep; nearest: activation.mode=full"
    if activation.offload and activation.mode == "selective":
        # torch holds the results that it keeps by a way of its own, which no hook sees.
        yield "activation.offload=true: what mode selective keeps stays on the device; nearest: activation.mode=full"
    if activation.offload and config.device == "cpu":
        yield "activation.offload=true: moves activations from a GPU, and device is cpu; nearest: false"
    if activation.offload and config.train.compile:
        yield "activation.offload=true: not with train.compile, which decides itself what is saved; nearest: train.compile=false"
