"""From text to ids, several times faster than `tokenizers` and with the same ids.

Characters and bytes are table look-ups. A byte-level BPE runs in tiktoken, with the same merges and pre-tokeniser, where
that can be shown to give the same ids; anything else runs in `tokenizers`, which is always right.

Why tiktoken gives the same ids: `tokenizers` joins a pair if it is in the list of merges, tiktoken joins any neighbours
whose bytes together are a token. Both take the lowest rank first, the leftmost of equals. They part only where tiktoken
joins l and r to a token t that has no merge (l, r). As long as nothing was joined across the ends of t, its inside went as
if t were alone; so t alone would be left as l, r. `_merges_agree` checks that every token alone becomes itself, in which
case no such l, r exists. The pre-tokeniser is compared on text by `agrees_on`.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from distllm.config.errors import DataError
from distllm.data.tokenizer import byte_letters, id_count

# GPT-2's pattern as first published: in tiktoken 0.14 it runs 1.3 times as fast as tiktoken's own possessive spelling.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
log = logging.getLogger("distllm.data")


@dataclass(frozen=True)
class Encoder:
    """Turns documents into ids. Special tokens written in the text are text: only a document's end is marked."""

    method: str
    """tiktoken, table or tokenizers."""
    encode: Callable[[str], np.ndarray]
    """A document to its ids, 1-d, without the end mark."""
    eos_id: int
    vocab_size: int
    reason: str = ""
    """Why not the fast way."""


def load_encoder(folder: Path, *, fast: bool = True) -> Encoder:
    """Make the encoder of a Hugging Face tokenizer folder.

    Args:
        folder: with tokenizer.json and tokenizer_config.json.
        fast: False always takes `tokenizers`.

    Raises:
        DataError: the folder is not a tokenizer's.
    """
    file = folder / "tokenizer.json"
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{file}: not a tokenizer ({' '.join(str(error).split())[:200]})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    eos = settings.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    eos_id = tokenizer.token_to_id(eos) if eos else None
    if eos_id is None:
        raise DataError(f"{folder}: the tokenizer marks no end of a document; set its eos_token and save it again")

    def plain(text: str) -> np.ndarray:
        return np.array(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.uint32)

    size = id_count(tokenizer)
    if not fast:
        return Encoder("tokenizers", plain, eos_id, size)
    table = _table(facts, eos_id)
    if table is not None:
        return Encoder("table", table, eos_id, size)
    quick, reason = _tiktoken(facts, tokenizer, plain)
    if quick is None:
        return Encoder("tokenizers", plain, eos_id, size, reason)
    return Encoder("tiktoken", quick, eos_id, size)


@lru_cache(maxsize=4)
def cached_encoder(folder: Path, digest: str, fast: bool) -> Encoder:
    """`load_encoder`, kept for the next shard of the same tokenizer (0.3 s for 128k merges)."""
    assert digest
    return load_encoder(folder, fast=fast)


def agrees_on(encoder: Encoder, folder: Path, texts: Iterable[str]) -> bool:
    """Whether the encoder gives the ids of `tokenizers` on these texts."""
    plain = load_encoder(folder, fast=False)
    return all(np.array_equal(encoder.encode(text), plain.encode(text)) for text in texts)


def _table(facts: dict[str, Any], eos_id: int) -> Callable[[str], np.ndarray] | None:
    """A look-up for our characters and bytes."""
    model, pre = facts["model"], facts.get("pre_tokenizer") or {}
    if facts.get("normalizer"):
        return None
    vocab: dict[str, int] = model["vocab"] if isinstance(model.get("vocab"), dict) else {}
    if model["type"] == "BPE" and not model["merges"] and pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space"):
        if [vocab.get(letter) for letter in byte_letters()] == list(range(256)):
            return lambda text: np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        return None
    if model["type"] != "WordLevel" or pre.get("type") != "Split" or pre.get("pattern") != {"Regex": r"[\s\S]"}:
        return None
    ids = np.full(0x110000, vocab[model["unk_token"]], dtype=np.uint32)
    for token, number in vocab.items():
        if number != eos_id and len(token) == 1:  # the other special tokens
            ids[ord(token)] = number
    return lambda text: ids[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]


def _tiktoken(
    facts: dict[str, Any], tokenizer: Tokenizer, plain: Callable[[str], np.ndarray]
) -> tuple[Callable[[str], np.ndarray] | None, str]:
    """The same byte-level BPE in tiktoken, or None and why not."""
    import tiktoken

    model = facts["model"]
    pattern = _pattern(facts.get("pre_tokenizer"))
    normalizer = (facts.get("normalizer") or {"type": None})["type"]
    if model["type"] != "BPE" or pattern is None:
        return None, "not a byte-level BPE with a pre-tokenizer that is known here"
    if any(model.get(k) for k in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")):
        return None, "its BPE has options that tiktoken does not know"
    if normalizer not in (None, "NFC"):
        return None, f"its normalizer {normalizer} is not known here"
    ranks, reason = _ranks(model, tokenizer)
    if ranks is None:
        return None, reason
    try:
        coding = tiktoken.Encoding("distllm", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except Exception as error:  # a ValueError or a panic of its regex parser
        return None, f"tiktoken does not take its pattern ({error})"
    added = [t["content"] for t in facts.get("added_tokens", []) if not t.get("special")]

    def quick(text: str) -> np.ndarray:
        if any(token in text for token in added):
            return plain(text)
        if normalizer == "NFC" and not unicodedata.is_normalized("NFC", text):
            return plain(text)
        try:
            # 1.5 times as fast as encode_to_numpy, which looks for special tokens on the way
            return np.array(coding.encode_ordinary(text), dtype=np.uint32)
        except BaseException as error:  # tiktoken's regex panics on very long runs of one kind of character
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            return plain(text)

    return quick, ""


def _pattern(pre: dict[str, Any] | None) -> str | None:
    """The regex of a byte-level pre-tokenizer: GPT-2's own, or a Split before it as in Llama 3 and Qwen."""
    if not pre:
        return None
    if pre["type"] == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space"):
        return GPT2_PATTERN
    if pre["type"] != "Sequence" or [p["type"] for p in pre["pretokenizers"]] != ["Split", "ByteLevel"]:
        return None
    split, level = pre["pretokenizers"]
    regex = split["pattern"].get("Regex")
    if split["behavior"] != "Isolated" or split.get("invert") or level.get("use_regex", True) or level.get("add_prefix_space"):
        return None
    return regex


def _ranks(model: dict[str, Any], tokenizer: Tokenizer) -> tuple[dict[bytes, int] | None, str]:
    """tiktoken's table of bytes to rank, if ids rise with the merges and every token alone becomes itself."""
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocab: dict[str, int] = model["vocab"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    joined = [left + right for left, right in pairs]
    if len(set(joined)) != len(joined):
        return None, "two of its merges give the same token"
    if any(token not in vocab for token in joined) or any(letter not in vocab for letter in letters):
        return None, "its vocabulary lacks a byte or the result of a merge"
    ids = [vocab[token] for token in joined]
    if any(b <= a for a, b in pairwise(ids)):
        return None, "its ids are not in the order of its merges"
    if not _merges_agree(joined, tokenizer):
        return None, "a token of its vocabulary alone does not become itself"
    tokens = [*letters, *joined]
    return {bytes(letters[c] for c in token): vocab[token] for token in tokens}, ""


def _merges_agree(tokens: list[str], tokenizer: Tokenizer) -> bool:
    return all(len(tokenizer.model.tokenize(token)) == 1 for token in tokens)
