"""Megabytes of text a CPU-second of tokenising takes: distllm's encoder against `tokenizers`, same merges, ids compared.

    python docs/benchmarks/tokenise.py > docs/benchmarks/tokenise.json

The text is the embedded corpus, Python's standard library; the tokenizer a byte-level BPE trained on it. Both sides run
on one thread, in turns, and both are given whole documents; `tokenizers` has its fastest call, encode_batch_fast.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when `tokenizers` is first used

import numpy as np
from tokenizers import Tokenizer

from distllm.config.schema import SourceConfig, TokenizerConfig
from distllm.data.documents import documents
from distllm.data.encode import load_encoder
from distllm.data.source import open_source
from distllm.data.tokenizer import make_tokenizer


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def facts(packages: list[str]) -> dict[str, object]:
    """Date, command, machine and versions of a record."""
    return {
        "date": date.today().isoformat(), "command": "python " + " ".join(sys.argv), "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)), "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(), **{p: version(p) for p in packages},
    }  # fmt: skip


def measure(kind: str, vocab_size: int, runs: int, texts: list[str]) -> dict[str, object]:
    """Both sides in turns on the same texts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer"
        make_tokenizer(TokenizerConfig(kind=kind, vocab_size=vocab_size), iter(texts), path)  # type: ignore[arg-type]
        encoder, plain = load_encoder(path), Tokenizer.from_file(str(path / "tokenizer.json"))
    megabytes = sum(len(t.encode()) for t in texts) / 1e6
    ours, theirs, same = [], [], True
    for _ in range(runs):
        start = time.process_time()
        fast = [encoder.encode(t) for t in texts]
        middle = time.process_time()
        slow = plain.encode_batch_fast(texts, add_special_tokens=False)
        theirs.append(megabytes / (time.process_time() - middle))
        ours.append(megabytes / (middle - start))
        same = same and all(np.array_equal(a, b.ids) for a, b in zip(fast, slow, strict=True))
    return {
        "kind": kind, "method": encoder.method, "vocab_size": encoder.vocab_size, "megabytes": round(megabytes, 2),
        "tokens": sum(map(len, fast)), "ids_identical": same,
        "distllm_mb_per_cpu_s": [round(x, 2) for x in ours], "tokenizers_mb_per_cpu_s": [round(x, 2) for x in theirs],
        "ratio_of_medians": round(statistics.median(ours) / statistics.median(theirs), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    source = open_source(SourceConfig(), splittable=True)
    texts = [d for shard in source.shards for d in documents(shard)]
    results = [measure(k, v, arguments.runs, texts) for k, v in (("bpe", 4096), ("bpe", 8192), ("bpe", 32768))]
    results += [measure(k, 257, 2, texts) for k in ("bytes", "chars")]
    print(json.dumps({**facts(["tokenizers", "tiktoken"]), "results": results}, indent=1))


if __name__ == "__main__":
    main()
