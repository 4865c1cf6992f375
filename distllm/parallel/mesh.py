"""The mesh: which ranks stand together on which axis.

The axes, outermost first, are pp, dp_replicate, dp_shard, ep, cp, tp. An axis of size 1 has no process group and costs
nothing: it is left out of the device mesh, and whoever asks for its group gets `None`, a group of one.

Which axes read what, and who shares weights:

- dp_replicate, dp_shard and ep ranks read different samples (DATA_AXES). cp, tp and pp ranks read the same ones; cp
  ranks cut each sequence among them.
- dp_shard, ep and cp ranks share one copy of the weights (SHARD_AXES): FSDP shards dense parameters over all of them,
  and experts, which ep has spread already, over dp_shard and cp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distllm.comm import World

FLAT = {"shards": ("dp_shard", "ep", "cp"), "expert_shards": ("dp_shard", "cp")}
"""Several axes that FSDP takes as one -> the axes."""
AXES = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")
DATA_AXES = ("dp_replicate", "dp_shard", "ep")
SHARD_AXES = ("dp_shard", "ep", "cp")
LOSS_AXES = ("dp_replicate", "dp_shard", "ep", "cp")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run by axis."""

    sizes: Mapping[str, int]
    """Axis -> number of ranks, for all of AXES."""
    devices: DeviceMesh | None
    """The axes that have more than one rank; None for a world of one."""
    rank: int
    """This rank's number in the world."""
    loss_group: dist.ProcessGroup | None
    """All ranks with losses of their own (LOSS_AXES); None for a group of one."""
    data_group: dist.ProcessGroup | None
    """All ranks that read different samples (DATA_AXES); None for a group of one."""
    shards: DeviceMesh | None
    """SHARD_AXES as one axis; None where FSDP has nothing to do."""
    expert_shards: DeviceMesh | None
    """The same for experts: without ep."""

    @property
    def dp_size(self) -> int:
        """How many ranks read different samples."""
        return math.prod(self.sizes[axis] for axis in DATA_AXES)

    @property
    def dp_rank(self) -> int:
        """This rank's place among those that read different samples."""
        place, index = self.coordinates(), 0
        for axis in DATA_AXES:
            index = index * self.sizes[axis] + place[axis]
        return index

    def coordinates(self) -> dict[str, int]:
        """This rank's place on every axis."""
        place, rest = {}, self.rank
        for axis in reversed(AXES):
            rest, place[axis] = divmod(rest, self.sizes[axis])
        return place

    def first_of(self, *axes: str) -> bool:
        """Whether this rank is at place 0 of all of `axes`."""
        place = self.coordinates()
        return all(place[axis] == 0 for axis in axes)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one on `axis` alone; None for an axis of size 1."""
        if self.sizes[axis] == 1:
            return None
        assert self.devices is not None
        return self.devices.get_group(axis)

    def weight_mesh(self, *, experts: bool = False) -> DeviceMesh | None:
        """The mesh that FSDP2 lays parameters on: [shards] or [replicas, shards]; None where all ranks hold the same.

        Its last dim is SHARD_AXES as one, of size 1 where only replicas stand beside tp or pp.

        Args:
            experts: the mesh of the parameters that ep has spread already, without ep; of size 1 where nothing is left.
        """
        shards = self.expert_shards if experts else self.shards
        if shards is None or self.sizes["dp_replicate"] == 1:
            return shards
        assert self.devices is not None
        return DeviceMesh._concatenate([self.devices["dp_replicate"], shards])

    def unsharded(self) -> Mesh:
        """The same ranks where FSDP has nothing to do: for an engine that shards the weights itself."""
        return replace(self, shards=None, expert_shards=None)

    def submesh(self, *axes: str) -> DeviceMesh | None:
        """The device mesh of those of `axes` that have more than one rank; None if none has."""
        wide = tuple(axis for axis in axes if self.sizes[axis] > 1)
        if not wide:
            return None
        assert self.devices is not None
        return self.devices[wide]


def build_mesh(world: World, *, sizes: Mapping[str, int]) -> Mesh:
    """Lay the ranks of `world` out on the axes.

    Args:
        world: this rank's facts; its process group has been started.
        sizes: axis -> number of ranks for all of AXES; their product is the world's size.

    Returns:
        The mesh. A collective call: every rank makes the same groups in the same order.
    """
    product = math.prod(sizes[axis] for axis in AXES)
    assert product == world.size, f"axes multiply to {product}, the world has {world.size} ranks"
    wide = [axis for axis in AXES if sizes[axis] > 1]
    if not wide:
        return Mesh(dict(sizes), None, 0, None, None, None, None)
    if fsdp := uses_fsdp(sizes):  # FSDP2 also replicates, but only beside a shard axis, which may be of size 1
        wide = [axis for axis in AXES if sizes[axis] > 1 or axis == "dp_shard"]
    devices = init_device_mesh(world.device.type, tuple(sizes[a] for a in wide), mesh_dim_names=tuple(wide))
    loss, data = (_flat(devices, sizes, axes=axes, name=name) for axes, name in ((LOSS_AXES, "loss"), (DATA_AXES, "data")))
    shards, experts = None, None
    if fsdp:
        shards = _flat(devices, sizes, axes=SHARD_AXES, name="shards") or devices["dp_shard"]
        experts = _flat(devices, sizes, axes=("dp_shard", "cp"), name="expert_shards") or devices["dp_shard"]
    return Mesh(
        dict(sizes), devices, world.rank, None if loss is None else loss.get_group(),
        None if data is None else data.get_group(), shards, experts,
    )  # fmt: skip


def uses_fsdp(sizes: Mapping[str, int]) -> bool:
    """Whether FSDP2 lays the weights out: where they are sharded, and for replicas beside tp or pp, where DDP cannot be."""
    sharded = math.prod(sizes[axis] for axis in SHARD_AXES) > 1
    return sharded or (sizes["dp_replicate"] > 1 and sizes["tp"] * sizes["pp"] > 1)


def _flat(devices: DeviceMesh, sizes: Mapping[str, int], *, axes: Sequence[str], name: str) -> DeviceMesh | None:
    """Several axes as one; None where all are of size 1."""
    wide = tuple(axis for axis in axes if sizes[axis] > 1)
    if len(wide) < 2:
        return devices[wide[0]] if wide else None
    return devices[wide]._flatten(name)
