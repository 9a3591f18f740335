"""Values of options."""

from __future__ import annotations

import click
import pytest

from hpc_distkv.cli.options import Size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("512 MB", 512_000_000),
        ("1e9", 10**9),
        ("1.5kib", 1536),
        ("2t", 2 * 10**12),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "0", "4XB", "1e999", "nan", "4 G iB"])
def test_other_texts_are_refused_with_an_example(text):
    with pytest.raises(click.BadParameter, match="for example 4GiB"):
        Size().convert(text, None, None)
