"""The DeepSpeed side of `build`: the model with its first weights, whole on each rank or its tp part, and the engine over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec

from torch import nn

from distllm.comm import World
from distllm.config.check import resolve_layout
from distllm.config.check_task import loss_unit
from distllm.config.deepspeed_json import FileBuffers, deepspeed_json
from distllm.config.errors import ConfigError
from distllm.config.schema import Config
from distllm.engine.deepspeed import DeepSpeedEngine, Tensors
from distllm.engine.deepspeed_buffers import file_buffers
from distllm.engine.deepspeed_passes import WholeModel
from distllm.engine.deepspeed_pipeline import PipelinePasses
from distllm.engine.native import DTYPES
from distllm.models.build import meta_model
from distllm.models.spec import ModelSpec
from distllm.parallel.mesh import Mesh
from distllm.parallel.parallelize import Layout, find_blocks, parallelize
from distllm.parallel.tensor_plain import make_plain
from distllm.train.optim import make_optimizer
from distllm.train.schedule import make_schedule
from distllm.train.tasks import Task
from distllm.train.tune import learning_rate_scales


def require_deepspeed() -> None:
    """Refuse to begin where DeepSpeed is not installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        found = find_spec("deepspeed") is not None
    except ValueError:  # it stands in sys.modules as absent
        found = False
    if not found:
        raise ConfigError(["engine.name=deepspeed: needs deepspeed; pip install 'distllm[deepspeed]', or engine.name=native"])


def build_deepspeed(
    config: Config, world: World, *, mesh: Mesh, spec: ModelSpec, task: Task, tensors: Tensors
) -> DeepSpeedEngine:
    """The model and the DeepSpeed engine that trains it.

    Each rank holds the whole model, or its tp part of its stage, in fp32 for a moment, also at stage 3.

    Args:
        config: what decides how it learns; `check_engine` has passed it.
        world: this rank's facts.
        mesh: the ranks by axis.
        spec: the model that trains.
        task: what it learns.
        tensors: a call gives the first weights by name, whole.

    Raises:
        ConfigError: a part of the model is fixed, such as tables of sines.
    """
    model = meta_model(spec)
    if fixed := [name for name, parameter in model.named_parameters() if not parameter.requires_grad]:
        rule = f"trains all weights, and {fixed[0]} of {spec.name} is fixed"
        raise ConfigError([f"engine.name=deepspeed: {rule}; nearest: engine.name=native"])
    # By names of the whole model, before a pipeline cuts it.
    scales = learning_rate_scales(model, spec, config.tune)
    optimizer = make_optimizer(config.optim, model=model, device=world.device, scales=scales)
    blocks = find_blocks(model, spec=spec)
    layout = Layout(
        DTYPES[config.precision.compute], activation=config.activation, axes=config.layout,
        microbatches=resolve_layout(config, world.size).accumulation, seq_len=config.data.seq_len, rounded_weights=True,
    )  # fmt: skip
    parallel = parallelize(model, mesh.unsharded(), spec=spec, tensors=tensors(), device=world.device, layout=layout)
    cuts = make_plain(parallel.model, packed=parallel.packings)
    buffers = None
    if config.engine.offload_parameters == "nvme":
        numbers = {name: parameter.numel() for name, parameter in parallel.model.named_parameters()}
        buffers = buffers_of(config, parallel.model, numbers=numbers, ranks=mesh.dp_size, blocks=blocks)
    return DeepSpeedEngine(
        parallel.model, json=deepspeed_json(config, ranks=world.size, buffers=buffers), tensors=tensors,
        objective=task.objective, optimizer=optimizer,
        schedule=make_schedule(config.schedule, peak=config.optim.lr, steps=config.train.steps), precision=config.precision,
        world=world, mesh=mesh, loss_unit=loss_unit(config),
        cuts=cuts, blocks=blocks, copies=parallel.copies,
        passes=WholeModel if parallel.pipeline is None else partial(PipelinePasses, parallel=parallel),
    )  # fmt: skip


def buffers_of(
    config: Config, model: nn.Module, *, numbers: Mapping[str, int], ranks: int, blocks: Sequence[nn.Module]
) -> FileBuffers:
    """What parameters in files need of memory under this config.

    Args:
        config: what is computed in, recomputed and cut by tp.
        model: on any device.
        numbers: of each parameter by name, as far as tp leaves them to a rank.
        ranks: over which ZeRO cuts each.
        blocks: the model's.
    """
    return file_buffers(
        model, numbers=numbers, ranks=ranks, number_bytes=DTYPES[config.precision.compute].itemsize,
        recomputed=config.activation.mode != "none", whole=blocks if config.layout.tp > 1 else (),
    )  # fmt: skip
