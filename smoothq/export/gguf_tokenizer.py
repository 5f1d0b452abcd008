"""Tokenizers as GGUF describes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from ..checkpoint.checkpoint_source import CheckpointSource
from ..data.tokenizer import in_one_line
from ..errors import CheckpointError, UnsupportedModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _PUNCTUATION
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _PUNCTUATION
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (pre-tokenizer steps, ignore_merges: whether a word in the vocabulary skips the merges) → the name
# of llama.cpp's pre-tokenizer.
_PRE = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
_SPACE = "▁"  # a space in a sentencepiece vocabulary


def describe_tokenizer(writer: GGUFWriter, source: CheckpointSource) -> None:
    """Add the metadata of a model's tokenizer.

    gguf's `SpecialVocab` would guess from files whether a text gets a first and a last token; here
    the tokenizer is asked.

    Args:
        writer: of the file.
        source: the checkpoint.

    Raises:
        CheckpointError: for a model without a tokenizer, or one that does not work.
        UnsupportedModelError: for a tokenizer that llama.cpp does not have.
    """
    tokenizer, config = source.tokenizer(), source.config
    if tokenizer is None:
        raise CheckpointError(f"{source.name}: it has no tokenizer, and llama.cpp needs one")
    with in_one_line(f"{source.name}: its tokenizer cannot be described"):
        vocab = vocabulary(tokenizer, config.vocab_size)
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(vocab.merges)
    writer.add_token_scores(vocab.scores)
    writer.add_add_space_prefix(vocab.space_prefix)
    ids = {}
    for kind in ("bos", "eos", "unk", "pad"):
        for teller in (tokenizer, config):
            token = getattr(teller, f"{kind}_token_id", None)
            if isinstance(token, int) and kind not in ids:
                ids[kind] = token
                getattr(writer, f"add_{kind}_token_id")(token)
    if "eos" not in ids:
        raise CheckpointError(f"{source.name}: its tokenizer names no token that ends a text")
    with in_one_line(f"{source.name}: its tokenizer cannot encode text"):
        encoded = tokenizer("a").input_ids
    writer.add_add_bos_token(encoded[:1] == [ids.get("bos")])
    writer.add_add_eos_token(encoded[-1:] == [ids["eos"]])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF describes it.

    Attributes:
        model: `gpt2` for byte-level BPE, which uses `pre` and `merges`; `llama` for sentencepiece,
            which uses `scores`.
        tokens: text of each token, by id.
        types: type of each token, by id.
        pre: name of the pre-tokenizer, which splits text into words.
        merges: pairs separated by a space, in order of priority.
        scores: priority of each token as the result of a merge, by id.
        space_prefix: whether a space is put in front of a text.
    """

    model: str
    tokens: list[str]
    types: list[TokenType]
    pre: str = "default"
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    space_prefix: bool = False


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Describe a tokenizer to llama.cpp, so that it gives the same tokens.

    Two differences remain: llama.cpp does not normalise text to NFC; and with a sentencepiece
    vocabulary it puts a space in front of a text even if there is one already, or after a special
    token.

    Args:
        tokenizer: with a fast (tokenizers) backend.
        size: of the model's vocabulary; ids without a token are padded.

    Raises:
        UnsupportedModelError: for a tokenizer that llama.cpp does not have, or one with token ids
            of `size` or above.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unsupported("it has no fast form")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or model["dropout"]:
        raise _unsupported(f"its model is {model['type']}, and GGUF holds plain BPE")
    ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    if max(ids.values()) >= size:
        raise _unsupported(f"it has a token {max(ids.values())}, and the model {size} rows")
    tokens = [f"[PAD{token}]" for token in range(size)]
    types = [TokenType.UNUSED] * size
    for text, token in ids.items():
        tokens[token], types[token] = text, TokenType.NORMAL
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    if not model["byte_fallback"]:
        joined = tuple(" ".join(pair) for pair in merges)
        return Vocabulary("gpt2", tokens, types, _pre(spec), joined)
    for byte in (f"<0x{number:02X}>" for number in range(256)):
        if byte not in ids:
            raise _unsupported(f"it has no token '{byte}'")
        types[ids[byte]] = TokenType.BYTE
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    scores, prefix = _scores(tokens, types, merges), _space_prefix(spec)
    return Vocabulary("llama", tokens, types, scores=scores, space_prefix=prefix)


def _pre(spec: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text. Raises UnsupportedModelError."""
    steps, whole = _steps(spec), bool(spec["model"]["ignore_merges"])
    if (steps, whole) not in _PRE:
        raise _unsupported(f"it splits text by {', '.join(steps) or 'nothing'}")
    return _PRE[steps, whole]


def _unsupported(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"llama.cpp cannot split text as this tokenizer does: {why}")


def _steps(spec: dict[str, Any]) -> tuple[str, ...]:
    """The pre-tokenizer steps of byte-level BPE: regular expressions, `digits` and `gpt2`."""
    if (spec["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _unsupported(f"it normalizes text by {spec['normalizer']['type']}")
    first = spec["pre_tokenizer"] or {"type": "Sequence", "pretokenizers": []}
    parts = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        raise _unsupported("its tokens are no bytes of the text as it stands")
    splits = []
    for part in parts[:-1]:
        pattern = part.get("pattern", {}).get("Regex")
        if part["type"] == "Digits" and part["individual_digits"]:
            splits.append("digits")
        elif pattern and part["behavior"] == "Isolated" and not part["invert"]:
            splits.append(pattern)
        else:
            raise _unsupported(f"it splits text by {part['type']}")
    return (*splits, "gpt2") if parts[-1]["use_regex"] else tuple(splits)


def _space_prefix(spec: dict[str, Any]) -> bool:
    """Whether a sentencepiece tokenizer puts a space in front of text."""
    normalizer, pre = spec["normalizer"], spec["pre_tokenizer"]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = {"type": "Prepend", "prepend": _SPACE}
    if pre is None and normalizer == spaces:
        return False
    if pre is None and normalizer == {"type": "Sequence", "normalizers": [prefix, spaces]}:
        return True
    plain = {"type": "Metaspace", "replacement": _SPACE, "split": False}
    if normalizer is None and pre is not None and plain.items() <= pre.items():
        return bool(pre["prepend_scheme"] != "never")
    raise _unsupported("it prepares text otherwise than sentencepiece")


def _scores(
    tokens: list[str], types: list[TokenType], merges: Sequence[tuple[str, ...]]
) -> tuple[float, ...]:
    """A score per token id: merging the best-scored pair first equals the list of merges."""
    ranks: dict[str, int] = {}
    last = ""
    for pair in merges:
        last, before = "".join(pair), last
        if ranks.setdefault(last, len(ranks)) != len(ranks) - 1 and last != before:
            raise _unsupported(f"its merges make '{last}' in two places")
    known, listed = set(tokens), set(merges)
    for token, kind in zip(tokens, types, strict=True):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        if kind is TokenType.NORMAL and any(
            cut not in listed and cut[0] in known and cut[1] in known for cut in cuts
        ):
            raise _unsupported(f"its merges leave out a way to '{token}'")
    return tuple(-float(ranks.get(token, 0)) for token in tokens)
