"""The command that says what is known of a model: models."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import wraps
from typing import Annotated, Any

import typer

from ..report.table import columns
from .common import Json, TrustRemoteCode, silence_transformers
from .terminal import log, out

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Hub id, directory, config file, or model type; without it, the table of families.",
    ),
]
AsPython = Annotated[
    bool, typer.Option("--python", help="Find the wiring by experiments; print it as a file.")
]
Infer = Annotated[str | None, typer.Option(help="The earlier form of MODEL --python.", hidden=True)]


def models(
    model: Target = None,
    as_python: AsPython = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    infer: Infer = None,
) -> None:
    """Say which transforms MODEL's wiring allows and what stays in float; reads no weight.

    Example: smoothq models MODEL
    """
    silence_transformers()
    if infer is not None:
        model, as_python = infer, True
    if model is None:
        if as_python:
            raise typer.BadParameter("--python needs a model")
        _print_families(as_json)
        return
    from ..advisor.model_claims import claims_of, source_of, tables
    from ..checkpoint.formats.choose import FORMATS, as_float, method_of
    from ..checkpoint.model_config import config_named

    config = config_named(model, trust_remote_code)
    if method_of(config) in FORMATS:
        config, _ = as_float(config, model)
    if as_python:
        print(source_of(config), end="")
        return
    claims = claims_of(config, model)
    if as_json:
        print(json.dumps(asdict(claims)))
        return
    for table in tables(claims):
        out.print(table, soft_wrap=False)


@wraps(models, assigned=("__annotations__",))  # its options
def families(**options: Any) -> None:
    """Do what `models` does, whose earlier name this is."""
    log.warning("smoothq families is now smoothq models")
    models(**options)


def _print_families(as_json: bool) -> None:
    """Print which method each family with a file can take."""
    from ..advisor.families import HEADER, rows

    if as_json:
        print(json.dumps([dict(zip(HEADER, row, strict=True)) for row in rows()]))
        return
    out.print(columns(None, HEADER, rows()), soft_wrap=False)
