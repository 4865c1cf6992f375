"""The token store: Megatron's indexed data set, a `.bin` file of token ids and an `.idx` file that says where documents are.

The `.idx` file, little-endian: magic `MMIDIDX\\0\\0`, version u64 = 1, dtype code u8, number of sequences u64, number of
document indices u64 (documents + 1), then sequence lengths i32, sequence pointers i64 (bytes into `.bin`) and document
indices i64 (first sequence of each document, and the number of sequences at the end). Format of Megatron-LM's
`megatron/core/datasets/indexed_dataset.py`.

Nothing is read when a store is opened but headers and a few values: the arrays stay memory-mapped, and a position is
found by bisection, so a store of 10^12 tokens opens and seeks like a small one.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distllm.config.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"), 2: np.dtype("i1"), 3: np.dtype("<i2"), 4: np.dtype("<i4"), 5: np.dtype("<i8"),
    6: np.dtype("<f8"), 7: np.dtype("<f4"), 8: np.dtype("<u2"),
}  # fmt: skip
UINT16_VOCAB = 65_500  # below it Megatron's own tools choose uint16
LONGEST_SEQUENCE = 2**30  # lengths are int32; a longer document is written as several sequences
CHECKED_AT_OPEN = 1_000_000  # sequences up to which opening checks every pointer (10 ms)


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest number format that Megatron would choose for ids below `vocab_size`."""
    return DTYPES[8] if vocab_size < UINT16_VOCAB else DTYPES[4]


def prefix_of(path: str) -> Path:
    """The prefix of a store that the user names by it, or by one of its files."""
    return Path(path.removesuffix(".bin").removesuffix(".idx"))


def bin_path(prefix: Path) -> Path:
    """The file of token ids of the store at `prefix`."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The index file of the store at `prefix`."""
    return prefix.with_name(prefix.name + ".idx")


