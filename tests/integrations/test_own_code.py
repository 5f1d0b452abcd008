"""Models with code of their own beside the weights: run where it is trusted, else one line."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from smoothq import preset, quantize
from smoothq.checkpoint.model_config import read_config
from smoothq.errors import CheckpointError, SmoothqError, UnsupportedModelError
from smoothq.evaluation.load import load_model
from smoothq.export import export_checkpoint
from smoothq.verify import verify_checkpoint
from tests.tiny_classes import write_own_code

RTN = preset("w8a8", "rtn")
IDS = torch.arange(2, 20)[None]
# A type that transformers does not know, and a class of its own of one that it knows.
TYPES = ["own", "llama"]


@pytest.fixture
def directory(request, tmp_path: Path, float_checkpoint: Callable[[str], Path]) -> Path:
    shutil.copytree(float_checkpoint("llama"), tmp_path / "float")
    write_own_code(tmp_path / "float", getattr(request, "param", "own"))
    return tmp_path / "float"


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


@pytest.mark.parametrize("directory", TYPES, indirect=True)
def test_code_that_is_trusted_is_quantized_and_loaded_again(directory: Path, tmp_path) -> None:
    out = tmp_path / "out"
    result = quantize(directory, RTN, output=out, trust_remote_code=True)
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    ours, _ = load_model(str(out), trust_remote_code=True)
    plain = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    with torch.no_grad():
        answers = [model(IDS).logits for model in (theirs, ours, result.load())]
        reference = plain(IDS).logits
    assert {type(model).__name__ for model in (theirs, ours, plain)} == {"OwnForCausalLM"}
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert (answers[0] - reference).norm() < 0.05 * reference.norm()
    assert theirs.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, IDS.shape[1] + 2)
    verify_checkpoint(out, trust_remote_code=True)


def test_the_output_carries_the_code(directory, tmp_path) -> None:
    out = tmp_path / "out"
    quantize(directory, RTN, output=out, trust_remote_code=True)
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"].endswith("modeling_own.OwnForCausalLM")
    assert (out / "modeling_own.py").read_text() == (directory / "modeling_own.py").read_text()
    shutil.rmtree(directory)
    assert load_model(str(out), trust_remote_code=True)[0].config.model_type == "own"


def test_models_are_compared_where_their_code_is_trusted(directory: Path, tmp_path, run) -> None:
    out = tmp_path / "out"
    quantize(directory, RTN, output=out, trust_remote_code=True)
    line = ("compare", directory, out, "--against", directory, "--text", "builtin", "--windows", 1)
    code, _, said = run(*line, "--sequence-length", 16)
    assert code == 1
    assert said.endswith("give --trust-remote-code\n")
    code, table, said = run(*line, "--sequence-length", 16, "--trust-remote-code", "--json")
    assert not code, said
    assert json.loads(table)[1]["recipe"]


@pytest.mark.parametrize("directory", TYPES, indirect=True)
def test_a_model_that_the_caller_loaded_is_trusted(directory: Path, tmp_path) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    quantize(model, RTN, output=tmp_path / "out")
    loaded, _ = load_model_without_tokenizer(tmp_path / "out")
    with torch.no_grad():
        error = (loaded(IDS).logits - model(IDS).logits).norm() / model(IDS).logits.norm()
    assert error < 0.05


def load_model_without_tokenizer(path: Path) -> tuple[PreTrainedModel, None]:
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True), None


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(SmoothqError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_code_that_is_not_trusted_is_not_run_and_nobody_is_asked(directory: Path, tmp_path) -> None:
    (directory / "modeling_own.py").write_text("raise SystemExit('run')")
    for call in (
        lambda: quantize(directory, RTN, output=tmp_path / "out"),
        lambda: read_config(str(directory)),
        lambda: load_model(str(directory)),
    ):
        message = refused(call)
        assert "has code of its own" in message
        assert message.endswith("give trust_remote_code=True")
    assert not (tmp_path / "out").exists()


def test_code_that_is_trusted_is_exported_with_the_model(directory: Path, tmp_path) -> None:
    out = tmp_path / "out"
    quantize(directory, RTN, output=out, format="compressed-tensors", trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    quantize(directory, RTN, output=tmp_path / "own", trust_remote_code=True)
    assert "has code of its own" in refused(
        lambda: export_checkpoint(tmp_path / "own", tmp_path / "again")
    )
    export_checkpoint(tmp_path / "own", tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        assert loaded(IDS).logits.isfinite().all()


def test_a_class_of_transformers_is_taken_for_a_type_that_it_knows(tmp_path, float_checkpoint):
    """The code beside it is left alone, as transformers does without the flag."""
    shutil.copytree(float_checkpoint("llama"), tmp_path / "float")
    write_own_code(tmp_path / "float", "llama")
    (tmp_path / "float" / "modeling_own.py").write_text("raise SystemExit('run')")
    quantize(tmp_path / "float", RTN, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_trust_in_one_directory_is_none_in_another(directory, tmp_path, float_checkpoint) -> None:
    quantize(directory, RTN, output=tmp_path / "out", trust_remote_code=True)
    shutil.copytree(directory, tmp_path / "other")
    (tmp_path / "other" / "modeling_own.py").write_text("raise SystemExit('run')")
    with pytest.raises(UnsupportedModelError, match="code of its own"):
        quantize(tmp_path / "other", RTN, output=tmp_path / "out2")


def test_the_code_of_a_tokenizer_needs_the_same_trust(tmp_path, float_checkpoint) -> None:
    shutil.copytree(float_checkpoint("llama"), tmp_path / "float")
    path = tmp_path / "float" / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(own))
    (tmp_path / "float" / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    with pytest.raises(CheckpointError, match="give trust_remote_code=True"):
        load_model(str(tmp_path / "float"))
    _, tokenizer = load_model(str(tmp_path / "float"), trust_remote_code=True)
    assert type(tokenizer).__name__ == "Own"


COMMANDS = {
    "quantize": ("quantize", "MODEL", "--w8a8", "--method", "rtn", "-o", "OUT"),
    "dry run": ("quantize", "MODEL", "--w8a8", "--method", "rtn", "-o", "OUT", "--dry-run"),
    "plan": ("plan", "MODEL", "--w8a8"),
    "eval": ("eval", "MODEL", "--text", "builtin", "--windows", "1", "--sequence-length", "16"),
    "generate": ("generate", "MODEL", "ab", "--max-new-tokens", "2", "--no-chat"),
    "inspect": (
        *("inspect", "MODEL", "--calibration", "builtin"),
        *("--sequences", "1", "--sequence-length", "16"),
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_the_flag_and_name_it(command, run, directory, tmp_path, short_text) -> None:
    words = {"MODEL": directory, "OUT": tmp_path / "out"}
    arguments = [words.get(word, word) for word in COMMANDS[command]]
    code, _, said = run(*arguments)
    assert code == 1
    assert "give --trust-remote-code" in " ".join(said.split())
    code, _, said = run(*arguments, "--trust-remote-code")
    assert code == 0, said
