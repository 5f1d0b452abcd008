"""What several commands share: options with one meaning, and what is done before the work."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ..errors import RecipeError

DONE_BEFORE = "the same command made it before, and it is whole"
WORST_SITES = 12  # that are printed

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Model = Annotated[str, typer.Argument(help="Hub id, local directory, or folder of a GGUF file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
EverySite = Annotated[bool, typer.Option("--all", help="Print every site, not only the worst.")]
RunDtype = Annotated[
    DtypeName, typer.Option(help="dtype of all that is not quantized; auto is float32 on a CPU.")
]
Gguf = Annotated[str | None, typer.Option(help="GGUF file inside MODEL, read by transformers.")]
Device = Annotated[str, typer.Option(help="Device to run on; auto is a GPU where there is one.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code that lies beside MODEL's weights; read it first."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output.")]
Servable = Annotated[
    bool, typer.Option("--servable", help="Leave out of the recipe what only smoothq can run.")
]
Memory = Annotated[
    Literal["fast", "low"],
    typer.Option(help="4-bit weights: also as int8 where that is faster, or packed alone."),
]


def parse_memory(text: str | None) -> int | None:
    """Bytes of text such as `8GB`; another is misuse."""
    from ..runtime.memory import parse_bytes  # imports torch

    try:
        return None if text is None else parse_bytes(text)
    except RecipeError as error:
        raise typer.BadParameter(str(error)) from error


def silence_transformers() -> None:
    """Turn off its progress bars, which would be drawn over ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
