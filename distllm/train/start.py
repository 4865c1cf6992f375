"""What a run starts or learns from: the weights of another run become a model folder, kept in the run's own folder."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distllm import comm
from distllm.checkpoint.find import find
from distllm.comm import World
from distllm.config.errors import ConfigError, DataError
from distllm.config.schema import Config, ModelConfig
from distllm.data.tokenizer import Roles, id_count
from distllm.engine.native import DTYPES
from distllm.models.build import initial_tensors, resolve_spec
from distllm.models.hf_config import head_labels
from distllm.models.hf_folder import weights_folder
from distllm.models.spec import ModelSpec
from distllm.models.weights import load_report
from distllm.parallel.mesh import Mesh
from distllm.train.distill import Teacher, build_teacher, check_teacher, other_tokenizer, showing_states, teacher_width
from distllm.train.folder import RunFolder, read_config, read_labels, read_tokenizer
from distllm.train.inference import export_source, is_run
from distllm.train.tasks import Labels, outputs_of

log = logging.getLogger("distllm")
TEACHER = "teacher.json"
"""Beside a teacher's weights in the run folder: what they do not say of themselves."""


def with_start(config: Config, folder: RunFolder, world: World) -> Config:
    """The config with folders of weights in place of runs and checkpoints in `model.path` and `model.weights`.

    Raises:
        CheckpointError: the run that is named has no good checkpoint.
        ConfigError: it runs code of its own.
    """
    model = config.model
    name = "path" if model.path is not None else "weights"
    source = getattr(model, name)
    if source is None:
        return config
    start = _kept(source, folder, "start", world, trust=model.spec is not None)
    return config.model_copy(update={"model": model.model_copy(update={name: str(start)})})


def _kept(source: str, folder: RunFolder, name: str, world: World, *, trust: bool) -> Path | str:
    """A model folder as it is; of a run or checkpoint the weights, written into the run folder as `name` once by rank 0.

    A run that goes on later needs the one that it began from no more. A start that failed may have named another.
    """
    place, path = folder.path / name, Path(source).expanduser()
    if folder.begun:
        return place if place.is_dir() else source
    comm.main_first(lambda: shutil.rmtree(place, ignore_errors=True), world)
    if not is_run(path):
        return source
    comm.main_first(lambda: str(export_source(str(path), place, trust=trust)), world)
    return place


@contextmanager
def as_the_user_named(config: Config, folder: RunFolder) -> Iterator[None]:
    """Tell errors of the weights that were kept in the run folder by the name that the config has for them."""
    kept, named = f"{folder.path / 'start'}", config.model.path or config.model.weights or ""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([problem.replace(kept, named) for problem in error.problems]) from error
    except DataError as error:
        raise DataError(str(error).replace(kept, named)) from error


def with_teacher(
    spec: ModelSpec, config: Config, *, folder: RunFolder, world: World, tokenizer: Any, labels: Labels, roles: Roles
) -> tuple[ModelSpec, ModelSpec | None]:
    """The student, showing its hidden states where they are matched, and the teacher; None where there is none.

    Raises:
        ConfigError: a teacher with another vocabulary, other labels, or hidden states that cannot be matched.
        DataError: there is no such model, or it is for another task.
    """
    source = config.distill.teacher
    if source is None:
        return spec, None
    place = _kept(source, folder, "teacher", world, trust=config.model.spec is not None)
    where = place if isinstance(place, Path) else weights_folder(
        source, trust=config.model.trust_remote_code, key="distill.teacher"
    )  # fmt: skip
    facts = comm.main_first(lambda: _facts_of(source, where, keep=not folder.begun), world)
    model, seq_len = ModelConfig(path=str(where), trust_remote_code=config.model.trust_remote_code), config.data.seq_len
    if not (where / "config.json").is_file():  # a module of the user's own
        model = ModelConfig(spec=facts["spec"], spec_args=facts["spec_args"], weights=str(where))
        seq_len = facts["seq_len"]  # it may have a position for each
    taught = tuple(facts["labels"]) or labels.get("", ())
    tokenizers = _ids(tokenizer), _ids(read_tokenizer(where))
    if problem := other_tokenizer(config, tokenizers):  # first: ids that mean other text seldom fit the embedding either
        raise ConfigError([problem])
    try:
        teacher = resolve_spec(
            config.model_copy(update={"model": model, "data": config.data.model_copy(update={"seq_len": seq_len})}),
            vocab_size=id_count(tokenizer), labels=outputs_of({"": taught}), roles=roles,
        )  # fmt: skip
        report = load_report(teacher)
    except DataError as error:
        raise DataError(str(error).replace(f"model.path={where}", f"distill.teacher={source}")) from error
    check_teacher(
        config, student=spec, teacher=teacher, tokenizers=tokenizers,
        labels=(labels.get("", ()), taught),
    )  # fmt: skip
    if report is not None and report.new:
        rule = f"lacks {', '.join(report.new[:3])}; a teacher needs all of its weights, trained for task.kind={config.task.kind}"
        raise ConfigError([f"distill.teacher={source}: {rule}"])
    if config.distill.hidden:
        spec = showing_states(spec, width=teacher_width(teacher))
    return spec, teacher


def _facts_of(source: str, where: Path, *, keep: bool) -> dict[str, Any]:
    """What a teacher's weights do not say of themselves: its labels, and of a module of the user's own how to build it.

    Args:
        source: `distill.teacher`.
        where: its weights as a folder.
        keep: write down beside the weights of a run what its folder says, for a resume without it.
    """
    kept, path = where / TEACHER, Path(source).expanduser()
    if kept.is_file():
        facts: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return facts
    if not is_run(path) and (where / "config.json").is_file():
        said = json.loads((where / "config.json").read_text(encoding="utf-8"))
        return {"labels": head_labels(said.get("architectures"), said.get("id2label"))}
    found = find(path, logger=log).folder
    config = read_config(found)
    facts = {"labels": read_labels(found.parent.parent).get("", ()), "spec": config.model.spec,
             "spec_args": dict(config.model.spec_args), "seq_len": config.data.seq_len}  # fmt: skip
    if keep:
        kept.write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return facts


def laid_out(teacher: ModelSpec | None, config: Config, world: World, *, mesh: Mesh) -> Teacher | None:
    """The teacher on the student's ranks."""
    if teacher is None:
        return None
    return build_teacher(
        teacher, tensors=initial_tensors(teacher, seed=config.seed), mesh=mesh, device=world.device,
        compute_dtype=DTYPES[config.precision.compute], hidden=config.distill.hidden > 0,
    )  # fmt: skip


def _ids(tokenizer: Any) -> str:
    """A digest of which id every token has."""
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    pairs: Sequence[tuple[str, int]] = sorted(vocabulary.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
