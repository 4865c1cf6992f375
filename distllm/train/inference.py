"""Using what was trained: a run, a checkpoint or a Hugging Face folder to evaluate, to write text, or to export.

Everything here runs in one process; a checkpoint of any layout is read whole.
"""

from __future__ import annotations

import atexit
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distllm.checkpoint.find import Found, candidates, find, read_full
from distllm.checkpoint.hf import export
from distllm.checkpoint.manifest import MANIFEST
from distllm.config.errors import ConfigError, DataError
from distllm.config.schema import Config
from distllm.config.trust import refuse_own_code
from distllm.data.batch import IGNORE, Batch
from distllm.data.loader import Samples, validation_batches
from distllm.data.prepare import open_prepared
from distllm.data.tokenizer import id_count
from distllm.engine.base import LossTerms
from distllm.evaluate import evaluate
from distllm.generate import Sampling, decode_stream, encode_prompts, sample_text, stream
from distllm.models.build import initial_tensors, meta_model, resolve_spec
from distllm.models.inference import free_bytes, load_for_inference
from distllm.models.spec import ModelSpec
from distllm.parallel.parallelize import fill
from distllm.train.folder import CONFIG_FILE, read_config, read_tokenizer
from distllm.train.objectives import causal_lm

log = logging.getLogger("distllm")
MODEL_CONFIG = "model_config"
"""In a run folder: the config of its model as transformers writes it."""


@dataclass(frozen=True)
class Source:
    """A trained model that was found on disk, ready to compute."""

    name: str
    model: nn.Module
    tokenizer: Any
    device: torch.device
    max_len: int | None
    """The most tokens that the model takes at once."""
    seq_len: int
    """The length to evaluate at."""


