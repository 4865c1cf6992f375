"""Opening what was trained: a run, a checkpoint or a Hugging Face folder, ready to compute, or written as a folder.

Everything here runs in one process; a checkpoint of any layout is read whole.
"""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distllm.checkpoint.find import (
    AVERAGES,
    BEST,
    Found,
    candidates,
    find,
    linked,
    read_full,
    read_weights,
    step_folder,
)
from distllm.checkpoint.hf import Texts, export, read_texts
from distllm.checkpoint.manifest import MANIFEST
from distllm.config.errors import CheckpointError, ConfigError, DataError
from distllm.config.schema import Config, DataConfig, ModelConfig, SourceConfig, TaskConfig
from distllm.config.trust import refuse_own_code
from distllm.data.prepare_examples import Labels
from distllm.data.rows import prefix_of
from distllm.data.tokenizer import Roles, id_count, roles_of
from distllm.models.build import initial_tensors, meta_model, resolve_spec
from distllm.models.hf_config import HEADS, max_positions
from distllm.models.hf_folder import weights_folder
from distllm.models.inference import free_bytes, labels_of, load_for_inference, read_model_config, task_of
from distllm.models.spec import ModelSpec
from distllm.parallel.parallelize import fill
from distllm.train.average import average, last_checkpoints
from distllm.train.folder import CONFIG_FILE, read_config, read_labels, read_tokenizer
from distllm.train.tasks import outputs_of
from distllm.train.tune import merged

log = logging.getLogger("distllm")
MODEL_CONFIG = "model_config"
"""In a run folder: the config of its model as transformers writes it."""
Tensors = Callable[[], Iterator[tuple[str, torch.Tensor]]]


@dataclass(frozen=True)
class Choice:
    """Which weights of a run to take."""

    which: str = "auto"
    """auto: the newest checkpoint, with its averaged weights (train.ema) where it keeps them. last: the newest, as trained.
    ema: the averaged weights, or an error. best: the best checkpoint. A number: that step."""
    average: int = 1
    """The mean of the weights of this many checkpoints, the newest ones."""


@dataclass(frozen=True)
class Source:
    """A trained model that was found on disk, ready to compute."""

    name: str
    model: nn.Module
    tokenizer: Any
    tokenizer_folder: Path
    device: torch.device
    max_len: int | None
    """The most tokens that the model takes at once."""
    config: Config
    """The run's; for a model folder one that says as much as the folder does."""
    labels: Labels
    decoder_start: int | None
    """For an encoder-decoder: what its input begins with."""
    token_types: bool
    """Whether the model tells the texts of a pair apart by token types."""
    run: Path | None
    """The run's folder; None for a model folder, which has no data of its own."""
    texts_known: bool
    """Whether it is known how the texts were read that it learned from (data.clean, prefixes): a model folder may not say."""

    @property
    def kind(self) -> str:
        """What it was trained for: task.kind."""
        return self.config.task.kind

    @property
    def seq_len(self) -> int:
        """The length to evaluate at."""
        return self.config.data.seq_len

    @property
    def roles(self) -> Roles:
        """The tokenizer's special tokens."""
        return roles_of(self.tokenizer)


