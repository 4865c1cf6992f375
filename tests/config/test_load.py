"""YAML, overrides, messages, and the exact way there and back."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from distllm.config.check import resolved_config
from distllm.config.errors import ConfigError
from distllm.config.kinds import ROOT, Kind, child, kind_at, known_keys, looks_secret
from distllm.config.load import digest, from_yaml, leaves, load, to_yaml, what_changed
from distllm.config.schema import Config

WANDB_KEY = "0123456789abcdef" * 2 + "01234567"


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(written(folder, text), overrides)
    return [line.replace(str(folder), "FOLDER") for line in caught.value.problems]


def test_values_come_from_default_file_and_command_line(tmp_path: Path) -> None:
    loaded = load(
        written(tmp_path, "name: a\noptim: {lr: 1e-3, betas: [0.8, 0.9]}\nmodel: {sizes: {hidden_size: 64}}\n"),
        ["train.steps=7", "optim.betas.1=0.99", "model.sizes.rope_theta=1e4", "train.steps=8"],
    )
    assert loaded.config.train.steps == 8  # the last one wins
    assert loaded.config.optim.betas == (0.8, 0.99)
    assert loaded.config.optim.lr == 0.001
    assert loaded.config.model.type == "llama"
    assert loaded.config.model.sizes == {"hidden_size": 64, "rope_theta": 10000.0}
    given = {key: origin for key, origin in loaded.origins.items() if origin != "default"}
    assert given == {
        "name": "file", "optim.lr": "file", "optim.betas": "command line", "train.steps": "command line",
        "model.sizes.hidden_size": "file", "model.sizes.rope_theta": "command line",
    }  # fmt: skip
    assert loaded.origins.keys() == dict(leaves(loaded.config)).keys()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=123", "123"),
        ("name=null", "null"),
        ("model.path=null", None),
        ("model.path=a: b", "a: b"),
        ("model.path='null'", "null"),
        ("resume=", ""),
        ("optim.lr=3e-4", 3e-4),
        ("optim.lr=1", 1.0),
        ("train.steps=1_000", 1000),
        ("train.compile=true", True),
        ("layout.dp_shard=auto", "auto"),
        ("layout.dp_shard=4", 4),
        ("train.sample_prompts=[a, 'null', \"1\"]", ["a", "null", "1"]),
        ("train.global_batch=null", None),
        ("model.sizes.rope_scaling=null", None),
        ("model.sizes.tie=false", False),
        ("track.tags=[]", []),
        ("data.sources.0.path=x*.txt", "x*.txt"),
    ],
)
def test_overrides_are_typed_by_the_schema(tmp_path: Path, override: str, value: Any) -> None:
    found = dict(leaves(load(written(tmp_path, "name: a\n"), [override]).config))[override.partition("=")[0]]
    assert found == value and type(found) is type(value)


def test_an_override_can_append_to_a_list_and_build_on_its_default(tmp_path: Path) -> None:
    config = load(written(tmp_path, "name: a\n"), ["data.sources.1.kind=text", "data.sources.1.path=x", "data.sources.0.weight=2"]).config
    assert [(s.kind, s.path, s.weight) for s in config.data.sources] == [("embedded", None, 2.0), ("text", "x", 1.0)]


def test_a_section_override_replaces_the_section(tmp_path: Path) -> None:
    loaded = load(written(tmp_path, "optim: {lr: 0.5, clip: 3.0}\n"), ["optim={name: sgd}"])
    assert (loaded.config.optim.name, loaded.config.optim.lr) == ("sgd", 1e-3)
    assert (loaded.origins["optim.name"], loaded.origins["optim.lr"]) == ("command line", "default")


def test_yaml_reads_as_it_looks(tmp_path: Path) -> None:
    text = "name: no\nmodel: {sizes: {a: 010, b: 1e-3, c: 1:30, d: yes, e: 2024-01-01, f: 0x10, g: .5, h: ~, on: 1}}\ntrain:\n"
    config = load(written(tmp_path, text)).config
    assert config.name == "no"
    assert config.model.sizes == {
        "a": 10, "b": 0.001, "c": "1:30", "d": "yes", "e": "2024-01-01", "f": 16, "g": 0.5, "h": None, "on": 1,
    }  # fmt: skip
    assert config.train == Config().train  # all its keys commented out


def test_every_problem_at_once_one_line_each(tmp_path: Path) -> None:
    text = """
