"""The only place that assembles a run: config -> mesh -> model -> engine -> checkpoint."""

from __future__ import annotations

import logging
import secrets
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distllm import comm
from distllm.checkpoint.find import AVERAGES, Found, read_facts
from distllm.checkpoint.manager import CheckpointManager
from distllm.comm import World
from distllm.config.check import Resolved, resolve_layout, resolved_config
from distllm.config.check_task import packed
from distllm.config.errors import CheckpointError, ConfigError, DataError
from distllm.config.load import digest, to_yaml
from distllm.config.places import missing
from distllm.config.schema import Config
from distllm.data.loader import open_samples
from distllm.data.prepare import Prepared, open_prepared, prepare
from distllm.data.samples import Samples
from distllm.data.tokenizer import Roles, check_roles, folder_digest, roles_of
from distllm.engine.base import Engine
from distllm.engine.deepspeed import Tensors
from distllm.models.build import meta_model, resolve_spec
from distllm.models.spec import ModelSpec
from distllm.models.weights import LoadReport, load_report
from distllm.parallel.mesh import Mesh, build_mesh
from distllm.parallel.parallelize import refuse_misfits
from distllm.parallel.tensor_check import narrowest
from distllm.track.log import close_log, open_log
from distllm.track.meter import Meter, peak_flops
from distllm.track.tracker import Tracker
from distllm.train.build_deepspeed import build_deepspeed, require_deepspeed
from distllm.train.build_native import build_engine
from distllm.train.distill import Teacher
from distllm.train.folder import (
    RunFolder,
    claim,
    keep_labels,
    keep_model_config,
    keep_run_id,
    keep_tokenizer,
    read_run_id,
    read_tokenizer,
    rewind_samples,
)
from distllm.train.host import memory_of, random_state, restore_random_state, seed_rank, tune_host
from distllm.train.start import as_the_user_named, laid_out, with_start, with_teacher
from distllm.train.stopping import Best
from distllm.train.tasks import Labels, Task, make_task, outputs_of
from distllm.train.tune import apply_tune, first_tensors, tuned_spec


@dataclass(frozen=True)
class Position:
    """How far a run is; what a checkpoint keeps beside the engine's state. All sums are over all attempts."""

    samples: int = 0
    """Global samples consumed: the only data state there is."""
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best: Best = field(default_factory=Best)
    """The best evaluation so far."""


@dataclass(frozen=True)
class DataFacts:
    """What the samples are made of: a run goes on only with the same."""

    text: str
    """The digest of the sources and how they are tokenised."""
    tokenizer: str
    """The digest of the tokenizer's files."""


@dataclass(frozen=True)
class Run:
    """Everything that training, evaluation and the checkpoints of one run need."""

    config: Config
    resolved: Resolved
    world: World
    mesh: Mesh
    folder: RunFolder
    spec: ModelSpec
    task: Task
    labels: Labels
    """Of each task that classifies."""
    tokenizer: Any
    """Of transformers."""
    samples: Samples
    data: DataFacts
    engine: Engine
    checkpoints: CheckpointManager
    tracker: Tracker
    meter: Meter
    log: logging.Logger
    start: Position = field(default_factory=Position)
    """Where this attempt begins."""


def build(config: Config, world: World) -> Run:
    """Assemble a run, resumed where its folder or the config says so.

    Args:
        config: checked; values that follow from the number of ranks may still be `auto`.
        world: this rank's facts; the process group has been started.

    Returns:
        The run, ready for its next step. A collective call.

    Raises:
        DistllmError: what the user has to change, the same on every rank.
        OSError: the run folder cannot be written.
    """
    if config.engine.name == "deepspeed":
        require_deepspeed()
    tune_host(config, world)
    resolved = resolve_layout(config, world.size)
    config = resolved_config(config, world.size)
    folder = comm.main_first(lambda: claim(config), world)
    log = open_log(folder.path, rank=world.rank, terminal=True)
    try:
        with as_the_user_named(config, folder):
            return _assemble(config, world, resolved=resolved, folder=folder, log=log)
    except BaseException:
        close_log(log)
        raise


