"""Export: a folder that plain transformers loads, or safetensors of a module of the user's own."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from distllm.config.errors import DataError, StorageError
from distllm.config.machine import flush
from distllm.config.schema import CleanConfig, DecodeConfig
from distllm.config.section import Positive, Section
from distllm.data.tokenizer import id_count, never_written, roles_of
from distllm.models.build import meta_model
from distllm.models.spec import ModelSpec
from distllm.models.weights import MARKER, persistent_names

WRITES = ("", "causal_lm", "sft", "seq2seq")
"""Tasks whose models write text, and so have a generation_config.json."""
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_*")


class Texts(Section):
    """How a run reads texts and writes them: what its model is asked elsewhere belongs read and answered alike."""

    clean: CleanConfig = CleanConfig()
    prefix: str = ""
    """What was put before each, after the cleaning; "" where the sources differ in it."""
    seq_len: Positive | None = None
    """data.seq_len; None: not known."""
    truncate: Literal["refuse", "head", "tail", "middle", "window"] = "refuse"
    """data.truncate."""
    stride: Positive = 64
    """data.stride."""
    cross_documents: bool = True
    """data.cross_documents."""
    decode: DecodeConfig = DecodeConfig()
    """How an encoder-decoder writes."""


_HOLDS = {"clean": "hold settings of data.clean", "prefix": "be a text", "decode": "hold settings of decode"}
"""What the facts of a `Texts` must be; any other: as the setting of data."""


def export(
    folder: Path,
    *,
    tensors: Iterator[tuple[str, torch.Tensor]],
    spec: ModelSpec,
    tokenizer_folder: Path | None,
    dtype: torch.dtype = torch.float32,
    max_file_bytes: int = 5_000_000_000,
    texts: Texts | None = None,
) -> None:
    """Write a model as safetensors with its config and tokenizer; the folder appears whole or not at all.

    One file's worth of tensors is in memory at a time. Call it on one rank; the others only walk their iterator.

    Args:
        folder: the target; it may be missing, empty, or an earlier export, which is replaced.
        tensors: every parameter and persistent buffer by full name, whole, on the CPU; others are left out.
        spec: the model; without `hf_config` the folder holds safetensors and `distllm.json` only.
        tokenizer_folder: a tokenizer in transformers' format to copy, or None.
        dtype: the floating-point format to write the parameters in.
        max_file_bytes: the largest file to write, unless one tensor is larger.
        texts: how the model's run reads and writes them; `distllm.json` keeps it, and generation_config.json what of it
            transformers has a place for.

    Raises:
        StorageError: the target holds something else, or cannot be written.
    """
    check_target(folder)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write_tensors(partial, tensors, spec, dtype, max_file_bytes)
        if spec.hf_config is not None:
            _write_config(partial, spec, tokenizer_folder, dtype, texts)
        if tokenizer_folder is not None:
            _copy(tokenizer_folder, partial, TOKENIZER_FILES)
        if tokenizer_folder is not None and spec.hf_config is not None:
            _fit_tokenizer(partial, spec)
        facts: dict[str, Any] = {
            "model": spec.name, "task": spec.task, "base": spec.base, "vocab_size": spec.vocab_size,
            "max_seq_len": spec.max_seq_len, "dtype": _text(dtype),
        }  # fmt: skip
        if texts is not None:
            facts |= texts.model_dump(exclude_defaults=True)
        # By this file a folder is known as an export, so that a new one may replace it.
        (partial / MARKER).write_text(json.dumps({"format": "export", **facts}, indent=2) + "\n")
        for file in partial.iterdir():
            flush(file)
        flush(partial)
        _replace(folder, partial)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_texts(folder: Path) -> Texts | None:
    """How the run of an exported model reads and writes texts; None: another folder, which says nothing of it.

    Raises:
        DataError: what is written there is no such setting.
    """
    file = folder / MARKER
    if not file.is_file():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        return Texts.model_validate({name: value for name, value in facts.items() if name in Texts.model_fields})
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        rule = f"`{name}` must {_HOLDS.get(name, f'be as data.{name}')}"
    except (ValueError, AttributeError):
        rule = "it must hold the facts of an export"
    raise DataError(f"{file}: damaged: {rule}; export the model again")


def check_target(folder: Path) -> None:
    """Refuse a target that holds anything but an earlier export; called first, before long work.

    Raises:
        StorageError: the folder is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder}: is a file; give a folder for the export")
    if folder.is_dir() and any(folder.iterdir()) and not _is_export(folder):
        raise StorageError(f"{folder}: is not empty and no earlier export; give another folder")


def _is_export(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / MARKER).read_text()).get("format") == "export")
    except (OSError, ValueError, AttributeError):
        return False


