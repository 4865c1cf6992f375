"""Beam search: how an encoder-decoder, or several that vote, writes a target for each source.

Shapes: B sources, S source length, L open sources, K beams, N = L * K rows, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from distllm.config.schema import DecodeConfig
from distllm.models.cache import cache_name


@dataclass(frozen=True)
class Writing:
    """The ids by which a target begins, ends, and what it never holds."""

    start: int
    """What decoder input begins with."""
    end: int
    pad: int
    """What fills short sources; they are not attended to."""
    forbid: tuple[int, ...] = ()
    """Ids that are never written, such as those of padding and the mask."""
    vocab_size: int | None = None
    """Never write an id from here on; for embeddings with more rows than the tokenizer has ids."""
    max_len: int | None = None
    """The most tokens that the decoder's positions allow."""


@dataclass
class _Hypotheses:
    """What was found for one source: its best K ended hypotheses, best first, each a score and its ids without the end."""

    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def add(self, score: float, ids: list[int], *, width: int) -> None:
        self.ended.append((score, ids))
        self.ended.sort(key=lambda hypothesis: -hypothesis[0])  # stable: of equals the first found stays first
        del self.ended[width:]

    def cannot_improve(self, best_open: float, *, length: int, limit: int, decode: DecodeConfig) -> bool:
        """Whether the search for this source is over.

        Two rules. Sure: even if the best open one lost nothing more up to the longest output, it could not win. By rule
        of thumb, as in transformers: K hypotheses have ended, and the best open one, ended now, would not be among them.
        """
        if not self.ended:
            return best_open == -torch.inf
        if decode.beams == 1:
            return True
        if self.ended[0][0] >= best_open / limit**decode.length_penalty:
            return True
        full = len(self.ended) == decode.beams
        return full and self.ended[-1][0] >= best_open / length**decode.length_penalty


@torch.no_grad()
def beam_search(
    models: nn.Module | Sequence[nn.Module],
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    writing: Writing,
    decode: DecodeConfig,
    weights: Sequence[float] = (),
    use_cache: bool = True,
    to_the_end: bool = False,
) -> list[list[int]]:
    """Write the likeliest target of each source that a beam search finds.

    A hypothesis' score is its log probability / length ** length_penalty; its length counts the end token (Wu et al.
    2016, https://arxiv.org/abs/1609.08144, with the penalty of transformers). One beam is greedy. A source that is done
    leaves the batch, so its rows cost nothing more.

    Args:
        models: an encoder-decoder, or several of one vocabulary: at each step their probabilities are averaged.
        input_ids: int64 [B, S], padded on the right.
        attention_mask: int64 [B, S], 1 at tokens.
        writing: the ids that matter.
        decode: beams, length penalty and the most tokens of a target.
        weights: of the models in the average; empty: all the same.
        use_cache: False computes every token from the whole text.
        to_the_end: run the models, by their whole forward, exactly as often as the longest target needs, even where all
            sources are done. For a model that ranks share: one that stopped alone would leave the others waiting.

    Returns:
        For each source the ids of its target, without start and end.
    """
    several = [models] if isinstance(models, nn.Module) else list(models)
    limit = min(decode.max_tokens, writing.max_len or decode.max_tokens)
    found = [_Hypotheses() for _ in range(len(input_ids))]
    modes = [model.training for model in several]
    try:
        for model in several:
            model.eval()
        steppers = [_stepper(m, input_ids, attention_mask, use_cache=use_cache, whole=to_the_end) for m in several]
        shares = _shares(weights, len(several))
        _search(steppers, shares, found, writing=writing, decode=decode, limit=limit, to_the_end=to_the_end, ids=input_ids)
    finally:
        for model, mode in zip(several, modes, strict=True):
            model.train(mode)
    return [hypotheses.ended[0][1] if hypotheses.ended else [] for hypotheses in found]


