"""Distillation: learn from a frozen teacher's output too (Hinton et al. 2015, arXiv 1503.02531).

Shapes: B batch, S sequence, N rows of logits (B * S places, or B texts), V vocabulary or classes, D hidden.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from distllm.config.errors import ConfigError
from distllm.config.schema import Config, DistillConfig, LayoutConfig
from distllm.data.batch import IGNORE, Batch
from distllm.engine.base import LossTerms, Objective
from distllm.models.build import meta_model
from distllm.models.spec import ModelSpec
from distllm.parallel.loss import at_least_fp32
from distllm.parallel.mesh import Mesh
from distllm.parallel.parallelize import Layout, Parallel, parallelize
from distllm.train.objectives.tokens import logits_of, places_of

PROJECTION = "distill_projection"
"""The student's own layer from its hidden width to the teacher's; it is trained and saved, and not exported."""

FEW_LABELS = ("masked_lm", "translation_lm")
"""Kinds of task where most places have no label: softmax is worth its cost only at those that have one."""

STATES = {"hidden_states": "attention_mask", "encoder_hidden_states": "attention_mask",
          "decoder_hidden_states": "decoder_attention_mask"}  # fmt: skip
"""Hidden states in transformers' outputs -> the input that says which of their places count."""


@dataclass(frozen=True)
class Teacher:
    """A frozen model on the student's ranks."""

    parallel: Parallel
    device: torch.device
    compute_dtype: torch.dtype
    takes: frozenset[str]
    """The inputs that its forward has a name for."""

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """Its outputs on a batch's inputs; of sharded weights, every rank calls it equally often."""
        # Some encoders tell the two texts of a pair apart by type, and others do not.
        known = {name: value for name, value in inputs.items() if name != "token_type_ids" or name in self.takes}
        with self._autocast():
            outputs = self.parallel.forward(**known)
        if isinstance(self.parallel.model, FSDPModule):
            self.parallel.model.reshard()  # what is outside the blocks waits for a backward pass that never comes
        return outputs

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype in (torch.float32, torch.float64) or self.parallel.sharded:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)


