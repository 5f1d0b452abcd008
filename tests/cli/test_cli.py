"""The command line on a tiny model: what it prints, what it refuses, with which exit code."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from smoothq import load_recipe
from smoothq.cli.commands import app
from tests import fake_hub
from tests.conftest import RECIPES

pytestmark = pytest.mark.usefixtures("short_text")

SMALL = ("--group-size", 16, "--calibration", "builtin", "--samples", 4, "--sequence-length", 32)
QUICK = ("--calibration", "builtin", "--samples", 4, "--sequence-length", 32, "--no-check")


@pytest.fixture
def model(float_checkpoint) -> Path:
    return float_checkpoint("llama")


def test_quantize_eval_generate(run, model, tmp_path) -> None:
    out = tmp_path / "out"
    code, text, log = run("quantize", model, "-o", out, "--w8a8", *QUICK, "--check")
    assert code == 0, log
    for label in ("method", "bits per weight", "bits per activation", "size", "peak memory"):
        assert label in text
    assert "3/3" in log

    arguments = ("--text", "builtin", "--windows", 3, "--sequence-length", 32)
    code, text, log = run("eval", out, *arguments, "--json")
    assert code == 0, log
    figure = json.loads(text)["texts"][0]
    assert (figure["windows"], figure["tokens"]) == (3, 93)
    assert 1 < figure["perplexity"] < 1e6
    code, text, _ = run("eval", out, *arguments)
    assert f"{figure['perplexity']:.4f}" in text

    code, text, log = run("generate", out, "Hello", "--no-chat", "--max-new-tokens", 4)
    assert code == 0, log
    loaded = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("Hello", return_tensors="pt")
    expected = loaded.generate(**prompt, max_new_tokens=4, do_sample=False)[0]
    assert text.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert text.startswith(tokenizer.decode(prompt["input_ids"][0]))


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
    code, text, log = run(
        "quantize", model, "-o", tmp_path / "out", *flags, *more, *QUICK, "--check"
    )
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


def test_models_prints_the_families_with_a_file(run) -> None:
    code, text, _ = run("models")
    assert code == 0
    assert "qwen2_moe" in text
    code, text, _ = run("models", "--json")
    assert {row["model type"]: row["experts"] for row in json.loads(text)}[
        "mixtral"
    ] == "each layer"


def test_models_says_which_claims_hold_for_a_model(run, model) -> None:
    code, text, _ = run("models", model)
    assert code == 0
    for fact in ("LlamaForCausalLM", "families.llama", "offline", "norms: input_layernorm"):
        assert fact in text
    code, text, _ = run("models", model / "config.json", "--json")
    claims = json.loads(text)
    assert (claims["source"], claims["stream"]) == (
        "smoothq.architectures.families.llama",
        "offline",
    )
    (block,) = claims["blocks"]
    shared = [site["linears"] for site in block["sites"]]
    assert ["mlp.gate_proj", "mlp.up_proj"] in shared
    assert [site["edge"] for site in block["sites"]] == [
        *("norms", "value_output"),
        *("norms", "up_down"),
    ]
    assert not claims["floats"]


def test_models_finds_what_no_file_says(run, tmp_path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"layer_types": ["conv", "full_attention"], "pad_token_id": 0}
    AutoConfig.for_model("lfm2", **sizes, **heads, **layers).save_pretrained(tmp_path)
    code, text, log = run("models", tmp_path, "--json")
    assert code == 0, log
    claims = json.loads(text)
    assert "experiments" in claims["source"]
    assert [block["indices"] for block in claims["blocks"]] == [[0], [1]]
    assert claims["floats"]["*.conv.conv"] == "a convolution"
    assert {"query": 4, "key_value": 2, "dim": 16} in claims["heads"]


@pytest.mark.slow
def test_models_takes_a_model_type_for_its_default_sizes(run) -> None:
    code, text, log = run("models", "qwen3_moe", "--json")
    assert code == 0, log
    claims = json.loads(text)
    assert claims["experts"]["mlp.experts"].startswith("128, ")
    assert len({site["name"] for site in claims["blocks"][0]["sites"]}) < 8  # all experts are one
    assert "*.mlp.gate" in claims["floats"]


def test_models_prints_a_wiring_as_a_file_by_its_earlier_name_too(run, model) -> None:
    code, text, _ = run("models", model, "--python")
    assert code == 0
    assert 'FAMILY = Family(("llama",), _block' in text
    for earlier in (("models", "--infer", model), ("families", "--infer", model)):
        assert run(*earlier)[:2] == (0, text)
    assert "smoothq families is now smoothq models" in run("families")[2]


def test_models_refuses_what_is_no_model(run) -> None:
    code, text, log = run("models", "/no/such/model")
    assert (code, text) == (1, "")
    assert "/no/such/model" in log
    assert run("models", "--python")[0] == 2


def test_a_stopped_run_goes_on_by_the_same_command(run, model, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    command = ("quantize", model, "-o", out, "--w8a8", *QUICK)
    begun: list[int] = []

    def stopping(self: object, done: int, total: int, stage: str) -> None:
        begun.append(done)
        if done == 2 and begun.count(2) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("smoothq.cli.terminal.PlainProgress.__call__", stopping)
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


def test_a_run_is_watched_and_stopped_where_it_goes_wrong(run, model, tmp_path) -> None:
    out = tmp_path / "out"
    command = ("quantize", model, "-o", out, "--w4a4", "--method", "rtn", "--probe-text", "builtin")
    code, _, log = run(*command, "--probe-every", 1, "--stop-above", 0.5)
    assert code == 1
    assert "after block 0 perplexity is" in log
    assert not out.exists()
    assert out.with_name("out.partial").exists()
    code, _, log = run(*command, "--probe-every", 2, "--resume")
    assert code == 0, log
    assert re.findall(r"block (\d): perplexity", log) == ["1", "2"]
    assert out.exists()
    code, _, log = run(*command, "--stop-above", 2)
    assert code == 2
    assert "--probe-every" in log


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
    found, _, log = run(
        "quantize", model, "-o", out, "--w8a8", *QUICK, "--check", "--max-memory", amount
    )
    assert found == code, log
    assert message in log
    assert out.exists() == (code == 0)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer) -> Path:
    """A directory with a float MODEL and, from the first example that makes it, a quantized OUT."""
    place = tmp_path_factory.mktemp("examples")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **heads, vocab_size=len(tokenizer), tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "MODEL")
    tokenizer.save_pretrained(place / "MODEL")
    return place


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[str]:
    """The URL of a local hub."""
    with fake_hub.serving(tmp_path_factory.mktemp("hub")) as layer_kernels:
        yield layer_kernels.url


def _examples() -> list[str]:
    """The example of every command's help, that which makes OUT first."""
    commands = [command.callback for command in app.registered_commands if not command.hidden]
    found = [re.search(r"Example: smoothq (.*)", command.__doc__ or "") for command in commands]
    return [match[1] if match else "" for match in found]


