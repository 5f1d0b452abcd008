"""Models of other classes than causal LMs: the text model is quantized, all else is as it was."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from smoothq import QuantizeResult, Recipe, preset, quantize
from smoothq.architectures import _BY_MODEL_TYPE, BlockGraph, Family, Site
from smoothq.architectures.parts import weights
from smoothq.errors import CalibrationError, RecipeError, UnsupportedModelError
from smoothq.evaluation.evaluate import evaluate
from smoothq.evaluation.generate import stream_text
from smoothq.evaluation.load import load_model
from smoothq.evaluation.perplexity import perplexity
from smoothq.export import export_checkpoint
from smoothq.modules import QuantizedLinear
from smoothq.pipeline.monitor import Probe
from smoothq.verify import verify_checkpoint
from tests.conftest import RECIPES
from tests.tiny_classes import CLASSES, answer, tiny_class

TOWERS = ["llava", "qwen2_5_vl", "qwen2_audio"]
HEADLESS = [name for name in CLASSES if name not in TOWERS]
AUTO: dict[str, type] = {
    "llava": AutoModelForImageTextToText,
    "qwen2_5_vl": AutoModelForImageTextToText,
    "qwen2_audio": AutoModelForMultimodalLM,
    "reward model": AutoModelForSequenceClassification,
    "classifier": AutoModelForSequenceClassification,
}
RTN = preset("w8a8", "rtn")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")


@dataclass
class Made:
    float_directory: Path
    directory: Path
    result: QuantizeResult

    def load(self, auto: Any) -> PreTrainedModel:
        return auto.from_pretrained(self.directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer) -> Callable[[str, str], Made]:
    """The quantized directory of a class and a recipe, made once."""
    done: dict[tuple[str, str], Made] = {}
    data = torch.randint(0, 93, (6, 24), generator=torch.Generator().manual_seed(5))

    def of(name: str, recipe: str = "w4a16") -> Made:
        if (name, recipe) not in done:
            folder = tmp_path_factory.mktemp("classes")
            tiny_class(name).save_pretrained(folder / "float")
            tokenizer.save_pretrained(folder / "float")
            for file in PROCESSOR_FILES:
                (folder / "float" / file).write_text("{}")
            out = folder / "out"
            result = quantize(folder / "float", RECIPES[recipe], data=data, output=out)
            done[name, recipe] = Made(folder / "float", out, result)
        return done[name, recipe]

    return of


def stored(directory: Path) -> dict[str, Tensor]:
    return {
        name: value
        for path in directory.glob("*.safetensors")
        for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "w4a4-quarot"])
def test_a_model_of_any_class_is_quantized_and_loaded_as_that_class(name, recipe, made) -> None:
    done, model = made(name, recipe), tiny_class(name)
    loaded = done.load(AUTO.get(name, AutoModel))
    assert type(loaded) is type(model)
    assert AutoConfig.from_pretrained(done.directory).architectures == [type(model).__name__]
    linears = [module for module in loaded.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) in (3 * 7, 3 * 6, 3 * 4)
    reference = answer(model, name)
    error = float((answer(loaded, name) - reference).norm() / reference.norm())
    assert error < {"w8a8": 0.05, "w4a16": 0.7, "w4a4-quarot": 0.7}[recipe]
    verify_checkpoint(done.directory)


@pytest.mark.parametrize("name", CLASSES)
def test_it_computes_what_its_float_form_computes_also_with_images_and_sound(name, made) -> None:
    """Of weights alone quantized, the float model of transformers' modules is the same function."""
    loaded = made(name).load(AUTO.get(name, AutoModel))
    quantized = answer(loaded, name)
    torch.testing.assert_close(answer(loaded.dequantize(), name), quantized, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TOWERS)
def test_what_is_not_text_is_stored_as_it_was(name, made) -> None:
    loaded = made(name, "w4a4-quarot").load(AUTO[name]).state_dict()
    towers = {
        key: value
        for key, value in tiny_class(name).state_dict().items()
        if "language_model" not in key and "lm_head" not in key
    }
    assert any("vision" in key or "visual" in key or "audio" in key for key in towers)
    for key, value in towers.items():
        assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize("name", TOWERS)
def test_processor_files_go_along(name, made) -> None:
    assert all((made(name).directory / file).is_file() for file in PROCESSOR_FILES)


@pytest.mark.parametrize("name", ["llava", "reward model", "embedder"])
def test_it_is_saved_and_loaded_again(name, made, tmp_path) -> None:
    loaded = made(name).load(AUTO.get(name, AutoModel))
    loaded.save_pretrained(tmp_path)
    again = AUTO.get(name, AutoModel).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(answer(again, name), answer(loaded, name))


@pytest.mark.parametrize("name", ["llava", "classifier", "embedder, gpt2"])
def test_a_model_in_memory_gives_the_same_codes_as_its_directory(name, made) -> None:
    data = torch.randint(0, 93, (6, 24), generator=torch.Generator().manual_seed(5))
    found = quantize(tiny_class(name), RECIPES["w4a16"], data=data)
    assert torch.equal(answer(found, name), answer(made(name).result.load(), name))


