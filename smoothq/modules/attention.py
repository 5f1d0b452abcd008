"""Attention over quantized keys and values, or with int8 products of queries and keys.

transformers can replace a model's attention by name: an attention function and a mask function are
registered as `IMPLEMENTATION` (without the mask function, padded batches would be silently wrong).
`QuantizesAttention`, mixed into each attention module, holds the settings, and converts the cache
that it is called with, so that the cache stores quantized rows from the first token on. Without a
cache keys and values are quantized too: in prefill, decoding and perplexity every query sees the
same quantized tokens, its own included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PretrainedConfig

from .. import kernels
from ..architectures.mixin import Mixin, mix_in, take_out
from ..compat import (
    attention_implementation,
    boolean_mask_function,
    set_attention_implementation,
)
from ..errors import SmoothqError
from ..runtime.offload import running_device
from ..transforms.hadamard import Hadamard
from .kv_cache import (
    CacheFormat,
    HeldTokens,
    QuantizedDynamicLayer,
    as_quantized,
    quantized_layer,
)
from .online_rotation import OnlineRotation

IMPLEMENTATION = "smoothq"
QUERY_BITS = 8
Product = Literal["float", "int8", "int8-centred"]
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # arguments of attentions that differ


@dataclass(frozen=True)
class AttentionSpec:
    """The settings of a model's attention, resolved.

    Attributes:
        cache: the format of quantized keys and values, or None for float.
        product: of queries and keys. `int8` has one scale a head and token for both;
            `int8-centred` subtracts the mean key first, which does not change the softmax
            (SageAttention, arXiv 2410.02367).
        rotation: of queries and keys behind their position embedding (R3), of order head_dim, or
            None.
    """

    cache: CacheFormat | None = None
    product: Product = "float"
    rotation: Hadamard | None = None

    def operators(self) -> tuple[str, ...]:
        """The operators of `smoothq.kernels` that a forward runs, in order."""
        rotation = () if self.rotation is None else ("hadamard",)
        if self.product == "float":
            return (*rotation, "quantize_heads", "cached_attention")
        return (*rotation, "quantize_heads", "quantize_per_token", "int8_attention")


class AttentionQuantizer(nn.Module):
    """Rotates and quantizes queries, keys and values, and computes attention."""

    def __init__(self, spec: AttentionSpec, replaced: str | None) -> None:
        """Create it for one attention module.

        Args:
            spec: the settings.
            replaced: the name of the attention function that the model had before.
        """
        super().__init__()
        self.spec, self.replaced = spec, replaced
        self.rotation = None if spec.rotation is None else OnlineRotation(spec.rotation)

    def begin(self, cache: Cache, index: int, hidden: Tensor, mask: Tensor | None) -> None:
        """Make a layer of a cache store quantized rows, where the recipe quantizes the cache.

        Args:
            cache: the module's own or the caller's.
            index: of the layer.
            hidden: input of the attention, (B, L, hidden size).
            mask: as in `forward`.
        """
        if self.spec.cache is not None:
            layer = quantized_layer(cache, index, self.spec.cache, self.rotation)
            layer.begin(hidden.shape[0], hidden.device, mask)

    def forward(
        self,
        query: Tensor,
        key: Tensor | HeldTokens,
        value: Tensor | HeldTokens,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """The attention output, (B, Q, L, width of a value), in the query's dtype.

        Args:
            query: float (B, Q, L, D).
            key: float (B, H, T, D), or the rows of a cache.
            value: likewise.
            mask: bool (B or 1, 1, L, T), True where a query sees a token; None for a causal mask.
            scaling: of the scores, before the softmax.
        """
        if mask is None and query.shape[2] > 1:
            length, tokens = query.shape[2], (key[0] if isinstance(key, tuple) else key).shape[-2]
            seen = torch.ones(length, tokens, dtype=torch.bool, device=query.device)
            mask = seen.tril(tokens - length)[None, None]
        query = self._rotated(query)
        if self.spec.cache is None:
            assert isinstance(key, Tensor)
            assert isinstance(value, Tensor)
            key = self._rotated(key)
            if self.spec.product == "int8-centred":
                key = key - _mean_seen(key, mask)
            rows = kernels.quantize_heads(key, QUERY_BITS, None)
            return self._int8(query, rows, value, mask, scaling, QUERY_BITS)
        if isinstance(key, Tensor):
            assert isinstance(value, Tensor)
            stock: Any = QuantizedDynamicLayer  # without a cache, one for this call alone
            layer = as_quantized(stock(), self.spec.cache, self.rotation)
            layer.begin(key.shape[0], key.device, mask)
            key, value = layer.update(key, value)
        assert isinstance(key, HeldTokens)
        assert isinstance(value, HeldTokens)
        bits, group_size = self.spec.cache.bits, self.spec.cache.group_size
        if self.spec.product != "float":
            return self._int8(query, key.rows, value.rows, mask, scaling, bits)
        firsts = (key.first, value.first, key.start)
        attended: Tensor = kernels.cached_attention(
            query, key.rows, value.rows, *firsts, mask, scaling, bits, group_size
        )
        return attended

    def _rotated(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else self.rotation(x)

    def _int8(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        scaling: float,
        bits: int,
    ) -> Tensor:
        codes, scale, *_ = kernels.quantize_per_token(query, QUERY_BITS)
        attended: Tensor = kernels.int8_attention(
            codes, scale, keys, values, mask, scaling, bits, query.dtype
        )
        return attended


def _mean_seen(key: Tensor, mask: Tensor | None) -> Tensor:
    """The mean key over the tokens that any query sees: float (B, H, T, D) → (B, H, 1, D).

    Padding and the unused part of a preallocated cache do not count.
    """
    if mask is None:
        return key.mean(2, keepdim=True)
    seen = mask.any(2).unsqueeze(-1).to(key.dtype)
    return (key * seen).sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)


class QuantizesAttention(Mixin):
    """Mixed into an attention module of transformers: holds its settings, converts its cache."""

    attention_quantizer: AttentionQuantizer
    layer_idx: int

    @property
    def device(self) -> torch.device:
        """The device that its projections run on."""
        return running_device(self)

    def operators(self) -> tuple[str, ...]:
        """The operators of `smoothq.kernels` that a forward runs, in order."""
        return self.attention_quantizer.spec.operators()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, after its cache was converted."""
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Cache):
                mask = kwargs.get("attention_mask")
                self.attention_quantizer.begin(argument, self.layer_idx, hidden_states, mask)
        return super().forward(hidden_states, *args, **kwargs)