def test_every_command_has_an_example() -> None:
    examples = _examples()
    assert all(examples)
    assert examples[0].startswith("quantize MODEL")


def _with_marks(example: str) -> object:
    """An example as a parameter; drawing figures takes long."""
    name = example.split()[0]
    return pytest.param(example, id=name, marks=[pytest.mark.slow] * (name == "inspect"))


@pytest.mark.parametrize("example", [_with_marks(example) for example in _examples() if example])
def test_an_example_of_the_help_runs_as_written(
    run, workplace, monkeypatch, hub, tmp_path, example
) -> None:
    monkeypatch.chdir(workplace)
    if example.startswith("push"):
        monkeypatch.setattr(fake_hub, "OWNER", "owner")
        fake_hub.connect(monkeypatch, hub, tmp_path)
    if "OUT" in example and not example.startswith("quantize") and not Path("OUT").exists():
        assert run("quantize", "MODEL", "-o", "OUT", "--w8a8", *QUICK)[0] == 0
    if example.startswith("quantize"):
        shutil.rmtree("OUT", ignore_errors=True)
    code, text, log = run(*shlex.split(example))
    assert code == 0, log
    assert text
    made = re.search(r"-o (\S+)", example)
    assert made is None or Path(made[1]).exists()


def test_sensitivity_chooses_among_the_formats_of_presets(run, model, tmp_path) -> None:
    recipe = tmp_path / "mixed.yaml"
    text = ("--calibration", "builtin", "--windows", 1, "--window-length", 24)
    flags = ("--nvfp4", "--among", "w4a16-nvfp4,fp8", "--budget", 6, "-o", recipe)
    code, told, log = run("sensitivity", model, *text, *flags)
    assert code == 0, log
    assert "KL at fp8" in told
    bits = json.loads(run("plan", model, "--recipe", recipe, "--json")[1])["bits"]["weight"]
    assert 5 < bits <= 6
    code, _, log = run("sensitivity", model, *text, "--nvfp4", "--among", "fp9")
    assert code == 1
    assert "no preset 'fp9'" in log


