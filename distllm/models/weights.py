"""Reading a model's tensors from a folder of safetensors, one at a time; what the folder lacks is told or refused.

The same body has different names in different folders: `bert.encoder...` with a head, `encoder...` alone. So names are
compared without the prefix of either side's body.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from distllm.config.errors import DataError
from distllm.models.spec import ModelSpec, in_head

# Old checkpoints carry causal masks and rotary frequencies as tensors; models compute them.
COMPUTED = re.compile(r"(attn|attention|self_attn)\.(masked_)?bias$|rotary_emb\.inv_freq$|embeddings\.position_ids$")
# What turns hidden states into one vector comes and goes with the head, though it is named as part of the body.
POOLER = re.compile(r"(^|\.)pooler\.")
MARKER = "distllm.json"
"""The file that an export says its facts in."""


@dataclass(frozen=True)
class LoadReport:
    """What a folder's weights gave a model."""

    loaded: int
    """Tensors taken."""
    new: tuple[str, ...]
    """Parameters that were made from the seed: the name, with both shapes where the folder has another."""
    left_over: tuple[str, ...]
    """The folder's tensors that the model has no place for."""
    head_was_for: tuple[str, ...] = ()
    """The labels of a classifier's head that was taken, where the run's are others."""


@dataclass(frozen=True)
class _Plan:
    """Which tensor of a folder goes where."""

    found: dict[str, list[str]]
    """First name in the model -> the keys that hold it; a tied tensor may have several."""
    new: dict[str, str]
    """First name of a parameter that the folder cannot give -> what to say of it."""
    left_over: list[str]
    other_layout: bool
    """Whether the folder has tensors that must be computed from (experts one by one); then the rest is not known."""


def load_report(spec: ModelSpec) -> LoadReport | None:
    """What `spec.weights` will give the model, by the headers of its files; None where there is no folder.

    Args:
        spec: the model.

    Raises:
        DataError: as `read_tensors`, as far as headers tell.
    """
    from distllm.models.build import meta_model

    if spec.weights is None:
        return None
    model, files = meta_model(spec), tensor_files(spec.weights)
    plan = _plan(spec, model, files)
    if plan.other_layout:  # transformers puts them together as it reads: only the head's own names can be told
        heads = tuple(name for name in plan.new if in_head(spec, name))
        return LoadReport(len(persistent_names(model)) - len(heads), heads, ())
    _check(spec, plan, files)
    taken = any(in_head(spec, name) and not POOLER.search(name) for name in plan.found)
    return LoadReport(
        len(plan.found), tuple(plan.new.values()), tuple(plan.left_over), _other_labels(spec) if taken else ()
    )


def _other_labels(spec: ModelSpec) -> tuple[str, ...]:
    """The labels that the folder's classifier has, where the model's have other names."""
    from distllm.models.hf_config import head_labels

    assert spec.weights is not None
    if spec.task != "classification" or spec.hf_config is None or not (spec.weights / "config.json").is_file():
        return ()
    facts = json.loads((spec.weights / "config.json").read_text(encoding="utf-8"))
    theirs = head_labels(facts.get("architectures"), facts.get("id2label"))
    return () if theirs == tuple(map(str, spec.hf_config.id2label.values())) else theirs


