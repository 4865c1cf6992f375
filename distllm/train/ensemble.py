"""One model or several that answer together: their probabilities are averaged.

Shapes: B batch, S sequence, C classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from distllm.config.errors import ConfigError, DataError
from distllm.config.schema import Config
from distllm.data.batch import Batch
from distllm.data.clean import told
from distllm.data.rows import prefix_of
from distllm.train.inference import Choice, Source, open_source
from distllm.train.objectives.tokens import logits_of


@dataclass(frozen=True)
class Ensemble:
    """Sources of one task, one tokenizer and the same labels."""

    members: tuple[Source, ...]
    weights: tuple[float, ...]
    """Of the members in every average; they add up to 1."""

    @property
    def first(self) -> Source:
        """The source whose config and tokenizer stand for all.

        It asks for token types where any member takes them, and for no more tokens at once than all take.
        """
        config, limit = self.members[0].config, self.max_len
        if limit is not None and limit < config.data.seq_len:
            config = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": limit})})
        return replace(self.members[0], config=config, token_types=any(member.token_types for member in self.members))

    @property
    def name(self) -> str:
        """What to call it."""
        if len(self.members) == 1:
            return self.first.name
        return " + ".join(f"{w:.3g} * ({m.name})" for w, m in zip(self.weights, self.members, strict=True))

    @property
    def models(self) -> list[torch.nn.Module]:
        """The members' models."""
        return [member.model for member in self.members]

    @property
    def max_len(self) -> int | None:
        """The most tokens that all members take at once."""
        return min((m.max_len for m in self.members if m.max_len is not None), default=None)

    @torch.no_grad()
    def outputs(self, batch: Batch) -> Any:
        """What the models answer to a batch: an object whose `.logits` objectives take.

        Of several models the logits are the logarithm of the mean probability, for regression the mean number; for a
        multi_task model this holds for each of its heads.
        """
        answers = [logits_of(m.model(**_taken(m, batch.to(m.device).inputs))) for m in self.members]
        if len(answers) == 1:
            return SimpleNamespace(logits=answers[0])
        config = self.first.config
        if config.task.kind != "multi_task":
            return SimpleNamespace(logits=self._mean(answers, number=config.task.kind == "regression"))
        heads = config.task.tasks
        mean = {n: self._mean([a[n] for a in answers], number=heads[n].kind == "regression") for n in answers[0]}
        return SimpleNamespace(logits=mean)

    def _mean(self, answers: Sequence[torch.Tensor], *, number: bool) -> torch.Tensor:
        return mean_answer([a.to(self.first.device) for a in answers], self.weights, number=number)


def _taken(member: Source, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs that a member takes: not all tell the two texts of a pair apart by token types."""
    return {name: value for name, value in inputs.items() if name != "token_type_ids" or member.token_types}


def mean_answer(logits: Sequence[torch.Tensor], weights: Sequence[float], *, number: bool) -> torch.Tensor:
    """The weighted mean of several models' answers.

    Args:
        logits: of each model [..., C]; the last dimension may differ, as an embedding may have rows beyond the
            tokenizer's ids, and then the smallest counts.
        weights: of the models; they add up to 1.
        number: the answers are numbers, not logits.

    Returns:
        The mean numbers, or the logarithm of the mean probabilities, [..., C].
    """
    if number:
        return torch.stack([w * answer.float() for w, answer in zip(weights, logits, strict=True)]).sum(dim=0)
    size = min(answer.shape[-1] for answer in logits)
    shares = [torch.tensor(w, device=logits[0].device).log() for w in weights]
    logs = [a.float().log_softmax(dim=-1)[..., :size] + s for a, s in zip(logits, shares, strict=True)]
    return torch.stack(logs).logsumexp(dim=0)


def open_ensemble(
    sources: Sequence[str],
    *,
    weights: Sequence[float] = (),
    choice: Choice | None = None,
    device: str = "auto",
    trust: bool = False,
) -> Ensemble:
    """Load one source, or several that answer together.

    Args:
        sources: as in `open_source`; the first one's config and data stand for all.
        weights: of the sources in the average, in their order, above 0; empty: all the same.
        choice: which weights of the first source, and of the others that are runs.
        device: as in `open_source`.
        trust: as in `open_source`.

    Raises:
        ConfigError: weights that do not fit, or models of different tasks.
        DataError: models of different tokenizers or labels, or whose texts are known to have been read otherwise.
    """
    if weights and len(weights) != len(sources):
        rule = f"{len(weights)} weights for {len(sources)} models; give one for each, the first one's first"
        raise ConfigError([f"--weight: {rule}"])
    if any(not weight > 0.0 for weight in weights):
        raise ConfigError([f"--weight={min(weights)}: must be above 0; nearest: leave the model out"])
    members = tuple(open_source(s, choice=choice, device=device, trust=trust) for s in sources)
    for other in members[1:]:
        _refuse_other(members[0], other)
    _refuse_other_texts(members)
    given = list(weights) or [1.0] * len(members)
    return Ensemble(members, tuple(weight / sum(given) for weight in given))


def _refuse_other(first: Source, other: Source) -> None:
    """Refuse a model whose probabilities cannot be averaged with the first one's."""
    if _outputs(first.config) != _outputs(other.config):
        raise ConfigError([f"--ensemble={other.name}: was trained for {other.kind}, and {first.name} for {first.kind}"])
    if _ids(first.tokenizer) != _ids(other.tokenizer):
        raise DataError(f"--ensemble={other.name}: has another tokenizer than {first.name}, so its ids mean other text")
    mine, theirs = dict(first.labels), dict(other.labels)
    if {n: tuple(v) for n, v in mine.items()} != {n: tuple(v) for n, v in theirs.items()}:
        raise DataError(f"--ensemble={other.name}: has the labels {_told(theirs)}, and {first.name} {_told(mine)}")


def _refuse_other_texts(members: Sequence[Source]) -> None:
    """Refuse members known to have learned from texts that were read otherwise: all are given the same text."""
    known = [member for member in members if member.texts_known]
    for other in known[1:]:
        mine, theirs = _texts(known[0].config), _texts(other.config)
        for setting, value in theirs.items():
            if value != mine[setting]:
                rule = f"its training had {setting}: {value}, and that of {known[0].name} {mine[setting]}"
                raise DataError(f"--ensemble={other.name}: {rule}; the members are given the same text")


def _texts(config: Config) -> dict[str, str]:
    """How a config reads its texts, by the settings."""
    heads = {name: prefix_of([s for s in config.data.sources if (s.task or "") == name]) for name in config.task.tasks or [""]}
    prefixes = {name: [repr(prefix)] for name, prefix in heads.items() if prefix}
    return {"data.clean": told(config.data.clean), "data.sources.N.prefix": _told(prefixes)}


def _outputs(config: Config) -> Any:
    """What a model's outputs mean: equal for tasks whose answers can be averaged."""
    kind = {"sft": "causal_lm", "translation_lm": "masked_lm"}.get(config.task.kind, config.task.kind)
    return kind, {name: head.kind for name, head in config.task.tasks.items()}


def _ids(tokenizer: Any) -> tuple[str, Mapping[str, Any]]:
    """What decides the ids of a text."""
    inner = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    inner.no_truncation()
    inner.no_padding()
    roles = ("eos", "pad", "bos", "cls", "sep", "mask")
    return inner.to_str(), {role: getattr(tokenizer, f"{role}_token_id") for role in roles}


def _told(labels: Mapping[str, Sequence[str]]) -> str:
    return "; ".join((f"{name}: " if name else "") + ", ".join(names) for name, names in labels.items()) or "none"
