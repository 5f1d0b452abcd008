"""An inspection in words and figures: for the terminal, and as plain data."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from .outliers import METHODS, Inspection, SiteReport

_SHOWN_TOKENS = 8  # of massive activations that are named


def table(inspection: Inspection, sites: list[SiteReport]) -> Table:
    """Sites with their outliers as they are, and their error by method, the least of it marked."""
    made = Table(
        title=f"{inspection.model}: inputs as they are; error of the outputs at {inspection.bits}",
        title_justify="left",
    )
    made.add_column("block", justify="right")
    made.add_column("site")
    columns = ("largest", "median", "kurtosis", "channels", "spikes", "massive")
    for title in (*columns, *(METHODS[method] for method in inspection.methods)):
        made.add_column(title, justify="right")
    for site in sites:
        before = site.profiles["rtn"]
        errors = (
            f"[bold]{profile.error:.3f}[/bold]" if method == site.best else f"{profile.error:.3f}"
            for method, profile in site.profiles.items()
        )
        made.add_row(
            str(site.block),
            site.site,
            f"{before.largest:.4g}",
            f"{before.median:.2g}",
            f"{before.kurtosis:.3g}",
            str(before.channels),
            str(before.spikes),
            str(len(before.massive)),
            *errors,
        )
    return made


def massive_tokens(
    inspection: Inspection, site: SiteReport, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The tokens of massive activations at a site: their text and their place in the sequence."""
    length = inspection.tokens.shape[1]
    flat = inspection.tokens.flatten()
    found = site.profiles["rtn"].massive
    named = [
        f"{tokenizer.decode(flat[number])!r} at {number % length}"
        for number in found[:_SHOWN_TOKENS]
    ]
    more = len(found) - len(named)
    return ", ".join(named) + (f", and {more} more" if more else "")


def as_dict(inspection: Inspection) -> dict[str, Any]:
    """Everything but the surfaces, as plain data."""
    return {
        "model": inspection.model,
        "bits": inspection.bits,
        "sequences": inspection.tokens.shape[0],
        "sequence_length": inspection.tokens.shape[1],
        "sites": [
            {
                "block": site.block,
                "site": site.site,
                "width": site.width,
                "methods": {name: each.figures() for name, each in site.profiles.items()},
            }
            for site in inspection.sites
        ],
    }
