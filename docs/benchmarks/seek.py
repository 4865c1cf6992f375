"""How long it takes to get any sample of a store of 10^12 tokens: a `.bin` of 2 TB that is all hole, and a whole `.idx`.

    python docs/benchmarks/seek.py > docs/benchmarks/seek.json

Needs 200 MB of disk. A seek is what a resumed run does for its first sample: order, split, look-up and batch. The index is
dropped from the page cache before each, where the system allows it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenise import facts

from distllm.config.schema import Config
from distllm.data.packed_text import PackedText
from distllm.data.prepare import Prepared
from distllm.data.store import TokenStore, bin_path, dtype_for, idx_path, write_index

VOCAB = 50_257


def forget(path: Path) -> None:
    """Drop a file's pages from the cache, as far as the system does it."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def seeks(prefix: Path, *, by: str, cross_documents: bool, count: int) -> dict[str, object]:
    """Open the store and get samples far apart."""
    validation = {"by": by, "fraction": 0.01}
    config = Config.model_validate({"data": {"seq_len": 2048, "cross_documents": cross_documents, "validation": validation}})
    forget(idx_path(prefix))
    start = time.perf_counter()
    samples = PackedText(Prepared((TokenStore.open(prefix),), (), prefix, VOCAB, ""), config)
    opened = time.perf_counter() - start
    took = []
    for i in np.random.default_rng(0).integers(0, 3 * samples.train_size, size=count).tolist():
        forget(idx_path(prefix))
        start = time.perf_counter()
        samples.train_batch([i])
        took.append(1000 * (time.perf_counter() - start))
    return {
        "split_by": by, "cross_documents": cross_documents, "samples_an_epoch": samples.train_size, "open_s": round(opened, 3),
        "seeks": count, "median_ms": round(statistics.median(took), 3), "largest_ms": round(max(took), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--length", type=int, default=100_000, help="tokens of a document")
    parser.add_argument("--seeks", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "huge"
        lengths = np.full(arguments.documents, arguments.length)
        lengths[::2] += 77  # so that documents do not begin at round positions
        lengths[1::2] -= 77
        write_index(idx_path(prefix), document_lengths=lengths, dtype=dtype_for(VOCAB))
        with bin_path(prefix).open("wb") as file:
            file.truncate(int(lengths.sum()) * 2)
        results = [
            seeks(prefix, by=by, cross_documents=cross, count=arguments.seeks)
            for by in ("position", "document") for cross in (True, False)
        ]  # fmt: skip
    record = {**facts(["numpy", "torch"]), "tokens": int(lengths.sum()), "documents": arguments.documents, "results": results}
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
