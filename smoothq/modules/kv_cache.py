"""Keys and values held as rows of quantized codes, in the caches that transformers already has.

A head's key or value becomes one row of bytes (`kernels.quantize_heads`), so that a quantized layer
is its stock layer with narrower tensors of another dtype: growing, sliding windows, preallocated
storage, beams, cropping and offloading are the stock layer's own. What `update` hands to the
attention function is `HeldTokens`: the rows, not floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .. import kernels
from ..compat import add_cache_layers
from ..errors import SmoothqError
from .online_rotation import OnlineRotation


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are held, per head and token.

    group_size: numbers that share a scale and an offset, or None for one group a head.
    float_tokens: how many of a sequence's first tokens are kept in float beside their rows.
    """

    bits: int
    group_size: int | None = None
    float_tokens: int = 0

    def rows(self, x: Tensor) -> Tensor:
        """Keys or values, float (B, H, T, D), as uint8 (B, H, T, row bytes)."""
        rows: Tensor = kernels.quantize_heads(x, self.bits, self.group_size)
        return rows

    def stored_bits(self, width: int) -> float:
        """Bits an element with scales and offsets, of heads of that width."""
        nbytes: int = kernels.row_bytes(width, self.bits, self.group_size)
        return 8 * nbytes / width


class HeldTokens(NamedTuple):
    """Keys, or values, as an attention reads them.

    rows: uint8 (B, H, T, row bytes). first: float (B, H, N, D), the first tokens of each sequence,
    or None. start: int64 (B,), where among the T tokens they begin, or None.
    """

    rows: Tensor
    first: Tensor | None = None
    start: Tensor | None = None


_Stock: Any = CacheLayerMixin  # in front of a stock layer, whose own types do not know rows


class QuantizedLayer(_Stock):  # type: ignore[misc]
    """Mixed into a stock cache layer: it takes floats and holds rows.

    rotation: of the keys before they are quantized, or None.
    """

    format: CacheFormat
    rotation: OnlineRotation | None
    start: Tensor | None
    first: list[Tensor]

    def begin(self, batch: int, device: torch.device, mask: Tensor | None) -> None:
        """Note where the sequences begin, if the layer is empty and keeps first tokens in float.

        mask: bool (B or 1, 1, L, T), what the coming L tokens see: a sequence begins at the first
        token that any of them does.
        """
        if self.format.float_tokens == 0 or self.start is not None:
            return
        if mask is None:
            self.start = torch.zeros(batch, dtype=torch.int64, device=device)
        else:
            self.start = mask[:, 0].any(-2).int().argmax(-1).expand(batch).contiguous()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for heads like those of float keys and values (B, H, any, D)."""
        rows = [self.format.rows(x) for x in (key_states, value_states)]
        super().lazy_initialization(*rows)
        count = self.format.float_tokens
        self.first = [
            x.new_zeros(*x.shape[:2], count, x.shape[3])
            for x in (key_states, value_states)
            if count
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Quantize and add float (B, H, L, D).

        Returns the keys and the values that an attention may see, each as HeldTokens.
        """
        if self.rotation is not None:
            key_states = self.rotation(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keep_first(key_states, value_states)
        new = [self.format.rows(x) for x in (key_states, value_states)]
        keys, values = super().update(*new, *args, **kwargs)
        if not self.first:
            return HeldTokens(keys), HeldTokens(values)
        start = self.start
        if self.is_sliding and start is not None:
            start = start - max(self.get_seq_length() - keys.shape[2], 0)
        return HeldTokens(keys, self.first[0], start), HeldTokens(values, self.first[1], start)

    def _keep_first(self, *states: Tensor) -> None:
        """Copy what of the coming tokens is among the first of its sequence."""
        count, length = self.format.float_tokens, states[0].shape[2]
        if count == 0 or length == 0:
            return
        assert self.start is not None, "begin() comes first"
        token = self.start.unsqueeze(1) + torch.arange(count, device=self.start.device)
        token = token - self.get_seq_length()
        inside = ((token >= 0) & (token < length))[:, None, :, None]
        index = token.clamp(0, length - 1)[:, None, :, None]
        for kept, x in zip(self.first, states, strict=True):
            incoming = x.detach().gather(2, index.expand(*x.shape[:2], count, x.shape[3]))
            kept.copy_(torch.where(inside, incoming, kept))  # in place, as static layers want it

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.start = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences of `beam_idx`, int64 (B,), in that order."""
        super().reorder_cache(beam_idx)
        self._select_sequences(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence so many times."""
        super().batch_repeat_interleave(repeats)
        self._select_sequences(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of `indices`."""
        super().batch_select_indices(indices)
        self._select_sequences(lambda x: x[indices])

    def _select_sequences(self, select: Any) -> None:
        if self.start is not None:
            self.start, self.first = select(self.start), [select(x) for x in self.first]


class QuantizedDynamicLayer(QuantizedLayer, DynamicLayer):
    """Grows with every token."""


class QuantizedSlidingLayer(QuantizedLayer, DynamicSlidingWindowLayer):
    """Grows to the sliding window."""


class QuantizedStaticLayer(QuantizedLayer, StaticLayer):
    """Preallocated."""


class QuantizedStaticSlidingLayer(QuantizedLayer, StaticSlidingWindowLayer):
    """Preallocated, of the sliding window."""


_QUANTIZED: dict[type, type[QuantizedLayer]] = {
    DynamicLayer: QuantizedDynamicLayer,
    DynamicSlidingWindowLayer: QuantizedSlidingLayer,
    StaticLayer: QuantizedStaticLayer,
    StaticSlidingWindowLayer: QuantizedStaticSlidingLayer,
}


def quantized_layer(
    cache: Cache, index: int, format: CacheFormat, rotation: OnlineRotation | None
) -> QuantizedLayer:
    """Layer `index` of a cache, made to hold rows in place if it does not yet.

    Raises SmoothqError for a kind of layer that cannot, or one that already holds floats.
    """
    add_cache_layers(cache, index)
    layer: Any = cache.layers[index]
    if isinstance(layer, QuantizedLayer):
        return layer
    quantized = _QUANTIZED.get(type(layer))
    if quantized is None:
        raise SmoothqError(
            f"a {type(layer).__name__} cannot hold the keys and values that the recipe quantizes; "
            "leave the cache to the model, or pass a DynamicCache or a StaticCache"
        )
    if layer.is_initialized and int(layer.get_seq_length()) > 0:
        raise SmoothqError("the cache holds the float keys and values of another model; pass none")
    layer.keys = layer.values = None
    layer.is_initialized = False
    layer.__class__ = quantized
    return as_quantized(layer, format, rotation)


def as_quantized(
    layer: QuantizedLayer, format: CacheFormat, rotation: OnlineRotation | None
) -> QuantizedLayer:
    """Give an empty layer its format; returns it."""
    layer.format, layer.rotation, layer.start, layer.first = format, rotation, None, []
    return layer
