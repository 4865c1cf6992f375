from __future__ import annotations

import struct
import tracemalloc
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from distllm.config.errors import DataError
from distllm.data import store as store_module
from distllm.data.store import DTYPES, TokenStore, bin_path, dtype_for, idx_path, largest_id, write_index, write_store

DOCUMENTS = [np.array([1, 2, 3]), np.array([4]), np.array([5, 6, 7, 8, 9])]


def read_as_megatron(prefix: Path) -> tuple[str, list[list[int]]]:
    """Read a pair as Megatron-LM's IndexedDataset does, byte by byte and with none of our code."""
    formats = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "f", 8: "H"}
    raw, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack("<Q", raw[9:17])
    (code,) = struct.unpack("<B", raw[17:18])
    sequences, indices = struct.unpack("<QQ", raw[18:34])
    assert version == 1
    at = 34
    lengths = struct.unpack(f"<{sequences}i", raw[at : at + 4 * sequences])
    at += 4 * sequences
    pointers = struct.unpack(f"<{sequences}q", raw[at : at + 8 * sequences])
    at += 8 * sequences
    documents = struct.unpack(f"<{indices}q", raw[at : at + 8 * indices])
    assert at + 8 * indices == len(raw)
    letter, size = formats[code], struct.calcsize(formats[code])
    texts = [struct.unpack(f"<{n}{letter}", data[p : p + n * size]) for n, p in zip(lengths, pointers, strict=True)]
    return letter, [list(chain(*texts[a:b])) for a, b in pairwise(documents)]


def write_as_megatron(prefix: Path, documents: list[list[list[int]]], code: int) -> None:
    """Write documents of sequences as Megatron-LM's IndexedDatasetBuilder does."""
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "f", 8: "H"}[code]
    sequences = [s for d in documents for s in d]
    Path(f"{prefix}.bin").write_bytes(b"".join(struct.pack(f"<{len(s)}{letter}", *s) for s in sequences))
    pointers, indices = [0], [0]
    for s in sequences:
        pointers.append(pointers[-1] + len(s) * struct.calcsize(letter))
    for d in documents:
        indices.append(indices[-1] + len(d))
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(indices))
        + struct.pack(f"<{len(sequences)}i", *map(len, sequences))
        + struct.pack(f"<{len(sequences)}q", *pointers[:-1]) + struct.pack(f"<{len(indices)}q", *indices)
    )  # fmt: skip


@pytest.mark.parametrize(("vocab", "letter"), [(257, "H"), (65_499, "H"), (65_500, "i"), (200_000, "i")])
def test_megatron_reads_what_we_write(tmp_path: Path, vocab: int, letter: str) -> None:
    write_store(tmp_path / "s", DOCUMENTS, dtype=dtype_for(vocab))
    assert read_as_megatron(tmp_path / "s") == (letter, [d.tolist() for d in DOCUMENTS])


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_we_read_what_megatron_writes(tmp_path: Path, code: int) -> None:
    """Every dtype, and documents of several sequences, none and empty ones among them."""
    documents = [[[1, 2], [3]], [[4]], [[5, 6, 7], [], [8]], [[9, 10]]]
    write_as_megatron(tmp_path / "s", documents, code)
    store = TokenStore.open(tmp_path / "s")
    store.check(whole=True)
    assert (store.n_documents, store.n_tokens, store.dtype) == (4, 10, DTYPES[code])
    assert store.offsets.tolist() == [0, 3, 4, 8, 10]
    assert store.read(2, 5).tolist() == [3, 4, 5, 6, 7]
    assert store.starts_between(1, 8).tolist() == [3, 4]
    assert store.starts_between(0, 10).tolist() == [0, 3, 4, 8]
    assert largest_id(store) == 10


def test_a_document_longer_than_a_sequence_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LONGEST_SEQUENCE", 4)
    documents = [np.arange(n) for n in (3, 4, 5, 8, 9, 1)]
    write_store(tmp_path / "s", documents, dtype=dtype_for(100))
    assert read_as_megatron(tmp_path / "s")[1] == [d.tolist() for d in documents]
    assert np.diff(TokenStore.open(tmp_path / "s").offsets).tolist() == [3, 4, 5, 8, 9, 1]


def damage(prefix: Path, kind: str) -> None:
    idx, binary = idx_path(prefix), bin_path(prefix)
    raw = bytearray(idx.read_bytes())
    if kind == "idx missing":
        idx.unlink()
    elif kind == "bin missing":
        binary.unlink()
    elif kind == "idx cut":
        idx.write_bytes(raw[:-5])
    elif kind == "header cut":
        idx.write_bytes(raw[:20])
    elif kind == "bin cut":
        binary.write_bytes(binary.read_bytes()[:-2])
    elif kind == "bin odd":
        binary.write_bytes(binary.read_bytes()[:-1])
    elif kind == "bin empty":
        binary.write_bytes(b"")
    elif kind == "other pair's bin":
        binary.write_bytes(binary.read_bytes() + b"\0\0")
    else:
        place = {"magic": 0, "version": 9, "dtype": 17, "count": 18, "a length": 38, "a pointer": 54, "an index": 78}
        raw[place[kind]] ^= 0x55
        idx.write_bytes(raw)


@pytest.mark.parametrize(
    "kind",
    ["idx missing", "bin missing", "idx cut", "header cut", "bin cut", "bin odd", "bin empty", "other pair's bin", "magic",
     "version", "dtype", "count", "a length", "a pointer", "an index"],
)  # fmt: skip
def test_a_damaged_pair_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    write_store(tmp_path / "s", DOCUMENTS, dtype=dtype_for(100))
    damage(tmp_path / "s", kind)
    with pytest.raises(DataError) as error:
        TokenStore.open(tmp_path / "s")
    message = str(error.value)
    assert str(tmp_path / "s") in message and "\n" not in message


def test_a_negative_id_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [np.array([1, -2])], dtype=DTYPES[4])
    with pytest.raises(DataError, match=r"s\.bin: token 1 has the negative id -2"):
        largest_id(TokenStore.open(tmp_path / "s"))


def test_a_huge_store_opens_and_seeks_without_reading_it(tmp_path: Path) -> None:
    """10^11 tokens: a file of 200 GB that is all hole, and 10^6 documents."""
    prefix, documents, length = tmp_path / "huge", 1_000_000, 100_000
    write_index(idx_path(prefix), document_lengths=np.full(documents, length), dtype=dtype_for(100))
    with bin_path(prefix).open("wb") as file:
        file.truncate(documents * length * 2)
    tracemalloc.start()
    store = TokenStore.open(prefix)
    opened = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    for position in (0, 12_345_678_901, 99_999_799_999):
        assert store.starts_between(position, position + length).tolist() == [-(-position // length) * length]
        assert store.read(position, 1000).sum() == 0
    sought = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert opened < 50 * documents  # the index is checked; the text is 200,000 bytes a document
    assert sought < 64_000  # one number a document would be 8 MB
