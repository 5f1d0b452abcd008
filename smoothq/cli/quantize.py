"""The commands that write: quantize, export and push; and verify, which checks what was written."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import SmoothqError
from ..report.table import pairs
from .common import (
    DONE_BEFORE,
    Device,
    Gguf,
    Json,
    Model,
    Overwrite,
    Servable,
    TrustRemoteCode,
    parse_memory,
    silence_transformers,
)
from .plan import print_plan
from .recipe_flags import RecipeFlags, takes_recipe
from .terminal import out, progress

_long_runs = partial(typer.Option, rich_help_panel="Long runs")  # of the help


@takes_recipe
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    flags: RecipeFlags,
    device: Device = "auto",
    gguf_file: Gguf = None,
    form: Annotated[
        Literal["smoothq", "compressed-tensors"],
        typer.Option("--format", help="Our own, or the one that others read; see export."),
    ] = "smoothq",
    servable: Servable = False,
    model_free: Annotated[
        bool,
        typer.Option(
            "--model-free",
            help="Without the model's class, which may be newer than transformers: linears by name "
            "and shape, rounded to nearest, in compressed-tensors.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    resume: Annotated[
        bool | None,
        _long_runs(
            "--resume/--no-resume",
            help="Go on with what OUT.partial holds, or begin anew; without it, go on if there is "
            "work of this command.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int, _long_runs(help="Blocks between two states to go on from.", min=1)
    ] = 1,
    max_memory: Annotated[
        str | None, _long_runs(help="Memory that the run may take, such as 8GB; or refuse.")
    ] = None,
    probe_every: Annotated[
        int | None,
        _long_runs(help="Measure perplexity every so many blocks, the others float.", min=1),
    ] = None,
    probe_text: Annotated[
        str | None, _long_runs(help="Text that is measured on; without it the calibration's.")
    ] = None,
    stop_above: Annotated[
        float | None,
        _long_runs(help="Stop where perplexity is over so many times the float model's."),
    ] = None,
    check: Annotated[
        bool,
        _long_runs(
            "--check/--no-check",
            help="Load the output again before it is placed and compare it with what was computed.",
        ),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would come to and take, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into a directory that transformers loads.

    Example: smoothq quantize MODEL --w8a8 -o OUT --calibration builtin
    """
    if stop_above is not None and probe_every is None:
        raise typer.BadParameter("--stop-above needs --probe-every")
    if model_free and dry_run:
        raise typer.BadParameter("--dry-run plans with a model's class, and --model-free has none")
    recipe, limit = flags.chosen(), parse_memory(max_memory)
    from .. import api  # imports torch, which no answer to misuse waits for
    from ..checkpoint.open import open_source
    from ..pipeline.estimate import estimate_resources
    from ..report import figures as report
    from ..runtime.device import resolve_device
    from ..runtime.distributed import World

    silence_transformers()
    device = resolve_device(device)
    world = World.join(device)
    if dry_run:
        source = open_source(model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
        _, plan = api.planned(source.skeleton(), model, recipe, form, servable, world.is_main)
        needs = estimate_resources(plan, limit, checkpoint_every)
        if world.is_main:
            print_plan(model, source.nbytes, plan, device, needs, as_json)
        return
    with progress() if world.is_main else nullcontext() as update:
        result = api.quantize(
            model,
            recipe,
            output=output,
            format=form,
            servable=servable,
            gguf_file=gguf_file,
            device=device,
            overwrite=overwrite,
            resume=resume,
            checkpoint_every=checkpoint_every,
            max_memory=limit,
            progress=update,
            probe=probe_every,
            probe_text=probe_text,
            stop_above=stop_above,
            check=check,
            trust_remote_code=trust_remote_code,
            model_free=model_free,
        )
    if not world.is_main:
        return
    figures, table = result.as_dict(), result.rows()
    if result.export is not None:
        figures |= {"export": asdict(result.export)}
        rows = report.export_rows(result.export)
        table += [(f"compressed-tensors, {label}", text) for label, text in rows]
    if as_json:
        print(json.dumps(figures | {"output": str(output)}))
        return
    if result.repeated:
        out.print(f"{output} is done: {DONE_BEFORE}")
        return
    out.print(pairs(f"{model} → {output}", table))
    for line in report.remarks(result, model):
        out.print(line)


def export(
    directory: Annotated[Path, typer.Argument(help="A directory that smoothq quantize wrote.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory to write, or a GGUF file.")
    ],
    form: Annotated[
        Literal["compressed-tensors", "gguf"],
        typer.Option("--format", help="For transformers and vLLM, or for llama.cpp."),
    ] = "compressed-tensors",
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a quantized checkpoint in a format that others read; its codes stay as they are.

    Example: smoothq export OUT -o EXPORT
    """
    from ..export import export_checkpoint
    from ..report import figures as report

    silence_transformers()
    with progress() as update:
        exported = export_checkpoint(
            directory,
            output,
            form,
            overwrite=overwrite,
            progress=update,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print(json.dumps(asdict(exported) | {"output": str(output)}))
        return
    if exported.repeated:
        out.print(f"{output} is done: {DONE_BEFORE}")
        return
    out.print(pairs(f"{directory} → {output}, {form}", report.export_rows(exported)))
    if form != "gguf":
        out.print(f"what vLLM makes of it: smoothq plan {output}")


def push(
    directory: Annotated[Path, typer.Argument(help="A directory of quantize or of export.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the hub, or hf://owner/name@branch.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repo private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="A branch that is there, in place of the main one.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", help="What smoothq eval --json printed, for the model card."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish a quantized model on the hub: one commit, with a model card.

    Example: smoothq push OUT owner/name
    """
    from ..checkpoint.hub_files import parse_hub_id
    from ..hub import push_to_hub

    repo_id, branch = parse_hub_id(repo)
    try:
        figures = None if evaluation is None else json.loads(evaluation.read_bytes())
    except (OSError, ValueError) as error:
        raise SmoothqError(f"{evaluation} cannot be read as JSON: {error}") from error
    url = push_to_hub(
        directory,
        repo_id,
        private=private,
        revision=revision or branch,
        message=message,
        evaluation=figures,
    )
    if as_json:
        print(json.dumps({"directory": str(directory), "url": url}))
        return
    out.print(f"{directory} is at {url}")


def verify(
    directory: Annotated[Path, typer.Argument(help="A directory that smoothq quantize wrote.")],
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Check every tensor of a quantized checkpoint: its hash, its shape, and its values.

    Example: smoothq verify OUT
    """
    from ..verify import verify_checkpoint

    silence_transformers()
    with progress() as update:
        checked = verify_checkpoint(directory, update, trust_remote_code)
    if as_json:
        print(json.dumps({"directory": str(directory), **vars(checked)}))
        return
    size = f"{checked.bytes / 1e6:.1f} MB in {checked.tensors} tensors"
    out.print(f"{directory} is whole: {size}, {checked.files} other files")
