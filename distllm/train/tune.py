"""Which weights of a model learn: all, the head, the head and the last blocks, or low-rank adapters through peft.

With adapters there are two specs of one model. The plain one names the tensors as model folders do: it is read from and
exported with. The adapted one is what trains: in it a matrix `q_proj.weight` is `q_proj.base_layer.weight`, and beside it
are `q_proj.lora_A.default.weight` [R, in] and `q_proj.lora_B.default.weight` [out, R], with R the rank.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from distllm.config.errors import ConfigError
from distllm.config.schema import LoraConfig, TuneConfig
from distllm.models.build import initial_tensors, meta_model
from distllm.models.spec import ModelSpec, in_head

ADAPTED_HEADS = ("classification", "regression", "multi_task")
"""Tasks whose head is new, so that it learns beside the adapters."""


def trainable_names(model: nn.Module, spec: ModelSpec, config: TuneConfig) -> frozenset[str]:
    """The full names of the parameters that learn; a tied one has its first name.

    What the module itself froze, such as computed positions, stays frozen.

    Args:
        model: of `tuned_spec`, on any device, not yet sharded.
        spec: names its blocks, norm and head.
        config: `train` and `top_blocks` are read.

    Raises:
        ConfigError: a head without parameters of its own, or more blocks than there are.
    """
    learn = [name for name, p in model.named_parameters() if p.requires_grad]
    if config.train == "all":
        return frozenset(learn)
    head = {name for name, _ in model.named_parameters() if _is_top(spec, name)}
    if config.train == "lora":  # peft froze all but the adapters
        adapters = {name for name in learn if is_adapter(name)}
        return frozenset(adapters | head if spec.task in ADAPTED_HEADS else adapters)
    if config.train == "head":
        if not head:
            where = "is its embedding" if spec.head else "has no name in its spec"
            raise ConfigError([f"tune.train=head: the head of {spec.name} {where}; nearest: top"])
        return frozenset(head & set(learn))
    depth = block_depths(model, spec)
    longest = max(depth.values(), default=0)
    if config.top_blocks > longest:
        raise ConfigError([f"tune.top_blocks={config.top_blocks}: {spec.name} has {longest} blocks; nearest: tune.train=all"])
    norm = f"{spec.norm}."
    return frozenset(
        name for name in learn if name in head or name.startswith(norm) or depth.get(name, longest + 1) <= config.top_blocks
    )


def apply_tune(model: nn.Module, spec: ModelSpec, config: TuneConfig) -> None:
    """Freeze what does not learn; before the model is laid out, because FSDP and DDP look at `requires_grad`.

    Args:
        model: of `tuned_spec`, on meta.
        spec: names its blocks, norm and head.
        config: the config's `tune`.
    """
    names = trainable_names(model, spec, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def block_depths(model: nn.Module, spec: ModelSpec) -> dict[str, int]:
    """How far below the head each parameter of a block is, by name: 1 in the last block.

    An encoder-decoder has two lists of blocks, and each counts from its own end.
    """
    depth: dict[str, int] = {}
    for path in spec.blocks:
        blocks = list(model.get_submodule(path).named_children())
        for below, (index, block) in enumerate(reversed(blocks), start=1):
            depth |= {f"{path}.{index}.{name}": below for name, _ in block.named_parameters()}
    return depth


def learning_rate_scales(model: nn.Module, spec: ModelSpec, config: TuneConfig) -> dict[str, float] | None:
    """What each parameter's learning rate is multiplied by: layer_decay ** k at k below the head; tables by embedding_rate too.

    The head, and norms between it and the blocks, are at 0; the embeddings, and what stands with them, below the first block.

    Args:
        model: of `tuned_spec`.
        spec: names its blocks.
        config: `layer_decay` and `embedding_rate` are read.

    Returns:
        The factor of each parameter by name; None: 1 for all.

    Source: Howard & Ruder 2018, arXiv 1801.06146; Clark et al. 2020, arXiv 2003.10555.
    """
    if config.layer_decay == config.embedding_rate == 1.0:
        return None
    depth = block_depths(model, spec)
    bottom = max(depth.values(), default=0) + 1
    tables = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        for name, _ in module.named_parameters()
    }
    scales: dict[str, float] = {}
    for name, _ in model.named_parameters():
        low = name in tables or "embed" in name.lower()
        k = depth.get(name, bottom if low and not _is_top(spec, name) else 0)
        scales[name] = config.layer_decay**k * (config.embedding_rate if name in tables else 1.0)
    return scales


def _is_top(spec: ModelSpec, name: str) -> bool:
    """Whether a parameter is the head, or a pooler: a body's last layer, which is trained with heads and often new."""
    return in_head(spec, name) or "pooler" in name.split(".")


