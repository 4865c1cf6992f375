from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from distllm.config.errors import DataError
from distllm.data.encode import agrees_on, load_encoder
from distllm.data.tokenizer import EOS, wrap
from tests.data.conftest import prose
from tests.data.test_tokenizer import ODD, make

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RUNS = [" " * 5000, "a" * 5000, "\n" * 3000, "ab" * 3000 + "\n", "é" * 999, "1" * 999, " \n" * 500 + "x", "\t\tif x:\n\t\t\ty"]


@pytest.mark.parametrize(("kind", "method"), [("bpe", "tiktoken"), ("bytes", "table"), ("chars", "table")])
def test_the_fast_way_gives_the_ids_of_tokenizers(tmp_path: Path, kind: str, method: str) -> None:
    folder = make(tmp_path, text=prose(50_000) + ODD, kind=kind, vocab_size=600)
    encoder = load_encoder(folder)
    assert (encoder.method, encoder.reason) == (method, "")
    assert agrees_on(encoder, folder, [prose(20_000, seed=2), ODD, "", " ", "unknown: Ω≈ç√", *RUNS])
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert encoder.eos_id == tokenizer.eos_token_id and encoder.vocab_size == len(tokenizer)
    text = prose(3000, seed=5)
    assert encoder.encode(text).tolist() == tokenizer(text)["input_ids"]


def test_every_code_point_is_cut_alike(tmp_path: Path) -> None:
    """The two libraries carry Unicode tables of their own: every assigned character between letters, digits and spaces."""
    folder = make(tmp_path, text=prose(20_000), kind="bpe")
    known = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    texts = ["".join(f"a{c}b {c}1{c} {c}{c} " for c in known[i : i + 2000]) for i in range(0, len(known), 2000)]
    assert len(known) > 100_000
    assert agrees_on(load_encoder(folder), folder, texts)


def test_an_end_token_in_the_text_is_text(tmp_path: Path) -> None:
    for kind in ("bpe", "bytes", "chars"):
        (tmp_path / kind).mkdir()
        folder = make(tmp_path / kind, text=prose(9000) + EOS, kind=kind)
        for fast in (True, False):
            encoder = load_encoder(folder, fast=fast)
            assert encoder.eos_id not in encoder.encode(f"a{EOS}b").tolist()


def byte_level(folder: Path, *, pattern: str | None = None, **parts: Any) -> Path:
    """A byte-level BPE as others make them, saved as a Hugging Face folder."""
    tokenizer = Tokenizer(models.BPE(**{k: v for k, v in parts.items() if k in ("ignore_merges",)}))
    level = pre_tokenizers.ByteLevel(add_prefix_space=parts.get("prefix", False), use_regex=pattern is None)
    split = pre_tokenizers.Split(Regex(pattern or ""), behavior="isolated")
    tokenizer.pre_tokenizer = level if pattern is None else pre_tokenizers.Sequence([split, level])
    if "normalizer" in parts:
        tokenizer.normalizer = parts["normalizer"]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([prose(50_000)], trainer=trainer)
    wrap(tokenizer, has_unknown=False).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_the_llama_3_family_is_fast_too(tmp_path: Path, normalizer: Any) -> None:
    parts = {"normalizer": normalizer} if normalizer else {}
    folder = byte_level(tmp_path, pattern=LLAMA3, **parts)
    encoder = load_encoder(folder)
    assert encoder.method == "tiktoken"
    assert agrees_on(encoder, folder, [prose(20_000, seed=2), ODD, "cafe\u0301 e\u0301", *RUNS])


def change(folder: Path, edit: Any) -> Path:
    file = folder / "tokenizer.json"
    facts = json.loads(file.read_text())
    edit(facts)
    file.write_text(json.dumps(facts))
    return folder


def swap_ids(facts: dict[str, Any]) -> None:
    vocab = facts["model"]["vocab"]
    a, b = ("".join(m) for m in facts["model"]["merges"][:2])
    vocab[a], vocab[b] = vocab[b], vocab[a]


def unreachable(facts: dict[str, Any]) -> None:
    """A last merge whose left part, `zqx`, can never come up: alone, the token would stay z, qx."""
    vocab, merges = facts["model"]["vocab"], facts["model"]["merges"]
    for left, right in (("q", "x"), ("z", "q"), ("zq", "x")):
        vocab[left + right] = max(vocab.values()) + 1
        merges.append([left, right])


def twice(facts: dict[str, Any]) -> None:
    vocab, merges = facts["model"]["vocab"], facts["model"]["merges"]
    for left, right in (("z", "q"), ("q", "z"), ("zq", "z"), ("z", "qz")):
        vocab.setdefault(left + right, max(vocab.values()) + 1)
        merges.append([left, right])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (swap_ids, "order of its merges"),
        (unreachable, "alone does not become itself"),
        (twice, "two of its merges"),
        (lambda f: f["pre_tokenizer"].update(add_prefix_space=True), "pre-tokenizer"),
        (lambda f: f.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
        (lambda f: f["model"].update(dropout=0.1), "options"),
    ],
)
def test_what_may_differ_goes_the_slow_way(tmp_path: Path, edit: Any, reason: str) -> None:
    encoder = load_encoder(change(byte_level(tmp_path), edit))
    assert encoder.method == "tokenizers" and reason in encoder.reason


def test_why_such_a_token_is_refused(tmp_path: Path) -> None:
    """What the check guards against is real: tiktoken joins z and qx, for which there is no merge."""
    folder = change(byte_level(tmp_path), unreachable)
    slow = load_encoder(folder, fast=False).encode("zqx")
    assert len(slow) == 2


def test_a_difference_is_seen(tmp_path: Path) -> None:
    folder, other = byte_level(tmp_path / "a"), byte_level(tmp_path / "b", pattern=LLAMA3)
    assert not agrees_on(load_encoder(other), folder, [prose(2000)])


def test_added_words_are_kept(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(str(folder))
    encoder = load_encoder(folder)
    assert encoder.method == "tiktoken"
    assert agrees_on(encoder, folder, ["a <tool> b", "a b"])
    assert len(tokenizer) - 1 in encoder.encode("a <tool> b").tolist()
    assert encoder.vocab_size == len(tokenizer)


def test_a_broken_folder_is_one_clear_error(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    with pytest.raises(DataError, match="marks no end of a document"):
        load_encoder(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_encoder(folder)


def test_ids_are_numbers_of_one_kind(tmp_path: Path) -> None:
    for kind in ("bpe", "bytes", "chars"):
        (tmp_path / kind).mkdir()
        ids = load_encoder(make(tmp_path / kind, text=prose(5000), kind=kind)).encode("text")
        assert isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind == "u"
