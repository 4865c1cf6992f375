"""What holds for all tests: signals begin as in a terminal, whatever started the tests.

A shell without job control starts `pytest &` with SIGINT ignored, and nohup ignores SIGHUP; both are inherited by every
program that a test starts.
"""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)
