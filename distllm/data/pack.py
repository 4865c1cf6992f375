"""Samples of conversations: several in one row, none cut across rows, and only what the assistant says is learned.

B rows, S tokens of a row, N conversations of a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from distllm.config.check import Resolved
from distllm.config.errors import ConfigError
from distllm.config.schema import Config
from distllm.data.batch import IGNORE, Batch
from distllm.data.collate import inside_documents, part_of
from distllm.data.order import Order
from distllm.data.ragged import Ragged
from distllm.data.ramp import ramped
from distllm.data.samples import StepPlan
from distllm.data.side import Side, divide
from distllm.data.truncate import kept, refuse_long

if TYPE_CHECKING:
    from distllm.data.prepare import Prepared
    from distllm.data.tokenizer import Roles

OPEN = 256  # rows that can still take a conversation: with more the rows are hardly fuller, and packing takes longer


@dataclass(frozen=True)
class Bins:
    """Which conversations of one source share a row."""

    members: np.ndarray
    """The conversations, row after row, int64 [N]."""
    bounds: np.ndarray
    """Where each row begins in `members`, and N: int64 [rows + 1]."""
    filled: np.ndarray
    """Tokens of each row, int64 [rows]."""

    def __len__(self) -> int:
        return len(self.filled)


def first_fit(lengths: np.ndarray, *, room: int) -> Bins:
    """Put each text, in turn, into the first of the open rows that has room for it; the oldest row is closed for a new one.

    Args:
        lengths: tokens of each text, int64 [N], none above `room`.
        room: tokens of a row.
    """
    left, number = np.zeros(OPEN, dtype=np.int64), np.zeros(OPEN, dtype=np.int64)
    bins, rows = np.empty(len(lengths), dtype=np.int64), 0
    for i, length in enumerate(lengths.tolist()):
        at = int((left >= length).argmax())
        if left[at] < length or rows == 0:
            at = rows % OPEN
            left[at], number[at] = room, rows
            rows += 1
        left[at] -= length
        bins[i] = number[at]
    members = np.argsort(bins, kind="stable")
    bounds = np.searchsorted(bins[members], np.arange(rows + 1))
    filled = np.bincount(bins, weights=lengths, minlength=rows).astype(np.int64)
    return Bins(members, bounds, filled)


class PackedExamples:
    """The samples of prepared conversations, by number, as `samples.Samples` has it. A sample is a row of S tokens.

    Which conversations share a row depends on their lengths and order in the store alone; each epoch permutes the rows.
    """

    def __init__(self, prepared: Prepared, config: Config, *, resolved: Resolved, roles: Roles) -> None:
        """Divide the conversations and pack each side.

        Args:
            prepared: its example stores, with the fields `text` and `flags`.
            config: `data`, `train` and `seed` are read.
            resolved: the batch.
            roles: the special tokens, of which rows are filled up with `pad`, else `eos`.

        Raises:
            ConfigError: data.truncate=window, which would take a conversation apart.
            DataError: a conversation is longer than a row and there is no rule for it, or a side has none.
        """
        data = config.data
        if data.truncate == "window":
            raise ConfigError(["data.truncate=window: is not for conversations; nearest: tail"])
        self.vocab_size, self.seq_len = prepared.vocab_size, data.seq_len
        self._pad = roles.eos if roles.pad is None else roles.pad
        self._resolved, self._ramp, self._rule = resolved, config.train.batch_ramp, data.truncate
        self.train, self.validation = divide(
            prepared.examples, prepared.validation_examples, config=data.validation, seed=config.seed
        )
        held = "data.validation.sources" if prepared.validation_examples else "data.sources"
        self._train_bins, self._bins = self._packed(self.train, "data.sources"), self._packed(self.validation, held)
        sizes = tuple(len(bins) for bins in self._train_bins)
        self.order = Order(sizes, tuple(s.weight for s in data.sources), config.seed, data.shuffle)
        self._ends = np.cumsum([len(bins) for bins in self._bins])

    @property
    def train_size(self) -> int:
        """Rows of an epoch, all sources together."""
        return sum(self.order.sizes)

    @property
    def validation_size(self) -> int:
        """Validation rows."""
        return int(self._ends[-1])

    def step(self, start: int) -> StepPlan:
        """The step that begins with the global sample number `start`."""
        return ramped(start, resolved=self._resolved, samples=self._ramp)

    def tokens(self, samples: range) -> int:
        """Tokens of these training rows, without padding."""
        source, row = self.order.locate(np.arange(samples.start, samples.stop))
        return sum(int(bins.filled[row[source == k]].sum()) for k, bins in enumerate(self._train_bins))

    def batch_bytes(self, size: int) -> int:
        """About how much memory a batch of `size` rows takes, in bytes: most of it is the mask [S, S]."""
        return size * self.seq_len * (self.seq_len + 24)

    def unigram_loss(self) -> None:
        """None: only a part of the tokens is learned."""
        return None

    def train_batches(self, ids: Sequence[Sequence[int]]) -> list[Batch]:
        """A batch for each list of global sample numbers; -1 is a row of padding."""
        every = np.array(list(chain.from_iterable(ids)), dtype=np.int64)
        source, row = self.order.locate(np.maximum(every, 0))
        whole = self._batch(self.train, self._train_bins, source, row, every)
        cuts = accumulate((len(batch) for batch in ids), initial=0)
        return [part_of(whole, first, last) for first, last in pairwise(cuts)]

    def validation_batch(self, ids: Sequence[int]) -> Batch:
        """The validation rows with these numbers; -1 is a row of padding."""
        every = np.array(ids, dtype=np.int64)
        number = np.maximum(every, 0)
        source = np.searchsorted(self._ends, number, side="right")
        return self._batch(self.validation, self._bins, source, number - np.concatenate([[0], self._ends])[source], every)

    def _packed(self, side: Side, place: str) -> list[Bins]:
        """The rows of each source of a side."""
        packed = []
        for k in range(len(side.stores)):
            lengths = side.lengths("text", *side.all_of(k))
            if self._rule == "refuse":
                refuse_long(
                    lengths, limit=self.seq_len, what="conversation", where=f"{place}.{k}", rules="head, tail or middle",
                    examples=side.examples[k],
                )  # fmt: skip
            packed.append(first_fit(np.minimum(lengths, self.seq_len), room=self.seq_len))
        return packed

    def _batch(self, side: Side, packed: list[Bins], source: np.ndarray, row: np.ndarray, ids: np.ndarray) -> Batch:
        """The batch of some rows, int64 [B] each; `ids` are their global numbers."""
        # From here on a member is one conversation of one of the rows: M of them.
        members = [
            packed[k].members[packed[k].bounds[r] : packed[k].bounds[r + 1]] if i >= 0 else np.zeros(0, dtype=np.int64)
            for k, r, i in zip(source.tolist(), row.tolist(), ids.tolist(), strict=True)
        ]
        count = np.array([len(some) for some in members])
        sample, of_row = np.concatenate(members), np.repeat(np.arange(len(count)), count)
        lengths = side.lengths("text", source[of_row], sample)
        what = kept(lengths, np.full_like(lengths, self.seq_len), rule=self._rule)
        text = side.read("text", source[of_row], sample, what)
        flags = side.read("flags", source[of_row], sample, what)
        return _rows_to_batch(text, flags.ids == 1, of_row, shape=(len(count), self.seq_len), pad=self._pad, ids=ids)


def _rows_to_batch(
    text: Ragged, learned: np.ndarray, of_row: np.ndarray, *, shape: tuple[int, int], pad: int, ids: np.ndarray
) -> Batch:
    """Lay conversations one after another into rows.

    Args:
        text: M conversations, T tokens.
        learned: bool [T], whether a token is to be predicted.
        of_row: the row of each conversation, ascending, int64 [M].
        shape: (B, S).
        pad: the token that fills rows up.
        ids: the rows' global numbers, int64 [B].
    """
    filled = np.bincount(of_row, weights=text.lengths, minlength=shape[0]).astype(np.int64)
    row = of_row[text.row]
    column = np.arange(len(text.ids)) - (np.cumsum(filled) - filled)[row]
    tokens, labels = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    tokens[row, column] = text.ids
    at = learned & (text.column > 0)  # the token before the first is of another conversation
    labels[row[at], column[at] - 1] = text.ids[at]
    begins = np.zeros(shape, dtype=bool)
    first = text.column == 0
    begins[row[first], column[first]] = True
    open_ = np.flatnonzero(filled < shape[1])
    begins[open_, filled[open_]] = True  # padding is a document of its own
    positions, mask = inside_documents(begins)
    inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return Batch(given, {"labels": torch.from_numpy(labels)}, tuple(ids.tolist()))
