"""Calibration with images: what the blocks see is what they will see when the model is used."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from smoothq import preset, quantize
from smoothq.checkpoint.open import open_source
from smoothq.data.tokens import Batch
from smoothq.errors import CalibrationError, OutputError
from smoothq.pipeline import round_trip
from smoothq.pipeline.ends import ModelTail, embed_tokens, load_block
from smoothq.pipeline.hidden_states import _check_same_blocks
from smoothq.pipeline.trace import Call, Trace
from smoothq.plan.resolve import make_plan
from smoothq.runtime.distributed import World
from tests.conftest import RECIPES
from tests.tiny_classes import IMAGE, tiny_class
from tests.tiny_images import VISION, batch_for, chat, picture, pictures, processor_of

HERE = World(0, 1, torch.device("cpu"))
STATIC = RECIPES["w8a8-static"].edit(smoothing=None)


def rows(folder: Path) -> list[Any]:
    """Two rows with images of other shapes, and one of text."""
    first, second = pictures(folder)
    text = {"text": "and text alone"}
    return [{"messages": chat(first)}, {"messages": chat(second, "hello")}, text]


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits[0]


def errors(model: nn.Module, reference: PreTrainedModel, batch: dict[str, Tensor]) -> list[float]:
    """Relative errors of the logits at the positions of the image, and of text."""
    expected, found = logits(reference, batch), logits(model, batch)
    image = batch["input_ids"][0] == IMAGE
    return [
        float((found - expected)[where].norm() / expected[where].norm())
        for where in (image, ~image)
    ]


def rounded_to_nearest(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model with the linears of its decoder's blocks in 8 bits, and their inputs."""

    def to_grid(x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
        return (x / scale).round().clamp(-127, 127) * scale

    for block in model.get_decoder().layers:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = to_grid(module.weight.data)
                module.register_forward_pre_hook(lambda _, args: (to_grid(args[0]), *args[1:]))
    return model


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a4-quarot"])
def test_the_hidden_states_of_images_are_the_stock_models(name, recipe) -> None:
    model, batch = tiny_class(name), batch_for(name, picture(5))
    source = open_source(model)
    skeleton = source.skeleton()
    plan = make_plan(skeleton, RECIPES[recipe])
    ids, features = batch["input_ids"], {k: v for k, v in batch.items() if k != "input_ids"}
    stream = embed_tokens(source, skeleton, plan, [Batch(ids, features)], HERE)
    with torch.no_grad():
        for index in range(len(plan.blocks)):
            block = load_block(source, skeleton, plan, index, HERE.device)
            stream.advance(block.module, index)
    found = ModelTail(source, plan, stream).logits(stream, 0)[0]
    torch.testing.assert_close(found, logits(model, batch), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VISION)
def test_w8a8_is_as_good_as_plain_rounding_at_image_and_at_text(name, tmp_path) -> None:
    model, batch = tiny_class(name), batch_for(name, picture(5))
    found = quantize(model, RECIPES["w8a8"], processor_of(name), data=rows(tmp_path))
    plain = errors(rounded_to_nearest(tiny_class(name)), model, batch)
    for error, bound in zip(errors(found, model, batch), plain, strict=True):
        assert error < 1.25 * bound


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("recipe", ["w4a8", "w4a4-quarot", "w8a8-static"])
def test_every_kind_of_recipe_is_calibrated_by_images_and_holds_its_round_trip(
    name, recipe, tmp_path
) -> None:
    """`quantize` itself compares the output, loaded again, also on a row with an image."""
    model, batch = tiny_class(name), batch_for(name, picture(5))
    found = quantize(model, RECIPES[recipe], processor_of(name), data=rows(tmp_path))
    bound = 0.1 if "w8" in recipe else 0.7
    assert max(errors(found, model, batch)) < bound


@pytest.mark.parametrize("vision", [16, 8])
def test_the_check_block_by_block_has_the_features_that_are_added_between_blocks(
    vision, monkeypatch
) -> None:
    """Of a model too large to be loaded whole: Qwen3-VL, rotated, adds features behind block 0."""
    monkeypatch.setattr(round_trip, "SMALL_BYTES", -1)
    monkeypatch.setattr(round_trip, "spare_memory", lambda: 0)
    data = [batch_for("qwen3_vl", picture(1))]
    wanted = RECIPES["w4a4-quarot"].edit(vision=vision)
    quantize(tiny_class("qwen3_vl"), wanted, processor_of("qwen3_vl"), data=data)


def test_the_check_finds_other_features_added_between_blocks(monkeypatch) -> None:
    data = [batch_for("qwen3_vl", picture(1))]
    plain = round_trip.embed_tokens

    def unrotated(*arguments: Any, **options: Any) -> Any:
        return plain(*arguments, **options | {"rotate_added": lambda x: -x})

    monkeypatch.setattr(round_trip, "embed_tokens", unrotated)
    with pytest.raises(OutputError, match="first in block 1"):
        quantize(tiny_class("qwen3_vl"), RECIPES["w8a8"], processor_of("qwen3_vl"), data=data)


def test_rows_that_go_through_other_blocks_are_not_mixed() -> None:
    """As of a model that skips blocks of cross-attention where there is no image."""
    text, image = (
        Trace([Call(n, (), {}, None, ()) for n in blocks]) for blocks in ((0, 2), (0, 1, 2))
    )
    _check_same_blocks(text, [text])
    with pytest.raises(CalibrationError, match="give rows of one kind"):
        _check_same_blocks(image, [text])


def loud_images() -> PreTrainedModel:
    """A LLaVA whose image features are large in one channel, in which those of text are not."""
    model = tiny_class("llava")
    model.model.multi_modal_projector.linear_2.weight.data[7] *= 20
    return model


def test_static_scales_cover_images_only_where_calibration_has_some(tmp_path) -> None:
    model, batch = loud_images(), batch_for("llava", picture(5))
    texts = [{"text": "and text alone"}, {"text": "what is this"}]
    blind = quantize(model, STATIC, processor_of("llava"), data=texts)
    seeing = quantize(model, STATIC, processor_of("llava"), data=[*rows(tmp_path), *texts])
    assert errors(seeing, model, batch)[0] < 0.5 * errors(blind, model, batch)[0]


def test_a_directory_with_its_processor_is_calibrated_on_the_command_line(tmp_path, run) -> None:
    model, folder = tiny_class("llava"), tmp_path / "float"
    model.save_pretrained(folder)
    processor_of("llava").save_pretrained(folder)
    pictures(tmp_path)
    chats = [{"messages": chat("0.png")}, {"messages": chat("1.png")}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, chats)))
    data = quantize(
        folder,
        RECIPES["w8a8-static"],
        data=[{"messages": chat(tmp_path / f"{n}.png")} for n in (0, 1)],
        output=tmp_path / "python",
    )
    assert data.path is not None
    flags = ["--w8a8", "--activation-scales", "static", "--calibration", f"{tmp_path}/rows.jsonl"]
    code, _, said = run("quantize", folder, *flags, "-o", tmp_path / "line")
    assert not code, said
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("python", "line"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "line", dtype=torch.float32)
    assert max(errors(loaded, model, batch_for("llava", picture(5)))) < 0.1
    assert (tmp_path / "line" / "processor_config.json").is_file()


