"""The commands that look into a model: inspect and sensitivity."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import needs_package
from ..recipe.recipe import Preset
from ..report.table import columns
from .common import (
    WORST_SITES,
    Device,
    EverySite,
    Gguf,
    Json,
    Model,
    TrustRemoteCode,
    silence_transformers,
)
from .recipe_flags import RecipeFlags, takes_recipe
from .terminal import out, progress

if TYPE_CHECKING:
    from ..inspection.sensitivity import SiteSensitivity


def inspect(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write a report: one HTML page.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Directory for the report's figures as PNG files.")
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Block whose inputs are drawn; without it, the worst.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Site that is drawn, such as down; the block's worst.")
    ] = None,
    bits: Annotated[
        Preset, typer.Option(help="Number formats at which the methods' errors are measured.")
    ] = "w4a4",
    calibration: Annotated[
        str, typer.Option(help="Text that the model reads, as for quantize.")
    ] = "wikitext2",
    text: Annotated[
        str | None, typer.Option(help="The earlier name of --calibration.", hidden=True)
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences of it.", min=1)] = 4,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sequence.", min=2)] = 512,
    seed: Annotated[int, typer.Option(help="Seed of rotations and of sampling.")] = 0,
    every_site: EverySite = False,
    device: Device = "auto",
    gguf_file: Gguf = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show the outliers in what MODEL's linears are fed, and what each method makes of them.

    Example: smoothq inspect MODEL --calibration builtin -o report.html
    """
    from ..checkpoint.open import open_source
    from ..checkpoint.source import text_tokenizer
    from ..data.text import TextSource, calibration_tokens
    from ..inspection.outliers import inspect_model
    from ..inspection.summary import as_dict, massive_tokens, tables

    silence_transformers()
    if output is not None or plots is not None:
        needs_package("matplotlib", "plots")
    source = open_source(model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    tokenizer = text_tokenizer(source)
    read = TextSource(text or calibration)
    tokens = calibration_tokens(tokenizer, read, sequences, sequence_length, seed)
    with progress() as update:
        inspection = inspect_model(source, tokens, bits, seed, update, device)
    drawn = inspection.worst() if block is None else inspection.site(block, site)
    massive = massive_tokens(inspection, drawn, tokenizer)
    if output is not None or plots is not None:
        from ..inspection.page import write_page
        from ..inspection.plots import figures, save

        pictures = figures(inspection, drawn)
        if plots is not None:
            save(pictures, plots)
        if output is not None:
            write_page(inspection, drawn, pictures, massive, output)
    if as_json:
        print(json.dumps(as_dict(inspection)))
        return
    shown = inspection.sites if every_site else inspection.worst_first()[:WORST_SITES]
    for table in tables(inspection, shown):
        out.print(table, soft_wrap=False)
    if massive:
        out.print(f"block {drawn.block}, {drawn.site}: massive activations at {massive}")


@takes_recipe
def sensitivity(
    model: Model,
    flags: RecipeFlags,
    budget: Annotated[
        float | None, typer.Option(help="Bits a weight, scales counted, for a mixed recipe.")
    ] = None,
    among: Annotated[
        str | None, typer.Option(help="Presets whose formats to choose among: mxfp4,nvfp4,fp8.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the mixed recipe to this file.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of the calibration text.", min=1)] = 2,
    window_length: Annotated[int, typer.Option(help="Tokens a window.", min=2)] = 512,
    every_site: EverySite = False,
    device: Device = "auto",
    gguf_file: Gguf = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure what quantizing each site alone costs, and make a mixed-precision recipe of it.

    Example: smoothq sensitivity MODEL --w4a16 --calibration builtin --budget 5 -o mixed.yaml
    """
    from ..checkpoint.open import open_source
    from ..checkpoint.source import text_tokenizer
    from ..data.text import TextSource, calibration_tokens
    from ..inspection.sensitivity import measure, mixed_recipe

    silence_transformers()
    if (budget is None) != (output is None):
        raise typer.BadParameter("--budget and -o go together")
    recipe = flags.chosen()
    source = open_source(model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    text = TextSource(
        recipe.calibration.source, recipe.calibration.split, recipe.calibration.text_column
    )
    tokens = calibration_tokens(text_tokenizer(source), text, windows, window_length, recipe.seed)
    with progress() as update:
        names = among.split(",") if among else ()
        sensitivities = measure(source, recipe, tokens, update, device, names)
    if output is not None and budget is not None:
        output.write_text(mixed_recipe(sensitivities, recipe, budget).to_yaml(), "utf-8")
    if as_json:
        print(json.dumps(asdict(sensitivities)))
        return
    formats = tuple(
        dict.fromkeys(choice.name for unit in sensitivities.units for choice in unit.choices[1:])
    )
    rows = [
        (
            f"{unit.block}, {unit.site}",
            f"{unit.asked.divergence:.5f}",
            f"{unit.asked.perplexity_ratio:.4f}",
            *(_divergence(unit, name) for name in formats),
            f"{unit.elements / sensitivities.elements:.2%}",
        )
        for unit in (sensitivities.ranked if every_site else sensitivities.ranked[:WORST_SITES])
    ]
    title = f"{model}: one site quantized; float perplexity {sensitivities.perplexity:.3f}"
    others = (f"KL at {name}" for name in formats)
    header = ("block, site", "KL", "perplexity, times float", *others, "weights")
    out.print(columns(title, header, rows), soft_wrap=False)
    if output is not None:
        out.print(f"wrote {output}: smoothq quantize {model} --recipe {output} -o OUT")


def _divergence(unit: SiteSensitivity, name: str) -> str:
    """The divergence of a site in the format of that name; a dash where it has no such choice."""
    for choice in unit.choices:
        if choice.name == name:
            return f"{choice.divergence:.5f}"
    return "-"
