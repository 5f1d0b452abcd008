"""Tiny models on disk, a tokenizer for them, and recipes that fit their widths."""

import os
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the processors

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from smoothq import Recipe, preset
from smoothq.cli import main
from tests.tiny_models import VOCABULARY, tiny_model

# The files that take longest: with several workers the others are shared out beside them.
LONGEST = (
    "test_compiled.py",
    "test_smollm2.py",
    "test_families.py",
    "test_reliability.py",
    "test_benchmarks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def recipes() -> dict[str, Recipe]:
    """Every preset's default and every method, at sizes that divide the tiny models' widths."""
    wanted = {
        "w8a8": preset("w8a8"),
        "w8a8-rtn": preset("w8a8", "rtn"),
        "w8a8-static": preset("w8a8").edit(
            activations__static=True, activations__granularity="tensor"
        ),
        "w8a8-tensor": preset("w8a8").edit(
            activations__granularity="tensor", weights__granularity="tensor"
        ),
        "w8a8-kv4": preset("w8a8", "rtn").edit(kv_cache={"bits": 4, "float_tokens": 2}),
        "w8a8-kv8-int8": preset("w8a8", "rtn").edit(kv_cache={"bits": 8}, attention="int8"),
        "w4a8": preset("w4a8"),
        "w4a4": preset("w4a4"),
        "w4a16": preset("w4a16"),
        "w4a16-float-groups": preset("w4a16").edit(
            weights__group_scale="float", rotation=None, smoothing=None, tuning=None
        ),
        "w4a16-asymmetric": preset("w4a16").edit(
            weights__group_scale="float", weights__symmetric=False
        ),
        "w4a4-quarot": preset("w4a4", "quarot"),
        "w4a4-smoothrot": preset("w4a4", "smoothrot"),
        "w4a4-rs": preset("w4a4", "rs"),
        "w4a4-rrs": preset("w4a4", "rrs"),
        "w4a4-rrs-calibrated": preset("w4a4", "rrs", "calibrated"),
        "w4a4-rrs-live": preset("w4a4", "rrs", "live"),
    }
    return {name: _shrunk(recipe) for name, recipe in wanted.items()}


def _shrunk(recipe: Recipe) -> Recipe:
    fields: dict[str, object] = {"calibration__source": "builtin"}
    if recipe.tuning is not None:
        fields["tuning__steps"] = 2  # both with a gradient; how well it tunes is test_tuning's
    if recipe.weights.granularity == "group":
        fields["weights__group_size"] = 16
    if recipe.runtime_smoothing is not None:
        fields["runtime_smoothing__group_size"] = 16
    return recipe.edit(**fields)


RECIPES = recipes()
CAUSAL = [name for name, recipe in RECIPES.items() if recipe.causal]
PRESETS = ["w8a8", "w4a8", "w4a4", "w4a16"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character; unknown ones become the last."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *string.printable[:94], "?!"])}
    assert len(vocabulary) == VOCABULARY
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?!"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def data() -> torch.Tensor:
    """Calibration tokens, int64 (6, 24)."""
    return torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def float_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """The directory of a tiny float32 model by the name of its wiring, made once."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("float") / name
            tiny_model(name, torch.float32).save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made[name]

    return of


@pytest.fixture(scope="module")
def short_text() -> Iterator[None]:
    """Cut the topics of the text `builtin` short: of a token a character there would be 270,000."""
    with pytest.MonkeyPatch.context() as patched:
        short = {name: text[:300] for name, text in topics.topics.items()}
        patched.setattr(topics, "topics", short)
        yield


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
