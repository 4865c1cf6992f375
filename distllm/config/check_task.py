"""What a task cannot be together with: rules of the same shape as those of `check.py`, which calls them."""

from __future__ import annotations

from collections.abc import Iterator

from distllm.config.kinds import shown
from distllm.config.metrics_table import known_metrics
from distllm.config.schema import AugmentConfig, Config, SourceConfig, TaskConfig

TABLES = ("jsonl", "csv", "tsv", "parquet", "hub")
"""Source kinds with columns."""
PACKED = ("causal_lm", "masked_lm")
"""Tasks that learn from running text."""
MASKED = ("masked_lm", "translation_lm")


def packed(config: Config) -> bool:
    """Whether the task's samples are rows cut from running text, all of one length."""
    return config.task.kind in PACKED


def one_target(config: Config) -> bool:
    """Whether a sample has one target, not one a token."""
    return config.task.kind in ("classification", "regression", "multi_task")


def loss_unit(config: Config) -> float:
    """About how many targets a micro-batch has: fp16 scales loss sums so that they are as large as means."""
    return float(config.train.micro_batch * (1 if one_target(config) else config.data.seq_len))


def task_problems(config: Config) -> Iterator[str]:
    """What is wrong with the `task` section."""
    task, default = config.task, TaskConfig()
    kind = task.kind
    if task.labels and kind != "classification":
        yield f"task.labels={shown(task.labels)}: is for classification, not {kind}; nearest: []"
    if len(task.labels) == 1 or len(set(task.labels)) < len(task.labels):
        yield f"task.labels={shown(task.labels)}: must be at least two different labels; nearest: []"
    hides = kind in MASKED or any(head.kind == "masked_lm" for head in task.tasks.values())
    for name in ("mask_probability", "mask_token", "random_token", "masking", "whole_words"):
        value, usual = getattr(task, name), getattr(default, name)
        if value != usual and not hides:
            yield f"task.{name}={shown(value)}: is for masked_lm and translation_lm, not {kind}; nearest: {shown(usual)}"
    if task.mask_token + task.random_token > 1.0 + 1e-9:
        near = round(1.0 - task.mask_token, 3)
        yield f"task.random_token={task.random_token}: with task.mask_token={task.mask_token} at most {near}; nearest: {near}"
    if task.label_smoothing and kind == "regression":
        yield f"task.label_smoothing={task.label_smoothing}: regression has no classes to smooth; nearest: 0.0"
    for name in task.metrics:
        if name not in ("bleu", "chrf"):
            yield f"task.metrics={shown(task.metrics)}: {name} is not one of bleu, chrf; what else fits is measured anyway"
        elif kind != "seq2seq":
            yield f"task.metrics={shown(task.metrics)}: {name} is for seq2seq, not {kind}; nearest: []"
    if kind == "multi_task" and not task.tasks:
        yield "task.tasks={}: multi_task needs at least one task; nearest: {mine: {kind: classification}}"
    if kind != "multi_task" and task.tasks:
        yield f"task.tasks={shown(list(task.tasks))}: is for multi_task, not {kind}; nearest: task.kind=multi_task"
    for name, head in task.tasks.items():
        if not name.isidentifier():
            yield f"task.tasks.{name}: a task's name must be letters, digits and underscores; nearest: {_identifier(name)}"
        if head.labels and head.kind != "classification":
            yield f"task.tasks.{name}.labels={shown(head.labels)}: is for classification, not {head.kind}; nearest: []"


def _identifier(name: str) -> str:
    plain = "".join(c if c.isalnum() else "_" for c in name)
    return plain if plain.isidentifier() else f"task_{plain}"


