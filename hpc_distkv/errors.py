"""What ends a command or a job with a sentence that says everything, and without a traceback."""

from __future__ import annotations

import os


class ExplainedError(Exception):
    """The text says what is wrong and, where somebody can do something about it, what."""

    exit_code = os.EX_SOFTWARE
    """Status with which the process leaves."""


class UserError(ExplainedError, ValueError):
    """What a user can cause and mend: options, files, the way the job was started."""

    exit_code = 2


class FaultError(ExplainedError, RuntimeError):
    """What breaks a job that was started well."""
