"""Errors that explain themselves, with which a command or a job ends without a traceback; and the
exit statuses of processes."""

from __future__ import annotations

import os

STOPPED_STATUS = os.EX_TEMPFAIL
"""Rows are left: the same command is to be run again (sysexits.h: 75)."""
INTERRUPTED_STATUS = 130
"""Ended by Ctrl-C, as shells have it."""


class ExplainedError(Exception):
    """The text says what is wrong and, where somebody can do something about it, what."""

    exit_code = os.EX_SOFTWARE
    """Status with which the process leaves."""


class UserError(ExplainedError, ValueError):
    """What a user can cause and mend: options, files, the way the job was started."""

    exit_code = 2


class OptionError(UserError):
    """Options that cannot work, or not together."""


class FaultError(ExplainedError, RuntimeError):
    """What breaks a job that was started well."""


class ForeignError(ExplainedError):
    """Code that came with a model or a library failed on a row: a tokenizer, its decoder, a chat
    template."""


class foreign_code:  # noqa: N801 (a context manager, as those of contextlib)
    """Whatever foreign code raises in this block becomes a ForeignError: also a panic of Rust,
    which is no `Exception`. What explains itself, and what ends the process, passes."""

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise what was raised as a ForeignError."""
        passing = (ExplainedError, KeyboardInterrupt, SystemExit, GeneratorExit)
        if error is not None and not isinstance(error, passing):
            raise ForeignError(f"{type(error).__name__}: {error}") from error
