"""The mesh: which ranks stand together on which axis.

The axes, outermost first, are pp, dp_replicate, dp_shard, cp, tp, ep. An axis of size 1 has no process group and costs
nothing: it is left out of the device mesh, and whoever asks for its group gets `None`, a group of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distllm.comm import World

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
DATA_AXES = ("dp_replicate", "dp_shard")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run by axis."""

    sizes: Mapping[str, int]
    """Axis -> number of ranks, for all of AXES."""
    devices: DeviceMesh | None
    """The axes that have more than one rank; None for a world of one."""
    dp_group: dist.ProcessGroup | None
    """All ranks that read different samples; None for a group of one."""
    dp_rank: int
    """This rank's place among them."""

    @property
    def dp_size(self) -> int:
        """How many ranks read different samples."""
        return self.sizes["dp_replicate"] * self.sizes["dp_shard"]

    def submesh(self, *axes: str) -> DeviceMesh | None:
        """The device mesh of those of `axes` that have more than one rank; None if none has."""
        wide = tuple(axis for axis in axes if self.sizes[axis] > 1)
        if not wide:
            return None
        assert self.devices is not None
        return self.devices[wide]

    def coordinates(self) -> dict[str, int]:
        """This rank's place on every axis."""
        place = dict.fromkeys(AXES, 0)
        if self.devices is not None:
            coordinate = self.devices.get_coordinate()
            assert coordinate is not None and self.devices.mesh_dim_names is not None
            place.update(zip(self.devices.mesh_dim_names, coordinate, strict=True))
        return place


def build_mesh(world: World, *, sizes: Mapping[str, int]) -> Mesh:
    """Lay the ranks of `world` out on the axes.

    Args:
        world: this rank's facts; its process group has been started.
        sizes: axis -> number of ranks for all of AXES; their product is the world's size.

    Returns:
        The mesh. A collective call: every rank makes the same groups in the same order.
    """
    product = 1
    for axis in AXES:
        product *= sizes[axis]
    assert product == world.size, f"axes multiply to {product}, the world has {world.size} ranks"
    wide = [axis for axis in AXES if sizes[axis] > 1]
    if not wide:
        return Mesh(dict(sizes), None, None, 0)
    devices = init_device_mesh(world.device.type, tuple(sizes[a] for a in wide), mesh_dim_names=tuple(wide))
    data = tuple(axis for axis in DATA_AXES if sizes[axis] > 1)
    if not data:
        return Mesh(dict(sizes), devices, None, 0)
    flat = devices[data]._flatten("dp") if len(data) > 1 else devices[data]
    return Mesh(dict(sizes), devices, flat.get_group(), flat.get_local_rank())
