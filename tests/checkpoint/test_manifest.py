from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distllm.checkpoint import manifest as m
from distllm.checkpoint.durable import FileRecord
from distllm.checkpoint.find import check
from distllm.config.errors import CheckpointError
from tests.checkpoint.conftest import ABOUT, write_two


def rewrite(folder: Path, change: Any) -> None:
    """Forge a manifest: the digest is right, the content is changed by `change(raw)`."""
    raw = json.loads((folder / m.MANIFEST).read_bytes())
    del raw["digest"]
    change(raw)
    raw["digest"] = m.hashlib.sha256(m.to_json(raw)).hexdigest()
    (folder / m.MANIFEST).write_bytes(m.to_json(raw))


def test_a_manifest_and_a_record_read_back_exactly(folder: Path) -> None:
    path = write_two(folder)
    manifest = m.read_manifest(path)
    assert m.manifest_json(manifest) == (path / m.MANIFEST).read_bytes()
    assert manifest.facts == ABOUT["facts"] and manifest.config_digest == "abc" and manifest.world_size == 2
    content = (path / "rank-00001.json").read_bytes()
    assert m.record_json(m.parse_record(content, where=path)) == content


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "", "a\nb", "a\x00b"])
def test_a_file_name_that_leads_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    path = write_two(folder)
    (folder / "secret").write_bytes(b"")
    rewrite(path, lambda raw: raw["files"].update({name: {"size": 0, "sha256": m.hashlib.sha256().hexdigest()}}))
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        check(path)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "config.yaml", "manifest.json"])
def test_a_link_is_refused_even_when_what_it_leads_to_is_right(folder: Path, name: str) -> None:
    path = write_two(folder)
    os.rename(path / name, folder / "elsewhere")
    os.symlink(folder / "elsewhere", path / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a plain file"):
        check(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("tensors"),
        lambda raw: raw.update(step="1"),
        lambda raw: raw.update(step=-1),
        lambda raw: raw.update(step=True),
        lambda raw: raw.update(files=[]),
        lambda raw: raw.update(world_size=3),
        lambda raw: raw.update(facts=None),
        lambda raw: raw["files"].pop("rank-00001.safetensors"),
        lambda raw: raw["tensors"]["model.w"].update(shape=[3, 5]),
        lambda raw: raw["tensors"]["model.w"].update(shape=[7]),
        lambda raw: raw["tensors"]["model.w"]["pieces"][0].update(offset=[5, 0]),
        lambda raw: raw["tensors"]["model.w"]["pieces"][0].update(offset=[-1, 0]),
        lambda raw: raw["tensors"]["model.w"]["pieces"][0].update(sizes=[4, "5"]),
        lambda raw: raw["tensors"]["model.w"]["pieces"][0].update(file="other.safetensors"),
        lambda raw: raw["tensors"].update({"model.w": 3}),
    ],
)
def test_what_cannot_be_is_one_clear_line(folder: Path, change: Any) -> None:
    path = write_two(folder)
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a manifest of distllm") as raised:
        m.read_manifest(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"3", b"\xff\xfe", b"{" * 10, b"[" * 100_000, b'{"digest": 3}', b'{"digest": "x"}']
)
def test_what_is_no_manifest_is_one_clear_line(folder: Path, content: bytes) -> None:
    path = write_two(folder)
    (path / m.MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: (torn or changed|changed since)"):
        m.read_manifest(path)


def test_white_space_and_an_edit_are_noticed(folder: Path) -> None:
    path = write_two(folder)
    good = (path / m.MANIFEST).read_bytes()
    for content in (good + b"\n", b" " + good, good[:-1], good.replace(b'"step":1', b'"step":2'), good + good):
        (path / m.MANIFEST).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            m.read_manifest(path)


def test_a_later_format_is_refused_but_not_called_damaged(folder: Path) -> None:
    path = write_two(folder)
    rewrite(path, lambda raw: raw.update(format=2, surprise=1))
    with pytest.raises(m.NewerFormat, match="format 2"):
        m.read_manifest(path)


def test_a_pickle_in_the_folder_is_never_opened(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "exploded"),)

    path = write_two(folder)
    for name in (".metadata", "extra.pkl", "model.pt", "rank-00002.safetensors"):
        (path / name).write_bytes(pickle.dumps(Bomb()))
    check(path)
    for name in ("rank-00000.safetensors", "manifest.json", "config.yaml"):
        (path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError):
            check(path)
    assert not (folder / "exploded").exists()


def test_facts_must_be_json() -> None:
    manifest = m.Manifest(1, 1, {}, "", {}, {"rank-00000.safetensors": FileRecord(0, "")}, {}, ((),))
    with pytest.raises(ValueError, match="JSON"):
        m.manifest_json(replace(manifest, facts={"loss": float("nan")}))
