from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distllm.config.errors import DataError
from distllm.config.schema import AugmentConfig, Config, DataConfig, HeadConfig, TaskConfig, TokenizerConfig
from distllm.data.encode import agrees_on, load_encoder
from distllm.data.tokenizer import EOS, Roles, check_roles, folder_digest, make_tokenizer, roles_of, spec_digest
from tests.data.conftest import prose

ODD = "tabs\tand  spaces \n\n\r\n  naïve café 日本語 🙂🏽 \u00a0\u2028 'll 'S ''' 123,456.7 ___ <|endoftext|> end "


def make(
    folder: Path, *, text: str, kind: str, vocab_size: int = 400, path: str | None = None, roles: bool = False
) -> Path:
    config = TokenizerConfig(kind=kind, vocab_size=vocab_size, path=path)  # type: ignore[arg-type]
    make_tokenizer(config, iter([text]), folder / "tokenizer", roles=roles)
    return folder / "tokenizer"


@pytest.mark.parametrize("kind", ["bpe", "bytes", "chars"])
def test_plain_transformers_loads_it_and_gets_the_text_back(tmp_path: Path, kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(make(tmp_path, text=prose(20_000) + ODD, kind=kind)))
    assert tokenizer.eos_token == EOS and tokenizer.is_fast
    for text in (ODD, prose(2000, seed=3), " lead", "trail \n", "a", ""):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not ids or max(ids) < len(tokenizer)
    assert tokenizer(EOS)["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer("some text")["input_ids"] == tokenizer("some text", add_special_tokens=False)["input_ids"]


def test_sizes(tmp_path: Path) -> None:
    for kind, size in (("bpe", 400), ("bytes", 257), ("chars", 4)):
        folder = tmp_path / kind
        folder.mkdir()
        text = "abca" if kind == "chars" else prose(20_000)
        assert len(AutoTokenizer.from_pretrained(str(make(folder, text=text, kind=kind)))) == size


def test_bytes_are_their_own_ids(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(make(tmp_path, text="", kind="bytes")))
    assert tokenizer("é\n\x00\x7f")["input_ids"] == [0xC3, 0xA9, 10, 0, 127]


def test_an_unknown_character_is_the_end_token(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(make(tmp_path, text="cab", kind="chars")))
    assert tokenizer("aXc")["input_ids"] == [0, 3, 2]
    assert tokenizer.eos_token_id == 3


def test_a_small_text_gives_a_smaller_vocabulary_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(make(tmp_path, text="abab", kind="bpe", vocab_size=1000)))
    assert len(tokenizer) < 300
    assert "no more pairs to join" in caplog.text


def test_training_does_not_depend_on_the_threads(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(prose(300_000), encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from distllm.data.tokenizer import train_bpe;"
        "t = Path(sys.argv[1]).read_text(encoding='utf-8').split('\\n\\n'); print(train_bpe(t, vocab_size=600).to_str())"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", code, str(text)], check=True, capture_output=True, cwd=Path(__file__).parents[2],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": parallel},
        ).stdout
        for threads, parallel in (("1", "false"), ("2", "true"), ("5", "true"))
    }  # fmt: skip
    assert len(made) == 1


def test_a_hugging_face_tokenizer_by_folder_and_by_file(tmp_path: Path) -> None:
    own = make(tmp_path, text=prose(20_000), kind="bpe")
    for name, path in (("folder", own), ("file", own / "tokenizer.json")):
        folder = tmp_path / name
        folder.mkdir()
        loaded = AutoTokenizer.from_pretrained(str(make(folder, text="", kind="hf", path=str(path))))
        assert loaded(ODD)["input_ids"] == AutoTokenizer.from_pretrained(str(own))(ODD)["input_ids"]
        assert loaded.eos_token == EOS


def test_a_tokenizer_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for path in (str(tmp_path / "none"), str(tmp_path / "broken"), str(tmp_path / "broken" / "tokenizer.json")):
        with pytest.raises(DataError, match=r"data\.tokenizer\.path=") as error:
            make(tmp_path, text="", kind="hf", path=path)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="needs a folder"):
        make(tmp_path, text="", kind="hf")


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="learns from text"):
        make_tokenizer(TokenizerConfig(kind="bpe"), iter([]), tmp_path / "tokenizer")


def test_digests(tmp_path: Path) -> None:
    folder = make(tmp_path, text=prose(5000), kind="bpe")
    first = folder_digest(folder)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert folder_digest(folder) != first
    hf = TokenizerConfig(kind="hf", path=str(folder))
    before = spec_digest(hf)
    (folder / "tokenizer").mkdir()  # a run keeps its own there
    assert spec_digest(hf) == before
    (folder / "tokenizer.json").write_text("{}")
    assert spec_digest(hf) != before
    assert spec_digest(TokenizerConfig(vocab_size=300)) != spec_digest(TokenizerConfig(vocab_size=301))
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        folder_digest(tmp_path / "none")


