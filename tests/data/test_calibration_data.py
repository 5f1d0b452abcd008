"""What `quantize` takes as data: every form gives the same tokens, and the rest is refused."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from smoothq import preset, quantize
from smoothq.data.calibration import tokens_of
from smoothq.data.tokens import MICRO_BATCH_TOKENS, Tokens
from smoothq.errors import CalibrationError
from smoothq.recipe.recipe import Calibration
from tests.conftest import RECIPES
from tests.tiny_models import VOCABULARY, tiny_model

SETTINGS = Calibration(source="builtin", samples=3, sequence_length=8)
IDS = torch.randint(2, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
TEXTS = ["abcd", "", "the quick brown fox", "jumps"]
INT_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]

rows = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12), min_size=1, max_size=8
)


def read(data: Any, tokenizer: Any = None, longest: int | None = None) -> Tokens:
    return tokens_of(data, SETTINGS, tokenizer, VOCABULARY, longest)


def held(tokens: Tokens) -> list[list[list[int]]]:
    return [group.tolist() for group in tokens.groups]


FORMS = {
    "list": lambda: IDS.tolist(),
    "tuple": lambda: tuple(IDS.tolist()),
    "numpy": lambda: IDS.numpy(),
    "big-endian": lambda: IDS.numpy().astype(">i4"),
    "uint16": lambda: IDS.numpy().astype(np.uint16),
    "list of tensors": lambda: list(IDS),
    "list of arrays": lambda: list(IDS.numpy()),
    "list of batches": lambda: list(IDS.split(2)),
    "object array": lambda: np.array([*map(tuple, IDS.tolist()), ()], dtype=object)[:-1],
    "dict": lambda: {"input_ids": IDS, "labels": torch.full_like(IDS, -100)},
    "BatchEncoding": lambda: BatchEncoding({"input_ids": IDS, "attention_mask": IDS > 0}),
    "batches": lambda: [{"input_ids": two, "attention_mask": two > 0} for two in IDS.split(2)],
    "rows": lambda: [{"input_ids": row} for row in IDS.tolist()],
    "Dataset": lambda: Dataset.from_dict({"input_ids": IDS.tolist()}),
    "Dataset of tensors": lambda: Dataset.from_dict({"input_ids": IDS.tolist()}).with_format("np"),
    "DataLoader": lambda: DataLoader(Dataset.from_dict({"input_ids": IDS}).with_format("torch"), 3),
    **{str(dtype): lambda dtype=dtype: IDS.to(dtype) for dtype in INT_DTYPES},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_ids_gives_the_same_tokens(form) -> None:
    tokens = read(FORMS[form]())
    assert held(tokens) == [IDS.tolist()]
    assert tokens.fingerprint() == Tokens((IDS,)).fingerprint()
    assert tokens.groups[0].dtype == torch.int64


@pytest.mark.parametrize("row", [IDS[0], IDS[0].tolist(), IDS[0].numpy(), {"input_ids": IDS[0]}])
def test_one_row_is_one_sequence(row) -> None:
    assert held(read(row)) == [[IDS[0].tolist()]]


@given(rows)
def test_rows_of_any_lengths_are_all_there_and_none_is_padded(ids) -> None:
    tokens = read(ids)
    for group in tokens.groups:
        assert group.tolist() == [row for row in ids if len(row) == group.shape[1]]
    assert tokens.count == sum(map(len, ids))
    assert len({group.shape[1] for group in tokens.groups}) == len(tokens.groups)


@given(rows, st.randoms(), st.booleans(), st.integers(0, VOCABULARY - 1))
def test_what_a_mask_hides_is_not_there(ids, random, left, pad) -> None:
    longest = max(map(len, ids)) + random.randint(0, 3)
    padded, mask = [], []
    for row in ids:
        lacking = longest - len(row)
        padded.append([pad] * lacking + row if left else row + [pad] * lacking)
        mask.append([0] * lacking + [1] * len(row) if left else [1] * len(row) + [0] * lacking)
    for given_mask in (
        mask,
        torch.tensor(mask),
        torch.tensor(mask).bool(),
        torch.tensor(mask) * 1.0,
    ):
        batch = {"input_ids": torch.tensor(padded), "attention_mask": given_mask}
        assert held(read(batch)) == held(read(ids)) == held(read([batch]))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", "w8a8-static"),
        *(
            pytest.param(name, recipe, marks=pytest.mark.slow)
            for name, recipe in (
                ("llama", "w4a4-rrs-live"),
                *((name, "w4a8") for name in ("llama", "gpt2", "opt", "bloom", "mixtral")),
            )
        ),
    ],
)
def test_a_checkpoint_does_not_depend_on_masked_tokens(name, recipe, tmp_path) -> None:
    """Statistics, Hessians, losses, experts: whatever lies under the mask, and on which side."""
    stored = []
    lengths, pads = (5, 9, 9, 7, 12), (0, 50)
    for pad in pads:
        batch = torch.full((5, 12), pad)
        mask = torch.zeros_like(batch)
        for index, (length, row) in enumerate(zip(lengths, IDS.repeat(2, 2), strict=False)):
            where = slice(-length, None) if pad else slice(length)
            batch[index, where], mask[index, where] = row[:length], 1
        data = {"input_ids": batch, "attention_mask": mask}
        quantize(
            tiny_model(name, torch.float32), RECIPES[recipe], data=data, output=tmp_path / str(pad)
        )
        stored.append(load_file(tmp_path / str(pad) / "model.safetensors"))
    assert all(torch.equal(stored[0][key], each[key]) for each in stored for key in stored[0])


def test_a_mask_of_nothing_changes_no_bit(data, tmp_path) -> None:
    masked = {"input_ids": data, "attention_mask": torch.ones_like(data)}
    for name, given_data in (("plain", data), ("masked", masked)):
        model = tiny_model("llama", torch.float32)
        quantize(model, RECIPES["w4a8"], data=given_data, output=tmp_path / name)
    plain, masked = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "masked"))
    assert all(torch.equal(plain[key], masked[key]) for key in plain)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
def test_sequences_of_one_length_are_split_as_they_are(lengths) -> None:
    groups = Tokens.of(torch.zeros(length, dtype=torch.int64) for length in lengths)
    for batch in groups.micro_batches:
        assert batch.tokens.numel() <= MICRO_BATCH_TOKENS or len(batch.tokens) == 1
    uniform = torch.arange(7 * lengths[0]).view(7, lengths[0])
    batches = [batch.tokens for batch in Tokens((uniform,)).micro_batches]
    assert torch.equal(torch.cat(batches), uniform)


def test_texts_are_read_as_the_recipe_says(tokenizer, caplog) -> None:
    wanted = [tokenizer(text)["input_ids"][: SETTINGS.sequence_length] for text in TEXTS if text]
    for data in (
        TEXTS,
        np.array(TEXTS),
        Dataset.from_dict({"text": TEXTS}),
        [{"text": text} for text in TEXTS],
        {"text": TEXTS},
        (text for text in TEXTS[:3]),
    ):
        found = held(read(data, tokenizer))
        limit = 2 if isinstance(data, Iterator) else 3
        assert sorted(row for group in found for row in group) == sorted(wanted[:limit])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert read(["abc"] * 9, tokenizer).count == 9
    assert "first 3 samples" in caplog.text


def test_chats_go_through_the_template(tokenizer) -> None:
    chat = [{"role": "user", "content": "hi"}]
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    wanted = [[tokenizer("user:hi")["input_ids"][: SETTINGS.sequence_length]]]
    for data in ([chat], [{"messages": chat}], Dataset.from_dict({"messages": [chat]})):
        assert held(read(data, tokenizer)) == wanted


def test_a_stream_ends_with_the_recipes_samples(tokenizer, caplog) -> None:
    def endless() -> Iterator[dict[str, list[int]]]:
        while True:
            yield {"input_ids": [5, 6, 7]}

    assert read(endless()).count == 9
    assert "first 3 samples" in caplog.text


class Table:
    """Iterates over the names of its columns, as a DataFrame does."""

    columns = ("text", "label")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


REFUSED: dict[str, tuple[Any, str]] = {
    "floats": (IDS.float(), "float32, which are no token ids"),
    "a float list": (IDS.float().tolist(), "no token ids"),
    "a float array": (IDS.numpy() * 1.0, "no token ids"),
    "bool": (IDS > 3, "no token ids"),
    "bools": ([[True, False]], "no token ids"),
    "a label's mask": (torch.where(IDS[1, 2] == IDS, -100, IDS), "-100, which is no token id"),
    "another vocabulary": (IDS + 90, f"beyond the model's {VOCABULARY}"),
    "no rows": (IDS[:0], "empty"),
    "rows of nothing": (IDS[:, :0], "empty"),
    "an empty list": ([], "no sequence"),
    "an empty row": ([[1, 2], []], "item 1 of data is empty"),
    "an empty array": (np.zeros((0, 4), int), "empty"),
    "three dimensions": (IDS[None], "shape"),
    "a number": (7, "is a int"),
    "no dimension": (torch.tensor(3), "shape"),
    "a string": ("wikitext2", "is a str"),
    "a table": (Table(), "is a Table"),
    "words": ([["a", "b"]], "no row of token ids"),
    "None in a row": ([[1, None]], "no row of token ids"),
    "None": ([None], "is a NoneType"),
    "other columns": ([{"prompt": "x", "answer": "y"}], "has 'prompt', 'answer', and no input_ids"),
    "splits": ({"train": [1], "test": [2]}, "has 'train', 'test'"),
    "pairs": ([(IDS[:2], IDS[:2])], "does not say what they are"),
    "a mask of labels": ({"input_ids": IDS, "attention_mask": IDS}, "other numbers than 0 and 1"),
    "a mask of another shape": (
        {"input_ids": IDS, "attention_mask": torch.ones(4, 5)},
        "differ in shape",
    ),
    "a mask that hides a row": (
        {"input_ids": IDS, "attention_mask": (IDS > 0) & (torch.arange(4) != 1)[:, None]},
        "hides a whole sequence",
    ),
    "text without a tokenizer": (["abc"], "there is no tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_all_else_is_refused_in_a_line(case, tmp_path) -> None:
    data, message = REFUSED[case]
    with pytest.raises(CalibrationError) as error:
        quantize(tiny_model("llama"), preset("w8a8"), data=data, output=tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-200, 200) | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
        max_leaves=12,
    )
)
@settings(max_examples=300)
def test_whatever_is_given_is_tokens_or_one_error(tokenizer, data) -> None:
    refusal = ""
    try:
        assert read(data, tokenizer).count
    except CalibrationError as error:
        refusal = str(error)
    assert "\n" not in refusal


def test_sequences_end_where_the_models_positions_do(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert held(read(IDS, longest=4)) == [IDS[:, :4].tolist()]
    assert "4 of 4 calibration sequences are shortened to the model's 4 positions" in caplog.text