def test_patterns_of_keep_reach_all_towers(made, tmp_path) -> None:
    kept = ["model.language_model.layers.0.*", "model.vision_tower.*", "model.multi_modal_*"]
    quantize(made("llava").float_directory, RTN.edit(keep=kept), output=tmp_path / "out")
    names = {name for name in stored(tmp_path / "out") if name.endswith(".weight_scale")}
    assert names
    assert not any(".layers.0." in name for name in names)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (RTN.edit(keep=["model.sight.*"]), "matches no linear"),
        (
            RTN.edit(overrides=[{"match": "model.vision_tower.*"}]),
            "outside of the text model alone",
        ),
    ],
)
def test_a_pattern_without_effect_is_refused(recipe: Recipe, message, made, tmp_path) -> None:
    with pytest.raises(RecipeError, match=message):
        quantize(made("llava").float_directory, recipe, output=tmp_path / "out")


@pytest.mark.parametrize("name", TOWERS)
def test_text_is_evaluated_and_generated(name, made, capsys, short_text) -> None:
    model, tokenizer = load_model(str(made(name).directory))
    measured = evaluate(
        model, tokenizer, text="builtin", windows=1, sequence_length=32, decode_tokens=8
    )
    assert measured.texts[0].perplexity.perplexity > 1
    stream_text(model, tokenizer, "ab", name, 4, chat=False)
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", ["reward model", "embedder"])
def test_what_asks_for_predicted_tokens_is_refused_by_name(name, made, tmp_path) -> None:
    done, model = made(name), tiny_class(name)
    ids = torch.arange(2, 40)[None]
    with pytest.raises(CalibrationError, match=f"{type(model).__name__} predicts no tokens"):
        perplexity(model, ids)
    with pytest.raises(CalibrationError, match="predicts no tokens"):
        quantize(model, RTN, output=tmp_path / "probed", probe=Probe(ids))
    with pytest.raises(RecipeError, match=f"{type(model).__name__} has no head"):
        export_checkpoint(done.directory, tmp_path / "export", "compressed-tensors")


@pytest.mark.parametrize("name", HEADLESS)
def test_an_embedding_without_a_head_is_stored_in_8_bits(name, tmp_path) -> None:
    model = tiny_class(name)
    result = quantize(model, RTN.edit(embeddings=8), output=tmp_path / "out")
    reference = answer(model, name)
    error = float((answer(result.load(), name) - reference).norm() / reference.norm())
    assert error < 0.1
    back = result.load().dequantize()
    assert type(back.get_input_embeddings()) is torch.nn.Embedding


@pytest.mark.parametrize("name", TOWERS)
def test_a_class_that_would_drop_a_head_is_refused_by_name(name, made) -> None:
    with pytest.raises((UnsupportedModelError, ValueError), match=type(tiny_class(name)).__name__):
        made(name).load(AutoModel)


def test_a_config_in_both_mappings_keeps_its_towers_either_way(tmp_path, float_checkpoint) -> None:
    quantize(float_checkpoint("gemma3"), RTN, output=tmp_path / "out")
    names = set(stored(float_checkpoint("gemma3")))
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path / "out")
        towers = {name for name in loaded.state_dict() if "vision" in name}
        assert len(towers) == len([name for name in names if "vision" in name])


@pytest.mark.parametrize("name", ["llava", "qwen2_audio"])
def test_an_export_has_its_towers(name, made, tmp_path) -> None:
    export_checkpoint(made(name, "w8a8").directory, tmp_path / "export")
    loaded = AUTO[name].from_pretrained(tmp_path / "export", dtype=torch.float32)
    reference = answer(tiny_class(name), name)
    assert (answer(loaded, name) - reference).norm() < 0.06 * reference.norm()


def mlp_alone(config: Any, index: int) -> BlockGraph:
    """The MLPs of Qwen3.5's blocks, without transforms."""
    gate, up, down = weights("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    sites = (Site("gate_up", "mlp", (gate, up), None), Site("down", "mlp", (down,), None))
    return BlockGraph(sites, ())


def test_the_causal_class_of_a_config_with_towers_loads_the_text_model(
    monkeypatch, tmp_path
) -> None:
    """The output has the towers; a class that has none reads the text model out of it."""
    family = Family(("qwen3_5_text",), mlp_alone)
    monkeypatch.setitem(_BY_MODEL_TYPE, "qwen3_5_text", family)
    model = tiny_class("qwen3_5")
    model.save_pretrained(tmp_path / "float")
    keep = ["model.language_model.layers.0.*", "model.visual.*"]
    quantize(tmp_path / "float", RTN.edit(keep=keep), output=tmp_path / "out")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(text).__name__ == "Qwen3_5ForCausalLM"
    assert all(key in whole.state_dict() for key in model.state_dict() if "visual" in key)
    quantized = {n for n, m in text.named_modules() if isinstance(m, QuantizedLinear)}
    assert quantized == {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}
    text.save_pretrained(tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32)
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        assert torch.equal(text(input_ids=ids).logits, expected)
        assert torch.equal(again(input_ids=ids).logits, expected)
