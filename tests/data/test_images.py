"""Rows with images as calibration data: chats through a processor, batches that one made."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from smoothq.data.calibration import tokens_of
from smoothq.data.images import Taken, chats_with_media
from smoothq.data.text import TextSource
from smoothq.data.tokens import Tokens
from smoothq.errors import CalibrationError
from smoothq.recipe.recipe import Calibration
from tests.tiny_classes import IMAGE, tiny_class
from tests.tiny_images import (
    VISION,
    batch_for,
    chat,
    image_tokenizer,
    picture,
    pictures,
    processor_of,
)
from tests.tiny_models import VOCABULARY, tiny_model

SETTINGS = Calibration(samples=4, sequence_length=64)


@pytest.fixture(scope="module")
def taken() -> dict[str, Taken]:
    models = {name: tiny_class(name) for name in VISION}
    return {name: Taken.of(model, model.config) for name, model in models.items()}


def read(data: Any, taken: Taken, name: str = "llava", longest: int | None = None) -> Tokens:
    tokenizer, processor = image_tokenizer(), processor_of(name)
    return tokens_of(data, SETTINGS, tokenizer, VOCABULARY, longest, taken, lambda: processor)


@pytest.mark.parametrize("name", VISION)
def test_a_chat_with_an_image_is_what_the_models_processor_makes_of_it(
    name, taken, tmp_path
) -> None:
    (path,) = pictures(tmp_path, 1)
    expected = batch_for(name, picture(0))
    rows = [
        {"messages": chat(path)},
        {"messages": chat(picture(0), key="image")},
        {"messages": chat(None), "images": [picture(0)]},
        chat(path),
    ]
    tokens = read(rows, taken[name], name)
    assert not tokens.groups
    for batch in tokens.featured:
        assert torch.equal(batch.tokens, expected["input_ids"])
        assert batch.tokens.eq(IMAGE).any()
        assert set(batch.features) == set(expected) - {"input_ids"}
        assert all(torch.equal(value, expected[key]) for key, value in batch.features.items())
    assert tokens.count == 4 * expected["input_ids"].numel()


def test_text_and_images_may_be_mixed_and_differ_in_shape(taken, tmp_path) -> None:
    first, second = pictures(tmp_path)
    text = [{"role": "user", "content": "only text"}]
    tokenizer = image_tokenizer()
    tokenizer.chat_template = processor_of("llava").chat_template
    rows = [{"messages": chat(first)}, {"text": "words"}, {"messages": chat(second, "longer text")}]
    tokens = tokens_of(
        [*rows, text],
        SETTINGS,
        tokenizer,
        VOCABULARY,
        None,
        taken["llava"],
        lambda: processor_of("llava"),
    )
    assert sorted(group.shape[1] for group in tokens.groups) == [5, 10]
    lengths = {batch.tokens.shape[1] for batch in tokens.featured}
    assert len(lengths) == 2
    assert [len(batch.features) > 0 for batch in tokens.micro_batches] == [False] * 2 + [True] * 2


def test_rows_with_images_count_as_samples(taken, tmp_path, caplog) -> None:
    (path,) = pictures(tmp_path, 1)
    assert len(read([{"messages": chat(path)}] * 9, taken["llava"]).featured) == SETTINGS.samples
    assert "the first 4 samples are taken" in caplog.text


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("form", ["tensors", "arrays", "lists", "Dataset", "one"])
def test_batches_that_a_processor_made_are_taken_in_every_form(name, form, taken) -> None:
    batch = batch_for(name, picture(3))
    forms: dict[str, Any] = {
        "tensors": [batch],
        "arrays": [{key: value.numpy() for key, value in batch.items()}],
        "lists": [{key: value.tolist() for key, value in batch.items()}],
        "Dataset": Dataset.from_list([{key: value.tolist() for key, value in batch.items()}]),
        "one": batch,
    }
    (found,) = read(forms[form], taken[name], name).featured
    assert torch.equal(found.tokens, batch["input_ids"])
    for key, value in found.features.items():
        torch.testing.assert_close(value, batch[key])


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_with_an_image_each_are_taken_apart(name, side, taken) -> None:
    rows = [batch_for(name, picture(1, (16, 24)), "short"), batch_for(name, picture(2), "long one")]
    longest = max(row["input_ids"].shape[1] for row in rows)

    def padded(row: torch.Tensor, value: int) -> torch.Tensor:
        filling = torch.full((1, longest - row.shape[1]), value, dtype=row.dtype)
        return torch.cat([row, filling] if side == "right" else [filling, row], dim=1)

    whole = {
        key: torch.cat([padded(row[key], 0) if row[key].dim() == 2 and len(row[key]) == 1
                        and row[key].shape == row["input_ids"].shape else row[key] for row in rows])
        for key in rows[0]
    }  # fmt: skip
    found = read([whole], taken[name], name).featured
    assert len(found) == 2
    for batch, row in zip(found, rows, strict=True):
        assert torch.equal(batch.tokens, row["input_ids"])
        assert all(torch.equal(value, row[key]) for key, value in batch.features.items())


def test_other_images_are_other_data(taken) -> None:
    """A run is resumed only with the same images, whatever the tokens are."""
    batches = [batch_for("llava", picture(seed)) for seed in (1, 1, 2)]
    one, same, other = (read([batch], taken["llava"]).fingerprint() for batch in batches)
    assert one == same
    assert one != other


def test_columns_for_other_uses_are_left_out(taken) -> None:
    batch = batch_for("llava", picture(0))
    more = {
        "labels": batch["input_ids"],
        "token_type_ids": torch.zeros_like(batch["input_ids"]),
        "name": ["a row"],
    }
    (found,) = read([batch | more], taken["llava"]).featured
    assert set(found.features) == {"attention_mask", "pixel_values"}


def test_ids_beside_other_numbers_are_still_ids() -> None:
    ids = torch.arange(2, 14).view(2, 6)
    rows = {"input_ids": ids, "score": np.zeros((2, 3)), "token_type_ids": torch.zeros_like(ids)}
    tokens = tokens_of(rows, SETTINGS, None, VOCABULARY, None)
    assert torch.equal(tokens.groups[0], ids)


def two_in_one_row(taken: Taken) -> Any:
    """A padded batch of which no one can say whose the images are."""
    one = batch_for("llava", picture(0))
    ids = torch.cat([one["input_ids"], one["input_ids"]])
    ids[1, ids[1] == taken.placeholder] = 5
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": one["pixel_values"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda _: [batch_for("qwen2_5_vl", picture(0))], "item 0 of data has image_grid_thw, wh"),
        (lambda _: [{"text": "a"}, {"messages": chat("/no/such.png")}], "item 1 of data: LlavaPro"),
        (lambda _: [{"messages": chat(None)}], "item 0 of data has an image without a source"),
        (
            lambda _: [{"messages": chat(None), "images": [picture(0)] * 2}],
            "item 0 of data has more images than its messages",
        ),
        (
            lambda _: [batch_for("llava", picture(0)) | {"input_ids": torch.arange(4)}],
            "item 0 of data: input_ids beside features",
        ),
        (lambda taken: [two_in_one_row(taken)], "which images are of which of its 2 rows"),
        (
            lambda _: [
                batch_for("llava", picture(0))
                | {"pixel_values": [torch.zeros(3, 4), torch.zeros(3, 5)]}
            ],
            "pixel_values holds tensors of several shapes",
        ),
    ],
)
def test_what_cannot_be_taken_is_refused_by_row_and_name(rows, message, taken) -> None:
    with pytest.raises(CalibrationError, match=message):
        read(rows(taken["llava"]), taken["llava"])


def test_a_row_beyond_the_models_positions_is_refused(taken) -> None:
    with pytest.raises(CalibrationError, match=r"item 0 of data has \d+ tokens with its images"):
        read([batch_for("llava", picture(0))], taken["llava"], longest=16)


def test_a_model_of_text_takes_no_images() -> None:
    model = tiny_model("llama", torch.float32)
    with pytest.raises(CalibrationError, match="pixel_values, which LlamaForCausalLM cannot take"):
        read([batch_for("llava", picture(0))], Taken.of(model, model.config))


def test_a_local_file_of_chats_names_images_from_its_folder(tmp_path) -> None:
    pictures(tmp_path)
    rows = [{"messages": chat("0.png")}, {"messages": [{"role": "user", "content": "text"}]}]
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("\n".join(map(json.dumps, rows)))
    table.write_text(json.dumps(rows))
    for file in (lines, table):
        found = chats_with_media(TextSource(str(file)))
        assert found is not None
        assert found[0]["messages"][1]["content"][0]["path"] == str(tmp_path / "0.png")
        assert found[1] == rows[1]


@pytest.mark.parametrize("text", ['{"messages": [{"role": "user", "content": "an \\"image\\""}]}'])
def test_a_file_without_images_is_read_as_text(text, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    assert chats_with_media(TextSource(str(file))) is None
    assert chats_with_media(TextSource("builtin")) is None
