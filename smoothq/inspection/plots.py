"""Figures of an inspection, by matplotlib: surfaces, heat maps, and profiles over depth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ..recipe.recipe import Method
from .outliers import (
    METHODS,
    Inspection,
    Profile,
    SiteReport,
    pooled,
)

COLOURS: dict[Method, str] = {
    "rtn": "#c0392b",
    "smoothquant": "#e08e0b",
    "quarot": "#2471a3",
    "smoothrot": "#148f77",
    "rs": "#a569bd",
    "rrs": "#1b2631",
}
SURFACE_CELLS = 64  # of a surface's side: more take seconds to draw and show no more
WIDE = (12.4, 7.2)  # inches, at 100 dots an inch


def figures(inspection: Inspection, site: SiteReport) -> dict[str, Figure]:
    """Draw every figure of an inspection.

    Args:
        inspection: what is drawn.
        site: the site whose surfaces and heat maps are drawn.

    Returns:
        The figures by name: `surfaces`, `heat_maps`, `depth`, `kurtosis`, `error`.
    """
    return {
        "surfaces": surfaces(inspection, site),
        "heat_maps": heat_maps(inspection, site),
        "depth": over_depth(inspection, "largest magnitude", lambda p: p.largest, logarithmic=True),
        "kurtosis": over_depth(inspection, "kurtosis", lambda p: p.kurtosis, logarithmic=True),
        "error": over_depth(
            inspection, f"relative error of the outputs at {inspection.bits}", lambda p: p.error
        ),
    }


def save(drawn: dict[str, Figure], directory: Path) -> list[Path]:
    """Write figures as PNG files.

    Args:
        drawn: figures by name.
        directory: where NAME.png goes; made if it does not exist.

    Returns:
        The paths of the files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in drawn.items():
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=100)
    return paths


def surfaces(inspection: Inspection, site: SiteReport) -> Figure:
    """A site's input magnitudes as a 3D surface for each method, each with its own scale."""
    figure = Figure(figsize=WIDE, layout="constrained")
    for number, method in enumerate(inspection.methods):
        profile = site.profiles[method]
        axes = figure.add_subplot(2, 3, number + 1, projection="3d")
        heights = pooled(profile.surface, SURFACE_CELLS).numpy()
        x = np.linspace(0, site.width, heights.shape[1])
        y = np.linspace(0, inspection.tokens.numel(), heights.shape[0])
        axes.plot_surface(
            *np.meshgrid(x, y),
            heights,
            cmap="viridis",
            rstride=1,
            cstride=1,
            linewidth=0,
        )
        axes.set_title(f"{METHODS[method]}: largest {profile.largest:.4g}", fontsize=12)
        axes.set_xlabel("channel", fontsize=9)
        axes.set_ylabel("token", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.locator_params(nbins=4)
        axes.view_init(elev=24, azim=-58)
    figure.suptitle(f"Magnitudes of the input of block {site.block}, {site.site}", fontsize=14)
    return figure


def heat_maps(inspection: Inspection, site: SiteReport) -> Figure:
    """A site's input magnitudes as a heat map for each method, on one logarithmic scale."""
    figure = Figure(figsize=WIDE, layout="constrained")
    drawn = [site.profiles[method] for method in inspection.methods]
    highest = max(profile.largest for profile in drawn)
    lowest = max(min(profile.median for profile in drawn), highest * 1e-6)
    grid = figure.subplots(2, 3, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number >= len(drawn):
            axes.set_axis_off()
            continue
        shown = axes.imshow(
            drawn[number].surface.clamp(min=lowest).numpy(),
            norm=LogNorm(lowest, highest),
            cmap="magma",
            aspect="auto",
            extent=(0, site.width, inspection.tokens.numel(), 0),
        )
        axes.set_title(METHODS[inspection.methods[number]], fontsize=12)
        axes.set_xlabel("channel")
        axes.set_ylabel("token")
    figure.colorbar(shown, ax=grid, label="magnitude", shrink=0.8)
    figure.suptitle(f"Magnitudes of the input of block {site.block}, {site.site}", fontsize=14)
    return figure


def over_depth(
    inspection: Inspection,
    label: str,
    value: Callable[[Profile], float],
    logarithmic: bool = False,
) -> Figure:
    """A figure with a subplot for each stage: one value over the blocks, a line for each method.

    Args:
        inspection: what is drawn.
        label: of the value.
        value: takes the value from a profile; a block's stage shows its largest one.
        logarithmic: whether the value's axis is.
    """
    figure = Figure(figsize=WIDE, layout="constrained")
    stages = list(dict.fromkeys(report.site.partition(".")[0] for report in inspection.sites))
    rows = -(-len(stages) // 2)
    grid = figure.subplots(rows, 2, squeeze=False, sharex=True)
    for number, axes in enumerate(grid.flat):
        if number >= len(stages):
            axes.set_axis_off()
            continue
        for method in inspection.methods:
            by_block: dict[int, float] = {}
            for site in inspection.sites:
                if site.site.partition(".")[0] == stages[number]:
                    plotted = value(site.profiles[method])
                    by_block[site.block] = max(plotted, by_block.get(site.block, plotted))
            axes.plot(
                list(by_block),
                list(by_block.values()),
                color=COLOURS[method],
                label=METHODS[method],
                marker="o",
                markersize=3,
            )
        if logarithmic:
            axes.set_yscale("log")
        axes.set_title(stages[number], fontsize=12)
        axes.set_ylabel(label if number % 2 == 0 else "")
        axes.set_xlabel("block" if number >= len(stages) - 2 else "")
        axes.grid(alpha=0.25)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, fontsize=11)
    return figure
