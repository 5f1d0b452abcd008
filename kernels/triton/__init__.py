"""The operators as Triton kernels, for every GPU that Triton compiles for.

Each file holds one kind of operator, its kernels beside their launchers; `README.md` in the folder
above derives them. Everything here is called through `smoothq.kernels` alone.
"""

from .attention import cached_attention, int8_attention, quantize_heads
from .expert_gemm import expert_gemm
from .expert_weight_only_gemm import expert_weight_only_gemm
from .fp8_gemm import fp8_gemm
from .fp_gemm import fp_gemm
from .fp_quantize import fp8_quantize, fp_quantize
from .group_gemm import group_gemm
from .hadamard import hadamard, hadamard_quantize, left_factor
from .integer_gemm import int4_gemm, int8_gemm
from .launch import multiplies_fp8, multiplies_mx, packed_tokens
from .mx_gemm import mx_gemm, mx_quantize
from .quantize import (
    channel_multipliers,
    quantize_per_tensor,
    quantize_per_token,
    quantize_smoothed,
    quantize_token_groups,
    static_quantize,
)
from .runtime_smooth import runtime_smooth_quantize
from .weight_only_gemm import weight_only_gemm
