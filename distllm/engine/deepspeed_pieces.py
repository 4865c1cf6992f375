"""The fp32 weights and the optimizer state as ZeRO has cut them: flat pieces, and where the parameters lie in them.

ZeRO cuts over the ranks that hold the same parameters: those that read different samples. What is used here is beyond
DeepSpeed's documented surface (0.19): the flat pieces (deepspeed_groups.py), the places of parameters in them, and the two calls
that make weights of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from distllm import comm
from distllm.checkpoint.chunk import Chunk
from distllm.engine.deepspeed_groups import WEIGHTS, Groups
from distllm.engine.flat import flat_chunks
from distllm.parallel.mesh import Mesh
from distllm.parallel.tensor_plain import TensorPiece


@dataclass(frozen=True)
class Piece:
    """This rank's numbers of one parameter: [at, at + length) of its group's flat piece, [start, start + length) of itself."""

    group: int
    at: int
    start: int
    length: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This parameter's numbers in the flat piece, or in optimizer state as long as it; [length], shares its memory."""
        return flat.detach().narrow(0, self.at, self.length)


class Pieces:
    """The fp32 weights and the optimizer state as ZeRO has cut them, by the names of parameters."""

    def __init__(
        self,
        engine: Any,
        model: nn.Module,
        *,
        stage: int,
        mesh: Mesh,
        cuts: Mapping[str, TensorPiece],
        copies: frozenset[str] = frozenset(),
    ) -> None:
        """Args:
        engine: DeepSpeed's.
        model: what it trains, under its own names.
        stage: of ZeRO.
        mesh: the ranks by axis.
        cuts: where this rank's pieces of the parameters lie that tp has cut, by name.
        copies: names of parameters that another pipeline stage holds too and writes.
        """
        self._zero, self._stage, self._mesh = engine.optimizer, stage, mesh
        self._groups = Groups(engine.optimizer, stage=stage)
        self._cuts, self._copies = cuts, copies
        self._pieces: dict[str, Piece] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        find = self._cut_parameter if stage == 3 else self._whole_parameter
        parameter: Any  # with what stage 3 has put on it
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad, f"{name} is frozen, which check_engine refuses"
            self._shapes[name] = tuple(parameter.ds_shape if stage == 3 else parameter.shape)
            self._pieces[name] = find(parameter)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parameters."""
        return tuple(self._pieces)

    def _whole_parameter(self, parameter: nn.Parameter) -> Piece:
        """Stages 1 and 2: a group of parameters is one row, and each rank has an equal part of it."""
        group = next(i for i, members in enumerate(self._zero.bit16_groups) if any(p is parameter for p in members))
        place = parameter._hp_mapping  # type: ignore[attr-defined]
        if place is None:  # it lies on other ranks
            return Piece(group, 0, 0, 0)
        return Piece(group, place.hp_fragment_address.start, place.lp_fragment_address.start, place.lp_fragment_address.numel)

    def _cut_parameter(self, parameter: Any) -> Piece:
        """Stage 3: each parameter is cut into equal parts, the last ones padded."""
        group, at, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        part = parameter.ds_tensor.ds_numel
        start = min(self._mesh.dp_rank * part, parameter.ds_numel)
        return Piece(group, at, start, min(part, parameter.ds_numel - start))

    def make_optimizer_state(self) -> None:
        """Make the optimizer's state at once, as the native engine does."""
        self._groups.make_optimizer_state()

    def fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy this rank's numbers of whole tensors into the fp32 pieces; a collective call."""
        for name, whole in tensors:
            if (piece := self._pieces.get(name)) is not None and piece.length:
                own = self._cuts[name].cut(whole) if name in self._cuts else whole
                self._numbers(piece).copy_(own.reshape(-1).narrow(0, piece.start, piece.length))
        self.to_weights()

    def to_weights(self) -> None:
        """Make the weights that the model computes with from the fp32 pieces; a collective call."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for group in range(len(self._groups)):
            self._groups.put_back(group)
        if kept := self._zero.persistent_parameters:  # small ones stay gathered
            kept[0].all_gather(kept)

    def whole(self, name: str, *, device: torch.device) -> torch.Tensor:
        """A whole parameter in fp32 on `device`; a collective call of the ranks that hold it."""
        piece, shape = self._pieces[name], self._shapes[name]
        numbers = torch.zeros(prod(shape), dtype=torch.float32, device=device)
        numbers.narrow(0, piece.start, piece.length).copy_(self._numbers(piece))
        own = comm.sum_over(numbers, self._mesh.data_group).view(shape)
        if (cut := self._cuts.get(name)) is None:
            return own
        whole = torch.zeros(cut.shape, dtype=torch.float32, device=device)
        cut.put(own, into=whole)
        return comm.sum_over(whole, self._mesh.group("tp"))

    def chunks(self) -> dict[str, Chunk]:
        """This rank's pieces of parameters and optimizer state."""
        chunks: dict[str, Chunk] = {}
        for name, piece in self._pieces.items():
            tensors = self._groups.tensors(piece.group)
            for key, value in tensors.items():
                at = f"model.{name}" if key == WEIGHTS else f"optim.{name}.{key}"
                if value.shape == tensors[WEIGHTS].shape:
                    chunks |= self._flat_chunks(at, value, name)
                else:  # a step count, the same on all ranks
                    first = self._mesh.dp_rank == 0 and self._mesh.first_of("tp") and name not in self._copies
                    chunks[at] = Chunk(value, tuple(value.shape), (0,) * value.dim(), first)
        return chunks

    def forget_copies(self) -> None:
        """Let go of what was read from files, before an update makes it old."""
        self._groups.forget_copies()

    def _numbers(self, piece: Piece) -> torch.Tensor:
        """This rank's fp32 weights of one parameter, [length]."""
        return piece.of(self._groups.tensors(piece.group)[WEIGHTS])

    def _flat_chunks(self, key: str, flat: torch.Tensor, name: str) -> dict[str, Chunk]:
        """The chunks of one parameter, from its flat piece or from optimizer state as long as it."""
        piece, cut = self._pieces[name], self._cuts.get(name)
        first = cut is not None or self._mesh.first_of("tp")  # what tp has not cut, all its ranks hold
        first = first and name not in self._copies
        return flat_chunks(key, piece.of(flat), shape=self._shapes[name], start=piece.start, piece=cut, write=first)
