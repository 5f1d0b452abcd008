"""The figures of a plan, a quantization or an export: as rows of a table and as plain data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

from ..checkpoint.weight_files import families_of
from ..plan.plan import Bits, Plan
from ..recipe.recipe import FLOAT_BITS, Recipe
from .results import ExportResult, ResourceEstimate, TimeEstimate, duration_text

W4A8_HINT = (
    "Without INT4 tensor-core instructions (CPUs, Hopper and later, Triton anywhere) these 4-bit "
    "activations run as int8 operands: the products cost what W4A8's cost, and W4A8 is far more "
    "accurate. To make it: smoothq quantize {model} --w4a8 -o OUT"
)
EMULATED = (
    "smoothq emulates products of floating-point activations: inputs are rounded to the format, "
    "and multiplied as the floats that their codes stand for. FP8 codes themselves are multiplied "
    "on GPUs that do (Ada, Hopper, B200, MI350), MX codes on B200 and MI350: "
    "smoothq.kernels.report names each layer's product. Servers multiply codes of every format, "
    "on hardware that does."
)


class Outcome(Protocol):
    """What a plan and a finished quantization have in common."""

    @property
    def recipe(self) -> Recipe:
        """The recipe, with what the model's own code asks for added to `keep`."""

    @property
    def bits(self) -> Bits:
        """Bits an element, averaged over all linears."""

    @property
    def linear_bytes(self) -> int:
        """Bytes of all quantized weights with their scales."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""


def plan_as_dict(
    model: str, before: int, plan: Plan, estimate: TimeEstimate, needs: ResourceEstimate
) -> dict[str, Any]:
    """What a recipe would come to, as plain data. before: bytes of the model as it is."""
    return outcome_as_dict(plan, model, before, plan.total_bytes) | {
        "estimated_seconds": round(estimate.seconds, 1),
        "estimated_memory_bytes": needs.memory,
        "estimated_disk_bytes": needs.disk,
    }


def plan_rows(
    before: int, plan: Plan, estimate: TimeEstimate, needs: ResourceEstimate
) -> list[tuple[str, str]]:
    """The table of what a recipe would come to: label and value."""
    return [
        *size_rows(plan.recipe, plan.bits, before, plan.total_bytes),
        ("time, estimated for this machine", duration_text(estimate.seconds)),
        ("memory and disk, estimated", needs_text(needs)),
    ]


def needs_text(needs: ResourceEstimate) -> str:
    """What a run takes, as one would say it."""
    where = ", hidden states on the disk" if needs.states_on_disk else ""
    return f"{needs.memory / 1e9:.1f} GB of memory, {needs.disk / 1e9:.1f} GB of disk{where}"


def activation_bits(bits: Bits, code_bits: int) -> str:
    """Bits an activation in prefill, and in decode where they differ. code_bits: the recipe's."""
    if code_bits == FLOAT_BITS:
        return "16 (float)"
    text = f"{bits.activation:.2f}"
    if abs(bits.activation_decode - bits.activation) >= 0.005:
        text += f", one-token decode {bits.activation_decode:.2f}"
    return text


def outcome_as_dict(outcome: Outcome, model: str, before: int, after: int) -> dict[str, Any]:
    """Recipe, bits and bytes as plain data. before, after: bytes of all tensors."""
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


def size_rows(recipe: Recipe, bits: Bits, before: int, after: int) -> list[tuple[str, str]]:
    """Method, bits and size: label and value."""
    cached = [("bits per cached key and value, scales counted", f"{bits.cached:.2f}")]
    return [
        ("method", recipe.name),
        ("bits per weight, scales counted", f"{bits.weight:.2f}"),
        ("bits per activation, scales counted", activation_bits(bits, recipe.activations.bits)),
        *(cached if recipe.kv_cache is not None else []),
        ("size", f"{before / 1e6:.1f} MB → {after / 1e6:.1f} MB ({after / before:.2f} times)"),
    ]


def remarks(outcome: Outcome, model: str) -> list[str]:
    """What the user should know beside the figures, one line each."""
    lines = list(outcome.notes)
    if not outcome.recipe.causal:
        lines.append(
            "This recipe is not causal: later tokens, padding and chunking change earlier logits. "
            "It reproduces a paper; do not serve it."
        )
    if outcome.recipe.activations.is_float:
        lines.append(EMULATED)
    elif outcome.recipe.activations.bits == 4:
        lines.append(W4A8_HINT.format(model=model))
    return lines


def export_rows(exported: ExportResult) -> list[tuple[str, str]]:
    """The closing table of an export: label and value."""
    size = f"{exported.bytes_before / 1e6:.1f} MB → {exported.bytes_after / 1e6:.1f} MB"
    if exported.added_bytes:
        size += f", {exported.added_bytes / 1e6:.1f} MB of them a head of its own"
    schemes = ", ".join(f"{name}: {count}" for name, count in exported.schemes.items())
    rows = [("linears", schemes), ("size", size)]
    if exported.left_out:
        names = families_of(exported.left_out)
        rows.append(("left out, for what it reads is rotated", f"{names}"))
    return [*rows, ("time", duration_text(exported.seconds))]
