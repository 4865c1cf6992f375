"""Tensor parallel sends what the formula says: 4 all-reduces of [B, S, D] a block, or their halves as often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from distllm.comm import World
from tests.parallel.tensor_cases import case_of, laid_out
from tests.parallel.tensor_wire import Wire, elements_sent
from tests.ranks import on_ranks

TOKENS, HIDDEN, BLOCKS = 2 * 16, 32, 2
STATES = TOKENS * HIDDEN


def wire_of(kind: str, world: World, *, sequence: bool, blocks: int = BLOCKS) -> list[tuple[str, int]]:
    """The collectives of one forward and backward pass."""
    name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    case = case_of(kind, **({name: blocks} if blocks != BLOCKS else {}))
    model, _, _ = laid_out(case, world, tp=world.size, sequence=sequence)
    batch = case.batches[0]
    with Wire() as wire:
        case.objective(model.train()(**batch.inputs), batch).sum.backward()
    return wire.calls


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen3", "mixtral"])
def test_four_all_reduces_a_block(kind: str, tmp_path: Path) -> None:
    """Two forward and two backward; around the blocks one for the embedding, one for the head, and two for the loss."""
    calls = Counter(on_ranks(lambda world: wire_of(kind, world, sequence=False), 2, tmp_path)[0])
    assert calls.pop(("all_reduce", STATES)) == 4 * BLOCKS + 2 - (kind == "mixtral") * BLOCKS
    if kind == "mixtral":  # the gradients of what experts read, and of the weights of the two chosen, travel together
        assert calls.pop(("all_reduce", STATES + 2 * TOKENS)) == BLOCKS
    norms = BLOCKS if kind == "qwen3" else 0  # of queries and keys, 2 * 16 elements: as many as there are tokens
    assert calls.pop(("all_reduce", TOKENS)) == 1 + norms and calls.pop(("all_reduce", 3 * TOKENS)) == 1  # the loss
    assert not calls


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sequence_parallel_sends_the_same(kind: str, tmp_path: Path) -> None:
    """A block's bytes are the same, but for one small all-reduce: the gradients of what is whole in it."""

    def rank(world: World) -> list[dict[tuple[str, int], int]]:
        found = []
        for sequence in (False, True):
            one, two = (Counter(wire_of(kind, world, sequence=sequence, blocks=n)) for n in (2, 3))
            two.subtract(one)
            found.append({key: n for key, n in two.items() if n})
        return found

    plain, cut = on_ranks(rank, 2, tmp_path)[0]
    assert plain == {("all_reduce", STATES): 4}
    small = 2 * HIDDEN if kind == "llama" else 4 * HIDDEN + 2 * HIDDEN  # norms; gpt2: with biases, and those of rowwise layers
    assert cut == {("all_gather", STATES // 2): 4, ("reduce_scatter", STATES): 4, ("all_reduce", small): 1}
    sent = [sum(n * elements_sent(k, e, 2) for (k, e), n in calls.items() if e >= STATES // 2) for calls in (plain, cut)]
    assert sent[0] == sent[1] == 8 * (2 - 1) / 2 * STATES
