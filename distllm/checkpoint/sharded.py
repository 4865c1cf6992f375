"""The tensors of a checkpoint: each rank writes its pieces in one safetensors file, and any layout reads them back.

Why not torch's own distributed checkpoint (DCP): its `.metadata` is a pickle, which runs code when it is loaded, and
its files carry no digests, so a flipped bit trains on. Here a rank writes `rank-00000.safetensors` with the chunks for
which it is responsible, each under the tensor's own name, and JSON (manifest.py) says which box of which tensor lies
where. There is no pickle, and any program that knows safetensors can open the files.

A reader takes of each file only the boxes that it needs, so a layout reads what another layout wrote without a
conversion and without a whole tensor in memory.

Layout of a file (https://github.com/huggingface/safetensors#format): 8 bytes with the length of the header, the header
in JSON, then the values, little-endian, without gaps. We write it ourselves, because then the digest is taken and the
file brought to the disk while the values are at hand; reading is left to the safetensors library.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from distllm.checkpoint.chunk import Chunk
from distllm.checkpoint.durable import sync_folder, write_file
from distllm.checkpoint.manifest import (
    Manifest,
    Piece,
    RankRecord,
    TensorRecord,
    overlapping,
    plain_file,
    rank_file,
)
from distllm.config.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The number formats of a checkpoint, with safetensors' names for them."""

_RNG = "rng/"
_TOLD = 5  # names in an error message


def tensor_name(key: str) -> str:
    """The tensor that a chunk belongs to: a rank's several boxes of one tensor are `NAME#0`, `NAME#1`, ..."""
    return key.partition("#")[0]


def write_rank(folder: Path, *, rank: int, chunks: Mapping[str, Chunk], rng: Mapping[str, torch.Tensor]) -> RankRecord:
    """Write one rank's pieces and random-number states and bring them to the disk.

    Args:
        folder: an existing folder, the same for all ranks.
        rank: this rank's number; its file must not exist.
        chunks: the state by name; only those with `write` are written. On any device.
        rng: this rank's random-number states by name.

    Returns:
        What was written, for the manifest.

    Raises:
        OSError: the disk does not take it.
    """
    name = rank_file(rank)
    mine = {key: chunk for key, chunk in chunks.items() if chunk.write}
    tensors = {key: chunk.data for key, chunk in mine.items()} | {_RNG + key: value for key, value in rng.items()}
    assert len(tensors) == len(mine) + len(rng) and "__metadata__" not in tensors, "a tensor's name is reserved"
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # wide first: every value is aligned
    record = write_file(folder / name, _content({key: tensors[key] for key in order}))
    sync_folder(folder)
    pieces: dict[str, list[Piece]] = {}
    for key, chunk in chunks.items():
        if chunk.write or not prod(chunk.shape):  # nobody writes a tensor without values, but it is part of the state
            piece = [Piece(name, key, chunk.offset, tuple(chunk.data.shape))] if chunk.write else []
            pieces.setdefault(tensor_name(key), []).extend(piece)
    kinds = {tensor_name(key): (chunk.shape, DTYPES[chunk.data.dtype]) for key, chunk in chunks.items()}
    table = {tensor: TensorRecord(*kinds[tensor], tuple(found)) for tensor, found in pieces.items()}
    return RankRecord(rank, {name: record}, table, tuple(rng))


def merge(records: Iterable[RankRecord]) -> dict[str, TensorRecord]:
    """One table of tensors from what the ranks have written."""
    table: dict[str, TensorRecord] = {}
    pieces: dict[str, list[Piece]] = {}
    for record in records:
        for name, tensor in record.tensors.items():
            seen = table.setdefault(name, tensor)
            assert (seen.shape, seen.dtype) == (tensor.shape, tensor.dtype), f"ranks disagree on what {name} is"
            pieces.setdefault(name, []).extend(tensor.pieces)
    return {name: TensorRecord(t.shape, t.dtype, tuple(pieces[name])) for name, t in table.items()}


def check_fit(manifest: Manifest, chunks: Mapping[str, Chunk], *, where: Path, expected: Collection[str]) -> None:
    """Refuse a checkpoint of another model or optimizer, before a value is changed.

    Args:
        manifest: of the checkpoint.
        chunks: this rank's state.
        where: the checkpoint's folder, for the message.
        expected: the names that all ranks hold together.

    Raises:
        CheckpointError: one line with up to five names of each kind: missing, unexpected, of another shape or format.
    """
    table, chunks = manifest.tensors, {tensor_name(key): chunk for key, chunk in chunks.items()}
    both = [n for n in sorted(chunks) if n in table]
    here = set(map(tensor_name, expected))
    shaped = [n for n in both if table[n].shape != tuple(chunks[n].shape)]
    shapes = [f"{n} {_shape(table[n].shape)} (here {_shape(chunks[n].shape)})" for n in shaped]
    dtypes = [f"{n} {table[n].dtype} (here {_dtype(chunks[n])})" for n in both if table[n].dtype != _dtype(chunks[n])]
    problems = {
        "the checkpoint does not have": sorted((here | chunks.keys()) - table.keys()),
        "this run does not have": sorted(table.keys() - here - chunks.keys()),
        "other shape:": shapes,
        "other number format:": dtypes,
    }
    told = [f"{kind} {_list(names)}" for kind, names in problems.items() if names]
    if told:
        raise CheckpointError(f"{where}: the checkpoint is of another model or optimizer: {'; '.join(told)}")


