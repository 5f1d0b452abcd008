"""The command line: parse, call, print. Everything else is elsewhere."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import SmoothqError
from .evaluate import compare, evaluate, generate
from .in_flags import in_flags
from .inspect import inspect, sensitivity
from .models import families, models
from .plan import plan
from .quantize import export, push, quantize, verify
from .terminal import err, show_log, show_what_can_be_shown

app = typer.Typer(
    help="Post-training quantization of Hugging Face causal LMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
looking = (plan, verify, inspect, sensitivity)
for command in (quantize, export, push, *looking, evaluate, compare, generate, models):
    app.command("eval" if command is evaluate else None)(command)
app.command(hidden=True)(families)


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show an error's traceback; anywhere on the line.")
    ] = False,
) -> None:
    show_log()


def main() -> None:
    """Run the command line: errors of ours are one line and exit code 1, misuse is 2."""
    show_what_can_be_shown()
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except SmoothqError as error:
        if debug:
            raise
        err.print(f"smoothq: {in_flags(str(error))}", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("smoothq: interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
