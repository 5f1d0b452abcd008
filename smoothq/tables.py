"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def columns(title: str | None, header: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """A table with a header, whose first column is never broken."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    return table
