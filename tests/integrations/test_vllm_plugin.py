"""vLLM with the plugin: what transformers makes of a checkpoint, or an error that says what to do.

vLLM binds threads and memory of the process that it runs in: it gets one of its own, this file.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

pytest.importorskip("vllm")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from smoothq import Recipe, quantize
from smoothq.checkpoint.skeleton import empty_model
from smoothq.errors import RecipeError, SmoothqError, UnsupportedModelError
from smoothq.integrations.vllm import RotatedEnd, SmoothqMethod, SmoothqVllmConfig, skeleton
from smoothq.modules import QuantizedLinear
from smoothq.plan.config import SmoothqConfig
from smoothq.plan.resolve import make_plan
from tests.conftest import RECIPES
from tests.tiny_models import TINY, VOCABULARY, tiny_model

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
GENERATED = 12
PROMPTS = [
    torch.randint(2, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (30, 7, 17)
]
KEPT = RECIPES["w4a4"].edit(keep=("*.0.mlp.down_proj", "*.1.self_attn.?_proj"))
ENDS_IN_8_BITS = RECIPES["w4a8"].edit(embeddings=8)
CASES: dict[str, tuple[str, Recipe]] = {
    "w4a4": ("llama", RECIPES["w4a4"]),
    "w4a8": ("llama", RECIPES["w4a8"]),
    "w4a16": ("llama", RECIPES["w4a16-float-groups"]),
    "asymmetric": ("llama", RECIPES["w4a16-asymmetric"]),
    "w8a8": ("llama", RECIPES["w8a8"]),
    "static": ("llama", RECIPES["w8a8-static"]),
    "calibrated": ("llama", RECIPES["w4a4-rrs-calibrated"]),
    "kept": ("llama", KEPT),
    "embedding": ("llama", ENDS_IN_8_BITS),
    "embedding-untied": ("llama-untied", ENDS_IN_8_BITS),
    "untied": ("llama-untied", RECIPES["w4a4"]),
    "qwen2": ("qwen2", RECIPES["w4a4"]),
    "qwen3": ("qwen3", RECIPES["w4a8"]),
    "mistral": ("mistral", RECIPES["w4a16"]),
    "phi3": ("phi3", RECIPES["w4a16"]),
    "gemma3_text": ("gemma3_text", RECIPES["w4a16"]),
}


def wide(architecture: str) -> PretrainedConfig:
    """A tiny config with heads of 32, the least that vLLM's attention on a CPU takes."""
    config = TINY[architecture]()
    config.update({"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96})
    if getattr(config, "head_dim", None) is not None:
        config.head_dim = 32
    return config


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, data: torch.Tensor) -> dict[str, Any]:
    """What vLLM made of each case's checkpoint, under `directory` where that is."""
    folder = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        for name, (architecture, recipe) in CASES.items():
            config = wide(architecture)
            patch.setitem(TINY, name, lambda config=config: config)
            quick = recipe.edit(tuning=None, weights__rounding="rtn")
            quantize(tiny_model(name, torch.float32), quick, data=data, output=folder / name)
    shutil.copytree(folder / "w4a4", folder / "damaged")
    tensors = load_file(folder / "damaged" / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight_scale"]
    save_file(tensors, folder / "damaged" / "model.safetensors", {"format": "pt"})
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, "-m", "tests.integrations.test_vllm_plugin", str(folder)]
    root = Path(__file__).parents[2]
    subprocess.run(command, env=os.environ | environment, cwd=root, check=True, timeout=600)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {name: result | {"directory": folder / name} for name, result in results.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_layer_multiplies_bit_by_bit_as_in_transformers(served, case) -> None:
    assert served[case].get("wrong") == [], served[case]
    assert served[case]["compared"] >= (9 if case == "kept" else 12)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_probabilities_are_those_of_transformers(served, case) -> None:
    _, recipe = CASES[case]
    model = AutoModelForCausalLM.from_pretrained(served[case]["directory"], dtype=torch.float32)
    for prompt, sequence in zip(PROMPTS, served[case]["sequences"], strict=True):
        tokens = torch.tensor([sequence["tokens"]])
        assert tokens.shape[1] == len(prompt) + GENERATED
        with torch.no_grad():
            expected = model(input_ids=tokens).logits.log_softmax(-1)[0, :-1]
        chosen = expected.gather(1, tokens[0, 1:, None])[:, 0]
        differences = (chosen - torch.tensor(sequence["logprobs"])).abs()
        shortfall = (expected.max(1).values - chosen)[len(prompt) - 1 :]
        for distance in (differences, shortfall):
            if recipe.activations.bits == 16:
                assert distance.max() < 1e-4
            else:  # sums in another order move a code now and then, and so what comes after
                assert distance.median() < 1e-2


@pytest.mark.slow
def test_a_missing_tensor_is_an_error(served) -> None:
    error = served["damaged"]["error"]
    assert error.startswith("CheckpointError")
    assert "'weight_scale' of model.layers.1.self_attn.qkv_proj is missing" in error


def quantization(config: PretrainedConfig, recipe: Recipe) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint."""
    written: dict[str, Any] = SmoothqConfig.of(make_plan(empty_model(config), recipe), "").to_dict()
    return written


@pytest.mark.parametrize(
    ("architecture", "recipe", "error", "advice"),
    [
        ("cohere", "w4a4", UnsupportedModelError, "transformers"),
        ("mixtral", "w4a8", UnsupportedModelError, "transformers"),
        ("llama", "w4a4-rrs-live", RecipeError, "runtime_smoothing.scope=token"),
        ("llama", "w8a8-tensor", RecipeError, "one scale a token"),
        ("llama", "w8a8-kv4", RecipeError, "--kv-cache-dtype"),
        ("llama", "w8a8-kv8-int8", RecipeError, "--kv-cache-dtype"),
    ],
)
def test_what_cannot_be_served_is_refused(architecture, recipe, error, advice) -> None:
    config = TINY[architecture]()
    written = quantization(config, RECIPES[recipe])
    with pytest.raises(error, match=advice):
        skeleton(config, written)


@pytest.fixture
def method_of() -> Callable[..., Any]:
    """The method of a linear by its name in vLLM, under a recipe of w4a8 with edits."""

    def of(linear: str, **edits: Any) -> Any:
        config = TINY["llama"]()
        asked = SmoothqVllmConfig.from_config(quantization(config, RECIPES["w4a8"].edit(**edits)))
        asked.maybe_update_config("", config)
        asked = pickle.loads(pickle.dumps(asked))
        asked.packed_modules_mapping = MERGED
        return asked.get_quant_method(LinearBase.__new__(LinearBase), linear)

    return of


def test_a_kept_linear_is_vllms_own(method_of) -> None:
    down = "model.layers.0.mlp.down_proj"
    assert isinstance(method_of(down, keep=(down,)), UnquantizedLinearMethod)
    assert isinstance(method_of(down), SmoothqMethod)


@pytest.mark.parametrize(
    "edit",
    [
        {"keep": ("*.gate_proj",)},
        {"overrides": ({"match": "*.gate_proj", "weights": {"bits": 8}},)},
    ],
)
def test_weights_that_differ_cannot_be_merged(method_of, edit) -> None:
    with pytest.raises(RecipeError, match="merges"):
        method_of("model.layers.0.mlp.gate_up_proj", **edit)


@pytest.mark.parametrize("architecture", ["llama", "llama-untied"])
@pytest.mark.parametrize("asked", [{"enable_prompt_embeds": True}, {"runner_type": "pooling"}, {}])
def test_tokens_are_the_only_way_into_a_rotated_stream(monkeypatch, architecture, asked) -> None:
    of_model = SimpleNamespace(**{"enable_prompt_embeds": False, "runner_type": "generate"} | asked)
    serving = SimpleNamespace(model_config=of_model)
    monkeypatch.setattr("smoothq.integrations.vllm.get_current_vllm_config", lambda: serving)
    config = TINY[architecture]()
    ours = SmoothqVllmConfig.from_config(quantization(config, RECIPES["w4a8"]))
    ours.maybe_update_config("", config)
    kinds = vocabulary.VocabParallelEmbedding, vocabulary.ParallelLMHead
    embedding, head = (kind.__new__(kind) for kind in kinds)
    if asked:
        with pytest.raises(RecipeError, match="neither pooling nor prompt embeddings"):
            ours.get_quant_method(embedding, "model.embed_tokens")
        return
    assert isinstance(ours.get_quant_method(embedding, "model.embed_tokens"), RotatedEnd)
    assert isinstance(ours.get_quant_method(head, "lm_head"), RotatedEnd)


def test_tensor_parallelism_is_refused(method_of) -> None:
    method = method_of("model.layers.0.mlp.down_proj")
    layer = SimpleNamespace(tp_size=2)
    with pytest.raises(SmoothqError, match="--pipeline-parallel-size"):
        method.create_weights(layer, 40, [48], 80, 48, torch.float32, print)


def _differing(model: nn.Module, directory: Path) -> tuple[list[str], int]:
    """Layers that do not multiply bit by bit as in transformers, and how many were compared."""
    reference = AutoModelForCausalLM.from_pretrained(directory)
    wrong, compared = [], 0
    for name, layer in model.named_modules():
        if not isinstance(getattr(layer, "quantized", None), QuantizedLinear):
            continue
        parent, _, last = name.rpartition(".")
        siblings = reference.get_submodule(parent)
        own = [last] if hasattr(siblings, last) else MERGED[last]
        x = torch.randn(9, layer.input_size, generator=torch.Generator().manual_seed(1))
        expected = torch.cat([siblings.get_submodule(part)(x) for part in own], 1)
        if not torch.equal(layer.quantized(x)[:, : expected.shape[1]], expected):
            wrong.append(name)
        compared += 1
    return wrong, compared


def _serve(directory: Path) -> dict[str, Any]:
    llm = LLM(
        str(directory),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    asked = SamplingParams(
        temperature=0,
        max_tokens=GENERATED,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=0,
    )
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    sequences = []
    for prompt, output in zip(PROMPTS, llm.generate(inputs, asked, use_tqdm=False), strict=True):
        generated = output.outputs[0]
        tokens = prompt + list(generated.token_ids)
        found = output.prompt_logprobs[1:] + list(generated.logprobs)
        logprobs = [each[token].logprob for each, token in zip(found, tokens[1:], strict=True)]
        sequences.append({"tokens": tokens, "logprobs": logprobs})
    [(wrong, compared)] = llm.apply_model(lambda model: _differing(model, directory))
    return {"sequences": sequences, "wrong": wrong, "compared": compared}


def _main(folder: Path) -> None:
    """Serve each checkpoint of a folder in turn; what it gave, or its error, → results.json."""
    results = {}
    for name in (*CASES, "damaged"):
        try:
            results[name] = _serve(folder / name)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        cleanup_dist_env_and_memory()
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
