"""Reading a model's tensors from a folder of safetensors, one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from distllm.config.errors import DataError
from distllm.models.spec import ModelSpec

# Old checkpoints carry causal masks and rotary frequencies as tensors; models compute them.
COMPUTED = re.compile(r"(attn|attention|self_attn)\.(masked_)?bias$|rotary_emb\.inv_freq$")


def read_tensors(spec: ModelSpec, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by full name: parameters in fp32 from `spec.weights`, buffers that no file holds as built.

    Args:
        spec: the model, with a `weights` folder.
        model: the module with parameters on meta and real buffers.

    Raises:
        DataError: tensors that are missing, left over, of another shape, or files that cannot be read.
    """
    assert spec.weights is not None, "the caller checked that there is a folder"
    folder = spec.weights
    files = tensor_files(folder)
    wanted = persistent_names(model)
    found = _match(wanted, set(files), getattr(model, "base_model_prefix", ""))
    if spec.hf_config is not None and not all(found.values()):
        # The file's names are not the module's: transformers 5 stores some families otherwise (experts one by one).
        yield from _converted(folder, model)
        return
    lost = sorted(name for name, keys in found.items() if not keys)
    used = {key for keys in found.values() for key in keys}
    spare = sorted(key for key in set(files) - used if not _ignorable(key, model))
    _refuse(folder, "lacks", lost)
    _refuse(folder, "also has", spare)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    shapes = {name: _shape(files[keys[0]], keys[0]) for name, keys in found.items()}
    other = [f"{n} {shapes[n]}, not {tuple(own[n].shape)}" for n in found if shapes[n] != tuple(own[n].shape)]
    _refuse(folder, "has other shapes:", other)
    for name, tensor in own.items():
        if name not in found:
            yield name, tensor.detach()
            continue
        value = _read(files[found[name][0]], found[name][0])
        for key in found[name][1:]:
            if not torch.equal(value, _read(files[key], key)):
                raise DataError(
                    f"{folder}: {found[name][0]} and {key} are one tied tensor in the config but differ in the file; "
                    "use model.sizes.tie_word_embeddings=false"
                )
        yield name, value.to(torch.float32 if isinstance(tensor, nn.Parameter) else tensor.dtype)


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


def _match(wanted: dict[str, tuple[str, ...]], keys: set[str], prefix: str) -> dict[str, list[str]]:
    """For each tensor the keys that hold it; a checkpoint of the base model has names without its prefix."""
    bare = prefix and not any(key.startswith(f"{prefix}.") for key in keys)

    def key_of(name: str) -> str:
        return name.removeprefix(f"{prefix}.") if bare else name

    return {first: [key_of(n) for n in names if key_of(n) in keys] for first, names in wanted.items()}


def _ignorable(key: str, model: nn.Module) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    buffers = {name for name, _ in model.named_buffers()}
    return key in buffers or bool(COMPUTED.search(key)) or any(re.search(pattern, key) for pattern in patterns)


def _converted(folder: Path, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Load the whole model on the CPU as transformers does, and take its tensors."""
    from distllm.models.hf import quiet

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
    _refuse(folder, "lacks", sorted(info["missing_keys"]))
    _refuse(folder, "has other shapes:", sorted(str(item[0]) for item in info["mismatched_keys"]))
    _refuse(folder, "also has", sorted(key for key in info["unexpected_keys"] if not _ignorable(key, model)))
    for name, tensor in [*loaded.named_parameters(), *loaded.named_buffers()]:
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


def _shape(path: Path, key: str) -> tuple[int, ...]:
    with _opened(path) as file:
        return tuple(file.get_slice(key).get_shape())


def _read(path: Path, key: str) -> torch.Tensor:
    with _opened(path) as file:
        tensor: torch.Tensor = file.get_tensor(key)
        return tensor