# What a tokenizer of a causal model was named before there were roles: stores that were made then are still found.
OLD_DIGESTS = {
    "bpe": "08b68f2b9f011d2a1ffeb4a791a71c1e926ff7b2972be1607c485d3bf7bbb54b",
    "bytes": "8a126d0b90b672f0bfc15332d5f3cfa0725162a3af0b5867bdb8ff154f727ec2",
    "chars": "3368a2b20e0a95e65a728ff745936c1d48c6faa3b339e08e7269285b308c53ce",
}


@pytest.mark.parametrize("kind", ["bpe", "bytes", "chars"])
def test_roles_have_a_digest_of_their_own(kind: str) -> None:
    config = TokenizerConfig(kind=kind)  # type: ignore[arg-type]
    assert spec_digest(config, roles=False) == OLD_DIGESTS[kind]
    assert spec_digest(config, roles=True) != OLD_DIGESTS[kind]
    hf = TokenizerConfig(kind="hf", path="name")
    assert spec_digest(hf, roles=True) == spec_digest(hf, roles=False)


@pytest.mark.parametrize(("kind", "first"), [("bpe", 0), ("bytes", 256), ("chars", None)])
def test_four_tokens_with_roles(kind: str, first: int | None, tmp_path: Path) -> None:
    text = prose(20_000) + ODD + "<pad> some text"
    folder = make(tmp_path, text=text, kind=kind, roles=True)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    first = len(set(text)) if first is None else first
    assert roles_of(tokenizer) == Roles(eos=first, pad=first + 1, begin=first + 2, separator=first, mask=first + 3)
    assert (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id) == (first + 2, first + 2, first)
    ids = tokenizer("some text", add_special_tokens=False)["input_ids"]
    encoded = tokenizer("some text")
    assert encoded["input_ids"] == [first + 2, *ids, first] and set(encoded) == {"input_ids", "attention_mask"}
    pair = tokenizer("some text", "some text", return_token_type_ids=True)
    assert pair["input_ids"] == [first + 2, *ids, first, *ids, first]
    assert pair["token_type_ids"] == [0] * (len(ids) + 2) + [1] * (len(ids) + 1)
    padded = tokenizer(["some text", ""], padding=True)
    assert padded["input_ids"][1] == [first + 2, first] + [first + 1] * len(ids)
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == "some text"
    # Preparing data sees none of it: neither the special tokens around a text nor those written in it.
    encoder = load_encoder(folder)
    assert encoder.method == {"bpe": "tiktoken"}.get(kind, "table") and encoder.eos_id == first
    assert encoder.encode("some text").tolist() == ids and encoder.vocab_size == len(tokenizer)
    assert agrees_on(encoder, folder, [ODD, "a <pad> is no <s>", prose(2000, seed=3)])
    assert encoder.encode("<pad>").size > 1


def test_without_roles_nothing_changes(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(make(tmp_path, text=prose(20_000), kind="bpe")))
    assert roles_of(tokenizer) == Roles(eos=0, pad=None, begin=None, separator=0, mask=None)
    assert tokenizer.all_special_ids == [0]
    assert tokenizer("a b")["input_ids"] == tokenizer("a b", add_special_tokens=False)["input_ids"]


LACKING = Roles(eos=0, pad=None, begin=None, separator=0, mask=None)


@pytest.mark.parametrize(
    ("task", "augment", "message"),
    [
        (TaskConfig(kind="masked_lm"), AugmentConfig(), "has no mask token, which task.kind=masked_lm needs; set its mask_token"),
        (TaskConfig(kind="translation_lm"), AugmentConfig(), "has no mask token, which task.kind=translation_lm needs"),
        (TaskConfig(kind="classification"), AugmentConfig(), "has no padding token, which task.kind=classification needs"),
        (TaskConfig(kind="seq2seq"), AugmentConfig(), "has no padding token, which task.kind=seq2seq needs; set its pad_token"),
        (TaskConfig(kind="classification"), AugmentConfig(mask=0.1), "no mask token, which data.augment.mask=0.1 needs"),
        (TaskConfig(kind="multi_task", tasks={"m": HeadConfig(kind="masked_lm")}), AugmentConfig(), "has no mask token"),
    ],
)
def test_a_tokenizer_without_a_role_that_the_task_needs(task: TaskConfig, augment: AugmentConfig, message: str) -> None:
    config = Config(task=task, data=DataConfig(tokenizer=TokenizerConfig(kind="hf", path="gpt2"), augment=augment))
    with pytest.raises(DataError) as error:
        check_roles(LACKING, config)
    assert message in str(error.value) and str(error.value).startswith("data.tokenizer.path=gpt2: ")
    assert str(error.value).endswith("or use data.tokenizer.kind=bpe") and "\n" not in str(error.value)
    check_roles(Roles(eos=0, pad=1, begin=2, separator=0, mask=3), config)


@pytest.mark.parametrize("kind", ["causal_lm", "sft"])
def test_packed_text_needs_its_end_only(kind: str) -> None:
    check_roles(LACKING, Config(task=TaskConfig(kind=kind)))  # type: ignore[arg-type]
