"""Reports of instances that do not exist, as the gManager reads them."""

from __future__ import annotations

from hpc_distkv.control.messages.reports import Report, Reports, encode_report


def report(number: int = 0, **fields: object) -> Report:
    """An idle instance with 10 free rBlocks and room for a row, but for `fields`."""
    idle = {"capacity": 10, "free": 10, "promised": 0, "room_requests": 1, "room_tokens": 100}
    return Report(round=number, **idle | fields)


def read(*given: Report) -> Reports:
    """What arrives of them."""
    return Reports.decode([encode_report(each) for each in given])