def quantize_attention(
    modules: Iterable[nn.Module], spec: AttentionSpec, config: PretrainedConfig
) -> None:
    """Quantize attention modules, in place; their tensors and names stay.

    Args:
        modules: all attention modules of a decoder.
        spec: the settings.
        config: of the decoder; it names the attention function of all its modules.
    """
    replaced = attention_implementation(config)
    set_attention_implementation(config, IMPLEMENTATION)
    for module in modules:
        mix_in(module, QuantizesAttention)
        module.attention_quantizer = AttentionQuantizer(spec, replaced)


def stop_quantizing_attention(module: nn.Module, config: PretrainedConfig) -> None:
    """Undo `quantize_attention` for one module, in place, and in its decoder's config."""
    if isinstance(module, QuantizesAttention):
        set_attention_implementation(config, module.attention_quantizer.replaced)
        del module.attention_quantizer
        take_out(module)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor | HeldTokens,
    value: Tensor | HeldTokens,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of `IMPLEMENTATION`, as transformers calls it."""
    foreign = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if foreign or not isinstance(module, QuantizesAttention):
        what = f"'{foreign[0]}'" if foreign else "an attention that the recipe does not name"
        raise SmoothqError(f"{type(module).__name__}: quantized attention does not do {what}")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise SmoothqError(
            "quantized attention takes a mask of booleans, or the padding mask (batch, tokens), "
            f"not one of {attention_mask.dtype}"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = module.attention_quantizer(query, key, value, attention_mask, scaling)
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attend)
# The operators know no causal flag, so the mask is always written out.
AttentionMaskInterface.register(IMPLEMENTATION, boolean_mask_function())