def metric_problems(config: Config) -> Iterator[str]:
    """What is wrong with the metric by which checkpoints are chosen."""
    train = config.train
    task, wanted = config.task, train.best_metric
    names = known_metrics(task.kind, tasks={name: head.kind for name, head in task.tasks.items()}, asked=task.metrics)
    known = [f"val_{name}" for name in names]
    if wanted not in known:
        near = "val_accuracy" if "val_accuracy" in known else "val_loss"
        yield f"train.best_metric={wanted}: {task.kind} measures {', '.join(known)}; nearest: {near}"
    if train.patience and not train.eval_every:
        yield f"train.patience={train.patience}: counts evaluations, and train.eval_every is 0; nearest: train.eval_every=100"
    if train.keep_best and not train.eval_every:
        yield "train.keep_best=true: needs evaluations, and train.eval_every is 0; nearest: train.eval_every=100"


def source_problems(config: Config) -> Iterator[str]:
    """What sources a task cannot learn from."""
    data, kind = config.data, config.task.kind
    for place, sources in (("data.sources", data.sources), ("data.validation.sources", data.validation.sources)):
        for index, source in enumerate(sources):
            yield from _source(f"{place}.{index}", source, config)
    missing = [name for name in config.task.tasks if all(source.task != name for source in data.sources)]
    if kind == "multi_task" and missing:
        yield f"task.tasks.{missing[0]}: no source has task={missing[0]}; nearest: a source with it in data.sources"
    if kind not in PACKED and not data.validation.sources and data.validation.by == "position":
        yield f"data.validation.by=position: is for running text, not {kind}; nearest: document"


def _source(place: str, source: SourceConfig, config: Config) -> Iterator[str]:
    kind, task, default = source.kind, config.task.kind, SourceConfig()
    fitting = {"causal_lm": None, "masked_lm": None, "seq2seq": (*TABLES, "parallel"), "translation_lm": (*TABLES, "parallel")}
    allowed = fitting.get(task, TABLES)
    if allowed is not None and kind not in allowed:
        yield f"{place}.kind={kind}: task.kind={task} needs examples with columns; nearest: {_by_ending(source)}"
    if allowed is None and kind == "parallel":
        yield f"{place}.kind=parallel: is for seq2seq and translation_lm, not {task}; nearest: task.kind=seq2seq"
    if kind == "parallel" and not source.target_path:
        yield f"{place}.target_path=null: kind parallel needs two files; nearest: the path of the targets"
    only = {
        "target_path": (kind == "parallel", "kind parallel"),
        "pair_column": (allowed == TABLES and task != "sft", "classification, regression and multi_task"),
        "label_column": (task in ("classification", "regression", "multi_task"), "classification, regression and multi_task"),
        "target_column": (task in ("seq2seq", "translation_lm", "sft"), "seq2seq, translation_lm and sft"),
        "messages_column": (task == "sft", "sft"),
        "names": (kind in ("csv", "tsv"), "csv and tsv"),
        "prefix": (task not in PACKED and task != "sft", "tasks of examples"),
    }
    for name, (fits, what) in only.items():
        value, usual = getattr(source, name), getattr(default, name)
        if value != usual and not fits:
            yield f"{place}.{name}={shown(value)}: is for {what}; nearest: {shown(usual)}"
    known = list(config.task.tasks)
    if task == "multi_task" and source.task not in known:
        near = known[0] if known else "null"
        yield f"{place}.task={shown(source.task)}: must be one of task.tasks: {', '.join(known)}; nearest: {near}"
    if task != "multi_task" and source.task is not None:
        yield f"{place}.task={shown(source.task)}: is for multi_task, not {task}; nearest: null"


def _by_ending(source: SourceConfig) -> str:
    endings = {".tsv": "tsv", ".csv": "csv", ".parquet": "parquet", ".txt": "tsv"}
    return next((k for ending, k in endings.items() if (source.path or "").endswith(ending)), "jsonl")


