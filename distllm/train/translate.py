"""Translations by trained encoder-decoders: of texts, of an example store, or there and back for augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from distllm import beam
from distllm.beam import Writing
from distllm.config.errors import ConfigError, DataError
from distllm.config.schema import DecodeConfig
from distllm.data.clean import clean
from distllm.data.rows import prefix_of
from distllm.data.tokenizer import id_count, never_written
from distllm.data.truncate import kept
from distllm.train.ensemble import Ensemble, open_ensemble
from distllm.train.inference import Source

BATCH = 64
"""Sources translated at once."""


def writing_of(ensemble: Ensemble) -> Writing:
    """The ids by which the targets of an ensemble begin, end, and what they never hold.

    Raises:
        DataError: the model does not say what its targets begin with.
    """
    source, roles = ensemble.first, ensemble.first.roles
    if source.decoder_start is None:
        raise DataError(f"{source.name}: does not say what its targets begin with (decoder_start_token_id in config.json)")
    return Writing(
        start=source.decoder_start, end=roles.eos, pad=roles.eos if roles.pad is None else roles.pad,
        forbid=never_written(roles, start=source.decoder_start), vocab_size=id_count(source.tokenizer), max_len=ensemble.max_len,
    )  # fmt: skip


def decode_of(
    ensemble: Ensemble, *, beams: int | None = None, length_penalty: float | None = None, max_tokens: int | None = None
) -> DecodeConfig:
    """How an ensemble writes: as its first config says, but for what is given."""
    given = {"beams": beams, "length_penalty": length_penalty, "max_tokens": max_tokens}
    return ensemble.first.config.decode.model_copy(update={name: v for name, v in given.items() if v is not None})


def translate_ids(
    ensemble: Ensemble, sources: Sequence[Sequence[int]], *, decode: DecodeConfig, batch: int = BATCH
) -> Iterator[dict[int, str]]:
    """Translate sources.

    Args:
        ensemble: encoder-decoders.
        sources: the ids of each text with its special tokens, as `encode_texts` gives them.
        decode: how.
        batch: sources at once.

    Yields:
        For each batch the translations by the number of the source; together they are all.
    """
    parts = beam.translate(
        ensemble.models, sources, writing=writing_of(ensemble), decode=decode, weights=ensemble.weights,
        device=ensemble.first.device, batch=batch,
    )  # fmt: skip
    for part in parts:
        yield {number: plain_text(ensemble.first, ids) for number, ids in part.items()}


def plain_text(source: Source, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens and the space that some tokenizers put before it."""
    text = source.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


def encode_texts(source: Source, texts: Sequence[str], *, truncate: str, places: Sequence[str]) -> list[list[int]]:
    """Texts as ids with the special tokens of an input, cut to what the model was trained with.

    Args:
        source: the model.
        texts: what to encode; what looks like a special token in one is text.
        truncate: as in data.truncate, but for window.
        places: where each text is, for messages.

    Raises:
        ConfigError: the rule is for labels only.
        DataError: a text is too long and none may be cut, or the tokenizer leaves nothing of it.
    """
    if truncate == "window":
        raise ConfigError(["--truncate=window: is for classification and regression; nearest: head"])
    tokenizer = Tokenizer.from_file(str(source.tokenizer_folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    roles = source.roles
    begin = [] if roles.begin is None else [roles.begin]
    end = [roles.eos if roles.separator is None else roles.separator]
    specials = len(begin) + len(end)
    lengths, room = np.array([len(row) for row in rows]), np.full(len(rows), source.seq_len - specials)
    if not lengths.all():
        raise DataError(f"{places[int(lengths.argmin())]}: the tokenizer leaves nothing of the text; give it a text")
    if truncate == "refuse" and (lengths > room).any():
        worst = int(lengths.argmax())
        rule = f"the text takes {lengths[worst] + specials} tokens, special tokens included, and the model takes {source.seq_len}"
        raise DataError(f"{places[worst]}: {rule}; nearest: --truncate=head")
    keep = kept(lengths, room, rule=truncate)
    return [
        [*begin, *row[:cut], *row[cut + skip : length + skip], *end]
        for row, length, cut, skip in zip(rows, keep.length.tolist(), keep.cut.tolist(), keep.skip.tolist(), strict=True)
    ]


def make_translator(sources: Sequence[str], *, trust: bool = False) -> Callable[[list[str]], list[str]]:
    """Translations by several models one after another, for data.augment.back_translation.

    The models are loaded when the first texts come, and read texts cleaned as those that they were trained on, and with
    their prefix. A text that is longer than a model takes loses its end, and one of which nothing is left stays as it is.

    Args:
        sources: runs or model folders, as data.augment.translators has them.
        trust: run Python code that they name.
    """
    opened: list[Ensemble] = []

    def translated(texts: list[str]) -> list[str]:
        if not opened:
            opened.extend(_translator(source, trust=trust) for source in sources)
        for ensemble in opened:
            data = ensemble.first.config.data
            read = [prefix_of(data.sources) + (clean(text, data.clean) or text) for text in texts]
            rows = encode_texts(ensemble.first, read, truncate="head", places=[f"text {i}" for i in range(len(texts))])
            found: dict[int, str] = {}
            for part in translate_ids(ensemble, rows, decode=ensemble.first.config.decode):
                found |= part
            texts = [found[i] or text for i, text in enumerate(texts)]
        return texts

    return translated


def _translator(source: str, *, trust: bool) -> Ensemble:
    ensemble = open_ensemble([source], trust=trust)
    if ensemble.first.kind != "seq2seq":
        rule = f"must be an encoder-decoder (seq2seq), and is for {ensemble.first.kind}"
        raise ConfigError([f"data.augment.translators: {source}: {rule}"])
    return ensemble
