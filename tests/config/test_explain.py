"""What `explain` shows, and the schema that is shipped for editors."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from distllm.config import yaml12
from distllm.config.errors import ConfigError
from distllm.config.explain import json_schema, rows, show, summary
from distllm.config.load import Loaded, leaves, load
from distllm.config.schema import Config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    file = tmp_path / "run.yaml"
    file.write_text("name: a\ntrain: {steps: 200, global_batch: 64}\n")
    return load(file, ["optim.lr=3e-4"])


def test_every_value_has_its_origin(loaded: Loaded) -> None:
    table = {row.key: row for row in rows(loaded, ranks=2)}
    assert table.keys() == dict(leaves(loaded.config)).keys()
    assert all(row.doc for row in table.values())
    assert (table["train.steps"].value, table["train.steps"].origin) == ("200", "file")
    assert (table["optim.lr"].value, table["optim.lr"].origin) == ("0.0003", "command line")
    assert (table["seed"].value, table["seed"].origin) == ("1", "default")
    assert (table["train.accumulation"].value, table["train.accumulation"].origin) == ("4", "derived (auto, default)")
    assert (table["layout.dp_shard"].value, table["layout.dp_shard"].origin) == ("2", "derived (auto, default)")


def test_the_batch_is_spelled_out(loaded: Loaded) -> None:
    assert summary(loaded, ranks=2) == [
        "global batch 64 = micro-batch 8 x accumulation 4 x data-parallel 2",
        "16,384 tokens a step = global batch 64 x 256 tokens",
        "3,276,800 tokens in all = 16,384 x 200 steps",
        "2 ranks = dp_shard 2",
        "data-parallel 2 = dp_replicate 1 x dp_shard 2",
    ]
    assert summary(loaded, ranks=3) == []


def test_one_value_is_shown_with_its_rule(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    show(loaded, ["train.steps"], ranks=1, terminal=False)
    assert capsys.readouterr().out.splitlines() == [
        "train.steps = 200", "  from     file", "  must be  a whole number above 0", "  default  1000",
        "  Optimizer steps of the whole run.",
    ]  # fmt: skip


def test_a_section_is_plain_aligned_lines_when_piped(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    show(loaded, ["optim"], ranks=1, terminal=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"optim.{name}" for name in type(loaded.config.optim).model_fields]
    assert len({line.index(word) for line in lines for word in ["default " if " default " in line else "command line"]}) == 1


def test_the_terminal_gets_a_table(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    show(loaded, [], ranks=2, terminal=True)
    out = capsys.readouterr().out
    assert "meaning" in out and "global batch 64 = micro-batch 8 x accumulation 4 x data-parallel 2" in out


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("train.stps", "train.stps: unknown key; nearest: train.steps"),
        ("lr", "lr: unknown key; nearest: optim.lr"),
        ("qqq", "qqq: unknown key; sections: name, out, seed, resume, device, task, model, tune, distill, decode, data, layout, engine, moe, precision, activation, optim, schedule, train, checkpoint, track"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest(loaded: Loaded, key: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rows(loaded, key)
    assert caught.value.problems == [line]


def test_the_shipped_schema_is_current() -> None:
    assert (CONFIGS / "schema.json").read_text() == json_schema(), "run `distllm explain --schema > configs/schema.json`"


def test_shipped_configs_fit_the_schema() -> None:
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    files = sorted(CONFIGS.glob("*.yaml"))
    assert files
    for file in files:
        text = file.read_text()
        jsonschema.validate(yaml12.read(text, where=str(file)), schema)
        assert "# yaml-language-server: $schema=schema.json" in text.splitlines()[:2]
    jsonschema.validate(Config().model_dump(mode="json"), schema)
    for wrong in ({"train": {"stps": 1}}, {"train": {"steps": -1}}, {"optim": {"betas": [0.9]}}, {"lr": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
