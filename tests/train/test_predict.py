"""Predictions and measurements of every kind of model, alone and together, against transformers and by hand."""

# ruff: noqa: E501 (what is told is one line, and so it is here)

from __future__ import annotations

import csv
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from distllm import cli
from distllm.comm import World
from distllm.config.errors import CheckpointError, ConfigError, DataError, StorageError
from distllm.config.schema import CleanConfig, Config, DecodeConfig, SourceConfig, TokenizerConfig
from distllm.data.tokenizer import make_tokenizer
from distllm.models.quiet import quiet
from distllm.train import translate
from distllm.train.ensemble import Ensemble, open_ensemble
from distllm.train.evaluate_source import On, measure
from distllm.train.example_samples import encode_file
from distllm.train.files import Columns
from distllm.train.inference import Choice, export_source, loader_of, open_source
from distllm.train.predict import Asked, predict
from distllm.train.translate import make_translator
from tests.runs import run_tiny
from tests.train.tasks import task_config, write_tables

ONE = World(0, 1, 0, 1, torch.device("cpu"))
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 48,
        "initializer_range": 0.5}  # fmt: skip
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 48, "init_std": 0.4}  # fmt: skip
TEXTS = ["one fine day", "no", "the longest text of all is here", "so so"]


def folder_of(place: Path, auto: Any, kind: str, *, seed: int = 0, tokenizer: str = "bytes", **more: Any) -> str:
    """A model folder of transformers with random weights and a tokenizer of distllm's."""
    if not (place / "tokenizer").is_dir():
        place.mkdir(parents=True, exist_ok=True)
        make_tokenizer(TokenizerConfig(kind=tokenizer), iter(TEXTS), place / "tokenizer", roles=True)  # type: ignore[arg-type]
    wrapped = transformers.AutoTokenizer.from_pretrained(place / "tokenizer")
    ids = {"pad_token_id": wrapped.pad_token_id, "eos_token_id": wrapped.eos_token_id, "bos_token_id": wrapped.bos_token_id}
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(wrapped), **ids, **more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config)
    target = place / f"{kind}-{auto.__name__}-{seed}"
    with quiet():
        model.save_pretrained(target)
        wrapped.save_pretrained(target)
    return str(target)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def classifier(place: Path, seed: int = 0, labels: tuple[str, ...] = ("bad", "good", "odd")) -> str:
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return folder_of(place, transformers.AutoModelForSequenceClassification, "bert", seed=seed, **BERT, **names)


