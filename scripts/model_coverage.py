"""Which of transformers' model types are quantized right: a tiny model of each, four recipes.

    python scripts/model_coverage.py --write-docs            # all: about 40 minutes on two cores
    python scripts/model_coverage.py --list causal --sample 10
    python scripts/model_coverage.py --types llama,qwen3_next --again

A type is built from its config class, shrunk as discovery shrinks a config, and quantized in a
process of its own. The output is loaded by the auto class of its list and held against the float
model and against plain rounding of the same linears, in plain PyTorch:

- `ok`: by every recipe the logits' error is at most 1.3 times plain rounding's (or that of the
  median token, or of nine in ten, is, for a router that flips moves a few tokens far), and at least
  97% of what plain rounding touches lies in the output as integer codes (85% in state spaces, whose
  kernels read projections themselves).
- `partly`: less lies there as codes, or a recipe is refused; `refused`: every recipe is.
- `wrong`: an error is larger, a tower or a processor's file is lost, or `generate` fails that did
  not.
- `crash`: another error than one of smoothq's, too long, or too much memory.
- `not built`: transformers builds no model from the config class's own small sizes.

Results go to a JSON file as they come, and types that have one by the same versions are left out.
"""

from __future__ import annotations

import datetime
import gc
import json
import logging
import multiprocessing
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from marked import replaced
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

import smoothq
from smoothq import Recipe, preset
from smoothq.advisor.model_claims import edges_cell, stream_cell
from smoothq.architectures.graph import final_output, text_config
from smoothq.checkpoint.skeleton import empty_model
from smoothq.discovery.shrink import VOCABULARY, tiny_configs
from smoothq.discovery.stack import find_stack, kinds_of, towers
from smoothq.errors import SmoothqError, first_line
from smoothq.plan.attention import float_attention
from smoothq.plan.wiring import Wiring
from smoothq.report.table import markdown

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
RESULTS = ROOT / "benchmarks" / "model-coverage.json"
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"
LISTS = {
    "causal": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": (
        "AutoModelForImageTextToText",
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ),
}
# Encoders, encoder-decoders and their halves, and helpers of other models: no decoders of text.
NO_DECODERS = {
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus"),
    *("blenderbot", "blenderbot-small", "blip", "camembert", "data2vec-text"),
    *("diffusion_gemma", "electra", "ernie", "evolla", "florence2"),
    *("gemma4_assistant", "gemma4_unified_assistant", "git", "marian", "mbart"),
    *("megatron-bert", "musicgen", "musicgen_melody", "mvp", "pegasus"),
    *("pi0", "pix2struct", "plbart", "pp_formulanet", "prophetnet"),
    *("reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
    *("roformer", "t5gemma2", "trocr", "udop", "vision-encoder-decoder"),
    *("whisper", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet"),
    *("xmod",),
}
# Fields without which a config class makes no model that runs, whatever its size.
_ONE_ROPE = {
    "layer_types": ["full_attention"] * 2,
    "num_hidden_layers": 2,
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
}


NEEDED: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "chameleon": {"vocabulary_map": {"<image>": 61, "IMGIMGBSAZ": 62}},
    "cohere_compass": {"text_config": _ONE_ROPE},
    "cohere_compass_text": _ONE_ROPE,
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 500000.0},
        "ffn_config": {
            **{"hidden_size": 64, "ffn_hidden_size": 80, "moe_num_experts": 4, "moe_top_k": 2},
        },
    },
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", *["sparse"] * 11],
            **{"num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 896},
        }
    },
    "dots1": {"n_shared_experts": 2, "n_routed_experts": 128, "num_experts_per_tok": 6},
    "emu3": {"vocabulary_map": {"<image>": 61, "<|extra_200|>": 62, "<|visual token 000000|>": 63}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
}
STATE_SPACES = {"falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "xlstm"}
LARGEST = 80_000_000  # parameters of a model that counts as tiny
MOST_LAYERS = 12
SECONDS, MEMORY = 240, 8 << 30  # of a type: of a processor, and bytes
PATIENCE = 4  # times as many seconds may pass, where the processors are shared
TOKENS = torch.randint(6, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
DATA = torch.randint(6, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(7))
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

Bits = tuple[int, int]  # of weights, of activations
RECIPES: dict[str, tuple[Recipe, Bits]] = {
    "W8A8": (preset("w8a8", method="rtn"), (8, 8)),
    "W8A8, smoothed": (preset("w8a8"), (8, 8)),
    "W4A16, GPTQ": (preset("w4a16", method="rtn").edit(weights__rounding="gptq"), (4, 16)),
    "W4A4, rotated": (preset("w4a4", method="quarot").edit(weights__rounding="rtn"), (4, 4)),
}
Record = dict[str, Any]


def types_of(name: str) -> list[str]:
    """The model types of a list, in order."""
    return sorted(set(LISTS[name][1]) - NO_DECODERS)


def small_model(model_type: str, name: str) -> PreTrainedModel:
    """A tiny float32 model of a type with random values, that runs.

    Raises:
        ValueError: none of the small configs makes one.
    """
    config: Any = CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {}))
    classes = LISTS[name][1][model_type]
    kind = getattr(transformers, classes if isinstance(classes, str) else classes[0])
    if kind.config_class is not type(config):  # the text model of a wrapper
        config = config.get_text_config(decoder=True)
    layers = _layers(config, kind)
    problems = []
    for tiny in tiny_configs(config, layers, towers=True):
        try:
            count = sum(parameter.numel() for parameter in empty_model(tiny, kind).parameters())
            if count > LARGEST:
                raise ValueError(f"it has {count:,} parameters")
            torch.manual_seed(0)
            model: PreTrainedModel = kind._from_config(tiny, dtype=torch.float32).float().eval()
            randomize(model)
            if torch.isfinite(logits(model)).all():
                return model
            problems.append("its logits are not finite")
        except Exception as error:  # the model's own code may raise anything
            problems.append(first_line(error))
    raise ValueError(problems[0])


