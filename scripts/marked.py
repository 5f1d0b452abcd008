"""Generated parts of a text, between two marks."""

from __future__ import annotations


def replaced(text: str, begin: str, end: str, content: str) -> str:
    """The text with `content` between its two marks, in place of what stood there."""
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"
