"""Write docs/models.md's table of families and methods from the graphs.

python scripts/families_table.py
"""

from __future__ import annotations

from pathlib import Path

from marked import replaced

from smoothq.advisor.families import markdown

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def written(text: str) -> str:
    """The page's text with the table of today between its two marks."""
    return replaced(text, BEGIN, END, markdown())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
