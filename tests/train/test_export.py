"""An export reads and answers what it is asked as its run does, in distllm and, where transformers can, in transformers too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from distllm import cli
from distllm.comm import World
from distllm.config.errors import DataError
from distllm.config.schema import Config, DecodeConfig
from distllm.train.ensemble import open_ensemble
from distllm.train.evaluate_source import On, measure
from distllm.train.inference import open_source
from distllm.train.predict import Asked, predict
from distllm.train.translate import decode_of
from tests.runs import TINY, run_tiny
from tests.train.tasks import BART, BERT, T5, task_config

ONE = World(0, 1, 0, 1, torch.device("cpu"))
TEXTS = ["the good plot", "bad", "a film that had to be a bad bad plot", "a good film"]
ADDED = ("seq_len", "truncate", "stride", "cross_documents", "decode")
"""What earlier exports did not say."""


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def exported(config: Config) -> tuple[Path, Path, Path]:
    """A run, its export, and the same as an earlier version wrote it."""
    assert run_tiny(ONE, config) == 0
    run = Path(config.out) / "small"
    kept, earlier = run.parent / "export", run.parent / "earlier"
    assert cli.run(["export", str(run), str(kept)]) == 0
    shutil.copytree(kept, earlier)
    facts = json.loads((kept / "distllm.json").read_text())
    (earlier / "distllm.json").write_text(json.dumps({name: value for name, value in facts.items() if name not in ADDED}))
    return run, kept, earlier


def predicted(source: Path, file: Path, **asked: Any) -> str:
    output = file.with_name("out.tsv")
    predict(open_ensemble([str(source)]), file=file, output=output, asked=Asked(**asked))
    return output.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "sizes", "decode"),
    [
        ("marian", BART | {"init_std": 0.4, "max_position_embeddings": 64}, {"beams": 3, "length_penalty": 0.5, "max_tokens": 8}),
        ("t5", T5 | {"initializer_factor": 3.0}, {"beams": 3, "length_penalty": 0.5, "max_tokens": 8}),
        ("t5", T5 | {"initializer_factor": 3.0}, {"beams": 1, "length_penalty": 0.5, "max_tokens": 8}),
    ],
)
def test_an_encoder_decoder_reads_and_writes_as_in_its_run(
    name: str, sizes: dict[str, Any], decode: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = {"seq_len": 24, "truncate": "middle", "tokenizer": {"kind": "chars"}}
    run, kept, earlier = exported(
        task_config(name, tmp_path, model={"sizes": sizes}, data=data, train={"steps": 1}, decode=decode)
    )
    file, target = lines(tmp_path / "in.txt", TEXTS), lines(tmp_path / "target.txt", TEXTS[::-1])
    written = predicted(run, file)
    assert predicted(kept, file) == written
    assert name == "marian" or len(set(written.splitlines())) == 4  # its untaught embedding repeats one letter
    figures = [measure(open_ensemble([str(place)]), on=On(data=file, target=target)).figures for place in (run, kept)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)

    facts = json.loads((kept / "distllm.json").read_text())
    assert (facts["seq_len"], facts["truncate"], facts["decode"]) == (24, "middle", decode)
    assert open_source(str(earlier)).config.decode == DecodeConfig()
    assert open_source(str(earlier)).seq_len == (64 if name == "marian" else 1024)
    short = lines(tmp_path / "short.txt", ["the good plot", "bad", "a good film"])
    assert predicted(earlier, short) != predicted(kept, short)

    assert name == "marian" or predicted(kept, file, truncate="tail") != written  # an option has the last word
    assert decode_of(open_ensemble([str(kept)]), max_tokens=3) == DecodeConfig(**{**decode, "max_tokens": 3})

    alone, tokenizer = transformers.AutoModelForSeq2SeqLM.from_pretrained(kept), transformers.AutoTokenizer.from_pretrained(kept)
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    try:
        texts = short.read_text().splitlines()
        rows = [alone.generate(**tokenizer(text, return_tensors="pt"))[0] for text in texts]
        assert alone.generate(**tokenizer("bad", return_tensors="pt"), max_length=4).shape[1] <= 4
    finally:
        transformers.utils.logging.disable_propagation()
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]
    said = [" ".join(tokenizer.decode(row, skip_special_tokens=True).strip().splitlines()) for row in rows]
    assert said == predicted(kept, short).split("\n")[:-1]


def test_a_classifier_averages_the_windows_of_its_run(tmp_path: Path) -> None:
    sizes = BERT | {"max_position_embeddings": 96, "initializer_range": 0.5}
    data = {"seq_len": 16, "truncate": "window", "stride": 5}
    run, kept, earlier = exported(
        task_config("classification", tmp_path, model={"sizes": sizes}, data=data, train={"steps": 1})
    )
    file = lines(tmp_path / "in.txt", TEXTS)
    assert predicted(kept, file) == predicted(run, file) != predicted(earlier, file)
    assert predicted(kept, file, truncate="head") == predicted(run, file, truncate="head") != predicted(run, file)


@pytest.mark.parametrize("name", ["causal_lm", "masked_lm"])
def test_a_language_model_is_measured_at_the_length_of_its_run(name: str, tmp_path: Path) -> None:
    sizes = (BERT if name == "masked_lm" else TINY) | {"max_position_embeddings": 96, "initializer_range": 0.3}
    run, kept, earlier = exported(
        task_config(name, tmp_path, model={"sizes": sizes}, data={"seq_len": 32, "cross_documents": False}, train={"steps": 1})
    )
    on = On(texts=(tmp_path / "tables" / "text.txt",))
    found = [measure(open_ensemble([str(place)]), on=on).figures["val_loss"] for place in (run, kept, earlier)]
    assert found[1] == pytest.approx(found[0], rel=1e-6) and found[2] != pytest.approx(found[0], rel=1e-4)


def test_settings_that_no_run_has_are_told(tmp_path: Path) -> None:
    _, kept, _ = exported(task_config("classification", tmp_path, train={"steps": 1}))
    for facts, rule in {
        '{"decode": {"beam": 2}}': "`decode` must hold settings of decode", '{"seq_len": 0}': "`seq_len` must be as data.seq_len",
        '{"truncate": "both"}': "`truncate` must be as data.truncate", "[1]": "it must hold the facts of an export",
    }.items():  # fmt: skip
        (kept / "distllm.json").write_text(facts)
        with pytest.raises(DataError, match=rf"distllm\.json: damaged: {rule}; export the model again"):
            open_source(str(kept))
