from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distllm.config.errors import DataError
from distllm.config.schema import TokenizerConfig
from distllm.data.tokenizer import EOS, folder_digest, make_tokenizer, spec_digest
from tests.data.conftest import prose

ODD = "tabs\tand  spaces \n\n\r\n  naïve café 日本語 🙂🏽 \u00a0\u2028 'll 'S ''' 123,456.7 ___ <|endoftext|> end "


def make(folder: Path, *, text: str, kind: str, vocab_size: int = 400, path: str | None = None) -> Path:
    config = TokenizerConfig(kind=kind, vocab_size=vocab_size, path=path)  # type: ignore[arg-type]
    make_tokenizer(config, iter([text]), folder / "tokenizer")
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
    (folder / "tokenizer.json").write_text("{}")
    assert spec_digest(hf) != before
    assert spec_digest(TokenizerConfig(vocab_size=300)) != spec_digest(TokenizerConfig(vocab_size=301))
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        folder_digest(tmp_path / "none")