def lines(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def table(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def probabilities(folder: str, texts: list[str], *, number: bool = False) -> np.ndarray:
    """By transformers alone, a text at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        rows.append((logits if number else logits.softmax(-1)).numpy())
    return np.stack(rows)


def test_classes_with_their_probabilities_in_the_order_of_the_file(place: Path, tmp_path: Path) -> None:
    folder, file = classifier(place), lines(tmp_path / "in.txt")
    expected = probabilities(folder, TEXTS)
    assert predict(open_ensemble([folder]), file=file, output=tmp_path / "out.tsv", asked=Asked(batch=3)) == 4
    header, *rows = table(tmp_path / "out.tsv")
    assert header == ["label", "bad", "good", "odd"]
    assert [row[0] for row in rows] == [header[1:][i] for i in expected.argmax(1)] and len({row[0] for row in rows}) > 1
    np.testing.assert_allclose([[float(p) for p in row[1:]] for row in rows], expected, atol=2e-6)
    given = tmp_path / "in.csv"
    with given.open("w") as out:
        csv.writer(out).writerows([["n", "words"], *([i, text] for i, text in enumerate(TEXTS))])
    predict(open_ensemble([folder]), file=given, output=tmp_path / "out.jsonl", asked=Asked(Columns("words")))
    objects = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [o["label"] for o in objects] == [row[0] for row in rows] and objects[0]["probabilities"].keys() == set(header[1:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "in.txt", "out.jsonl", "out.tsv"]


def test_long_texts_are_cut_as_asked_or_averaged_over_windows(place: Path, tmp_path: Path) -> None:
    folder, text = classifier(place), "".join(random.Random(1).choices("abcdef ", k=100)) + "x"
    ensemble, file = open_ensemble([folder]), lines(tmp_path / "in.txt", ["short", text])

    def found(rule: str | None) -> list[float]:
        predict(ensemble, file=file, output=tmp_path / "out.tsv", asked=Asked(truncate=rule))
        return [float(p) for p in table(tmp_path / "out.tsv")[2][1:]]

    with pytest.raises(DataError, match=r"1 of 2 examples of .*in\.txt .*--truncate=refuse.* --truncate=head, tail, middle or window"):
        found(None)
    room = 46
    parts = {"head": [text[:room]], "tail": [text[-room:]], "middle": [text[:23] + text[-23:]]}
    parts["window"] = [text[i : i + room] for i in range(0, 101, 36) if i == 0 or i + 10 < 101]
    stride = ensemble.first.config.data.model_copy(update={"stride": 10})
    object.__setattr__(ensemble.members[0], "config", ensemble.first.config.model_copy(update={"data": stride}))
    for rule, pieces in parts.items():
        np.testing.assert_allclose(found(rule), probabilities(folder, pieces).mean(0), atol=2e-6, err_msg=rule)


def test_models_together_answer_with_their_mean(place: Path, tmp_path: Path) -> None:
    pair, file, out = [classifier(place), classifier(place, 1)], lines(tmp_path / "in.txt"), tmp_path / "out.tsv"
    one, other = (probabilities(folder, TEXTS) for folder in pair)
    for weights, mean in (((), (one + other) / 2), ((3.0, 1.0), 0.75 * one + 0.25 * other)):
        predict(open_ensemble(pair, weights=weights), file=file, output=out)
        np.testing.assert_allclose([[float(p) for p in row[1:]] for row in table(out)[1:]], mean, atol=2e-6)
    labelled = tmp_path / "labelled.tsv"
    labelled.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in zip(TEXTS, ["bad", "odd", "good", "odd"], strict=True)))
    figures = measure(open_ensemble(pair, weights=(3.0, 1.0)), on=On(data=labelled)).figures
    right = (0.75 * one + 0.25 * other)[range(4), [0, 2, 1, 2]]
    assert figures["val_loss"] == pytest.approx(-np.log(right).mean(), rel=1e-5)
    numbers = [folder_of(place, transformers.AutoModelForSequenceClassification, "bert", seed=s, **BERT, num_labels=1) for s in (5, 6)]
    predict(open_ensemble(numbers), file=file, output=out)
    mean = np.mean([probabilities(folder, TEXTS, number=True) for folder in numbers], axis=0)
    np.testing.assert_allclose([float(row[0]) for row in table(out)[1:]], mean[:, 0], atol=1e-5)
    assert table(out)[0] == ["value"]


def test_models_together_take_as_many_tokens_as_the_shortest(place: Path, tmp_path: Path) -> None:
    auto, labels = transformers.AutoModelForSequenceClassification, dict(enumerate(("bad", "good", "odd")))
    short = folder_of(
        place, auto, "bert", seed=11, **{**BERT, "max_position_embeddings": 24}, id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    ensemble, file, out = open_ensemble([classifier(place), short]), lines(tmp_path / "in.txt"), tmp_path / "out.tsv"
    with pytest.raises(DataError, match=r"data\.seq_len=24: 1 of 4 examples of .*in\.txt are longer and --truncate=refuse"):
        predict(ensemble, file=file, output=out)
    predict(ensemble, file=file, output=out, asked=Asked(truncate="head"))
    texts = [text[:22] for text in TEXTS]
    mean = (probabilities(classifier(place), texts) + probabilities(short, texts)) / 2
    np.testing.assert_allclose([[float(p) for p in row[1:]] for row in table(out)[1:]], mean, atol=2e-6)


def test_what_cannot_answer_together(place: Path) -> None:
    with pytest.raises(DataError, match=r"has the labels a, b, and .* bad, good, odd"):
        open_ensemble([classifier(place), classifier(place, 9, ("a", "b"))])
    foreign = folder_of(place / "other", transformers.AutoModelForSequenceClassification, "bert", tokenizer="chars", **BERT, num_labels=3)
    with pytest.raises(DataError, match="has another tokenizer"):
        open_ensemble([classifier(place), foreign])
    with pytest.raises(ConfigError, match="was trained for masked_lm"):
        open_ensemble([classifier(place), folder_of(place, transformers.AutoModelForMaskedLM, "bert", **BERT)])
    with pytest.raises(ConfigError, match="3 weights for 1 models"):
        open_ensemble([classifier(place)], weights=(1, 2, 3))
    with pytest.raises(ConfigError, match="must be above 0"):
        open_ensemble([classifier(place)], weights=(0,))


def test_members_whose_texts_were_cleaned_otherwise_do_not_answer_together(place: Path, tmp_path: Path) -> None:
    plain, silent = classifier(place), tmp_path / "silent"
    exports = {"none": {}, "form": {"clean": {"unicode": "NFC"}}, "lower": {"clean": {"lowercase": True}}}
    for name, cleaned in exports.items():
        shutil.copytree(plain, tmp_path / name)
        (tmp_path / name / "distllm.json").write_text(json.dumps({"format": "export", **cleaned}))
    shutil.copytree(plain, silent)
    none, form, lower = (str(tmp_path / name) for name in exports)
    rule = r"--ensemble=.*lower: its training had data\.clean: lowercase=true, and that of .*{}; the members are given the same text"
    with pytest.raises(DataError, match=rule.format("none none")):
        open_ensemble([none, lower])
    for told in ([form, lower], [plain, form, lower]):  # a folder of transformers says nothing of it
        with pytest.raises(DataError, match=rule.format("form unicode=NFC")):
            open_ensemble(told)
    for alike in ([lower, lower], [lower, plain], [plain, lower, str(silent)]):
        assert len(open_ensemble(alike).members) == len(alike)
    (tmp_path / "form" / "distllm.json").write_text(json.dumps({"format": "export", "prefix": "Ask: "}))
    with pytest.raises(DataError, match=r"form: its training had data\.sources\.N\.prefix: 'Ask: ', and that of .*none none; "):
        open_ensemble([none, form])


def test_back_translation_reads_texts_as_the_translators_training_did(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(place, transformers.AutoModelForSeq2SeqLM, "bart", **BART, decoder_start_token_id=258)
    texts = ["ONE Fine day", "no"]
    plain = make_translator([folder])
    assert plain(texts) != plain([text.lower() for text in texts])
    (member,) = open_ensemble([folder]).members
    data = member.config.data.model_copy(
        update={"clean": CleanConfig(lowercase=True), "sources": [SourceConfig(prefix="Ask: ")]}
    )
    lower = Ensemble((replace(member, config=member.config.model_copy(update={"data": data})),), (1.0,))
    monkeypatch.setattr(translate, "open_ensemble", lambda *a, **k: lower)
    assert make_translator(["lower"])(texts) == plain([f"Ask: {text.lower()}" for text in texts])


def test_an_export_reads_what_it_is_asked_cleaned_as_its_training_did(place: Path, tmp_path: Path) -> None:
    upper, lower = lines(tmp_path / "upper.txt", [text.upper() for text in TEXTS]), lines(tmp_path / "lower.txt")
    bart = folder_of(place, transformers.AutoModelForSeq2SeqLM, "bart", **BART, decoder_start_token_id=258)
    for source in (classifier(place), bart):
        answers = {}
        for cleaned in ({}, {"clean": {"lowercase": True}}):
            folder = tmp_path / f"{Path(source).name}-{len(cleaned)}"
            shutil.copytree(source, folder)
            (folder / "distllm.json").write_text(json.dumps({"format": "export", **cleaned}))
            ensemble = open_ensemble([str(folder)])
            for file in (upper, lower):
                predict(ensemble, file=file, output=tmp_path / "out.txt")
                answers[len(cleaned), file.stem] = (tmp_path / "out.txt").read_text(encoding="utf-8")
        assert answers[0, "upper"] != answers[0, "lower"] == answers[1, "lower"] == answers[1, "upper"]


def test_a_prefix_is_not_cleaned(place: Path, tmp_path: Path) -> None:
    (member,) = open_ensemble([classifier(place)]).members
    data = member.config.data.model_copy(update={"clean": CleanConfig(lowercase=True)})
    lower = replace(member, config=member.config.model_copy(update={"data": data}))
    source = SourceConfig(kind="text", path=str(lines(tmp_path / "in.txt", ["ONE Fine day"])), document="line", prefix="Ask: ")
    store = encode_file(lower, source, kind="classification", folder=tmp_path, labelled=False)
    assert member.tokenizer.decode(store.ids("text", 0), skip_special_tokens=True) == "Ask: one fine day"


def test_a_run_and_its_export_put_the_same_prefix_before_what_they_are_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask, short = "translate upper to lower: ", DecodeConfig(beams=1, max_tokens=4)
    files = write_tables(tmp_path / "tables")
    source = {"kind": "parallel", "path": str(files["source.txt"]), "target_path": str(files["target.txt"])}

    def answers(folder: Path, *prefixes: str) -> dict[str, str]:
        config = task_config("marian", folder, data={"sources": [{**source, "prefix": p} for p in prefixes]}, train={"steps": 1})
        assert run_tiny(ONE, config) == 0
        run, kept = folder / "runs" / "small", folder / "export"
        assert cli.run(["export", str(run), str(kept)]) == 0
        assert json.loads((kept / "distllm.json").read_text()).get("prefix") == (ask if prefixes == (ask,) else None)
        shutil.copytree(kept, folder / "bare")
        (folder / "bare" / "distllm.json").write_text(json.dumps({"format": "export"}))
        found = {}
        for name, place in (("run", run), ("export", kept), ("bare", folder / "bare")):
            ensemble, given = open_ensemble([str(place)]), lines(tmp_path / "in.txt")
            predict(ensemble, file=given, output=tmp_path / "out.txt", asked=Asked(decode=short))
            figures = measure(ensemble, on=On(data=given, target=lines(tmp_path / "t.txt", TEXTS)), decode=short).figures
            found[name] = f"{(tmp_path / 'out.txt').read_text()}{figures['val_loss']:.6f}"
        return found

    shared = answers(tmp_path / "shared", ask)
    assert f"prefix   {ask!r}; " in capsys.readouterr().out
    assert shared["run"] == shared["export"] != shared["bare"]
    several = answers(tmp_path / "several", ask, "")  # each text has its own, and none is guessed
    assert several["run"] == several["export"] == several["bare"]
    marker = tmp_path / "shared" / "export" / "distllm.json"
    marker.write_text(json.dumps({"format": "export", "prefix": 7}))
    with pytest.raises(DataError, match=r"distllm\.json: damaged: `prefix` must be a text"):
        open_source(str(marker.parent))


def test_translations_equal_those_of_transformers(place: Path, tmp_path: Path) -> None:
    start = {"decoder_start_token_id": 258, "forced_eos_token_id": None}
    folder = folder_of(place, transformers.AutoModelForSeq2SeqLM, "bart", **BART, **start)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = []
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        out = model.generate(input_ids=torch.tensor([ids]), num_beams=3, max_new_tokens=8, suppress_tokens=[257, 258, 259])
        wanted.append(" ".join(tokenizer.decode(out[0], skip_special_tokens=True).strip().splitlines()))
    asked = Asked(decode=DecodeConfig(beams=3, max_tokens=8), batch=3)
    predict(open_ensemble([folder]), file=lines(tmp_path / "in.txt"), output=tmp_path / "out.txt", asked=asked)
    found = (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert found == wanted and len(set(found)) > 1
    translated = make_translator([folder, folder])(["one", "two"])
    assert len(translated) == 2 and all(translated)
    with pytest.raises(ConfigError, match=r"must be an encoder-decoder \(seq2seq\), and is for classification"):
        make_translator([classifier(place)])(["one"])
    lines(tmp_path / "target.txt", ["eins", "zwei", "drei und vier", "so"])
    found_ = measure(open_ensemble([folder]), on=On(data=tmp_path / "in.txt", target=tmp_path / "target.txt"), decode=asked.decode)
    assert found_.figures["val_tokens"] == sum(map(len, ["eins", "zwei", "drei und vier", "so"])) + 4
    assert 0 <= found_.figures["val_chrf"] < 50 and "version:" in found_.signatures["val_bleu"]
    import sacrebleu

    hypotheses = (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")[:-1]
    chrf = sacrebleu.corpus_chrf(hypotheses, [["eins", "zwei", "drei und vier", "so"]]).score
    assert found_.figures["val_chrf"] == pytest.approx(chrf)


def test_references_that_the_training_would_have_cleaned_are_told(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bart = folder_of(place, transformers.AutoModelForSeq2SeqLM, "bart", **BART, decoder_start_token_id=258)
    shutil.copytree(bart, tmp_path / "lower")
    (tmp_path / "lower" / "distllm.json").write_text(json.dumps({"format": "export", "clean": {"lowercase": True}}))
    short = DecodeConfig(beams=1, max_tokens=2)

    def said(folder: str | Path, *targets: str) -> list[str]:
        on = On(data=lines(tmp_path / "in.txt", ["one", "two"]), target=lines(tmp_path / "t.txt", [*targets]))
        caplog.clear()
        measure(open_ensemble([str(folder)]), on=on, decode=short)
        return [record.getMessage() for record in caplog.records if "references" in record.getMessage()]

    (line,) = said(tmp_path / "lower", "Eins", "zwei")
    assert line.startswith("1 of 2 references are not as data.clean (lowercase=true) makes them, ")
    assert said(tmp_path / "lower", "eins", "zwei") == said(bart, "Eins", "zwei") == []


def test_masks_are_filled(place: Path, tmp_path: Path) -> None:
    folder = folder_of(place, transformers.AutoModelForMaskedLM, "bert", **BERT)
    texts = ["one f<mask>ne d<mask>y", "no"]
    predict(open_ensemble([folder]), file=lines(tmp_path / "in.txt", texts), output=tmp_path / "out.txt")
    filled, same = (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines()
    assert same == "no" and "<mask>" not in filled and filled.startswith("one f") and "ne d" in filled
    with pytest.raises(DataError, match="write <mask> where one is wanted"):
        predict(open_ensemble([folder]), file=lines(tmp_path / "none.txt", ["no"]), output=tmp_path / "out.txt")


def test_the_head_for_tokens_of_several_fills_masks_too(tmp_path: Path) -> None:
    files = write_tables(tmp_path / "tables")
    numbers = {"kind": "jsonl", "path": str(files["numbers.jsonl"])}
    heads = {"score": {"kind": "regression"}, "words": {"kind": "masked_lm"}}
    config = task_config(
        "multi_task", tmp_path, task={"kind": "multi_task", "tasks": heads}, train={"steps": 1, "eval_every": 0},
        data={"sources": [{**numbers, "task": "score"}, {**numbers, "task": "words"}]},
    )
    assert run_tiny(ONE, config) == 0
    ensemble, file, out = open_ensemble([str(tmp_path / "runs" / "small")]), tmp_path / "in.txt", tmp_path / "out.txt"
    source, mask = ensemble.first, ensemble.first.tokenizer.mask_token
    lines(file, [f"a g{mask}od film", "no"])
    assert predict(ensemble, file=file, output=out, asked=Asked(task="words")) == 2
    ids = [source.roles.begin, *source.tokenizer(f"a g{mask}od film", add_special_tokens=False)["input_ids"], source.roles.separator]
    with torch.no_grad():
        logits = source.model(torch.tensor([ids]), rows_score=torch.arange(0), rows_words=torch.arange(1)).logits["words"][0]
    logits[:, [i for i in (source.roles.mask, source.roles.pad, source.roles.begin) if i is not None]] = -torch.inf
    assert out.read_text().splitlines() == [f"a g{source.tokenizer.decode(logits.argmax(-1)[ids.index(source.roles.mask)])}od film", "no"]


def test_a_file_for_one_of_several_heads_measures_it_alone(tmp_path: Path) -> None:
    file = str(write_tables(tmp_path / "tables")["labelled.tsv"])
    labelled = {"kind": "tsv", "path": file, "names": ["text", "label"]}
    heads = {"mood": {"kind": "classification"}, "other": {"kind": "classification"}}
    config = task_config(
        "multi_task", tmp_path, task={"kind": "multi_task", "tasks": heads}, train={"steps": 1, "eval_every": 0},
        data={"sources": [{**labelled, "task": "mood"}, {**labelled, "task": "other"}]},
    )
    assert run_tiny(ONE, config) == 0
    folder = tmp_path / "runs" / "small"
    assert cli.run(["eval", str(folder), "--data", file, "--task", "mood", "--json", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert list(found["confusion"]) == ["mood"] and found["val_other.samples"] == 0 and found["val_mood.samples"] > 0
    assert [path.name for path in (folder / "report").glob("confusion-*")] == ["confusion-labelled-mood.png"]


def test_what_cannot_be_predicted_is_told_in_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = classifier(place), lines(tmp_path / "in.txt")
    ensemble = open_ensemble([folder])
    (tmp_path / "a.tsv").write_text("sentence\tn\none\t1\n")
    lines(tmp_path / "empty.txt", [])
    lines(tmp_path / "blank.txt", ["one", ""])
    (tmp_path / "latin.txt").write_bytes(b"fine\nna\xefve\n")
    for name, rule in {
        "a.tsv": "no column 'text'; the columns are sentence, n", "none.txt": "no such file", "empty.txt": "is empty",
        "blank.txt": "line 2: the line is empty", "latin.txt": "line 2: not UTF-8 text",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=rule):
            predict(ensemble, file=tmp_path / name, output=tmp_path / "out.tsv")
        assert not (tmp_path / "out.tsv").exists()
    with pytest.raises(ConfigError, match=r"^--task=mood: is for multi_task, and .* is for classification; leave it out$"):
        predict(ensemble, file=file, output=tmp_path / "out.tsv", asked=Asked(task="mood"))
    with pytest.raises(StorageError, match="no such folder; make it first"):
        predict(ensemble, file=file, output=tmp_path / "missing" / "out.tsv")
    with pytest.raises(StorageError, match="is a folder"):
        predict(ensemble, file=file, output=tmp_path)
    with pytest.raises(ConfigError, match="is the input"):
        predict(ensemble, file=file, output=file)
    with pytest.raises(DataError, match="a plain text has no labels"):
        measure(ensemble, on=On(data=file))
    with pytest.raises(ConfigError, match="has no validation data of its own; give a file with labels or targets, --data FILE"):
        measure(ensemble)
    with pytest.raises(ConfigError, match="takes examples; nearest: --data"):
        measure(ensemble, on=On(texts=(file,)))
    (tmp_path / "b.tsv").write_text("text\tlabel\none\tugly\n")
    with pytest.raises(DataError, match="'ugly' in column 'label' is none that training knows"):
        measure(ensemble, on=On(data=tmp_path / "b.tsv"))
    with pytest.raises(ConfigError, match="is a model folder, with one set of weights"):
        open_source(folder, choice=Choice("best"))
    capsys.readouterr()
    assert cli.run(["generate", folder, "--prompt", "a"]) == 2
    err = capsys.readouterr().err
    assert "is for classification and continues no text; use distllm predict" in err and err.count("\n") == 1
    bare = folder_of(place, transformers.AutoModel, "bert", seed=3, **BERT)
    with pytest.raises(DataError, match="BertModel: is no language model and no classifier"):
        open_source(bare)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a classifier that learns which of two words is in a text, with averaged weights."""
    folder, rng = tmp_path_factory.mktemp("trained"), random.Random(1)
    rows = []
    for _ in range(120):
        label = rng.choice(["bad", "good"])
        text = [*rng.choices(["aa", "bb", "cc"], k=rng.randint(1, 5)), {"bad": "xx", "good": "yy"}[label]]
        rows.append(f"{' '.join(rng.sample(text, len(text)))}\t{label}\n")
    (folder / "train.tsv").write_text("sentence\tverdict\n" + "".join(rows))
    config = Config.model_validate(
        {
            "name": "words", "out": str(folder / "runs"), "task": {"kind": "classification"},
            "model": {"type": "bert", "sizes": {k: v for k, v in BERT.items() if not k.startswith(("max", "init"))}},
            "data": {
                "sources": [{"kind": "tsv", "path": str(folder / "train.tsv"), "column": "sentence", "label_column": "verdict"}],
                "tokenizer": {"kind": "bytes"}, "seq_len": 32, "store": str(folder / "store"), "workers": 1,
                "validation": {"fraction": 0.2},
            },
            "train": {"steps": 30, "global_batch": 16, "micro_batch": 16, "eval_every": 10, "threads": 1, "ema": 0.5, "keep_best": True},
            "optim": {"lr": 0.02}, "schedule": {"warmup": 2}, "checkpoint": {"every": 10, "keep": 3},
        }
    )  # fmt: skip
    assert run_tiny(ONE, config) == 0
    return folder / "runs" / "words"


def test_a_run_of_a_classifier_is_measured_exported_and_used(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if "val_loss" in line][-1]
    assert cli.run(["eval", str(trained), "--json", str(tmp_path / "f.json")]) == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "f.json").read_text())
    for name in ("val_loss", "val_accuracy", "val_f1_macro"):
        assert found[name] == pytest.approx(last[name], rel=1e-6)
    assert found["confusion"][""]["labels"] == ["bad", "good"] and sum(map(sum, found["confusion"][""]["counts"])) > 10
    assert "true \\ predicted" in out and (trained / "report" / "confusion-validation.png").is_file()
    folder = export_source(str(trained), tmp_path / "model")
    assert loader_of(folder) == "AutoModelForSequenceClassification"
    test = trained.parent.parent / "train.tsv"
    alike = [measure(open_ensemble([str(s)]), on=On(data=test, columns=c)).figures for s, c in (
        (trained, Columns()), (folder, Columns("sentence", label_column="verdict"))
    )]  # fmt: skip
    assert alike[0]["val_loss"] == pytest.approx(alike[1]["val_loss"], rel=1e-5)
    assert cli.run(["predict", str(trained), "--input", str(test), "--output", str(tmp_path / "out.tsv")]) == 0
    assert str(tmp_path / "out.tsv") in capsys.readouterr().out
    labels = [line.split("\t")[1] for line in test.read_text().splitlines()[1:]]
    assert np.mean([a == b[0] for a, b in zip(labels, table(tmp_path / "out.tsv")[1:], strict=True)]) > 0.9


