"""Options of sbatch: those that a script has under their own names, and lines with any other; and
its time limits."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable

from hpc_distkv.errors import UserError

PASSED_ON: dict[str, str | None] = {
    "partition": "-p",
    "account": "-A",
    "qos": "-q",
    "constraint": "-C",
    "dependency": "-d",
    "exclusive": None,
    "mem": None,
    "mem-per-cpu": None,
    "mem-per-gpu": None,
    "gres": None,
    "nodelist": "-w",
    "exclude": "-x",
    "reservation": None,
    "licenses": "-L",
    "begin": "-b",
    "nice": None,
    "comment": None,
    "chdir": "-D",
    "mail-type": None,
    "mail-user": None,
}
"""Name → short form of what the script hands on to Slurm as it is."""
WITHOUT_VALUE = ("exclusive",)
SHORT = {
    **{short: name for name, short in PASSED_ON.items() if short},
    "-J": "job-name",
    "-t": "time",
    "-N": "nodes",
    "-c": "cpus-per-task",
    "-o": "output",
    "-e": "error",
    "-n": "ntasks",
    "-G": "gpus",
    "-a": "array",
}
_RANKS = "Ranks are --nodes times --gpus-per-node, without GPUs times --ntasks-per-node."
INSTEAD = {
    "ntasks": _RANKS,
    "gpus": _RANKS,
    "array": "An array of shards is --kind array, with --shards.",
    "error": "The log has standard error too; for a file of its own: --sbatch-line '--error=FILE'.",
}
"""What to give in the place of options of sbatch that a script here does not have."""
MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")
"""Each says what memory the job gets; Slurm takes one of them."""
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, halves of pairs, separators of lines and paragraphs."""
_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?"
    r"|(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)|(?P<only>\d+)|(?i:unlimited|infinite))",
    re.ASCII,
)
"""Time limits of sbatch: minutes, [hours:]minutes:seconds, days-hours[:minutes[:seconds]]."""


class ScriptError(UserError):
    """A job script would not say what its writer means; the text says what to change."""


def check_one_line(value: str) -> None:
    """Raise ScriptError for text that would not stay on its line of a script."""
    if any(unicodedata.category(each) in _UNPRINTABLE for each in value):
        raise ScriptError(
            f"{value!r} has a line break, a control character or bytes that are no UTF-8, which a "
            "job script cannot hold: leave it out, or rename the file."
        )


def check_command(line: str) -> None:
    """Raise ScriptError for an option of sbatch where Slurm would not read it."""
    if line.lstrip().upper().startswith("#SBATCH"):
        raise ScriptError(
            f"--line {line!r} would stand behind commands, where Slurm reads no options: give it "
            "as --sbatch-line."
        )


def directive(name: str, value: str) -> str:
    """What stands behind #SBATCH; quotes are read there as by a shell."""
    return f"--{name}={shlex.quote(value)}" if value else f"--{name}"


def further(text: str, written: Iterable[str]) -> str:
    """What stands behind #SBATCH for a line that a user gives, with or without that word.

    `written`: names of the options that the script has already, of which there must not be two.
    Raises ScriptError.
    """
    line = text.strip()
    while line.upper().startswith("#SBATCH"):
        line = line[len("#SBATCH") :].strip()
    if not line.startswith("-") or not line.strip("-"):
        raise ScriptError(f"--sbatch-line {text!r} is no option of sbatch: write '--name=value'.")
    try:
        names = [name for name, _ in options_in(line)]
    except ValueError as error:
        raise ScriptError(f"--sbatch-line {text!r} cannot be read: {error}.") from None
    for name in names:
        if name in written:
            raise ScriptError(
                f"--sbatch-line {text!r}: the script has --{name} already; give --{name}"
            )
    return line


def options_in(line: str) -> list[tuple[str, str]]:
    """Long names and values of the options on a line; "" is no value. Raises ValueError where a
    quote is not closed."""
    found: list[tuple[str, str]] = []
    for word in shlex.split(line):
        if word.startswith("#"):  # Slurm reads no further
            break
        if word.startswith("-"):
            value = word.partition("=")[2] if word.startswith("--") else word[2:]
            found.append((option_name(word), value.removeprefix("=")))
        elif found and not found[-1][1]:
            found[-1] = (found[-1][0], word)
    return found


def option_name(word: str) -> str:
    """The long name of an option, whatever value is joined to it."""
    return word[2:].partition("=")[0] if word.startswith("--") else SHORT.get(word[:2], word)


def instead(option: str) -> str:
    """What to do about an option that neither `generate` nor a script has."""
    value = "=..." if option.startswith("--") else " ..."
    return INSTEAD.get(
        option_name(option), f"If it is one of Slurm's: --sbatch-line '{option}{value}'."
    )


def seconds(limit: str) -> int | None:
    """Of a time limit of sbatch, 0 for none; None: it is no time."""
    if not (match := _TIME.fullmatch(limit)):
        return None
    part = {name: int(text or 0) for name, text in match.groupdict().items()}
    hours = 24 * part["days"] + part["h"] + part["hours"]
    return (
        3600 * hours
        + 60 * (part["m"] + part["minutes"] + part["only"])
        + (part["s"] + part["seconds"])
    )
