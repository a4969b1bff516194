"""Every error that this package raises on purpose, and the exit code the command line gives it.

A message says what was expected, what came, and what to do next. Wrong arguments of Python functions
are plain ``ValueError``; the classes here are for the world outside: files, weights, devices, users.
"""

from __future__ import annotations

from collections.abc import Sequence


class VlmError(Exception):
    """Base of all errors raised on purpose; exit code 1 if nothing more specific applies."""

    exit_code = 1


class UsageError(VlmError):
    """A wrong flag or ``--set`` key on the command line."""

    exit_code = 2


class RejectedItems(VlmError):
    """The work finished, but some items were rejected; the report names each with its reason."""

    exit_code = 3


class InvalidInput(VlmError):
    """What the user gave cannot be used: a bad file, folder, model, protocol or number."""

    exit_code = 4


class ConfigError(InvalidInput):
    """A configuration file has an unknown key, a wrong type or an impossible value."""


class DataError(InvalidInput):
    """A video, image, shard or annotation file cannot be read; ``reason`` is a short countable label."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


class CheckpointError(InvalidInput):
    """A weights file is not what it claims to be: keys, shapes, sizes or format do not fit.

    Attributes:
        missing: Names that the model needs and the file lacks, where that is what is wrong.
        unexpected: Names in the file that no model knows.
        misshaped: Names with both shapes, as text.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshaped: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshaped = tuple(misshaped)


class CapabilityError(InvalidInput):
    """The model at hand lacks the ability that was asked for; the message names model kind and ability."""


class KernelError(InvalidInput):
    """A forced scan backend cannot serve the problem at hand, or a kernel cannot be compiled or launched."""


class MissingExtra(InvalidInput):
    """An optional dependency is not installed; the message carries the ``pip install`` line."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed: pip install 'videomamba-vlm[{extra}]'"
        )


class IntegrityError(VlmError):
    """One of our own files does not match its checksum, or a verification found damage."""

    exit_code = 5


class StoreError(IntegrityError):
    """A published store cannot be read: it is damaged, gone, or out of reach for now."""


class NoSpaceError(VlmError):
    """The disk or quota is full; what was there before is still usable."""

    exit_code = 6


class BusyError(VlmError):
    """Somebody else holds the lock, or the service is overloaded; try again later."""

    exit_code = 75


class Interrupted(KeyboardInterrupt):
    """Stopped by a signal with the state saved; ``exit_code`` is 128 plus the signal's number.

    Like Ctrl-C it is not an ``Exception``: code that skips broken items must never swallow it.
    """

    def __init__(self, message: str, signal_number: int = 2) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
