"""An inspection as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment
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
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ inspection.model }}: what its linears are fed</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; color: #1b2631; max-width: 1240px; margin: 2em auto;
        padding: 0 1em }
 h1, h2 { line-height: 1.2 } h2 { margin-top: 2em }
 figure { margin: 1em 0 } img { width: 100%; height: auto }
 table { border-collapse: collapse; font: 14px/1.4 system-ui, sans-serif;
         font-variant-numeric: tabular-nums }
 th, td { padding: .2em .6em; white-space: nowrap; text-align: right;
          border-bottom: 1px solid #d5d8dc }
 td:nth-child(2) { text-align: left }
 .wide { overflow-x: auto }
 .best { font-weight: 700; color: #0e6251 }
 dt { font-weight: 700 } dd { margin: 0 0 .5em 1em }
</style>
</head>
<body>
<h1>{{ inspection.model }}: what its linears are fed</h1>
<p>{{ inspection.tokens.shape[0] }} sequences of {{ inspection.tokens.shape[1] }} tokens. Each
method transforms the float model, which computes the same; its inputs are shown as their quantizer
sees them, runtime smoothing's multipliers divided out. Errors are of round-to-nearest at
{{ inspection.bits }}, simulated on the same grids that the integers run on.</p>
<h2>Block {{ site.block }}, {{ site.site }}</h2>
{% for name in ("surfaces", "heat_maps") %}
<figure><img src="data:image/png;base64,{{ images[name] }}" alt="{{ name }}"></figure>
{% endfor %}
{% if massive %}
<p>Massive activations, a value over {{ massive_ratio }} times the median, at the tokens:
{{ massive }}.</p>
{% endif %}
<h2>Over the depth</h2>
{% for name in ("depth", "kurtosis", "error") %}
<figure><img src="data:image/png;base64,{{ images[name] }}" alt="{{ name }}"></figure>
{% endfor %}
<h2>Every site</h2>
<dl>
<dt>largest / median</dt><dd>of the magnitudes, before any transform</dd>
<dt>kurtosis</dt><dd>of all values; 3 is a normal distribution's</dd>
<dt>channels</dt><dd>channel-wise outliers: the median magnitude over the tokens is over
{{ channel_ratio }} times the median channel's</dd>
<dt>spikes</dt><dd>values over {{ spike_ratio }} times the median magnitude, of their channel and of
all</dd>
<dt>massive</dt><dd>tokens with a value over {{ massive_ratio }} times the median</dd>
<dt>error</dt><dd>of the site's outputs by method, relative; the least is marked</dd>
</dl>
<div class="wide"><table>
<thead>
<tr><th colspan="8"></th><th colspan="{{ inspection.methods|length }}">error</th></tr>
<tr><th>block</th><th>site</th><th>largest</th><th>median</th><th>kurtosis</th>
<th>channels</th><th>spikes</th><th>massive</th>
{% for method in inspection.methods %}<th>{{ names[method] }}</th>{% endfor %}</tr>
</thead>
<tbody>
{% for row in inspection.sites %}{% set before = row.profiles["rtn"] %}
<tr><td>{{ row.block }}</td><td>{{ row.site }}</td><td>{{ "%.4g"|format(before.largest) }}</td>
<td>{{ "%.3g"|format(before.median) }}</td><td>{{ "%.4g"|format(before.kurtosis) }}</td>
<td>{{ before.channels }}</td><td>{{ before.spikes }}</td><td>{{ before.massive|length }}</td>
{% for method in inspection.methods %}
<td{% if method == row.best %} class="best"{% endif %}>
{{ "%.3f"|format(row.profiles[method].error) }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
</body>
</html>
"""


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
    page = Environment(autoescape=True).from_string(_PAGE)
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
