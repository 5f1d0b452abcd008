"""The benchmarks run to their end: toy kernels under the interpreter, a tiny model on the CPU."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from smoothq import preset

SCRIPTS = Path(__file__).parents[2] / "scripts"
PRODUCTS = {
    "bf16",
    "torch._int_mm",
    "int8_gemm",
    "int4_gemm",
    "int4_gemm, multipliers",
    "group_gemm, live",
    "expert_gemm, multipliers",
    "expert_weight_only_gemm, groups",
    "weight_only_gemm, row",
    "weight_only_gemm, groups",
    "fp_gemm, E4M3, rows",
    "fp_gemm, MXFP4",
    "fp_gemm, NVFP4",
    "weight_only_gemm, 2 bits, groups",
    "weight_only_gemm, 3 bits, groups",
}
QUANTIZERS = {
    "copy",
    "quantize_per_token",
    "quantize_token_groups",
    "quantize_smoothed",
    "hadamard_quantize",
    "hadamard_quantize, groups",
    "fp_quantize, E4M3",
    "fp_quantize, MXFP4",
    "runtime_smooth_quantize, live",
}
OTHERS = {"torchao int8 dynamic", "torchao int8 weight-only", "gemlite A16W4, groups"}
SMOOTHING = {
    f"{quantizer} + int8_gemm"
    for quantizer in ("quantize_per_token", "quantize_token_groups", "quantize_smoothed")
}


def run(
    directory: Path, script: str, *arguments: object, interpret: bool
) -> subprocess.CompletedProcess[str]:
    """Run a script on the CPU of any machine, from a directory."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, SCRIPTS / script, *map(str, arguments)],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module(name)