def open_source(source: str, *, device: str = "auto", trust: bool = False) -> Source:
    """Load a model for evaluation and generation.

    Args:
        source: a run folder (its newest good checkpoint), a checkpoint folder, or a folder or hub name of transformers.
        device: auto, cpu or cuda; a model larger than the device is spread over the machine by accelerate.
        trust: run Python code that the source names or brings.

    Raises:
        ConfigError: the source runs code of its own, and is not trusted.
        CheckpointError: the run has no good checkpoint, or the one named is torn.
        DataError: a model folder that cannot be used.
    """
    if not is_run(Path(source)) and Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise DataError(f"{source}: neither a run or checkpoint of distllm nor a model folder (it has no config.json)")
    target = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    scratch = Path(tempfile.mkdtemp(prefix="distllm-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)  # what accelerate puts on the disk is read with each token
    offload = scratch / "offload"
    if not is_run(Path(source)):
        model, tokenizer = load_for_inference(source, device=str(target), offload_folder=offload, trust_remote_code=trust)
        if id_count(tokenizer) > model.config.vocab_size:
            raise DataError(f"{source}: the tokenizer has {id_count(tokenizer)} ids, the model only {model.config.vocab_size}")
        limit = getattr(model.config, "max_position_embeddings", None)
        return Source(source, model, tokenizer, _device_of(model, target), limit, min(limit or 1024, 1024))
    found = find(Path(source), logger=log)
    config, spec, tokenizer = _described(found, trust=trust)
    if spec.hf_config is not None and _model_bytes(spec) > 0.9 * free_bytes(target):
        folder = scratch / "model"  # accelerate spreads folders of transformers
        export_source(source, folder, trust=trust)
        model, _ = load_for_inference(folder, device=str(target), offload_folder=offload, trust_remote_code=trust)
    else:
        model = _filled(found, spec, seed=config.seed, device=target)
    name = f"{source}, step {found.step}"
    return Source(name, model.eval(), tokenizer, _device_of(model, target), spec.max_seq_len, config.data.seq_len)


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


def evaluate_source(
    source: str, *, texts: Sequence[Path], batch: int = 8, device: str = "auto", trust: bool = False
) -> dict[str, Any]:
    """Loss, perplexity and accuracy on texts, or of a run on its own validation data.

    Args:
        source: as in `open_source`.
        texts: files of UTF-8 text; each is one document, cut into windows of the model's length that do not overlap.
            None given: the validation part of the run's data.
        batch: windows at once.
        device: as in `open_source`.
        trust: as in `open_source`.

    Returns:
        source, val_loss (nats a token), val_perplexity, val_accuracy, val_tokens, and for texts bits_per_byte.

    Raises:
        ConfigError: a model without data of its own, and no text.
        DataError: a text that cannot be read, or is empty.
    """
    if not texts and not is_run(Path(source)):
        raise ConfigError([f"--text: {source} has no validation data of its own; give a text file, --text FILE"])
    documents = [_read_text(path) for path in texts]
    opened = open_source(source, device=device, trust=trust)

    @torch.no_grad()
    def terms(piece: Batch) -> LossTerms:
        return causal_lm(opened.model(**piece.inputs), piece)

    batches = _batches(opened, documents, batch) if texts else _validation(Path(source), batch)
    result = evaluate(terms, batches, group=None, device=opened.device)
    found = {"source": opened.name, **result.as_metrics()}
    if texts:
        size = sum(len(text.encode()) for text in documents)
        found["bits_per_byte"] = result.loss * result.tokens / size / math.log(2.0)
    return found


def generate_source(
    source: str,
    *,
    prompts: Sequence[str],
    sampling: Sampling,
    seed: int = 1,
    device: str = "auto",
    trust: bool = False,
) -> Iterator[str]:
    """Continue prompts.

    Args:
        source: as in `open_source`.
        prompts: one is streamed piece by piece; several are continued as one batch and given whole, in order.
        sampling: how many tokens, and how each is chosen.
        seed: of the choices.
        device: as in `open_source`.
        trust: as in `open_source`.

    Yields:
        Pieces of text of the one prompt, or a whole text for each of several; without the prompts.
    """
    opened = open_source(source, device=device, trust=trust)
    generator = torch.Generator(opened.device).manual_seed(seed)
    if len(prompts) > 1:
        yield from sample_text(
            opened.model, tokenizer=opened.tokenizer, prompts=prompts, sampling=sampling, max_len=opened.max_len,
            generator=generator, device=opened.device,
        )  # fmt: skip
        return
    ids, mask = encode_prompts(opened.tokenizer, prompts, device=opened.device)
    tokens = stream(
        opened.model, input_ids=ids, attention_mask=mask, sampling=sampling, eos_id=opened.tokenizer.eos_token_id,
        vocab_size=id_count(opened.tokenizer), max_len=opened.max_len, generator=generator,
    )  # fmt: skip
    yield from decode_stream(opened.tokenizer, (int(token[0]) for token in tokens))


def export_source(source: str, folder: Path, *, trust: bool = False) -> Path:
    """Write a run's or a checkpoint's model as a folder that plain transformers loads.

    Raises:
        ConfigError: the source runs code of its own, and is not trusted.
        CheckpointError: there is no good checkpoint.
        StorageError: the folder holds something else.
    """
    found = find(Path(source), logger=log)
    _, spec, _ = _described(found, trust=trust)
    tensors = read_full(found, names_prefix="model.")
    export(folder, tensors=tensors, spec=spec, tokenizer_folder=_tokenizer_folder(found))
    return folder


def _described(found: Found, *, trust: bool) -> tuple[Config, ModelSpec, Any]:
    """The config, the spec and the tokenizer of a checkpoint."""
    config = read_config(found.folder)
    if not trust:
        refuse_own_code(config, where=found.folder)
    tokenizer = read_tokenizer(_tokenizer_folder(found))
    return config, _spec_of(found, config, vocab_size=id_count(tokenizer)), tokenizer


def _spec_of(found: Found, config: Config, *, vocab_size: int) -> ModelSpec:
    """The spec of a checkpoint's model, from what lies in the run folder alone where that is enough.

    The model that a run began from (`model.path`) may be gone, and the attention kernel that it trained with may not be
    on this machine.
    """
    model = config.model
    described = found.folder.parent.parent / MODEL_CONFIG
    if model.spec is None and not model.trust_remote_code and described.is_dir():
        from transformers import AutoConfig

        from distllm.models.hf import quiet, spec_from_config

        try:
            with quiet():
                return spec_from_config(AutoConfig.from_pretrained(described, trust_remote_code=False))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{described}: not the config of a model: {' '.join(str(error).split())[:200]}") from error
    anywhere = model.model_copy(update={"attention": "auto"})
    return resolve_spec(config.model_copy(update={"model": anywhere}), vocab_size=vocab_size)


def _tokenizer_folder(found: Found) -> Path:
    folder = found.folder.parent.parent / "tokenizer"
    if not folder.is_dir():
        raise DataError(f"{folder}: missing; a checkpoint is used from inside its run folder, RUN/checkpoints/step-N")
    return folder


def _filled(found: Found, spec: ModelSpec, *, seed: int, device: torch.device) -> nn.Module:
    """The model with a checkpoint's tensors; what is not kept in one (rotary tables) is computed."""
    model = meta_model(spec)
    saved = dict(read_full(found, names_prefix="model."))
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


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text") from None


def _windows(source: Source, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs and labels of a text, seq_len at a time, every token predicted once but the very first."""
    ids: list[int] = source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    for start in range(0, len(ids) - 1, source.seq_len):
        inputs = ids[start : start + source.seq_len]
        labels = ids[start + 1 : start + source.seq_len + 1]
        padding = source.seq_len - len(labels)
        yield inputs[: len(labels)] + [0] * padding, labels + [IGNORE] * padding


def _batches(source: Source, documents: Sequence[str], size: int) -> Iterator[Batch]:
    rows = [row for text in documents for row in _windows(source, text)]
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        inputs, labels = torch.tensor([r[0] for r in part]), torch.tensor([r[1] for r in part])
        yield Batch({"input_ids": inputs}, {"labels": labels}, tuple(range(start, start + len(part))))


def _validation(source: Path, size: int) -> Iterator[Batch]:
    config = read_config(find(source, logger=log).folder)
    samples = Samples(open_prepared(config), config)
    return validation_batches(samples, micro_batch=size, dp_rank=0, dp_size=1, limit=0)
