"""The folder of a transformers model: local, or fetched from the hub; weights in safetensors only."""

from __future__ import annotations

from pathlib import Path

from distllm.config.errors import DataError
from distllm.config.machine import reachable
from distllm.config.places import missing

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")


def weights_folder(path: str, *, trust: bool = False, key: str = "model.path", config: bool = True) -> Path:
    """The local folder of a model with safetensors; a hub name is downloaded first (weights in safetensors only).

    Args:
        path: a local folder or a hub name.
        trust: fetch the Python code that comes with a hub model too.
        key: the config's key that names it, for messages.
        config: whether there must be a config.json; an export of a module of the user's own has none.

    Raises:
        DataError: no such folder, no config.json, or no safetensors.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise DataError(f"{key}={path}: is a file; give the folder that holds it")
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise DataError(missing(key, path, what="no such folder", wanted=Path.is_dir))
        folder = _download(path, trust=trust, key=key)
    if config and not (folder / "config.json").is_file():
        raise DataError(f"{key}={path}: has no config.json; is it a transformers model folder?")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(f.name for pattern in PICKLES for f in folder.glob(pattern))
        if pickles:
            convert = f"python -m distllm.models.convert {path} NEW_FOLDER"
            raise DataError(
                f"{key}={path}: has no safetensors, only {pickles[0]}, which is never loaded; convert it first: {convert}"
            )
        raise DataError(f"{key}={path}: has no weights (model.safetensors)")
    return folder


def _download(name: str, *, trust: bool, key: str) -> Path:
    import huggingface_hub

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", *(["*.py"] if trust else [])]
    try:
        cached = not reachable(huggingface_hub.constants.ENDPOINT)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=cached))
    except Exception as error:
        rule = f"no such folder here, and the hub gave no model of that name ({type(error).__name__}: check the network)"
        raise DataError(missing(key, name, what=rule, wanted=Path.is_dir)) from error