def check_teacher(
    config: Config, *, student: ModelSpec, teacher: ModelSpec, tokenizers: tuple[str, str],
    labels: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> None:  # fmt: skip
    """Refuse a teacher that says something else than the student is asked.

    Args:
        config: `distill`, `task.kind`, `train.compile` and `data.seq_len` are read.
        student: the model that learns.
        teacher: the model of `distill.teacher`.
        tokenizers: the digests of the student's and of the teacher's tokenizer.
        labels: for classification the labels of both, in the order of their numbers.

    Raises:
        ConfigError: with a line for each reason.
    """
    key = f"distill.teacher={config.distill.teacher}"
    problems = []
    if config.task.kind in ("regression", "multi_task"):
        kind = config.task.kind
        problems.append(f"{key}: not with task.kind={kind}; probabilities to learn need one set of classes or tokens")
    if problem := other_tokenizer(config, tokenizers):
        problems.append(problem)
    own, theirs = labels
    if len(own) != len(theirs):
        problems.append(f"{key}: has {len(theirs)} labels and the student {len(own)}; use a teacher of the same classes")
    elif list(own) != list(theirs):
        first = next((a, b) for a, b in zip(own, theirs, strict=True) if a != b)
        problems.append(f"{key}: calls a label {first[1]!r} that is {first[0]!r} here; use task.labels=[{', '.join(theirs)}]")
    if teacher.max_seq_len is not None and teacher.max_seq_len < config.data.seq_len:
        problems.append(f"{key}: takes at most {teacher.max_seq_len} tokens; use data.seq_len={teacher.max_seq_len}")
    if config.distill.hidden:
        problems += _hidden_problems(config, student=student, teacher=teacher)
    if problems:
        raise ConfigError(problems)


def other_tokenizer(config: Config, tokenizers: tuple[str, str]) -> str | None:
    """What to say of a teacher with another tokenizer, given the digests of the student's and the teacher's; None of the same."""
    if tokenizers[0] == tokenizers[1]:
        return None
    rule = "has another tokenizer, whose ids mean other text; train with data.tokenizer of the teacher"
    return f"distill.teacher={config.distill.teacher}: {rule}"


def _hidden_problems(config: Config, *, student: ModelSpec, teacher: ModelSpec) -> Iterator[str]:
    key = f"distill.hidden={config.distill.hidden:g}"
    for who, spec in (("the student", student), ("the teacher", teacher)):
        if spec.hf_config is None:
            yield f"{key}: {who}, {spec.name}, is no model of transformers and hides its states; use distill.hidden=0"
    if config.train.compile:
        yield f"{key}: not with train.compile=true: hidden states are taken between compiled blocks; use train.compile=false"


def build_teacher(
    spec: ModelSpec, *, tensors: Iterable[tuple[str, torch.Tensor]], mesh: Mesh, device: torch.device,
    compute_dtype: torch.dtype, hidden: bool,
) -> Teacher:  # fmt: skip
    """Lay a frozen model out like the student: sharded where the student is, else whole on every rank.

    Args:
        spec: the teacher.
        tensors: its parameters and buffers by name, whole, on the CPU.
        mesh: the student's.
        device: where this rank computes.
        compute_dtype: the student's.
        hidden: whether its hidden states are wanted.
    """
    model = meta_model(showing_states(spec) if hidden else spec).requires_grad_(False)
    takes = frozenset(inspect.signature(model.forward).parameters)
    if mesh.sizes["dp_shard"] == 1:  # replicas that never change need no DDP, which has no use for frozen weights
        mesh = replace(mesh, sizes={**mesh.sizes, "dp_replicate": 1})
    # Whole logits, which compare with the student's, whose layout.loss_parallel is off beside a teacher.
    layout = Layout(compute_dtype, axes=LayoutConfig(sequence_parallel=False, loss_parallel=False))
    parallel = parallelize(model, mesh, spec=spec, tensors=tensors, device=device, layout=layout)
    model.eval()
    return Teacher(parallel, device, compute_dtype, takes)


def distilled(objective: Objective, *, teacher: Teacher, config: DistillConfig, kind: str) -> Objective:
    """The objective that also draws the student's probabilities, and its hidden states, to the teacher's.

    Args:
        objective: the task's own, with one row of logits for each label.
        teacher: answers the same inputs.
        config: temperature T, alpha, and the weight of hidden states.
        kind: `task.kind`.

    Returns:
        An objective with sum = (1 - alpha) * task + alpha * T^2 * KL(teacher, student) + hidden * distance and the
        task's count. Where gradients are off, sum is the task's alone, so that validation losses compare with those of
        other runs, and parts has `hard` (the task), `soft` (T^2 * KL) and, where matched, `hidden` besides the task's.
    """

    def both(outputs: Any, batch: Batch) -> LossTerms:
        task = objective(outputs, batch)
        answer = teacher(batch.inputs)
        labels = batch.targets["labels"]
        soft = soft_loss(
            logits_of(outputs), logits_of(answer), labels, temperature=config.temperature, few=kind in FEW_LABELS
        )
        hidden = hidden_loss(outputs, answer, batch) if config.hidden else soft.new_zeros(())
        if torch.is_grad_enabled():
            return replace(task, sum=(1.0 - config.alpha) * task.sum + config.alpha * soft + config.hidden * hidden)
        extra = {"hard": task.sum, "soft": soft} | ({"hidden": hidden} if config.hidden else {})
        return replace(task, parts={**task.parts, **extra})

    return both


def soft_loss(
    logits: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, *, temperature: float, few: bool
) -> torch.Tensor:
    """T^2 times the divergence of the student's softened probabilities from the teacher's, summed where there are labels.

    Args:
        logits: of the student, [..., V].
        target: of the teacher, [..., V]; where one of the two embeddings is padded, the ids that both have count.
        labels: [...], IGNORE where nothing counts.
        temperature: T, which softens both.
        few: most places have no label; pick out those that have.

    Returns:
        A scalar in nats, fp32 or fp64. The factor T^2 keeps its gradient as large as the task's (Hinton et al. 2015, section 2).
    """
    width = min(logits.shape[-1], target.shape[-1])
    own, other, flat = logits[..., :width].flatten(0, -2), target[..., :width].flatten(0, -2), labels.flatten()
    if few:
        places = places_of(labels)
        own, other, flat = own[places], other[places], flat[places]
    log_p = F.log_softmax(at_least_fp32(own) / temperature, dim=-1)  # [N, V]
    log_q = F.log_softmax(at_least_fp32(other) / temperature, dim=-1)
    divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)  # [N]
    return temperature**2 * torch.where(flat != IGNORE, divergence, 0.0).sum()


