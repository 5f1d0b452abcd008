"""The figures of a quantization or export as data and as table rows, and the model cards."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..checkpoint.source import families_of
from ..plan.plan import Bits, Plan
from ..recipe.recipe import FLOAT_BITS, Recipe
from .results import ResourceEstimate, TimeEstimate, duration_text

if TYPE_CHECKING:
    from .results import ExportResult, QuantizeResult

LOADING, RECIPE = "## Load it", "## Recipe"  # headings of a model card

W4A8_HINT = (
    "Without INT4 tensor-core instructions (CPUs, Hopper and later, Triton anywhere) these 4-bit "
    "activations run as int8 operands: the products cost what W4A8's cost, and W4A8 is far more "
    "accurate. To make it: smoothq quantize {model} --w4a8 -o OUT"
)


def as_dict(result: QuantizeResult) -> dict[str, Any]:
    """The figures of a quantization as plain data, for `--json` and for scripts."""
    return _figures(result, result.name, result.bytes_before, result.bytes_after) | {
        "seconds": round(result.seconds, 1),
        "peak_memory_bytes": result.peak_memory,
        "repeated": result.repeated,
    }


def rows(result: QuantizeResult) -> list[tuple[str, str]]:
    """The rows (label, value) of the table printed after a quantization."""
    return [
        *_rows(result.recipe, result.bits, result.bytes_before, result.bytes_after),
        ("time", duration_text(result.seconds)),
        ("peak memory, libraries included", f"{result.peak_memory / 1e9:.2f} GB"),
    ]


def plan_as_dict(
    model: str, before: int, plan: Plan, estimate: TimeEstimate, needs: ResourceEstimate
) -> dict[str, Any]:
    """The figures of a planned quantization as plain data.

    Args:
        model: the model's name.
        before: bytes of the float model.
        plan: the plan.
        estimate: its estimated time.
        needs: its estimated memory and disk space.
    """
    return _figures(plan, model, before, plan.total_bytes) | {
        "estimated_seconds": round(estimate.seconds, 1),
        "estimated_memory_bytes": needs.memory,
        "estimated_disk_bytes": needs.disk,
    }


def plan_rows(
    before: int, plan: Plan, estimate: TimeEstimate, needs: ResourceEstimate
) -> list[tuple[str, str]]:
    """The rows (label, value) of the table printed for a planned quantization.

    Args:
        before: bytes of the float model.
        plan: the plan.
        estimate: its estimated time.
        needs: its estimated memory and disk space.
    """
    return [
        *_rows(plan.recipe, plan.bits, before, plan.total_bytes),
        ("time, estimated for this machine", duration_text(estimate.seconds)),
        ("memory and disk, estimated", needs_text(needs)),
    ]


def needs_text(needs: ResourceEstimate) -> str:
    """Memory and disk space of a run as text: `2.1 GB of memory, 0.5 GB of disk`."""
    where = ", hidden states on the disk" if needs.states_on_disk else ""
    return f"{needs.memory / 1e9:.1f} GB of memory, {needs.disk / 1e9:.1f} GB of disk{where}"


def activation_bits(bits: Bits, code_bits: int) -> str:
    """Average bits per activation as text; in prefill, and in decode if that differs.

    Args:
        bits: the plan's average bits.
        code_bits: `activations.bits` of the recipe.
    """
    if code_bits == FLOAT_BITS:
        return "16 (float)"
    text = f"{bits.activation:.2f}"
    if abs(bits.activation_decode - bits.activation) >= 0.005:
        text += f", one-token decode {bits.activation_decode:.2f}"
    return text


def _figures(outcome: QuantizeResult | Plan, model: str, before: int, after: int) -> dict[str, Any]:
    return {
        "model": model,
        "recipe": outcome.recipe.model_dump(mode="json"),
        "bits": {name: round(value, 4) for name, value in asdict(outcome.bits).items()},
        "bytes_before": before,
        "bytes_after": after,
        "linear_bytes": outcome.linear_bytes,
        "causal": outcome.recipe.causal,
        "notes": list(outcome.notes),
    }


def _rows(recipe: Recipe, bits: Bits, before: int, after: int) -> list[tuple[str, str]]:
    cached = [("bits per cached key and value, scales counted", f"{bits.cached:.2f}")]
    return [
        ("method", recipe.name),
        ("bits per weight, scales counted", f"{bits.weight:.2f}"),
        ("bits per activation, scales counted", activation_bits(bits, recipe.activations.bits)),
        *(cached if recipe.kv_cache is not None else []),
        ("size", f"{before / 1e6:.1f} MB → {after / 1e6:.1f} MB ({after / before:.2f} times)"),
    ]


def remarks(outcome: QuantizeResult | Plan, model: str) -> list[str]:
    """Notes and warnings for the user, one line each.

    Args:
        outcome: a finished or a planned quantization.
        model: the model's name.
    """
    lines = list(outcome.notes)
    if not outcome.recipe.causal:
        lines.append(
            "This recipe is not causal: later tokens, padding and chunking change earlier logits. "
            "It reproduces a paper; do not serve it."
        )
    if outcome.recipe.activations.bits == 4:
        lines.append(W4A8_HINT.format(model=model))
    return lines


def model_card(result: QuantizeResult) -> str:
    """The README.md of a quantized checkpoint."""
    # Without time and memory: equal quantizations have equal cards.
    figures = _rows(result.recipe, result.bits, result.bytes_before, result.bytes_after)
    table = "\n".join(f"| {label} | {value} |" for label, value in figures)
    notes = "\n".join(f"- {line}" for line in remarks(result, result.name))
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

{LOADING}

```python
import smoothq  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

{RECIPE}

```yaml
{result.recipe.to_yaml()}```
"""


def export_rows(exported: ExportResult) -> list[tuple[str, str]]:
    """The rows (label, value) of the table printed after an export."""
    size = f"{exported.bytes_before / 1e6:.1f} MB → {exported.bytes_after / 1e6:.1f} MB"
    if exported.added_bytes:
        size += f", {exported.added_bytes / 1e6:.1f} MB of them a head of its own"
    schemes = ", ".join(f"{name}: {count}" for name, count in exported.schemes.items())
    rows = [("linears", schemes), ("size", size)]
    if exported.left_out:
        names = families_of(exported.left_out)
        rows.append(("left out, for what it reads is rotated", f"{names}"))
    return [*rows, ("time", duration_text(exported.seconds))]


def served_card(card: str, exported: ExportResult) -> str:
    """The README.md of an export in the compressed-tensors format.

    Args:
        card: the README.md of the exported checkpoint.
        exported: the figures of the export.
    """
    figures = "\n".join(f"- {label}: {value}" for label, value in export_rows(exported)[:-1])
    before, _, rest = card.partition(LOADING)
    _, _, recipe = rest.partition(RECIPE)
    return f"""{before}{LOADING}

In the compressed-tensors format, written by smoothq, which is not needed to read it:

{figures}

```python
from transformers import AutoModelForCausalLM  # with: pip install compressed-tensors

model = AutoModelForCausalLM.from_pretrained("PATH")
```

```sh
vllm serve PATH
```

{RECIPE}{recipe}"""
