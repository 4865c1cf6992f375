from __future__ import annotations

import numpy as np
import torch

from distllm.data.batch import IGNORE
from distllm.data.collate import collate, inside_documents


def test_labels_are_the_next_tokens() -> None:
    rows = np.arange(10).reshape(2, 5)
    batch = collate(rows, sample_ids=[7, -1])
    assert batch.inputs.keys() == {"input_ids"} and batch.sample_ids == (7, -1)
    assert batch.inputs["input_ids"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch.targets["labels"].tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    for tensor in (batch.inputs["input_ids"], batch.targets["labels"]):
        assert tensor.dtype == torch.int64 and tensor.is_contiguous()


def test_padding_has_no_labels() -> None:
    batch = collate(np.ones((3, 5), dtype=np.int64), sample_ids=[0, 1, -1], labelled=np.array([4, 2, 0]))
    i = IGNORE
    assert batch.targets["labels"].tolist() == [[1, 1, 1, 1], [1, 1, i, i], [i, i, i, i]]


def test_ignored_labels_do_not_reach_the_inputs() -> None:
    """Of one row, inputs and labels are both contiguous parts of it: they must not be views of the same memory."""
    rows, begins = np.array([[1, 2, 3, 4]]), np.array([[0, 0, 1, 0]], dtype=bool)
    batch = collate(rows, sample_ids=[0], begins=begins, labelled=np.array([2]))
    assert batch.targets["labels"].tolist() == [[2, IGNORE, IGNORE]]
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3]] and rows.tolist() == [[1, 2, 3, 4]]


def test_inside_documents() -> None:
    """Documents a a a | b b | c, in the middle of the first."""
    rows = np.array([[1, 2, 3, 4, 5, 6, 7]])
    begins = np.array([[0, 0, 0, 1, 0, 1, 0]], dtype=bool)
    batch = collate(rows, sample_ids=[0], begins=begins)
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.targets["labels"].tolist() == [[2, 3, IGNORE, 5, IGNORE, 7]]
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    mask = batch.inputs["attention_mask"]
    assert mask.dtype == torch.bool and mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == expected


def test_the_mask_against_its_definition() -> None:
    begins = np.random.default_rng(0).random((5, 40)) < 0.2
    positions, mask = inside_documents(begins)
    document = np.cumsum(begins, axis=1)
    for b in range(5):
        for q in range(40):
            for k in range(40):
                assert mask[b, 0, q, k] == (k <= q and document[b, k] == document[b, q])
            assert positions[b, q] == mask[b, 0, q].sum() - 1


def test_documents_packed_together_give_what_each_gives_alone() -> None:
    """Attention with the mask: changing one document does not change another's numbers."""
    begins = np.array([[1, 0, 0, 1, 0, 0, 0, 1]], dtype=bool)
    _, mask = inside_documents(begins)
    query, key, value = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    packed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=torch.from_numpy(mask))
    for part in (slice(0, 3), slice(3, 7), slice(7, 8)):
        alone = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, part], key[:, :, part], value[:, :, part], is_causal=True
        )
        assert torch.allclose(packed[:, :, part], alone, atol=1e-6)
