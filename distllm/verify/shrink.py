"""A small model of the user's own kind: the same classes and the same traits, with smaller numbers in its config.

Only config values change. What stays: the ratio of query to key heads, whether embeddings are tied, norms of queries and
keys, how many experts see a token, biases, activations, the vocabulary. What goes: layers, width, dropout.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distllm.config.check_task import one_target, packed
from distllm.config.errors import ConfigError
from distllm.config.schema import Config, ModelConfig

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size")
FEED_FORWARD = (
    "intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "ffn_hidden_size",
)  # fmt: skip
EXPERT_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size")
HEAD_DIMS = ("head_dim", "d_kv")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
PER_LAYER = ("layer_types", "attention_layers", "attention_types", "mlp_only_layers", "no_rope_layers")
"""Lists with an entry for each layer: the config class makes them anew."""

HEAD_DIM = 8
WIDEST_RATIO = 8
SMALL = 20_000_000
"""Parameters up to which a module of the user's own is taken as it is."""
LARGE_VOCABULARY = 16_384
SEQUENCE = 32


@dataclass(frozen=True)
class Degrees:
    """What a small model has to be divisible by."""

    layers: int = 2
    """Pipeline stages."""
    heads: int = 2
    """Key heads: tp, and cp where heads are spread over it."""
    experts: int = 4
    length: int = 16
    """The parts that a sequence is cut into."""


def degrees_of(sizes: Mapping[str, int], *, virtual: int) -> Degrees:
    """What a layout asks of the model.

    Args:
        sizes: ranks by axis.
        virtual: stages of one pipeline rank.
    """
    stages = sizes["pp"] * virtual
    heads = sizes["tp"] * sizes["cp"]
    return Degrees(
        layers=max(2, stages), heads=max(2, heads), experts=max(4, sizes["ep"]), length=max(SEQUENCE, 2 * heads)
    )  # fmt: skip


def shrink(config: Config, known: Any, degrees: Degrees) -> Config:
    """The config of a small model of the same kind.

    Args:
        config: the user's.
        known: the transformers config of the user's model; None for a module of their own, which stays as it is.
        degrees: what its sizes must be divisible by.

    Returns:
        The config with a small model and short samples, without dropout, compiling, moving averages and a teacher.
    """
    model = config.model if known is None else _small(config.model, known, degrees)
    data = config.data
    if packed(config):
        data = data.model_copy(update={"seq_len": min(data.seq_len, degrees.length) if known is None else degrees.length})
    train = config.train.model_copy(
        update={
            "compile": False, "ema": 0.0, "threads": 1, "batch_tokens": None, "batch_ramp": 0, "seq_ramp": 0,
            "micro_batch": 1, "accumulation": "auto", "deterministic": False,
        }
    )  # fmt: skip
    distill = type(config.distill)()
    # With the usual 1e-8 Adam divides rounding by rounding where a gradient is nearly zero, and makes 1e-11 of 1e-16.
    optim = config.optim.model_copy(update={"eps": max(config.optim.eps, 1e-5)})
    schedule = config.schedule.model_copy(update={"warmup": 0})  # every step at its full rate, or weights hardly move
    tune = config.tune.model_copy(update={"lora": config.tune.lora.model_copy(update={"dropout": 0.0})})
    changed = {"model": model, "data": data, "train": train, "distill": distill, "schedule": schedule, "tune": tune}
    changed["optim"] = optim
    return config.model_copy(update=changed | {"precision": config.precision.model_copy(update={"tf32": False})})


def _small(model: ModelConfig, known: Any, degrees: Degrees) -> ModelConfig:
    """`model.type` with small sizes; a model that comes from a folder gives its own values first."""
    if model.trust_remote_code:
        raise ConfigError(
            [f"model.path={model.path}: verify cannot shrink a model that brings code of its own; nearest: model.type=llama"]
        )
    values = dict(known.to_dict())
    sizes = dict(model.sizes)
    if model.path is not None:
        plain = type(known)().to_dict()
        own = {n: v for n, v in values.items() if n in plain and v != plain[n] and n not in _NOT_SIZES}
        sizes = {**own, **sizes}
    aliases, small = dict(type(known).attribute_map), small_sizes(values, known, degrees)
    replaced = {aliases.get(name, name) for name in small} | {"n_positions", "max_position_embeddings", *PER_LAYER}
    sizes = {name: value for name, value in sizes.items() if aliases.get(name, name) not in replaced} | small
    return model.model_copy(
        update={"type": known.model_type, "path": None, "weights": None, "sizes": sizes, "dropout": None}
    )


