"""Requests that come before the loop listens."""

from __future__ import annotations

import os
import signal

import pytest

from distllm.comm import Place
from distllm.launched import requests_held
from distllm.train.signals import StopRequest, hold_sigterm


def test_a_request_before_the_loop_is_obeyed_in_it() -> None:
    with requests_held():
        signal.raise_signal(signal.SIGUSR1)
        with StopRequest() as request:
            assert request.received == "SIGUSR1"
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_launcher_that_ignores_it_does_not_make_the_rank_miss_it() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with requests_held():
            signal.raise_signal(signal.SIGUSR1)
            with StopRequest() as request:
                assert request.received == "SIGUSR1"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_one_that_no_loop_took_is_dropped() -> None:
    with requests_held():
        signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL and signal.SIGUSR1 not in signal.sigpending()


@pytest.mark.parametrize(("telling", "end"), [(True, 0), (False, signal.SIGTERM)])
def test_a_rank_that_is_telling_how_another_ended_is_not_ended_before_it_has(telling: bool, end: int) -> None:
    place = Place()
    place.telling = telling
    child = os.fork()
    if child == 0:
        hold_sigterm(place)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == end
