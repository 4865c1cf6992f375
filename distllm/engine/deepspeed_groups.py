"""ZeRO's groups of parameters: for each a flat piece of fp32 weights and optimizer state as long; at stage 3 maybe in files.

With NVMe offloading a group is read for its update and written after it. To read or change it otherwise there is a copy in
memory, which goes back by `put_back`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

WEIGHTS = ""
"""The name of the weights among the tensors of a group."""


class Groups:
    """The groups of this rank, by number."""

    def __init__(self, zero: Any, *, stage: int) -> None:
        """Args:
        zero: DeepSpeed's optimizer.
        stage: of ZeRO.
        """
        self._zero, self._stage = zero, stage
        self._copies: dict[int, dict[str, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self._flats())

    def tensors(self, group: int) -> dict[str, torch.Tensor]:
        """The weights and the optimizer state of a group by name: [N] each, or a step count. Of one in files, a copy."""
        if not self._in_files(group):
            return self._live(group)
        if group not in self._copies:
            with self._resident(group, write=False):
                self._copies[group] = {name: value.detach().clone() for name, value in self._live(group).items()}
        return self._copies[group]

    def put_back(self, group: int) -> None:
        """Make a group what its copy is, where it has one; and from its fp32 weights, at stage 3, those to compute with."""
        copy = self._copies.pop(group, {})
        with self._resident(group, write=bool(copy)):
            live = self._live(group)
            for name, value in copy.items():
                live[name].detach().copy_(value)
            if self._stage == 3:
                self._zero._reassign_or_swap_out_partitioned_parameters(group)

    def forget_copies(self) -> None:
        """Let copies go, before an update makes them old."""
        self._copies.clear()

    def make_optimizer_state(self) -> None:
        """Make the optimizer's state at once, as the native engine does: the checkpoints of both have the same names.

        A step of zero gradients at rate zero makes the state and moves no weight. What it left there is taken back: its
        count, and what an optimizer that takes decay for a gradient made of the weights.
        """
        base = self._zero.optimizer
        kept = base.param_groups
        for number, flat in enumerate(self._flats()):
            with self._resident(number, write=True):
                group = kept[self._zero.sub_group_to_group_id[number] if self._stage == 3 else number]
                base.param_groups = [{**group, "params": [flat], "lr": 0.0}]
                before = flat.grad  # with offloading DeepSpeed has a buffer there
                flat.grad = torch.zeros_like(flat)
                base.step()
                flat.grad = before
                for name, value in self._live(number).items():
                    if name != WEIGHTS:
                        value.zero_()
        base.param_groups = kept

    def _flats(self) -> list[torch.Tensor]:
        cut = self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        return list(cut)

    def _live(self, group: int) -> dict[str, torch.Tensor]:
        flat = self._flats()[group]
        state = self._zero.optimizer.state[flat]
        return {WEIGHTS: flat} | {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}

    def _in_files(self, group: int) -> bool:
        return self._stage == 3 and self._zero._swappable_optimizer_subgroup(group)  # small ones stay in memory

    @contextlib.contextmanager
    def _resident(self, group: int, *, write: bool) -> Iterator[None]:
        """A group in memory, and afterwards, where it lies in files, there again."""
        if not self._in_files(group):
            yield
            return
        self._zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if write:
            self._zero._writeback_swap_state(group, True, False)
        else:
            self._zero._release_swap_buffers(group)