def test_plan_says_who_can_run_it_and_what_it_costs(run, model, tmp_path) -> None:
    code, text, log = run("plan", model, "--w4a4", "--group-size", 16, "--json")
    assert code == 0, log
    figures = json.loads(text)
    dry = ("--w4a4", "--group-size", 16, "--dry-run", "--json")
    planned = json.loads(run("quantize", model, "-o", tmp_path / "out", *dry)[1])
    for figure in ("recipe", "bits", "bytes_after", "linear_bytes"):
        assert figures[figure] == planned[figure], figure
    ahead = figures["outlook"]
    runners = {each["name"].partition(" ")[0]: each for each in ahead["runners"]}
    assert "hadamard_quantize" in runners["A100"]["how"]
    assert runners["A100"]["runs"]
    costs = {each["name"]: each for each in ahead["costs"]}
    assert costs["w8a8"]["products"] == "int8"
    assert "4-bit codes" in costs["as asked"]["products"]
    assert costs["as asked"]["read"] < costs["w8a8"]["read"] < costs["float"]["read"]
    assert costs["as asked"]["nbytes"] == figures["bytes_after"]
    assert "group size 32 does not divide 48" in ahead["refused"]["w4a8"]
    code, text, log = run("plan", model, "--w8a8")
    assert code == 0, log
    for label in ("Who can run it", "w8a8, as asked", "data sheets", "cannot take"):
        assert label in text


def test_plan_needs_a_config_alone(run, model, tmp_path) -> None:
    shutil.copy(model / "config.json", tmp_path)
    assert run("plan", tmp_path, "--w8a8")[0] == 0
    (tmp_path / "config.json").unlink()
    code, _, log = run("plan", tmp_path, "--w8a8")
    assert code == 1
    assert "no config.json" in log


