"""Which of vLLM's kernels would run an export, layer by layer: read from its code, not tried.

The rules are those of vLLM 0.32: how it chooses a scheme for a linear (compressed_tensors.py), and
the first kernel in its platform's list that supports the scheme (kernels/linear). Linears that
read the same tensor are merged into one matrix. Packed weights with quantized activations go to
kernels that silently leave activations in 16 bits, except Humming (vLLM issues 38066 and 50807).
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
# Group sizes of weight scales that each kernel supports; None: one scale an output channel.
MARLIN_GROUPS = (None, 32, 64, 128)
MACHETE_GROUPS = (None, 64, 128)
TRITON_GROUPS = (None, 32, 64, 128, 256)
HUMMING = "HummingLinearKernel"
NOT_KNOWN = "not known"  # of formats whose kernels were not read


@dataclass(frozen=True)
class LayerKernel:
    """The kernels that vLLM would take for one kind of layer.

    Attributes:
        layers: the stage of the block that the layers are, such as `qkv` or `down`.
        count: blocks that have such a layer.
        scheme: bits, group size and format of weights and activations, as text.
        shape: (N, K) of the merged matrix, N outputs and K inputs.
        kernels: kernel names by device of `DEVICES`, None where no kernel supports the layer, and
            NOT_KNOWN for formats whose kernels were not read.
        floats: devices whose kernel leaves activations in 16 bits although the scheme quantizes
            them.
    """

    layers: str
    count: int
    scheme: str
    shape: tuple[int, int]
    kernels: dict[str, str | None]
    floats: tuple[str, ...]


def layer_kernels(model: PreTrainedModel, quantization: dict[str, Any]) -> list[LayerKernel]:
    """The kernels for each kind of layer of an export: same stage, scheme and shape.

    Args:
        model: its skeleton: no weight is read.
        quantization: `quantization_config` of the export's config.json.

    Returns:
        One entry for each kind of layer, in the order of execution.

    Raises:
        CheckpointError: the quantization_config is not one of compressed-tensors.
    """
    plan = make_plan(model, Recipe())
    schemes = schemes_of(quantization, [name for name, _, _ in plan.linears()])
    blocks_with: dict[tuple[str, Scheme, tuple[int, int]], int] = {}
    for block, site in plan.named_sites():
        scheme = schemes.get(f"{block}.{next(iter(site.modules))}")
        if scheme is not None:
            shape = (sum(spec.out_features for spec in site.modules.values()), site.input.width)
            key = (site.site.stage, scheme, shape)
            blocks_with[key] = blocks_with.get(key, 0) + 1
    return [
        _layer_kernel(stage, count, scheme, shape)
        for (stage, scheme, shape), count in blocks_with.items()
    ]


def _layer_kernel(stage: str, count: int, scheme: Scheme, shape: tuple[int, int]) -> LayerKernel:
    kernels = {device: kernel_of(scheme, shape, device) for device in DEVICES}
    quantizes = scheme.input_bits != FLOAT_BITS and scheme.format == "pack-quantized"
    exact = (None, HUMMING, NOT_KNOWN)
    floats = [d for d, kernel in kernels.items() if quantizes and kernel not in exact]
    return LayerKernel(stage, count, str(scheme), shape, kernels, tuple(floats))


def kernel_of(scheme: Scheme, shape: tuple[int, int], device: str) -> str | None:
    """The kernel that vLLM takes for a matrix, without tensor parallelism, in a 16-bit float dtype.

    Args:
        scheme: format, bits and group size of its weights, and bits of its inputs.
        shape: (N, K), outputs and inputs.
        device: one of `DEVICES`.

    Returns:
        The name of the kernel's class, None if no kernel supports the matrix, or NOT_KNOWN.
    """
    if "float" in (scheme.type, scheme.input_type) or scheme.bits not in (4, 8):
        return NOT_KNOWN
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


def table(layers: list[LayerKernel]) -> Table:
    """The table that `smoothq plan` prints of an export: a row a kind of layer."""
    return columns(
        f"Kernels that vLLM {VERSION} would take, read from its code",
        ("", "scheme", "N, K", *DEVICES),
        [
            (
                f"{layer.count} {layer.layers}",
                layer.scheme,
                ", ".join(map(str, layer.shape)),
                *(_short(kernel) for kernel in layer.kernels.values()),
            )
            for layer in layers
        ],
    )


def _short(kernel: str | None) -> str:
    """A kernel's name without the suffix that all have."""
    return (kernel or "none").removesuffix("LinearKernel").replace("ScaledMM", "")


def remarks(layers: list[LayerKernel]) -> list[str]:
    """Warnings for the user: layers without a kernel, and activations that stay in 16 bits."""
    floats = [device for device in DEVICES if any(device in layer.floats for layer in layers)]
    lines = []
    if any(kernel is None for layer in layers for kernel in layer.kernels.values()):
        lines.append("Where it has none vLLM refuses to load the model, and says so.")
    if any(kernel == NOT_KNOWN for layer in layers for kernel in layer.kernels.values()):
        lines.append(
            "Kernels of floating-point formats, and of 2 and 3 bits, are not known here: see "
            "vLLM's table of supported hardware."
        )
    if floats:
        lines.append(
            f"On {', '.join(floats)} vLLM would leave these activations in 16 bits without saying "
            "so: the weights are served, the activations' bits are not."
        )
    if any(device != "CPU" for device in floats):
        lines.append("On CUDA `vllm serve --linear-backend humming` quantizes them.")
    return lines
