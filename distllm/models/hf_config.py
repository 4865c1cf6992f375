"""The config of a transformers model: from a type and sizes, or from a folder, and made fit for the task and the data."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from distllm.config.errors import ConfigError, DataError
from distllm.config.roles import Roles
from distllm.config.schema import ModelConfig

UNDECLARED = {
    "qwen3_moe": {"head_dim"},
    "deberta-v2": {"position_buckets", "norm_rel_ebd", "share_att_key", "conv_kernel_size", "conv_act"},
}
"""Sizes that a model reads though its config class does not declare them."""


@dataclass(frozen=True)
class Head:
    """What transformers has for a task."""

    what: str
    """How to call such a model: "a causal language model"."""
    auto: Any
    """The Auto class that makes it."""
    names: Mapping[str, Any]
    """The model types that have it."""
    example: str


CAUSAL = Head(
    "a causal language model", transformers.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "llama"
)
MASKED = Head("a masked language model", transformers.AutoModelForMaskedLM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert")
TRANSLATES = Head(
    "an encoder-decoder", transformers.AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "marian"
)
CLASSIFIES = Head(
    "a classifier of texts",
    transformers.AutoModelForSequenceClassification,
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "bert",
)
BODY = Head("a model without a head", transformers.AutoModel, auto.MODEL_MAPPING_NAMES, "bert")
HEADS = {
    "causal_lm": CAUSAL, "sft": CAUSAL, "masked_lm": MASKED, "translation_lm": MASKED, "seq2seq": TRANSLATES,
    "classification": CLASSIFIES, "regression": CLASSIFIES, "multi_task": BODY,
}  # fmt: skip
"""task.kind -> the head that a model gets; a multi_task model brings its own heads."""


@dataclass(frozen=True)
class Needs:
    """What the data ask of a model."""

    task: str
    """task.kind."""
    vocab_size: int
    """The tokenizer's number of ids."""
    seq_len: int
    """Tokens of one sample."""
    labels: int | None = None
    """Outputs of a classifier; 1 for regression."""
    label_names: Sequence[str] = ()
    roles: Roles | None = None
    """The tokenizer's special tokens."""

    @property
    def causal(self) -> bool:
        return self.task in ("causal_lm", "sft")


