"""Texts and configs for the tests of the data room."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from distllm.config.schema import Config

REAL = Path(os.environ.get("DISTLLM_TEST_DATA", str(Path(__file__).parents[3] / "shared" / "data")))
WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they", "be"]


def prose(characters: int, *, seed: int = 0) -> str:
    """Repeatable text with lines, paragraphs, numbers and a few letters beyond ASCII."""
    draw, lines, size = random.Random(seed), [], 0
    while size < characters:
        words = draw.choices(WORDS, k=draw.randint(1, 14))
        line = " ".join(words).capitalize() + draw.choice([".", "?", ", naïve café", f" {draw.randint(0, 9999)}", "  spaced"])
        lines.append(line + draw.choice(["\n", "\n", "\n\n"]))
        size += len(lines[-1])
    return "".join(lines)[:characters]


@pytest.fixture
def shakespeare(tmp_path: Path) -> Path:
    """Tiny Shakespeare where it is at hand, else a text of the same length."""
    real = REAL / "tinyshakespeare" / "input.txt"
    if real.is_file():
        return real
    made = tmp_path / "shakespeare.txt"
    made.write_text(prose(1_115_394).encode("ascii", "replace").decode(), encoding="utf-8")
    return made


def config_for(store: Path, *, sources: list[dict[str, Any]], seed: int = 1, **data: Any) -> Config:
    """A config whose data part has these values; bytes unless another tokenizer is asked for."""
    return Config.model_validate(
        {"seed": seed, "data": {"store": str(store), "tokenizer": {"kind": "bytes"}, "workers": 1, "sources": sources, **data}}
    )


def write_lines(path: Path, *, documents: int, seed: int = 0) -> Path:
    """A text file with a document on each line, each beginning with its number."""
    draw = random.Random(seed)
    lines = [f"{i}:" + " ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for i in range(documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