_NOT_SIZES = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "model_type", "_name_or_path", "id2label",
    "label2id", "auto_map", "num_labels", "problem_type",
}  # fmt: skip


def small_sizes(values: Mapping[str, Any], known: Any, degrees: Degrees) -> dict[str, Any]:
    """The sizes that change, by the family's own names.

    Args:
        values: the user's transformers config as a dict.
        known: the config itself, whose class says what sizes are called.
        degrees: what they must be divisible by.
    """
    heads, kv = _heads(values, known, degrees.heads)
    width = heads * HEAD_DIM
    wide = 12 * degrees.heads  # of the feed-forward: no multiple of the width, so that a mixed-up dim is seen
    small: dict[str, Any] = {}
    for names, value in (
        (LAYERS, degrees.layers), (HEADS, heads), (KV_HEADS, kv), (WIDTHS, width), (HEAD_DIMS, HEAD_DIM),
        (FEED_FORWARD, wide), (EXPERT_WIDTHS, wide), (EXPERTS, degrees.experts),
    ):  # fmt: skip
        small |= {name: value for name in names if values.get(name) is not None}
    if any(n in small for n in EXPERTS):
        for name in ("num_experts_per_tok", "top_k"):
            if values.get(name):
                small[name] = min(int(values[name]), 2)
    small |= {n: 0.0 for n, v in values.items() if "drop" in n and isinstance(v, float) and v}
    return {own: value for name, value in small.items() if (own := _own_name(name, type(known))) is not None}


def _own_name(name: str, cls: Any) -> str | None:
    """What a config class calls a size; None where it does not take it."""
    if dataclasses.is_dataclass(cls):
        takes = {f.name for f in dataclasses.fields(cls)}
    else:
        takes = set(inspect.signature(cls.__init__).parameters)
    aliases = [alias for alias, target in cls.attribute_map.items() if target == name]
    return name if name in takes else aliases[0] if aliases else None


def _heads(values: Mapping[str, Any], known: Any, unit: int) -> tuple[int, int]:
    """(query heads, key heads) with the user's ratio and key heads divisible by `unit`; one key head stays one."""
    heads = int(getattr(known, "num_attention_heads", 0) or unit)
    kv = next((int(values[n]) for n in KV_HEADS if values.get(n)), heads)
    ratio = min(max(1, heads // kv), WIDEST_RATIO)
    if kv == 1:
        return unit * math.ceil(ratio / unit), 1
    return unit * ratio, unit


def check_own_module(config: Config, *, parameters: int) -> None:
    """Refuse a module of the user's own that is too large to be taken as it is.

    Args:
        config: with `model.spec`.
        parameters: how many it has.

    Raises:
        ConfigError: more than SMALL.
    """
    if parameters <= SMALL:
        return
    takes = _arguments(str(config.model.spec))
    name = next((n for n in takes if any(word in n for word in ("layer", "block", "depth", "hidden", "width", "dim"))), "NAME")
    raise ConfigError(
        [
            f"model.spec={config.model.spec}: {parameters:,} parameters, and verify takes a module of your own as it is, with "
            f"at most {SMALL:,}; nearest: a smaller model.spec_args.{name}=... on this command line"
        ]
    )


def _arguments(path: str) -> list[str]:
    """The names of the arguments of a spec function."""
    import importlib

    module, _, name = path.partition(":")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


def folded(config: Config, *, vocab_size: int) -> int | None:
    """The ids that a huge vocabulary is folded to (id modulo this); None leaves it as it is.

    Only for the next token: other tasks have ids with a meaning of their own.
    """
    if config.task.kind != "causal_lm" or config.model.spec is not None or vocab_size <= LARGE_VOCABULARY:
        return None
    return 4096


def uneven(config: Config) -> bool:
    """Whether targets are to be dropped here and there, so that a mean of means shows: not where the task does it itself."""
    return config.task.kind in ("causal_lm", "sft", "seq2seq") or (one_target(config) and config.task.kind == "classification")