@pytest.mark.slow
def test_toy_kernels_are_run_and_labelled(tmp_path) -> None:
    out = tmp_path / "out" / "kernels.json"
    done = run(tmp_path, "bench_kernels.py", "--toy", "--output", out, interpret=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no measurement") >= 2
    assert list(tmp_path.iterdir()) == [out.parent]
    results = json.loads(out.read_text())
    assert results["interpreted"] is True
    assert results["complete"] is True
    assert results["targets"] == []
    rows = {part: {} for part in ("product", "quantizer", "smoothing")}
    for row in results["rows"]:
        rows[row["part"]].setdefault(row["operator"], []).append(row)
    assert set(rows["product"]) == PRODUCTS | OTHERS
    assert set(rows["quantizer"]) == QUANTIZERS
    assert set(rows["smoothing"]) == SMOOTHING
    for row in results["rows"]:
        if row["operator"] in OTHERS:
            assert row["status"] in ("not installed", "needs a GPU")
            continue
        times = [*row["seconds"].values(), row["relative"], row["of_ceiling"]]
        assert all(math.isfinite(value) and value > 0 for value in times), row
    for row in rows["product"]["torch._int_mm"]:
        assert row["tokens"] > 16


@pytest.mark.slow
def test_host_time_is_measured_on_any_machine(tmp_path) -> None:
    out = tmp_path / "host.json"
    options = ("--repetitions", 1, "--only", "quantize", "--output", out)
    done = run(tmp_path, "host_time.py", *options, interpret=False)
    assert done.returncode == 0, done.stderr
    medians = json.loads(out.read_text())
    assert list(medians) == ["quantize_per_token", "quantize_token_groups", "quantize_heads"]
    assert all(0 < median < 10_000 for median in medians.values())


@pytest.mark.parametrize(("toy", "interpret"), [(False, False), (True, False), (False, True)])
def test_what_the_surroundings_cannot_measure_is_refused_in_a_line(
    monkeypatch, tmp_path, toy, interpret
) -> None:
    bench = load(monkeypatch, "bench_kernels")
    monkeypatch.setattr(bench.launch, "INTERPRETED", interpret)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(bench.main)
    with pytest.raises(SystemExit) as refused:
        app(["--toy"] if toy else [])
    assert isinstance(refused.value.code, str)  # printed to stderr, for exit code 1
    assert len(refused.value.code.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_targets_are_geometric_means_over_wide_projections(monkeypatch) -> None:
    bench = load(monkeypatch, "bench_kernels")

    def row(shape: object, operator: str, seconds: float) -> object:
        where = ("product", shape.model, shape.projections, 2048, shape.rows, shape.width)
        return bench.Row(*where, operator, seconds=bench.Spread(*[seconds] * 4))

    square, narrow, gate, _ = bench.projections("model", 4096, 14336, 1024)
    rows = [
        *(row(square, "bf16", 4.0), row(square, "int8_gemm", 2.0)),  # twice as fast, for q and o
        *(row(gate, "bf16", 0.25), row(gate, "int8_gemm", 1.0)),  # a quarter of the speed
        *(row(narrow, "bf16", 1.0), row(narrow, "int8_gemm", 100.0)),  # too narrow to count
    ]
    verdict = next(found for found in bench.verdicts(rows) if "of bf16" in found["target"])
    assert verdict["tokens"] == 2048
    assert verdict["figure"] == pytest.approx(1.0)
    assert verdict["verdict"] == "missed"


@pytest.mark.slow
def test_a_tiny_model_is_measured_on_the_cpu(tmp_path) -> None:
    out = tmp_path / "model.json"
    sizes = ("--prompt", 16, "--prompt", 48, "--batch", 1, "--context", 8)
    few = ("--steps", 2, "--repetitions", 2)
    arguments = ("--size", "tiny", "--preset", "w8a8", "--compiled", *sizes, *few, "--output", out)
    done = run(tmp_path, "bench_model.py", *arguments, interpret=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert (results["size"], results["cuda_graphs"]) == ("tiny", False)
    names = [task["name"] for task in results["tasks"]]
    assert names == ["prefill 16", "prefill 48", "decode, batch 1"]
    assert set(results["contenders"]) == {"float32", "bfloat16", "w8a8", "w8a8, compiled"}
    for name, one in results["contenders"].items():
        measured = names[2:] if name == "w8a8, compiled" else names
        assert list(one["seconds"]) == list(one["tokens_a_second"]) == measured
        values = [value for spread in one["seconds"].values() for value in spread.values()]
        values += [*one["tokens_a_second"].values(), one["of_byte_bound"], one["bytes_read"]]
        assert all(math.isfinite(value) and value > 0 for value in values), name
    sizes = {
        name: one["memory"]["model"]
        for name, one in results["contenders"].items()
        if one["memory"] is not None
    }
    assert 0 < sizes["w8a8"] < sizes["float32"]


@pytest.mark.parametrize("embeddings", [8, 16])
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a4", "w4a16"])
def test_random_models_give_finite_logits(monkeypatch, name, embeddings) -> None:
    bench = load(monkeypatch, "bench_model")
    config, cpu = bench.config_of("tiny"), bench.Where(torch.device("cpu"), torch.float32)
    prompt, decode = bench.Task("prefill", 1, 12), bench.Task("decode", 2, 2, context=3, steps=2)
    recipe = preset(name).model_copy(update={"embeddings": embeddings})
    monkeypatch.setattr(bench, "READ_BYTES", 2**12)
    with torch.no_grad():
        model = bench.random_quantized_model(config, recipe, cpu)
        logits = bench.run_of(model, prompt).step()
        builders = [
            lambda: bench.Contender("float", bench.random_float_model(config, cpu), cpu),
            lambda: bench.Contender("quantized", model, cpu),
        ]
        session = bench.measured_in_turns(builders, (prompt, decode), 1, cpu, together=False)
    assert logits.shape == (1, 1, config.vocab_size)
    assert logits.isfinite().all()
    assert logits.std() > 0.1
    assert set(session.found) == {"float", "quantized"}
    assert all(len(one.done) == 2 for one in session.found.values())
    read = {name: one.bytes_read for name, one in session.found.items()}
    assert 0 < read["quantized"] < read["float"]


def test_a_llama_cpp_file_has_the_models_shapes(monkeypatch, tmp_path) -> None:
    gguf = pytest.importorskip("gguf")
    rivals, models = load(monkeypatch, "rivals"), load(monkeypatch, "models")
    config = models.config_of("tiny")
    rivals.write_gguf(tmp_path / "tiny.gguf", "q8_0", config)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert "output.weight" not in found  # tied
    assert found["token_embd.weight"].shape.tolist() == [config.hidden_size, config.vocab_size]
    assert sum(name.endswith("ffn_down.weight") for name in found) == config.num_hidden_layers


def test_linears_are_measured_in_every_form(monkeypatch) -> None:
    bench = load(monkeypatch, "bench_linears")
    monkeypatch.setattr(bench, "HELD_BYTES", 2**12)
    with torch.no_grad():
        found = bench.measure(tokens=3, rows=33, width=128, repetitions=1)
    assert set(found) > {"float32", "bfloat16", "W8A8", "W4A8 packed", "W4A16", "E4M3", "W2A16"}
    assert all(spread.median > 0 for spread in found.values())


def test_the_speed_page_quotes_what_was_measured(monkeypatch) -> None:
    table = load(monkeypatch, "speed_table")
    text = table.PAGE.read_text()
    assert table.written(text) == text


def test_the_needs_page_says_what_quantizing_took(monkeypatch) -> None:
    needs = load(monkeypatch, "needs")
    text = needs.PAGE.read_text()
    assert needs.written(text) == text


def test_random_models_are_what_transformers_loads(monkeypatch, tmp_path) -> None:
    random_models = load(monkeypatch, "make_random_model")
    config = random_models.config_of(random_models.Shapes.TINYLLAMA, 1)
    for name, size in (("vocab_size", 64), ("hidden_size", 64), ("intermediate_size", 96)):
        setattr(config, name, size)
    config.head_dim, config.tie_word_embeddings = 2, True
    random_models.write_random_model(tmp_path / "model", config, shard_bytes=10_000)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    matrices = [weight.float() for weight in loaded.parameters() if weight.dim() > 1]
    assert all(0.9 < weight.std() * weight.shape[1] ** 0.5 < 1.1 for weight in matrices)


def test_random_mixtures_are_stored_expert_by_expert(monkeypatch, tmp_path) -> None:
    random_models = load(monkeypatch, "make_random_model")
    config = random_models.config_of(random_models.Shapes.TINYLLAMA, 1, experts=3)
    assert config.num_experts_per_tok == 3
    assert config.num_experts_per_tok * config.moe_intermediate_size <= config.intermediate_size
    for name in ("vocab_size", "hidden_size", "moe_intermediate_size"):
        setattr(config, name, 64)
    config.head_dim = 2
    random_models.write_random_model(tmp_path / "model", config)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as stored:
        names = [name for name in stored.keys() if ".experts." in name]  # noqa: SIM118
    assert len(names) == 3 * 3
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    experts = loaded.model.layers[0].mlp.experts
    assert 0.9 < experts.gate_up_proj.float().std() * 64**0.5 < 1.1


def test_a_mixture_is_timed_beside_a_dense_block(monkeypatch) -> None:
    bench = load(monkeypatch, "bench_experts")
    configs = bench.configs_of(128, 32, 4, 2, blocks=2)
    assert configs["dense"].intermediate_size == 2 * configs["mixture"].moe_intermediate_size
    with torch.no_grad():
        steps = {kind: bench.steps_of(config, "w8a8", 1) for kind, config in configs.items()}
        spreads = bench.measure(steps, 2)
    assert all(0 < spread.median < math.inf for spread in spreads.values())


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(tmp_path) -> None:
    done = run(tmp_path, "soak.py", "--kills", 2, "--layers", 3, interpret=False)
    assert done.returncode == 0, done.stderr
    assert "2 resumed, 2 identical" in done.stdout