def make_engine(
    config: Config,
    world: World,
    *,
    mesh: Mesh,
    spec: ModelSpec,
    task: Task,
    tensors: Tensors,
    teacher: Teacher | None = None,
) -> Engine:
    """The engine that the config names, with the model laid out on its mesh.

    Args:
        config: what decides how it learns.
        world: this rank's facts.
        mesh: the ranks by axis.
        spec: the model that trains.
        task: what it learns.
        tensors: a call gives the first weights by name, whole.
        teacher: whom it learns from; under DeepSpeed nobody.
    """
    if config.engine.name == "deepspeed":
        assert teacher is None, "check_engine refuses a teacher"
        return build_deepspeed(config, world, mesh=mesh, spec=spec, task=task, tensors=tensors)
    return build_engine(config, world, mesh=mesh, spec=spec, task=task, tensors=tensors(), teacher=teacher)


def _assemble(config: Config, world: World, *, resolved: Resolved, folder: RunFolder, log: logging.Logger) -> Run:
    """`build`, once the run has a folder and a log."""
    started = with_start(config, folder, world)
    # A wrong type or size, and a model that cannot fit, are told before the text is tokenised.
    guessed = guessed_spec(started, tp=resolved.tp)
    refuse_misfits(
        meta_model(guessed), spec=guessed, sizes=resolved.sizes(), axes=config.layout, moe=config.moe
    )
    refuse_too_large(config, guessed, world, shards=resolved.shards)
    prepared = _data(config, world)
    data = DataFacts(prepared.digest, folder_digest(prepared.tokenizer_folder))
    comm.main_first(lambda: keep_tokenizer(folder, prepared.tokenizer_folder), world)
    tokenizer = read_tokenizer(prepared.tokenizer_folder)
    roles, labels, task = roles_of(tokenizer), prepared.labels, make_task(config)
    check_roles(roles, config)
    comm.main_first(lambda: keep_labels(folder, labels), world)
    plain = resolve_spec(
        started, vocab_size=prepared.vocab_size, labels=outputs_of(labels), roles=roles, label_names=labels.get("", ())
    )
    plain, taught_by = with_teacher(
        plain, config, folder=folder, world=world, tokenizer=tokenizer, labels=labels, roles=roles
    )
    spec = tuned_spec(plain, config.tune)
    samples = open_samples(
        prepared, config, resolved=resolved, tokenizer=tokenizer, decoder_start=spec.decoder_start, token_types=spec.token_types
    )
    refuse_too_large(config, spec, world, shards=resolved.shards)
    mesh = build_mesh(world, sizes=resolved.sizes())
    if spec.hf_config is not None:
        comm.main_first(lambda: keep_model_config(folder, spec.hf_config), world)
    _tell_loaded(load_report(plain), log)
    engine = make_engine(
        config, world, mesh=mesh, spec=spec, task=task, tensors=partial(first_tensors, plain, spec, seed=config.seed),
        teacher=laid_out(taught_by, config, world, mesh=mesh),
    )  # fmt: skip
    seed_rank(config.seed, dp_rank=_reader(mesh), step=0)
    attempt = comm.broadcast(secrets.token_hex(4), world)
    checkpoints = CheckpointManager(
        folder.checkpoints, config=config.checkpoint, world=world, attempt=attempt, logger=log
    )
    checkpoints.reserve(engine.state())
    found = _resume_point(config, checkpoints)
    facts = _restore(found, engine, checkpoints, run_data=data, config=config, mesh=mesh) if found else {}
    own = found is not None and found.folder.parent == checkpoints.folder
    start = _position(found, facts, own=own) if found else Position()
    if found and own and found.step == start.best.step and (config.train.keep_best or config.train.patience > 0):
        checkpoints.mark_best(found.step)  # a kill may have come between its save and its link
    tracker = Tracker(
        folder.path, config=config.track, resolved=config.model_dump(mode="json"),
        run_id=comm.main_first(lambda: read_run_id(folder), world) or (facts.get("wandb_id") if own else None),
        is_main=world.is_main, log=log,
    )  # fmt: skip
    if world.is_main:
        keep_run_id(folder, tracker.run_id)
        rewind_samples(folder, engine.updates)
    tracker.rewind(engine.updates)
    meter = Meter(
        flops_per_token=spec.flops_per_token(config.data.seq_len) if spec.flops_per_token and packed(config) else None,
        peak=_peak(config, world), devices=world.size, device=world.device,
    )  # fmt: skip
    run = Run(
        config, resolved, world, mesh, folder, spec, task, labels, tokenizer, samples, data, engine, checkpoints,
        tracker, meter, log, start,
    )  # fmt: skip
    _announce(run, found)
    return run