def _layers(config: PretrainedConfig, kind: type[PreTrainedModel]) -> int:
    """So many layers that every kind of block is among them."""
    skeleton = empty_model(config, kind)
    kinds = kinds_of(skeleton)
    values = vars(text_config(skeleton)).values()
    lists = [value for value in values if isinstance(value, list) and len(value) == len(kinds)]
    blocks = list(zip(kinds, *(map(str, value) for value in lists), strict=True))
    needed = 1 + max(kinds.index(kind) for kind in set(kinds))
    listed = 1 + max(blocks.index(block) for block in set(blocks))
    return max(2, needed, min(listed, MOST_LAYERS))


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    """Give a model values that keep its hidden states near 1, and leave states' decays alone."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if "A_log" in name or "dt_bias" in name or leaf in ("D", "dt") or not parameter.numel():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            present = 0.0 if leaf == "bias" else parameter.nan_to_num(0) * (1 + 0.1 * noise)
            parameter.copy_(present + 0.1 * noise)
        elif parameter.dim() == 3 and "expert" in name:
            parameter.copy_(noise * max(parameter.shape[1:]) ** -0.5)
        else:
            parameter.copy_(noise if "embed" in name else noise * parameter[0].numel() ** -0.5)
    for _, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.nan_to_num_(0)
    model.tie_weights()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """A model's logits of `TOKENS`; what is masked with huge numbers is 0."""
    values = final_output(model, TOKENS, use_cache=False).float()
    return values.masked_fill(values < -1e30, 0.0)


def generates(model: Any) -> bool:
    """Whether a model generates a few tokens."""
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    try:
        model.generate(TOKENS[:1, :8], max_new_tokens=4, **options)
    except Exception:  # the model's own code may raise anything
        return False
    return True


class Deviation(NamedTuple):
    """Relative errors of logits.

    Attributes:
        whole: of all of them.
        median: of the median token's.
        most: of the token's that nine in ten do not exceed.
    """

    whole: float
    median: float
    most: float