name: a b
lr: 3
model: llama
data: {sources: [{kind: txt, paht: 3}], seq_len: 2.5, shuffle: yes}
optim: {betas: [0.9], clip: .nan, lr: -1}
layout: {dp_shard: 0}
train:
  stpes: 5
  steps: -5
  micro_batch: true
  accumulation: atuo
  timeout_s: "12"
  sample_prompts: x
zzz: 1
"""
    assert sorted(problems(tmp_path, text, "train.stp=4", "optim.betas.2=0.3", "data.sources.3.path=x", "nonsense", "train.log_every=[")) == sorted(
        [
            "train.stp=4: unknown key; nearest: train.steps",
            "optim.betas.2=0.3: unknown key; nearest: optim.betas",
            "data.sources.3.path=x: the list has 1 element; nearest: data.sources.1",
            "nonsense: must look like key=value, such as train.steps=100",
            "train.log_every=[: must be a whole number above 0, written as YAML",
            "name=a b: must be 1 to 100 letters, digits, dots, dashes and underscores, the first a letter or a digit; nearest: a-b",
            "model=llama: must be a section with keys of its own",
            "data.sources.0.kind=txt: must be one of embedded, text, jsonl, csv, tsv, parquet, hub, parallel, tokens; nearest: text",
            "data.sources.0.paht=3: unknown key; nearest: data.sources.0.path",
            "data.seq_len=2.5: must be a whole number above 0; nearest: 2",
            "data.shuffle=yes: must be true or false; nearest: true",
            "layout.dp_shard=0: must be a whole number above 0, or auto; nearest: 1",
            "optim.betas=[0.9]: must be a list of 2, each a number from 0 to 1; nearest: [0.9, 0.95]",
            "optim.clip=nan: must be a number of 0 or more; nearest: 1.0",
            "optim.lr=-1: must be a number above 0; nearest: 0.001",
            "train.steps=-5: must be a whole number above 0; nearest: 1",
            "train.micro_batch=true: must be a whole number above 0; nearest: 8",
            "train.accumulation=atuo: must be a whole number above 0, or auto; nearest: auto",
            "train.sample_prompts=x: must be a list, each text; nearest: [x]",
            'train.timeout_s="12": must be a whole number above 0; nearest: 12',
            "train.stpes=5: unknown key; nearest: train.steps",
            "lr=3: unknown key; nearest: optim.lr",
            "zzz=1: unknown key; known here: name, out, seed, resume, device, task, model, tune, distill, decode, data, layout, engine, moe, precision, activation, optim, "
            "schedule, train, checkpoint, track",
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: a\ntrain:\n  steps: [1\n", "FOLDER/run.yaml:4: not valid YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'"),
        ("name: a\n\ttrain: 1\n", "FOLDER/run.yaml:2: not valid YAML: while scanning for the next token found character '\\t' that cannot start any token"),
        ("name: a\nseed: 1\nname: b\n", "FOLDER/run.yaml:3: the key 'name' is given twice (first in line 1)"),
        ("train: {steps: 1, steps: 1}\n", "FOLDER/run.yaml:1: the key 'steps' is given twice (first in line 1)"),
        ("a: &x [1]\nb: *x\n", "FOLDER/run.yaml:2: aliases (*name) are not allowed; write the value out"),
        ("name: !!python/object/apply:os.system [ls]\n", "FOLDER/run.yaml:1: the tag !!python/object/apply:os.system is not allowed; write a plain value"),
        ("1: a\n", "FOLDER/run.yaml:1: the key '1' must be text"),
        ("? [a]\n: 1\n", "FOLDER/run.yaml:1: the key must be text"),
        ("- a\n", "FOLDER/run.yaml: must hold keys with values (`name: my-run`), not [a]"),
        ("", "FOLDER/run.yaml: the file is empty; write at least one key, such as `name: my-run`"),
        ("name: a\x00\n", "FOLDER/run.yaml:1: not valid YAML: holds a character that is not text"),
        ("[" * 5000, "FOLDER/run.yaml: not valid YAML: nested too deeply"),
        ("name: a\n---\nname: b\n", "FOLDER/run.yaml:2: not valid YAML: expected a single document in the stream but found another document"),
    ],
    ids=["open-list", "tab", "twice", "twice-in-flow", "alias", "tag", "number-key", "list-key", "list", "empty", "nul", "deep", "two-documents"],
)  # fmt: skip
def test_bad_yaml_is_one_line_with_its_place(tmp_path: Path, text: str, line: str) -> None:
    assert problems(tmp_path, text) == [line]


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    text = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
    assert problems(tmp_path, text) == ["FOLDER/run.yaml:2: aliases (*name) are not allowed; write the value out"]


def test_files_that_are_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    written(tmp_path / "configs", "name: a\n", "quickstart.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large.yaml").write_bytes(b"#" * 2_000_000)
    (tmp_path / "empty_run").mkdir()
    for given, line in [
        ("configs/quikstart.yaml", "configs/quikstart.yaml: no such config file; nearest: configs/quickstart.yaml"),
        ("quickstart", "quickstart: no such config file; nearest: configs/quickstart.yaml"),
        ("xyzxyz.yaml", "xyzxyz.yaml: no such config file; give a YAML file or a run folder"),
        ("train.steps=5", "train.steps=5: this is an override; the first argument is the config, a YAML file or a run folder"),
        ("binary.yaml", "binary.yaml: not a text file in UTF-8 (byte 0); this is no config"),
        ("large.yaml", "large.yaml: longer than 1000000 bytes; this is no config"),
        ("empty_run", "empty_run: no config.yaml in this folder; give a YAML file or a run folder"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(Path(given), [])
        assert caught.value.problems == [line]


def test_secrets_are_refused_and_never_shown(tmp_path: Path) -> None:
    secrets = [WANDB_KEY, "hf_" + "aB3" * 12, "sk-proj-" + "x1" * 20, "hunter2"]
    text = f"name: a\nout: {secrets[0]}\ntrack: {{project: {secrets[1]}, tags: [{secrets[2]}], password: {secrets[3]}}}\n"
    lines = problems(tmp_path, text, f"model.sizes.api_key={secrets[3]}", f"track.entity={secrets[0]}", f"wandb_key={secrets[0]}", secrets[0])
    assert not any(secret in line for secret in secrets for line in lines)
    rule = "looks like a secret; keep it in the environment (such as WANDB_API_KEY) or in ~/.netrc, never in a config"
    for key in ("out", "track.project", "track.tags.0", "track.password", "model.sizes.api_key", "track.entity", "wandb_key"):
        assert [line for line in lines if line.startswith(f"{key}")] == [f"{key}: {rule}"]


def test_no_key_of_the_schema_looks_like_a_secret() -> None:
    assert not [key for key in known_keys() if looks_secret(key, "x")]
    for key in ("model.sizes.pad_token_id", "model.sizes.bos_token", "model.sizes.num_key_value_heads"):
        assert not looks_secret(key, 1)
    assert not looks_secret("model.path", f"/cache/models--a--b/snapshots/{WANDB_KEY}")  # a hub cache has such folders


def random_value(kind: Kind, draw: random.Random, name: str) -> Any:
    if kind.what == "section":
        assert kind.section is not None
        return {n: random_value(child(kind, n) or kind, draw, n) for n in kind.section.model_fields if draw.random() < 0.7}
    if kind.what == "union":
        return random_value(draw.choice(kind.parts), draw, name)
    if kind.what == "whole":
        return draw.choice([1, 257, 10**draw.randrange(3, 18)]) if name != "vocab_size" else draw.randrange(257, 10**6)
    if kind.what == "number":
        top = kind.at_most if kind.at_most is not None else draw.choice([1.0, 1e-12, 1e22, 7.0])
        if kind.below is not None:
            return draw.random() * kind.below or kind.below / 2
        return draw.choice([draw.random() * top, top, 0.0 if kind.above is None else top])
    if kind.what == "flag":
        return draw.random() < 0.5
    if kind.what == "choice":
        return draw.choice(kind.choices)
    if kind.what == "null":
        return None
    if kind.what == "text":
        if kind.pattern is not None:
            return "".join(draw.choice("abcXYZ019") for _ in range(draw.randrange(1, 20)))
        words = ["", "null", "true", "1e3", "010", "~", " x ", "a: b", "- a", "# c", "'q'", '"', "é", "漢字", "\n", "a\n\nb\n", "\t", "😀",
                 "yes", "*a", "&a", "!t", "%", "@", "\x85", "\u2028", "\ufeff", "\x07", "{", "[", "x" * 200, ".inf", "=", "<<", "0x1F", "1_0"]  # fmt: skip
        return "".join(draw.choice(words) for _ in range(draw.randrange(1, 4)))
    if kind.what == "pair":
        return [random_value(part, draw, name) for part in kind.parts]
    if kind.what == "list":
        return [random_value(kind.parts[0], draw, name) for _ in range(draw.randrange(0, 3))]
    assert kind.what == "table"
    return {random_value(Kind("text"), draw, name): random_value(kind.parts[0], draw, name) for _ in range(draw.randrange(0, 4))}


def test_every_config_survives_yaml_exactly() -> None:
    draw = random.Random(2)
    for _ in range(100):
        config = Config.model_validate_json(json.dumps(random_value(ROOT, draw, "")), strict=True)
        again = from_yaml(to_yaml(config))
        assert again == config
        assert to_yaml(again) == to_yaml(config) and digest(again) == digest(config)
        same = [type(a) is type(b) for (_, a), (_, b) in zip(leaves(again), leaves(config), strict=True)]
        assert all(same)


def test_the_kinds_know_every_key_of_the_schema() -> None:
    assert all(kind_at(key) is not None for key in known_keys())


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["optim.lr=0.5"], ["optim.lr"]),
        (["seed=2", "data.seq_len=8"], ["data.seq_len", "seed"]),
        (["schedule.warmup=5"], ["schedule.warmup"]),
        (["precision.compute=bf16"], ["precision.compute"]),
        (["model.sizes.x=1"], ["model.sizes", "model.sizes.x"]),
        (["data.sources.0.weight=2"], ["data.sources.0.weight"]),
        (["train.global_batch=16"], ["train.global_batch"]),
        (["train.steps=5000"], []),
        (["name=b", "out=x", "resume=never", "device=cpu", "layout.dp_replicate=2", "track.wandb=true", "checkpoint.every=3"], []),
        (["train.log_every=3", "train.threads=2", "data.workers=3", "data.prefetch=2", "data.store=z", "train.compile=true"], []),
        (["activation.mode=full", "optim.implementation=loop", "model.attention=eager", "data.sources.0.hint=h"], []),
        (["train.micro_batch=2", "train.accumulation=4"], []),
    ],
)  # fmt: skip
def test_the_digest_follows_what_decides_the_result(tmp_path: Path, overrides: list[str], changed: list[str]) -> None:
    file = written(tmp_path, "name: a\ntrain: {global_batch: 8}\n")
    a, b = load(file, []).config, load(file, overrides).config
    assert what_changed(a, b) == changed
    assert (digest(a) == digest(b)) == (not changed)


def test_a_pinned_batch_is_the_same_run_on_any_world(tmp_path: Path) -> None:
    config = load(written(tmp_path, "train: {micro_batch: 2, accumulation: 4}\n"), []).config
    one, two = resolved_config(config, 1), resolved_config(config, 2)
    assert (one.train.global_batch, two.train.global_batch) == (8, 16)
    assert what_changed(one, two) == ["train.global_batch"]
    assert what_changed(one, resolved_config(one, 2)) == []


def test_a_run_folder_is_gone_on_with_even_when_moved(tmp_path: Path) -> None:
    folder = tmp_path / "moved" / "here"
    folder.mkdir(parents=True)
    written(folder, to_yaml(Config(name="was", out="elsewhere", resume="never")), "config.yaml")
    loaded = load(folder, ["train.steps=5"])
    assert (loaded.config.out, loaded.config.name, loaded.config.resume) == (str(tmp_path / "moved"), "here", "auto")
    assert loaded.origins["name"] == "derived" and loaded.origins["train.steps"] == "command line"
    assert load(folder, ["resume=never"]).config.resume == "never"


def test_a_config_error_travels_between_ranks() -> None:
    error = pickle.loads(pickle.dumps(ConfigError(["a: b", "c: d"])))
    assert error.problems == ["a: b", "c: d"] and str(error) == "a: b\nc: d"
