"""Quantized key/value caches: cache layers of transformers that store rows of codes.

A head's key or value is one row of bytes (`kernels.quantize_heads`), so that a quantized layer is a
layer of transformers with narrower tensors of dtype uint8; growing, sliding windows, preallocation,
beams, cropping and offloading are inherited. `update` returns `HeldTokens`, rows instead of floats,
to the attention function.
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
    """The format of quantized keys and values.

    Attributes:
        bits: width of a code, 8 or 4.
        group_size: numbers that share a scale and an offset; None for all of a head and token.
        float_tokens: how many of a sequence's first tokens are stored in float besides.
    """

    bits: int
    group_size: int | None = None
    float_tokens: int = 0

    def rows(self, x: Tensor) -> Tensor:
        """Keys or values, float (B, H, T, D), as rows, uint8 (B, H, T, row bytes)."""
        rows: Tensor = kernels.quantize_heads(x, self.bits, self.group_size)
        return rows

    def stored_bits(self, width: int) -> float:
        """Average bits an element, scales and offsets included, for heads of that width."""
        nbytes: int = kernels.row_bytes(width, self.bits, self.group_size)
        return 8 * nbytes / width


class HeldTokens(NamedTuple):
    """Keys, or values, of a quantized cache, as the attention operators take them.

    Attributes:
        rows: uint8 (B, H, T, row bytes).
        first: float (B, H, N, D), the first N tokens of each sequence, or None.
        start: int64 (B,), the index of each sequence's first token among the T, or None.
    """

    rows: Tensor
    first: Tensor | None = None
    start: Tensor | None = None


_Stock: Any = CacheLayerMixin  # untyped: its own methods are declared for float tensors


class QuantizedLayer(_Stock):  # type: ignore[misc]
    """Mixed into a cache layer of transformers: takes floats, stores rows.

    Attributes:
        format: of the rows.
        rotation: of keys before they are quantized, or None.
        start: as of `HeldTokens`, among all tokens since the layer was empty.
        first: first tokens in float, keys and values; empty where none are stored.
    """

    format: CacheFormat
    rotation: OnlineRotation | None
    start: Tensor | None
    first: list[Tensor]

    def begin(self, batch: int, device: torch.device, mask: Tensor | None) -> None:
        """Record where the sequences begin, if the layer is empty and stores first tokens in float.

        Args:
            batch: B, the number of sequences.
            device: of the cache.
            mask: bool (B or 1, 1, L, T), which of T tokens the next L queries see; a sequence
                begins at the first token that any query sees. None: at the first of all.
        """
        if self.format.float_tokens == 0 or self.start is not None:
            return
        if mask is None:
            self.start = torch.zeros(batch, dtype=torch.int64, device=device)
        else:
            self.start = mask[:, 0].any(-2).int().argmax(-1).expand(batch).contiguous()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate rows and first tokens for keys and values like these, float (B, H, any, D)."""
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
        """Quantize and append tokens.

        Args:
            key_states: float (B, H, L, D).
            value_states: float (B, H, L, D).
            *args: of the layer's own `update`.
            **kwargs: of the layer's own `update`.

        Returns:
            Keys and values that the attention may see, each as HeldTokens.
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
        """Store those of the appended tokens in float that are among a sequence's first."""
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
        """Remove all tokens."""
        super().reset()
        self.start = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the sequences by those of indices `beam_idx`, int64 (B,), in that order."""
        super().reorder_cache(beam_idx)
        self._select_sequences(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, copies side by side."""
        super().batch_repeat_interleave(repeats)
        self._select_sequences(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of those indices, int64 (n,), alone."""
        super().batch_select_indices(indices)
        self._select_sequences(lambda x: x[indices])

    def _select_sequences(self, select: Any) -> None:
        if self.start is not None:
            self.start, self.first = select(self.start), [select(x) for x in self.first]


class QuantizedDynamicLayer(QuantizedLayer, DynamicLayer):
    """A quantized layer that grows with every token."""


class QuantizedSlidingLayer(QuantizedLayer, DynamicSlidingWindowLayer):
    """A quantized layer that grows up to the sliding window."""


class QuantizedStaticLayer(QuantizedLayer, StaticLayer):
    """A quantized layer of fixed size."""


class QuantizedStaticSlidingLayer(QuantizedLayer, StaticSlidingWindowLayer):
    """A quantized layer of the sliding window's fixed size."""


_QUANTIZED: dict[type, type[QuantizedLayer]] = {
    DynamicLayer: QuantizedDynamicLayer,
    DynamicSlidingWindowLayer: QuantizedSlidingLayer,
    StaticLayer: QuantizedStaticLayer,
    StaticSlidingWindowLayer: QuantizedStaticSlidingLayer,
}


def quantized_layer(
    cache: Cache, index: int, format: CacheFormat, rotation: OnlineRotation | None
) -> QuantizedLayer:
    """Layer `index` of a cache, converted in place to a quantized one if it is not yet.

    Args:
        cache: of transformers; a dynamic one grows up to that layer.
        index: of the layer.
        format: of the rows.
        rotation: of keys before they are quantized, or None.

    Raises:
        SmoothqError: that kind of layer cannot be converted, or the layer holds float tokens.
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
    """Set the format and rotation of an empty layer; returns the layer."""
    layer.format, layer.rotation, layer.start, layer.first = format, rotation, None, []
    return layer
