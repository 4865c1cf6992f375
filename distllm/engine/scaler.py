"""The dynamic loss scale of fp16: gradients are computed of loss x scale, so that small ones do not vanish."""

from __future__ import annotations

from distllm.config.schema import PrecisionConfig


class LossScale:
    """Halves when a step overflows, doubles after a window of finite steps (Micikevicius et al. 2017, arXiv 1710.03740)."""

    def __init__(self, precision: PrecisionConfig) -> None:
        self.value = precision.initial_loss_scale
        self.window = precision.loss_scale_window
        self.good_steps = 0
        self.floor = 2.0**-24

    def update(self, finite: bool) -> bool:
        """Learn of one step; returns whether an overflow can be blamed on the scale, which has now shrunk."""
        if finite:
            self.good_steps += 1
            if self.good_steps == self.window:
                self.value, self.good_steps = self.value * 2.0, 0
            return False
        self.good_steps = 0
        blame = self.value > 1.0
        self.value = max(self.value / 2.0, self.floor)
        return blame

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value, "good_steps": self.good_steps}

    def restore(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