@dataclass(frozen=True)
class TokenStore:
    """An opened store. Positions are token numbers from the start of the `.bin` file."""

    prefix: Path
    dtype: np.dtype
    n_documents: int
    n_tokens: int
    lengths: np.ndarray
    """int32 [sequences], memory-mapped."""
    pointers: np.ndarray
    """int64 [sequences], bytes, memory-mapped (and not aligned: never hand it whole to a numpy function)."""
    document_indices: np.ndarray
    """int64 [n_documents + 1], memory-mapped."""
    tokens: np.ndarray
    """[n_tokens] of `dtype`, memory-mapped."""

    @staticmethod
    def open(prefix: Path) -> TokenStore:
        """Open the pair `prefix.bin`, `prefix.idx`, ours or Megatron's.

        Raises:
            DataError: a file is missing, not an index, truncated, or the two do not belong together.
        """
        idx, binary = idx_path(prefix), bin_path(prefix)
        for path in (idx, binary):
            if not path.is_file():
                raise DataError(f"{path}: no such file; a token store is a pair {prefix.name}.bin and {prefix.name}.idx")
        dtype, sequences, indices = _read_header(idx)
        start = HEADER.size
        need = start + sequences * 12 + indices * 8
        size = idx.stat().st_size
        if size not in (need, need + sequences):  # multimodal stores end with a mode byte for each sequence
            raise DataError(f"{idx}: {size} bytes, but its header needs {need}: the index is truncated or damaged; make it again")
        if binary.stat().st_size % dtype.itemsize:
            raise DataError(f"{binary}: {binary.stat().st_size} bytes are not whole {dtype.name} tokens: it is truncated")
        n_tokens = binary.stat().st_size // dtype.itemsize
        if not n_tokens or not sequences:
            raise DataError(f"{binary}: the store holds no tokens")
        raw = np.memmap(idx, mode="r", dtype=np.uint8).view(np.ndarray)  # a plain array is sliced 5 times as fast
        lengths = raw[start : start + sequences * 4].view("<i4")
        pointers = raw[start + sequences * 4 : start + sequences * 12].view("<i8")
        documents = raw[start + sequences * 12 : need].view("<i8")
        tokens = np.memmap(binary, mode="r", dtype=dtype).view(np.ndarray)
        store = TokenStore(prefix, dtype, indices - 1, n_tokens, lengths, pointers, documents, tokens)
        store.check(whole=sequences <= CHECKED_AT_OPEN)
        return store

    def check(self, *, whole: bool) -> None:
        """Check that the index describes the `.bin` file: its ends only, or `whole`, every sequence (1 s for 10^8)."""
        idx, item = idx_path(self.prefix), self.dtype.itemsize
        damaged = f"{idx}: the index is damaged or does not belong to {bin_path(self.prefix).name}"
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * item
        if int(self.pointers[0]) != 0 or end != self.n_tokens * item:
            raise DataError(f"{damaged}: it ends at byte {end}, the file at {self.n_tokens * item}; make the pair again")
        if int(self.document_indices[0]) != 0 or int(self.document_indices[-1]) != len(self.lengths):
            raise DataError(f"{damaged}: its documents do not cover its {len(self.lengths)} sequences; make the pair again")
        block = 1 << 22
        for first in range(0, len(self.lengths) if whole else 0, block):
            lengths = self.lengths[first : first + block].astype(np.int64)
            pointers = np.array(self.pointers[first : first + block + 1])
            steps = lengths[: len(pointers) - 1] * item
            if (lengths < 0).any() or not np.array_equal(np.diff(pointers), steps):
                raise DataError(f"{damaged}: its sequences do not follow one another; make the pair again")
        for first in range(0, self.n_documents if whole else 0, block):
            if (np.diff(np.array(self.document_indices[first : first + block + 1])) < 0).any():
                raise DataError(f"{damaged}: its documents are not in order; make the pair again")

    @property
    def offsets(self) -> np.ndarray:
        """The position where each document begins, and the number of tokens: int64 [n_documents + 1], made anew each time."""
        return self.offsets_of(0, self.n_documents + 1)

    def offsets_of(self, first: int, last: int) -> np.ndarray:
        """The entries [first, last) of `offsets`, int64, reading only their part of the index."""
        at = np.array(self.document_indices[first:last])
        if not len(at):
            return at
        low, high = int(at[0]), min(int(at[-1]) + 1, len(self.pointers))
        ends = np.append(np.array(self.pointers[low:high]) // self.dtype.itemsize, self.n_tokens)
        return np.where(at < len(self.pointers), ends[np.minimum(at - low, len(ends) - 1)], self.n_tokens)

    def starts_between(self, low: int, high: int) -> np.ndarray:
        """The positions p, low <= p < high, where a document begins: int64, by bisection."""
        item = self.dtype.itemsize
        sequences = bisect_left(self.pointers, low * item), bisect_left(self.pointers, high * item)
        documents = bisect_left(self.document_indices, sequences[0]), bisect_left(self.document_indices, sequences[1])
        return self.offsets_of(documents[0], documents[1])

    def read(self, start: int, length: int) -> np.ndarray:
        """The ids [start, start + length), a view of the file in its `dtype`."""
        return self.tokens[start : start + length]


def _read_header(idx: Path) -> tuple[np.dtype, int, int]:
    with idx.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{idx}: not a Megatron .idx file (it does not begin with MMIDIDX and a whole header)")
    _, version, code, sequences, indices = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{idx}: version {version} of the format; only version {VERSION} is known")
    if code not in DTYPES:
        raise DataError(f"{idx}: unknown dtype code {code}; known are {', '.join(map(str, DTYPES))}")
    if indices < 1:
        raise DataError(f"{idx}: the index holds no documents")
    return DTYPES[code], sequences, indices


def write_index(path: Path, *, document_lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the `.idx` file for documents that lie one after another in the `.bin` file.

    Args:
        path: the file to write; flushed to the disk.
        document_lengths: tokens of each document, int64 [documents].
        dtype: the number format of the `.bin` file.
    """
    code = next(c for c, d in DTYPES.items() if d == dtype)
    pieces = np.maximum(-(-document_lengths // LONGEST_SEQUENCE), 1)
    indices = np.concatenate([[0], np.cumsum(pieces)]).astype("<i8")
    lengths = np.full(int(indices[-1]), LONGEST_SEQUENCE, dtype=np.int64)
    lengths[indices[1:] - 1] = document_lengths - (pieces - 1) * LONGEST_SEQUENCE
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * dtype.itemsize
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(indices)))
        for values in (lengths.astype("<i4"), pointers.astype("<i8"), indices):
            file.write(values.tobytes())
        file.flush()
        os.fsync(file.fileno())


def write_store(prefix: Path, documents: Iterable[np.ndarray], *, dtype: np.dtype) -> None:
    """Write documents of token ids (1-d arrays) as the pair at `prefix`."""
    lengths = []
    with bin_path(prefix).open("wb") as file:
        for document in documents:
            file.write(np.ascontiguousarray(document, dtype=dtype).tobytes())
            lengths.append(len(document))
        file.flush()
        os.fsync(file.fileno())
    write_index(idx_path(prefix), document_lengths=np.array(lengths, dtype=np.int64), dtype=dtype)


def largest_id(store: TokenStore) -> int:
    """The largest id in the store; reads all of it, a block at a time.

    Raises:
        DataError: an id is negative.
    """
    block, largest = 1 << 24, 0
    for first in range(0, store.n_tokens, block):
        ids = store.read(first, block)
        if int(ids.min()) < 0:
            raise DataError(f"{bin_path(store.prefix)}: token {first + int(ids.argmin())} has the negative id {int(ids.min())}")
        largest = max(largest, int(ids.max()))
    return largest
