"""Examples of several tasks to one batch. B examples, B_t of task t, S tokens of the longest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distllm.config.schema import TaskConfig
from distllm.data.batch import Batch
from distllm.data.collate_classify import inputs_of, labels_of
from distllm.data.masking import MaskVocabulary, mask_rows
from distllm.data.ragged import Framed


def collate_multi(
    framed: Framed, labels: np.ndarray, task: np.ndarray, keys: np.ndarray, *, config: TaskConfig, vocab: MaskVocabulary | None,
    types: bool, sample_ids: Sequence[int],
) -> Batch:  # fmt: skip
    """Make a batch whose rows belong to the tasks of `config.tasks`.

    Args:
        framed: the inputs, [B, S].
        labels: class numbers or values, float64 [B]; not read for hidden tokens.
        task: the number of each row's task in `config.tasks`, int64 [B].
        keys: what hidden tokens are a function of, uint64 [B].
        config: the tasks, and how tokens are hidden.
        vocab: of the tokenizer; None where no task hides tokens.
        types: whether the model takes token types.
        sample_ids: the samples' global numbers; -1 for a padded row, which belongs to no task.

    Returns:
        A batch with `input_ids`, `attention_mask` and, for each task NAME, `rows_NAME` int64 [B_t], the rows that are its own
        (there may be none); the targets `labels_NAME`: int64 [B_t], float32 [B_t] with `weight_NAME`, or int64 [B_t, S].
    """
    used = np.asarray(sample_ids) >= 0
    inputs = inputs_of(framed, types=types)
    targets: dict[str, torch.Tensor] = {}
    for number, (name, head) in enumerate(config.tasks.items()):
        rows = np.flatnonzero(used & (task == number))
        inputs[f"rows_{name}"] = torch.from_numpy(rows)
        if head.kind == "masked_lm":
            assert vocab is not None
            may = np.arange(framed.ids.shape[1]) < framed.lengths[rows, None]
            hidden, answers = mask_rows(framed.ids[rows], keys[rows], config=config, vocab=vocab, may=may)
            inputs["input_ids"][rows] = torch.from_numpy(hidden)
            targets[f"labels_{name}"] = torch.from_numpy(answers)
            continue
        values = labels[rows] if head.kind == "regression" else labels[rows].astype(np.int64)
        for what, tensor in labels_of(values, np.ones(len(rows), dtype=bool)).items():
            targets[f"{what}_{name}"] = tensor
    return Batch(inputs, targets, tuple(sample_ids))