def config_from_type(model: ModelConfig, *, needs: Needs) -> Any:
    """A transformers config of `model.type` with the user's sizes; vocabulary, positions and ids follow from the data.

    Raises:
        ConfigError: an unknown type or size, a type without the head that the task needs, or a value that cannot be.
    """
    kind, head = model.type, HEADS[needs.task]
    assert kind is not None, "the caller checked that the model has a type"
    if kind not in head.names or kind not in CONFIG_MAPPING:
        why = f"is not a model of transformers{nearest(kind, head.names)}"
        if kind in CONFIG_MAPPING:
            why = f"is not {head.what}; one is {head.example}"
        raise ConfigError([f"model.type={kind}: {why}"])
    cls = CONFIG_MAPPING[kind]
    values = _checked_sizes(cls, model.sizes)
    own = {name: cls.attribute_map.get(name, name) for name in ("vocab_size", "max_position_embeddings")}
    if values.setdefault(own["vocab_size"], needs.vocab_size) < needs.vocab_size:
        raise ConfigError([_too_small(f"model.sizes.{own['vocab_size']}", values[own["vocab_size"]], needs.vocab_size)])
    names = _fields(cls)
    if own["max_position_embeddings"] in names:
        values.setdefault(own["max_position_embeddings"], needs.seq_len + _first_position(cls, needs.roles))
    if needs.causal and kind in MASKED.names and "is_decoder" in names:
        values.setdefault("is_decoder", True)  # an encoder family looks only backwards as a decoder
    if kind == "gpt_neo" and values.get("num_layers", 1) % 2 == 0:  # its default pattern is that of 24 layers
        values.setdefault("attention_types", [[["global", "local"], values["num_layers"] // 2]])
    # A skipped block has no gradient, and ranks would skip different ones.
    values |= {name: 0.0 for name in names if "layerdrop" in name and name not in values}
    values |= _dropouts(cls, model, names)
    _set_ids(values, names, needs, given=model.sizes)
    try:
        config = cls(**values)
    except Exception as error:  # the strict configs raise their own classes, others whatever their checks raise
        raise ConfigError([_bad_size(model, error)]) from error
    if config.get_text_config() is not config:
        hint = f"; use model.type={config.get_text_config().model_type}"
        raise ConfigError([f"model.type={kind}: has more than text{hint}"])
    problem = _unfit(config, needs)
    if problem:
        raise ConfigError([f"model.type={kind}: {problem}"])
    _set_labels(config, needs)
    return config


def config_from_folder(folder: Path, model: ModelConfig, *, needs: Needs) -> Any:
    """The transformers config of a model folder, changed by the user's sizes and fitted to the task.

    Raises:
        ConfigError: an unknown size, or a value that cannot be.
        DataError: a folder whose model cannot do the task, or cannot read the tokenizer's ids.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        text = first_line(error)
        if "trust_remote_code" in str(error):
            text = "it needs the Python code that comes with it; read that code, then set model.trust_remote_code=true"
        raise DataError(f"model.path={model.path}: config.json cannot be used: {text}") from error
    kind, head = config.model_type, HEADS[needs.task]
    custom = model.trust_remote_code and head.auto.__name__ in (getattr(config, "auto_map", None) or {})
    if kind not in head.names and not custom:
        raise DataError(f"model.path={model.path}: {kind} is not {head.what}; one is {head.example}")
    if getattr(config, "quantization_config", None) is not None:
        raise DataError(f"model.path={model.path}: the weights are quantised; use the unquantised model")
    if config.get_text_config() is not config:
        inner = config.get_text_config().model_type
        raise DataError(f"model.path={model.path}: {kind} has more than text; use a folder of type {inner}")
    names = _fields(type(config))
    values: dict[str, Any] = {name: 0.0 for name in names if "layerdrop" in name}
    if kind in MASKED.names and "is_decoder" in names:
        values["is_decoder"] = needs.causal  # the same family looks both ways as an encoder
    values |= _checked_sizes(type(config), model.sizes) | _dropouts(type(config), model, names)
    try:
        for name, value in values.items():
            setattr(config, name, value)
    except Exception as error:
        raise ConfigError([_bad_size(model, error)]) from error
    if config.vocab_size < needs.vocab_size:
        raise DataError(_too_small(f"model.path={model.path}: vocab_size", config.vocab_size, needs.vocab_size))
    problem = _unfit(config, needs) or _adopt_ids(config, needs)
    if problem:
        raise DataError(f"model.path={model.path}: {problem}")
    _refuse_other_order(config, model, needs)
    _set_labels(config, needs)
    return config


def _unfit(config: Any, needs: Needs) -> str | None:
    """Why a model that has the head cannot do the task, or None."""
    if config.is_encoder_decoder and needs.task != "seq2seq" and not needs.causal:  # the decoder alone is causal
        # Their classifiers read the state of the last end token, which rows of padding do not have.
        return f"is an encoder-decoder, which is for task.kind=seq2seq; for task.kind={needs.task} use an encoder such as bert"
    if not config.is_encoder_decoder and needs.task == "seq2seq":
        return f"is not {TRANSLATES.what}; one is {TRANSLATES.example}"
    if counts_from_padding(type(config)) and needs.causal:
        return f"{config.model_type} counts positions by its padding token; use bert, gpt2 or llama"
    if counts_from_padding(type(config)) and needs.roles is not None and needs.roles.pad is None:
        return f"{config.model_type} counts positions by its padding token, which the tokenizer lacks; use bert"
    return None


def _set_ids(values: dict[str, Any], names: Mapping[str, Any], needs: Needs, *, given: Mapping[str, Any]) -> None:
    """Put the tokenizer's special ids into the values of a config, whose defaults are those of some other tokenizer.

    A causal model reads packed text and gets none: the row of a padding id would never learn.
    """
    roles = None if needs.causal else needs.roles
    begin = roles.begin if roles else None
    ids = {
        "pad_token_id": roles.pad if roles else None,
        "bos_token_id": begin,
        "cls_token_id": begin,
        "eos_token_id": roles.eos if roles else None,
        "sep_token_id": roles.separator if roles else None,
        "forced_eos_token_id": roles.eos if roles else None,
        "forced_bos_token_id": None,
    }
    if needs.task == "seq2seq":
        start = begin if begin is not None else ids["pad_token_id"]
        ids["decoder_start_token_id"] = start
    always = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    values |= {name: i for name, i in ids.items() if (name in names or name in always) and name not in given}


def _adopt_ids(config: Any, needs: Needs) -> str | None:
    """Give a loaded config the tokenizer's padding id and what else it lacks; why it cannot be, or None."""
    roles = needs.roles
    if needs.causal or roles is None:
        return None
    if counts_from_padding(type(config)) and config.pad_token_id != roles.pad:
        return (
            f"counts positions from its padding token {config.pad_token_id}, the tokenizer's is {roles.pad}; "
            "use the model's own tokenizer: data.tokenizer.kind=hf data.tokenizer.path=FOLDER"
        )
    # A decoder that classifies finds the last token by it, an embedding keeps its row at zero.
    config.pad_token_id = roles.pad
    if needs.task == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = roles.begin if roles.begin is not None else roles.pad
    return None


def head_labels(architectures: Sequence[str] | None, id2label: Mapping[Any, str] | None) -> tuple[str, ...]:
    """The names that a folder's classifier gives its classes, in the order of their numbers; none where it has no such head,
    or names that only number them."""
    if not architectures or not id2label or architectures[0] not in CLASSIFIES.names.values():
        return ()
    names = tuple(str(id2label[i]) for i in sorted(id2label, key=int))
    return () if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


def _refuse_other_order(config: Any, model: ModelConfig, needs: Needs) -> None:
    """Refuse a head that answers the run's own labels in another order: each would begin as another."""
    theirs, own = head_labels(config.architectures, config.id2label), tuple(needs.label_names)
    if theirs != own and sorted(theirs) == sorted(own):
        rule = f"the head of model.path={model.path} has them as {', '.join(theirs)}"
        raise ConfigError([f"task.labels=[{', '.join(own)}]: {rule}; nearest: task.labels=[{', '.join(theirs)}]"])


def _set_labels(config: Any, needs: Needs) -> None:
    """The number and the names of a classifier's outputs."""
    if needs.task not in ("classification", "regression"):
        return
    assert needs.labels is not None, "the caller gives the number of labels"
    config.num_labels = needs.labels
    config.problem_type = "regression" if needs.task == "regression" else "single_label_classification"
    if needs.label_names:
        assert len(needs.label_names) == needs.labels, "a name for each label"
        config.id2label = dict(enumerate(needs.label_names))
        config.label2id = {name: i for i, name in enumerate(needs.label_names)}


def _dropouts(cls: Any, model: ModelConfig, names: Mapping[str, Any]) -> dict[str, float]:
    """Every dropout probability of a family set to `model.dropout`, but those that `model.sizes` sets.

    A layerdrop is none: it skips whole blocks.
    """
    if model.dropout is None:
        return {}
    found = [n for n in names if "drop" in n and "layerdrop" not in n and "bool" not in str(names[n])]
    if not found:
        raise ConfigError([f"model.dropout={model.dropout}: {cls.model_type} has no dropout; use model.dropout=null"])
    sizes = {cls.attribute_map.get(name, name) for name in model.sizes}
    return {name: model.dropout for name in found if name not in sizes}


def counts_from_padding(cls: Any) -> bool:
    """Whether a family numbers positions from its padding id + 1, as RoBERTa does.

    Args:
        cls: the config class.
    """
    try:
        module = sys.modules[auto.MODEL_MAPPING[cls].__module__]
    except KeyError:
        return False
    return any(hasattr(thing, "create_position_ids_from_input_ids") for thing in vars(module).values())


def _first_position(cls: Any, roles: Roles | None) -> int:
    return roles.pad + 1 if roles is not None and roles.pad is not None and counts_from_padding(cls) else 0


def max_positions(config: Any) -> int | None:
    """The longest sequence that a config's positions allow; None: any."""
    value = getattr(config, "max_position_embeddings", None)
    if not isinstance(value, int) or value <= 0:
        return None
    pad = config.pad_token_id if counts_from_padding(type(config)) else None
    return value if pad is None else value - pad - 1


def check_positions(config: Any, model: ModelConfig, *, seq_len: int) -> None:
    """Refuse samples that are longer than the model's positions."""
    limit = max_positions(config)
    if limit is None or limit >= seq_len:
        return
    name = own_name(config, "max_position_embeddings")
    enough = seq_len + config.max_position_embeddings - limit
    more = "" if model.path else f" or model.sizes.{name}={enough}"
    raise ConfigError([f"data.seq_len={seq_len}: the model has {limit} positions; use data.seq_len={limit}{more}"])


def _checked_sizes(cls: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """`sizes` under the config class's own names; an unknown name is an error with the nearest one."""
    names, aliases = _fields(cls), dict(cls.attribute_map)
    rope = {"rope_theta", "partial_rotary_factor"} if "rope_parameters" in names else set()
    known = set(names) | set(aliases) | rope | UNDECLARED.get(cls.model_type, set())
    problems = [
        f"model.sizes.{name}: {cls.model_type} has no such size{nearest(name, known)}" for name in sizes if name not in known
    ]
    problems += [
        f"model.sizes.{name}={value}: ranks would skip different blocks; use 0"
        for name, value in sizes.items()
        if "layerdrop" in name and value
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


def own_name(config: Any, name: str) -> str:
    """A config's own name of a common size: n_positions for max_position_embeddings."""
    return dict(type(config).attribute_map).get(name, name)


def nearest(name: str, known: Any) -> str:
    """What to append to a message about an unknown name."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; the nearest is {near[0]}" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