def test_eval_on_two_texts_against_the_float_model(run, model, tmp_path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.txt"
    assert run("quantize", model, "-o", out, "--w8a8", "--method", "rtn")[0] == 0
    other.write_text("It is another text. " * 30)
    texts = ("--text", "builtin", "--text", other, "--windows", 2, "--sequence-length", 32)
    flags = (*texts, "--against", model, "--decode-tokens", 12)
    code, text, log = run("eval", out, *flags, "--json")
    assert code == 0, log
    figures = json.loads(text)
    assert [Path(each["text"]).name for each in figures["texts"]] == ["builtin", "other.txt"]
    for each in figures["texts"]:
        assert each["perplexity_ratio"] == pytest.approx(1, abs=0.05)
        ratio = each["perplexity"] / each["reference_perplexity"]
        assert each["perplexity_ratio"] == ratio
        assert 0 < each["divergence"] < 0.05
        assert each["top1"] > 0.8
    assert figures["decode"]["tokens"] == 12
    assert figures["decode"]["divergence"] < 1e-3
    code, text, _ = run("eval", out, *flags, "--markdown")
    assert code == 0
    assert text.startswith(f"|  | {out} |")
    assert "| KL to it, nats a token |" in text
    code, _, log = run("eval", out, "--tasks", "x", "--against", model)
    assert code == 1
    assert "agreement needs a text" in log


def test_inspect_prints_the_worst_sites_and_writes_figures(run, model, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    flags = ("--text", "builtin", "--sequences", 2, "--sequence-length", 16)
    code, text, log = run("inspect", model, *flags)
    assert code == 0, log
    assert "kurtosis" in text
    code, text, log = run("inspect", model, *flags, "--bits", "w8a8", "--json")
    assert code == 0, log
    assert len(json.loads(text)["sites"]) == 12
    code, _, log = run("inspect", model, *flags, "--block", 1, "--site", "nowhere")
    assert code == 1
    assert "sites are qkv" in log


def test_a_missing_optional_package_is_named_before_any_work(run, model, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command, extra in (
        (("inspect", model, "-o", "report.html"), "plots"),
        (("compare", model, "-o", "sizes.png"), "plots"),
        (("eval", model, "--tasks", "arc_easy"), "eval"),
        (("export", model, "--format", "gguf", "-o", "model.gguf"), "gguf"),
    ):
        code, _, log = run(*command)
        assert code == 1
        assert f"pip install 'smoothq[{extra}]'" in log


@pytest.mark.slow
def test_compare_shows_sizes_losses_speeds_and_differences(run, model, tmp_path) -> None:
    eight, four = tmp_path / "eight", tmp_path / "four"
    assert run("quantize", model, "-o", eight, "--w8a8", "--method", "rtn")[0] == 0
    assert run("quantize", model, "-o", four, "--w4a4", "--method", "rtn")[0] == 0
    flags = ("--text", "builtin", "--windows", 2, "--sequence-length", 32, "--against", model)
    code, text, log = run("compare", model, eight, four, *flags, "--json")
    assert code == 0, log
    plain, first, second = json.loads(text)
    assert plain["recipe"] is None
    assert plain["texts"][0]["divergence"] == pytest.approx(0, abs=1e-6)
    assert 0 < first["texts"][0]["divergence"] < second["texts"][0]["divergence"]
    assert first["bits"]["weight"] > second["bits"]["weight"]
    assert plain["stored_bytes"] > first["stored_bytes"] > second["stored_bytes"]
    assert first["held_bytes"] >= first["stored_bytes"] * 0.8
    for each in (plain, first, second):
        assert each["prefill_tokens_per_second"] > 0
        assert each["decode_tokens_per_second"] > 0
    code, text, _ = run("compare", eight, four, *flags, "--markdown")
    assert code == 0
    assert "| weights.bits | 8 | 4 |" in text
    assert "| seed |" not in text
    code, _, log = run("compare", eight, eight, *flags)
    assert code == 1
    assert "twice" in log


def test_export_and_what_vllm_makes_of_it(run, model, tmp_path) -> None:
    own, export = tmp_path / "own", tmp_path / "export"
    assert run("quantize", model, "-o", own, "--w4a8", "--servable", *SMALL)[0] == 0
    code, text, log = run("export", own, "-o", export, "--json")
    assert code == 0, log
    assert json.loads(text)["schemes"] == {"W4A8 group 16": 21}
    code, text, _ = run("export", own, "-o", export, "--overwrite")
    assert code == 0
    for label in ("W4A8 group 16: 21", "a head of its own", "smoothq plan"):
        assert label in text
    code, text, _ = run("plan", export, "--json")
    assert code == 0
    layers = {each["layers"]: each for each in json.loads(text)}
    assert set(layers) == {"qkv", "o", "gate_up", "down"}
    assert layers["qkv"]["shape"] == [128, 48]
    code, text, _ = run("plan", export)
    assert code == 0
    assert "Kernels that vLLM" in text


def test_a_gguf_file_is_for_llama_cpp(run, model, tmp_path) -> None:
    own, file = tmp_path / "own", tmp_path / "model.gguf"
    assert run("quantize", model, "-o", own, "--w8a8", *QUICK)[0] == 0
    code, _, log = run("export", own, "--format", "gguf", "-o", file)
    assert code == 1
    assert "has no place in GGUF: its rows of 48 are no multiple of 32" in log
    assert list(tmp_path.iterdir()) == [own]


def test_quantize_straight_into_the_format(run, model, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ("quantize", model, "-o", out, "--w4a4", *SMALL, "--format", "compressed-tensors")
    code, _, log = run(*arguments)
    assert code == 1
    assert "rotated while the model runs (take rotation.down: false)" in log
    assert not any(tmp_path.iterdir())
    code, text, log = run(*arguments, "--servable", "--json")
    assert code == 0, log
    for changed in ("runtime_smoothing: null", "rotation.down: false", "perplexity from 24.89 to"):
        assert changed in log
    assert json.loads(text)["export"]["schemes"] == {"W4A4 group 16": 21}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    card = (out / "README.md").read_text()
    for text in ("vllm serve PATH", "W4A4 group 16: 21", "bits per weight", "runtime_smoothing"):
        assert text in card
    assert "import smoothq" not in card
    code, text, log = run(*arguments, "--servable")
    assert code == 0, log
    assert "is done" in text
    code, _, log = run(*arguments, "--servable", "--seed", 1)
    assert code == 1
    assert "not empty" in log


def test_plan_of_a_servable_recipe_names_vllm(run, model) -> None:
    arguments = ("plan", model, "--w4a16", "--group-size", 16, "--json")
    for flags, runs in (((), False), (("--servable",), True)):
        code, text, log = run(*arguments, *flags)
        assert code == 0, log
        runners = {each["name"]: each["runs"] for each in json.loads(text)["outlook"]["runners"]}
        assert runners["transformers without smoothq, vLLM"] == runs
        assert runners["vLLM with smoothq installed"]


def test_asymmetric_weights_need_float_activations(run, model, tmp_path) -> None:
    arguments = ("quantize", model, "-o", tmp_path / "out", "--asymmetric", *SMALL)
    code, _, log = run(*arguments, "--w4a8")
    assert code == 1
    assert "zero points need float activations" in log
    assert run(*arguments, "--w4a16")[0] == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.endswith("weight_zero_point") for name in stored)


def test_push_needs_json_of_an_evaluation(run, model, tmp_path) -> None:
    (tmp_path / "figures").write_text("no JSON")
    code, _, log = run("push", model, "owner/name", "--eval", tmp_path / "figures")
    assert code == 1
    assert "cannot be read as JSON" in log


@pytest.mark.parametrize("command", ["eval", "compare"])
def test_a_reference_of_another_vocabulary_is_refused_before_work(
    run, model, tmp_path, command
) -> None:
    other = AutoModelForCausalLM.from_pretrained(model)
    other.resize_token_embeddings(104)
    other.save_pretrained(tmp_path / "other")
    for file in model.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "other")
    text = ("--text", "builtin", "--windows", 1, "--sequence-length", 32)
    code, out, log = run(command, model, "--against", tmp_path / "other", *text)
    assert (code, out) == (1, "")
    assert "predicts 97 tokens and" in log
    assert "Traceback" not in log


def test_a_reference_that_reads_text_otherwise_is_refused(run, model, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    spec = json.loads((other / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    text = ("--text", "builtin", "--windows", 1, "--sequence-length", 32)
    code, _, log = run("eval", model, "--against", other, *text)
    assert code == 1
    assert "compared between models of one vocabulary" in " ".join(log.split())


def test_generation_ends_with_the_models_positions(run, float_checkpoint) -> None:
    model = float_checkpoint("gpt2")
    code, _, log = run("generate", model, "x" * 60, "--no-chat", "--max-new-tokens", 9)
    assert code == 0, log
    assert "4 new tokens at most" in log
    code, _, log = run("generate", model, "x" * 70, "--no-chat", "--max-new-tokens", 9)
    assert code == 1
    assert "the prompt has 70 tokens" in log
