"""Text sources and token windows; the hub is replaced by `load_dataset` stand-ins."""

import json
import logging
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from smoothq.data.text import (
    TextSource,
    calibration_tokens,
    evaluation_tokens,
    load_texts,
)
from smoothq.errors import CalibrationError

BOS, EOS = 256, 257
CHAT_TEMPLATE = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def byte_tokenizer(single: str | None = "<s> $A") -> PreTrainedTokenizerFast:
    """One token a byte, so that token counts are known; `single` is where special tokens go."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    vocabulary |= {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if single is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=8
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    return byte_tokenizer(single=None)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Calls]:
    """Makes `load_dataset` return these rows; gives back the list of its calls."""

    def serve(rows: Any) -> Calls:
        calls: Calls = []

        def load_dataset(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def write(path: Path, text: str) -> TextSource:
    path.write_bytes(text.encode())
    return TextSource(str(path))


def duration_text(tokenizer: PreTrainedTokenizerFast, tokens: torch.Tensor) -> str:
    return str(tokenizer.decode(tokens))


@pytest.mark.parametrize(
    ("name", "purpose", "path", "config", "split", "streaming"),
    [
        ("wikitext2", "calibration", "Salesforce/wikitext", "wikitext-2-raw-v1", "train", False),
        ("wikitext2", "evaluation", "Salesforce/wikitext", "wikitext-2-raw-v1", "test", False),
        ("c4", "calibration", "allenai/c4", "en", "train", True),
        ("c4", "evaluation", "allenai/c4", "en", "validation", True),
        ("ptb", "calibration", "ptb-text-only/ptb_text_only", None, "train", False),
        ("ptb", "evaluation", "ptb-text-only/ptb_text_only", None, "test", False),
        ("someone/texts", "calibration", "someone/texts", None, "train", True),
        ("someone/texts", "evaluation", "someone/texts", None, "test", False),
    ],
)
def test_hub_call(hub, tokenizer, name, purpose, path, config, split, streaming) -> None:
    calls = hub([{"text": "one"}, {"text": ""}, {"text": "two"}])
    assert list(load_texts(TextSource(name), purpose, tokenizer)) == ["one", "", "two"]
    [(args, kwargs)] = calls
    assert args == (path, config)
    assert (kwargs["split"], kwargs["streaming"]) == (split, streaming)


def test_ptb_is_read_from_the_parquet_copy(hub, tokenizer) -> None:
    calls = hub([{"sentence": "a"}])
    assert load_texts(TextSource("ptb"), "evaluation", tokenizer) == ["a"]
    assert calls[0][1]["revision"] == "refs/convert/parquet"
    assert calls[0][1]["data_dir"] == "penn_treebank"


@pytest.mark.parametrize("name", ["wikitext2", "c4", "someone/texts"])
def test_split_overrides(hub, tokenizer, name) -> None:
    calls = hub([{"text": "a"}])
    list(load_texts(TextSource(name, split="validation"), "calibration", tokenizer))
    assert calls[0][1]["split"] == "validation"


def test_slice_of_a_split_is_not_streamed(hub, tokenizer) -> None:
    calls = hub([{"text": "a"}])
    list(load_texts(TextSource("someone/texts", split="train[:9]"), "calibration", tokenizer))
    assert calls[0][1]["streaming"] is False


def test_streamed_documents_are_read_only_as_far_as_needed(hub, plain) -> None:
    read = []

    def rows() -> Iterator[dict[str, str]]:
        for index in count():
            read.append(index)
            yield {"text": "0123456789", "url": "u"}

    hub(rows())
    tokens = calibration_tokens(plain, TextSource("c4"), samples=2, sequence_length=5, seed=0)
    assert tokens.shape == (2, 5)
    assert len(read) == 4  # 4 × 2 × 5 tokens


def test_c4_evaluation_is_the_first_documents_joined_with_spaces(hub, plain) -> None:
    hub({"text": f"{index:04d}"} for index in count())
    tokens = evaluation_tokens(plain, TextSource("c4"))
    assert duration_text(plain, tokens[0]) == " ".join(f"{index:04d}" for index in range(1100))


@pytest.mark.parametrize(
    ("row", "override", "text"),
    [
        ({"title": "t", "text": "x"}, None, "x"),
        ({"title": "t", "sentence": "x"}, None, "x"),
        ({"title": "t", "content": "x"}, None, "x"),
        ({"id": 3, "story": "x", "tags": ["a"]}, None, "x"),
        ({"text": "t", "title": "x"}, "title", "x"),
    ],
)
def test_text_column(hub, tokenizer, row, override, text) -> None:
    hub([row])
    source = TextSource("someone/texts", text_column=override)
    assert list(load_texts(source, "calibration", tokenizer)) == [text]


@pytest.mark.parametrize("override", [None, "body"])
def test_no_text_column_lists_the_columns(hub, tokenizer, override) -> None:
    hub([{"question": "q", "answer": "a", "id": 1}])
    source = TextSource("someone/texts", text_column=override)
    with pytest.raises(CalibrationError, match=r"question, answer, id.*text_column"):
        list(load_texts(source, "calibration", tokenizer))


def test_column_of_numbers_is_refused(hub, tokenizer) -> None:
    hub([{"id": 1}])
    with pytest.raises(CalibrationError, match=r"row 0 .*has int in column 'id'"):
        list(load_texts(TextSource("some/rows", text_column="id"), "calibration", tokenizer))


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb", "someone/texts"])
def test_offline_error_names_the_ways_out(tokenizer, name, monkeypatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError(f"Couldn't reach '{args[0]}' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CalibrationError) as caught:
        load_texts(TextSource(name), "calibration", tokenizer)
    message = str(caught.value)
    assert "hub cannot be reached" in message
    assert "OfflineModeIsEnabled" in message
    assert "local text file or 'builtin'" in message
    assert "\n" not in message


def test_offline_error_of_the_library_itself(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match=r"hub cannot be reached.*wikitext2"):
        load_texts(TextSource(), "calibration", tokenizer)


def test_connection_lost_while_streaming(hub, tokenizer) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionError("Server disconnected")

    hub(rows())
    with pytest.raises(CalibrationError, match=r"hub cannot be reached.*Server disconnected"):
        list(load_texts(TextSource("c4"), "calibration", tokenizer))


def test_other_hub_errors_keep_their_reason(tokenizer, monkeypatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("Unknown split \"test\". Should be one of ['train'].\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CalibrationError, match=r'Unknown split "test".*check its name and split'):
        load_texts(TextSource("someone/texts"), "evaluation", tokenizer)


@pytest.mark.parametrize("suffix", [".txt", ".raw", ".tokens", ".md", ""])
def test_text_file_is_one_text_as_it_stands(tmp_path, tokenizer, plain, suffix) -> None:
    text = " = Title = \n\n\n first line \r\n\n second\n"
    source = write(tmp_path / f"text{suffix}", text)
    for purpose in ("calibration", "evaluation"):
        assert load_texts(source, purpose, tokenizer) == [text]
    tokens = evaluation_tokens(tokenizer, source)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [tokenizer(text, verbose=False)["input_ids"]]
    window = calibration_tokens(plain, source, samples=1, sequence_length=len(text), seed=0)
    assert duration_text(plain, window[0]) == text


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("split", [None, "train[:2]"])
def test_table_files(tmp_path, tokenizer, suffix, split) -> None:
    rows = [{"text": f"row {index}", "number": index} for index in range(3)]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = list(load_texts(TextSource(str(path), split=split), "calibration", tokenizer))
    assert texts == ["row 0", "row 1", "row 2"][: 3 if split is None else 2]


def test_messages_go_through_the_chat_template(tmp_path, tokenizer) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    source = write(tmp_path / "chats.jsonl", json.dumps({"messages": chat, "text": "no"}) + "\n")
    with pytest.raises(CalibrationError, match="chat template cannot render row 0"):
        list(load_texts(source, "calibration", tokenizer))
    tokenizer.chat_template = CHAT_TEMPLATE
    assert list(load_texts(source, "calibration", tokenizer)) == ["<s>[user]hi[assistant]yes"]
    # The template has written the beginning-of-sequence token: it must not come twice.
    assert evaluation_tokens(tokenizer, source)[0].tolist().count(BOS) == 1


@pytest.mark.parametrize("name", ["texts.txt", "./texts", "/a/b", "a/b/c", "~/x", "rows.parquet"])
def test_missing_file(tokenizer, monkeypatch, tmp_path, name) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match=r"no file .*builtin"):
        load_texts(TextSource(name), "calibration", tokenizer)


def test_unreadable_files(tmp_path, tokenizer) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match=r"binary\.txt.*UTF-8"):
        load_texts(TextSource(str(tmp_path / "binary.txt")), "calibration", tokenizer)
    broken = write(tmp_path / "broken.jsonl", '{"text": "a"}\n{broken\n')
    with pytest.raises(CalibrationError, match=r"broken\.jsonl.*check the file's format"):
        list(load_texts(broken, "calibration", tokenizer))
    broken = write(tmp_path / "broken.parquet", "nothing")
    with pytest.raises(CalibrationError, match=r"broken\.parquet.*check the file's format"):
        list(load_texts(broken, "calibration", tokenizer))


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.parquet"])
def test_empty_files(tmp_path, tokenizer, name) -> None:
    source = write(tmp_path / name, "")
    with pytest.raises(CalibrationError, match="holds no text"):
        calibration_tokens(tokenizer, source, samples=1, sequence_length=4, seed=0)
    with pytest.raises(CalibrationError, match="holds no text"):
        evaluation_tokens(tokenizer, source)


def test_plain_text_has_no_splits_or_columns(tmp_path, tokenizer) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    for name in (str(path), "builtin"):
        with pytest.raises(CalibrationError, match="has no split"):
            load_texts(TextSource(name, split="train"), "calibration", tokenizer)
        with pytest.raises(CalibrationError, match="has no text_column"):
            load_texts(TextSource(name, text_column="text"), "calibration", tokenizer)


def test_builtin_topics_serve_one_purpose_each(tokenizer) -> None:
    from pydoc_data.topics import topics

    calibration = load_texts(TextSource("builtin"), "calibration", tokenizer)
    evaluation = load_texts(TextSource("builtin"), "evaluation", tokenizer)
    ordered = [topics[name] for name in sorted(topics)]
    assert evaluation == ordered[3::4]
    assert sorted([*calibration, *evaluation]) == sorted(ordered)
    assert not set(calibration) & set(evaluation)


@pytest.fixture
def digits(tmp_path: Path) -> TextSource:
    """40 bytes; windows of 4 are `0000`, `0001` … `0009`."""
    return write(tmp_path / "digits.txt", "".join(f"{index:04d}" for index in range(10)))


def windows(tokenizer: PreTrainedTokenizerFast, tokens: torch.Tensor) -> list[str]:
    return [duration_text(tokenizer, window) for window in tokens]


def test_windows_are_distinct_and_set_by_the_seed(digits, plain) -> None:
    grid = {f"{index:04d}" for index in range(10)}
    drawn = [
        windows(plain, calibration_tokens(plain, digits, 5, 4, seed)) for seed in (0, 0, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn}) > 2
    for each in drawn:
        assert len(set(each)) == 5
        assert set(each) <= grid


def test_drawing_leaves_the_global_generator_alone(digits, plain) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    tokens = calibration_tokens(plain, digits, samples=3, sequence_length=4, seed=0)
    assert torch.equal(torch.rand(1), expected)
    assert tokens.dtype == torch.int64


def test_fewer_windows_than_asked_for(digits, plain, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="smoothq"):
        tokens = calibration_tokens(plain, digits, samples=16, sequence_length=12, seed=0)
    assert tokens.shape == (3, 12)
    assert len(set(windows(plain, tokens))) == 3
    [record] = caplog.records
    assert "3 whole sequences of 12 tokens, 16 were asked for" in record.getMessage()


def test_text_shorter_than_one_sequence(digits, tokenizer) -> None:
    with pytest.raises(CalibrationError, match=r"41 tokens .* 64: use a smaller sequence_length"):
        calibration_tokens(tokenizer, digits, samples=1, sequence_length=64, seed=0)


@pytest.mark.parametrize(("samples", "length"), [(0, 4), (4, 0)])
def test_numbers_below_one(digits, tokenizer, samples, length) -> None:
    with pytest.raises(CalibrationError, match="at least 1"):
        calibration_tokens(tokenizer, digits, samples, length, seed=0)


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>"])
def test_special_tokens_only_at_the_beginning(hub, single) -> None:
    tokenizer = byte_tokenizer(single)
    hub([{"text": ""}, {"text": "abcd"}, {"text": "efgh"}, {"text": "ijkl"}])
    tokens = calibration_tokens(tokenizer, TextSource("someone/texts"), 13, 1, seed=0).flatten()
    begins = single.startswith("<s>")
    assert len(tokens) == 12 + begins
    assert (tokens == BOS).sum() == begins
    assert (tokens == EOS).sum() == 0
    hub([{"text": "ab"}, {"text": "cd"}])
    joined = evaluation_tokens(tokenizer, TextSource("wikitext2"))
    assert duration_text(tokenizer, joined[0]) == "<s>" * begins + "ab\n\ncd"


def test_running_text_is_joined_with_blank_lines(hub, plain) -> None:
    hub([{"text": " = a = "}, {"text": ""}, {"text": "b"}])
    text = " = a = \n\n\n\nb"
    for name in ("wikitext2", "ptb"):
        assert duration_text(plain, evaluation_tokens(plain, TextSource(name))[0]) == text
        window = calibration_tokens(plain, TextSource(name), 1, len(text), seed=0)
        assert duration_text(plain, window[0]) == text


def test_documents_are_put_end_to_end(hub, plain) -> None:
    hub([{"text": "ab"}, {"text": None}, {"text": "cd"}])
    window = calibration_tokens(plain, TextSource("someone/texts"), 1, 4, seed=0)
    assert duration_text(plain, window[0]) == "abcd"


def test_long_text_gives_no_length_warning(digits, tokenizer, caplog) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        evaluation_tokens(tokenizer, digits)
        calibration_tokens(tokenizer, digits, samples=2, sequence_length=4, seed=0)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records