def test_a_run_goes_on_with_the_same_images_and_begins_anew_with_others(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, logger="smoothq")
    model, out = tiny_class("qwen2_5_vl"), tmp_path / "out"
    batches = [[batch_for("qwen2_5_vl", picture(seed))] for seed in (1, 2)]

    class StopHere(Exception):
        pass

    def stop(done: Any) -> None:
        if done.block == 0:
            raise StopHere

    def begun(data: Any) -> None:
        with pytest.raises(StopHere):
            quantize(model, RECIPES["w4a8"], data=data, output=out, on_block=stop)

    begun(batches[0])
    result = quantize(model, RECIPES["w4a8"], data=batches[0], output=out, resume=True)
    whole = quantize(model, RECIPES["w4a8"], data=batches[0], output=tmp_path / "whole")
    one, other = (load_file(r.path / "model.safetensors") for r in (result, whole))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert quantize(model, RECIPES["w4a8"], data=batches[0], output=out).repeated
    with pytest.raises(Exception, match=str(out)):
        quantize(model, RECIPES["w4a8"], data=batches[1], output=out)


def test_a_batch_that_the_model_cannot_run_on_is_named() -> None:
    batch = batch_for("llava", picture(5))
    few = {**batch, "input_ids": batch["input_ids"].clone()}
    few["input_ids"][0, 10] = 5  # one placeholder less than the image has pieces
    with pytest.raises(CalibrationError, match="item 1 of data: the model cannot run on it, with"):
        quantize(tiny_class("llava"), preset("w8a8"), data=[batch, few])


def test_a_model_in_memory_needs_its_processor_for_images(tmp_path) -> None:
    with pytest.raises(CalibrationError, match="pass its processor as tokenizer"):
        quantize(tiny_class("llava"), preset("w8a8"), data=rows(tmp_path))