def _replace(folder: Path, partial: Path) -> None:
    """Put the finished folder in place; the earlier export goes only after the new one stands."""
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_tensors(
    folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], spec: ModelSpec, dtype: torch.dtype, limit: int
) -> None:
    """Write the tensors into as many files as needed, and their index."""
    model = meta_model(spec)
    lost = set(persistent_names(model))
    where: dict[str, int] = {}
    waiting: dict[str, torch.Tensor] = {}
    total = number = 0
    for name, value in _in_file_format(_persistent(tensors, lost, dtype), spec, model):
        size = value.numel() * value.element_size()
        if waiting and sum(t.numel() * t.element_size() for t in waiting.values()) + size > limit:
            save_file(waiting, folder / f"part-{number}", metadata={"format": "pt"})
            number, waiting = number + 1, {}
        waiting[name], where[name] = value, number
        total += size
    assert not lost, f"the tensors to export lack {sorted(lost)[:5]}"
    save_file(waiting, folder / f"part-{number}", metadata={"format": "pt"})
    if number == 0:
        os.rename(folder / "part-0", folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{number + 1:05d}.safetensors" for i in range(number + 1)]
    for i, name in enumerate(names):
        os.rename(folder / f"part-{i}", folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in sorted(where.items())}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _persistent(
    tensors: Iterator[tuple[str, torch.Tensor]], lost: set[str], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that belong into a file, in the wanted format; takes each name off `lost`."""
    for name, value in tensors:
        if name in lost:
            lost.discard(name)
            yield name, value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)


def _in_file_format(
    tensors: Iterator[tuple[str, torch.Tensor]], spec: ModelSpec, model: nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and shapes as the family's public checkpoints have them (experts one by one), a block at a time."""
    if spec.hf_config is None:
        yield from ((name, value.contiguous()) for name, value in tensors)
        return
    from transformers.core_model_loading import revert_weight_conversion

    unit: dict[str, torch.Tensor] = {}
    last = None
    for name, value in tensors:
        block = _block_of(name, spec)
        if unit and (block is None or block != last):
            yield from _own_memory(revert_weight_conversion(model, unit))
            unit = {}
        unit[name], last = value, block
    yield from _own_memory(revert_weight_conversion(model, unit))


def _own_memory(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies where tensors are views of one another, which safetensors refuses."""
    for name, value in tensors.items():
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        yield name, value if whole else value.clone(memory_format=torch.contiguous_format)


def _block_of(name: str, spec: ModelSpec) -> str | None:
    """The path of the block that a parameter belongs to: "model.layers.3"; None outside blocks."""
    for path in spec.blocks:
        if name.startswith(f"{path}."):
            return f"{path}.{name[len(path) + 1 :].partition('.')[0]}"
    return None


def _write_config(
    folder: Path, spec: ModelSpec, tokenizer_folder: Path | None, dtype: torch.dtype, texts: Texts | None
) -> None:
    """config.json and generation_config.json, with the tokenizer's special ids."""
    import transformers

    from distllm.models.quiet import quiet

    config = copy.deepcopy(spec.hf_config)
    config.use_cache = True
    config.dtype = _text(dtype)
    with quiet():
        generation = _generation_config(spec)
        if tokenizer_folder is not None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
            _check_vocabulary(tokenizer, spec, tokenizer_folder)
            # The model's own ids win: a chat model ends its turn with another token than its tokenizer's. A padding id that
            # the model has not stays out of config.json, because one that is there builds an embedding with a frozen row.
            for target, key in [(c, k) for c in (config, generation) for k in ("bos_token_id", "eos_token_id")]:
                if getattr(target, key, None) is None:
                    setattr(target, key, getattr(tokenizer, key, None))
            if generation.pad_token_id is None:
                generation.pad_token_id = tokenizer.pad_token_id
            if texts is not None and spec.task == "seq2seq":
                generation = _written_alike(generation, spec, texts.decode, tokenizer)
        config.save_pretrained(folder)
        if spec.task in WRITES:
            generation.save_pretrained(folder)
    if spec.weights is not None and getattr(config, "auto_map", None):
        _copy(spec.weights, folder, ("*.py",))


def _generation_config(spec: ModelSpec) -> Any:
    import transformers

    if spec.weights is not None and (spec.weights / "generation_config.json").is_file():
        return transformers.GenerationConfig.from_pretrained(spec.weights)
    made = transformers.GenerationConfig.from_model_config(spec.hf_config)
    if spec.task == "seq2seq":
        made.max_length = spec.max_seq_len or 512  # transformers stops after 20 tokens where nothing is said
    return made


def _written_alike(known: Any, spec: ModelSpec, decode: DecodeConfig, tokenizer: Any) -> Any:
    """The generation config by which plain transformers' `generate` writes what the run writes.

    Of `known` only the ids stay: penalties and forced tokens that a pre-trained model came with are not in the run's search.
    The length is told as max_length, which counts the start, because one who gives `generate` a max_length of his own, as
    lm_eval does, would be overruled by a max_new_tokens.
    """
    import transformers

    roles = roles_of(tokenizer)
    ids = {name: getattr(known, name) for name in ("bos_token_id", "pad_token_id", "decoder_start_token_id")}
    never = [*never_written(roles, start=spec.decoder_start), *range(id_count(tokenizer), spec.vocab_size or 0)]
    penalty = {} if decode.beams == 1 else {"length_penalty": decode.length_penalty}  # of one beam transformers refuses it
    length = min(decode.max_tokens, spec.max_seq_len or decode.max_tokens) + 1
    return transformers.GenerationConfig(
        **ids, eos_token_id=roles.eos, num_beams=decode.beams, **penalty, max_length=length, suppress_tokens=never or None
    )


def _fit_tokenizer(folder: Path, spec: ModelSpec) -> None:
    """Have plain transformers' tokenizer give the inputs that this model takes, and no more."""
    file = folder / "tokenizer_config.json"
    if spec.task in ("", "causal_lm", "sft") or not file.is_file():
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    names = ["input_ids", *(["token_type_ids"] if spec.token_types else []), "attention_mask"]
    if settings.get("model_input_names") != names:
        settings["model_input_names"] = names
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_vocabulary(tokenizer: Any, spec: ModelSpec, folder: Path) -> None:
    if spec.vocab_size is not None and id_count(tokenizer) > spec.vocab_size:
        raise DataError(f"{folder}: the tokenizer has {id_count(tokenizer)} ids, the model only {spec.vocab_size}")


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
