"""Any causal language model of transformers as a ModelSpec: by type and sizes, or from a folder or hub name with weights.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from distllm.config.errors import ConfigError, DataError
from distllm.config.machine import reachable
from distllm.config.schema import ModelConfig
from distllm.models.flops import attention_windows, flops_per_token
from distllm.models.spec import ModelSpec

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")

UNDECLARED = {"qwen3_moe": {"head_dim"}}
"""Sizes that a model reads though its config class does not declare them."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own log lines and progress bars inside the block; errors still raise."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


def hf_spec(model: ModelConfig, *, vocab_size: int, seq_len: int, packed: bool) -> ModelSpec:
    """Describe the transformers model that `model.type` or `model.path` names.

    Args:
        model: the model section of the config, with `type` or `path`.
        vocab_size: the tokenizer's number of ids.
        seq_len: tokens of one sample.
        packed: whether samples come with an attention mask that keeps documents apart.

    Returns:
        The spec; with `path`, its `weights` is the folder to read.

    Raises:
        ConfigError: an unknown type or size, or a value that cannot be.
        DataError: a model folder that cannot be used.
    """
    weights = None
    with quiet():
        if model.path is not None:
            weights = weights_folder(model.path, trust=model.trust_remote_code)
            config = _config_from_folder(weights, model, vocab_size=vocab_size)
        else:
            config = _config_from_type(model, vocab_size=vocab_size, seq_len=seq_len)
    limit = max_positions(config)
    if limit is not None and limit < seq_len:
        more = "" if model.path else f" or model.sizes.{_own_name(config, 'max_position_embeddings')}={seq_len}"
        raise ConfigError([f"data.seq_len={seq_len}: the model has {limit} positions; use data.seq_len={limit}{more}"])
    spec = spec_from_config(config, attention=model.attention, weights=weights, trust=model.trust_remote_code)
    if packed:
        _check_packed(spec, seq_len)
    return spec


def spec_from_config(
    config: Any, *, attention: str = "auto", weights: Path | None = None, trust: bool = False
) -> ModelSpec:
    """Describe the causal language model of a transformers config.

    Args:
        config: a transformers config; a copy is kept.
        attention: as in `model.attention`.
        weights: a folder with safetensors to start from, or None for random weights.
        trust: whether the model's class may come from Python code in its folder.

    Returns:
        The spec, whose blocks, embedding, norm and head were found on a meta copy of the model.
    """
    config = copy.deepcopy(config)
    config.use_cache = False  # a cache of keys and values is of use in generation only; `generate` asks for it

    def build() -> nn.Module:
        with quiet():
            module = _construct(copy.deepcopy(config), attention, trust)
        if module.config._attn_implementation == "eager":
            module.register_forward_pre_hook(_additive_mask, with_kwargs=True)
        return module

    with torch.device("meta"):
        skeleton = build()
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in skeleton.modules()):
        raise ConfigError([f"model: {config.model_type} counts positions by its padding token; use bert, gpt2 or llama"])
    places = locate(skeleton, layers=getattr(config, "num_hidden_layers", None))

    def init(module: nn.Module) -> None:
        with torch.no_grad(), quiet():
            skeleton._init_weights(module)  # type: ignore[operator]

    # The class is known only now; export writes it into config.json.
    config.architectures = [type(skeleton).__name__]
    return ModelSpec(
        name=config.model_type,
        build=build,
        init=init,
        blocks=places.blocks,
        embedding=places.embedding,
        norm=places.norm,
        head=places.head,
        tp_plan=tp_plan(skeleton),
        vocab_size=config.vocab_size,
        max_seq_len=max_positions(config),
        flops_per_token=flops_per_token(config, skeleton),
        weights=weights,
        hf_config=config,
    )


def _construct(config: Any, attention: str, trust: bool) -> Any:
    """The model of `config`, fp32, with the attention kernel asked for; `auto` is sdpa where the family has it."""
    make = transformers.AutoModelForCausalLM.from_config
    tries = ("sdpa", "eager") if attention == "auto" else (attention,)
    for kernel in tries:
        try:
            return make(config, attn_implementation=kernel, dtype=torch.float32, trust_remote_code=trust)
        except (ValueError, ImportError) as error:
            if kernel == tries[-1]:
                raise ConfigError(
                    [f"model.attention={attention}: {config.model_type}: {_first_line(error)}; use model.attention=auto"]
                ) from error
    raise AssertionError("the last kernel returns or raises")


def _additive_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Turn a bool mask [B, 1, S, S] (True: may look) into numbers: transformers' eager attention *adds* the mask."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.dtype == torch.bool:
        low = torch.finfo(torch.float16).min  # exp of it is 0 in every format, and no format overflows
        kwargs = {**kwargs, "attention_mask": torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, low)}
    return args, kwargs


