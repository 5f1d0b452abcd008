"""Which of vLLM's kernels would run an export, layer by layer: read from its code, not tried.

The rules are those of vLLM 0.32: how a scheme is found for a linear (compressed_tensors.py), and
the first kernel in its platform's list that can take it (kernels/linear). All that reads one tensor
is one matrix there. Packed weights with quantized activations go to kernels that leave activations
in 16 bits, without a word, unless Humming has them (vLLM issues 38066 and 50807).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from ..export.schemes import Scheme, schemes_of
from ..plan.resolve import make_plan
from ..recipe.recipe import FLOAT_BITS, Recipe
from ..report.table import columns

VERSION = "0.32"
DEVICES = ("CPU", "A100", "H100")
MARLIN_GROUPS = (None, 32, 64, 128)
MACHETE_GROUPS = (None, 64, 128)
TRITON_GROUPS = (None, 32, 64, 128, 256)
HUMMING = "HummingLinearKernel"


@dataclass(frozen=True)
class LayerKernel:
    """What vLLM would do with some layers.

    layers: their stage. count: blocks that have them. shape: (N, K) of the merged matrix. kernels:
    by device, None where no kernel takes them. floats: devices whose kernel leaves activations in
    16 bits although the scheme quantizes them.
    """

    layers: str
    count: int
    scheme: str
    shape: tuple[int, int]
    kernels: dict[str, str | None]
    floats: tuple[str, ...]


def layer_kernels(model: PreTrainedModel, quantization: dict[str, Any]) -> list[LayerKernel]:
    """Every kind of layer of an export. model: a skeleton; quantization: its config's entry.

    Raises CheckpointError for a quantization_config of another kind.
    """
    plan = make_plan(model, Recipe())
    schemes = schemes_of(quantization, [name for name, _, _ in plan.linears()])
    found: dict[tuple[str, Scheme, tuple[int, int]], int] = {}
    for index, _, site in plan.sites():
        scheme = schemes.get(f"{plan.block_name(index)}.{next(iter(site.modules))}")
        if scheme is not None:
            shape = (sum(spec.out_features for spec in site.modules.values()), site.input.width)
            key = (site.site.stage, scheme, shape)
            found[key] = found.get(key, 0) + 1
    return [_served(stage, count, scheme, shape) for (stage, scheme, shape), count in found.items()]


def _served(stage: str, count: int, scheme: Scheme, shape: tuple[int, int]) -> LayerKernel:
    kernels = {device: kernel_of(scheme, shape, device) for device in DEVICES}
    quantizes = scheme.input_bits != FLOAT_BITS and scheme.format == "pack-quantized"
    floats = [d for d, kernel in kernels.items() if quantizes and kernel not in (None, HUMMING)]
    return LayerKernel(stage, count, str(scheme), shape, kernels, tuple(floats))


def kernel_of(scheme: Scheme, shape: tuple[int, int], device: str) -> str | None:
    """The kernel of a matrix (N, K) on a device of `DEVICES`, of one rank, in 16-bit floats."""
    if scheme.format == "int-quantized":
        return f"{'CPU' if device == 'CPU' else 'Cutlass'}Int8ScaledMMLinearKernel"
    (n, k), group = shape, scheme.group_size
    wide = scheme.bits == 8 and not scheme.symmetric
    if device == "CPU":
        takes = scheme.bits == 4 and n % 32 == 0 and k % 32 == 0 and (group or 2) % 2 == 0
        return "CPUWNA16LinearKernel" if takes else None
    if device == "H100":  # where Humming comes before Marlin
        fits = group in MACHETE_GROUPS and k % 64 == 0 and n % 128 == 0
        return "MacheteLinearKernel" if fits else HUMMING
    if group in MARLIN_GROUPS and not wide:
        return "MarlinLinearKernel"
    if scheme.bits == 4 and group in TRITON_GROUPS and n % 8 == 0:
        return "TritonW4A16LinearKernel"
    return HUMMING


def table(found: list[LayerKernel]) -> Table:
    """What `smoothq plan` prints of an export."""
    return columns(
        f"Kernels that vLLM {VERSION} would take, read from its code",
        ("", "scheme", "N, K", *DEVICES),
        [
            (
                f"{each.count} {each.layers}",
                each.scheme,
                ", ".join(map(str, each.shape)),
                *(_short(kernel) for kernel in each.kernels.values()),
            )
            for each in found
        ],
    )


def _short(kernel: str | None) -> str:
    """A kernel's name without what all have."""
    return (kernel or "none").removesuffix("LinearKernel").replace("ScaledMM", "")


def remarks(found: list[LayerKernel]) -> list[str]:
    """What the user should know of it, one line each."""
    floats = [device for device in DEVICES if any(device in each.floats for each in found)]
    lines = []
    if any(kernel is None for each in found for kernel in each.kernels.values()):
        lines.append("Where it has none vLLM refuses to load the model, and says so.")
    if floats:
        lines.append(
            f"On {', '.join(floats)} vLLM would leave these activations in 16 bits without saying "
            "so: the weights are served, the activations' bits are not."
        )
    if any(device != "CPU" for device in floats):
        lines.append("On CUDA `vllm serve --linear-backend humming` quantizes them.")
    return lines
