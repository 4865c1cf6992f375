"""Text from a model: greedy or sampled, with a cache of keys and values, in batches, streamed.

Shapes: B prompts, S prompt length, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distllm.config.errors import DataError
from distllm.data.tokenizer import id_count
from distllm.models.cache import cache_name

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """How many tokens follow a prompt, and how each is chosen."""

    max_tokens: int
    """New tokens at most."""
    temperature: float = 0.8
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities add up to p."""


def stream(
    model: nn.Module | Sequence[nn.Module],
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    sampling: Sampling,
    eos_id: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    max_len: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    weights: Sequence[float] = (),
) -> Iterator[torch.Tensor]:
    """Continue prompts, a token at a time; the global random state is not touched.

    Where a prompt and its continuation outgrow the model's positions, the model sees the last `max_len` tokens.

    Args:
        model: a causal language model; one with a cache of keys and values (transformers) uses it. Or several of one
            vocabulary: at each step their probabilities are averaged.
        input_ids: int64 [B, S], padded on the left where prompts differ in length.
        attention_mask: [B, S], 1 at tokens and 0 at padding; None: no padding.
        sampling: how many tokens, and how each is chosen.
        eos_id: the id or ids that end a text. A row that has ended repeats its end; all ended: the iterator stops.
        vocab_size: never choose an id from here on; for embeddings with more rows than the tokenizer has ids.
        max_len: the longest input; None: what the model's config says.
        generator: the source of randomness; None: a new one with seed 0.
        use_cache: False computes every token from the whole text, as modules without a cache do.
        weights: of several models in the average; empty: all the same.

    Returns:
        An iterator over the next tokens, int64 [B] each, on the device of `input_ids`.
    """
    mask = _checked_mask(input_ids, attention_mask)
    writers = [_Writer(m, max_len, use_cache) for m in ([model] if isinstance(model, nn.Module) else model)]
    shares = list(weights) or [1.0] * len(writers)
    ends = torch.tensor([eos_id] if isinstance(eos_id, int) else list(eos_id or ()), dtype=torch.long)
    ends = ends.to(input_ids.device)
    source = generator if generator is not None else torch.Generator().manual_seed(0)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    text, last = input_ids, None
    modes = [writer.model.training for writer in writers]
    try:
        for writer in writers:
            writer.model.eval()
        for _ in range(sampling.max_tokens):
            logits = _mean([writer.logits(text, mask) for writer in writers], shares, vocab_size)
            chosen = choose(logits, sampling, generator=source).to(input_ids.device)
            last = chosen if last is None else torch.where(ended, last, chosen)
            yield last
            ended = ended | torch.isin(last, ends)
            if ends.numel() and bool(ended.all()):
                return
            text = torch.cat([text, last[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    finally:
        for writer, mode in zip(writers, modes, strict=True):
            writer.model.train(mode)


class _Writer:
    """A model and its cache of the text so far."""

    def __init__(self, model: nn.Module, max_len: int | None, use_cache: bool) -> None:
        self.model = model
        self.limit: int | None = max_len or getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self.cached = use_cache and cache_name(model) is not None
        self.cache: Any = None

    def logits(self, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The logits [B, V] of the token after `text` [B, S], which grew by one token since the last call."""
        if not self.cached or (self.limit is not None and text.shape[1] > self.limit):
            return _recomputed_logits(self.model, text, mask, self.limit)
        logits, self.cache = _cached_logits(self.model, text, mask, self.cache)
        return logits


def _mean(logits: Sequence[torch.Tensor], weights: Sequence[float], vocab_size: int | None) -> torch.Tensor:
    """The logits [B, vocab_size] of one model; of several the logarithm of their mean probability."""
    if len(logits) == 1:
        return logits[0][:, :vocab_size]
    parts = [w / sum(weights) * each.float().softmax(-1).to(logits[0].device) for each, w in zip(logits, weights, strict=True)]
    size = min(part.shape[-1] for part in parts)
    return torch.stack([part[:, :size] for part in parts]).sum(dim=0).log()[:, :vocab_size]


def _checked_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The attention mask [B, S] of prompts that can be continued."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be [B, S] with at least one token")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    if not bool((mask[:, -1] == 1).all()):
        raise ValueError("attention_mask must be padded on the left: its last column must be 1")
    return mask


@torch.no_grad()
def _cached_logits(
    model: nn.Module, text: torch.Tensor, mask: torch.Tensor, cache: Any
) -> tuple[torch.Tensor, Any]:
    """The last logits [B, V] with keys and values kept; the first call takes the prompt [B, S], later ones one column."""
    takes = inspect.signature(model.forward).parameters
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    new = text if cache is None else text[:, -1:]
    name = cache_name(model)
    assert name is not None
    inputs: dict[str, Any] = {"input_ids": new, "attention_mask": mask, name: cache, "use_cache": True}
    if "position_ids" in takes:
        inputs["position_ids"] = positions[:, -new.shape[1] :]
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = 1
    out = model(**inputs)
    return out.logits[:, -1], getattr(out, name)


@torch.no_grad()
def _recomputed_logits(model: nn.Module, text: torch.Tensor, mask: torch.Tensor, limit: int | None) -> torch.Tensor:
    """The last logits [B, V] from the whole text, or its last `limit` tokens.

    Padding moves to the right, where a causal model does not see it: so the model needs neither mask nor positions.
    """
    if limit is not None:
        text, mask = text[:, -limit:], mask[:, -limit:]
    lengths = mask.sum(dim=1)
    order = torch.arange(text.shape[1], device=text.device)[None] + (text.shape[1] - lengths)[:, None]
    rows = text.gather(1, order % text.shape[1])
    inputs: dict[str, Any] = {"input_ids": rows}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    out = model(**inputs)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return logits[torch.arange(len(rows), device=logits.device), (lengths - 1).to(logits.device)]


def choose(logits: torch.Tensor, sampling: Sampling, *, generator: torch.Generator) -> torch.Tensor:
    """Choose a token for each row of logits [B, V] on the generator's device; greedy with temperature 0. Returns int64 [B]."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    likely = logits.float().to(generator.device) / sampling.temperature
    kept = keep_likely(likely, top_k=sampling.top_k, top_p=sampling.top_p)
    return torch.multinomial(kept.softmax(dim=-1), 1, generator=generator)[:, 0]


def keep_likely(logits: torch.Tensor, *, top_k: int, top_p: float) -> torch.Tensor:
    """Set unlikely tokens of logits [B, V] to -inf: first all but the `top_k`, then what `top_p` cuts off.

    Args:
        logits: [B, V].
        top_k: keep this many; 0 keeps all.
        top_p: of what is left, keep the fewest likeliest whose probabilities reach p (Holtzman et al. 2020,
            https://arxiv.org/abs/1904.09751); at least one stays.
    """
    if 0 < top_k < logits.shape[-1]:
        bound = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < bound, -torch.inf)
    if top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        cut = before >= top_p
        cut[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, index, cut), -torch.inf)
    return logits


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], *, device: torch.device, chat: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as `input_ids` and `attention_mask`, int64 [B, S], padded on the left.

    An empty prompt becomes the end-of-document token, after which a document begins.

    Args:
        tokenizer: of transformers.
        prompts: texts.
        device: where to put them.
        chat: they are conversations with all special tokens in them (`prompt_text`): the tokenizer adds none.

    Raises:
        DataError: an empty prompt with a tokenizer that has no such token.
    """
    rows = [_prompt_ids(tokenizer, prompt, chat=chat) if prompt else [] for prompt in prompts]
    for i, row in enumerate(rows):
        if not row:
            start = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
            if start is None:
                raise DataError("an empty prompt needs a tokenizer with an end-of-document token; give a prompt")
            rows[i] = [start]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _prompt_ids(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """The ids of a prompt; an end that the tokenizer puts after every text is left out, as the text goes on."""
    plain = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if chat:
        return plain
    ids = list(tokenizer(prompt, add_special_tokens=True)["input_ids"])
    added = ids[-1 - len(plain) : -1] == plain and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return ids[:-1] if added else ids


def sample_text(
    model: nn.Module | Sequence[nn.Module],
    *,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    max_len: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device,
    to_the_end: bool = False,
    weights: Sequence[float] = (),
    chat: bool = False,
) -> list[str]:
    """Continue prompts as text; what is returned does not repeat the prompt and ends before the end-of-document token.

    Args:
        model: as in `stream`.
        tokenizer: of transformers; encodes the prompts.
        prompts: texts.
        sampling: as in `stream`.
        max_len: as in `stream`.
        generator: as in `stream`.
        device: where the model takes its input.
        to_the_end: compute all `max_tokens` even where every text has ended. For a model that ranks share: one that
            stopped alone, because its last bit fell otherwise, would leave the others waiting in a collective.
        weights: as in `stream`.
        chat: as in `encode_prompts`.
    """
    ids, mask = encode_prompts(tokenizer, prompts, device=device, chat=chat)
    end = tokenizer.eos_token_id
    tokens = stream(
        model, input_ids=ids, attention_mask=mask, sampling=sampling, eos_id=None if to_the_end else end,
        vocab_size=id_count(tokenizer), max_len=max_len, generator=generator, weights=weights,
    )  # fmt: skip
    written = torch.stack(list(tokens), dim=1).tolist()
    rows = [row[: row.index(end)] if end in row else row for row in written]
    before = [row[seen].tolist() for row, seen in zip(ids, mask.bool(), strict=True)]
    return ["".join(decode_stream(tokenizer, row, after=prompt)) for row, prompt in zip(rows, before, strict=True)]


def decode_stream(tokenizer: Any, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[str]:
    """Text of a stream of ids, in pieces that never cut a character; joined, they are the text of all ids.

    A byte-level tokenizer may spread one character over up to four ids; an unfinished one decodes to replacement
    characters at the end, at most three, which are held back until it is complete or the ids end. With byte fallback an
    unfinished one also takes back complete ones before it for that time; four ids later what is back is no text.

    Args:
        tokenizer: of transformers.
        ids: one after the other.
        after: the ids of the text that they continue. Many tokenizers drop the space before a text's first word.
    """
    window, text = _context(tokenizer, after)
    shown = text
    taken_back = 0
    for token in ids:
        window.append(token)
        text = tokenizer.decode(window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        held = next((n for n in range(3) if text[len(text) - n - 1 : len(text) - n] != REPLACEMENT), 3)
        ready = text[: len(text) - held]
        taken_back = 0 if ready.startswith(shown) else taken_back + 1
        if taken_back > 4:
            shown, taken_back = text[: len(shown)], 0
        if len(ready) > len(shown) and not taken_back:
            yield ready[len(shown) :]
            shown = ready
        if len(window) >= 64 and shown == text:  # decoding costs its length: forget all but a little context
            window = window[-8:]
            shown = text = tokenizer.decode(window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if len(text) > len(shown):
        yield text[len(shown) :]


def _context(tokenizer: Any, ids: Sequence[int]) -> tuple[list[int], str]:
    """The fewest last ids that decode to whole characters, and their text; none where there are no such ids."""
    for count in range(1, min(8, len(ids)) + 1):
        last = list(ids[-count:])
        text: str = tokenizer.decode(last, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text and REPLACEMENT not in text:
            return last, text
    return [], ""
