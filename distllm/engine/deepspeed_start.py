"""The start of DeepSpeed: quiet, without compiling anything, and with all that it was told in force."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distllm.comm import World
from distllm.config.errors import ConfigError, StorageError
from distllm.engine.locked_memory import refuse_low_limit
from distllm.parallel.mesh import Mesh

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What DeepSpeed's configuration calls the dtypes that it computes with besides fp32."""


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
    in_files = files_of(json)
    for key, folder in in_files.items():
        require_libaio(key)
        require_folder(folder, key)
        refuse_low_limit(least_locked(json, model, key=key, ranks=mesh.dp_size), key=key)
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
    if "engine.offload_parameters" in in_files:
        put_in_files(model, json=json, unit=unit)
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


def files_of(json: Mapping[str, Any]) -> dict[str, Path]:
    """The folders of DeepSpeed's files, by the key of ours that asks for them."""
    keys = {"engine.offload_optimizer": "offload_optimizer", "engine.offload_parameters": "offload_param"}
    told = {key: json["zero_optimization"].get(theirs, {}) for key, theirs in keys.items()}
    return {key: Path(given["nvme_path"]) for key, given in told.items() if given.get("device") == "nvme"}


def least_locked(json: Mapping[str, Any], model: nn.Module, *, key: str, ranks: int) -> int:
    """The bytes that the buffers of files take at least.

    Args:
        json: DeepSpeed's configuration.
        model: what this rank trains, uncut but by tp.
        key: what asks for files.
        ranks: over which ZeRO cuts each parameter.
    """
    if key == "engine.offload_optimizer":  # DeepSpeed's 4 buffers of fp32, of a group, which has a parameter at least
        return 4 * 4 * max(parameter.numel() for parameter in model.parameters()) // ranks
    buffers = json["zero_optimization"]["offload_param"]
    return int(buffers["buffer_count"] * buffers["buffer_size"] * dtype_of(json).itemsize)


def dtype_of(json: Mapping[str, Any]) -> torch.dtype:
    """What the weights that the model computes with are in."""
    return next((dtype for name, dtype in LOW.items() if json[name]["enabled"]), torch.float32)


def put_in_files(model: nn.Module, *, json: Mapping[str, Any], unit: ModelParallelUnit | None) -> None:
    """Cut the parameters over the ranks and write the parts to files, as DeepSpeed would itself, but for three faults of 0.19.

    On a CPU without fp16 it takes bf16 for the dtype of the files (`_set_dtype` in partition_parameters.py), of fp32 weights,
    too, which then fit no product. It reserves the memory that an update writes from for whole parameters, not for this
    rank's parts. And on a CPU a rank that has nobody to gather from computes in the buffer that was read into, which the
    next parameter fills, while views of it wait for the backward pass.

    Args:
        model: what this rank trains, with its first weights in fp32.
        json: DeepSpeed's configuration.
        unit: our mesh, with tp ranks.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
    from deepspeed.runtime.zero import Init

    dtype = dtype_of(json)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    swapper = AsyncPartitionedParameterSwapper(DeepSpeedConfig(dict(json), unit), dtype)
    ranks = dist.get_world_size(None if unit is None else unit.get_data_parallel_group())
    reserve = swapper.reserve_partitioned_swap_space
    swapper.reserve_partitioned_swap_space = lambda whole: reserve(parts_to_reserve(whole, ranks=ranks))
    swap_in = swapper.swap_in

    def read_if_there_is_room(parameters: Sequence[Any], async_op: bool = True, swap_in_buffers: Any = None) -> None:
        refuse_without_room(parameters, swapper.available_swap_in_buffers())
        swap_in(parameters, async_op, swap_in_buffers)

    swapper.swap_in = read_if_there_is_room
    if ranks == 1 and next(model.parameters()).device.type == "cpu":
        read = swapper.synchronize_reads
        swapper.synchronize_reads = lambda: copy_what_was_read(swapper.inflight_params, read)
    Init(
        module=model, data_parallel_group=None if unit is None else unit.get_data_parallel_group(), mpu=unit,
        config_dict_or_path=dict(json), dtype=dtype, remote_device="nvme", param_swapper=swapper,
    )  # fmt: skip


def refuse_without_room(parameters: Sequence[Any], free: int) -> None:
    """Refuse a model that has more parameters gathered at a time than its modules tell (deepspeed_buffers.py).

    Such as one whose layers are given their inputs by keyword: DeepSpeed does not see then when a backward pass is through.

    Args:
        parameters: what is to be read.
        free: buffers.

    Raises:
        ConfigError: they are too few.
    """
    if len(parameters) > free:
        raise ConfigError(
            [
                f"engine.offload_parameters=nvme: this model has more parameters gathered at a time than DeepSpeed has buffers "
                f"for ({len(parameters)} to read, {free} free); nearest: cpu"
            ]
        )


def copy_what_was_read(parameters: Sequence[Any], read: Callable[[], None]) -> None:
    """Wait for parameters to be read, and put copies in the place of DeepSpeed's buffers."""
    waiting = list(parameters)
    read()
    for parameter in waiting:
        parameter.ds_tensor.data = parameter.ds_tensor.data.clone()


def parts_to_reserve(whole: Sequence[int], *, ranks: int) -> list[int]:
    """What an update writes at once of any group, where the largest is of parameters of `whole` numbers.

    The parts are padded to a kibibyte. Another group may have more of them, though fewer numbers in all; each in files is
    of a mebibyte at least, so a thousandth more is enough.
    """
    parts = [-(-numbers // ranks) for numbers in whole]
    return [*parts, sum(parts) // 1024 + 1]


def require_libaio(key: str) -> None:
    """Refuse files where their reading and writing cannot be compiled, which takes DeepSpeed minutes, once a machine.

    Args:
        key: what asks for files.

    Raises:
        ConfigError: libaio is not installed.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ConfigError([f"{key}=nvme: needs libaio, on Debian apt install libaio-dev; nearest: cpu"])
    tools = str(Path(sys.executable).parent)  # ninja lies beside python, and the environment may not be activated
    if tools not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"


def require_folder(folder: Path, key: str) -> None:
    """Make the folder of DeepSpeed's files, or refuse what cannot be one.

    Args:
        folder: of this run.
        key: what asks for files.

    Raises:
        StorageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        told = f"engine.nvme_path={folder.parent}: no folder that can be written ({error.strerror})"
        raise StorageError(f"{told}; nearest: a folder on a local disk, or {key}=cpu") from error


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
