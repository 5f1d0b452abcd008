"""Rows of text as tables: for the terminal, and in Markdown."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def columns(title: str | None, header: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """A table with a header, whose first column is never broken."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    return table


def pairs(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """A table of labels and values."""
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(header: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """The same in Markdown, without a title."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_text(table: Table) -> str:
    """A table as lines of text, as wide as it needs to be."""
    file = io.StringIO()
    Console(file=file, highlight=False, width=200).print(table)
    return file.getvalue().rstrip("\n")
