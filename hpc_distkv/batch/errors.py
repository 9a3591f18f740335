"""What can go wrong with a row, with the input file, and with the results file."""

from __future__ import annotations

from hpc_distkv.errors import UserError

LONGEST_MESSAGE = 600
"""Characters. Messages quote the user's input, which may be megabytes."""
DUPLICATE = "duplicate_custom_id"
"""Error code of a row whose custom_id an earlier row has."""


class RowError(Exception):
    """One row that cannot be answered; becomes an error row of the results, the job goes on.

    `status` is an HTTP status, the other fields are those of an OpenAI error object.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid_value",
        param: str | None = None,
        status: int = 400,
        type: str = "invalid_request_error",
    ) -> None:
        if len(message) > LONGEST_MESSAGE:
            message = message[:LONGEST_MESSAGE] + " …"
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param if param is None else param[:LONGEST_MESSAGE]
        self.status = status
        self.type = type


class InputError(UserError):
    """The input file cannot be read (any further). Nothing that was answered is lost."""


class JournalError(UserError):
    """The results file cannot be opened, resumed or written."""
