"""What tensor, context and expert parallelism send: each axis from its own source's formula.

Symbols: B rows, S tokens, D hidden, V vocabulary, L blocks, e bytes; T, c, P ranks of tp, cp and ep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from distllm.parallel.tensor import planned
from distllm.parallel.tensor_check import can_cut_sequence
from distllm.parallel.tensor_heads import heads_of
from distllm.parallel.tensor_styles import COLWISE, output_width
from distllm.verify.ledger import Ledger, Step
from distllm.verify.local_shapes import Part, tp_dim
from distllm.verify.trial import Micro

ENCODERS = ("encoder_attn", "EncDecAttention")
"""Attention of a decoder over the encoder's states."""


def tensor_parallel(step: Step, ledger: Ledger, part: Part) -> None:
    """4 all-reduces of B S D e a block and micro-batch; with sequence parallel 4 all-gathers and 4 reduce-scatters.

    Beside them: the embedding's lookup and the head's input, one all-reduce each, and 4 numbers of each place for the
    loss; with sequence parallel the gradients of the block's norms, together; and where residuals begin and end to be cut, in
    each stage, one all-gather each. Sources: Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, arXiv 2205.05198.
    """
    if step.sizes["tp"] == 1:
        return
    group = ("tp", step.sizes["tp"])
    found, _ = planned(step.model, step.spec.tp_plan)
    cut = step.config.layout.sequence_parallel and can_cut_sequence(step.model, spec=step.spec)
    for micro in step.micro:
        for path, block in zip(part.paths, part.blocks, strict=True):
            for kind, numbers in _block(step, path, found, micro, sequence=cut):
                ledger.ring(group, kind, numbers * step.compute_bytes)
            together = _whole_gradients(step, path, block, found, sequence=cut)
            if together:
                ledger.ring(group, "all_reduce", together * step.compute_bytes)
        width = _width(step.model)
        hidden = micro.rows * _held(step, micro.tokens) * width * step.compute_bytes
        if cut:  # between stages residuals are whole: before the last block ends, and backward of taking one's own tokens
            ledger.ring(group, "all_gather", hidden, calls=2)
        if part.first and "embedding_rowwise" in found.values():
            ledger.ring(group, "all_reduce", hidden)
            if len(step.spec.blocks) > 1:  # the decoder's tokens
                ledger.ring(group, "all_reduce", micro.rows * micro.outputs * width * step.compute_bytes)
        if part.last and step.spec.head in found:
            _head(step, ledger, micro, group)


def _head(step: Step, ledger: Ledger, micro: Micro, group: tuple[str, int]) -> None:
    """The gradient of the head's input, and the loss of cut logits or the logits themselves."""
    places = micro.rows * _held(step, micro.outputs)
    ledger.ring(group, "all_reduce", places * _width(step.model) * step.compute_bytes)
    if not step.config.layout.loss_parallel:
        head = step.model.get_submodule(str(step.spec.head))
        width = -(-output_width(head) // group[1]) * group[1]
        ledger.ring(group, "all_gather", places * width * step.compute_bytes)
        return
    if step.config.task.kind in ("masked_lm", "translation_lm"):
        places = micro.targets
    for numbers in (1, 3):  # the largest logit; sum of exp, the label's logit, sum
        ledger.ring(group, "all_reduce", numbers * places * step.master_bytes)


def _block(
    step: Step, path: str, found: Mapping[str, str], micro: Micro, *, sequence: bool
) -> Iterator[tuple[str, int]]:
    """(kind, numbers of the whole) of each collective of one block's forward and backward pass."""
    owners: dict[str, list[str]] = {}
    for name, style in found.items():
        if not name.startswith(f"{path}."):
            continue
        try:
            module = step.model.get_submodule(name)
        except AttributeError:  # a bare parameter
            continue
        rows = micro.rows * _held(step, _tokens(step, name, micro))
        if style in COLWISE:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        elif style in ("rowwise", "rowwise_rep", "rowwise_split_input"):
            yield from _there_and_back(rows * _output(module), sequence=sequence)
        elif style == "moe_tp_experts":
            yield from _experts(step, rows, sequence=sequence)
    for owner, names in owners.items():
        widths = {_input(step.model.get_submodule(name)) for name in names}
        rows = micro.rows * _held(step, _tokens(step, owner, micro))
        if sequence:
            yield "all_gather", rows * max(widths)
            yield "reduce_scatter", rows * max(widths)
            continue
        yield "all_reduce", rows * max(widths)
        if any(word in owner for word in ENCODERS):  # keys and values read the encoder's states
            yield "all_reduce", micro.rows * micro.tokens * max(widths)


def _there_and_back(numbers: int, *, sequence: bool) -> Iterator[tuple[str, int]]:
    """A sum of the ranks' parts: all-reduced forward, or scattered forward and gathered backward."""
    if sequence:
        yield "reduce_scatter", numbers
        yield "all_gather", numbers
    else:
        yield "all_reduce", numbers


def _experts(step: Step, rows: int, *, sequence: bool) -> Iterator[tuple[str, int]]:
    """Experts cut inside: tokens, their weights, and, where residuals are cut, which experts they chose."""
    width, choices = _width(step.model), step.spec.hf_config.num_experts_per_tok
    if not sequence:
        yield "all_reduce", rows * width
        yield "all_reduce", rows * (width + choices)
        return
    for numbers in (rows * width, rows * choices):
        yield "all_gather", numbers
        yield "reduce_scatter", numbers
    yield "all_gather", rows * choices * 8 // step.compute_bytes  # int64
    yield from _there_and_back(rows * width, sequence=True)


def _whole_gradients(
    step: Step, path: str, block: Mapping[str, nn.Parameter], found: Mapping[str, str], *, sequence: bool
) -> int:
    """Numbers of the block's whole parameters of whose gradients each rank makes a part."""
    total = 0
    for name, parameter in block.items():
        if not parameter.requires_grad or tp_dim(step, name, parameter) is not None:
            continue
        style = found.get(name.rpartition(".")[0], "")
        shared = style in COLWISE  # a projection to fewer key heads than ranks stays whole
        if sequence or shared or style == "replicated_with_grad_allreduce":
            total += parameter.numel()
    return total


def _held(step: Step, tokens: int) -> int:
    """The tokens of a row that a context-parallel rank holds."""
    return tokens // step.sizes["cp"]


def _tokens(step: Step, name: str, micro: Micro) -> int:
    """The tokens of a row that a module sees: those of the decoder in the second list of blocks."""
    decoder = len(step.spec.blocks) > 1 and name.startswith(f"{step.spec.blocks[-1]}.")
    return micro.outputs if decoder else micro.tokens


def _output(module: nn.Module) -> int:
    return output_width(module)


def _input(module: nn.Module) -> int:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.shape[0 if type(module).__name__ == "Conv1D" else 1]


def _width(model: nn.Module) -> int:
    """D, the width of the embedding."""
    config = getattr(model, "config", None)
    if config is not None:
        return int(config.hidden_size)
    return next(m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding))


