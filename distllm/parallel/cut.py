"""Cutting a model into pipeline stages: by the names in its spec, every parameter under its own name.

A stage is the whole module with its own forward; only what belongs to other stages is replaced, by stand-ins without
parameters. All stages run the same forward with the same inputs, so that masks and positions are made by the model's own
code everywhere. What that code makes of a stand-in's output is thrown away: the stand-in of the block before the stage's
first one gives the hidden states that were received, and the stand-in after its last one takes what is sent. So a scaled
embedding, an embedding norm or a cap on the logits happens once, on the stage that it belongs to.

Shapes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distllm.config.errors import ConfigError
from distllm.data.batch import Batch
from distllm.models.spec import ModelSpec


@dataclass(frozen=True)
class Chain:
    """Where a model can be cut: what stands before its blocks, the blocks in order, and what stands after."""

    front: tuple[str, ...]
    """Paths of the modules with parameters that are called before the first block: the embedding, positions, ..."""
    blocks: tuple[str, ...]
    """Paths of the blocks, in the order in which they are called."""
    back: tuple[str, ...]
    """Paths of those called after the last block, and of those never called: norm, head, ..."""
    parts: int
    """0: a block returns the hidden states; n: a tuple of n, of which they are the first."""
    width: int
    """D, the width of the hidden states between two blocks."""
    tied: tuple[str, ...]
    """Parameters that the front and the back share, by their first name."""


@dataclass
class Slot:
    """What a stage is handed and what it hands on."""

    waiting: deque[Batch] = field(default_factory=deque)
    """The micro-batches of the calls to come, in order."""
    finish: Callable[[Any, Batch], torch.Tensor] | None = None
    """The last stage: (outputs, batch) -> what its forward returns, such as the loss."""
    dtype: torch.dtype | None = None
    """What hidden states are sent in; None: as they come."""
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    """What the forward pass runs in, such as autocast."""
    received: torch.Tensor | None = None
    """During a call: hidden states [B, S, D] of the stage before; the first stage ignores them."""
    sent: torch.Tensor | None = None
    """During a call: hidden states [B, S, D] for the stage after."""


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline, on this rank."""

    module: nn.Module
    """Called as `module(hidden)`; takes its inputs from the slot, and returns the hidden states to send, or what
    `slot.finish` makes of the last stage's outputs."""
    index: int
    """Its place in the order of the forward pass."""
    slot: Slot


class Foreign(nn.Module):
    """Stands where another stage's module stands in the whole model: no computation, no parameters but tied ones."""

    def __init__(self, module: nn.Module, slot: Slot, *, role: str, parts: int = 0) -> None:
        """Args:
        module: what it stands for.
        slot: the stage's.
        role: `enter` gives what was received; `leave` keeps what is to be sent; `pass` gives its input on; `rows` stands
            for an embedding, `columns` for a projection: zeros of the right shape.
        parts: as `Chain.parts`, for a block.
        """
        super().__init__()
        self._slot, self._role, self._parts = slot, role, parts
        width = getattr(module, "embedding_dim", None) if role == "rows" else getattr(module, "out_features", None)
        self._width = int(width or 0)
        for name, value in vars(module).items():  # a model's loop may read what kind of block it is
            if isinstance(value, str | bool | int) and not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = first_tensor(args, kwargs)
        like = self._slot.received
        assert like is not None
        if self._role in ("rows", "columns"):
            shape = given.shape if self._role == "rows" else given.shape[:-1]
            return like.new_zeros(*shape, self._width)
        if self._role == "leave":
            self._slot.sent = given
        hidden = like if self._role == "enter" else given
        return (hidden, *[None] * (self._parts - 1)) if self._parts else hidden


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first tensor of a call's arguments: what a block works on."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


