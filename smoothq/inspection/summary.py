"""An inspection in words and figures: for the terminal, and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..tables import columns
from .outliers import METHODS, Inspection, SiteReport

_SHOWN_TOKENS = 8  # of massive activations that are named


def tables(inspection: Inspection, sites: Sequence[SiteReport]) -> list[Table]:
    """Sites with their outliers as they are, and their errors by method, the least marked."""
    outliers, errors = [], []
    for site in sites:
        name, before = f"{site.block}, {site.site}", site.profiles["rtn"]
        outliers.append(
            (
                name,
                f"{before.largest:.4g}",
                f"{before.median:.2g}",
                f"{before.kurtosis:.4g}",
                str(before.channels),
                str(before.spikes),
                str(len(before.massive)),
            )
        )
        by_method = (
            f"[bold]{profile.error:.3f}[/bold]" if method == site.best else f"{profile.error:.3f}"
            for method, profile in site.profiles.items()
        )
        errors.append((name, *by_method))
    titles = ("largest", "median", "kurtosis", "channels", "spikes", "massive")
    methods = (METHODS[method] for method in inspection.methods)
    return [
        columns(f"{inspection.model}: inputs as they are", ("block, site", *titles), outliers),
        columns(
            f"Relative error of the outputs at {inspection.bits}", ("block, site", *methods), errors
        ),
    ]


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
