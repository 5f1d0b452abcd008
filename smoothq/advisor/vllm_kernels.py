"""Which of vLLM's kernels would run an export, layer by layer: read from its code, not tried.

The rules are those of vLLM 0.33: how it chooses a scheme for a linear (compressed_tensors.py), and
the first kernel in its platform's list that supports the scheme (kernels/linear), with FlashInfer
and Humming installed, without environment variables, for a model in bfloat16. Linears that read the
same tensor are merged into one matrix. Kernels for packed weights silently leave activations in 16
bits (vLLM issues 38066 and 50807), Humming too where weights have scales of groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from ..export.schemes import Scheme, schemes_of
from ..plan.resolve import make_plan
from ..recipe.recipe import Recipe
from ..report.table import columns

VERSION = "0.33"
DEVICES = ("CPU", "A100", "L4, L40S", "H100", "B200, B300", "MI300X", "MI350X")
# Group sizes of weight scales that each kernel supports; None: one scale an output channel.
MARLIN_GROUPS = (None, 32, 64, 128)
MACHETE_GROUPS = (None, 64, 128)
TRITON_GROUPS = (None, 32, 64, 128, 256)
CUTLASS_GROUP = 128  # of 4-bit weights beside FP8 activations
LEAST_MXFP8 = 128  # outputs and inputs of a matrix that FlashInfer's MXFP8 kernels take
HUMMING = "HummingLinearKernel"
NOT_KNOWN = "not known"  # where it depends on more than the device, or on code that was not read
BLOCKS = "DeepGEMM, FlashInfer or Cutlass"  # by packages and shapes; all of them multiply FP8
HUMMING_FP8 = "HummingFP8ScaledMMLinearKernel"  # leaves activations in 16 bits
# Kernels whose weights alone are of few bits.
WEIGHTS_ONLY = (
    "CPUWNA16LinearKernel",
    "MacheteLinearKernel",
    "MarlinLinearKernel",
    "TritonW4A16LinearKernel",
    HUMMING_FP8,
    "MarlinFP8ScaledMMLinearKernel",
    "MarlinMxfp8LinearKernel",
    "MarlinMxFp4LinearKernel",
    "MarlinNvFp4LinearKernel",
    "EmulationMxfp8LinearKernel",
)
HUMMING_ROUNDS = {
    "HummingMxfp8LinearKernel",
    "HummingMxFp4LinearKernel",
    "HummingNvFp4LinearKernel",
}
EMULATIONS = ("EmulationMxfp4LinearKernel", "EmulationNvFp4LinearKernel")
# By layout and device, in the order of `DEVICES`.
OF_MX_AND_NVFP4: dict[str, tuple[str | None, ...]] = {
    "mxfp8-quantized": (
        None,
        *("MarlinMxfp8LinearKernel",) * 2,
        "HummingMxfp8LinearKernel",
        "FlashInferCutedslMxfp8LinearKernel",
        "EmulationMxfp8LinearKernel",
        "RocmDotScaledMxfp8LinearKernel",
    ),
    "mxfp4-pack-quantized": (
        None,
        *("MarlinMxFp4LinearKernel",) * 2,
        "HummingMxFp4LinearKernel",
        "FlashInferMxFp4LinearKernel",
        "EmulationMxfp4LinearKernel",
        "AiterMxfp4LinearKernel",
    ),
    "nvfp4-pack-quantized": (
        None,
        *("MarlinNvFp4LinearKernel",) * 2,
        "HummingNvFp4LinearKernel",
        "FlashInferCuteDslNvFp4LinearKernel",
        *("EmulationNvFp4LinearKernel",) * 2,
    ),
}


@dataclass(frozen=True)
class LayerKernel:
    """The kernels that vLLM would take for one kind of layer.

    Attributes:
        layers: the stage of the block that the layers are, such as `qkv` or `down`.
        count: blocks that have such a layer.
        scheme: bits, group size and format of weights and activations, as text.
        shape: (N, K) of the merged matrix, N outputs and K inputs.
        kernels: kernel names by device of `DEVICES`, None where no kernel supports the layer, and
            NOT_KNOWN where that could not be read.
        floats: devices whose kernel leaves activations in 16 bits although the scheme quantizes
            them.
        rounds: devices whose kernel quantizes activations although the scheme leaves them.
    """

    layers: str
    count: int
    scheme: str
    shape: tuple[int, int]
    kernels: dict[str, str | None]
    floats: tuple[str, ...]
    rounds: tuple[str, ...]


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
    quantizes = scheme.inputs != "float"
    grouped = scheme.group_size is not None and scheme.input_bits == 8
    only = (*WEIGHTS_ONLY, HUMMING) if grouped else WEIGHTS_ONLY
    floats = [device for device, kernel in kernels.items() if quantizes and kernel in only]
    # Layouts of MX are given the kernels of quantized activations whatever the scheme has.
    other = (None, *only, *HUMMING_ROUNDS)
    native = [device for device, kernel in kernels.items() if kernel not in other]
    rounds = native if scheme.format.startswith("mx") and not quantizes else []
    return LayerKernel(stage, count, str(scheme), shape, kernels, tuple(floats), tuple(rounds))


def kernel_of(scheme: Scheme, shape: tuple[int, int], device: str) -> str | None:
    """The kernel that vLLM takes for a matrix, without tensor parallelism, in bfloat16.

    Args:
        scheme: format, bits and group size of its weights, and bits of its inputs.
        shape: (N, K), outputs and inputs.
        device: one of `DEVICES`.

    Returns:
        The name of the kernel's class, None if no kernel supports the matrix, or NOT_KNOWN.
    """
    if scheme.format == "float-quantized":
        return _of_fp8(scheme, device)
    if scheme.type == "float":
        return _of_mx_and_nvfp4(scheme, shape, device)
    if scheme.input_type == "float" and scheme.inputs != "float":
        return _beside_fp8(scheme, shape, device)
    if scheme.format == "int-quantized":
        if device.startswith("B"):  # chosen, but whether it multiplies int8 was not read
            return NOT_KNOWN
        by = {"CPU": "CPU", "MI300X": "Triton", "MI350X": "Triton"}.get(device, "Cutlass")
        return f"{by}Int8ScaledMMLinearKernel"
    return _of_packed(scheme, shape, device)


def _of_packed(scheme: Scheme, shape: tuple[int, int], device: str) -> str | None:
    """As `kernel_of`, of packed integers beside integer or float inputs."""
    (n, k), group = shape, scheme.group_size
    if scheme.inputs == "static":
        return None
    wide = scheme.bits == 8 and not scheme.symmetric
    four = scheme.bits == 4
    by_triton = four and group in TRITON_GROUPS and n % 8 == 0
    if device == "CPU":
        takes = four and n % 32 == 0 and k % 32 == 0 and (group or 2) % 2 == 0
        return "CPUWNA16LinearKernel" if takes else None
    if device.startswith("MI"):
        if by_triton:
            return "TritonW4A16LinearKernel"
        return NOT_KNOWN if scheme.bits in (4, 8) else None  # Conch, where it is installed
    if scheme.bits not in (4, 8):
        return HUMMING
    if device == "H100":  # where Humming comes before Marlin
        fits = group in MACHETE_GROUPS and k % 64 == 0 and n % 128 == 0
        return "MacheteLinearKernel" if fits else HUMMING
    if group in MARLIN_GROUPS and not wide:
        return "MarlinLinearKernel"
    return "TritonW4A16LinearKernel" if by_triton else HUMMING


def _beside_fp8(scheme: Scheme, shape: tuple[int, int], device: str) -> str | None:
    """As `kernel_of`, of integers beside FP8 inputs: Hopper's 4-bit weights in groups of 128."""
    four = scheme.bits == 4 and scheme.group_size == CUTLASS_GROUP and scheme.inputs == "token"
    if device != "H100" or not four:
        return None
    return "CutlassW4A8LinearKernel" if not any(size % 128 for size in shape) else HUMMING


