"""ModelSpec: how a model describes itself, in names, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModelSpec:
    """What the layers above know of a model; adding a model adds no parallel code.

    Names are module paths as in `named_modules()`: `model.layers` is the ModuleList whose children are the blocks.
    """

    name: str
    """What to call it in logs, such as its `model_type`."""
    build: Callable[[], nn.Module]
    """Makes the module, fp32, tied weights tied; legal under `torch.device("meta")`.

    Its forward is called with `**batch.inputs` and returns logits ([B, S, V] of tokens, [B, C] of classes) or an object
    with `.logits`.
    """
    init: Callable[[nn.Module], None]
    """Initialises the parameters and buffers that one module owns itself.

    It is called on every module, children before parents, as in `Module.apply`.
    """
    blocks: tuple[str, ...]
    """The paths of the lists of equal blocks: ("model.layers",). A block is the unit of sharding, checkpointing and compiling."""
    embedding: str | None = None
    """The path of the token embedding."""
    norm: str | None = None
    """The path of the norm after the last block."""
    head: str | None = None
    """The path of the output projection."""
    tp_plan: Mapping[str, str] = field(default_factory=dict)
    """Module pattern to style in transformers' words: {"model.layers.*.self_attn.q_proj": "colwise"}; see docs/tensor.md."""
    ep_plan: Mapping[str, str] = field(default_factory=dict)
    """Where experts are, in the same words: {"model.layers.*.mlp.experts": "ep_dispatch_experts"}; none in a dense model."""
    vocab_size: int | None = None
    """Rows of the embedding: token ids must be below it."""
    max_seq_len: int | None = None
    """The longest sample that the positions allow; None: any."""
    flops_per_token: Callable[[int], float] | None = None
    """Model FLOPs of one token's forward and backward pass, given the sequence length; None: not known, so no MFU."""
    weights: Path | None = None
    """A folder with safetensors to start from; `init` makes what the task adds to them."""
    lenient: bool = False
    """Whether any tensor may be missing in `weights` or left over; otherwise only those of the head may."""
    hf_config: Any = None
    """The transformers config, for export; None for a module of the user's own."""
    task: str = ""
    """The task.kind that it was built for."""
    base: str | None = None
    """The path of the body: parameters outside it are the head. None: all but `head` is body."""
    decoder_start: int | None = None
    """For an encoder-decoder, the id that the decoder's input begins with."""
    pad_id: int | None = None
    """The id that fills rows up; its row of the embedding may be frozen."""
    token_types: bool = False
    """Whether forward takes `token_type_ids` [B, S], 1 at the second text of a pair."""


def in_head(spec: ModelSpec, name: str) -> bool:
    """Whether a parameter belongs to what a task adds to a body, by its full name."""
    if spec.base is not None:
        return not name.startswith(f"{spec.base}.")
    return spec.head is not None and name.startswith(f"{spec.head}.")
