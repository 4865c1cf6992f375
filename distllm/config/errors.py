"""The errors that a user can cause, each with the exit code that `distllm` ends with.

All are `ValueError`s: what the user did. What we did wrong is an `assert` or any other exception, and exits with 1.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_BUG = 1  # an unexpected exception: our fault, please report it
EXIT_CONFIG = 2  # a wrong command line or config
EXIT_DATA = 3  # an input (text, tokens, tokenizer, model folder) that cannot be used
EXIT_CHECKPOINT = 4  # no usable checkpoint, or one that does not fit the run
EXIT_DIVERGED = 5  # too many steps in a row with a loss or gradient that is not finite
EXIT_STORAGE = 6  # disk full, folder read-only, file cannot be written
EXIT_LOST = 7  # another rank died or hangs, or the ranks do not find one another
EXIT_MEMORY = 8  # the device or the machine is out of memory
EXIT_UNEQUAL = 9  # verify: a layout computes something else than one process, or a guard or planted fault fails
EXIT_STUCK = 10  # several attempts in a row saved nothing further, so the job does not requeue itself again
EXIT_SLOWER = 11  # bench --compare: a cell is slower, or takes more memory, beyond the noise
EXIT_STOPPED = 75  # stopped by a signal after saving: the same command continues (EX_TEMPFAIL)
EXIT_INTERRUPTED = 130  # ended at once on request: 128 + SIGINT, as a shell tells it


class DistllmError(ValueError):
    """A mistake of the user's or of the machine, told in one clear line."""

    exit_code = EXIT_CONFIG


class ConfigError(DistllmError):
    """Problems of a config, all at once, a line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        # Ranks tell each other their errors by pickle, which would call __init__ with the joined text.
        return type(self), (self.problems,)


class DataError(DistllmError):
    """An input that cannot be used: names the file, and the line where there is one."""

    exit_code = EXIT_DATA


class CheckpointError(DistllmError):
    """A checkpoint that is missing, torn, tampered with, or of another run: names the file."""

    exit_code = EXIT_CHECKPOINT


class DivergedError(DistllmError):
    """The run stopped itself because the loss or the gradients stayed not finite."""

    exit_code = EXIT_DIVERGED


class LostError(DistllmError):
    """Another rank died or stalled: names it; without a text where another rank tells it."""

    exit_code = EXIT_LOST


class StorageError(DistllmError):
    """The disk is full or a folder cannot be written."""

    exit_code = EXIT_STORAGE
