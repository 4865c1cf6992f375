"""The start of DeepSpeed: quiet, without compiling anything, and with all that it was told in force."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distllm.comm import World
from distllm.config.errors import ConfigError, StorageError
from distllm.parallel.mesh import Mesh


class ModelParallelUnit:
    """Our mesh in the words that DeepSpeed asks in, which are Megatron's: its model parallelism is our tp."""

    def __init__(self, mesh: Mesh) -> None:
        """A collective call where there are no data-parallel ranks: DeepSpeed wants a group of one then, too."""
        tp = mesh.group("tp")
        assert tp is not None, "without tp DeepSpeed finds its ranks itself"
        self._mesh, self._tp = mesh, tp
        self._data = mesh.data_group or dist.new_group([mesh.rank], use_local_synchronization=True)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that read different samples, over which ZeRO cuts."""
        return self._data

    def get_data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self._mesh.dp_rank

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self._mesh.dp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks over which norms of cut parameters are added and overflows told."""
        return self._tp

    def get_model_parallel_rank(self) -> int:
        """This rank's place among them; the first counts the parameters that are not cut."""
        return self._mesh.coordinates()["tp"]

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._mesh.sizes["tp"]


def load(world: World) -> Any:
    """DeepSpeed as a module, quiet; the first call takes seconds and a hundred megabytes.

    Args:
        world: this rank's facts.
    """
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it looks there, though it is given everything
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls names that torch has deprecated, at every collective.
    warnings.filterwarnings("ignore", module=r"(deepspeed|torch)\..*")
    import deepspeed
    import deepspeed.ops
    import torch._inductor.compile_fx  # noqa: F401  # its start does, though it compiles nothing

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for a minute, and not used in training
    return deepspeed


def initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    json: Mapping[str, Any],
    world: World,
    mesh: Mesh,
    blocks: Sequence[nn.Module] = (),
) -> Any:
    """`deepspeed.initialize`, quiet, without compiling anything, and with all that it was told in force.

    Args:
        model: what this rank trains, on the world's device; with pipeline ranks its stage.
        optimizer: of its parameters.
        json: DeepSpeed's configuration.
        world: this rank's facts.
        mesh: the ranks by axis.
        blocks: the modules whose parameters stage 3 has to gather together.

    Raises:
        ConfigError: DeepSpeed has no fp16 here, or does not do as it was told.
        StorageError: the folder of its files cannot be written.
    """
    deepspeed = load(world)
    if not dist.is_initialized():  # a world of one
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist.get_backend(), verbose=False, auto_mpi_discovery=False)
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module.named_buffers(recurse=False)]
    if json["fp16"]["enabled"] and not deepspeed.get_accelerator().is_fp16_supported():
        raise ConfigError([f"precision.compute=fp16: DeepSpeed has no fp16 on this {world.device.type}; nearest: bf16"])
    if json["zero_optimization"].get("offload_optimizer", {}).get("device") == "nvme":
        require_libaio()
        require_folder(Path(json["zero_optimization"]["offload_optimizer"]["nvme_path"]))
    if mesh.sizes["tp"] > 1 and json["zero_optimization"]["stage"] == 3:
        # A block puts sums over tp ranks in the place of its whole parameters before its layers are called to gather them.
        for block in blocks:
            block.register_forward_pre_hook(refuse_unseen_inputs, with_kwargs=True)
            deepspeed.utils.set_z3_leaf_module(block, True)
    whole, unit = model, None
    if mesh.sizes["pp"] > 1:
        whole = _as_pipeline(model, mesh)
    elif mesh.sizes["tp"] > 1:
        unit = ModelParallelUnit(mesh)
    engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=dict(json), mpu=unit)
    for module, name, buffer in buffers:  # bf16 rounds them too, and rotary frequencies do not bear it
        module._buffers[name] = buffer.to(world.device)
    refuse_ignored(engine, json)
    return engine


def _as_pipeline(stage: nn.Module, mesh: Mesh) -> nn.Module:
    """DeepSpeed's pipeline of as many layers as stages: where to cut, and what is tied, we have decided already.

    Its order of ranks, pipe before data before model, is that of our mesh, where its model parallelism is our tp.
    """
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    pp, own = mesh.sizes["pp"], mesh.coordinates()["pp"]
    layers = [stage if index == own else LayerSpec(nn.Identity) for index in range(pp)]  # others' are never built
    topology = PipeModelDataParallelTopology(num_pp=pp, num_mp=mesh.sizes["tp"], num_dp=mesh.dp_size)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a table of layers
        module: nn.Module = PipelineModule(layers, topology=topology, partition_method="uniform")
    return module


def require_libaio() -> None:
    """Refuse files where their reading and writing cannot be compiled, which takes DeepSpeed minutes, once a machine.

    Raises:
        ConfigError: libaio is not installed.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ConfigError(["engine.offload_optimizer=nvme: needs libaio, on Debian apt install libaio-dev; nearest: cpu"])
    tools = str(Path(sys.executable).parent)  # ninja lies beside python, and the environment may not be activated
    if tools not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"


def require_folder(folder: Path) -> None:
    """Make the folder of DeepSpeed's files, or refuse what cannot be one.

    Raises:
        StorageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        told = f"engine.nvme_path={folder.parent}: no folder that can be written ({error.strerror})"
        raise StorageError(f"{told}; nearest: a folder on a local disk, or engine.offload_optimizer=cpu") from error


def refuse_unseen_inputs(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a call from which DeepSpeed cannot tell when the backward pass is through a block that it gathers as one.

    It waits for the gradients of positional arguments; where none has any, it takes the block's gradients, still zero, at once.

    Args:
        block: what is called.
        args: its positional arguments.
        kwargs: the others.

    Raises:
        ConfigError: no positional argument has a gradient, and gradients are computed.
    """
    if torch.is_grad_enabled() and not any(isinstance(value, torch.Tensor) and value.requires_grad for value in args):
        raise ConfigError(
            [
                f"engine.zero_stage=3: with layout.tp, {type(block).__name__} must be given its hidden states as a positional "
                "argument, for DeepSpeed sees no gradient of others; nearest: 2, or engine.name=native"
            ]
        )


def refuse_ignored(engine: Any, json: Mapping[str, Any]) -> None:
    """Compare what DeepSpeed says of itself with what it was told: it drops what it does not understand without a word.

    Args:
        engine: DeepSpeed's.
        json: what it was given.

    Raises:
        ConfigError: a value that it does not have.
    """
    told: dict[str, Any] = {
        "train_batch_size": engine.train_batch_size(),
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": engine.gradient_clipping(),
        "zero_optimization.stage": int(engine.zero_optimization_stage()),
        "bf16.enabled": engine.bfloat16_enabled(),
        "fp16.enabled": engine.fp16_enabled(),
        "fp16.loss_scale": engine.loss_scale(),
    }
    zero = json["zero_optimization"]
    if "offload_optimizer" in zero:
        told["zero_optimization.offload_optimizer.device"] = getattr(engine.zero_offload_optimizer(), "device", None)
    if "offload_param" in zero:
        told["zero_optimization.offload_param.device"] = getattr(engine.zero_offload_param(), "device", None)
    for key, value in told.items():
        wanted: Any = json
        for part in key.split("."):
            wanted = wanted[part]
        if wanted != value:
            raise ConfigError(
                [f"engine.name=deepspeed: DeepSpeed takes {key}={value}, and was told {wanted}; nearest: engine.name=native"]
            )
