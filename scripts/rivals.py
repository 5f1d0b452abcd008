"""Another engine for `bench_model.py`: the same shapes, random weights, a process of its own.

    PYTHONPATH=DIR python scripts/rivals.py torchao --size 1.1b

DIR is where `pip install --target DIR` put the engine; PyTorch is this project's. It answers a line
of JSON, a task, with another: the seconds of one step.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import typer
from bench_model import Contender, Task
from models import Size, Where, config_of, random_float_model
from transformers import LlamaConfig, PreTrainedModel

Engine = Literal["torchao", "quanto", "llama.cpp-q8_0", "llama.cpp-q4_0"]
Timed = Callable[[Task], float]


def torchao(model: PreTrainedModel) -> str:
    """int8 weights, activations quantized to int8 a token at run time."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return "torchao, int8 dynamic"


def quanto(model: PreTrainedModel) -> str:
    """int8 weights and activations, calibrated on a few tokens."""
    from optimum.quanto import Calibration, freeze, qint8, quantize

    quantize(model, weights=qint8, activations=qint8)
    with Calibration():
        model(torch.arange(8).unsqueeze(0))
    freeze(model)
    return "quanto, int8"


def in_torch(change: Callable[[PreTrainedModel], str], config: LlamaConfig) -> tuple[str, Timed]:
    """An engine that changes a float32 model in place."""
    where = Where(torch.device("cpu"), torch.float32)
    model = random_float_model(config, where)
    name = change(model)
    return name, Contender(name, model, where).seconds


def llama_cpp(kind: str, config: LlamaConfig) -> tuple[str, Timed]:
    """llama.cpp through llama-cpp-python, on a GGUF file of the same shapes."""
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.gguf"
        write_gguf(path, kind, config)
        llama = Llama(
            str(path),
            n_ctx=4096,
            n_batch=2048,
            n_ubatch=512,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            use_mmap=False,
            verbose=False,
        )
    numbers = np.random.default_rng(0)

    def seconds(task: Task) -> float:
        if task.batch > 1:
            return math.inf  # its Python door decodes one sequence at a time
        llama.reset()
        if task.kind == "prefill":
            prompt = numbers.integers(1, config.vocab_size, task.tokens).tolist()
            return timed(lambda: llama.eval(prompt))
        llama.eval([1] * task.context)
        return timed(lambda: [llama.eval([1]) for _ in range(task.steps)]) / task.steps

    return f"llama.cpp, {kind.upper()}", seconds


def write_gguf(path: Path, kind: str, config: LlamaConfig) -> None:
    """A Llama with random weights, its matrices in one of GGUF's types."""
    import gguf

    assert config.num_key_value_heads is not None

    quantized = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(path, "llama")
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    hidden, wide, few = (
        config.hidden_size,
        config.intermediate_size,
        config.num_key_value_heads * size,
    )
    numbers = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = numbers.standard_normal((rows, columns), dtype=np.float32) * columns**-0.5
        writer.add_tensor(name, gguf.quants.quantize(values, quantized), raw_dtype=quantized)

    matrix("token_embd.weight", config.vocab_size, hidden)
    if not config.tie_word_embeddings:
        matrix("output.weight", config.vocab_size, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    for layer in range(config.num_hidden_layers):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{norm}.weight", np.ones(hidden, dtype=np.float32))
        shapes = {
            "attn_q": (hidden, hidden),
            "attn_k": (few, hidden),
            "attn_v": (few, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (wide, hidden),
            "ffn_up": (wide, hidden),
            "ffn_down": (hidden, wide),
        }
        for name, shape in shapes.items():
            matrix(f"{block}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def main(engine: Annotated[str, typer.Argument()], size: Size = "1.1b") -> None:
    """Build the model, then answer tasks."""
    if engine not in get_args(Engine):
        raise typer.BadParameter(f"'{engine}' is none of {', '.join(get_args(Engine))}")
    config, answers = config_of(size), sys.stdout
    sys.stdout = sys.stderr  # engines print what they like there
    engines: dict[str, Callable[[], tuple[str, Timed]]] = {
        "torchao": lambda: in_torch(torchao, config),
        "quanto": lambda: in_torch(quanto, config),
        "llama.cpp-q8_0": lambda: llama_cpp("q8_0", config),
        "llama.cpp-q4_0": lambda: llama_cpp("q4_0", config),
    }
    name, seconds = engines[engine]()

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer(name=name)
    for line in sys.stdin:
        answer(seconds=seconds(Task(**json.loads(line))))


if __name__ == "__main__":
    typer.run(main)