def deviation(now: Tensor, before: Tensor) -> Deviation:
    """How far logits are from others, (..., tokens, vocabulary)."""
    whole = (now - before).norm() / before.norm()
    tokens = ((now - before).norm(dim=-1) / before.norm(dim=-1)).flatten()
    return Deviation(float(whole), float(tokens.median()), float(tokens.quantile(0.9)))


def is_as_good(error: Deviation, plain: Deviation) -> bool:
    """Whether a recipe's error is as small as plain rounding's, but for a few tokens."""
    whole, median, most = (a <= 1.3 * b + 0.005 for a, b in zip(error, plain, strict=True))
    times = (error.whole - 0.005) / plain.whole
    return whole or (median and times <= 3) or (most and times <= 10)


def _rounded(values: Tensor, bits: int) -> Tensor:
    """Values on the even grid of the largest of each row."""
    top = 2 ** (bits - 1) - 1
    scale: Tensor = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
    codes: Tensor = (values / scale).round().clamp(-top - 1, top)
    return codes * scale


def round_plainly(model: PreTrainedModel, bits: Bits) -> int:
    """Round every linear and expert of the text blocks to nearest, in place; how many elements."""
    weight_bits, activation_bits = bits
    touched = 0

    def round_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_rounded(args[0], activation_bits), *args[1:])

    for block in find_stack(model)[1]:
        for module in block.modules():
            turned = isinstance(module, Conv1D)  # GPT-2's: (in_features, out_features)
            if turned or (isinstance(module, nn.Linear) and module.out_features > 4):
                weight: Any = module.weight
                rows = weight.data.T if turned else weight.data
                rounded = _rounded(rows, weight_bits)
                weight.data = rounded.T.contiguous() if turned else rounded
                touched += weight.numel()
                if activation_bits < 16:
                    module.register_forward_pre_hook(round_input)
        for name, parameter in block.named_parameters():
            if parameter.dim() == 3 and "expert" in name:
                parameter.data = _rounded(parameter.data, weight_bits)
                touched += parameter.numel()
    return touched


def code_bytes(folder: Path) -> int:
    """Bytes of 8-bit integers in a folder's safetensors files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, tensor in header.items():
            if name != "__metadata__" and tensor["dtype"] in ("I8", "U8"):
                begin, end = tensor["data_offsets"]
                total += end - begin
    return total


def examine(model_type: str, name: str, folder: Path, keep: Callable[[Record], None]) -> None:
    """Quantize a tiny model of a type by every recipe, and look at what comes out.

    Args:
        model_type: of `CONFIG_MAPPING`.
        name: of the list that it is of.
        folder: for checkpoints, empty.
        keep: takes the record after each step, for the process may end at any.
    """
    record: Record = {"recipes": {}, "stage": "build"}
    keep(record)
    model = small_model(model_type, name)
    record["stage"] = "float model"
    keep(record)
    auto = getattr(transformers, LISTS[name][0])
    source = folder / "float"
    model.save_pretrained(source)
    if name != "causal":
        for file in PROCESSOR_FILES:
            (source / file).write_text("{}")

    def stock() -> PreTrainedModel:
        loaded: PreTrainedModel = auto.from_pretrained(source, dtype=torch.float32).eval()
        return loaded

    model = stock()
    before, does_generate, kept = logits(model), generates(model), _towers(model)
    plain = {}
    for bits in {bits for _, bits in RECIPES.values()}:
        rounded = stock()
        touched = round_plainly(rounded, bits)
        plain[bits] = deviation(logits(rounded), before)
    record["claims"] = _claims(model)
    least = 0.85 if model_type in STATE_SPACES else 0.97
    for recipe_name, (recipe, bits) in RECIPES.items():
        record["stage"] = recipe_name
        keep(record)
        out = folder / "out"
        outcome: Record = {"plain": plain[bits].whole, "verdict": "ok"}
        record["recipes"][recipe_name] = outcome
        try:
            smoothq.quantize(source, recipe, data=DATA, output=out, overwrite=True)
        except SmoothqError as error:
            outcome |= {"verdict": "refused", "reason": first_line(error)}
            continue
        loaded = auto.from_pretrained(out, dtype=torch.float32).eval()
        now = deviation(logits(loaded), before)
        share = code_bytes(out) * 8 / bits[0] / max(touched, 1)
        outcome |= {"error": now.whole, "codes": share}
        lost = [file.name for file in source.glob("*processor*") if not (out / file.name).is_file()]
        wrong = {
            "its error is larger than plain rounding's": not is_as_good(now, plain[bits]),
            "a tower is not as it was": not _equal(_towers(loaded), kept),
            f"lost: {', '.join(lost)}": bool(lost),
            "it does not generate": does_generate and not generates(loaded),
        }
        if any(wrong.values()):
            why = next(text for text, is_so in wrong.items() if is_so)
            outcome |= {"verdict": "wrong", "reason": why}
        elif share < least:
            outcome |= {"verdict": "partly", "reason": f"{share:.0%} of the elements are codes"}
        del loaded
        gc.collect()
    del record["stage"]
    keep(record)


def _towers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model's towers, by name."""
    names = tuple(f"{tower}." for tower in towers(model, find_stack(model)[1]))
    return {name: value for name, value in model.state_dict().items() if name.startswith(names)}


