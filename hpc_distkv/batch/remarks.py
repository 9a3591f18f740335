"""What there is to say of an input beside its rows."""

from __future__ import annotations

from collections.abc import Iterator

from hpc_distkv.batch.intake import Intake

_MOST_NAMED = 3


def remarks(intake: Intake) -> Iterator[str]:
    """Why the results are not what a reader of the input may think, when a run is over."""
    if edited := intake.changed:
        named = ", ".join(map(repr, edited[:_MOST_NAMED]))
        more = ", …" if len(edited) > _MOST_NAMED else ""
        yield (
            f"{len(edited)} rows of {intake.path} were edited since they were answered, and keep "
            f"their old lines ({named}{more}): --retry-changed answers them again"
        )
    if intake.torn:
        yield (
            f"{intake.path} ends within a line: is it still being copied? That line is not "
            "answered; run the same command again when it is whole"
        )
    if intake.outdated:
        yield (
            f"{intake.path} was changed while it was read: run the same command again to answer "
            "what is new in it"
        )
