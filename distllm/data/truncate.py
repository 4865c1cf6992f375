"""What becomes of examples that are longer than a model takes. N examples.

What is kept of a text of n tokens is told by three numbers (length, cut, skip): its token j is token j of the text for
j < cut, and token j + skip from there on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distllm.config.errors import DataError


@dataclass(frozen=True)
class Kept:
    """What is kept of each of N texts."""

    length: np.ndarray
    cut: np.ndarray
    skip: np.ndarray
    """All int64 [N]."""


def kept(lengths: np.ndarray, room: np.ndarray, *, rule: str) -> Kept:
    """Cut texts to their room.

    Args:
        lengths: tokens of each text, int64 [N].
        room: how many may stay, int64 [N].
        rule: head, tail or middle; for any other rule what comes first stays, and nothing should be too long.
    """
    length = np.minimum(lengths, room)
    over = lengths - length
    if rule == "tail":
        return Kept(length, np.zeros_like(length), over)
    if rule == "middle":
        return Kept(length, np.where(over > 0, (length + 1) // 2, length), over)
    return Kept(length, length, np.zeros_like(length))


def shared_room(first: np.ndarray, second: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide the room of a pair: tokens are taken from the longer text until both fit (transformers' longest_first).

    Args:
        first: tokens of the first text, int64 [N].
        second: tokens of the second text, int64 [N].
        room: tokens that both may have together, int64 [N].

    Returns:
        Tokens that stay of the first and of the second, int64 [N].
    """
    half = room // 2
    of_second = np.where(second <= half, second, np.maximum(half, room - first))
    of_second = np.minimum(of_second, second)
    return np.minimum(first, room - of_second), of_second


def windows(lengths: np.ndarray, *, room: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut texts into windows that overlap.

    Args:
        lengths: tokens of each text, int64 [N].
        room: tokens of a window.
        stride: tokens that a window shares with the one before; below `room`.

    Returns:
        The text of each window, and the token that it begins with: int64 [windows], text after text.
    """
    step = room - stride
    count = 1 + np.maximum(0, -(-(lengths - room) // step))
    text = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(text)) - np.repeat(np.cumsum(count) - count, count)
    return text, number * step


def refuse_long(lengths: np.ndarray, *, limit: int, what: str, where: str, rules: str, examples: np.ndarray) -> None:
    """Refuse examples that are too long, before training starts.

    Args:
        lengths: tokens of each example, special tokens included, int64 [N].
        limit: the most that fits.
        what: the side of the example that is measured.
        where: the key of the source.
        rules: those of data.truncate that would work.
        examples: the number of each in its source, int64 [N].

    Raises:
        DataError: one is longer than the limit.
    """
    if not len(lengths) or int(lengths.max()) <= limit:
        return
    longest, example = int(lengths.max()), int(examples[lengths.argmax()])
    count = f"{int((lengths > limit).sum())} of {len(lengths)} examples of {where} are longer"
    raise DataError(
        f"data.seq_len={limit}: {count} and data.truncate=refuse; the longest is example {example}, whose {what} takes {longest} "
        f"tokens with its special tokens; nearest: data.seq_len={longest}, or data.truncate={rules}"
    )
