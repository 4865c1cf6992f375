"""Which samples every step of a run reads, noted while it runs: numbers, and digests of their tokens.

    DISTLLM_RECORDED=FOLDER python -m tests.recorded train CONFIG ...

is `distllm train CONFIG ...`, with a file in FOLDER for each process that took steps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from distllm import cli, launch
from distllm.verify.data import row_digests
from distllm.verify.swap import swapped

Rows = dict[int, str]
"""Sample number -> digest."""


@contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Note what the training loop of this process reads, for as long as this is entered."""
    from distllm.train import loop

    true = loop.step_batches

    def noted(*args: Any, **options: Any) -> Generator[Any]:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{os.getpid()}.jsonl").open("a") as file, closing(true(*args, **options)) as steps:
            for step in steps:
                line = {"first": step.samples.start, "stop": step.samples.stop, "rows": row_digests(step.microbatches)}
                file.write(json.dumps(line) + "\n")
                file.flush()
                yield step

    with swapped(loop, "step_batches", noted):
        yield


def read(folder: Path) -> dict[tuple[int, int], Rows]:
    """(first sample, one after the last) of every step -> what all ranks together read at it."""
    found: dict[tuple[int, int], Rows] = {}
    for file in folder.glob("*.jsonl"):
        for text in file.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # the line that a kill cut
            rows = found.setdefault((line["first"], line["stop"]), {})
            for number, digest in line["rows"].items():
                assert rows.setdefault(int(number), digest) == digest, f"sample {number} was read with two contents"
    return found


def main() -> None:
    """`distllm`, recorded; the ranks that it starts are recorded too."""
    launch.local_ranks = partial(launch.local_ranks, module="tests.recorded")
    with recording(Path(os.environ["DISTLLM_RECORDED"])):
        cli.main()


if __name__ == "__main__":
    main()