def _search(
    steppers: Sequence[_Stepper],
    shares: Sequence[float],
    found: list[_Hypotheses],
    *,
    writing: Writing,
    decode: DecodeConfig,
    limit: int,
    to_the_end: bool,
    ids: torch.Tensor,
) -> None:
    """Fill `found`. Every open source has the same number of rows: one at first, then K; a spare one has score -inf."""
    sources = list(range(len(found)))
    text = torch.full((len(found), 1), writing.start, dtype=torch.long, device=ids.device)  # [N, length]
    totals = torch.zeros(len(found), 1, device=ids.device)  # [L, rows of a source]
    for length in range(1, limit + 1):
        scores = _log_probabilities(steppers, shares, text[:, -1])[:, : writing.vocab_size]
        if writing.forbid:
            scores[:, list(writing.forbid)] = -torch.inf
        top, rows, tokens = _candidates(totals, scores, width=decode.beams)
        kept: list[tuple[int, int, float]] = []  # row before, next token, total
        still = []
        for place, source in enumerate(sources):
            hypotheses = found[source]
            first_row = place * totals.shape[1]
            opened = []
            for rank, (total, row, token) in enumerate(zip(top[place], rows[place], tokens[place], strict=True)):
                if total == -torch.inf or hypotheses.done:
                    break
                if token != writing.end and length < limit:
                    opened.append((first_row + row, token, total))
                elif rank < decode.beams:  # further down they are there only so that K open ones are left
                    written = text[first_row + row, 1:].tolist() + ([] if token == writing.end else [token])
                    hypotheses.add(total / length**decode.length_penalty, written, width=decode.beams)
            best = opened[0][2] if opened else -torch.inf
            hypotheses.done = hypotheses.done or hypotheses.cannot_improve(best, length=length, limit=limit, decode=decode)
            if hypotheses.done and not to_the_end:
                continue
            opened = opened[: decode.beams] or [(first_row, writing.start, -torch.inf)]
            kept += opened + [(*opened[0][:2], -torch.inf)] * (decode.beams - len(opened))
            still.append(source)
        if not still or length == limit:
            return
        index = torch.tensor([row for row, _, _ in kept], device=ids.device)
        added = torch.tensor([token for _, token, _ in kept], device=ids.device)
        stay = len(still) == len(sources) and totals.shape[1] == decode.beams
        for stepper in steppers:
            stepper.select(index, stay=stay)
        text = torch.cat([text[index], added[:, None]], dim=1)
        totals = torch.tensor([total for _, _, total in kept], device=ids.device).view(len(still), decode.beams)
        sources = still