def example_problems(config: Config) -> Iterator[str]:
    """What cannot be done with running text, or with examples."""
    data, train, kind = config.data, config.train, config.task.kind
    if kind in PACKED and data.truncate != "refuse":
        yield f"data.truncate={data.truncate}: running text is cut into samples and never too long; nearest: refuse"
    if data.truncate == "window" and kind not in ("classification", "regression", "masked_lm", "causal_lm"):
        yield f"data.truncate=window: is for classification and regression, not {kind}; nearest: head"
    if data.truncate == "window" and data.stride >= data.seq_len - 2:
        yield f"data.stride={data.stride}: must be below data.seq_len={data.seq_len} less 2; nearest: {max(1, data.seq_len // 4)}"
    if kind != "causal_lm" and not data.cross_documents:
        yield f"data.cross_documents=false: is for causal_lm (sft does it always); {kind} has no use for it; nearest: true"
    if (data.augment != AugmentConfig()) and (kind in PACKED or kind == "sft"):
        yield f"data.augment: is for labelled text and pairs, not {kind}; nearest: none of its keys"
    augment = data.augment
    if augment.synonym and not augment.synonyms:
        yield f"data.augment.synonym={augment.synonym}: needs a file of synonyms; nearest: data.augment.synonyms=FILE"
    if augment.back_translation and not augment.translators:
        rate = augment.back_translation
        yield f"data.augment.back_translation={rate}: needs translators; nearest: data.augment.translators=[RUN]"
    if augment.back_translation and kind not in ("classification", "regression", "seq2seq"):
        rate = augment.back_translation
        yield f"data.augment.back_translation={rate}: is for classification, regression and seq2seq; nearest: 0.0"
    if train.batch_tokens is not None:
        if kind in PACKED or kind == "sft":
            yield f"train.batch_tokens={train.batch_tokens}: rows of {kind} are of one length; nearest: train.global_batch"
        if train.global_batch is not None:
            yield f"train.batch_tokens={train.batch_tokens}: not with train.global_batch too; nearest: train.global_batch=null"
        if train.batch_ramp:
            yield f"train.batch_ramp={train.batch_ramp}: not together with train.batch_tokens; nearest: 0"
    if train.seq_ramp:
        if kind not in PACKED:
            yield f"train.seq_ramp={train.seq_ramp}: is for running text, not {kind}; nearest: 0"
        ratio = data.seq_len / train.seq_ramp_from
        if ratio < 1 or ratio != 2 ** (int(ratio).bit_length() - 1):
            near = data.seq_len // 4 or data.seq_len
            rule = f"data.seq_len={data.seq_len} must be a power of two times it"
            yield f"train.seq_ramp_from={train.seq_ramp_from}: {rule}; nearest: {near}"


def learning_problems(config: Config) -> Iterator[str]:
    """What is wrong with tuning, distillation and the model that is started from."""
    model, tune, distill, kind = config.model, config.tune, config.distill, config.task.kind
    fresh = model.path is None and model.weights is None
    if tune.train != "all" and fresh:
        yield f"tune.train={tune.train}: the rest of the model would stay random; nearest: all, or model.path"
    if tune.train == "lora" and model.spec is not None:
        yield "tune.train=lora: is for models of transformers; nearest: top"
    if tune.lora != type(tune.lora)() and tune.train != "lora":
        yield "tune.lora: is for tune.train=lora; nearest: tune.train=lora"
    if tune.top_blocks != 1 and tune.train != "top":
        yield f"tune.top_blocks={tune.top_blocks}: is for tune.train=top; nearest: 1"
    if model.weights is not None and model.path is not None:
        yield f"model.weights={shown(model.weights)}: model.path already brings weights; nearest: null"
    if model.dropout is not None and model.spec is not None:
        yield f"model.dropout={model.dropout}: is for models of transformers; nearest: model.spec_args"
    if kind == "multi_task" and model.spec is not None:
        yield f"model.spec={shown(model.spec)}: multi_task builds its heads on a model of transformers; nearest: model.type=bert"
    if distill.teacher is None and distill != type(distill)():
        yield "distill.teacher=null: the other keys of distill need a teacher; nearest: distill.teacher=RUN"
    if distill.teacher is not None and kind in ("regression", "multi_task"):
        yield f"distill.teacher={shown(distill.teacher)}: {kind} has no probabilities to learn from; nearest: null"
    if distill.hidden and model.spec is not None:
        yield f"distill.hidden={distill.hidden}: hidden states come from models of transformers; nearest: 0.0"


TASK_RULES = (task_problems, metric_problems, source_problems, example_problems, learning_problems)
