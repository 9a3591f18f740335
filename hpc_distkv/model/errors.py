"""The error of this package."""

from __future__ import annotations

from hpc_distkv.errors import UserError


class ModelError(UserError):
    """A model directory, or a request to its tokenizer or chat template, that cannot be used.

    The message names the file or key, and says what to do about it.
    """


class TooLongError(ModelError):
    """A text has more tokens than will do."""
