"""Every token of a batch, with all that goes with it, is on one context-parallel rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distllm.config.errors import ConfigError
from distllm.data.batch import IGNORE, Batch
from distllm.data.collate import collate
from distllm.parallel.mesh import AXES, Mesh
from distllm.parallel.sequence import Method, cut_batch, tokens_of

ROWS, SEQ = 2, 16


def mesh_of(rank: int, ranks: int) -> Mesh:
    """A mesh without process groups: cutting sends nothing."""
    return Mesh(dict.fromkeys(AXES, 1) | {"cp": ranks}, None, rank, None, None, None, None)


def batch_of(*, documents: bool = False) -> Batch:
    rows = np.arange(ROWS * (SEQ + 1)).reshape(ROWS, SEQ + 1)
    begins = None
    if documents:
        begins = np.zeros(rows.shape, dtype=bool)
        begins[0, [0, 5, 6]], begins[1, 9] = True, True
    return collate(rows, sample_ids=[3, 4], begins=begins)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_tokens_labels_and_positions_are_cut_together(method: Method, ranks: int) -> None:
    whole = batch_of()
    seen: list[int] = []
    for rank in range(ranks):
        part = cut_batch(whole, mesh_of(rank, ranks), method=method)
        at = [place for run in tokens_of(rank, ranks=ranks, seq_len=SEQ, method=method) for place in run]
        assert set(part.inputs) == {"input_ids", "position_ids"} and part.sample_ids == whole.sample_ids
        assert torch.equal(part.inputs["input_ids"], whole.inputs["input_ids"][:, at])
        assert torch.equal(part.targets["labels"], whole.targets["labels"][:, at])
        assert part.inputs["position_ids"].tolist() == [at] * ROWS
        seen += at
    assert sorted(seen) == list(range(SEQ))


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_document_masks_become_one_number_a_token(method: Method) -> None:
    whole = batch_of(documents=True)
    for rank in range(2):
        part = cut_batch(whole, mesh_of(rank, 2), method=method)
        at = [place for run in tokens_of(rank, ranks=2, seq_len=SEQ, method=method) for place in run]
        assert torch.equal(part.inputs["position_ids"], whole.inputs["position_ids"][:, at])
        starts = part.inputs["attention_mask"]
        assert starts.dtype == torch.int32 and starts.shape == (ROWS, 1, 1, SEQ)
        assert starts[0, 0, 0].tolist() == [0] * 5 + [5] + [6] * 10
        place = torch.arange(SEQ)
        dense = (place >= starts[:, 0, 0, :, None]) & (place <= place[:, None])
        assert torch.equal(dense, whole.inputs["attention_mask"][:, 0])


def test_rows_that_do_not_divide_are_filled_up_with_padding() -> None:
    tokens, seen = torch.ones(1, 6, dtype=torch.int64), torch.tensor([[1, 1, 1, 1, 1, 0]])
    given = {"input_ids": tokens, "attention_mask": seen, "token_type_ids": tokens}
    parts = [
        cut_batch(Batch(given, {"labels": tokens}, (0,)), mesh_of(rank, 2), method="ring") for rank in range(2)
    ]
    assert [part.inputs["token_type_ids"].shape for part in parts] == [(1, 4)] * 2
    assert parts[0].inputs["attention_mask"].tolist() == [[[[1, 1, 1, 1, 1, 0, 0, 0]]]]
    assert parts[0].inputs["attention_mask"].dtype == torch.int8
    assert parts[0].targets["labels"].tolist() == [[1, 1, IGNORE, IGNORE]]
    assert parts[1].targets["labels"].tolist() == [[1, 1, 1, 1]]


def test_one_rank_gets_the_batch_itself() -> None:
    whole = batch_of(documents=True)
    assert cut_batch(whole, mesh_of(0, 1), method="ring") is whole


def test_what_is_not_a_number_a_token_is_refused() -> None:
    whole = batch_of()
    one_a_row = Batch(whole.inputs, {"labels": torch.zeros(ROWS, dtype=torch.int64)}, whole.sample_ids)
    with pytest.raises(ConfigError, match=r"^layout\.cp=2: cuts sequences, and labels \[2\] is not .*; nearest: 1$"):
        cut_batch(one_a_row, mesh_of(0, 2), method="ring")
    documents = batch_of(documents=True)
    odd = Batch({**documents.inputs, "input_ids": torch.zeros(ROWS, 15)}, documents.targets, documents.sample_ids)
    with pytest.raises(ConfigError, match=r"layout\.cp=2: must cut .*nearest: data\.seq_len=16$"):
        cut_batch(odd, mesh_of(0, 2), method="ring")
