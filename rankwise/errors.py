"""The errors of Rankwise and the exit code of each.

Every message says what is wrong, where, and what to do. `cli.main` prints the message without a traceback
and exits with `exit_code`; as a library, catch `RankwiseError`.

    RankwiseError ── UsageError 2 · DataError 3 · DivergedError 4 · ServiceError 5 · VerificationError 6
                  ├─ UndecidedError 7
                  └─ Interrupted 130 (SIGINT) / 143 (SIGTERM)
"""

from __future__ import annotations

import importlib
from types import ModuleType


class RankwiseError(Exception):
    """Base of all errors that a user can cause or must know of."""

    exit_code = 1


class UsageError(RankwiseError, ValueError):
    """Wrong flag, config value or combination of them."""

    exit_code = 2


class DataError(RankwiseError, ValueError):
    """A file, checkpoint, adapter or sample is missing, broken or does not fit."""

    exit_code = 3


class DivergedError(RankwiseError):
    """Training produced a loss or gradient that is not finite."""

    exit_code = 4


class ServiceError(RankwiseError):
    """A service outside this machine failed."""

    exit_code = 5


class VerificationError(RankwiseError):
    """A result does not agree with what it was made from."""

    exit_code = 6


class UndecidedError(RankwiseError):
    """A check could neither prove nor refute: its data do not tell."""

    exit_code = 7


class Interrupted(RankwiseError):
    """Stopped by a signal after a safe checkpoint. `exit_code` is 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def need(module: str, extra: str, package: str = "") -> ModuleType:
    """Import an optional module, or say which extra of the package, or which other package, brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        brings = package or f"'rankwise[{extra}]'"
        raise UsageError(
            f"{module.split('.')[0]} is not installed ({error}); it comes with: pip install {brings}"
        ) from error
