"""BLEU and chrF of a run in training: what the model writes for the validation sources, against their targets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from distllm.beam import Writing, beam_search
from distllm.comm import sum_over
from distllm.data.batch import IGNORE, Batch
from distllm.data.loader import validation_batches
from distllm.data.tokenizer import id_count, roles_of
from distllm.metrics.text import bleu_from, bleu_statistics, chrf_from, chrf_statistics
from distllm.train.build import Run

SCORES = {"bleu": (bleu_statistics, bleu_from), "chrf": (chrf_statistics, chrf_from)}


def score_written(run: Run, *, limit: int) -> dict[str, float]:
    """The figures of `task.metrics`, from statistics that are added over batches and ranks: the corpus's, to the last digit.

    Args:
        run: of an encoder-decoder.
        limit: micro-batches a rank translates; 0: all.
    """
    batches = validation_batches(
        run.samples, micro_batch=run.resolved.micro_batch, dp_rank=run.mesh.dp_rank, dp_size=run.mesh.dp_size, limit=limit
    )
    sums: dict[str, np.ndarray] = {}
    with run.engine.inference() as model:
        for batch in batches:
            pairs = [(h, r) for h, r in _written(run, model, batch) if r is not None]
            hypotheses, references = [h for h, _ in pairs], [r for _, r in pairs]
            for name in run.config.task.metrics:
                found = SCORES[name][0](hypotheses, references)
                sums[name] = sums[name] + found if name in sums else found
    scores = {}
    for name, part in sums.items():
        whole = sum_over(torch.as_tensor(part, dtype=torch.float64, device=run.world.device), run.mesh.loss_group)
        scores[name] = SCORES[name][1](whole.cpu().numpy())[0]
    return scores


def _written(run: Run, model: nn.Module, batch: Batch) -> Iterator[tuple[str, str | None]]:
    """For each row what the model writes, and its target; None for a row of padding."""
    here = batch.to(run.world.device)
    roles = roles_of(run.tokenizer)
    assert run.spec.decoder_start is not None, "the task is seq2seq"
    pad = roles.eos if roles.pad is None else roles.pad
    writing = Writing(
        start=run.spec.decoder_start, end=roles.eos, pad=pad,
        forbid=tuple(i for i in (roles.pad, roles.begin, roles.mask) if i is not None and i != roles.eos),
        vocab_size=id_count(run.tokenizer), max_len=run.spec.max_seq_len,
    )  # fmt: skip
    rows = beam_search(
        model, input_ids=here.inputs["input_ids"], attention_mask=here.inputs["attention_mask"], writing=writing,
        decode=run.config.decode, to_the_end=run.engine.parts_are_shared,
    )  # fmt: skip
    labels = batch.targets["labels"].cpu().numpy()
    for row, label, number in zip(rows, labels, batch.sample_ids, strict=True):
        target = label[(label != IGNORE) & (label != roles.eos)]
        yield _text(run, row), None if number < 0 else _text(run, target.tolist())


def _text(run: Run, ids: list[int]) -> str:
    return str(run.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
