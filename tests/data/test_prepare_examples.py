from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from distllm.config.errors import DataError
from distllm.config.schema import Config, SourceConfig
from distllm.data import prepare as prepare_module
from distllm.data import prepare_examples as examples_module
from distllm.data.chat import load_chat_encoder, prompt_text
from distllm.data.prepare import Prepared, open_prepared, prepare
from distllm.data.prepare_examples import encode_source
from distllm.data.rows import read_rows
from distllm.data.store import dtype_for, write_store

WORDS = ["good", "bad", "film", "plot", "great", "dull", "a", "the", "acting", "weiß", "café"]


def table(path: Path, rows: list[tuple[str, ...]], *, header: str) -> dict[str, Any]:
    """A tsv source."""
    path.write_text("\n".join([header.replace(" ", "\t"), *("\t".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return {"kind": "tsv", "path": str(path)}


def reviews(path: Path, *, labels: list[str], count: int = 40) -> dict[str, Any]:
    rows = [(f"{WORDS[i % 11]} {WORDS[(i * 3) % 11]} {i}", labels[i % len(labels)]) for i in range(count)]
    return table(path, rows, header="text label")


def config_of(tmp_path: Path, task: dict[str, Any] | str, sources: list[dict[str, Any]], **data: Any) -> Config:
    kind = {"kind": task} if isinstance(task, str) else task
    values = {"store": str(tmp_path / "store"), "tokenizer": {"kind": "bytes"}, "sources": sources, **data}
    return Config.model_validate({"task": kind, "data": values})


def texts(prepared: Prepared, field: str, *, part: int = 0) -> list[str]:
    """A field of every example of a training source, decoded."""
    tokenizer = AutoTokenizer.from_pretrained(str(prepared.tokenizer_folder))
    store = prepared.examples[part]
    return [tokenizer.decode(store.ids(field, i)) for i in range(len(store))]


def files_of(prepared: Prepared) -> dict[str, bytes]:
    folder = prepared.tokenizer_folder.parent
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", ["bpe", "chars", "bytes"])
def test_classification(tmp_path: Path, kind: str) -> None:
    source, held = reviews(tmp_path / "a.tsv", labels=["neg", "pos", "mid"]), reviews(tmp_path / "b.tsv", labels=["pos"], count=5)
    tokenizer = {"kind": kind, "vocab_size": 300}
    config = config_of(tmp_path, "classification", [source], validation={"sources": [held]}, tokenizer=tokenizer)
    prepared = prepare(config)
    assert prepared.stores == prepared.validation_stores == () and prepared.labels == {"": ("mid", "neg", "pos")}
    assert texts(prepared, "text") == [r.text for r in read_rows(SourceConfig(**source), kind="classification")]
    labels = prepared.examples[0].labels
    assert labels is not None and labels.dtype == np.int64 and labels[:4].tolist() == [1, 2, 0, 1]
    assert prepared.validation_examples[0].labels is not None and prepared.validation_examples[0].labels.tolist() == [2] * 5
    made = AutoTokenizer.from_pretrained(str(prepared.tokenizer_folder))
    assert made.pad_token_id is not None and prepared.vocab_size == len(made)
    assert all(made.eos_token_id not in prepared.examples[0].ids("text", i) for i in range(40))
    opened = open_prepared(config)
    assert opened.digest == prepared.digest and opened.labels == prepared.labels
    assert np.array_equal(opened.examples[0].ids("text", 39), prepared.examples[0].ids("text", 39))


def test_a_special_token_in_a_text_is_text(tmp_path: Path) -> None:
    source = table(tmp_path / "a.tsv", [("a <pad> b <|endoftext|>", "0"), ("<s>", "1")], header="text label")
    for kind in ("bpe", "bytes"):
        prepared = prepare(config_of(tmp_path, "classification", [source], tokenizer={"kind": kind, "vocab_size": 260}))
        specials = set(AutoTokenizer.from_pretrained(str(prepared.tokenizer_folder)).all_special_ids)
        assert len(specials) == 4 and not specials & set(prepared.examples[0].ids("text", 0).tolist())


def test_the_order_of_labels(tmp_path: Path) -> None:
    numbers = reviews(tmp_path / "a.tsv", labels=["10", "9", "-1", "other"])
    assert prepare(config_of(tmp_path, "classification", [numbers])).labels == {"": ("-1", "9", "10", "other")}
    given = config_of(tmp_path, {"kind": "classification", "labels": ["other", "9", "10", "-1", "new"]}, [numbers])
    prepared = prepare(given)
    assert prepared.labels == {"": ("other", "9", "10", "-1", "new")}
    assert prepared.examples[0].labels is not None and prepared.examples[0].labels[:4].tolist() == [2, 1, 3, 0]


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    source, other = reviews(tmp_path / "a.tsv", labels=["neg", "pos"]), reviews(tmp_path / "b.tsv", labels=["pos", "meh"])
    with pytest.raises(DataError, match=r"b\.tsv, line 3: the label 'meh' .* none that training knows \(neg, pos\)"):
        prepare(config_of(tmp_path, "classification", [source], validation={"sources": [other]}))
    with pytest.raises(DataError, match=r"a\.tsv, line 2: the label 'neg' .* none of the `labels` of the task \(pos, meh\)"):
        prepare(config_of(tmp_path, {"kind": "classification", "labels": ["pos", "meh"]}, [source]))
    with pytest.raises(DataError, match="every label is 'pos'; a classifier needs two classes"):
        prepare(config_of(tmp_path, "classification", [reviews(tmp_path / "c.tsv", labels=["pos"])]))
    assert not list((tmp_path / "store").glob("[!.]*"))


def test_regression_of_pairs(tmp_path: Path) -> None:
    source = table(tmp_path / "a.tsv", [("a b", "a c", "0.5"), ("x", "y", "-2")], header="one two label")
    prepared = prepare(config_of(tmp_path, "regression", [{**source, "column": "one", "pair_column": "two", "prefix": "sts: "}]))
    assert texts(prepared, "text") == ["sts: a b", "sts: x"] and texts(prepared, "pair") == ["a c", "y"]
    labels = prepared.examples[0].labels
    assert prepared.labels == {"": ()} and labels is not None and labels.dtype == np.float64 and labels.tolist() == [0.5, -2.0]


def parallel(tmp_path: Path, *, count: int = 30, name: str = "t") -> dict[str, Any]:
    for side, word in (("de", "Satz"), ("en", "sentence")):
        lines = [f"{word} {i} {WORDS[i % 11]}" for i in range(count)]
        (tmp_path / f"{name}.{side}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"kind": "parallel", "path": str(tmp_path / f"{name}.de"), "target_path": str(tmp_path / f"{name}.en")}


@pytest.mark.parametrize("task", ["seq2seq", "translation_lm"])
def test_parallel_texts_share_a_tokenizer(tmp_path: Path, task: str) -> None:
    prepared = prepare(config_of(tmp_path, task, [parallel(tmp_path)], tokenizer={"kind": "bpe", "vocab_size": 280}))
    assert texts(prepared, "text")[3] == "Satz 3 plot" and texts(prepared, "target")[3] == "sentence 3 plot"
    assert prepared.labels == {} and prepared.examples[0].labels is None
    both = [prepared.examples[0].lengths(field).mean() for field in ("text", "target")]
    assert max(both) < 9  # of 12 and 16 bytes: merges were learned of either language


def test_several_tasks(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("some text\nmore text\n", encoding="utf-8")
    sources = [
        {**reviews(tmp_path / "a.tsv", labels=["neg", "pos"]), "task": "sentiment"},
        {**reviews(tmp_path / "b.tsv", labels=["1", "3.5"]), "task": "stars"},
        {"kind": "text", "path": str(tmp_path / "plain.txt"), "document": "line", "task": "words"},
    ]
    tasks = {"sentiment": {}, "stars": {"kind": "regression"}, "words": {"kind": "masked_lm"}}
    prepared = prepare(config_of(tmp_path, {"kind": "multi_task", "tasks": tasks}, sources, dedup={"exact": True}))
    assert prepared.labels == {"sentiment": ("neg", "pos"), "stars": (), "words": ()}
    assert [e.task for e in prepared.examples] == ["sentiment", "stars", "words"]
    assert [len(e) for e in prepared.examples] == [40, 40, 2]  # the same text for two tasks is no repeat
    assert [None if e.labels is None else e.labels[:2].tolist() for e in prepared.examples] == [[0, 1], [1.0, 3.5], None]
    with pytest.raises(DataError, match=r"a\.tsv: its `task` is not set; task\.tasks has sentiment, stars, words"):
        prepare(config_of(tmp_path, {"kind": "multi_task", "tasks": tasks}, [{**sources[0], "task": None}]))
    with pytest.raises(DataError, match=r"task sentiment: no training source has examples for it"):
        prepare(config_of(tmp_path, {"kind": "multi_task", "tasks": tasks}, sources[1:]))


def test_cleaning_and_repeats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("a  b", "0"), ("c", "1"), ("<b>a</b> b", "1"), ("d", "0")]
    one = table(tmp_path / "a.tsv", rows, header="text label")
    two = table(tmp_path / "b.tsv", [rows[1], ("e", "0")], header="text label")
    caplog.set_level("INFO")
    options: dict[str, Any] = {"clean": {"html": True, "whitespace": True}, "dedup": {"exact": True}}
    config = config_of(tmp_path, "classification", [one, two], validation={"sources": [one]}, **options)
    prepared = prepare(config)
    assert texts(prepared, "text") == ["a b", "c", "d"] and texts(prepared, "text", part=1) == ["e"]
    assert prepared.examples[0].labels is not None and prepared.examples[0].labels.tolist() == [0, 1, 0]
    assert len(prepared.validation_examples[0]) == 4
    assert "a.tsv: 1 of 4 examples repeat" in caplog.text and "b.tsv: 1 of 2 examples repeat" in caplog.text
    held = table(tmp_path / "c.tsv", [("a b", "new")], header="text label")  # a repeat, but of validation
    with pytest.raises(DataError, match=r"c\.tsv, line 2: the label 'new'"):
        prepare(config_of(tmp_path, "classification", [one, two], validation={"sources": [held]}, **options))
    with pytest.raises(DataError, match=r"b\.tsv: all 2 examples repeat earlier ones, and data\.dedup drops them; leave"):
        prepare(config_of(tmp_path, "classification", [one, two, two, one], **options))
    source = parallel(tmp_path, count=4)
    (tmp_path / "t.de").write_text("x\nx\ny\nx\n")
    (tmp_path / "t.en").write_text("1\n2\n1\n1\n")
    assert len(prepare(config_of(tmp_path, "seq2seq", [source], dedup={"exact": True})).examples[0]) == 3


def test_the_digest_is_of_what_decides_the_bytes(tmp_path: Path) -> None:
    source, labels = reviews(tmp_path / "a.tsv", labels=["0", "1"]), ["0", "1"]

    def digest(task: Any = "classification", *, changed: dict[str, Any] | None = None, **data: Any) -> str:
        return prepare(config_of(tmp_path, task, [{**source, **(changed or {})}], **data)).digest

    same = {digest(), digest(seq_len=8, truncate="head", workers=3), digest(changed={"weight": 2.0, "hint": "h"})}
    shutil.copy(tmp_path / "a.tsv", tmp_path / "moved.tsv")
    same.add(digest(changed={"path": str(tmp_path / "moved.tsv")}))
    others = [
        digest("regression"), digest({"kind": "classification", "labels": labels[::-1]}), digest(changed={"prefix": "p "}),
        digest(changed={"label_column": "text", "column": "label"}), digest(clean={"whitespace": True}),
        digest(dedup={"near": 0.9}), digest(dedup={"near": 0.8}), digest(tokenizer={"kind": "chars"}),
    ]  # fmt: skip
    assert len(same) == 1 and len({*same, *others}) == 1 + len(others)


def test_changed_text_is_stale(tmp_path: Path) -> None:
    config = config_of(tmp_path, "classification", [reviews(tmp_path / "a.tsv", labels=["0", "1"])])
    with pytest.raises(DataError, match="not prepared with this tokenizer"):
        open_prepared(config)
    prepare(config)
    reviews(tmp_path / "a.tsv", labels=["0", "1"], count=41)
    with pytest.raises(DataError, match="stale, the text has changed"):
        open_prepared(config)


@pytest.mark.parametrize("name", ["labels.npy", "facts.json", "text.bin", "text.idx", "other labels", "other store"])
def test_a_store_that_was_tampered_with(tmp_path: Path, name: str) -> None:
    config = config_of(tmp_path, "classification", [reviews(tmp_path / "a.tsv", labels=["0", "1"])])
    folder = prepare(config).tokenizer_folder.parent / "train-000"
    if name == "other labels":
        np.save(folder / "labels.npy", np.zeros(3, dtype=np.int64))
    elif name == "other store":
        write_store(folder / "text", [np.array([1, 2])], dtype=dtype_for(300))
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    with pytest.raises(DataError) as error:
        open_prepared(config)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def in_child(function: Callable[[], Any]) -> int:
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def test_killed_anywhere_and_started_again(tmp_path: Path) -> None:
    """SIGKILL before each rename and flush of a preparation, one after another."""
    sources = [reviews(tmp_path / f"{name}.tsv", labels=["0", "1"], count=30) for name in "ab"]

    def config(store: str) -> Config:
        held = {"sources": sources[1:]}
        return config_of(tmp_path, "classification", sources[:1], validation=held, store=str(tmp_path / store))

    expected = files_of(prepare(config("expected")))

    def die_at(point: int) -> None:
        calls = 0
        for name in ("rename", "replace", "fsync"):
            real = getattr(os, name)

            def dying(*args: Any, real: Any = real) -> Any:
                nonlocal calls
                calls += 1
                if calls > point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)

            setattr(os, name, dying)
        prepare(config(f"store-{point}"))

    for point in range(60):
        code = in_child(lambda point=point: die_at(point))  # type: ignore[misc]
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert files_of(prepare(config(f"store-{point}"))) == expected
        assert not list((tmp_path / f"store-{point}").glob(".preparing-*"))
    assert point >= 10


def test_what_was_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [reviews(tmp_path / f"{name}.tsv", labels=["0", "1"]) for name in "abc"]
    config, real, written = config_of(tmp_path, "classification", sources), examples_module._write, []

    def third_fails(rows: Any, folder: Path, **named: Any) -> None:
        if len(written) == 2:
            raise OSError("No space left on device")
        written.append(folder.name)
        real(rows, folder, **named)

    monkeypatch.setattr(examples_module, "_write", third_fails)
    with pytest.raises(OSError, match="No space left"):
        prepare(config)
    again: list[str] = []
    monkeypatch.setattr(examples_module, "_write", lambda rows, folder, **n: again.append(folder.name) or real(rows, folder, **n))
    prepare(config)
    assert written == ["train-000", "train-001"] and again == ["train-002"]


def reverse(batch: list[str]) -> list[str]:
    return [text[::-1] if "7" not in text else " " for text in batch]


def back_config(tmp_path: Path, task: str, source: dict[str, Any]) -> Config:
    augment = {"back_translation": 0.5, "translators": ["runs/a"]}
    return config_of(tmp_path, task, [source], validation={"sources": [source]}, augment=augment)


def test_back_translations(tmp_path: Path) -> None:
    source = {**parallel(tmp_path, count=10), "prefix": "go: "}
    config = back_config(tmp_path, "seq2seq", source)
    with pytest.raises(DataError, match=r"data\.augment\.back_translation: needs"):
        prepare(config)
    prepared = prepare(config, translate=reverse)
    backs = texts(prepared, "back")
    assert backs[3] == "go: " + "sentence 3 plot"[::-1] and backs[7] == "go: Satz 7 the"  # an empty one is not taken
    assert set(prepared.validation_examples[0].fields) == {"text", "target"}
    assert open_prepared(config).digest == prepared.digest
    without = prepare(config_of(tmp_path, "seq2seq", [source], validation={"sources": [source]}))
    assert without.digest != prepared.digest and "back" not in without.examples[0].fields
    labelled = prepare(back_config(tmp_path, "classification", reviews(tmp_path / "a.tsv", labels=["0", "1"])), translate=reverse)
    assert texts(labelled, "back")[1] == texts(labelled, "text")[1][::-1]


def test_translations_survive_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples_module, "TRANSLATED_AT_ONCE", 4)
    config, asked = back_config(tmp_path, "seq2seq", parallel(tmp_path, count=10)), []

    def fails(batch: list[str]) -> list[str]:
        if len(asked) == 8:
            raise KeyboardInterrupt
        asked.extend(batch)
        return reverse(batch)

    with pytest.raises(KeyboardInterrupt):
        prepare(config, translate=fails)
    (file,) = (tmp_path / "store").glob(".preparing-*/train-000.back.jsonl")
    with file.open("a") as torn:
        torn.write('"half a li')
    again: list[str] = []
    prepared = prepare(config, translate=lambda batch: again.extend(batch) or reverse(batch))  # type: ignore[func-returns-value]
    assert again == [f"sentence {i} {WORDS[i % 11]}" for i in (8, 9)]
    assert texts(prepared, "back")[8] == "sentence 8 acting"[::-1]


def test_other_rows_for_the_same_task(tmp_path: Path) -> None:
    source = reviews(tmp_path / "a.tsv", labels=["neg", "pos"])
    config = config_of(tmp_path, "classification", [source], clean={"whitespace": True})
    prepared = prepare(config)
    options: dict[str, Any] = {"tokenizer_folder": prepared.tokenizer_folder, "labels": prepared.labels}
    other = SourceConfig(**table(tmp_path / "b.tsv", [("x  y", "pos"), ("z", "neg")], header="text label"))
    store = encode_source(other, config, folder=tmp_path / "new", **options)
    assert store.labels is not None and store.labels.tolist() == [1, 0] and bytes(store.ids("text", 0).tolist()) == b"x y"
    bare = SourceConfig(**table(tmp_path / "c.tsv", [("x",)], header="text"))
    assert encode_source(bare, config, folder=tmp_path / "bare", labelled=False, **options).labels is None
    with pytest.raises(DataError, match="no column 'label'"):
        encode_source(bare, config, folder=tmp_path / "none", **options)
    bad = SourceConfig(**table(tmp_path / "d.tsv", [("x", "new")], header="text label"))
    with pytest.raises(DataError, match=r"d\.tsv, line 2: the label 'new'"):
        encode_source(bad, config, folder=tmp_path / "none", **options)
    assert not list(tmp_path.glob("none*"))


# --- sft -----------------------------------------------------------------------------------------------------------------

TURNS = [("user", "Hi there"), ("assistant", "Hello!"), ("user", "2 + 3?"), ("assistant", "It is 5.")]
MARKED = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def chats(path: Path, conversations: list[list[tuple[str, str]]]) -> dict[str, Any]:
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in conversations]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"kind": "jsonl", "path": str(path), "messages_column": "messages"}


def learned(prepared: Prepared, index: int = 0) -> tuple[str, str]:
    """A conversation as text, and the text that is to be learned."""
    tokenizer = AutoTokenizer.from_pretrained(str(prepared.tokenizer_folder))
    store = prepared.examples[0]
    ids, flags = store.ids("text", index), store.ids("flags", index)
    assert len(ids) == len(flags) and set(flags.tolist()) <= {0, 1}
    return tokenizer.decode(ids), tokenizer.decode(ids[flags == 1])


def test_a_chat_in_the_plain_form(tmp_path: Path) -> None:
    source = chats(tmp_path / "a.jsonl", [TURNS, [("system", "Be <pad> brief."), *TURNS[:2], ("user", "Bye")]])
    for kind in ("bytes", "bpe"):
        prepared = prepare(config_of(tmp_path, "sft", [source], tokenizer={"kind": kind, "vocab_size": 270}))
        end = "<|endoftext|>"
        whole, wanted = learned(prepared)
        assert whole == f"User: Hi there\nAssistant: Hello!{end}\nUser: 2 + 3?\nAssistant: It is 5.{end}"
        assert wanted == f" Hello!{end} It is 5.{end}"
        tokenizer = AutoTokenizer.from_pretrained(str(prepared.tokenizer_folder))
        assert prepared.examples[0].ids("text", 0)[-1] == tokenizer.eos_token_id
        assert tokenizer.pad_token_id not in prepared.examples[0].ids("text", 1)
        whole_other = f"System: Be <pad> brief.\nUser: Hi there\nAssistant: Hello!{end}\nUser: Bye\n"
        assert learned(prepared, 1) == (whole_other, f" Hello!{end}")
        messages = [{"role": role, "content": text} for role, text in TURNS[:3]]
        prompt = prompt_text(messages, tokenizer)
        assert whole.startswith(prompt) and prompt.endswith("2 + 3?\nAssistant:")


def test_prompts_and_responses(tmp_path: Path) -> None:
    source = table(tmp_path / "a.tsv", [("Say hi", "hi"), ("Say ho", "ho")], header="prompt response")
    source |= {"column": "prompt", "target_column": "response", "prefix": "Do: "}
    prepared = prepare(config_of(tmp_path, "sft", [source]))
    assert learned(prepared, 1) == ("User: Do: Say ho\nAssistant: ho<|endoftext|>", " ho<|endoftext|>")
    assert set(prepared.examples[0].fields) == {"text", "flags"} and prepared.labels == {}


def with_template(tmp_path: Path, template: str) -> Path:
    """A tokenizer folder with a chat template."""
    made = prepare(config_of(tmp_path, "sft", [chats(tmp_path / "t.jsonl", [TURNS])])).tokenizer_folder
    tokenizer = AutoTokenizer.from_pretrained(str(made))
    tokenizer.chat_template = template
    folder = tmp_path / f"template-{len(list(tmp_path.iterdir()))}"
    tokenizer.save_pretrained(str(folder))
    return folder


def test_chat_templates(tmp_path: Path) -> None:
    source, digests = chats(tmp_path / "a.jsonl", [TURNS]), set()
    for template in (MARKED, UNMARKED):
        tokenizer = {"kind": "hf", "path": str(with_template(tmp_path, template))}
        prepared = prepare(config_of(tmp_path, "sft", [source], tokenizer=tokenizer))
        whole, wanted = learned(prepared)
        assert whole.startswith("<s>user\nHi there<|endoftext|>\n<s>assistant\nHello!<|endoftext|>\n")
        assert wanted == "Hello!<|endoftext|>It is 5.<|endoftext|>"
        loaded = AutoTokenizer.from_pretrained(str(prepared.tokenizer_folder))
        assert int((prepared.examples[0].ids("text", 0) == loaded.eos_token_id).sum()) == 4
        digests.add(prepared.digest)
    assert len(digests) == 2  # the template decides the bytes


def test_a_template_that_does_not_take_a_chat(tmp_path: Path) -> None:
    source = chats(tmp_path / "a.jsonl", [TURNS, [("user", "x"), ("user", "y"), ("assistant", "z")]])
    strict = "{% if messages[1]['role'] != 'assistant' %}{{ raise_exception('roles must alternate') }}{% endif %}" + MARKED
    folder = with_template(tmp_path, strict)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the tokenizer's chat template does not take .*roles must alternate"):
        prepare(config_of(tmp_path, "sft", [source], tokenizer={"kind": "hf", "path": str(folder)}))
    forgetful = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    encode = load_chat_encoder(with_template(tmp_path, forgetful))
    rows = list(read_rows(SourceConfig(**source), kind="sft"))
    with pytest.raises(DataError, match=r"line 1: .*writes the turns before or in message 2 otherwise"):
        encode(rows[:1])


def test_progress_and_the_older_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = config_of(tmp_path, "classification", [reviews(tmp_path / "a.tsv", labels=["0", "1"])])
    prepare(config, progress=True)
    assert "tokenising: done in" in caplog.text
    assert prepare_module.prepare(config).digest == open_prepared(config).digest
