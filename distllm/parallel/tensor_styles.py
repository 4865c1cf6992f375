"""The styles of a tensor-parallel plan, one function each: how a layer's parameters are cut, and what its forward becomes.

The words are those of transformers' plans, and three of ours: `qkv_colwise` (a projection to queries, keys and values one
after the other, as GPT-2's), `heads_embedding` (an embedding with a number for each head, as T5's position bias), and
`colwise_logits`, as transformers' `colwise_gather_output` of the head.

Shapes: B batch, S sequence, D inputs, F outputs, V vocabulary, T ranks, E experts, N tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from distllm.parallel.collectives import (
    copy_all_to,
    copy_to,
    gather_from,
    gathered,
    reduce_from,
    reduce_scatter_to,
    scatter_to,
)
from distllm.parallel.tensor_heads import Heads, own_key_head
from distllm.parallel.tensor_params import (
    TensorRanks,
    is_cut,
    local,
    piece_range,
    replace_forward,
    standing_in,
    weight_of,
)

SEQUENCE = 1
"""The dim of the sequence in hidden states [B, S, D]."""


class Entrance:
    """The hidden states as the column-parallel layers of one module read them.

    Queries, keys and values read the same tensor: its gradient is added over the ranks once for all of them. Where
    residuals are cut, the module that they are in has been given whole sequences (tensor.py), which does the same.
    """

    def __init__(self, ranks: TensorRanks) -> None:
        self._ranks = ranks
        self._seen: torch.Tensor | None = None
        self._given: torch.Tensor | None = None

    @torch.compiler.disable
    def __call__(self, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """[B, S, D], the same values."""
        if self._ranks.follows_sequence(module):
            return x
        if self._seen is not x or self._given is None:
            self._seen, self._given = x, copy_to(x, self._ranks.group)
        return self._given

    def forget(self) -> None:
        """Let go of the tensors."""
        self._seen = self._given = None


@dataclass(frozen=True)
class Site:
    """A layer that a plan names."""

    name: str
    """Its full name, for messages."""
    module: nn.Module
    heads: Heads | None
    """Of the attention module that it is in."""
    entrance: Entrance
    """Shared with the other layers of the module that it is in."""


Style = Callable[[TensorRanks, Site], None]


def colwise(ranks: TensorRanks, site: Site, *, parts: int = 1) -> None:
    """A linear layer whose outputs are cut: [B, S, D] -> [B, S, F/T]."""
    module = site.module
    if site.heads is not None and site.heads.shared_key(ranks.size) and _is_key_projection(module, site.heads):
        return _shared_key_projection(ranks, site)
    _cut_outputs(ranks, module, parts=parts)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = _linear(module, site.entrance(x, module))
        ranks.begin_own_part(module)
        return y

    replace_forward(module, forward)


def colwise_gather_output(ranks: TensorRanks, site: Site) -> None:
    """The same with the outputs put together again: [B, S, D] -> [B, S, F], for what cannot work with a part of them."""
    module, width = site.module, output_width(site.module)
    _cut_outputs(ranks, module)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return _gather_uneven(_linear(module, site.entrance(x, module)), ranks, width)

    replace_forward(module, forward)


class LogitsForward:
    """The forward of a head whose outputs, the vocabulary, are cut: [B, S, D] -> [B, S, V].

    With loss parallel the logits stay where they are, a DTensor cut along V, which the objectives know. `whole` gathers
    them all the same, as writing text wants them.
    """

    def __init__(self, ranks: TensorRanks, site: Site) -> None:
        self.ranks, self.module = ranks, site.module
        self.width = output_width(site.module)
        self.whole = not ranks.loss_parallel

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        part = _linear(self.module, copy_to(x, self.ranks.group))
        if self.whole:
            return _gather_uneven(part, self.ranks, self.width)
        return as_logits(part, self.ranks, self.width)


def colwise_logits(ranks: TensorRanks, site: Site) -> None:
    """The head of a language model; the residuals are whole again when it is called."""
    _cut_outputs(ranks, site.module)
    replace_forward(site.module, LogitsForward(ranks, site))


@torch.compiler.disable
def as_logits(part: torch.Tensor, ranks: TensorRanks, width: int) -> torch.Tensor:
    """This rank's logits [..., V/T] as a DTensor [..., V]."""
    shape = (*part.shape[:-1], width)
    stride = torch.empty(shape, device="meta").stride()
    logits: torch.Tensor = DTensor.from_local(
        part, ranks.mesh, [Shard(part.dim() - 1)], run_check=False, shape=torch.Size(shape), stride=stride
    )
    return logits