def _candidates(
    totals: torch.Tensor, scores: torch.Tensor, *, width: int
) -> tuple[list[list[float]], list[list[int]], list[list[int]]]:
    """The best 2 K continuations of each source, best first: totals, rows within the source, tokens.

    Of 2 K at most K end, so K open ones are left.

    Args:
        totals: [L, rows of a source].
        scores: the log probability of each next token, [N, V].
        width: K.
    """
    size = scores.shape[-1]
    every = (totals.view(-1, 1) + scores).view(len(totals), -1)
    top, place = every.topk(min(2 * width, every.shape[1]), dim=-1)
    return top.tolist(), (place // size).tolist(), (place % size).tolist()


def _log_probabilities(steppers: Sequence[_Stepper], shares: Sequence[float], tokens: torch.Tensor) -> torch.Tensor:
    """log of the weighted mean of the models' probabilities of the next token, [N, V]."""
    if len(steppers) == 1:
        return steppers[0].step(tokens).float().log_softmax(dim=-1)
    logs = [stepper.step(tokens).float().log_softmax(dim=-1).to(tokens.device) for stepper in steppers]
    size = min(log.shape[-1] for log in logs)  # rows beyond the tokenizer's ids may differ in number
    weighted = [log[:, :size] + torch.tensor(share).log() for log, share in zip(logs, shares, strict=True)]
    return torch.stack(weighted).logsumexp(dim=0)


def _shares(weights: Sequence[float], count: int) -> list[float]:
    """Weights that add up to 1."""
    given = list(weights) or [1.0] * count
    assert len(given) == count, "a weight for each model"
    return [weight / sum(given) for weight in given]


# ---------------------------------------------------------------------------------------------------------------------
# One step of one model: three ways


class _Stepper(Protocol):
    """A model with the state of N rows."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take the last tokens [N]; the logits of the next, [N, V]."""

    def select(self, rows: torch.Tensor, *, stay: bool) -> None:
        """Go on with these rows [N']; `stay`: every place keeps its source, only the targets change places."""


def _stepper(
    model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, *, use_cache: bool, whole: bool
) -> _Stepper:
    """The fastest way that a model has; `whole`: by its own forward only, where sharded parameters are gathered."""
    if use_cache and cache_name(model) is not None:
        return _Cached(model, input_ids, mask)
    if use_cache and not whole and hasattr(model, "decode_step"):
        return _Stepwise(model, input_ids, mask)
    return _Recomputed(model, input_ids, mask)


class _Cached:
    """An encoder-decoder of transformers with its cache of keys and values."""

    def __init__(self, model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.model, self.input_ids, self.mask = model, input_ids, mask
        self.memory: Any = None  # [N, S, H]
        self.cache: Any = None
        self._name = cache_name(model) or ""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        arguments = {"attention_mask": self.mask, "decoder_input_ids": tokens[:, None], "use_cache": True}
        if self.cache is None:
            out = self.model(input_ids=self.input_ids, **arguments)
            self.memory = out.encoder_last_hidden_state
        else:
            memory = BaseModelOutput(last_hidden_state=self.memory)
            out = self.model(encoder_outputs=memory, **{self._name: self.cache}, **arguments)
        self.cache = getattr(out, self._name)
        return out.logits[:, -1]

    def select(self, rows: torch.Tensor, *, stay: bool) -> None:
        self.cache.self_attention_cache.reorder_cache(rows)
        if not stay:  # the keys and values of the source are the same in all its rows
            self.cache.cross_attention_cache.reorder_cache(rows)
            self.memory, self.mask = self.memory[rows.to(self.memory.device)], self.mask[rows]


class _Stepwise:
    """A module with `encode`, `first_state` and `decode_step`."""

    def __init__(self, model: Any, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.model = model
        self.memory: tuple[torch.Tensor, ...] = model.encode(input_ids, mask)
        self.state: tuple[torch.Tensor, ...] = model.first_state(self.memory)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        logits, self.state = self.model.decode_step(self.memory, self.state, tokens)
        return logits

    def select(self, rows: torch.Tensor, *, stay: bool) -> None:
        self.state = tuple(part[rows] for part in self.state)
        if not stay:
            self.memory = tuple(part[rows] for part in self.memory)


class _Recomputed:
    """Any module: every token from the whole source and target."""

    def __init__(self, model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.model, self.input_ids, self.mask = model, input_ids, mask
        self.text = input_ids[:, :0]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.text = torch.cat([self.text, tokens[:, None]], dim=1)
        out = self.model(input_ids=self.input_ids, attention_mask=self.mask, decoder_input_ids=self.text)
        return (out if isinstance(out, torch.Tensor) else out.logits)[:, -1]

    def select(self, rows: torch.Tensor, *, stay: bool) -> None:
        self.text = self.text[rows]
        if not stay:
            self.input_ids, self.mask = self.input_ids[rows], self.mask[rows]


# ---------------------------------------------------------------------------------------------------------------------
# Many sources


def translate(
    models: nn.Module | Sequence[nn.Module],
    sources: Sequence[Sequence[int]],
    *,
    writing: Writing,
    decode: DecodeConfig,
    weights: Sequence[float] = (),
    device: torch.device,
    batch: int = 64,
    to_the_end: bool = False,
) -> Iterator[dict[int, list[int]]]:
    """Write a target for each of many sources, in batches of about equal length, the longest first.

    Args:
        models: as in `beam_search`.
        sources: ids of each source, as the model is to see it; none is empty.
        writing: as in `beam_search`.
        decode: as in `beam_search`.
        weights: as in `beam_search`.
        device: where the models take their input.
        batch: sources at once.
        to_the_end: as in `beam_search`; ranks that share a model need the same number of batches.

    Yields:
        For each batch the target ids by the number of the source; together they are all sources.
    """
    order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        width = len(sources[part[0]])
        rows = [list(sources[i]) + [writing.pad] * (width - len(sources[i])) for i in part]
        mask = [[1] * len(sources[i]) + [0] * (width - len(sources[i])) for i in part]
        targets = beam_search(
            models, input_ids=torch.tensor(rows, device=device), attention_mask=torch.tensor(mask, device=device),
            writing=writing, decode=decode, weights=weights, to_the_end=to_the_end,
        )  # fmt: skip
        yield dict(zip(part, targets, strict=True))