def open_source(source: str, *, choice: Choice | None = None, device: str = "auto", trust: bool = False) -> Source:
    """Load a model to evaluate, to predict or to write with; of a model folder whatever head its architecture says.

    Args:
        source: a run folder, a checkpoint folder, or a folder or hub name of transformers.
        choice: which weights of a run; None: those of its newest good checkpoint.
        device: auto, cpu or cuda; a model larger than the device is spread over the machine by accelerate.
        trust: run Python code that the source names or brings.

    Raises:
        ConfigError: the source runs code of its own, and is not trusted; a choice that the source does not have.
        CheckpointError: the run has no good checkpoint, or the one named is torn.
        DataError: a model folder that cannot be used.
    """
    path, choice = Path(source), choice or Choice()
    if not is_run(path) and path.is_dir() and not (path / "config.json").exists():
        raise DataError(f"{source}: neither a run or checkpoint of distllm nor a model folder (it has no config.json)")
    target = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    scratch = Path(tempfile.mkdtemp(prefix="distllm-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)  # what accelerate puts on the disk is read with each token
    if not is_run(path):
        _refuse_choice(source, choice, "is a model folder, with one set of weights")
        return _open_folder(source, device=target, scratch=scratch, trust=trust)
    found, tensors, what = _chosen(path, choice)
    config, spec, tokenizer, labels = _described(found, trust=trust)
    if spec.hf_config is not None and _model_bytes(spec) > 0.9 * free_bytes(target):
        folder = scratch / "model"  # accelerate spreads folders of transformers
        export(folder, tensors=merged(tensors(), spec, config.tune), spec=spec, tokenizer_folder=_tokenizer_folder(found))
        offload = scratch / "offload"
        model, _ = load_for_inference(folder, device=str(target), offload_folder=offload, trust_remote_code=trust)
    else:
        model = _filled(dict(merged(tensors(), spec, config.tune)), spec, seed=config.seed, device=target)
    run = found.folder.parent.parent
    return Source(
        f"{source}, {what}", model.eval(), tokenizer, _tokenizer_folder(found), _device_of(model, target), spec.max_seq_len,
        config, labels, spec.decoder_start, spec.token_types, run, True,
    )  # fmt: skip


def is_run(path: Path) -> bool:
    """Whether a path is a run, a checkpoint or a folder of checkpoints of distllm, and not a folder of transformers."""
    if (path / CONFIG_FILE).is_file():
        return True
    if (path / "config.json").is_file():  # also one that is called step-1000, or holds a trainer's checkpoints
        return False
    return (path / MANIFEST).exists() or bool(candidates(path / "checkpoints") or candidates(path) or _named_as_one(path))


def _named_as_one(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint, be it ever so torn."""
    return path.is_dir() and path in [folder for _, folder in candidates(path.parent)]


def export_source(source: str, folder: Path, *, choice: Choice | None = None, trust: bool = False) -> Path:
    """Write a run's or a checkpoint's model as a folder that plain transformers loads.

    Args:
        source: a run or checkpoint folder.
        folder: the target, new or empty or an earlier export.
        choice: which weights; None: those of the newest good checkpoint.
        trust: run Python code that the source names.

    Raises:
        ConfigError: the source runs code of its own, and is not trusted.
        CheckpointError: there is no good checkpoint.
        StorageError: the folder holds something else.
    """
    found, tensors, _ = _chosen(Path(source), choice or Choice())
    config, spec, _, _ = _described(found, trust=trust)
    export(
        folder, tensors=merged(tensors(), spec, config.tune), spec=spec, tokenizer_folder=_tokenizer_folder(found),
        texts=_texts_of(config),
    )  # fmt: skip
    return folder


def _texts_of(config: Config) -> Texts:
    """How a run with this config reads and writes texts."""
    data = config.data
    return Texts(
        clean=data.clean, prefix=prefix_of(data.sources), seq_len=data.seq_len, truncate=data.truncate, stride=data.stride,
        cross_documents=data.cross_documents, decode=config.decode,
    )  # fmt: skip


@contextmanager
def exported(source: str, *, choice: Choice, trust: bool) -> Iterator[tuple[Path, str]]:
    """A source as a model folder, for as long as the block runs, and its task.kind.

    Raises:
        DataError: the source is a module of the user's own, which transformers does not know.
    """
    with tempfile.TemporaryDirectory(prefix="distllm-") as scratch:
        folder = Path(source)
        if is_run(folder):
            folder = export_source(source, Path(scratch) / "model", choice=choice, trust=trust)
        else:
            _refuse_choice(source, choice, "is a model folder, with one set of weights")
            folder = weights_folder(source, trust=trust)
        if not (folder / "config.json").is_file():
            raise DataError(f"{source}: a module of your own is no model that transformers loads")
        yield folder, task_of(read_model_config(folder, trust=trust))


def loader_of(folder: Path) -> str:
    """The class of transformers that loads an exported folder; of a module of the user's own, what reads its tensors."""
    if not (folder / "config.json").is_file():
        return "safetensors.torch.load_file"
    config = read_model_config(folder)
    try:
        return str(HEADS[task_of(config)].auto.__name__)
    except DataError:
        return "AutoModel"


# ---------------------------------------------------------------------------------------------------------------------
# Which weights


def _refuse_choice(source: str, choice: Choice, why: str) -> None:
    if choice.average > 1:
        raise ConfigError([f"--average={choice.average}: {source} {why}; leave it out"])
    if choice.which != "auto":
        raise ConfigError([f"--which={choice.which}: {source} {why}; leave it out"])


def _chosen(path: Path, choice: Choice) -> tuple[Found, Tensors, str]:
    """The checkpoint that a choice means, its weights by name, and what to call it."""
    which, folder = choice.which, path / "checkpoints" if candidates(path / "checkpoints") else path
    single = (path / MANIFEST).exists() or not candidates(folder)
    if single and (choice.average > 1 or which not in ("auto", "last", "ema")):
        _refuse_choice(str(path), choice, "is one checkpoint")
    if choice.average > 1:
        if which not in ("auto", "last"):
            raise ConfigError([f"--which={which}: not together with --average={choice.average}, which takes the newest ones"])
        several = last_checkpoints(path, choice.average, logger=log)
        told = ", ".join(str(found.step) for found in several)
        return several[0], lambda: average(several), f"the mean of steps {told}"
    if which == "best":
        if linked(folder / BEST) is None:
            rule = "train.keep_best=true or train.patience keeps one"
            raise CheckpointError(f"{path}: no best checkpoint is marked; {rule}; nearest: --which=last")
        found = find(folder / BEST, logger=log)
    elif which.isdecimal():
        steps = [step for step, _ in candidates(folder)]
        if int(which) not in steps:
            kept = ", ".join(map(str, sorted(set(steps))))
            raise CheckpointError(f"--which={which}: {path} has no checkpoint of this step; it keeps {kept}")
        found = find(step_folder(folder, int(which)), logger=log)
    elif which in ("auto", "last", "ema"):
        found = find(path, logger=log)
    else:
        raise ConfigError([f"--which={which}: must be auto, last, best, ema or the number of a step; nearest: auto"])
    averaged = any(name.startswith(AVERAGES) for name in found.manifest.tensors)
    if which == "ema" and not averaged:
        raise CheckpointError(f"{found.folder}: keeps no averaged weights; train.ema keeps them; nearest: --which=last")
    if which == "last" or not averaged:
        return found, lambda: read_full(found, names_prefix="model."), f"step {found.step}"
    return found, lambda: read_weights(found), f"step {found.step}, averaged weights"


# ---------------------------------------------------------------------------------------------------------------------
# A run


def _described(found: Found, *, trust: bool) -> tuple[Config, ModelSpec, Any, Labels]:
    """The config, the spec, the tokenizer and the labels of a checkpoint."""
    config = read_config(found.folder)
    if not trust:
        refuse_own_code(config, where=found.folder)
    tokenizer, labels = read_tokenizer(_tokenizer_folder(found)), read_labels(found.folder.parent.parent)
    return config, _spec_of(found, config, tokenizer=tokenizer, labels=labels), tokenizer, labels


def _spec_of(found: Found, config: Config, *, tokenizer: Any, labels: Labels) -> ModelSpec:
    """The spec of a checkpoint's model, from what lies in the run folder alone where that is enough.

    The model that a run began from (`model.path`) may be gone, and the attention kernel that it trained with may not be
    on this machine.
    """
    model = config.model
    described = found.folder.parent.parent / MODEL_CONFIG
    if model.spec is None and not model.trust_remote_code and config.task.kind != "multi_task" and described.is_dir():
        from distllm.models.hf import spec_from_config

        return spec_from_config(read_model_config(described), task=config.task.kind)
    anywhere = model.model_copy(update={"attention": "auto", "weights": None})
    return resolve_spec(
        config.model_copy(update={"model": anywhere}), vocab_size=id_count(tokenizer), labels=outputs_of(labels),
        roles=None if tokenizer.eos_token_id is None else roles_of(tokenizer), label_names=labels.get("", ()),
    )  # fmt: skip


def _tokenizer_folder(found: Found) -> Path:
    folder = found.folder.parent.parent / "tokenizer"
    if not folder.is_dir():
        raise DataError(f"{folder}: missing; a checkpoint is used from inside its run folder, RUN/checkpoints/step-N")
    return folder


def _filled(saved: dict[str, torch.Tensor], spec: ModelSpec, *, seed: int, device: torch.device) -> nn.Module:
    """The model with a checkpoint's tensors; what is not kept in one (rotary tables) is computed."""
    model = meta_model(spec)
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    rest = set(names) - saved.keys()
    # Without the weights that the run began from: what a checkpoint has not is computed, not read.
    computed = dict(initial_tensors(replace(spec, weights=None), seed=seed, names=rest)) if rest else {}
    fill(model, ((name, saved[name] if name in saved else computed[name]) for name in names), device=device)
    return model


def _model_bytes(spec: ModelSpec) -> int:
    return sum(4 * parameter.numel() for parameter in meta_model(spec).parameters())


def _device_of(model: nn.Module, fallback: torch.device) -> torch.device:
    return next((p.device for p in model.parameters() if p.device.type != "meta"), fallback)


# ---------------------------------------------------------------------------------------------------------------------
# A folder of transformers


def _open_folder(source: str, *, device: torch.device, scratch: Path, trust: bool) -> Source:
    """A model folder, with the config that a run of the same task would have."""
    model, tokenizer = load_for_inference(
        source, device=str(device), offload_folder=scratch / "offload", trust_remote_code=trust
    )
    if id_count(tokenizer) > model.config.vocab_size:
        raise DataError(f"{source}: the tokenizer has {id_count(tokenizer)} ids, the model only {model.config.vocab_size}")
    kind, limit = task_of(model.config), max_positions(model.config)
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:  # BERT's tokenizers name no end
        tokenizer.eos_token = tokenizer.sep_token
    names = labels_of(model.config) if kind == "classification" else ()
    folder = Path(source)
    if not (folder / "tokenizer.json").is_file():
        folder = scratch / "tokenizer"
        tokenizer.save_pretrained(folder)
    texts = read_texts(weights_folder(source, trust=trust))
    learned = texts or Texts()
    config = Config(
        task=TaskConfig(kind=kind, labels=list(names)), model=ModelConfig(path=source), decode=learned.decode,
        data=DataConfig(
            seq_len=learned.seq_len or min(limit or 1024, 1024), truncate=learned.truncate, stride=learned.stride,
            cross_documents=learned.cross_documents, clean=learned.clean, sources=[SourceConfig(prefix=learned.prefix)],
        ),
    )  # fmt: skip
    labels = {"": names} if kind in ("classification", "regression") else {}
    start = getattr(model.config, "decoder_start_token_id", None) if kind == "seq2seq" else None
    types = (getattr(model.config, "type_vocab_size", None) or 0) > 1
    return Source(
        source, model, tokenizer, folder, _device_of(model, device), limit, config, labels, start, types, None,
        texts is not None,
    )  # fmt: skip