def apply_cut(model: nn.Module, *, chain: Chain, blocks: range, index: int, slot: Slot) -> Stage:
    """Make a stage of the whole module: in place, every parameter that stays under its own name.

    Args:
        model: the whole module on meta, tied.
        chain: where it can be cut.
        blocks: the blocks of this stage.
        index: its place; it is the first where the blocks begin at 0, the last where they end with the chain.
        slot: what the stage is handed and hands on.
    """
    first, last = blocks.start == 0, blocks.stop == len(chain.blocks)
    names = {id(p): name for name, p in model.named_parameters()}
    for number, path in enumerate(chain.blocks):
        if number not in blocks:
            role = {blocks.start - 1: "enter", blocks.stop: "leave"}.get(number, "pass")
            _swap(model, path, Foreign(model.get_submodule(path), slot, role=role, parts=chain.parts))
    for path in (*(() if first else chain.front), *(() if last else chain.back)):
        module = model.get_submodule(path)
        stand_in = Foreign(module, slot, role=_role(module))
        if first or last:  # a tied parameter keeps its first name on both stages that use it
            for key, parameter in module._parameters.items():
                if parameter is not None and names[id(parameter)] == f"{path}.{key}" and names[id(parameter)] in chain.tied:
                    stand_in.register_parameter(key, parameter)
        _swap(model, path, stand_in)
    model.forward = _StageForward(model.forward, slot, last=last)
    return Stage(model, index, slot)


