"""The README.md of a quantized checkpoint, and of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from .figures import export_rows, remarks, size_rows
from .quantize_result import QuantizeResult
from .results import ExportResult

LOADING, RECIPE = "## Load it", "## Recipe"  # headings


def model_card(result: QuantizeResult) -> str:
    """The README.md of a quantized checkpoint."""
    return _render(
        "model_card.md.jinja",
        name=result.name,
        # Neither time nor memory: a model is the same however long it took to make.
        figures=size_rows(result.recipe, result.bits, result.bytes_before, result.bytes_after),
        remarks=remarks(result, result.name),
        recipe=result.recipe.to_yaml(),
    )


def served_card(card: str, exported: ExportResult) -> str:
    """The README.md of an export. card: that of the checkpoint it was made from."""
    before, _, rest = card.partition(LOADING)
    _, _, recipe = rest.partition(RECIPE)
    figures = export_rows(exported)[:-1]
    return _render("export_card.md.jinja", before=before, figures=figures, recipe=recipe)


def _render(template: str, **values: Any) -> str:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), keep_trailing_newline=True
    )
    values |= {"loading": LOADING, "recipe_heading": RECIPE}
    return templates.get_template(template).render(values)
