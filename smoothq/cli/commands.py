"""The command line: parse, call, print. Everything else is elsewhere."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import CalibrationError, RecipeError, SmoothqError, needs_package
from ..recipe.recipe import Preset
from ..report.table import columns, pairs
from .recipe_flags import DtypeName, RecipeFlags, takes_recipe
from .terminal import err, log, out, perplexity_so_far, progress, show_log, show_what_can_be_shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..recipe.recipe import Recipe
    from ..runtime.distributed import World

app = typer.Typer(
    help="Post-training quantization of Hugging Face causal LMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DONE_BEFORE = "the same command made it before, and it is whole"
LONG_RUNS = "Long runs"  # a panel of the help
WORST_SITES = 12  # that are printed

Model = Annotated[str, typer.Argument(help="Hub id, local directory, or folder of a GGUF file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
EverySite = Annotated[bool, typer.Option("--all", help="Print every site, not only the worst.")]
RunDtype = Annotated[
    DtypeName,
    typer.Option(help="dtype of all that is not quantized; auto is float32 on a CPU."),
]
Gguf = Annotated[str | None, typer.Option(help="GGUF file inside MODEL, read by transformers.")]
Device = Annotated[str, typer.Option(help="Device to run on.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output.")]
Servable = Annotated[
    bool,
    typer.Option("--servable", help="Leave out of the recipe what only smoothq can run."),
]
Memory = Annotated[
    Literal["fast", "low"],
    typer.Option(help="4-bit weights: also as int8 where that is faster, or packed alone."),
]


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show an error's traceback; anywhere on the line.")
    ] = False,
) -> None:
    show_log()


@app.command()
@takes_recipe
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    flags: RecipeFlags,
    device: Device = "cpu",
    gguf_file: Gguf = None,
    form: Annotated[
        Literal["smoothq", "compressed-tensors"],
        typer.Option("--format", help="Our own, or the one that others read; see export."),
    ] = "smoothq",
    servable: Servable = False,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Go on with what OUT.partial holds, or begin anew; without it, go on if there is "
            "work of this command.",
            rich_help_panel=LONG_RUNS,
        ),
    ] = None,
    checkpoint_every: Annotated[
        int,
        typer.Option(
            help="Blocks between two states to go on from.", min=1, rich_help_panel=LONG_RUNS
        ),
    ] = 1,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory that the run may take, such as 8GB; or refuse.", rich_help_panel=LONG_RUNS
        ),
    ] = None,
    probe_every: Annotated[
        int | None,
        typer.Option(
            help="Measure perplexity every so many blocks, the others float.",
            min=1,
            rich_help_panel=LONG_RUNS,
        ),
    ] = None,
    probe_text: Annotated[
        str | None,
        typer.Option(
            help="Text that is measured on; without it the calibration's.",
            rich_help_panel=LONG_RUNS,
        ),
    ] = None,
    stop_above: Annotated[
        float | None,
        typer.Option(
            help="Stop where perplexity is over so many times the float model's.",
            rich_help_panel=LONG_RUNS,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Load the output again before it is placed and compare it with what was computed.",
            rich_help_panel=LONG_RUNS,
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
    recipe, limit = flags.chosen(), _bytes(max_memory)
    from .. import api  # imports torch, which no answer to misuse waits for
    from ..report import figures as report
    from ..runtime.device import resolve_device
    from ..runtime.distributed import World

    _silence_transformers()
    device = resolve_device(device)
    world = World.join(device)
    if dry_run:
        _dry_run(
            model,
            recipe,
            world,
            gguf_file=gguf_file,
            form=form,
            servable=servable,
            checkpoint_every=checkpoint_every,
            max_memory=limit,
            as_json=as_json,
        )
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
        )
    if not world.is_main:
        return
    figures, table = result.as_dict(), result.rows()
    if result.export is not None:
        figures |= {"export": asdict(result.export)}
        rows = report.export_rows(result.export)
        table += [(f"{form}, {label}", text) for label, text in rows]
    if as_json:
        print(json.dumps(figures | {"output": str(output)}))
        return
    if result.repeated:
        out.print(f"{output} is done: {DONE_BEFORE}")
        return
    out.print(pairs(f"{model} → {output}", table))
    for line in report.remarks(result, model):
        out.print(line)


@app.command()
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
    as_json: Json = False,
) -> None:
    """Write a quantized checkpoint in a format that others read; its codes stay as they are.

    Example: smoothq export OUT -o EXPORT
    """
    from ..export import export_checkpoint
    from ..report import figures as report

    _silence_transformers()
    with progress() as update:
        exported = export_checkpoint(directory, output, form, overwrite=overwrite, progress=update)
    if as_json:
        print(json.dumps(asdict(exported) | {"output": str(output)}))
        return
    if exported.repeated:
        out.print(f"{output} is done: {DONE_BEFORE}")
        return
    out.print(pairs(f"{directory} → {output}, {form}", report.export_rows(exported)))
    if form != "gguf":
        out.print(f"what vLLM makes of it: smoothq plan {output}")


@app.command()
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


@app.command()
@takes_recipe
def plan(
    model: Model,
    flags: RecipeFlags,
    max_memory: Annotated[
        str | None, typer.Option(help="Memory that quantizing may take, such as 8GB; or refuse.")
    ] = None,
    device: Device = "cpu",
    servable: Servable = False,
    as_json: Json = False,
) -> None:
    """Say what a recipe comes to for MODEL, who can run it, and what it costs; reads no weight.

    Of an export, which needs no recipe: which of vLLM's kernels would run its layers.

    Example: smoothq plan MODEL --w4a4
    """
    import torch

    from ..advisor.costs import advise, tables
    from ..api import planned
    from ..checkpoint.model_config import read_config, refuse_quantized
    from ..checkpoint.skeleton import skeleton_of
    from ..export import schemes as compressed_tensors
    from ..pipeline.estimate import estimate_resources, estimate_time
    from ..plan.resolve import float_bytes
    from ..report import figures as report
    from ..runtime.device import check_device

    _silence_transformers()
    config = read_config(model)
    quantization = getattr(config, "quantization_config", None) or {}
    if quantization.get("quant_method") == compressed_tensors.METHOD:
        _plan_export(skeleton_of(config, model), quantization, as_json)
        return
    recipe = flags.chosen()
    check_device(device)
    refuse_quantized(config, model)
    empty = skeleton_of(config, model)
    _, resolved = planned(empty, model, recipe, servable=servable)
    needs = estimate_resources(resolved, _bytes(max_memory))
    before = float_bytes(empty)
    estimate = estimate_time(resolved, torch.device(device))
    advice = advise(empty, resolved)
    if as_json:
        figures = report.plan_as_dict(model, before, resolved, estimate, needs)
        print(json.dumps(figures | {"outlook": asdict(advice)}))
        return
    out.print(pairs(f"{model}, as planned", report.plan_rows(before, resolved, estimate, needs)))
    for table in tables(advice):
        out.print(table, soft_wrap=False)
    for line in report.remarks(resolved, model):
        out.print(line)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="A directory that smoothq quantize wrote.")],
    as_json: Json = False,
) -> None:
    """Check every tensor of a quantized checkpoint: its hash, its shape, and its values.

    Example: smoothq verify OUT
    """
    from ..verify import verify_checkpoint

    _silence_transformers()
    with progress() as update:
        checked = verify_checkpoint(directory, update)
    if as_json:
        print(json.dumps({"directory": str(directory), **vars(checked)}))
        return
    size = f"{checked.bytes / 1e6:.1f} MB in {checked.tensors} tensors"
    out.print(f"{directory} is whole: {size}, {checked.files} other files")


@app.command()
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
        str,
        typer.Option(help="Text that the model reads, as for quantize."),
    ] = "wikitext2",
    text: Annotated[
        str | None, typer.Option(help="The earlier name of --calibration.", hidden=True)
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences of it.", min=1)] = 4,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sequence.", min=2)] = 512,
    seed: Annotated[int, typer.Option(help="Seed of rotations and of sampling.")] = 0,
    every_site: EverySite = False,
    device: Device = "cpu",
    gguf_file: Gguf = None,
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

    _silence_transformers()
    if output is not None or plots is not None:
        needs_package("matplotlib", "plots")
    source = open_source(model, gguf_file=gguf_file)
    tokenizer = text_tokenizer(source)
    read = TextSource(text or calibration)
    tokens = calibration_tokens(tokenizer, read, sequences, sequence_length, seed)
    with progress() as update:
        inspection = inspect_model(source, tokens, bits, seed, update, device)
    drawn = inspection.worst() if block is None else inspection.of(block, site)
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


@app.command()
@takes_recipe
def sensitivity(
    model: Model,
    flags: RecipeFlags,
    budget: Annotated[
        float | None, typer.Option(help="Bits a weight, scales counted, for a mixed recipe.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the mixed recipe to this file.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of the calibration text.", min=1)] = 2,
    window_length: Annotated[int, typer.Option(help="Tokens a window.", min=2)] = 512,
    every_site: EverySite = False,
    device: Device = "cpu",
    gguf_file: Gguf = None,
    as_json: Json = False,
) -> None:
    """Measure what quantizing each site alone costs, and make a mixed-precision recipe of it.

    Example: smoothq sensitivity MODEL --w4a16 --calibration builtin --budget 5 -o mixed.yaml
    """
    from ..checkpoint.open import open_source
    from ..checkpoint.source import text_tokenizer
    from ..data.text import TextSource, calibration_tokens
    from ..inspection.sensitivity import measure, mixed_recipe

    _silence_transformers()
    if (budget is None) != (output is None):
        raise typer.BadParameter("--budget and -o go together")
    recipe = flags.chosen()
    source = open_source(model, gguf_file=gguf_file)
    text = TextSource(
        recipe.calibration.source, recipe.calibration.split, recipe.calibration.text_column
    )
    tokens = calibration_tokens(text_tokenizer(source), text, windows, window_length, recipe.seed)
    with progress() as update:
        sensitivities = measure(source, recipe, tokens, update, device)
    if output is not None and budget is not None:
        output.write_text(mixed_recipe(sensitivities, recipe, budget).to_yaml(), "utf-8")
    if as_json:
        print(json.dumps(asdict(sensitivities)))
        return
    rows = [
        (
            f"{unit.block}, {unit.site}",
            f"{unit.divergence:.5f}",
            f"{unit.perplexity_ratio:.4f}",
            f"{unit.rich_divergence:.5f}",
            f"{unit.elements / sensitivities.elements:.2%}",
        )
        for unit in (sensitivities.ranked if every_site else sensitivities.ranked[:WORST_SITES])
    ]
    title = f"{model}: one site quantized; float perplexity {sensitivities.perplexity:.3f}"
    header = ("block, site", "KL", "perplexity, times float", "KL at 8 bits", "weights")
    out.print(columns(title, header, rows), soft_wrap=False)
    if output is not None:
        out.print(f"wrote {output}: smoothq quantize {model} --recipe {output} -o OUT")


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to evaluate on, as for --calibration; repeatable. wikitext2."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Model to compare with, mostly the float one.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, or .yaml task files: a,b,c.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Directory of more task files for lm-eval.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in a task's prompt.")] = None,
    decode_tokens: Annotated[
        int, typer.Option(help="Decode so many tokens one by one, and compare with prefill.")
    ] = 0,
    windows: Annotated[int | None, typer.Option(help="At most this many windows.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Windows, or requests of a task, a forward.")] = 1,
    split: Annotated[str | None, typer.Option(help="Split of the data set.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of its text.")] = None,
    dtype: RunDtype = "auto",
    device: Device = "cpu",
    memory: Memory = "fast",
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure MODEL, float or quantized: perplexity, agreement with another model, lm-eval's tasks.

    Example: smoothq eval OUT --text builtin --windows 4 --sequence-length 512 --against MODEL
    """
    from ..data.text import TextSource
    from ..evaluation.evaluate import evaluate as measure
    from ..evaluation.load import check_stored_vocabularies, load_model

    _silence_transformers()
    if against is not None:
        check_stored_vocabularies(against, model)
    named = [] if tasks is None else tasks.split(",")
    if named:
        needs_package("lm_eval", "eval")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    texts = text or ([] if named else ["wikitext2"])
    loaded, tokenizer = load_model(model, dtype, device, memory)
    reference, its_tokenizer = (
        (None, None) if against is None else load_model(against, dtype, device, memory)
    )
    with progress() as update:
        evaluation = measure(
            loaded,
            tokenizer,
            [TextSource(source, split, text_column) for source in texts],
            name=model,
            reference=reference,
            reference_name=against,
            reference_tokenizer=its_tokenizer,
            windows=windows,
            sequence_length=sequence_length,
            batch_size=batch_size,
            decode_tokens=decode_tokens,
            tasks=named,
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            on_window=perplexity_so_far(update),
        )
    if as_json:
        print(json.dumps(evaluation.as_dict()))
    elif as_markdown:
        print(evaluation.markdown())
    else:
        out.print(pairs(model, evaluation.rows()))


