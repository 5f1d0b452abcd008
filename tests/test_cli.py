"""The command line on a tiny model: what it prints, what it refuses, with which exit code."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smoothq import load_recipe
from smoothq.cli import main
from tests.conftest import RECIPES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    """Run `smoothq ARGUMENTS`: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["smoothq", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


QUICK = ("--calibration", "builtin", "--samples", 4, "--sequence-length", 32)


@pytest.fixture
def model(float_checkpoint) -> Path:
    return float_checkpoint("llama")


def test_quantize_eval_generate(run, model, tmp_path) -> None:
    out = tmp_path / "out"
    code, text, log = run("quantize", model, "-o", out, "--w8a8", *QUICK)
    assert code == 0, log
    for label in ("method", "bits per weight", "bits per activation", "size", "peak memory"):
        assert label in text
    assert "3/3" in log

    arguments = ("--text", "builtin", "--windows", 3, "--sequence-length", 32)
    code, text, log = run("eval", out, *arguments, "--json")
    assert code == 0, log
    figure = json.loads(text)
    assert (figure["windows"], figure["tokens"]) == (3, 93)
    assert 1 < figure["perplexity"] < 1e6
    code, text, _ = run("eval", out, *arguments)
    assert f"{figure['perplexity']:.4f}" in text

    code, text, log = run("generate", out, "Hello", "--no-chat", "--max-new-tokens", 4)
    assert code == 0, log
    assert "H" in text


def test_a_quantized_cache_is_in_the_table_and_generates(run, model, tmp_path) -> None:
    out = tmp_path / "out"
    flags = ("--w8a8", "--method", "rtn", "--kv-bits", 4, "--attention", "int8")
    code, text, log = run("quantize", model, "-o", out, *flags)
    assert code == 0, log
    assert "bits per cached key and value" in text
    recipe = json.loads((out / "config.json").read_text())["quantization_config"]["recipe"]
    assert recipe["kv_cache"]["bits"] == 4
    assert recipe["attention"] == "int8"
    code, _, log = run("generate", out, "Hello", "--no-chat", "--max-new-tokens", 4)
    assert code == 0, log


def test_json_carries_recipe_bits_and_sizes(run, model, tmp_path) -> None:
    code, text, log = run("quantize", model, "-o", tmp_path / "out", "--w8a8", *QUICK, "--json")
    assert code == 0, log
    figures = json.loads(text)
    assert figures["recipe"]["smoothing"]["alpha"] == 0.5
    assert figures["bits"]["weight"] > 8
    assert figures["bytes_after"] < figures["bytes_before"]


def test_flags_edit_single_fields_of_the_preset(run, model, tmp_path) -> None:
    code, _, log = run(
        *("quantize", model, "-o", tmp_path / "out", "--w4a8", *QUICK),
        *("--group-size", 16, "--alpha", 0.75, "--seed", 3, "--rounding", "rtn"),
    )
    assert code == 0, log
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    recipe = config["quantization_config"]["recipe"]
    assert recipe["weights"]["group_size"] == 16
    assert recipe["weights"]["rounding"] == "rtn"
    assert recipe["smoothing"]["alpha"] == 0.75
    assert (recipe["seed"], recipe["calibration"]["samples"]) == (3, 4)


@pytest.mark.parametrize(
    ("scales", "granularity", "static"),
    [("token", "token", False), ("tensor", "tensor", False), ("static", "tensor", True)],
)
def test_the_three_levels_of_smoothquant(run, model, tmp_path, scales, granularity, static) -> None:
    flags = ("--w8a8", "--activation-scales", scales, *QUICK, "--json")
    code, text, log = run("quantize", model, "-o", tmp_path / "out", *flags)
    assert code == 0, log
    activations = json.loads(text)["recipe"]["activations"]
    assert (activations["granularity"], activations["static"]) == (granularity, static)


def test_w4a4_says_what_w4a8_would_cost(run, model, tmp_path) -> None:
    method = ("--w4a4", "--method", "smoothrot", "--rounding", "rtn")
    code, text, log = run("quantize", model, "-o", tmp_path / "out", *method, *QUICK)
    assert code == 0, log
    assert "int8 operands" in text
    assert f"smoothq quantize {model} --w4a8 -o OUT" in text


def test_effort_trades_steps_of_tuning_and_text(run, model, tmp_path) -> None:
    steps, samples, seconds = [], [], []
    for effort in ("fast", "default", "best"):
        flags = ("--w4a8", "--group-size", 16, "--effort", effort, "--dry-run", "--json")
        code, text, log = run("quantize", model, "-o", tmp_path / "out", *flags)
        assert code == 0, log
        figures = json.loads(text)
        tuning = figures["recipe"]["tuning"]
        steps.append(tuning["steps"] if tuning else 0)
        samples.append(figures["recipe"]["calibration"]["samples"])
        seconds.append(figures["estimated_seconds"])
    assert steps[0] == 0
    assert steps == sorted(set(steps))
    assert samples == sorted(samples)
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_a_dry_run_says_what_the_run_then_comes_to_and_writes_nothing(run, model, tmp_path) -> None:
    command = ("quantize", model, "-o", tmp_path / "out", "--w8a8", *QUICK)
    code, text, log = run(*command, "--dry-run", "--json")
    assert code == 0, log
    planned = json.loads(text)
    assert list(tmp_path.iterdir()) == []
    code, text, _ = run(*command, "--dry-run")
    assert "time, estimated for this machine" in text
    _, text, _ = run(*command, "--json")
    made = json.loads(text)
    for figure in ("recipe", "bits", "bytes_before", "bytes_after", "linear_bytes", "causal"):
        assert planned[figure] == made[figure], figure


def test_a_recipe_file_replaces_the_presets(run, model, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPES["w4a4"].to_yaml())
    assert load_recipe(file) == RECIPES["w4a4"]
    code, _, log = run("quantize", model, "-o", tmp_path / "out", "--recipe", file, *QUICK)
    assert code == 0, log
    code, _, log = run("quantize", model, "-o", tmp_path / "o2", "--recipe", file, "--w8a8")
    assert code == 2
    assert "--recipe" in log


@pytest.mark.parametrize("presets", [(), ("--w8a8", "--w4a4")])
def test_exactly_one_preset_is_wanted(run, model, tmp_path, presets) -> None:
    code, _, log = run("quantize", model, "-o", tmp_path / "out", *presets)
    assert code == 2
    assert "--w8a8" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--w8a8", "--method", "rrs"), "rrs"),
        (("--w8a8", "--effort", "best"), "--effort best"),
        (("--w4a4", "--method", "quarot", "--effort", "fast"), "--effort fast"),
        (("--w8a8", "--smooth-scope", "token"), "runtime smoothing"),
        (("--w4a16", "--group-size", "37"), "37 does not divide"),
        (("--w4a16", "--group-size", "many"), "group_size"),
        (("--w8a8", "--alpha", "1.5"), "alpha"),
        (("--w4a4", "--activation-scales", "static"), "per token"),
        (("--w8a8", "--a-bits", "3"), "activations.bits"),
        (("--w8a8", "--device", "cuda"), "cuda"),
        (("--w8a8", "--calibration", "no-such-file.txt"), "no-such-file.txt"),
        (("--w8a8", "--calibration", "builtin", "--sequence-length", "100000000"), "100000000"),
        (("--recipe", "no-such-recipe.yaml"), "no-such-recipe.yaml"),
    ],
)
def test_bad_input_is_one_line_exit_1_and_leaves_nothing(
    run, model, tmp_path, arguments, message
) -> None:
    out = tmp_path / "out"
    code, text, log = run("quantize", model, "-o", out, *arguments)
    assert code == 1, log
    lines = [line for line in log.splitlines() if line.startswith("smoothq: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert text == ""
    assert list(tmp_path.iterdir()) == []


def test_an_empty_calibration_file_is_refused(run, model, tmp_path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    out = tmp_path / "out"
    code, _, log = run("quantize", model, "-o", out, "--w8a8", "--calibration", empty)
    assert code == 1
    assert "empty.txt" in log
    assert list(tmp_path.iterdir()) == [empty]


def test_a_model_that_does_not_exist_is_refused(run, tmp_path) -> None:
    for command in (("quantize", "./nowhere", "-o", tmp_path / "out", "--w8a8"), ("eval", "./no")):
        code, _, log = run(*command)
        assert code == 1
        assert "is not a directory" in log


def test_debug_shows_the_traceback(run, tmp_path) -> None:
    from smoothq.errors import CheckpointError

    with pytest.raises(CheckpointError):
        run("quantize", "./nowhere", "-o", tmp_path / "out", "--w8a8", "--debug")


def test_a_yaml_recipe_with_an_unknown_field_names_it(run, model, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("weights: {bits: 4, colour: red}\n")
    code, _, log = run("quantize", model, "-o", tmp_path / "out", "--recipe", file)
    assert code == 1
    assert "weights.colour" in log


def test_eval_of_a_damaged_checkpoint_is_one_line(run, model, tmp_path) -> None:
    out = tmp_path / "out"
    assert run("quantize", model, "-o", out, "--w8a8", "--method", "rtn")[0] == 0
    tensors = load_file(out / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    code, _, log = run("eval", out, "--text", "builtin", "--sequence-length", 32)
    assert code == 1
    assert "model.layers.0.mlp.up_proj.weight" in log


def test_a_gguf_file_is_quantized_through_transformers(run, model, tmp_path) -> None:
    missing = run("quantize", model, "--gguf-file", "no.gguf", "-o", tmp_path / "o", "--w8a8")
    assert missing[0] == 1
    assert "no.gguf" in missing[2]


def test_the_card_and_the_tokenizer_travel_with_the_checkpoint(run, model, tmp_path) -> None:
    out = tmp_path / "out"
    assert run("quantize", model, "-o", out, "--w8a8", "--method", "rtn")[0] == 0
    card = (out / "README.md").read_text()
    assert "w8a8-rtn" in card
    assert "import smoothq" in card
    assert (out / "tokenizer.json").is_file()
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32


def test_layers_kept_embeddings_in_8_bits_and_alpha_searched(run, model, tmp_path) -> None:
    flags = ("--w8a8", "--keep", "*.layers.0.*", "--keep", "*.o_proj", "--embeddings", 8)
    more = ("--alpha", "auto", "--smooth-quantile", 0.99, "--json")
    code, text, log = run("quantize", model, "-o", tmp_path / "out", *flags, *more, *QUICK)
    assert code == 0, log
    recipe = json.loads(text)["recipe"]
    assert recipe["keep"] == ["*.layers.0.*", "*.o_proj"]
    assert recipe["embeddings"] == 8
    assert recipe["smoothing"]["alpha"] == "auto"
    assert recipe["smoothing"]["quantile"] == 0.99
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.int8
    assert stored["model.layers.0.mlp.up_proj.weight"].is_floating_point()
    assert stored["model.layers.1.self_attn.o_proj.weight"].is_floating_point()
    assert stored["model.layers.1.mlp.up_proj.weight"].dtype == torch.int8
    code, _, log = run("quantize", model, "-o", tmp_path / "no", "--w8a8", "--keep", "lm_haed")
    assert code == 1
    assert "matches no linear" in log
    assert not (tmp_path / "no").exists()


def test_families_prints_the_table_and_finds_a_wiring(run, model) -> None:
    code, text, _ = run("families")
    assert code == 0
    assert "qwen2_moe" in text
    code, text, _ = run("families", "--infer", model)
    assert code == 0
    assert 'FAMILY = Family(("llama",), _block' in text
    code, text, log = run("families", "--infer", "/no/such/model")
    assert (code, text) == (1, "")
    assert "/no/such/model" in log


def test_a_stopped_run_goes_on_by_the_same_command(run, model, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    command = ("quantize", model, "-o", out, "--w8a8", *QUICK)
    begun: list[int] = []

    def stopping(self: object, done: int, total: int, stage: str) -> None:
        begun.append(done)
        if done == 2 and begun.count(2) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("smoothq.cli._PlainProgress.__call__", stopping)
    assert run(*command)[0] == 130
    assert not out.exists()
    code, _, log = run(*command, "--alpha", 0.6)
    assert code == 1
    assert "recipe differs" in log
    begun.clear()
    begun.append(2)
    code, _, log = run(*command, "--resume")
    assert code == 0, log
    assert set(begun) == {2}
    code, text, log = run("verify", out)
    assert code == 0, log
    assert "is whole" in text


def test_verify_names_what_is_damaged(run, model, tmp_path) -> None:
    out = tmp_path / "out"
    assert run("quantize", model, "-o", out, "--w8a8", "--method", "rtn")[0] == 0
    figures = json.loads(run("verify", out, "--json")[1])
    assert figures["tensors"] == len(load_file(out / "model.safetensors"))
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    code, _, log = run("verify", out)
    assert code == 1
    assert "is not what was written" in log


@pytest.mark.parametrize(
    ("amount", "code", "message"),
    [("much", 2, "no amount"), ("1MB", 1, "too little"), ("9GB", 0, "")],
)
def test_max_memory_is_kept_or_refused(run, model, tmp_path, amount, code, message) -> None:
    out = tmp_path / "out"
    found, _, log = run("quantize", model, "-o", out, "--w8a8", *QUICK, "--max-memory", amount)
    assert found == code, log
    assert message in log
    assert out.exists() == (code == 0)
