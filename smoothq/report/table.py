"""Rows of text as tables: for the terminal, and in Markdown."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def columns(title: str | None, header: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """A table with a header; lines are not broken in the first column. title: None for no title."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def pairs(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """A table without a header; rows: (label, value)."""
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(header: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table with a header and no title."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_text(table: Table) -> str:
    """A table as lines of text, as wide as it needs to be."""
    file = io.StringIO()
    Console(file=file, highlight=False, width=200).print(table)
    return file.getvalue().rstrip("\n")