# ---------------------------------------------------------------------------------------------------------------------
# The config: from a type and sizes, or from a folder


def _config_from_type(model: ModelConfig, *, vocab_size: int, seq_len: int) -> Any:
    """A transformers config of `model.type` with the user's sizes; vocabulary and positions follow from the data."""
    kind = model.type
    assert kind is not None, "the caller checked that the model has a type"
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in CONFIG_MAPPING:
        known = kind in CONFIG_MAPPING
        why = "is not a causal language model" if known else "is not a model of transformers"
        raise ConfigError([f"model.type={kind}: {why}{_nearest(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"])
    cls = CONFIG_MAPPING[kind]
    values = _checked_sizes(cls, model.sizes)
    own = {name: cls.attribute_map.get(name, name) for name in ("vocab_size", "max_position_embeddings")}
    if values.setdefault(own["vocab_size"], vocab_size) < vocab_size:
        raise ConfigError([_too_small(f"model.sizes.{own['vocab_size']}", values[own["vocab_size"]], vocab_size)])
    names = _fields(cls)
    if own["max_position_embeddings"] in names:
        values.setdefault(own["max_position_embeddings"], seq_len)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and "is_decoder" in names:
        values.setdefault("is_decoder", True)  # an encoder family looks only backwards as a decoder
    if kind == "gpt_neo" and values.get("num_layers", 1) % 2 == 0:  # its default pattern is that of 24 layers
        values.setdefault("attention_types", [[["global", "local"], values["num_layers"] // 2]])
    try:
        config = cls(**values)
    except Exception as error:  # the strict configs raise their own classes, others whatever their checks raise
        raise ConfigError([_bad_size(model, error)]) from error
    if config.get_text_config() is not config:
        hint = f"; use model.type={config.get_text_config().model_type}"
        raise ConfigError([f"model.type={kind}: has more than text{hint}"])
    # The defaults are the ids of some other tokenizer. A padding id is worse than wrong: its row would never learn.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name not in model.sizes:
            setattr(config, name, None)
    return config


def _config_from_folder(folder: Path, model: ModelConfig, *, vocab_size: int) -> Any:
    """The transformers config of a model folder, changed by the user's sizes."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        text = _first_line(error)
        if "trust_remote_code" in str(error):
            text = "it needs the Python code that comes with it; read that code, then set model.trust_remote_code=true"
        raise DataError(f"model.path={model.path}: config.json cannot be used: {text}") from error
    custom = model.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not custom:
        raise DataError(f"model.path={model.path}: {config.model_type} is not a causal language model")
    if getattr(config, "quantization_config", None) is not None:
        raise DataError(f"model.path={model.path}: the weights are quantised; use the unquantised model")
    if config.get_text_config() is not config:
        kind = config.get_text_config().model_type
        raise DataError(f"model.path={model.path}: {config.model_type} has more than text; use a folder of type {kind}")
    try:
        for name, value in _checked_sizes(type(config), model.sizes).items():
            setattr(config, name, value)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError([_bad_size(model, error)]) from error
    if config.vocab_size < vocab_size:
        raise DataError(_too_small(f"model.path={model.path}: vocab_size", config.vocab_size, vocab_size))
    return config


def _checked_sizes(cls: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """`sizes` under the config class's own names; an unknown name is an error with the nearest one."""
    names, aliases = _fields(cls), dict(cls.attribute_map)
    rope = {"rope_theta", "partial_rotary_factor"} if "rope_parameters" in names else set()
    known = set(names) | set(aliases) | rope | UNDECLARED.get(cls.model_type, set())
    problems = [
        f"model.sizes.{name}: {cls.model_type} has no such size{_nearest(name, known)}" for name in sizes if name not in known
    ]
    if problems:
        raise ConfigError(problems)
    values = {aliases.get(name, name): value for name, value in sizes.items()}
    for name, value in values.items():
        kind = str(names.get(name, ""))
        # YAML 1.1 reads 1e-5 as text, and a strict config takes no 1 for a float.
        if "float" in kind and isinstance(value, (int, str)) and not isinstance(value, bool):
            try:
                values[name] = float(value)
            except ValueError:
                continue
    return values


def _fields(cls: Any) -> dict[str, Any]:
    """Names and types of a config class's values."""
    if dataclasses.is_dataclass(cls):
        return {f.name: getattr(f.type, "__name__", f.type) for f in dataclasses.fields(cls)}
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.annotation for p in parameters if p.name not in ("self", "kwargs")} | {"tie_word_embeddings": "bool"}


def _bad_size(model: ModelConfig, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1].split(": ", 1)[-1] if lines else type(error).__name__
    name = next((n for n in model.sizes if f"'{n}'" in str(error)), None)
    key = f"model.sizes.{name}={model.sizes[name]}" if name else "model.sizes"
    return f"{key}: {text}"


def _too_small(what: str, size: int, vocab_size: int) -> str:
    return f"{what}={size}: the tokenizer has {vocab_size} ids; the embedding needs at least as many"


def _check_packed(spec: ModelSpec, seq_len: int) -> None:
    """Refuse families that would not keep packed documents apart by our positions and mask."""
    config = spec.hf_config
    with torch.device("meta"):
        takes = inspect.signature(spec.build().forward).parameters
    windows = attention_windows(config)
    rule = None
    if windows is None or "position_ids" not in takes or getattr(config, "alibi", False):
        rule = f"{config.model_type} cannot keep packed documents apart; use data.cross_documents=true"
    elif any(window is not None and window < seq_len for window in windows):
        window = config.sliding_window
        rule = f"not together with a sliding window of {window} < data.seq_len; use model.sizes.sliding_window={seq_len}"
    if rule:
        raise ConfigError([f"data.cross_documents=false: {rule}"])


def max_positions(config: Any) -> int | None:
    """The longest sequence that a config's positions allow; None: any."""
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _own_name(config: Any, name: str) -> str:
    return dict(type(config).attribute_map).get(name, name)


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; the nearest is {near[0]}" if near else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def weights_folder(path: str, *, trust: bool = False) -> Path:
    """The local folder of a model with safetensors; a hub name is downloaded first (weights in safetensors only).

    Args:
        path: a local folder or a hub name.
        trust: fetch the Python code that comes with a hub model too.

    Raises:
        DataError: no such folder, no config.json, or no safetensors.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise DataError(f"model.path={path}: is a file; give the folder that holds it")
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise DataError(f"model.path={path}: no such folder")
        folder = _download(path, trust=trust)
    if not (folder / "config.json").is_file():
        raise DataError(f"model.path={path}: has no config.json; is it a transformers model folder?")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(f.name for pattern in PICKLES for f in folder.glob(pattern))
        if pickles:
            raise DataError(f"model.path={path}: has no safetensors, only {pickles[0]}, which is never loaded; convert it first")
        raise DataError(f"model.path={path}: has no weights (model.safetensors)")
    return folder


def _download(name: str, *, trust: bool) -> Path:
    import huggingface_hub

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", *(["*.py"] if trust else [])]
    try:
        cached = not reachable(huggingface_hub.constants.ENDPOINT)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=cached))
    except Exception as error:
        raise DataError(
            f"model.path={name}: no such folder here, and the hub gave no model of that name ({type(error).__name__}); "
            "check the name and the network, or give a local folder"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Where things are


@dataclass(frozen=True)
class Places:
    """Module paths of the parts of a language model."""

    blocks: tuple[str, ...]
    embedding: str | None
    norm: str | None
    head: str | None


def locate(model: nn.Module, *, layers: int | None) -> Places:
    """Find embedding, blocks, last norm and head of a transformers model without knowing its family.

    Args:
        model: the model, also on meta.
        layers: how many blocks its config names, to tell the list of blocks from other lists.
    """
    names = {id(module): name for name, module in model.named_modules()}
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    right = [(n, m) for n, m in outer if len(m) == layers] or outer
    if not right:
        raise ConfigError([f"model: {type(model).__name__} has no list of blocks to shard; use a ModelSpec of your own"])
    path, _ = max(right, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    return Places(
        blocks=(path,),
        embedding=names.get(id(embedding)),
        norm=_last_norm(model, path),
        head=names.get(id(head)) if head is not None else None,
    )


def _last_norm(model: nn.Module, blocks: str) -> str | None:
    """The norm beside the list of blocks: the first one registered after it, else (OPT registers it before) the last."""
    parent = blocks.rpartition(".")[0]
    children = list(model.get_submodule(parent).named_children())
    at = [name for name, _ in children].index(blocks.rpartition(".")[2])
    norms = [(i, n) for i, (n, m) in enumerate(children) if "norm" in type(m).__name__.lower() and "emb" not in n]
    after = [n for i, n in norms if i > at] or [n for _, n in norms[-1:]]
    return f"{parent}.{after[0]}".lstrip(".") if after else None


def tp_plan(model: Any) -> dict[str, str]:
    """The tensor-parallel plan that transformers carries for a model, by full module names; empty where it has none."""
    base = getattr(model.config, "base_model_tp_plan", None)
    if not base:
        return {}
    plan = {f"{model.base_model_prefix}.{name}": style for name, style in base.items()}
    return plan | dict(getattr(type(model), "_tp_plan", None) or {})