# ---------------------------------------------------------------------------------------------------------------------
# Low-rank adapters


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted model is part of an adapter."""
    return any(part.startswith("lora_") for part in name.split("."))


def tuned_spec(spec: ModelSpec, config: TuneConfig) -> ModelSpec:
    """The spec of the model that trains: with adapters where `tune.train` is lora, else `spec` itself.

    Raises:
        ConfigError: targets that the model does not have.
    """
    if config.train != "lora":
        return spec
    targets = _targets(spec, config.lora)
    options = {"r": config.lora.rank, "lora_alpha": config.lora.alpha, "lora_dropout": config.lora.dropout}

    def build() -> nn.Module:
        import peft

        module = spec.build()
        with warnings.catch_warnings():  # gpt2's matrices lie the other way round; peft sees it, and says so
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
            return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets, **options), module)

    def init(module: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        if not isinstance(module, LoraLayer):
            spec.init(module)
            return
        with torch.no_grad():
            for down, up in zip(module.lora_A.values(), module.lora_B.values(), strict=True):
                nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
                nn.init.zeros_(up.weight)  # the product begins at zero: the model is the one it was

    return replace(spec, build=build, init=init, weights=None)


def first_tensors(spec: ModelSpec, tuned: ModelSpec, *, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """`initial_tensors` of the model that trains: the plain model's own, under the adapted names, and the adapters'.

    Args:
        spec: the plain spec.
        tuned: what `tuned_spec` made of it.
        seed: as in `initial_tensors`.
    """
    if tuned is spec:
        yield from initial_tensors(spec, seed=seed)
        return
    model = meta_model(tuned)
    layers = _adapted_layers(model)
    for name, tensor in initial_tensors(spec, seed=seed):
        path, _, key = name.rpartition(".")
        yield f"{path}.base_layer.{key}" if path in layers else name, tensor
    adapters = [name for name, _ in model.named_parameters() if is_adapter(name)]
    yield from initial_tensors(tuned, seed=seed, names=adapters)


def merged(
    tensors: Iterator[tuple[str, torch.Tensor]], spec: ModelSpec, config: TuneConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the plain model from those of the trained one: each adapter's product added to its matrix.

    Args:
        tensors: whole parameters and buffers of the model that trained, by name, in any order.
        spec: the plain spec.
        config: the config's `tune`.
    """
    if config.train != "lora":
        yield from tensors
        return
    layers = _adapted_layers(meta_model(tuned_spec(spec, config)))
    waiting: dict[str, dict[str, torch.Tensor]] = {path: {} for path in layers}
    for name, tensor in tensors:
        path = next((p for p in _parents(name) if p in layers), None)
        if path is None:
            yield name, tensor
            continue
        own = waiting[path]
        own[name.removeprefix(f"{path}.")] = tensor
        if len(own) == len(layers[path].state_dict()):
            yield from ((f"{path}.{key}", value) for key, value in _merge(layers[path], waiting.pop(path)).items())
    lost = [f"{path}.{key}" for path, own in waiting.items() for key in layers[path].state_dict() if key not in own]
    assert not lost, f"the tensors to merge lack {lost[:5]}"


def _merge(layer: Any, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base layer's tensors with the adapter in them, by peft's own arithmetic."""
    layer = copy.deepcopy(layer).to_empty(device="cpu")
    layer.load_state_dict(own)
    layer.merge()
    return {name: tensor.detach() for name, tensor in layer.base_layer.state_dict().items()}


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _parents(name: str) -> Iterator[str]:
    """The paths of the modules that a parameter is in, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _targets(spec: ModelSpec, config: LoraConfig) -> list[str]:
    """The full paths of the layers to adapt: those whose last part is named, or those of attention; never the head."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(["tune.train=lora: needs peft; pip install 'distllm[lora]'"]) from error
    linear = [path for path in _linear_layers(meta_model(spec)) if not _is_top(spec, f"{path}.weight")]
    exist = sorted({path.rpartition(".")[2] for path in linear})
    known = f"{spec.name} has {', '.join(exist)}" if exist else f"{spec.name} has no linear layers below its head"
    if missing := [target for target in config.targets if target not in exist]:
        raise ConfigError([f"tune.lora.targets={','.join(missing)}: no such linear layer; {known}"])
    if config.targets:
        return [path for path in linear if path.rpartition(".")[2] in config.targets]
    attention = [path for path in linear if "attention" in path.lower() or "attn" in path.lower()]
    if not attention:
        raise ConfigError([f"tune.lora.targets: empty, and no layer has attention in its name; {known}"])
    return attention


def _linear_layers(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D  # gpt2's linear layer

    # An attention of torch reads its output projection's weight without calling it: an adapter there would not be seen.
    unseen = {id(child) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.modules()}
    return [p for p, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and id(m) not in unseen]
