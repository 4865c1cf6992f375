"""A model folder whose weights are pickles becomes one with safetensors: `python -m distllm.models.convert FOLDER TARGET`.

A pickle can run any code when it is loaded. torch's `weights_only` loader takes tensors and nothing else; it is used here,
once, so that no other part of distllm ever reads a pickle.
"""

from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from distllm.config.errors import DataError, DistllmError, StorageError

COPIED = ("*.json", "*.txt", "*.model")


def convert(folder: Path, target: Path) -> None:
    """Write the pickled weights of a model folder as safetensors into a new folder, with its config and tokenizer.

    Args:
        folder: with pytorch_model.bin, or several of them.
        target: the new folder; it must not exist.

    Raises:
        DataError: there are no pickled weights, or they hold more than tensors.
        StorageError: the target exists or cannot be written.
    """
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise DataError(f"{folder}: has no pytorch_model.bin; only such folders are converted")
    if target.exists():
        raise StorageError(f"{target}: exists already; give a new folder")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise DataError(f"{file}: holds more than tensors, or is torn, and is not loaded: {reason}") from None
        if not isinstance(loaded, dict) or not any(isinstance(value, torch.Tensor) for value in loaded.values()):
            inside = [str(name) for name, value in loaded.items() if isinstance(value, dict)] if isinstance(loaded, dict) else []
            where = f"it has {', '.join(inside[:5])}; save one of them alone" if inside else f"it holds a {type(loaded).__name__}"
            raise DataError(f"{file}: holds no tensors by name: {where}")
        # Copies, because safetensors refuses tensors that share memory, as tied ones do.
        tensors |= {name: value.clone().contiguous() for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    try:
        target.mkdir(parents=True)
        for file in [f for pattern in COPIED for f in folder.glob(pattern) if not f.name.endswith(".bin.index.json")]:
            shutil.copyfile(file, target / file.name)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from error


def main(arguments: list[str]) -> int:
    """The command."""
    if len(arguments) != 2:
        print("python -m distllm.models.convert FOLDER TARGET", file=sys.stderr)
        return 2
    try:
        convert(Path(arguments[0]), Path(arguments[1]))
    except DistllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
