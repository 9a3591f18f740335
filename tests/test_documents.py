"""README and docs/ name only what exists: pages, headings, files, functions, options."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import click
import pytest

from hpc_distkv.cli.group import group

REPOSITORY = Path(__file__).parent.parent
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])
PLACES = [REPOSITORY / place for place in (".", "hpc_distkv", "jobs", "jobs/traces", "tests")]
MOST_BYTES = 10_000
"""Of the README: it is also the package's description."""
MOST_FILES = 25
"""From a row's line in the batch file to its answer."""
FOREIGN = {"--array", "--bind-to", "--gpu-bind", "--help"}
"""Options of sbatch, srun, mpirun and click that pages name."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_readme_is_short() -> None:
    assert (REPOSITORY / "README.md").stat().st_size <= MOST_BYTES


def test_the_readme_leads_to_every_page() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        there = page.parent / path if path else page
        assert there.is_file(), target
        assert not heading or heading in headings(there), target


@each_page
def test_named_files_and_functions_exist(page: Path) -> None:
    named = re.findall(r"`([\w./-]+\.(?:py|c|j2|toml|sbatch|sh)\b)(?::([\w.]+))?", page.read_text())
    for path, name in named:
        files = [place / path for place in PLACES if (place / path).is_file()]
        assert files, path
        assert not name or name in names_of(files[0]), f"{path}:{name}"


def test_the_life_of_a_row_names_few_files() -> None:
    steps = re.findall(r"^\| [1-8] \|.*$", (REPOSITORY / "docs" / "design.md").read_text(), re.M)
    files = {path for step in steps for path in re.findall(r"`([\w/]+\.py)", step)}
    assert len(steps) == 8
    assert len(files) <= MOST_FILES


@each_page
def test_options_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text()))
    assert named - options() - FOREIGN == set()


@cache
def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@cache
def names_of(path: Path) -> set[str]:
    """What a file defines at its top level, and in its classes as Class.name."""
    names: set[str] = set()

    def add(body: list[ast.stmt], before: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(before + node.name)
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{before}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(before + t.id for t in targets if isinstance(t, ast.Name))

    add(ast.parse(path.read_text()).body, "")
    return names


@cache
def options() -> set[str]:
    """Of all commands."""

    def of(command: click.Command) -> set[str]:
        own = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        if isinstance(command, click.Group):
            context = click.Context(command)
            below = [command.get_command(context, name) for name in command.list_commands(context)]
            own = own.union(*(of(each) for each in below if each is not None))
        return own

    return of(group)