def _equal(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(
        torch.equal(value, those[name]) for name, value in these.items()
    )


def _claims(model: PreTrainedModel) -> dict[str, str]:
    """What is claimed of a model's wiring, by column of the table."""
    wiring = Wiring.of(model)
    return {
        "SmoothQuant": edges_cell(wiring.graphs),
        "QuaRot": stream_cell(wiring.family, wiring.graphs),
        "KV cache": "yes" if float_attention(wiring) is None else "no",
    }


def verdict(record: Record) -> str:
    """What the recipes' verdicts come to."""
    if "stage" in record:
        return "not built" if record["stage"] == "build" else "crash"
    kinds = {outcome["verdict"] for outcome in record["recipes"].values()}
    for kind in ("wrong", "partly"):
        if kind in kinds:
            return kind
    return "ok" if kinds == {"ok"} else "refused" if kinds == {"refused"} else "partly"


def reason(record: Record) -> str:
    """Why a type is not ok; empty for one that is."""
    if "stage" in record:
        return f"{record['stage']}: {record.get('reason', 'its process ended')}"
    reasons: dict[str, list[str]] = {}
    for name, outcome in record["recipes"].items():
        if outcome["verdict"] != "ok":
            reasons.setdefault(outcome["reason"], []).append(name)
    return "; ".join(f"{' and '.join(names)}: {text}" for text, names in reasons.items())


def _in_process(model_type: str, name: str, path: Path) -> None:
    """Examine a type in this process, which is its own; the record goes to a file."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    record: Record = {}

    def keep(now: Record) -> None:
        record.update(now)
        path.write_text(json.dumps(now))

    with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
        try:
            examine(model_type, name, Path(folder), keep)
        except Exception as error:  # whatever a model's code or ours may raise
            path.write_text(json.dumps(record | {"reason": first_line(error)}))


def examine_all(asked: list[tuple[str, str]], workers: int) -> Iterator[tuple[str, str, Record]]:
    """Yield (list, type, record) as they come.

    Args:
        asked: (list, type) of each.
        workers: types at a time.
    """
    context = multiprocessing.get_context("fork")  # with transformers imported once
    waiting = asked[::-1]
    running: dict[Any, tuple[BaseProcess, str, str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="coverage-records-") as records:
        while waiting or running:
            while waiting and len(running) < workers:
                name, model_type = waiting.pop()
                path = Path(records) / f"{name}-{model_type}.json"
                started = context.Process(target=_in_process, args=(model_type, name, path))
                started.start()
                running[started.sentinel] = started, name, model_type, time.monotonic()
            wait(list(running), timeout=1)
            for sentinel, (process, name, model_type, begun) in list(running.items()):
                late = time.monotonic() - begun > PATIENCE * SECONDS
                if late:
                    process.kill()
                if late or not process.is_alive():
                    process.join()
                    del running[sentinel]
                    path = Path(records) / f"{name}-{model_type}.json"
                    record: Record = json.loads(path.read_text())
                    if late or process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
                        record["reason"] = f"it takes more than {SECONDS} seconds, or is killed"
                    yield name, model_type, record | {"seconds": time.monotonic() - begun}


def versions() -> dict[str, str]:
    """What the results depend on."""
    return {
        "smoothq": smoothq.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
    }


def known(path: Path) -> dict[str, Any]:
    """The results in a file so far; none where there is no file, or one by other versions."""
    if path.is_file():
        results: dict[str, Any] = json.loads(path.read_text())
        if results["versions"] == versions():
            return results
    return {"versions": versions(), "date": "", "lists": {name: {} for name in LISTS}}


def summary(rows: dict[str, Record]) -> str:
    """How many types of a list have which verdict."""
    counts = Counter(map(verdict, rows.values()))
    built = len(rows) - counts["not built"]
    others = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if kind != "ok")
    return f"{counts['ok']} of {built} are ok{f' ({others})' if others else ''}"


def table(results: dict[str, Any]) -> str:
    """The part of docs/models.md that the results make."""
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [f"On {results['date']}, with {used}."]
    header = ("model type", "", "SmoothQuant", "QuaRot", "KV cache", *RECIPES, "not ok because")
    for name, rows in results["lists"].items():
        lines = []
        for model_type, record in sorted(rows.items()):
            claims = record.get("claims", {})
            columns = [claims.get(column, "") for column in ("SmoothQuant", "QuaRot", "KV cache")]
            figures = [_figure(record["recipes"].get(recipe)) for recipe in RECIPES]
            lines.append((model_type, verdict(record), *columns, *figures, reason(record)))
        parts.append(f"**{LISTS[name][0]}**: of {len(rows)} types, {summary(rows)}.")
        parts.append(markdown(header, [tuple(map(_cell, line)) for line in lines]))
    return "\n\n".join(parts)


def _figure(outcome: Record | None) -> str:
    """An error beside plain rounding's."""
    return (
        f"{outcome['error']:.3f} ({outcome['plain']:.3f})" if outcome and "error" in outcome else ""
    )


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]


