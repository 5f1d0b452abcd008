"""An inspection as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from .outliers import (
    CHANNEL_RATIO,
    MASSIVE_RATIO,
    METHODS,
    SPIKE_RATIO,
    Inspection,
    SiteReport,
)

_DOTS = 140  # an inch: sharp at 1280 pixels, and on finer screens


def write_page(
    inspection: Inspection, site: SiteReport, drawn: dict[str, Figure], massive: str, path: Path
) -> None:
    """Write an inspection as an HTML page with embedded figures.

    Args:
        inspection: what is shown.
        site: the site whose surfaces and heat maps were drawn.
        drawn: the figures by name, as `plots.figures` returns them.
        massive: tokens with massive activations at `site`, as `summary.massive_tokens` returns
            them.
        path: the file that is written.
    """
    folder = FileSystemLoader(Path(__file__).parent)
    page = Environment(autoescape=True, loader=folder).get_template("page.html.jinja")
    images = {name: _encoded(figure) for name, figure in drawn.items()}
    text = page.render(
        inspection=inspection,
        site=site,
        images=images,
        massive=massive,
        names=METHODS,
        channel_ratio=f"{CHANNEL_RATIO:g}",
        spike_ratio=f"{SPIKE_RATIO:g}",
        massive_ratio=f"{MASSIVE_RATIO:g}",
    )
    path.write_text(text, encoding="utf-8")


def _encoded(figure: Figure) -> str:
    """A figure as a base64-encoded PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DOTS)
    return base64.b64encode(png.getvalue()).decode("ascii")