def read(
    folder: Path, manifest: Manifest, chunks: Mapping[str, Chunk], *, expected: Collection[str] | None = None
) -> None:
    """Fill `chunk.data` of every chunk in place, from whatever layout wrote the checkpoint.

    Args:
        folder: the checkpoint's folder.
        manifest: its manifest; its files' digests have been checked.
        chunks: this rank's state by name; `write` plays no part.
        expected: the names that all ranks hold together; default: this rank's.

    Raises:
        CheckpointError: the checkpoint is of another model, does not cover a chunk, or a file is not what the
            manifest says.
    """
    check_fit(manifest, chunks, where=folder, expected=chunks.keys() if expected is None else expected)
    plan: dict[str, list[tuple[Piece, torch.Tensor, tuple[slice, ...]]]] = {}
    for name, chunk in chunks.items():
        found = _overlaps(manifest.tensors[tensor_name(name)], chunk)
        covered = sum(prod(s.stop - s.start for s in there) for _, _, there in found)
        if covered != chunk.data.numel() or overlapping(piece for piece, _, _ in found):
            raise CheckpointError(f"{folder}: the pieces of {name} do not cover it exactly once")
        for piece, here, there in found:
            plan.setdefault(piece.file, []).append((piece, chunk.data.detach()[here], there))
    for file in sorted(plan):
        _read_file(plain_file(folder, file), plan[file])


def read_full(folder: Path, manifest: Manifest, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Read tensors whole, one at a time, onto the CPU; in one process, whatever number of ranks wrote them."""
    of_code = {code: dtype for dtype, code in DTYPES.items()}
    for name in names:
        record = manifest.tensors[name]
        if record.dtype not in of_code:
            raise CheckpointError(f"{folder}: {name} has the unknown number format {record.dtype}")
        tensor = torch.empty(record.shape, dtype=of_code[record.dtype])
        chunk = Chunk(tensor, record.shape, (0,) * len(record.shape), False)
        read(folder, manifest, {name: chunk}, expected=manifest.tensors.keys())
        yield name, tensor


def read_rng(folder: Path, manifest: Manifest, *, rank: int) -> dict[str, torch.Tensor]:
    """The random-number states that a rank saved."""
    path = plain_file(folder, rank_file(rank))
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(_RNG + name).clone() for name in manifest.rng[rank]}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_line(error)}") from error


def _content(tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """A safetensors file in parts: the header, then each tensor's values; one on a GPU is fetched when its turn comes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _overlaps(record: TensorRecord, chunk: Chunk) -> list[tuple[Piece, tuple[slice, ...], tuple[slice, ...]]]:
    """The pieces that share indices with the chunk: (piece, slices of the chunk, slices of the piece)."""
    found = []
    for piece in record.pieces:
        begin = [max(a, b) for a, b in zip(piece.offset, chunk.offset, strict=True)]
        end = [
            min(a + n, b + m)
            for a, n, b, m in zip(piece.offset, piece.sizes, chunk.offset, chunk.data.shape, strict=True)
        ]
        if all(a < b for a, b in zip(begin, end, strict=True)):
            here = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, chunk.offset, strict=True))
            there = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, piece.offset, strict=True))
            found.append((piece, here, there))
    return found


def _read_file(path: Path, parts: Iterable[tuple[Piece, torch.Tensor, tuple[slice, ...]]]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            for piece, target, there in parts:
                lazy = file.get_slice(piece.key)
                if tuple(lazy.get_shape()) != piece.sizes or lazy.get_dtype() != DTYPES[target.dtype]:
                    raise CheckpointError(f"{path}: {piece.key} is not what the manifest says")
                whole = all(s.stop - s.start == n for s, n in zip(there, piece.sizes, strict=True))
                # The whole piece is a view of the mapped file; a slice is cut out of it by the library, only its bytes.
                target.copy_(file.get_tensor(piece.key) if whole else lazy[there])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_line(error)}") from error


def _dtype(chunk: Chunk) -> str:
    return DTYPES[chunk.data.dtype]


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _list(names: list[str]) -> str:
    more = len(names) - _TOLD
    return ", ".join(names[:_TOLD]) + (f" and {more} more" if more > 0 else "")


def _line(error: BaseException) -> str:
    return str(error).replace("\n", " ")[:300]
