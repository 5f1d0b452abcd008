"""Perplexity in llama.cpp of GGUF files that `smoothq export` wrote, beside its own rounding.

    PYTHONPATH=.rivals/llamacpp python scripts/gguf_check.py --model DIR --text wiki.test.raw A.gguf

For each file also the float model DIR in the same types, rounded as llama.cpp's own tools do (plain
round to nearest, block by block): what the codes in the file gain over that. `make rivals` installs
llama-cpp-python. Only Llama's order of rows is known here.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from llama_cpp import Llama
from safetensors import safe_open
from transformers import AutoTokenizer

from smoothq.data.text import TextSource, evaluation_tokens
from smoothq.export.gguf_tensors import paired_rows

FLOATS = {GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")}
HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv"}


def perplexity(file: Path, tokens: torch.Tensor, length: int, windows: int) -> float:
    """exp of the mean negative log-likelihood of all tokens of each window but its first."""
    model = Llama(str(file), n_ctx=length, n_batch=length, logits_all=True, verbose=False)
    total = 0.0
    for window in tokens[0].split(length)[:windows]:
        model.reset()
        model.eval(window.tolist())
        likelihood = torch.tensor(model.scores[: length - 1]).double().log_softmax(-1)
        total -= likelihood.gather(1, window[1:, None]).sum().item()
    return math.exp(total / (windows * (length - 1)))


def write_plain(file: Path, model: Path, output: Path) -> None:
    """The float model in a file's types, its quantized tensors rounded by gguf's own code."""
    reader, writer = GGUFReader(file), GGUFWriter(output, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value_type = field.types[0]
            of = field.types[-1] if value_type is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), value_type, of)
    blocks = reader.fields["llama.block_count"].contents()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    with safe_open(model / "model.safetensors", "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (not a dict)
            found = names.get_name(key, (".weight", ".bias"))
            if found is None:
                raise SystemExit(f"{key} has no name in GGUF")
            values = tensors.get_tensor(key).float()
            part = found.split(".")[-2]
            if part in HEADS:
                heads = reader.fields[f"llama.attention.{HEADS[part]}"].contents()
                values = values[paired_rows(len(values), heads)]
            kind = kinds[found]
            if kind in FLOATS:
                kind = GGMLQuantizationType.F32
            data = gguf.quants.quantize(values.numpy(), kind)
            writer.add_tensor(found, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Print a line a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the float model")
    parser.add_argument("--text", default="wikitext2", help="evaluation text")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = evaluation_tokens(tokenizer, TextSource(arguments.text))
    measure = (tokens, arguments.sequence_length, arguments.windows)
    for file in arguments.files:
        with tempfile.TemporaryDirectory() as scratch:
            plain = Path(scratch) / "plain.gguf"
            write_plain(file, arguments.model, plain)
            own, theirs = perplexity(file, *measure), perplexity(plain, *measure)
        print(f"{file}: {own:.3f}; the same types rounded by llama.cpp's rule: {theirs:.3f}")


if __name__ == "__main__":
    main()