def read_tensors(spec: ModelSpec, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by full name: parameters in fp32 from `spec.weights`, buffers that no file holds as built.

    Args:
        spec: the model, with a `weights` folder.
        model: the module with parameters on meta and real buffers.

    Returns:
        Pairs (name, tensor) of all but the parameters that are new (`load_report`): the caller makes those.

    Raises:
        DataError: tensors that are missing, left over, of another shape, or files that cannot be read.
    """
    assert spec.weights is not None, "the caller checked that there is a folder"
    folder = spec.weights
    files = tensor_files(folder)
    plan = _plan(spec, model, files)
    if plan.other_layout:
        yield from _converted(spec, model)
        return
    _check(spec, plan, files)
    opened: dict[Path, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in plan.new:
            continue
        if name not in plan.found:
            yield name, tensor.detach()
            continue
        first, *others = plan.found[name]
        value = _read(files[first], first, opened)
        for key in others:
            if not torch.equal(value, _read(files[key], key, opened)):
                raise DataError(
                    f"{folder}: {first} and {key} are one tied tensor in the config but differ in the file; "
                    "use model.sizes.tie_word_embeddings=false"
                )
        yield name, value.to(torch.float32 if isinstance(tensor, nn.Parameter) else tensor.dtype)


def _plan(spec: ModelSpec, model: nn.Module, files: dict[str, Path]) -> _Plan:
    """Match the model's tensors with a folder's, first by full name, then without prefixes, by shape."""
    assert spec.weights is not None
    ours, theirs = _prefixes(spec, model), _file_prefix(spec.weights)
    renamed, other_layout = _today(model, files) if spec.hf_config is not None else ({key: key for key in files}, False)
    exact = {name: key for key, name in renamed.items()}
    plain: dict[str, str] = {}
    for key, name in renamed.items():
        plain.setdefault(_plain(name, theirs), key)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    found: dict[str, list[str]] = {}
    new: dict[str, str] = {}
    used: set[str] = set()
    shapes = _shapes(files)
    for first, names in persistent_names(model).items():
        held = [exact.get(name) or plain.get(_plain(name, ours)) for name in names]
        keys = list(dict.fromkeys(key for key in held if key is not None))
        used.update(keys)
        shape, wanted = (shapes[keys[0]] if keys else None), tuple(own[first].shape)
        if shape == wanted:
            found[first] = keys
        elif isinstance(own[first], nn.Parameter):
            new[first] = f"{first} has shape {list(shape)}, the run needs {list(wanted)}" if shape is not None else first
    left_over = sorted(key for key in set(files) - used if not _ignorable(key, model))
    return _Plan(found, new, left_over, other_layout)


def _today(model: Any, files: dict[str, Path]) -> tuple[dict[str, str], bool]:
    """The names that transformers 5 gives a folder's tensors (LayerNorm.gamma is LayerNorm.weight), and whether some of
    them must be put together (experts one by one)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    every = get_model_conversion_mapping(model)
    renamings = [t for t in every if isinstance(t, WeightRenaming)]
    converters = [t for t in every if isinstance(t, WeightConverter)]
    today = {key: rename_source_key(key, renamings, converters) for key in sorted(files)}
    names = {key: name for key, (name, _) in today.items()}
    return names, any(pattern is not None for _, pattern in today.values())


def _prefixes(spec: ModelSpec, model: nn.Module) -> tuple[str, ...]:
    """What the names of the model's body may begin with."""
    return tuple(f"{prefix}." for prefix in (spec.base, getattr(model, "base_model_prefix", None)) if prefix)


def _file_prefix(folder: Path) -> tuple[str, ...]:
    """What the names of the body begin with in a folder that holds a head too."""
    prefixes = []
    for name in ("config.json", MARKER):
        try:
            facts = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        prefixes += [facts.get("base"), _family_prefix(facts.get("model_type"))]
    return tuple(f"{prefix}." for prefix in dict.fromkeys(prefixes) if prefix)


def _family_prefix(kind: str | None) -> str | None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if kind is None or kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_MAPPING:
        return None
    prefix: str | None = MODEL_MAPPING[CONFIG_MAPPING[kind]].base_model_prefix
    return prefix


def _plain(name: str, prefixes: tuple[str, ...]) -> str:
    """A name without the body's prefix."""
    return name.removeprefix(next((p for p in prefixes if name.startswith(p)), ""))


def _may_differ(spec: ModelSpec, name: str) -> bool:
    """Whether a parameter of the model may be missing in the folder."""
    if spec.lenient:
        return True
    return spec.hf_config is not None and (in_head(spec, name) or bool(POOLER.search(name)))


def _may_stay(spec: ModelSpec, key: str, prefixes: tuple[str, ...], *, whole: bool) -> bool:
    """Whether a tensor of the folder may be left over.

    Args:
        spec: the model.
        key: the tensor's name.
        prefixes: what a body's names begin with in the folder.
        whole: whether the folder holds a head beside a body that its names tell from it.
    """
    if spec.lenient:
        return True
    if spec.hf_config is None:
        return False
    outside = whole and not key.startswith(prefixes)
    return outside or bool(POOLER.search(key)) or (spec.head is not None and key.startswith(f"{spec.head}."))


def _check(spec: ModelSpec, plan: _Plan, files: dict[str, Path]) -> None:
    """Refuse what the report must not pass over: a body that lacks something, another vocabulary, nothing that fits."""
    folder = spec.weights
    assert folder is not None
    prefixes = _file_prefix(folder)
    whole = any(key.startswith(prefixes) for key in files) if prefixes else False
    embedding = plan.new.get(f"{spec.embedding}.weight", "")
    if " has shape [" in embedding and spec.lenient:
        theirs, ours = (int(text.split(",")[0]) for text in re.findall(r"\[([^\]]*)\]", embedding))
        if theirs != ours:
            raise DataError(
                f"{folder}: its vocabulary has {theirs} ids, the run's {ours}; "
                f"use its tokenizer: data.tokenizer.kind=hf data.tokenizer.path={folder}"
            )
    bad = {name: text for name, text in plan.new.items() if not _may_differ(spec, name)}
    _refuse(folder, "lacks", sorted(name for name, text in bad.items() if text == name))
    _refuse(folder, "also has", [key for key in plan.left_over if not _may_stay(spec, key, prefixes, whole=whole)])
    _refuse(folder, "does not fit:", [text for name, text in bad.items() if text != name])
    if not plan.found:
        raise DataError(f"{folder}: none of its {len(files)} tensors fits the model {spec.name} by name and shape")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file of a model folder holds which tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{index}: is not an index of safetensors") from error
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise DataError(f"{index}: names {name!r}, which is outside of the model folder")
        paths = [folder / name for name in names]
    elif (folder / "model.safetensors").is_file():
        paths = [folder / "model.safetensors"]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    files: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: is missing, though the index names it")
        with _opened(path) as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def persistent_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name of every parameter and persistent buffer, with all its names (tied ones have more than one)."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return {name: tuple(all_names) for name, all_names in names.items()}


def _ignorable(key: str, model: nn.Module) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    buffers = {name for name, _ in model.named_buffers()}
    return key in buffers or bool(COMPUTED.search(key)) or any(re.search(pattern, key) for pattern in patterns)


def _converted(spec: ModelSpec, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Load the whole model on the CPU as transformers does, and take its tensors but those that are new."""
    from distllm.models.quiet import quiet

    folder = spec.weights
    assert folder is not None
    if spec.lenient:
        raise DataError(f"{folder}: stores its layers in another form than {spec.name} has them; start from it with model.path")
    with quiet():
        try:
            loaded, info = type(model).from_pretrained(
                folder,
                config=model.config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"{folder}: {str(error).strip().splitlines()[0]}") from error
    missing = set(info["missing_keys"])
    other = {str(item[0]): item for item in info["mismatched_keys"]}
    _refuse(folder, "lacks", sorted(name for name in missing if not _may_differ(spec, name)))
    texts = [f"{n} has shape {list(s[1])}, the run needs {list(s[2])}" for n, s in other.items() if not _may_differ(spec, n)]
    _refuse(folder, "does not fit:", texts)
    spare = [k for k in info["unexpected_keys"] if not _ignorable(k, model)]
    prefixes = _prefixes(spec, model)
    _refuse(folder, "also has", sorted(k for k in spare if not _may_stay(spec, k, prefixes, whole=True)))
    for name, tensor in [*loaded.named_parameters(), *loaded.named_buffers()]:
        if name not in missing and name not in other:
            yield name, tensor.detach()


def _refuse(folder: Path, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise DataError(f"{folder}: {what} {', '.join(names[:5])}{more}; these are not the weights of this model")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: is not a readable safetensors file ({error}); it may be torn, get it again") from error


def _shapes(files: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by the headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in dict.fromkeys(files.values()):
        with _opened(path) as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


def _read(path: Path, key: str, opened: dict[Path, Any]) -> torch.Tensor:
    """One tensor, on the pages of its file, which is mapped once."""
    if path not in opened:
        opened[path] = _opened(path)
    tensor: torch.Tensor = opened[path].get_tensor(key)
    return tensor
