"""Write the README's table of families and methods from the graphs.

python scripts/families_table.py
"""

from __future__ import annotations

from pathlib import Path

from marked import replaced

from smoothq.advisor.families import markdown

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def written(text: str) -> str:
    """The README's text with the table of today between its two marks."""
    return replaced(text, BEGIN, END, markdown())


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
