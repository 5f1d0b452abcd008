"""GPUs by their data sheets, for bounds on the speed of machines that are not here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Figures of a GPU from its data sheet; operations are dense, without sparsity.

    Attributes:
        name: product name.
        architecture: CUDA compute capability, such as `sm_80`.
        bandwidth: of its memory, bytes a second.
        bfloat16: operations a second of bfloat16 matrix products; a multiply-add is two.
        int8: operations a second of int8 matrix products; a multiply-add is two.
    """

    name: str
    architecture: str
    bandwidth: float
    bfloat16: float
    int8: float


A100 = Chip("A100 SXM", "sm_80", 2.039e12, 312e12, 624e12)
H100 = Chip("H100 SXM", "sm_90", 3.35e12, 989e12, 1979e12)
CHIPS = (A100, H100)
