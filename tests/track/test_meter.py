import mmap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from distllm.track.meter import Meter, peak_memory


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_step(meter: Meter, clock: Clock, *, wait: float, work: float, tokens: int) -> None:
    with meter.waiting():
        clock.now += wait
    clock.now += work
    meter.step(tokens)


def test_the_window_holds_whole_steps_without_what_was_paused() -> None:
    clock = Clock()
    meter = Meter(flops_per_token=6e9, peak=1e12, devices=4, clock=clock)
    clock.now += 50.0  # building the model is no training
    for _ in range(4):
        run_step(meter, clock, wait=0.1, work=0.9, tokens=1000)
    with meter.pause():
        clock.now += 30.0
    values = meter.read()
    assert values.pop("peak_memory_bytes") > 0
    assert values == pytest.approx(
        {"tokens_per_s": 1000.0, "step_time_s": 1.0, "data_wait_s": 0.1, "data_wait_share": 0.1, "mfu": 6e12 / 4e12}
    )


def test_a_reading_begins_a_new_window() -> None:
    clock = Clock()
    meter = Meter(flops_per_token=None, peak=1e12, devices=1, clock=clock)
    run_step(meter, clock, wait=0.5, work=0.5, tokens=10)
    meter.read()
    run_step(meter, clock, wait=0.0, work=2.0, tokens=10)
    values = meter.read()
    assert values["tokens_per_s"] == pytest.approx(5.0) and values["data_wait_s"] == 0.0
    assert values["mfu"] is None
    assert list(meter.read()) == ["peak_memory_bytes"]


def test_a_pause_ends_even_when_what_it_held_failed() -> None:
    clock = Clock()
    meter = Meter(flops_per_token=1.0, peak=None, devices=1, clock=clock)
    run_step(meter, clock, wait=0.0, work=1.0, tokens=1)
    with pytest.raises(RuntimeError), meter.pause():
        clock.now += 5.0
        raise RuntimeError
    values = meter.read()
    assert values["step_time_s"] == pytest.approx(1.0) and values["mfu"] is None


def test_the_peak_memory_of_a_cpu_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    size = 256 * 2**20 + max(0, before - _resident())
    with mmap.mmap(-1, size) as block:  # not from the heap, where there may be room that counts already
        block.write(b"x" * size)
        after = peak_memory(None)
    assert after >= before + 64 * 2**20
    assert peak_memory(None) >= after - 2**20  # Linux counts pages in batches, a few for each thread


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_no_reading_touches_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def forbidden():  # type: ignore[no-untyped-def]
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: pytest.fail("a host sync"))
        monkeypatch.setattr(torch.Tensor, "item", lambda *a: pytest.fail("a host sync"))
        yield

    with forbidden():
        clock = Clock()
        meter = Meter(flops_per_token=1.0, peak=1.0, devices=1, clock=clock)
        run_step(meter, clock, wait=0.1, work=0.9, tokens=1)
        with meter.pause():
            clock.now += 1.0
        assert meter.read()["step_time_s"] == pytest.approx(1.0)
