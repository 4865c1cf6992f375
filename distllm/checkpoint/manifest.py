"""The manifest: what a checkpoint folder must hold to be one, as JSON that is checked to the last bit.

`manifest.json` names every file with its size and sha256, and says for every tensor which box of it lies in which file.
It ends in a digest of itself, and its bytes must be exactly what we would write for its content, so that no flipped bit
of it goes unnoticed, not even in white space. The digest shows damage, not forgery: a forger can compute it too, so
nothing in a manifest is trusted further than its types and bounds reach, and a name in it is a plain file of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from distllm.checkpoint.durable import BLOCK, FileRecord
from distllm.config.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
CONFIG = "config.yaml"

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # one component: no '/', no '..', nothing hidden
_LARGEST_MANIFEST = 1 << 30  # bytes; a folder that holds a larger one is not ours


class NewerFormat(CheckpointError):
    """A whole checkpoint of a later distllm: refused, but not damaged."""


@dataclass(frozen=True)
class Piece:
    """The box [offset, offset + sizes) of a tensor, in indices of the global tensor, and where it lies."""

    file: str
    key: str
    """Its name in the safetensors file."""
    offset: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class TensorRecord:
    """A global tensor and its pieces, which cover it exactly once."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, I64, ..."""
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class RankRecord:
    """What one rank has written."""

    rank: int
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]
    rng: tuple[str, ...]
    """Names of the rank's random-number states; in its file under `rng/NAME`."""


@dataclass(frozen=True)
class Manifest:
    """A whole checkpoint, without the numbers."""

    step: int
    world_size: int
    layout: dict[str, Any]
    """Sizes of the mesh axes, as given to `save`."""
    config_digest: str
    facts: dict[str, Any]
    """Whatever else the run needs to continue, as JSON."""
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]
    rng: tuple[tuple[str, ...], ...]
    """Names of the random-number states of each rank."""


def rank_file(rank: int) -> str:
    """The name of the file with a rank's tensors."""
    return f"rank-{rank:05d}.safetensors"


def record_file(rank: int) -> str:
    """The name of the file by which a rank says that its tensors are on the disk."""
    return f"rank-{rank:05d}.json"


