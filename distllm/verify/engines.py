"""The axis of engines: torch's own, and DeepSpeed at each stage of its ZeRO."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distllm.config.errors import ConfigError
from distllm.config.kinds import shown
from distllm.config.schema import EngineConfig

NAMES = ("native", "deepspeed")
STAGES = (1, 2, 3)


@dataclass(frozen=True)
class EngineChoice:
    """What takes the steps of a row."""

    name: str = "native"
    zero_stage: int | None = None
    """Of DeepSpeed's ZeRO."""

    @property
    def label(self) -> str:
        """Such as `deepspeed ZeRO 2`."""
        return self.name if self.zero_stage is None else f"{self.name} ZeRO {self.zero_stage}"

    def config(self, own: EngineConfig) -> EngineConfig:
        """The config's `engine` section, with what the user's own says of offloading where this engine has it.

        What would lie in files stays in memory: it is computed alike, what moves it takes minutes to compile, and of a small
        model DeepSpeed itself would keep most there, all that is under a megabyte.
        """
        if self.zero_stage is None:
            return EngineConfig()
        optimizer = "cpu" if own.offload_optimizer == "nvme" else own.offload_optimizer
        parameters = "none" if self.zero_stage != 3 else "cpu" if own.offload_parameters == "nvme" else own.offload_parameters
        return EngineConfig(
            name="deepspeed", zero_stage=self.zero_stage, offload_optimizer=optimizer, offload_parameters=parameters
        )

    def precision(self, asked: str) -> str:
        """What is computed in where `asked` was asked for: DeepSpeed keeps its weights in fp32, and has no fp64."""
        return "fp32" if self.zero_stage is not None and asked == "fp64" else asked


NATIVE = EngineChoice()


def parse_engines(text: str) -> list[str]:
    """The names of `--engines native,deepspeed`.

    Raises:
        ConfigError: an unknown one, or none.
    """
    names = [item.strip() for item in text.split(",") if item.strip()]
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.2) or ["native"]
            raise ConfigError([f"--engines={shown(name)}: must be of {', '.join(NAMES)}, with commas; nearest: {near[0]}"])
    if not names:
        raise ConfigError([f"--engines={shown(text)}: names no engine; nearest: native,deepspeed"])
    return list(dict.fromkeys(names))


def engines_of(names: Sequence[str]) -> Iterator[EngineChoice]:
    """The engines of some names: DeepSpeed once for each stage."""
    for name in names:
        yield from (EngineChoice(name, stage) for stage in STAGES) if name == "deepspeed" else (NATIVE,)
