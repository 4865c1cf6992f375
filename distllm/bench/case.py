"""What the ranks of a cell train: its model, and where its batches come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distllm.bench.synthetic import RandomTokens, vocabulary_of
from distllm.config.check import Resolved
from distllm.config.schema import Config
from distllm.data.samples import Samples
from distllm.models.build import resolve_spec
from distllm.models.spec import ModelSpec
from distllm.train.tasks import outputs_of
from distllm.train.tune import tuned_spec
from distllm.verify.data import Data, open_data, samples_of


@dataclass(frozen=True)
class Case:
    """What every rank of a cell trains."""

    config: Config
    plain: ModelSpec
    spec: ModelSpec
    """The model that trains; with adapters where they do."""
    samples: Callable[[Resolved], Samples]
    """The samples as a layout deals them."""


class Cases:
    """Makes the cases of many cells; data that several share are opened once."""

    def __init__(self, folder: Path, *, synthetic: bool) -> None:
        """Args:
        folder: where tokens are kept that had to be made.
        synthetic: random tokens in place of the config's data.
        """
        self._folder, self._synthetic = folder, synthetic
        self._opened: dict[str, Data] = {}

    def case(self, config: Config) -> Case:
        """Describe what a config trains.

        Raises:
            ConfigError: sizes that cannot be.
            DataError: data that cannot be used.
        """
        if self._synthetic:
            vocab = vocabulary_of(config)
            plain = resolve_spec(config, vocab_size=vocab)
            vocab = min(vocab, plain.vocab_size or vocab)
            return Case(
                config, plain, tuned_spec(plain, config.tune),
                lambda resolved: RandomTokens(config, resolved=resolved, vocab_size=vocab),
            )  # fmt: skip
        data = self._data(config)
        labels = data.prepared.labels
        plain = resolve_spec(
            config, vocab_size=data.prepared.vocab_size, labels=outputs_of(labels), roles=data.roles,
            label_names=labels.get("", ()),
        )  # fmt: skip
        spec = tuned_spec(plain, config.tune)

        def samples(resolved: Resolved) -> Samples:
            return samples_of(data, config, resolved=resolved, spec=spec)

        return Case(config, plain, spec, samples)

    def _data(self, config: Config) -> Data:
        key = config.data.model_dump_json() + config.task.model_dump_json() + str(config.seed)
        if key not in self._opened:
            self._opened[key] = open_data(config, self._folder / f"data-{len(self._opened)}")
        return self._opened[key]