@dataclass(frozen=True)
class _Attention:
    query: int
    key: int
    width: int


def context_parallel(step: Step, ledger: Ledger, part: Part) -> None:
    """Of each block and micro-batch, M = S / c tokens of a rank, H and K heads of a width of its own:

    - ring: 3 (c-1) sends of 2 B K M: keys and values forward and again backward, and their gradients home
      (Liu et al. 2023, arXiv 2310.01889);
    - all_gather: keys and values gathered forward, their gradients scattered backward, 2 B K S each;
    - ulysses: 2 all-to-alls forward and 2 backward: (H + 2 K) B M there and H B M back, of which 1/c stays
      (Jacobs et al. 2023, arXiv 2309.14509).
    """
    ranks = step.sizes["cp"]
    if ranks == 1:
        return
    heads = _heads(step)
    method = step.config.layout.cp_method
    for micro in step.micro:
        for _ in part.blocks:
            held = micro.rows * (micro.tokens // ranks) * heads.width * step.compute_bytes
            if method == "ring":
                ledger.direct("cp", "send", 2 * heads.key * held, calls=3 * (ranks - 1))
            elif method == "all_gather":
                for kind in ("all_gather", "reduce_scatter"):
                    ledger.ring(("cp", ranks), kind, 2 * heads.key * held * ranks)
            else:
                key = heads.key
                while key % ranks:  # repeated until they divide
                    key += heads.key
                for numbers in (heads.query + 2 * key, heads.query):
                    ledger.direct("cp", "all_to_all", numbers * held * (ranks - 1) // ranks, calls=2)


def _heads(step: Step) -> _Attention:
    """The attention heads of one tensor-parallel rank; of a module of the user's own, by the names that tp knows."""
    config, tp = step.spec.hf_config, step.sizes["tp"]
    if config is None:
        heads = next(h for h in map(heads_of, step.model.modules()) if h is not None and h.dim is not None)
        return _Attention(heads.query // tp, max(heads.key // tp, 1), int(heads.dim or 0))
    query = config.num_attention_heads
    key = getattr(config, "num_key_value_heads", None) or query
    width = getattr(config, "head_dim", None) or config.hidden_size // query
    return _Attention(query // tp, max(key // tp, 1), width)


def expert_parallel(step: Step, ledger: Ledger) -> None:
    """For each layer and micro-batch: 8 E bytes of counts, and rows of H e to their experts, back, and both ways again.

    How many rows leave this rank is what its routers chose; how many it sends back is what the others' chose of its experts.
    """
    ranks, place = step.sizes["ep"], step.place["ep"]
    if ranks == 1:
        return
    peers = [report for report in step.everyone if _beside(step.place, report.place)]
    for number, micro in enumerate(step.micro):
        for layer, rows in enumerate(micro.routed):
            own = len(rows) // ranks
            ledger.direct("ep", "all_to_all", 8 * (len(rows) - own))
            mine = range(place * own, (place + 1) * own)
            leave = sum(rows) - sum(rows[e] for e in mine)
            come = sum(
                peer.micro[number].routed[layer][e] for peer in peers if peer.place["ep"] != place for e in mine
            )
            size = _width(step.model) * step.compute_bytes
            for moved in (leave, come):
                ledger.direct("ep", "all_to_all", moved * size, calls=2)


def _beside(place: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether two ranks differ on ep alone, or not at all."""
    return all(place[axis] == other[axis] for axis in place if axis != "ep")
