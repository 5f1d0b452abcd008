"""An inspection as tables for the terminal, and as plain data for `smoothq inspect --json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..report.table import columns
from .outliers import (
    METHODS,
    Inspection,
    Profile,
    SiteReport,
)

_SITE = "block, site"
_SHOWN_TOKENS = 8  # of massive activations that are named


def tables(inspection: Inspection, sites: Sequence[SiteReport]) -> list[Table]:
    """The tables that `smoothq inspect` prints: outliers, and peaks and errors by method.

    The least peak and the least error of each site are bold.

    Args:
        inspection: the whole inspection.
        sites: the sites that are listed.
    """
    outliers = []
    for site in sites:
        before = site.profiles["rtn"]
        outliers.append(
            (
                _name(site),
                f"{before.largest:.4g}",
                f"{before.median:.2g}",
                f"{before.kurtosis:.4g}",
                str(before.channels),
                str(before.spikes),
                str(len(before.massive)),
            )
        )
    titles = ("largest", "median", "kurtosis", "channels", "spikes", "massive")
    error = f"Relative error of the outputs at {inspection.bits}, by method"
    return [
        columns(f"{inspection.model}: inputs as they are", (_SITE, *titles), outliers),
        _by_method(inspection, sites, "Largest over median, by method", ".4g", Profile.peak),
        _by_method(inspection, sites, error, ".3f", lambda profile: profile.error),
    ]


def _by_method(
    inspection: Inspection,
    sites: Sequence[SiteReport],
    title: str,
    form: str,
    value: Callable[[Profile], float],
) -> Table:
    """A table of one value: a row for each site, a column for each method, the least one bold."""
    rows = []
    for site in sites:
        cells = [f"{value(profile):{form}}" for profile in site.profiles.values()]
        least = min(cells, key=float)
        marked = (f"[bold]{cell}[/bold]" if cell == least else cell for cell in cells)
        rows.append((_name(site), *marked))
    return columns(title, (_SITE, *(METHODS[method] for method in inspection.methods)), rows)


def _name(site: SiteReport) -> str:
    return f"{site.block}, {site.site}"


def massive_tokens(
    inspection: Inspection, site: SiteReport, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Describe the tokens with massive activations at a site.

    Args:
        inspection: the whole inspection.
        site: one of its sites.
        tokenizer: the model's.

    Returns:
        The first eight tokens with their positions in their sequences; "" if there are none.
    """
    length = inspection.tokens.shape[1]
    flat = inspection.tokens.flatten()
    massive = site.profiles["rtn"].massive
    named = [
        f"{tokenizer.decode(flat[number])!r} at {number % length}"
        for number in massive[:_SHOWN_TOKENS]
    ]
    more = len(massive) - len(named)
    return ", ".join(named) + (f", and {more} more" if more else "")


def as_dict(inspection: Inspection) -> dict[str, Any]:
    """All figures but the surfaces, as plain data."""
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
                "methods": {name: profile.figures() for name, profile in site.profiles.items()},
            }
            for site in inspection.sites
        ],
    }