def to_json(value: Any) -> bytes:
    """The one way we write JSON: sorted keys, ASCII, no NaN, a final newline."""
    return (json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")) + "\n").encode("ascii")


def record_json(record: RankRecord) -> bytes:
    """A rank's record as the content of its file."""
    return to_json(asdict(record))


def parse_record(content: bytes, *, where: Path) -> RankRecord:
    """The opposite of `record_json`; CheckpointError names the file if it is not one."""
    try:
        raw = json.loads(content)
        rng = tuple(str(n) for n in raw["rng"])
        return RankRecord(int(raw["rank"]), _files(raw["files"]), _tensors(raw["tensors"]), rng)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a record of a rank ({_reason(error)})") from error


def manifest_json(manifest: Manifest) -> bytes:
    """The content of `manifest.json`, digest included."""
    body = {"format": FORMAT, **asdict(manifest)}
    return to_json({**body, "digest": hashlib.sha256(to_json(body)).hexdigest()})


def read_manifest(folder: Path) -> Manifest:
    """Read and check a checkpoint's manifest; the other files are not touched.

    Raises:
        CheckpointError: it is missing, torn, changed, of a later format, or says what cannot be; names the file.
    """
    path = folder / MANIFEST
    content = b"".join(_blocks(path, limit=_LARGEST_MANIFEST))
    try:
        raw = json.loads(content)
        digest = raw.pop("digest")
        whole = hashlib.sha256(to_json(raw)).hexdigest() == digest and to_json({**raw, "digest": digest}) == content
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: torn or changed ({_reason(error)})") from error
    if not whole:
        raise CheckpointError(f"{path}: changed since it was written (its digest does not match)")
    if raw.get("format") != FORMAT:
        given = raw.get("format")
        raise NewerFormat(f"{path}: format {given}, and this distllm reads {FORMAT}; use the version that wrote it")
    try:
        manifest = _manifest(raw)
        _bounds(manifest)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a manifest of distllm ({_reason(error)})") from error
    return manifest


def check_files(folder: Path, files: Mapping[str, FileRecord], names: Iterable[str]) -> Iterator[None]:
    """Check files against their records, one block at each step of the iterator, so that a caller can stop to breathe.

    Raises:
        CheckpointError: names the first file that is missing, a link, of another size or of another content.
        OSError: a file cannot be read, which says nothing about its content.
    """
    for name in names:
        path, record = folder / name, files[name]
        digest, size = hashlib.sha256(), 0
        for block in _blocks(path, limit=record.size):
            digest.update(block)
            size += len(block)
            yield
        if size != record.size:
            raise CheckpointError(f"{path}: {size} bytes, and {record.size} were written: the file is torn")
        if digest.hexdigest() != record.sha256:
            raise CheckpointError(f"{path}: changed since it was written (its sha256 does not match)")


def plain_file(folder: Path, name: str) -> Path:
    """The path of a file that a manifest names, if it is a plain file of that folder.

    Raises:
        CheckpointError: it is missing, or a link or device that could lead elsewhere.
    """
    path = folder / name
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a plain file")
    return path


def uncovered(record: TensorRecord) -> str | None:
    """Why the pieces do not cover the tensor exactly once, or None."""
    full = sum(prod(p.sizes) for p in record.pieces)
    if full != prod(record.shape):
        return f"its pieces hold {full} of {prod(record.shape)} values"
    return "two of its pieces overlap" if overlapping(record.pieces) else None


def overlapping(pieces: Iterable[Piece]) -> bool:
    """Whether any two boxes share an index; a sweep over the first dim, so thousands of row shards cost nothing."""
    boxes = sorted((p for p in pieces if prod(p.sizes)), key=lambda p: p.offset)
    for i, box in enumerate(boxes):
        for other in boxes[i + 1 :]:
            if box.offset and other.offset[0] >= box.offset[0] + box.sizes[0]:
                break
            dims = zip(box.offset, box.sizes, other.offset, other.sizes, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in dims):
                return True
    return False


def _blocks(path: Path, *, limit: int) -> Iterator[bytes]:
    """The content of a plain file in blocks, at most one block more than `limit` bytes."""
    plain_file(path.parent, path.name)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    size = 0
    try:
        while size <= limit and (block := os.read(fd, BLOCK)):
            size += len(block)
            yield block
    finally:
        os.close(fd)


def _manifest(raw: dict[str, Any]) -> Manifest:
    return Manifest(
        step=_count(raw["step"]),
        world_size=_count(raw["world_size"]),
        layout=_mapping(raw["layout"]),
        config_digest=str(raw["config_digest"]),
        facts=_mapping(raw["facts"]),
        files=_files(raw["files"]),
        tensors=_tensors(raw["tensors"]),
        rng=tuple(tuple(str(n) for n in names) for names in raw["rng"]),
    )


def _bounds(manifest: Manifest) -> None:
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"file name {name!r} leads out of the folder")
    for name, record in manifest.tensors.items():
        for piece in record.pieces:
            if piece.file not in manifest.files:
                raise ValueError(f"{name} lies in a file without a digest, {piece.file!r}")
            if not len(piece.offset) == len(piece.sizes) == len(record.shape):
                raise ValueError(f"{name} has a piece of another number of dims")
            if any(o + n > full for o, n, full in zip(piece.offset, piece.sizes, record.shape, strict=True)):
                raise ValueError(f"{name} has a piece outside of its shape")
    size = manifest.world_size
    if len(manifest.rng) != size or any(rank_file(rank) not in manifest.files for rank in range(size)):
        raise ValueError(f"it does not name a file for each of its {size} ranks")


def _files(raw: Any) -> dict[str, FileRecord]:
    return {str(n): FileRecord(_count(r["size"]), str(r["sha256"])) for n, r in _mapping(raw).items()}


def _tensors(raw: Any) -> dict[str, TensorRecord]:
    return {
        str(name): TensorRecord(
            _counts(r["shape"]),
            str(r["dtype"]),
            tuple(Piece(str(p["file"]), str(p["key"]), _counts(p["offset"]), _counts(p["sizes"])) for p in r["pieces"]),
        )
        for name, r in _mapping(raw).items()
    }


def _mapping(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise TypeError(f"an object was expected, not {type(raw).__name__}")
    return raw


def _count(raw: Any) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or raw < 0:
        raise TypeError(f"a count was expected, not {raw!r}")
    return raw


def _counts(raw: Any) -> tuple[int, ...]:
    if not isinstance(raw, list):
        raise TypeError(f"a list of counts was expected, not {type(raw).__name__}")
    return tuple(_count(r) for r in raw)


def _reason(error: BaseException) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error).replace("\n", " ")[:200]
