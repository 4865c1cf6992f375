"""Loading a model folder for generation and evaluation; `accelerate` spreads a model that is larger than one device."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import transformers

from distllm.config.errors import DataError
from distllm.models.hf_config import HEADS
from distllm.models.hf_folder import weights_folder
from distllm.models.quiet import quiet
from distllm.models.weights import tensor_files


def load_for_inference(
    folder: str | Path,
    *,
    device: str,
    dtype: torch.dtype | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a transformers model with safetensors and its tokenizer, in eval mode, with the head that its config names.

    Args:
        folder: a model folder or hub name.
        device: where to put it, such as cpu or cuda; a model that does not fit there is spread over the machine's GPUs,
            memory and disk by `accelerate`.
        dtype: the floating-point format; None: that of the files.
        max_memory: what each device may hold, in bytes or as "10GiB": {0: ..., "cpu": ...}; spreads the model.
        offload_folder: where parts go that fit nowhere else.
        trust_remote_code: run the Python code that comes with the model.

    Returns:
        The model and the tokenizer.

    Raises:
        DataError: a folder that cannot be used.
    """
    path = weights_folder(str(folder), trust=trust_remote_code)
    size = sum(file.stat().st_size for file in set(tensor_files(path).values()))
    spread = max_memory is not None or size > 0.9 * free_bytes(torch.device(device))
    arguments: dict[str, Any] = {
        "dtype": "auto" if dtype is None else dtype,
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
    }
    if spread:
        _need_accelerate(path)
        arguments |= {"device_map": "auto", "max_memory": max_memory, "offload_folder": offload_folder}
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            model = HEADS[task_of(config)].auto.from_pretrained(path, config=config, **arguments)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise DataError(f"{folder}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}") from error
    return (model if spread else model.to(device)).eval(), tokenizer


def read_model_config(folder: Path, *, trust: bool = False) -> Any:
    """The transformers config in a folder.

    Raises:
        DataError: it is none.
    """
    with quiet():
        try:
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: not the config of a model: {' '.join(str(error).split())[:200]}") from error


def task_of(config: Any) -> str:
    """The task.kind that a transformers config's architecture is for.

    Raises:
        DataError: the architecture is not one that answers for any task, such as a body without a head.
    """
    name = next(iter(getattr(config, "architectures", None) or ()), None)
    if name is None:
        return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal_lm"
    for kind in ("classification", "seq2seq", "causal_lm", "masked_lm"):  # BART's encoder-decoder is listed as masked too
        if name in HEADS[kind].names.values():
            single = getattr(config, "problem_type", None) == "regression" or config.num_labels == 1
            return "regression" if kind == "classification" and single else kind
    if getattr(config, "auto_map", None):
        return "causal_lm"
    raise DataError(f"{name}: is no language model and no classifier of texts; give a folder with the head of a task")


def labels_of(config: Any) -> tuple[str, ...]:
    """The names of a classifier's classes, in the order of their numbers."""
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def free_bytes(device: torch.device) -> int:
    """The memory of a device that a program can still have, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, ValueError, StopIteration):  # Linux; free pages alone leave out the file cache
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _need_accelerate(folder: Path) -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise DataError(f"{folder}: is larger than the device; install accelerate to spread it") from error