class _StageForward:
    """The forward of a stage, in place of the model's own on the instance, so that no wrapper changes a name."""

    def __init__(self, forward: Callable[..., Any], slot: Slot, *, last: bool) -> None:
        self._forward, self._slot, self._last = forward, slot, last

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the next waiting micro-batch; `hidden` [B, S, D] is from the stage before, anything for the first."""
        slot, batch = self._slot, self._slot.waiting.popleft()
        slot.received, slot.sent = hidden, None
        try:
            with slot.context():
                outputs = self._forward(**batch.inputs)
            if self._last:
                assert slot.finish is not None
                return slot.finish(outputs, batch)
            assert slot.sent is not None, "the stand-in after the stage's last block was not called"
            return slot.sent.to(slot.dtype or slot.sent.dtype).contiguous()
        finally:
            slot.received = slot.sent = None


def find_chain(model: nn.Module, *, spec: ModelSpec, pp: int) -> Chain:
    """Find out whether and where a model can be cut, by running it with stand-ins for everything that has parameters.

    Args:
        model: the whole module on meta; it stays as it is.
        spec: names its blocks.
        pp: pipeline ranks, for what is told.

    Raises:
        ConfigError: it is no chain of blocks, in one line that says why.
    """
    refused = f"layout.pp={pp}: {spec.name} cannot be cut into stages: {{}}; nearest: 1"
    if spec.task == "multi_task":
        raise ConfigError([refused.format("its micro-batches go to different heads")])
    if len(spec.blocks) != 1:
        raise ConfigError([refused.format(f"it has {len(spec.blocks)} stacks of blocks, and a pipeline is one chain")])
    if getattr(spec.hf_config, "output_router_logits", False):
        raise ConfigError(
            ["model.sizes.output_router_logits=true: this load-balancing loss needs all blocks on one rank, and layout.pp "
             "spreads them; nearest: false"]
        )  # fmt: skip
    problems: list[str] = []
    for parts in (0, 1, 2, 3):  # what a block returns is found out by trying: blocks themselves are not run
        try:
            return _traced(copy.deepcopy(model), spec, parts)
        except _NotAChain as error:
            problems.append(str(error))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            problems.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    raise ConfigError([refused.format(problems[0])])


class _NotAChain(Exception):
    """Why a traced model is not a chain of blocks."""


def _role(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "rows"
    return "columns" if isinstance(module, nn.Linear) else "pass"


def _traced(model: nn.Module, spec: ModelSpec, parts: int) -> Chain:
    """Run a copy of the model on a few tokens, with stand-ins, and read its order from the calls."""
    (where,) = spec.blocks
    paths = [f"{where}.{name}" for name, _ in model.get_submodule(where).named_children()]
    names = [name for name, _ in model.named_parameters()]
    owners = list(_owners(model, paths))
    tied_by = {path: {id(p) for p in model.get_submodule(path).parameters()} for path in owners}
    first_names = {id(p): name for name, p in model.named_parameters()}
    outside = [n for n in names if not n.startswith((f"{where}.", *(f"{owner}." for owner in owners)))]
    if outside:
        raise _NotAChain(f"its parameter {outside[0]} stands outside of embedding, blocks, norm and head")
    trace = _Trace(parts)
    for path in [*owners, *paths]:
        _swap(model, path, trace.stand_in(model.get_submodule(path), path, is_block=path in paths))
    model.to_empty(device="cpu")  # buffers only; what they hold decides nothing here
    for buffer in model.buffers():
        buffer.zero_()
    model.eval()
    with torch.device("cpu"):
        model(**trace.inputs(model))
    return trace.chain(paths, owners, tied_by, first_names)


def _owners(model: nn.Module, blocks: Sequence[str]) -> Iterator[str]:
    """Outermost modules outside the blocks that hold parameters themselves."""
    inside = tuple(f"{path}." for path in blocks)
    found: list[str] = []
    for name, module in model.named_modules():
        owned = any(parameter is not None for parameter in module._parameters.values())
        if not owned or name in blocks or name.startswith(inside) or name.startswith(tuple(f"{n}." for n in found)):
            continue
        if name == "" or any(path.startswith(f"{name}.") for path in blocks):
            key = next(iter(module._parameters))
            raise _NotAChain(f"its parameter {f'{name}.{key}'.lstrip('.')} stands beside the blocks, not before or after them")
        found.append(name)
        yield name


class _Trace:
    """Records which stand-in was called when, and with what."""

    length = 4

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.calls: list[str] = []
        self.hidden: torch.Tensor | None = None
        self.width = 0

    def inputs(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """A few tokens, and what else the model insists on."""
        tokens = torch.zeros(1, self.length, dtype=torch.int64)
        known = {"attention_mask": tokens + 1, "position_ids": torch.arange(self.length)[None], "token_type_ids": tokens}
        needed = [name for name, p in inspect.signature(model.forward).parameters.items() if p.default is p.empty]
        return {"input_ids": tokens} | {name: value for name, value in known.items() if name in needed}

    def stand_in(self, module: nn.Module, path: str, *, is_block: bool) -> nn.Module:
        # A tensor that depends on a parameter is told by requires_grad.
        slot = Slot(received=torch.zeros(1, self.length, 1))
        role = "pass" if is_block else _role(module)
        stand_in = Foreign(module, slot, role=role, parts=self.parts if is_block else 0)
        if is_block:
            stand_in.register_forward_pre_hook(lambda _, args, kwargs: self._block(path, args, kwargs), with_kwargs=True)
        else:
            stand_in.register_forward_pre_hook(lambda _, args: self.calls.append(path))
            stand_in.register_forward_hook(lambda _, args, output: output + torch.zeros(1, requires_grad=True))
        return stand_in

    def _block(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check what a block is given, and let it be something new, so that the next one can be known by it."""
        given = first_tensor(args, kwargs)
        if given is None or given.dim() != 3 or given.shape[:2] != (1, self.length):
            shape = None if given is None else list(given.shape)
            raise _NotAChain(f"{path} is not given hidden states [B, S, D] first, but {shape}")
        if self.hidden is not None and given is not self.hidden:
            raise _NotAChain(f"{path} is not given what the block before it returned")
        for key, value in [*enumerate(args), *kwargs.items()]:
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor is not given and tensor.requires_grad:
                    raise _NotAChain(f"{path} is also given something computed from parameters before it (argument {key})")
        self.calls.append(path)
        self.hidden, self.width = given.clone(), given.shape[-1]
        swap = lambda value: self.hidden if value is given else value  # noqa: E731
        return tuple(map(swap, args)), {key: swap(value) for key, value in kwargs.items()}

    def chain(
        self, paths: list[str], owners: list[str], tied_by: dict[str, set[int]], first_names: dict[int, str]
    ) -> Chain:
        blocks = [path for path in self.calls if path in paths]
        if blocks != paths:
            raise _NotAChain(f"its {len(paths)} blocks are not called one after another, each once")
        begin, end = self.calls.index(blocks[0]), len(self.calls) - self.calls[::-1].index(blocks[-1])
        amid = [path for path in self.calls[begin:end] if path not in paths]
        if amid:
            raise _NotAChain(f"{amid[0]} is called between blocks")
        front = tuple(path for path in owners if path in self.calls[:begin])
        back = tuple(path for path in owners if path not in front)
        both = [path for path in front if path in self.calls[end:]]
        if both:
            raise _NotAChain(f"{both[0]} is called before the blocks and after them")
        shared = {i for path in front for i in tied_by[path]} & {i for path in back for i in tied_by[path]}
        tied = tuple(name for i, name in first_names.items() if i in shared)
        return Chain(front, tuple(blocks), back, self.parts, self.width, tied)


def _swap(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