def hidden_loss(outputs: Any, answer: Any, batch: Batch) -> torch.Tensor:
    """The mean squared distance of matched hidden states over a row's attended places, times the row's targets, summed.

    So divided by the count of targets it is a mean over rows, for labels of tokens and of texts alike. Block i of the
    student's k is matched to block i * n / k of the teacher's n, rounded up: the last ones to each other.

    Args:
        outputs: the student's, with hidden states [B, S, D] of the teacher's width.
        answer: the teacher's.
        batch: its masks say which places are attended to, its labels how many targets a row has.
    """
    labels = batch.targets["labels"]
    targets = (labels != IGNORE).reshape(len(labels), -1).sum(1)  # [B]
    distances = []
    for name, mask_name in STATES.items():
        states, goals = getattr(outputs, name, None), getattr(answer, name, None)
        if states is None or goals is None:
            continue
        weight = _attended(batch.inputs.get(mask_name), states[1])  # [B, S]
        blocks, above = len(states) - 1, len(goals) - 1  # the first is the embeddings
        for block in range(1, blocks + 1):
            goal = goals[-(-block * above // blocks)]
            squares = (at_least_fp32(states[block]) - at_least_fp32(goal)).square().mean(-1)  # [B, S]
            distances.append((squares * weight).sum(1) / weight.sum(1))
    assert distances, "both models show their hidden states"
    return (torch.stack(distances).mean(0) * targets).sum()


def _attended(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """1 where a place counts, [B, S]; a mask [B, 1, S, S] keeps documents apart, and all of its places count."""
    if mask is None or mask.dim() != 2:
        return like.new_ones(like.shape[:2], dtype=torch.float32)
    return mask.float()


def showing_states(spec: ModelSpec, *, width: int | None = None) -> ModelSpec:
    """The same model of transformers with its hidden states among its outputs.

    Args:
        spec: the model; what it is exported as stays.
        width: project the blocks' hidden states to this width where theirs is another, by a layer at the top of the
            module that no other parameter's name depends on.
    """
    assert spec.hf_config is not None, "check_teacher refuses other modules"
    own = int(spec.hf_config.hidden_size)

    def build() -> nn.Module:
        module = spec.build()
        for part in module.modules():  # an encoder and a decoder may have configs of their own
            if hasattr(part, "config"):
                part.config.output_hidden_states = True  # type: ignore[union-attr]
        if width is not None and width != own:
            module.add_module(PROJECTION, nn.Linear(own, width))
            # In a hook, so that it is a part of the forward pass under every wrapper, and under autocast.
            module.register_forward_hook(_project_states)
        return module

    return replace(spec, build=build)


def _project_states(module: nn.Module, args: Any, outputs: Any) -> Any:
    project = module.get_submodule(PROJECTION)
    for name in STATES:
        states = getattr(outputs, name, None)
        if states is not None:
            outputs[name] = (states[0], *(project(state) for state in states[1:]))
    return outputs


def teacher_width(spec: ModelSpec) -> int:
    """The width of a transformers model's hidden states: what `showing_states` projects a student's to."""
    return int(spec.hf_config.hidden_size)


def without_projection(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """A student's tensors for export, without the layer that only training needs."""
    return ((name, tensor) for name, tensor in tensors if not name.startswith(f"{PROJECTION}."))
