"""The DeepSpeed side of `build`: the model whole on each rank with its first weights, and the engine over it."""

from __future__ import annotations

from importlib.util import find_spec

from distllm.comm import World
from distllm.config.deepspeed_json import deepspeed_json
from distllm.config.errors import ConfigError
from distllm.config.schema import Config
from distllm.engine.deepspeed import DeepSpeedEngine, Tensors
from distllm.models.build import meta_model
from distllm.models.spec import ModelSpec
from distllm.parallel.parallelize import fill
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


def build_deepspeed(config: Config, world: World, *, spec: ModelSpec, task: Task, tensors: Tensors) -> DeepSpeedEngine:
    """The model and the DeepSpeed engine that trains it.

    Each rank holds the whole model in fp32 for a moment, also at stage 3.

    Args:
        config: what decides how it learns; `check_engine` has passed it.
        world: this rank's facts.
        spec: the model that trains.
        task: what it learns.
        tensors: a call gives the first weights by name, whole.
    """
    model = meta_model(spec)
    scales = learning_rate_scales(model, spec, config.tune)
    optimizer = make_optimizer(config.optim, model=model, device=world.device, scales=scales)
    fill(model, tensors(), device=world.device)
    return DeepSpeedEngine(
        model, json=deepspeed_json(config, ranks=world.size), tensors=tensors, objective=task.objective,
        optimizer=optimizer, schedule=make_schedule(config.schedule, peak=config.optim.lr, steps=config.train.steps), world=world,
    )  # fmt: skip