def guessed_spec(config: Config, *, tp: int) -> ModelSpec:
    """The model as far as it is known before the data are: the smallest heads, and a vocabulary that any tp can cut."""
    labels = {name: len(head.labels) or 2 for name, head in config.task.tasks.items()} or {"": len(config.task.labels) or 2}
    if config.task.kind == "regression":
        labels = {"": 1}
    vocab_size = max(5, narrowest(tp))
    if isinstance(given := config.model.sizes.get("vocab_size"), int):
        vocab_size = min(vocab_size, given)
    return resolve_spec(config, vocab_size=vocab_size, labels=labels, roles=Roles(eos=0, pad=1, begin=2, separator=0, mask=3))


def _reader(mesh: Mesh) -> int:
    """A number for each rank with dropout of its own: those that hold other samples, parts of sequences or stages."""
    place = mesh.coordinates()
    return (mesh.dp_rank * mesh.sizes["cp"] + place["cp"]) * mesh.sizes["pp"] + place["pp"]


def _tell_loaded(report: LoadReport | None, log: logging.Logger) -> None:
    """Say which weights came from the folder that the model starts from."""
    if report is None:
        return
    log.info(f"took {report.loaded} tensors from the model that this run starts from")
    for what, names in (("new, from the seed", report.new), ("left over, not taken", report.left_over)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            log.info(f"{what}: {', '.join(names[:8])}{more}")
    if report.head_was_for:
        log.warning(f"the head that was taken answered {', '.join(report.head_was_for)}, and learns other labels now")


def refuse_too_large(config: Config, spec: ModelSpec, world: World, *, shards: int) -> None:
    """Refuse a model too large for the memory: weights, and gradients and optimizer state of those that learn, alone.

    Where DeepSpeed has them elsewhere, it is the weights alone, which each rank has uncut, but by tp and pp, at the start.
    """
    model = meta_model(spec)
    apply_tune(model, spec, config.tune)
    parameters = sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = {"adamw": 2, "adam": 2, "rmsprop": 2, "sgd": 1, "lion": 1}[config.optim.name]
    ranks = 1 if world.device.type == "cuda" else world.local_size  # ranks on a CPU share its memory
    need = 4 * (parameters + learning * (1 + buffers + (config.train.ema > 0))) / shards * ranks
    what, axis = f"fp32 weights, gradients and {config.optim.name} state", "dp_shard"
    if config.engine.offload_optimizer == "nvme" or (config.engine.offload_optimizer == "cpu" and world.device.type == "cuda"):
        need = 4 * parameters / (config.layout.tp * config.layout.pp) * ranks
        what, axis = "fp32 weights at the start", "tp"
    have = memory_of(world.device)
    if need > have:
        raise ConfigError(
            [
                f"model: {parameters:,} parameters need at least {need / 2**30:,.1f} GiB for {what}, "
                f"and {world.device.type} has {have / 2**30:,.1f} GiB; "
                f"give smaller model.sizes, or more ranks in layout.{axis}"
            ]
        )


def save(run: Run, *, position: Position) -> None:
    """Write a checkpoint of the run as it is now."""
    run.world.place.enter("checkpoint")
    facts = {"position": asdict(position), "data": asdict(run.data), "engine": run.engine.facts(), "wandb_id": run.tracker.run_id}
    run.checkpoints.save(
        run.engine.updates, run.engine.state(), facts=facts, rng=random_state(run.world.device),
        layout=dict(run.mesh.sizes), config_yaml=to_yaml(run.config), config_digest=digest(run.config),
    )  # fmt: skip


def close(run: Run, *, code: int = 0) -> None:
    """Close the run's files and its W&B run; `code` is what the process will exit with."""
    run.tracker.finish(code)
    close_log(run.log)


def _data(config: Config, world: World) -> Prepared:
    """Prepare the token stores on rank 0 while the others wait, then open them everywhere."""
    augment = config.data.augment
    translate = None
    if augment.back_translation:
        from distllm.train.translate import make_translator

        translate = make_translator(augment.translators, trust=config.model.trust_remote_code)
    comm.main_first(lambda: bool(prepare(config, progress=True, translate=translate)), world)
    return open_prepared(config)


def _resume_point(config: Config, checkpoints: CheckpointManager) -> Found | None:
    """The checkpoint to start from: this run's newest good one, else the one that the config names."""
    newest = checkpoints.newest()
    if newest is not None or config.resume in ("auto", "never"):
        return newest
    if not Path(config.resume).exists() and not Path(config.resume).is_symlink():
        raise CheckpointError(missing("resume", config.resume, what="no such run or checkpoint", wanted=Path.is_dir))
    return checkpoints.find(Path(config.resume))


def _restore(
    found: Found,
    engine: Engine,
    checkpoints: CheckpointManager,
    *,
    run_data: DataFacts,
    config: Config,
    mesh: Mesh,
) -> dict[str, Any]:
    """Load a checkpoint into the engine and this process's generators; returns its facts."""
    facts = read_facts(found)
    _refuse_other_data(found, facts, run_data, own=found.folder.parent == checkpoints.folder)
    engine.restore(facts["engine"])
    facts, rng = checkpoints.load(found, engine.state(), layout=dict(mesh.sizes), optional=(AVERAGES,))
    if not any(name.startswith(AVERAGES) for name in found.manifest.tensors):
        engine.restart_average()  # the run began without one: it starts from the weights of now
    if rng is not None:
        restore_random_state(rng, device=engine.device)
    else:  # another layout has other ranks: fresh generators, but not those of step 0 again
        seed_rank(config.seed, dp_rank=_reader(mesh), step=engine.updates)
    return facts


def _refuse_other_data(found: Found, facts: dict[str, Any], data: DataFacts, *, own: bool) -> None:
    """Refuse to go on with other text (in the same run) or with another tokenizer (from any checkpoint)."""
    saved = facts.get("data", {})
    if saved.get("tokenizer") != data.tokenizer:
        raise DataError(
            f"{found.folder}: was trained with another tokenizer, whose ids mean other text; set data.tokenizer.kind=hf and "
            f"data.tokenizer.path={found.folder.parent.parent / 'tokenizer'} to go on with it"
        )
    if own and saved.get("text") != data.text:
        raise DataError(
            f"{found.folder}: the text of data.sources has changed since this run began, so its order of samples is lost; "
            f"bring the old text back, or go on as a new run: name=NEW resume={found.folder}"
        )


def _position(found: Found, facts: dict[str, Any], *, own: bool) -> Position:
    """Where a checkpoint is; the best evaluation and the patience of another run, which may have other data, do not count."""
    try:
        saved = facts["position"]
        return Position(**{**saved, "best": Best(**saved["best"]) if own else Best()})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{found.folder}: its position is of another version of distllm ({error})") from error


def _peak(config: Config, world: World) -> float | None:
    if world.device.type != "cuda":
        return None
    fp32 = "tf32" if config.precision.tf32 else "fp32"
    dtype = fp32 if config.precision.compute == "fp32" else config.precision.compute
    return peak_flops(torch.cuda.get_device_name(world.device), dtype)


def _announce(run: Run, found: Found | None) -> None:
    """Say in a few lines what is about to run."""
    parameters = sum(p.numel() for p in meta_model(run.spec).parameters())
    r = run.resolved
    axes = " x ".join(f"{axis} {size}" for axis, size in run.mesh.sizes.items() if size > 1) or "one process"
    engine = run.config.engine
    by = f" by DeepSpeed, ZeRO {engine.zero_stage}" if engine.name == "deepspeed" else ""
    run.log.info(
        f"{run.spec.name}, {parameters:,} parameters, {run.config.precision.compute}, on {run.world.device.type}: {axes}{by}"
    )
    run.log.info(
        f"global batch {r.global_batch} samples of {run.config.data.seq_len} tokens = micro-batch {r.micro_batch} x "
        f"accumulation {r.accumulation} x data-parallel {r.dp_size}; {run.config.train.steps} steps; an epoch is "
        f"{run.samples.train_size:,} samples, validation {run.samples.validation_size:,}"
    )
    if found is not None:
        run.log.info(f"continuing at step {run.engine.updates} from {found.folder}")