def _of_fp8(scheme: Scheme, device: str) -> str | None:
    """As `kernel_of`, of FP8 per tensor, channel or block."""
    amd = device.startswith("MI")
    if device == "CPU":  # by whether its AMX multiplies FP8
        return NOT_KNOWN if scheme.inputs != "float" else None
    if scheme.inputs == "float":
        return None if amd else HUMMING_FP8
    if device == "A100":
        return HUMMING_FP8
    if scheme.strategy == "block":
        if amd:
            return "TritonFp8BlockScaledMMKernel"
        return "MarlinFP8ScaledMMLinearKernel" if device == "L4, L40S" else BLOCKS
    tensors = scheme.strategy == "tensor" and scheme.inputs == "static"
    if amd:
        rows = scheme.strategy == "channel" and scheme.inputs == "token"
        by = "ROCm" if tensors else "RowWiseTorch" if rows else "ChannelWiseTorch"
    else:
        by = "FlashInfer" if tensors and device == "B200, B300" else "Cutlass"
    return f"{by}FP8ScaledMMLinearKernel"


def _of_mx_and_nvfp4(scheme: Scheme, shape: tuple[int, int], device: str) -> str | None:
    """As `kernel_of`, of floating-point codes in groups."""
    kernel = OF_MX_AND_NVFP4[scheme.format][DEVICES.index(device)]
    nv = scheme.strategy == "tensor_group"
    if nv and scheme.inputs == "float":
        if device.startswith("MI"):
            return None
        if device == "B200, B300":
            return "FlashInferCuteDslNvFp4W4A16LinearKernel"
    elif nv and scheme.inputs != "tensor_group":
        return None
    elif scheme.bits == 4 and scheme.input_bits == 8 and kernel is not None:
        return NOT_KNOWN
    elif scheme.bits == 8 and device == "B200, B300" and min(shape) < LEAST_MXFP8:
        return "MarlinMxfp8LinearKernel"
    return kernel


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
                *(short(kernel) for kernel in layer.kernels.values()),
            )
            for layer in layers
        ],
    )


