"""GGUF, the format of llama.cpp: blocks of codes, order of rows for RoPE, tokenizers.

A row is cut into blocks of 32 weights with one float16 scale d each, which may be negative. Q8_0
holds int8 codes q that stand for d · q. Q4_0 holds nibbles n that stand for d · (n − 8), Q4_1 also
a float16 m for d · n + m: element j of a block in the low half of byte j, j + 16 in its high half.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, TokenType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import UnsupportedModelError
from ..rounding.grid import QuantizedWeight

BLOCK = 32  # weights of a block
SCALE_LOSS = 2.0**-9  # largest relative rounding error of a scale: that of bfloat16
TYPES = {  # (bits of a code, symmetric) → block type
    (4, True): GGMLQuantizationType.Q4_0,
    (4, False): GGMLQuantizationType.Q4_1,
    (8, True): GGMLQuantizationType.Q8_0,
}

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


def block_bytes(kind: GGMLQuantizationType) -> int:
    """Bytes of a block: 32 codes, their scale, and for Q4_1 the offset."""
    nbytes: int = GGML_QUANT_SIZES[kind][1]
    return nbytes


def blocks(weight: QuantizedWeight, kind: GGMLQuantizationType) -> Tensor:
    """Encode a quantized matrix in GGUF blocks.

    Args:
        weight: codes (N, K); K and the group size must be multiples of 32. Exact only where
            `lost_scales` is 0.
        kind: the block type of its codes.

    Returns:
        uint8 (N, K / 32 · block_bytes).
    """
    scales, offsets = _block_scales(weight)
    numbers = [scales] if offsets is None else [scales, offsets]
    codes = weight.codes.unflatten(1, (-1, BLOCK))
    if kind is not GGMLQuantizationType.Q8_0:
        low, high = (codes + 8).chunk(2, -1)
        codes = low | high << 4
    parts = [torch.stack(numbers, -1).half().view(torch.uint8), codes.view(torch.uint8)]
    return torch.cat(parts, -1).flatten(1)


def lost_scales(weight: QuantizedWeight) -> int:
    """The number of block scales that float16 cannot hold: overflow, or error > SCALE_LOSS."""
    exact, offsets = _block_scales(weight)
    lost = (exact.half().float() - exact).abs() > SCALE_LOSS * exact.abs()
    if offsets is not None:
        lost |= offsets.half().isinf()
    return int(lost.sum())


def _block_scales(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """Scales d, and with zero points offsets m, both float32 (N, K / 32).

    Both are 0 in a block in which all weights are zero, whose scale has no effect.
    """
    scales, (_, columns) = weight.scales, weight.codes.shape
    steps = scales.step_by_column(columns // BLOCK, torch.float32)
    zeros = scales.zero_by_column(columns, torch.int8)
    levels = weight.codes if zeros is None else weight.codes - zeros
    steps = torch.where(levels.unflatten(1, (-1, BLOCK)).any(-1), steps, 0.0)
    lowest = scales.zero_by_column(columns // BLOCK, torch.float32)
    # From the scale rounded to float16, so that a weight of zero stays near zero.
    return steps, None if lowest is None else -steps.half().float() * (lowest + 8)


def paired_rows(rows: int, heads: int) -> Tensor:
    """Order of a query's or key's rows that makes the rows of each RoPE pair adjacent.

    transformers rotates element j of a head together with element j + head_size / 2.

    Args:
        rows: of the matrix: heads · head_size.
        heads: of the query or key.

    Returns:
        int64 (rows,): the source row of each row.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def with_rows(weight: QuantizedWeight, order: Tensor) -> QuantizedWeight:
    """A quantized matrix with its rows permuted: row i is row `order[i]`, int64 (N,)."""
    return QuantizedWeight(weight.codes[order], weight.scales.map(lambda values: values[order]))


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
        steps, whole = _steps(spec), bool(model["ignore_merges"])
        if (steps, whole) not in _PRE:
            raise _unsupported(f"it splits text by {', '.join(steps) or 'nothing'}")
        joined = tuple(" ".join(pair) for pair in merges)
        return Vocabulary("gpt2", tokens, types, _PRE[steps, whole], joined)
    for byte in (f"<0x{number:02X}>" for number in range(256)):
        if byte not in ids:
            raise _unsupported(f"it has no token '{byte}'")
        types[ids[byte]] = TokenType.BYTE
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    scores, prefix = _scores(tokens, types, merges), _space_prefix(spec)
    return Vocabulary("llama", tokens, types, scores=scores, space_prefix=prefix)


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