@app.command()
def compare(
    models: Annotated[
        list[str], typer.Argument(help="Directories or hub ids, float or quantized.")
    ],
    against: Annotated[
        str | None, typer.Option(help="Model whose predictions are the reference of KL.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("-o", "--plot", help="Draw size against loss as a PNG file.")
    ] = None,
    text: Annotated[str, typer.Option(help="Text to evaluate on, as for --calibration.")] = (
        "wikitext2"
    ),
    windows: Annotated[int, typer.Option(help="At most this many windows.", min=1)] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens a window.", min=2)] = 1024,
    dtype: RunDtype = "auto",
    device: Device = "cpu",
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Set models side by side: size, bits, loss, speed, memory, and the differences of recipes.

    Example: smoothq compare MODEL OUT --against MODEL --text builtin -o sizes.png
    """
    from ..data.text import TextSource
    from ..evaluation import compare as side_by_side

    _silence_transformers()
    if plot is not None:
        needs_package("matplotlib", "plots")
    with progress() as update:
        measurements = side_by_side.compare(
            models,
            TextSource(text),
            against=against,
            windows=windows,
            sequence_length=sequence_length,
            dtype=dtype,
            device=device,
            on_window=perplexity_so_far(update),
        )
    if plot is not None:
        side_by_side.plot(measurements, plot)
    if as_json:
        print(json.dumps([measurement.as_dict() for measurement in measurements]))
        return
    if as_markdown:
        print(side_by_side.markdown(measurements))
        return
    measured = measurements[0].evaluation.texts[0].perplexity
    sizes = f"{measured.windows} windows of {measured.sequence_length} tokens"
    title = f"{sizes} of {text}; tokens a second, batch 1"
    out.print(columns(title, side_by_side.HEADER, side_by_side.rows(measurements)), soft_wrap=False)
    differing = [(name, *values) for name, values in side_by_side.differences(measurements).items()]
    if differing:
        header = ("recipe", *models)
        out.print(columns("What the recipes differ in", header, differing), soft_wrap=False)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    chat: Annotated[
        bool, typer.Option(help="Wrap the prompt in the tokenizer's chat template, if it has one.")
    ] = True,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy.")] = False,
    dtype: RunDtype = "auto",
    device: Device = "cpu",
    memory: Memory = "fast",
) -> None:
    """Stream MODEL's continuation of PROMPT.

    Example: smoothq generate OUT "The capital of France is" --no-chat
    """
    from transformers import TextStreamer

    from ..architectures.positions import positions_of
    from ..data.tokenizer import encode_prompt, in_one_line
    from ..evaluation.load import load_model

    _silence_transformers()
    loaded: Any
    tokenizer: Any
    loaded, tokenizer = load_model(model, dtype, device, memory)
    rows = loaded.get_input_embeddings().weight.shape[0]
    inputs = encode_prompt(tokenizer, prompt, chat and bool(tokenizer.chat_template), rows)
    limit, length = positions_of(loaded), inputs["input_ids"].shape[1]
    if limit is not None and length >= limit:
        raise CalibrationError(
            f"the prompt has {length} tokens, and {model} has {limit} positions: shorten it"
        )
    if limit is not None and length + max_new_tokens > limit:
        max_new_tokens = limit - length
        log.warning("%d new tokens at most: the model has %d positions", max_new_tokens, limit)
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    with in_one_line(f"{model} cannot generate"):  # its generation config may be damaged too
        loaded.generate(
            **inputs.to(device), max_new_tokens=max_new_tokens, do_sample=sample, streamer=streamer
        )


@app.command()
def families(
    infer: Annotated[
        str | None,
        typer.Option(help="Find the wiring of this model by itself, and print it as a file."),
    ] = None,
) -> None:
    """Print which method each model family can take.

    Example: smoothq families --infer MODEL
    """
    from ..advisor.families import HEADER, rows

    _silence_transformers()
    if infer is not None:
        from ..checkpoint.model_config import read_config
        from ..discovery.infer import discover_family

        print(discover_family(read_config(infer))[1], end="")
        return
    out.print(columns(None, HEADER, rows()), soft_wrap=False)


def _dry_run(
    model: str,
    recipe: Recipe,
    world: World,
    *,
    gguf_file: str | None,
    form: str,
    servable: bool,
    checkpoint_every: int,
    max_memory: int | None,
    as_json: bool,
) -> None:
    """Print what quantizing would come to and take, of the model's own tensors."""
    from ..api import planned
    from ..checkpoint.open import open_source
    from ..pipeline.estimate import estimate_resources, estimate_time
    from ..report import figures as report

    source = open_source(model, gguf_file=gguf_file)
    _, plan = planned(source.skeleton(), model, recipe, form, servable, world.is_main)
    needs = estimate_resources(plan, max_memory, checkpoint_every)
    if not world.is_main:
        return
    estimate = estimate_time(plan, world.device)
    if as_json:
        figures = report.plan_as_dict(model, source.nbytes, plan, estimate, needs)
        print(json.dumps(figures))
        return
    rows = report.plan_rows(source.nbytes, plan, estimate, needs)
    out.print(pairs(f"{model}, as planned", rows))


def _bytes(text: str | None) -> int | None:
    from ..runtime.memory import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except RecipeError as error:
        raise typer.BadParameter(str(error)) from error


def _plan_export(empty: PreTrainedModel, quantization: dict[str, Any], as_json: bool) -> None:
    """Print which of vLLM's kernels would run an export."""
    from ..advisor.vllm_kernels import layer_kernels, remarks, table

    layers = layer_kernels(empty, quantization)
    if as_json:
        print(json.dumps([asdict(layer) for layer in layers]))
        return
    out.print(table(layers), soft_wrap=False)
    for line in remarks(layers):
        out.print(line)


def _silence_transformers() -> None:
    """Its progress bars would be drawn over ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


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
        err.print(f"smoothq: {error}", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("smoothq: interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