def written(text: str, path: Path = RESULTS) -> str:
    """The page's text with the table of the results between its two marks."""
    return replaced(text, BEGIN, END, table(json.loads(path.read_text())))


def main(
    lists: Annotated[
        list[str] | None, typer.Option("--list", help="causal or image-text; repeatable.")
    ] = None,
    types: Annotated[str, typer.Option(help="Model types, with commas between.")] = "",
    sample: Annotated[int, typer.Option(help="Every n-th type of a list alone.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Types at a time.", min=1)] = 2,
    output: Annotated[Path, typer.Option(help="JSON file of the results.")] = RESULTS,
    again: Annotated[bool, typer.Option("--again", help="Also types that it has.")] = False,
    write_docs: Annotated[bool, typer.Option("--write-docs", help="Write docs/models.md.")] = False,
) -> None:
    """Examine model types; exit code 1 if any is wrong or crashes."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    results, chosen = known(output), [each for each in types.split(",") if each]
    asked = [
        (name, model_type)
        for name in lists or LISTS
        for model_type in types_of(name)[::sample]
        if not chosen or model_type in chosen
    ]
    new = [(name, each) for name, each in asked if again or each not in results["lists"][name]]
    for name, model_type, record in examine_all(new, workers):
        results["lists"][name][model_type] = record
        results["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
        output.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        print(f"{verdict(record):9} {name} {model_type}: {reason(record)}"[:300], flush=True)
    rows = {name: results["lists"][name] for name in LISTS}
    of_asked = [rows[name][model_type] for name, model_type in asked]
    for name in lists or LISTS:
        print(f"{name}: {summary({t: rows[name][t] for n, t in asked if n == name})}")
    if write_docs:
        PAGE.write_text(written(PAGE.read_text(), output))
    sys.exit(any(verdict(record) in ("wrong", "crash") for record in of_asked))


if __name__ == "__main__":
    typer.run(main)