def rowwise(ranks: TensorRanks, site: Site, *, split_input: bool = False) -> None:
    """A linear layer whose inputs are cut: [B, S, F/T] -> [B, S, D], or [B, S/T, D] where residuals are cut.

    Each rank has a part of every sum over the inputs; they are added, and the bias once after that.
    """
    module = site.module
    ranks.cut(module, "weight", dim=0 if _is_conv1d(module) else 1)
    width = module._parameters["weight"].shape[0 if _is_conv1d(module) else 1]  # type: ignore[union-attr]
    first, last = piece_range(width, pieces=ranks.size, index=ranks.rank)

    def forward(x: torch.Tensor) -> torch.Tensor:
        ranks.end_own_part(module)
        if split_input:
            x = _own_features(x, ranks, first, last)
        y = _product(x, module)
        sequence = ranks.follows_sequence(module)
        y = reduce_scatter_to(y, ranks.group, dim=SEQUENCE) if sequence else reduce_from(y, ranks.group)
        bias = module._parameters.get("bias")
        return y if bias is None else y + bias.to(y.dtype)

    replace_forward(module, forward)


def embedding_rowwise(ranks: TensorRanks, site: Site) -> None:
    """An embedding whose rows, the vocabulary, are cut: ids [B, S] -> [B, S, D].

    A rank looks up the ids that it has and gives zeros for the others; the sum over the ranks has every row once.
    """
    module = site.module
    assert isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq
    rows = module.num_embeddings
    ranks.cut(module, "weight", dim=0)
    first, last = piece_range(rows, pieces=ranks.size, index=ranks.rank)
    pad = module.padding_idx
    # An index of no row of this rank's would be refused; the padding's row has no gradient where it is.
    module.padding_idx = pad - first if pad is not None and first <= pad < last else None
    lookup = module.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        other = (ids < first) | (ids >= last)
        with standing_in([(module, "weight")], [weight_of(module)]):  # some families' lookup also scales
            found = lookup((ids - first).masked_fill(other, 0))
        return reduce_from(found.masked_fill(other[..., None], 0), ranks.group)

    replace_forward(module, forward)


def heads_embedding(ranks: TensorRanks, site: Site) -> None:
    """An embedding of one number for each head, which are cut: ids [...] -> [..., H/T]."""
    module = site.module
    assert isinstance(module, nn.Embedding)
    ranks.cut(module, "weight", dim=1)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, weight_of(module))

    replace_forward(module, forward)


def of_each_head(ranks: TensorRanks, site: Site) -> None:
    """A norm of queries or keys: whole on every rank, but each sees its own heads, so gradients are added."""
    ranks.partial.extend((site.module, key) for key in site.module._parameters)


def experts(ranks: TensorRanks, site: Site) -> None:
    """The experts of a mixture, each cut inside: [N, D], chosen experts [N, k], their weights [N, k] -> [N, D].

    Every rank has a part of every expert and so of every sum; which expert reads which token is the same on all ranks.
    """
    module = site.module
    original = module.forward
    keys = [key for key, parameter in module._parameters.items() if parameter is not None]

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        sequence = ranks.follows_sequence(module)
        if sequence:  # tokens of all ranks, in the order of the ranks; they go back in the same order
            hidden, weights = gather_from(hidden, ranks.group, dim=0), gather_from(weights, ranks.group, dim=0)
            chosen = gathered(chosen, ranks.group, dim=0)
        else:
            hidden, weights = copy_all_to((hidden, weights), ranks.group)
        slots = [(module, key) for key in keys if is_cut(module._parameters[key])]
        with standing_in(slots, [weight_of(module, key) for _, key in slots]):
            y = original(hidden, chosen, weights)
        return reduce_scatter_to(y, ranks.group, dim=0) if sequence else reduce_from(y, ranks.group)

    replace_forward(module, forward)


def replicated(ranks: TensorRanks, site: Site) -> None:
    """Whole on every rank, with the same inputs and so the same gradients: nothing to do."""


