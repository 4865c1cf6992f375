from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from distllm.checkpoint import durable
from tests.checkpoint.conftest import manager, save


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is written, fsynced and renamed, in order: (call, path)."""
    calls: list[tuple[str, str]] = []

    def of_fd(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(fd: int, *args: object) -> object:
            calls.append((name, os.readlink(f"/proc/self/fd/{fd}")))
            return real(fd, *args)

        return call

    def rename(old: Path, new: Path, real: Callable[..., None] = os.rename) -> None:
        calls.append(("rename", f"{old} -> {new}"))
        real(old, new)

    monkeypatch.setattr(os, "write", of_fd("write", os.write))
    monkeypatch.setattr(os, "fsync", of_fd("fsync", os.fsync))
    monkeypatch.setattr(os, "rename", rename)
    return calls


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="paths of open files come from /proc")
def test_all_is_on_the_disk_before_the_rename_and_the_rename_before_a_deletion(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = manager(folder, keep=1)
    save(kept, 1)
    kept.wait()
    calls = record_calls(monkeypatch)
    save(kept, 2)
    kept.wait()
    temporary = folder / ".tmp-step-2-a-2"
    placed = calls.index(("rename", f"{temporary} -> {folder / 'step-2'}"))
    written = {path for call, path in calls if call == "write"}
    assert {Path(p).name.strip(".").removesuffix(".part") for p in written} == {
        "rank-00000.safetensors", "rank-00000.json", "config.yaml", "manifest.json"
    }  # fmt: skip
    for path in written:
        last_write = max(i for i, call in enumerate(calls) if call == ("write", path))
        assert last_write < calls.index(("fsync", path)) < placed, path
    assert calls[placed - 1] == ("fsync", str(temporary)) and calls[placed + 1] == ("fsync", str(folder))
    record = next(i for i, (call, what) in enumerate(calls) if call == "rename" and what.endswith("/rank-00000.json"))
    assert calls.index(("fsync", str(temporary / "rank-00000.safetensors"))) < record
    assert calls.index(("fsync", str(temporary))) < record, "the data's name is on the disk before the rank says so"
    trashed = next(i for i, (call, what) in enumerate(calls) if call == "rename" and "/.trash-step-1" in what)
    assert trashed > placed + 1


def test_a_file_is_written_in_blocks_and_never_over_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "BLOCK", 7)
    parts = [b"", bytes(range(50)), memoryview(b"abc"), b"x" * 14]
    record = durable.write_file(tmp_path / "file", parts)
    content = b"".join(bytes(p) for p in parts)
    assert (tmp_path / "file").read_bytes() == content
    assert record == durable.FileRecord(len(content), hashlib.sha256(content).hexdigest())
    with pytest.raises(FileExistsError):
        durable.write_file(tmp_path / "file", [b""])


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    durable.write_file(tmp_path / "file", [bytes(range(100))])
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


@pytest.mark.parametrize(("code", "fails"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_without_fsync_is_no_error_and_a_failed_fsync_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fails: bool
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    if fails:
        with pytest.raises(OSError, match="Input/output error"):
            durable.write_file(tmp_path / "file", [b"x"])
    else:
        durable.write_file(tmp_path / "file", [b"x"])
        durable.sync_folder(tmp_path)