def short(kernel: str | None) -> str:
    """A kernel's name without the suffix that all have."""
    name = (kernel or "none").removesuffix("LinearKernel").removesuffix("Kernel")
    return name.replace("ScaledMM", "")


def remarks(layers: list[LayerKernel]) -> list[str]:
    """Notes for the user: layers without a kernel, and activations that are not as exported."""
    kernels = {kernel for layer in layers for kernel in layer.kernels.values()}
    floats = [device for device in DEVICES if any(device in layer.floats for layer in layers)]
    rounds = [device for device in DEVICES if any(device in layer.rounds for layer in layers)]
    lines = []
    if None in kernels:
        lines.append("Where it has none vLLM refuses to load the model, and says so.")
    if NOT_KNOWN in kernels:
        lines.append(
            "What is not known here depends on more than the device: on the processor's "
            "instructions, on packages, or on code of vLLM that was not read."
        )
    if floats:
        lines.append(
            f"On {'; '.join(floats)} vLLM would leave these activations in 16 bits without saying "
            "so: the weights are served, the activations' bits are not."
        )
    if rounds:
        lines.append(
            f"On {'; '.join(rounds)} vLLM would quantize these activations, which the export "
            "leaves in 16 bits."
        )
    if floats and "MarlinLinearKernel" in kernels:
        lines.append(
            "On CUDA `vllm serve --linear-backend humming` quantizes them where weights have a "
            "scale a channel."
        )
    if any(
        (layer.floats or layer.rounds) and layer.kernels["H100"] in HUMMING_ROUNDS
        for layer in layers
    ):
        lines.append(
            "What Humming rounds activations of MX and NVFP4 to on a Hopper is not known here."
        )
    if any(kernel in EMULATIONS for kernel in kernels):
        lines.append("Emulation rounds activations, and multiplies in 16 bits, slowly.")
    return lines
