"""What a finished quantization says of itself: the closing figures and the model card."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .recipe import FLOAT_BITS

if TYPE_CHECKING:
    from .pipeline import Result

W4A8_HINT = (
    "Without INT4 tensor-core instructions (CPUs, Hopper and later, Triton anywhere) these 4-bit "
    "activations run as int8 operands: the products cost what W4A8's cost, and W4A8 is far more "
    "accurate. To make it: smoothq quantize {model} --w4a8 -o OUT"
)


def as_dict(result: Result) -> dict[str, Any]:
    """The closing figures as plain data, for `--json` and for scripts."""
    return {
        "model": result.name,
        "recipe": result.recipe.model_dump(mode="json"),
        "bits": {name: round(value, 4) for name, value in asdict(result.bits).items()},
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "linear_bytes": result.linear_bytes,
        "seconds": round(result.seconds, 1),
        "peak_memory_bytes": result.peak_memory,
        "causal": result.recipe.causal,
        "notes": list(result.notes),
    }


def rows(result: Result) -> list[tuple[str, str]]:
    """The closing table: label and value."""
    bits = result.bits
    float_input = result.recipe.activations.bits == FLOAT_BITS
    activation = "16 (float)" if float_input else f"{bits.activation:.2f}"
    if not float_input and abs(bits.activation_decode - bits.activation) >= 0.005:
        activation += f", one-token decode {bits.activation_decode:.2f}"
    return [
        ("method", result.recipe.name),
        ("bits per weight, scales counted", f"{bits.weight:.2f}"),
        ("bits per activation, scales counted", activation),
        (
            "size",
            f"{result.bytes_before / 1e6:.1f} MB → {result.bytes_after / 1e6:.1f} MB "
            f"({result.bytes_after / result.bytes_before:.2f} times)",
        ),
        ("time", f"{result.seconds:.0f} s"),
        ("peak memory, libraries included", f"{result.peak_memory / 1e9:.2f} GB"),
    ]


def remarks(result: Result) -> list[str]:
    """What the user should know beside the figures, one line each."""
    lines = list(result.notes)
    if not result.recipe.causal:
        lines.append(
            "This recipe is not causal: later tokens, padding and chunking change earlier logits. "
            "It reproduces a paper; do not serve it."
        )
    if result.recipe.activations.bits == 4:
        lines.append(W4A8_HINT.format(model=result.name))
    return lines


def model_card(result: Result) -> str:
    """The README.md of a quantized checkpoint."""
    table = "\n".join(f"| {label} | {value} |" for label, value in rows(result))
    notes = "\n".join(f"- {line}" for line in remarks(result))
    return f"""---
library_name: transformers
base_model: {result.name}
tags:
- smoothq
- quantized
---

# {result.name}, quantized with smoothq

| | |
|---|---|
{table}

{notes}

## Load it

```python
import smoothq  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

## Recipe

```yaml
{result.recipe.to_yaml()}```
"""