def test_which_checkpoint_and_the_mean_of_several(trained: Path) -> None:
    def head(choice: Choice | None = None, source: Path = trained) -> torch.Tensor:
        return open_source(str(source), choice=choice).model.state_dict()["classifier.weight"]

    newest, averaged = head(Choice("last")), head()
    assert not torch.equal(newest, averaged) and torch.equal(averaged, head(Choice("ema")))
    assert torch.equal(averaged, head(Choice("30"))) and torch.equal(head(Choice("20")), head(source=trained / "checkpoints" / "step-20"))
    steps = [head(Choice("last"), trained / "checkpoints" / f"step-{n}") for n in (20, 30)]
    torch.testing.assert_close(head(Choice(average=2)), torch.stack(steps).mean(0))
    best = (trained / "checkpoints" / "best").resolve().name.removeprefix("step-")
    assert torch.equal(head(Choice("best")), head(Choice(best)))
    for choice, rule in (("7", "it keeps 10, 20, 30"), ("newest", "must be auto, last, best, ema or the number of a step")):
        with pytest.raises((CheckpointError, ConfigError), match=rule):
            head(Choice(choice))
    with pytest.raises(ConfigError, match="is one checkpoint; leave it out"):
        head(Choice("best"), trained / "checkpoints" / "step-20")
    with pytest.raises(CheckpointError, match="the average is of 9"):
        head(Choice(average=9))
