"""An embedding of 8-bit codes with one scale a row, and the head that is tied to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import QuantizedInput
from ..rounding.grid import IntegerGrid, QuantizedWeight, Scales
from ..rounding.packing import pack, packed_like, unpack
from ..runtime.offload import running_device
from .input_quantizer import InputQuantizer
from .weight_answer import HoldsCodes

EMBEDDING_BITS = 8


def row_grid(columns: int) -> IntegerGrid:
    """The grid of an embedding: 8 bits, one bfloat16 scale a row, from the row's maximum."""
    return IntegerGrid(EMBEDDING_BITS, "group", columns, multiplier=False, clip=False)


class QuantizedEmbedding(HoldsCodes):
    """An embedding of codes: token ids int64 (...) → float (..., K).

    Persistent buffers: `weight`, codes, int8 (V, K, 1); `weight_scale`, bfloat16 (V, 1).
    """

    weight_scale: Tensor
    like: Tensor

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        """Create it with tensors on the meta device.

        Args:
            rows: V, the vocabulary size.
            columns: K, the embedding's width.
            dtype: of the output, until the module is cast.
        """
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows, columns
        self.weight_shape = (rows, columns)
        self.register_buffer("weight", packed_like(rows, columns, EMBEDDING_BITS))
        scale = torch.empty(rows, 1, dtype=torch.bfloat16, device="meta")
        self.register_buffer("weight_scale", scale)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)

    def set_weight(self, quantized: QuantizedWeight) -> None:
        """Set codes and scales, of a weight rounded to `row_grid`."""
        self.hold(pack(quantized.codes, EMBEDDING_BITS))
        self.weight_scale = quantized.scales.scale.contiguous()

    def quantized_weight(self) -> QuantizedWeight:
        """The codes, int8 (V, K), and their scales."""
        codes = unpack(self.codes, self.embedding_dim, EMBEDDING_BITS)
        return QuantizedWeight(codes, Scales(self.weight_scale, None))

    @property
    def weight_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the output."""
        return self.like.dtype

    def forward(
        self, x: Tensor | QuantizedInput, logits_dtype: torch.dtype | None = None
    ) -> Tensor:
        """The dequantized rows of token ids; logits, where a dtype for them is given.

        Both are in `forward`, which accelerate wraps: an offloaded embedding has its codes in it.

        Args:
            x: token ids, int64 (...); for logits a head's quantized input, (tokens, K).
            logits_dtype: of the logits, (tokens, V).
        """
        if logits_dtype is not None:
            return self._logits(x, logits_dtype)
        codes = self.codes[x].squeeze(-1)
        return (codes.float() * self.weight_scale[x].float()).to(self.like.dtype)

    def _logits(self, x: Tensor | QuantizedInput, dtype: torch.dtype) -> Tensor:
        codes, scale = self.codes.squeeze(-1), self.weight_scale.float()
        logits: Tensor
        if isinstance(x, QuantizedInput):
            rows, steps = x.codes.reshape(-1, self.embedding_dim), x.scale.reshape(-1, 1)
            logits = kernels.int8_gemm(rows, steps, codes, scale.squeeze(1), None, dtype)
        else:
            rows = x.reshape(-1, self.embedding_dim)
            logits = kernels.weight_only_gemm(rows, codes, scale, None, None, EMBEDDING_BITS)
        return logits


class TiedHead(nn.Module):
    """A head that multiplies by the codes of the embedding: float (..., K) → (..., V)."""

    embedding: QuantizedEmbedding

    def __init__(self, embedding: QuantizedEmbedding, site_input: InputQuantizer) -> None:
        """Create it; it has no parameters or persistent buffers of its own.

        Args:
            embedding: the codes.
            site_input: the quantizer of its input.
        """
        super().__init__()
        # The embedding owns the codes: the head stores nothing.
        object.__setattr__(self, "embedding", embedding)
        self.site_input = site_input
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings

    @property
    def weight(self) -> Tensor:
        """The embedding's `weight`: see `HoldsCodes.weight`."""
        return self.embedding.weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Ignored: transformers sets it when it ties weights; the getter asks the embedding."""

    @property
    def device(self) -> torch.device:
        """Where it runs: the device of the codes, or the one that accelerate brings them to."""
        return running_device(self.embedding)

    def operators(self) -> tuple[str, ...]:
        """The operators of `smoothq.kernels` that a forward runs, in order."""
        product = "weight_only_gemm" if self.site_input.spec.floating else "int8_gemm"
        return (*self.site_input.operators(), product)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (..., V), of x, float (..., K), in x's dtype."""
        # Not a call of the module: its forward hooks are for embeddings.
        logits: Tensor = self.embedding.forward(self.site_input(x), x.dtype)
        return logits.reshape(*x.shape[:-1], self.out_features)