STYLES: dict[str, Style] = {
    "colwise": colwise,
    "rowwise": rowwise,
    "colwise_gather_output": colwise_gather_output,
    "colwise_rep": colwise_gather_output,
    "colwise_logits": colwise_logits,
    "rowwise_split_input": partial(rowwise, split_input=True),
    "rowwise_rep": partial(rowwise, split_input=True),
    "packed_colwise": partial(colwise, parts=2),
    "qkv_colwise": partial(colwise, parts=3),
    "embedding_rowwise": embedding_rowwise,
    "heads_embedding": heads_embedding,
    "replicated_with_grad_allreduce": of_each_head,
    "moe_tp_experts": experts,
    "sequence_parallel": replicated,  # norms follow the residuals, cut or whole, without being told
    "replicate": replicated,
}
"""Style of a module -> what does it."""

COLWISE = ("colwise", "packed_colwise", "qkv_colwise", "colwise_gather_output", "colwise_rep")
"""Styles of layers that read whole hidden states."""

PARAMETER_STYLES: dict[str, tuple[int, int]] = {
    "colwise": (-2, 1), "rowwise": (-1, 1), "packed_colwise": (-2, 2), "packed_rowwise": (-1, 2)
}  # fmt: skip
"""Style of a bare parameter, such as experts' [E, F, D] -> the dim that is cut, and of how many equal parts it is made."""


def fits(module: nn.Module, style: str) -> bool:
    """Whether a layer is of the kind that a style is for."""
    if "embedding" in style:
        return isinstance(module, nn.Embedding)
    if "colwise" in style or "rowwise" in style:
        return isinstance(module, nn.Linear) or _is_conv1d(module)
    return True


def parts_of(style: str) -> int:
    """Of how many equal matrices a layer of this style is made."""
    return {"packed_colwise": 2, "packed_rowwise": 2, "qkv_colwise": 3}.get(style, 1)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer, whose weight is [D, F]."""
    return type(module).__name__ == "Conv1D"


def output_width(module: nn.Module) -> int:
    """The outputs of a linear layer, whole, also when they are cut."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.shape[1 if _is_conv1d(module) else 0]


def _cut_outputs(ranks: TensorRanks, module: nn.Module, *, parts: int = 1) -> None:
    ranks.cut(module, "weight", dim=1 if _is_conv1d(module) else 0, parts=parts)
    ranks.cut(module, "bias", dim=0, parts=parts)


def _product(x: torch.Tensor, module: nn.Module, bias: torch.Tensor | None = None) -> torch.Tensor:
    weight = weight_of(module)
    return F.linear(x, weight.t() if _is_conv1d(module) else weight, bias)


def _linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _product(x, module, local(module._parameters.get("bias")))


def _is_key_projection(module: nn.Module, heads: Heads) -> bool:
    """Whether a layer projects to keys or values of fewer heads than the queries have."""
    return heads.dim is not None and heads.key < heads.query and output_width(module) == heads.key * heads.dim


def _shared_key_projection(ranks: TensorRanks, site: Site) -> None:
    """A projection to fewer key heads than ranks: whole on every rank, of which each computes the head that it needs."""
    module, heads = site.module, site.heads
    assert heads is not None and heads.dim is not None
    first = own_key_head(heads, size=ranks.size, rank=ranks.rank) * heads.dim
    own = slice(first, first + heads.dim)
    ranks.partial.extend((module, key) for key, parameter in module._parameters.items() if parameter is not None)

    def forward(x: torch.Tensor) -> torch.Tensor:
        bias = module._parameters.get("bias")
        return F.linear(site.entrance(x, module), weight_of(module)[own], None if bias is None else bias[own])

    replace_forward(module, forward)


def _gather_uneven(part: torch.Tensor, ranks: TensorRanks, width: int) -> torch.Tensor:
    """[..., F/T] -> [..., F], where the last ranks may have less; all ranks do the same with the result."""
    step = -(-width // ranks.size)
    padded = F.pad(part, (0, step - part.shape[-1])) if part.shape[-1] < step else part
    return gather_from(padded, ranks.group, dim=-1, partial=False)[..., :width]


def _own_features(x: torch.Tensor, ranks: TensorRanks, first: int, last: int) -> torch.Tensor:
    """[..., F] -> this rank's [..., F/T]."""
    step = -(-x.shape[-1] // ranks.size)
    padded = F.pad(x, (0, step * ranks.size - x.shape[-1]))
    return scatter_to(padded, ranks.group, dim=-1)[..., : last - first]
