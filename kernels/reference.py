"""The eager definition of every operator: what a kernel must compute, to the last integer.

A linear layer runs as *quantize the input → multiply integers → scale*. The quantizers below
fix the float32 arithmetic that leads to each code, so that a kernel can be held to the very same
integers. The matrix products are defined in int64 and float64; a kernel may round its float
result once, to the output's dtype.

Conventions: M tokens, N out_features, K in_features, G group size. A scale is what a code is
multiplied by to get its value back. b-bit codes are `-2^(b-1)` … `2^(b-1) - 1`.

**Multipliers.** A scale restricted to `m · base` with an integer `m` goes into the codes: for
4 bits `|m| ≤ 15`, and `q · m` is an int8 operand of a plain integer product.

**Full range.** A scale may be negative. Where it takes the sign that brings the value of largest
magnitude to the lowest code, `-2^(b-1)`, no code is wasted and the steps are finer.

**Rows of a cache.** A head's key or value, D numbers x̂ = c · s + o, is one row of bytes: the codes
c, then the float16 scales s of its groups, then their float16 offsets o. 4-bit codes stand two a
byte: byte j of a group holds number j of the group's first half in its low nibble, and of its
second half in its high one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .formats import FORMATS, e4m3_bytes, e4m3_values, power_of_two, powers_of_two

PACKED_BLOCK = 64  # columns that are packed together: 32 bytes of two codes each
MULTIPLIED_BITS = 6  # the widest codes beside which an int8 has room for multipliers up to 3
WORD_BITS = 32  # of the words that codes of other widths than 4 and 8 are packed into
SMALLEST_SCALE = 1e-5  # the clamp of SmoothQuant and RRS: keeps a dead channel's divisor finite


Scaling = Literal["token", "tensor", "static", "group", "e8m0", "e4m3"]
"""What shares a scale of floating-point codes, and what the scale is.

| scaling  | shared by         | the scale                                                 |
|----------|-------------------|-----------------------------------------------------------|
| `token`  | a token           | float32: maximum over the largest value                   |
| `tensor` | the tensor        | float32, likewise                                         |
| `static` | the tensor        | float32, calibrated                                       |
| `group`  | a token's group   | float32, maximum over the largest value                   |
| `e8m0`   | a token's group   | a power of two (MX)                                       |
| `e4m3`   | a token's group   | E4M3 times the tensor's float32 scale, calibrated (NVFP4) |
"""


class QuantizedInput(NamedTuple):
    """A linear's input as codes and scales.

    Attributes:
        codes: int8 (..., K), already times their multipliers.
        scale: float32, broadcastable to (..., 1).
        block_scale: float32 (B, K / G), a factor a sequence and group of G ordered channels, or
            None.
        order: int64 (B, K), the channel at each place of the order, or None.
    """

    codes: Tensor
    scale: Tensor
    block_scale: Tensor | None = None
    order: Tensor | None = None


def highest_code(bits: int) -> int:
    """The largest symmetric code: 7 for 4 bits, 127 for 8."""
    return int(2 ** (bits - 1) - 1)


def largest_multiplier(bits: int) -> int:
    """The largest integer m with m · 2^(b-1) ≤ 127: 15 for 4 bits, 3 for 6.

    Raises ValueError for wider codes, which leave no room for multipliers.
    """
    if bits > MULTIPLIED_BITS:
        raise ValueError(f"{bits}-bit codes leave an int8 no room for multipliers")
    return 127 // (highest_code(bits) + 1)


def largest_group_multiplier(bits: int) -> int:
    """The largest multiplier of a token's groups: 8, so that with its sign it takes 4 bits."""
    return min(8, largest_multiplier(bits))


def _scale_of(maximum: Tensor, bits: int, clip: float) -> Tensor:
    return nonzero(maximum * clip / highest_code(bits))


def nonzero(scale: Tensor) -> Tensor:
    """The scale, with 1 in place of 0: where all values are zero, so that codes are too."""
    return torch.where(scale == 0, 1.0, scale)


def _codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    highest = highest_code(bits)
    codes = (x / scale).round_().clamp_(-highest - 1, highest)
    return codes.nan_to_num_(0.0).to(torch.int8)


def _largest(x: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
    return largest


def extreme(x: Tensor) -> Tensor:
    """The value of largest magnitude, (..., K) → (..., 1); the negative one of x and -x."""
    highest, lowest = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    return torch.where(highest > -lowest, highest, lowest)  # a NaN is both


def quantize_per_token(
    x: Tensor, bits: int, clip: float = 1.0, full_range: bool = False
) -> QuantizedInput:
    """One scale a token: s_t = clip · max_k |x_tk| / (2^(b-1) - 1).

    With `full_range`, s_t = -clip · e_t / 2^(b-1), e_t the token's value of largest magnitude.
    x: float (..., K). Returns codes int8 (..., K), scale float32 (..., 1).
    Source: SmoothQuant (arXiv 2211.10438), section 2.
    """
    x = x.float()
    if full_range:
        scale = nonzero(extreme(x) * clip / -(highest_code(bits) + 1))
    else:
        scale = _scale_of(_largest(x), bits, clip)
    return QuantizedInput(_codes(x, scale, bits), scale)


def quantize_per_tensor(x: Tensor, bits: int, clip: float = 1.0) -> QuantizedInput:
    """One symmetric scale for the whole tensor, computed at run time (SmoothQuant O2).

    x: float (..., K). Returns codes int8 (..., K), scale float32 of one element, as many
    dimensions as x. Not causal: every token, padding included, moves it.
    """
    return static_quantize(x, tensor_scale(x, bits, clip), bits)


def tensor_scale(x: Tensor, bits: int, clip: float) -> Tensor:
    """The scale of `quantize_per_tensor`, float32 of one element and x's dimensions.

    It is 1 where there is no element.
    """
    if x.numel() == 0:
        return torch.ones([1] * x.dim(), dtype=torch.float32, device=x.device)
    return _scale_of(x.float().abs().amax().reshape([1] * x.dim()), bits, clip)


def static_quantize(x: Tensor, scale: Tensor, bits: int) -> QuantizedInput:
    """Codes under one calibrated scale (SmoothQuant O3). x: float (..., K); scale: float32 ()."""
    x = x.float()
    scale = scale.float().reshape([1] * x.dim())
    return QuantizedInput(_codes(x, scale, bits), scale)


def quantize_token_groups(
    x: Tensor, bits: int, group_size: int, clip: float = 1.0
) -> QuantizedInput:
    """Runtime smoothing in the scope `token`: groups of channels with integer multipliers.

    Of each token alone: g = clip · e, e a group's value of largest magnitude, base =
    max |g| / 8, |m| = ceil(|g| / base) ∈ 1…8 with the sign of -e (full range),
    q = round(x / (m · s)) with s = base / 2^(b-1). Beside codes of 5 and 6 bits |m| ≤ 7 and 3.
    x: float (..., K), G divides K. Returns codes q · m int8 (..., K), scale s float32 (..., 1).
    """
    groups = x.float().unflatten(-1, (-1, group_size))
    multiplier, scale = group_multipliers(groups, bits, clip)
    codes = _codes(groups, multiplier * scale, bits)
    return QuantizedInput((codes * multiplier.to(torch.int8)).flatten(-2), scale.squeeze(-1))


def group_multipliers(groups: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """The signed multipliers m and the scale s of `quantize_token_groups`.

    groups: float32 (..., K / G, G). Returns float32 (..., K / G, 1) and (..., 1, 1).
    """
    largest, largest_values = largest_group_multiplier(bits), extreme(groups)
    maxima = largest_values.abs() * clip
    base = maxima.amax(-2, keepdim=True) / largest
    scale = nonzero(base / (highest_code(bits) + 1))
    base = scale * (highest_code(bits) + 1)
    multiplier = (maxima / base).ceil().clamp(1, largest).nan_to_num(1.0)  # of ∞ / ∞, and of NaN
    return torch.where(largest_values > 0, -multiplier, multiplier), scale


def channel_multipliers(scale: Tensor, bits: int) -> Tensor:
    """The integer multipliers closest from above to per-channel scales.

    m_j = ceil(s_j · m_max / max s) ∈ 1…m_max. scale: float (..., K) → int8 (..., K).
    """
    scale = scale.float().clamp(min=SMALLEST_SCALE)
    base = scale.amax(-1, keepdim=True) / largest_multiplier(bits)
    multiplier = (scale / base).ceil().clamp(1, largest_multiplier(bits))
    return multiplier.nan_to_num(1.0).to(torch.int8)  # of ∞ / ∞, and of NaN


def quantize_smoothed(
    x: Tensor, multiplier: Tensor, bits: int, clip: float = 1.0
) -> QuantizedInput:
    """Per-token codes of x divided by per-channel multipliers, multiplied back as integers.

    x' = x / m; s_t = clip · max |x'_t| / (2^(b-1) - 1); q = round(x' / s_t).
    x: float (..., K); multiplier: int8, broadcastable to x. Returns codes q · m, scale (..., 1).
    """
    smoothed = x.float() / multiplier
    scale = _scale_of(_largest(smoothed), bits, clip)
    codes = _codes(smoothed, scale, bits)
    return QuantizedInput(codes * multiplier, scale)


def live_channel_maxima(x: Tensor, mask: Tensor | None, normalise: bool) -> Tensor:
    """Runtime smoothing's scale of channels over the current sequence: s_j = max_t |x_tj|.

    x: float (B, L, K); mask: bool (B, L), False at padding, or None. With `normalise` every token
    is first divided by its own maximum, so that an attention sink does not dominate the others.
    Returns float32 (B, K), at least 1e-5. Source: RRS (arXiv 2409.20361), section 3.1.
    """
    magnitude = x.float().abs()
    if normalise:
        magnitude = magnitude / magnitude.amax(-1, keepdim=True).clamp(min=SMALLEST_SCALE)
    if mask is not None:
        magnitude = magnitude.masked_fill(~mask.unsqueeze(-1), 0.0)
    if magnitude.shape[-2] == 0:
        return magnitude.new_full((*magnitude.shape[:-2], magnitude.shape[-1]), SMALLEST_SCALE)
    return magnitude.amax(-2).clamp(min=SMALLEST_SCALE)


def runtime_smooth_quantize(
    x: Tensor,
    bits: int,
    group_size: int,
    clip: float = 1.0,
    mask: Tensor | None = None,
    normalise: bool = False,
) -> QuantizedInput:
    """Runtime smoothing in the scope `live`: scales over the sequence, by ordered groups.

    Channels are sorted by their maximum, cut into groups of G, and every channel of a group takes
    the group's maximum as its divisor; then one symmetric scale a token. With G = 1 each channel
    keeps its own, as an integer multiplier, and no order is needed.
    x: float (B, L, K), G divides K; mask: bool (B, L) or None. Returns codes int8 (B, L, K) in
    the order of `order`, scale float32 (B, L, 1), block_scale (B, K / G), order (B, K).
    Source: RRS (arXiv 2409.20361), section 3.2.
    """
    maxima = live_channel_maxima(x, mask, normalise)
    if group_size == 1:
        multiplier = channel_multipliers(maxima, bits).unsqueeze(-2)
        return quantize_smoothed(x, multiplier, bits, clip)
    ordered, order = maxima.sort(dim=-1, descending=True, stable=True)
    block_scale = ordered[:, ::group_size].contiguous()
    x = x.float().gather(-1, order.unsqueeze(-2).expand_as(x))
    smoothed = x / block_scale.repeat_interleave(group_size, -1).unsqueeze(-2)
    quantized = quantize_per_token(smoothed, bits, clip)
    return QuantizedInput(quantized.codes, quantized.scale, block_scale, order)


def int8_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y = (Σ_k a_tk w_nk) · s_t · s_n + b_n, the sum in integers.

    codes: int8 (M, K); scale: float32 (M, 1) or (1, 1); weight: int8 (N, K);
    weight_scale: float32 (N,); bias: float (N,) or None. Returns (M, N) in `dtype`.
    """
    total = codes.long() @ weight.long().t()
    result = total.double() * scale.double() * weight_scale.double()
    return (result if bias is None else result + bias.double()).to(dtype)


def int4_gemm(
    codes: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y = s_t · s_n · Σ_g m_ng · (Σ_{k in g} a_tk w_nk) + b_n, the sum in integers.

    As `int8_gemm` with the weight packed: uint8 (N, ⌈K/2⌉), and multiplier: int8 (N, K / G), the
    integer scales of its groups, or None.
    """
    weight = multiplied_weight(unpack_int4(packed, codes.shape[1]), multiplier)
    return int8_gemm(codes, scale, weight, weight_scale, bias, dtype)


def expert_gemm(
    codes: Tensor,
    scale: Tensor,
    ends: Tensor,
    weights: list[Tensor],
    weight_scales: list[Tensor],
    multipliers: list[Tensor],
    biases: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Rows that are sorted by expert, each by its expert's weight: `int8_gemm` or `int4_gemm`.

    codes: int8 (R, K); scale: float32 (R, 1) or (1, 1); ends: int64 (E,), an expert's rows lie
    between the end before it and its own. Of each expert: weights: int8 (N, K), or packed, uint8
    (N, ⌈K/2⌉); weight_scales: float32 (N,); multipliers, of packed weights: int8 (N, K / G);
    biases: float (N,); of the last two there may be none. Returns (R, N) in `dtype`, zeros behind
    the last end.
    """
    result = codes.new_zeros(codes.shape[0], weights[0].shape[0], dtype=dtype)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        rows, weight = slice(start, end), weights[expert]
        operands = codes[rows], scale if scale.shape[0] == 1 else scale[rows]
        row_scale, bias = weight_scales[expert], biases[expert] if biases else None
        if weight.dtype == torch.uint8:
            multiplier = multipliers[expert] if multipliers else None
            product = int4_gemm(*operands, weight, row_scale, multiplier, bias, dtype)
        else:
            product = int8_gemm(*operands, weight, row_scale, bias, dtype)
        result[rows], start = product, end
    return result


def group_gemm(
    codes: Tensor,
    scale: Tensor,
    block_scale: Tensor | None,
    order: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """y = s_t · Σ_g c_bg · s_ng · (Σ_{k in g} a_tk w_nk) + b_n: float scales by block of K.

    codes: int8 (B, L, K); scale: float32 (B, L, 1) or (1, 1, 1); block_scale: float32
    (B, K / G) or None; order: int64 (B, K), the column of `weight` that each code multiplies,
    or None; weight: int8 (N, K); weight_scale: float (N, K / G) or (N, 1); bias: float (N,) or
    None. Returns (B, L, N) in `dtype`. Groups of weights and an order exclude one another.
    """
    results = []
    for b in range(codes.shape[0]):
        columns = weight if order is None else weight[:, order[b]]
        a = codes[b].unflatten(-1, (-1, group_size)).movedim(-2, 0).long()
        w = columns.unflatten(-1, (-1, group_size)).movedim(-2, 0).long()
        factor = weight_scale.double().t().unsqueeze(-2)
        if block_scale is not None:
            factor = factor * block_scale[b].double().reshape(-1, 1, 1)
        results.append((torch.bmm(a, w.mT).double() * factor).sum(0))
    result = torch.stack(results) * scale.double()
    return (result if bias is None else result + bias.double()).to(dtype)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """Two codes a byte: uint8 (N, ⌈K/2⌉) → int8 (N, K).

    Each block of 64 columns (the last may be shorter, and even after padding) stands in half as
    many bytes: byte j holds column j of the block's first half in its low nibble and column j of
    the second half in its high one. Neighbouring bytes are then neighbouring columns.
    """
    low, high = packed & 15, packed >> 4
    whole = columns // PACKED_BLOCK * PACKED_BLOCK // 2
    halves = [half[:, :whole].unflatten(-1, (-1, PACKED_BLOCK // 2)) for half in (low, high)]
    blocks = torch.cat(halves, -1).flatten(1)
    codes = torch.cat([blocks, low[:, whole:], high[:, whole:]], -1).to(torch.int8)
    return ((codes ^ 8) - 8)[:, :columns]


def multiplied_weight(codes: Tensor, multiplier: Tensor | None) -> Tensor:
    """4-bit codes times the multipliers of their groups: int8 (N, K), int8 (N, K / G)."""
    return codes if multiplier is None else by_group(codes, multiplier)


def by_group(matrix: Tensor, factor: Tensor) -> Tensor:
    """(N, K) times one factor a group of columns, (N, G)."""
    product: Tensor = matrix.unflatten(-1, (factor.shape[-1], -1)) * factor.unsqueeze(-1)
    return product.flatten(-2)


def weight_only_gemm(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """y = x Ŵᵀ + b with Ŵ unpacked inside: float activations, packed weights.

    x: float (M, K); packed: uint8 (N, ⌈K/2⌉) for 4 bits, int8 (N, K) for 8, else int32 as
    `unpack_words` has it; weight_scale: float (N, 1) or (N, K / G); multiplier: int8 (N, K / G) or
    None. Returns (M, N) in x's dtype.
    """
    weight = unpack_codes(packed, x.shape[-1], bits)
    step = weight_scale.double() if multiplier is None else weight_scale.double() * multiplier
    result: Tensor = x.double() @ by_group(weight.double(), step).t()
    return (result if bias is None else result + bias.double()).to(x.dtype)


def expert_weight_only_gemm(
    x: Tensor,
    ends: Tensor,
    packed: list[Tensor],
    weight_scales: list[Tensor],
    multipliers: list[Tensor],
    biases: list[Tensor],
    bits: int,
) -> Tensor:
    """Rows that are sorted by expert, each by its expert's weight: `weight_only_gemm`.

    x: float (R, K); ends: int64 (E,), as in `expert_gemm`. Of each expert, all of one form:
    packed, weight_scales, multipliers and biases as `weight_only_gemm` takes them; of the last two
    there may be none. Returns (R, N) in x's dtype, zeros behind the last end.
    """
    result = x.new_zeros(x.shape[0], packed[0].shape[0])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        multiplier = multipliers[expert] if multipliers else None
        bias = biases[expert] if biases else None
        weight = (packed[expert], weight_scales[expert], multiplier, bias, bits)
        result[start:end], start = weight_only_gemm(x[start:end], *weight), end
    return result


def unpack_words(words: Tensor, columns: int, bits: int) -> Tensor:
    """Codes of 2 to 8 bits: int32 (N, ⌈K · bits / 32⌉) → int8 (N, K).

    A row is one sequence of bits, the lowest of its first word first. Column k stands in the bits
    from k · bits on, if need be in two words, as the code plus 2^(b-1). It is compressed-tensors'
    layout since version 0.18; in 0.17 no code of 3, 5, 6 or 7 bits stood in two words.
    """
    first = torch.arange(columns, device=words.device) * bits
    word, shift = first // WORD_BITS, first % WORD_BITS
    unsigned = torch.nn.functional.pad(words.long() & (2**WORD_BITS - 1), (0, 1))
    window = unsigned[:, word] | unsigned[:, word + 1] << WORD_BITS
    codes: Tensor = ((window >> shift) & (2**bits - 1)) - 2 ** (bits - 1)
    return codes.to(torch.int8)


def unpack_codes(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Integer codes of 2 to 8 bits, int8 (N, columns), from how weights are packed."""
    if bits == 4:
        return unpack_int4(packed, columns)
    return packed if bits == 8 else unpack_words(packed, columns, bits)


def fp_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    element: str,
) -> Tensor:
    """y = x Ŵᵀ + b with Ŵ = v · s: float activations, weights of floating-point codes.

    x: float (M, K); packed: uint8 (N, K) for `element` "e4m3", (N, ⌈K/2⌉) for "e2m1", packed as
    `unpack_int4` has it; scale: float (N, 1) or (N, K / G), or uint8 (N, K / G): E8M0 bytes, or
    E4M3 bytes where there is a tensor_scale, float32 of one element, which multiplies them.
    Returns (M, N) in x's dtype.
    """
    weight = fp_values(packed, element, x.shape[-1]).double()
    result: Tensor = x.double() @ by_group(weight, fp_scales(scale, tensor_scale).double()).t()
    return (result if bias is None else result + bias.double()).to(x.dtype)


def fp_values(packed: Tensor, element: str, columns: int) -> Tensor:
    """The values of stored floating-point codes, float32 (N, columns)."""
    form = FORMATS[element]
    codes = packed
    if form.bits == 4:
        codes = unpack_int4(packed, columns).view(torch.uint8) & 15
    return form.values(form.ranks_of(codes).float())


def fp_scales(scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """The scales of groups as float32, from what is stored of them."""
    if scale.dtype != torch.uint8:
        return scale.float()
    if tensor_scale is None:
        return powers_of_two(scale)
    return e4m3_values(scale) * tensor_scale.float()


def fp_quantize(
    x: Tensor,
    element: str,
    scaling: Scaling,
    group_size: int = 0,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """x rounded to floating-point codes and multiplied out again: float32 (..., K).

    What hardware without a product of such codes computes with. Where all of a group is zero, or
    its E4M3 scale is, so is the result. A NaN makes all NaN that shares its scale; so does an
    infinity, except under an E4M3 scale, which is the largest then.

    Args:
        x: float (..., K).
        element: "e4m3" or "e2m1".
        scaling: as `Scaling`.
        group_size: channels of a group; the last may be shorter.
        tensor_scale: float32 of one element, in `static` and `e4m3`.
    """
    form, width = FORMATS[element], x.shape[-1]
    x = x.float()
    if scaling in ("token", "tensor", "static"):
        scale = _row_scale(x, element, scaling, tensor_scale)
        return form.values(form.ranks(x / scale)) * scale
    groups = torch.nn.functional.pad(x, (0, -width % group_size)).unflatten(-1, (-1, group_size))
    scale = fp_group_scales(_largest(groups), element, scaling, tensor_scale)
    codes = form.ranks(torch.where(scale == 0, 0.0, groups / scale))
    return (form.values(codes) * scale).flatten(-2)[..., :width]


def fp8_quantize(
    x: Tensor, scaling: Scaling, group_size: int = 0, tensor_scale: Tensor | None = None
) -> QuantizedInput:
    """The codes and scales that `fp_quantize` multiplies out, of E4M3 and float32 scales.

    Args:
        x: float (..., K).
        scaling: "token", "tensor", "static" or "group".
        group_size: channels of a group, which divide K.
        tensor_scale: float32 of one element, in `static`.

    Returns:
        Codes, uint8 (..., K), 0x7f for NaN, and scales, float32: (..., 1) of tokens, (..., K / G)
        of groups, else of one element.
    """
    x = x.float()
    if scaling != "group":
        scale = _row_scale(x, "e4m3", scaling, tensor_scale)
        return QuantizedInput(e4m3_bytes(x / scale), scale)
    groups = x.unflatten(-1, (-1, group_size))
    scale = fp_group_scales(_largest(groups), "e4m3", scaling, None)
    return QuantizedInput(e4m3_bytes(groups / scale).flatten(-2), scale.squeeze(-1))


def _row_scale(x: Tensor, element: str, scaling: Scaling, tensor_scale: Tensor | None) -> Tensor:
    """The scale of float32 x in the scalings without groups: (..., 1) of tokens, else ()."""
    match scaling:
        case "token":
            return nonzero(_largest(x) / FORMATS[element].largest)
        case "tensor":
            return fp_tensor_scale(x, element)
    assert tensor_scale is not None
    return tensor_scale.float()


def fp8_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y = Σ_g s_mg t_ng Σ_{k in g} a_mk w_nk + b: E4M3 codes on both sides, float scales.

    codes: uint8 (M, K); scale: float32 (M, 1), (M, K / G) or (1, 1); weight: uint8 (N, K);
    weight_scale: float (N, 1), or (N, K / G) where the tokens' groups are as large. A byte of 0x7f
    or 0xff is a token's NaN; no weight has it. Returns (M, N) in `dtype`.
    """
    a = by_group(e4m3_values(codes).double(), scale.double().expand(codes.shape[0], -1))
    result: Tensor = a @ by_group(e4m3_values(weight).double(), weight_scale.double()).t()
    return (result if bias is None else result + bias.double()).to(dtype)


MX_GROUP = 32  # channels of a group of MX formats


def mx_quantize(x: Tensor, element: str) -> QuantizedInput:
    """The codes and scales that `fp_quantize` multiplies out, of MXFP8 and MXFP4.

    Args:
        x: float (..., K), 32 divides K.
        element: "e4m3" or "e2m1".

    Returns:
        Codes, uint8 (..., K) of E4M3, or (..., K / 2), where channels j and j + 16 of a group share
        a byte, the first one in its low half; and scales, E8M0 bytes (..., K / 32).
    """
    form, groups = FORMATS[element], x.float().unflatten(-1, (-1, MX_GROUP))
    scale = power_of_two(_largest(groups), form)
    scaled = groups / powers_of_two(scale)
    if element == "e4m3":
        codes = e4m3_bytes(scaled)
    else:
        codes = form.codes(form.ranks(scaled).nan_to_num(0.0).to(torch.int8))
        codes = codes[..., : MX_GROUP // 2] | codes[..., MX_GROUP // 2 :] << 4
    return QuantizedInput(codes.flatten(-2), scale.squeeze(-1))


def mx_values(codes: Tensor, scale: Tensor, element: str) -> Tensor:
    """What codes and scales of `mx_quantize` stand for: float32 (M, K)."""
    if element == "e4m3":
        return by_group(e4m3_values(codes), powers_of_two(scale))
    pairs = codes.unflatten(-1, (-1, MX_GROUP // 2))
    form, halves = FORMATS[element], torch.cat([pairs & 15, pairs >> 4], -1).flatten(-2)
    return by_group(form.values(form.ranks_of(halves).float()), powers_of_two(scale))


def mx_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    element: str,
    dtype: torch.dtype,
) -> Tensor:
    """y = x Ŵᵀ + b: MXFP8 or MXFP4 codes on both sides, a power of two a group of 32.

    codes, scale: of (M, K), as `mx_quantize` gives them, 64 divides K; weight, weight_scale: uint8,
    as `fp_gemm` takes them. Returns (M, N) in `dtype`.
    """
    x = mx_values(codes, scale, element).double()
    return fp_gemm(x, weight, weight_scale, None, bias, element).to(dtype)


def fp_tensor_scale(x: Tensor, element: str) -> Tensor:
    """The scale of `fp_quantize` in `tensor`, float32 (): 1 where there is no element."""
    if x.numel() == 0:
        return x.new_ones(())
    return nonzero(x.abs().amax() / FORMATS[element].largest)


def fp_group_scales(
    maximum: Tensor, element: str, scaling: Scaling, tensor_scale: Tensor | None
) -> Tensor:
    """The scales of groups by their maxima, float32 (...), in the scalings that have groups."""
    form = FORMATS[element]
    if scaling == "group":
        return nonzero(maximum / form.largest)
    if scaling == "e8m0":
        return powers_of_two(power_of_two(maximum, form))
    assert tensor_scale is not None
    wanted = maximum / form.largest / tensor_scale.float()
    return e4m3_values(e4m3_bytes(wanted)) * tensor_scale.float()


def hadamard(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x R with R = diag(signs) · (I ⊗ H_left ⊗ H_right) / √(orders): blocks of Hadamard matrices.

    x: float (..., K); signs: int8 (K,); left: int8 (l, l), right: int8 (r, r), entries ±1,
    l · r divides K, and `right` is Sylvester's matrix of a power of two. Returns x's shape and
    dtype; computed in float64.
    """
    blocks = (x.double() * signs).unflatten(-1, (-1, left.shape[0], right.shape[0]))
    rotated = torch.einsum("...lr,lm,rn->...mn", blocks, left.double(), right.double())
    result: Tensor = rotated / (left.shape[0] * right.shape[0]) ** 0.5
    return result.flatten(-3).to(x.dtype)


def hadamard_quantize(
    x: Tensor,
    signs: Tensor,
    left: Tensor,
    right: Tensor,
    bits: int,
    group_size: int | None = None,
    clip: float = 1.0,
    full_range: bool = False,
) -> QuantizedInput:
    """x R quantized, the rotated values in float32: per token, or by `quantize_token_groups`.

    x, signs, left, right: as `hadamard`. group_size: of the token's groups, or None for one scale
    a token, with or without `full_range`. Source: SmoothRot (arXiv 2506.05413) and RRS
    (arXiv 2409.20361) before down_proj.
    """
    rotated = hadamard(x.float(), signs, left, right)
    return quantize_rotated(rotated, bits, group_size, clip, full_range)


def quantize_rotated(
    rotated: Tensor, bits: int, group_size: int | None, clip: float, full_range: bool
) -> QuantizedInput:
    """The quantizer of `hadamard_quantize` alone, of float32 (..., K)."""
    if group_size is None:
        return quantize_per_token(rotated, bits, clip, full_range)
    return quantize_token_groups(rotated, bits, group_size, clip)


def row_bytes(width: int, bits: int, group_size: int | None) -> int:
    """Bytes of a row of a cache: codes, and a scale and an offset of 2 bytes each a group.

    group_size: numbers a group, a multiple of 4 that divides `width`; None for one group.
    """
    return width * bits // 8 + 4 * (width // (group_size or width))


def row_width(nbytes: int, bits: int, group_size: int | None) -> int:
    """The numbers in a row of a cache of `nbytes` bytes: the inverse of `row_bytes`."""
    if group_size is None:
        return (nbytes - 4) * 8 // bits
    return nbytes * 8 * group_size // (bits * group_size + 32)


def quantize_heads(x: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Keys or values as rows of a cache: asymmetric codes, groups of one head and token.

    s = (max - min) / (2^b - 1), o = min + 2^(b-1) · s, both rounded to float16, and
    c = round((x - o) / s). x: float (..., D); bits: 8 or 4; group_size: as `row_bytes`.
    Returns uint8 (..., row_bytes). Source: QuaRot (arXiv 2404.00456), section 4, stage 2c.
    """
    groups, half = x.float().unflatten(-1, (-1, group_size or x.shape[-1])), 2 ** (bits - 1)
    lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((highest - lowest) / (2**bits - 1)).half()
    offset = (lowest + scale.float() * half).half()
    quotient = (groups - offset.float()) / nonzero(scale.float())
    codes = quotient.round_().clamp_(-half, half - 1).to(torch.int8)
    if bits == 4:
        first, second = codes.chunk(2, -1)
        codes = (first & 15) | (second << 4)
    parts = [part.flatten(-2).contiguous().view(torch.uint8) for part in (codes, scale, offset)]
    return torch.cat(parts, -1)


def row_parts(rows: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 (..., groups, group size), scales and offsets float16 (..., groups, 1) of rows."""
    width = row_width(rows.shape[-1], bits, group_size)
    code_bytes, size = width * bits // 8, group_size or width
    codes = rows[..., :code_bytes].view(torch.int8).unflatten(-1, (width // size, -1))
    if bits == 4:
        codes = torch.cat([(codes << 4) >> 4, codes >> 4], -1)
    scale, offset = rows[..., code_bytes:].view(torch.float16).unsqueeze(-1).chunk(2, -2)
    return codes, scale, offset


def dequantize_heads(rows: Tensor, bits: int, group_size: int | None, dtype: torch.dtype) -> Tensor:
    """x̂ = c · s + o of rows, uint8 (..., row_bytes) → (..., D) in `dtype`."""
    codes, scale, offset = row_parts(rows, bits, group_size)
    return (codes.to(dtype) * scale + offset).flatten(-2)


def with_first_tokens(x: Tensor, first: Tensor | None, start: Tensor | None) -> Tensor:
    """Keys or values, with a sequence's first tokens replaced by those stored in float.

    x: float (B, H, T, D); first: float (B, H, N, D) or None; start: int64 (B,), the index among the
    T tokens of each sequence's first one, negative where it has left a sliding window.
    """
    if first is None or start is None:
        return x
    index = torch.arange(x.shape[2], device=x.device) - start.unsqueeze(1)
    inside = (index >= 0) & (index < first.shape[2])
    index = index.clamp(0, first.shape[2] - 1)[:, None, :, None].expand_as(x)
    return torch.where(inside[:, None, :, None], first.to(x.dtype).gather(2, index), x)


def cached_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first_keys: Tensor | None,
    first_values: Tensor | None,
    start: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    bits: int,
    group_size: int | None,
) -> Tensor:
    """softmax(q · k̂ · scaling) v̂ over the rows of a cache.

    query: float (B, Q, L, D); keys, values: uint8 (B, H, T, row_bytes), H divides Q;
    first_keys, first_values, start: as `with_first_tokens`; mask: bool (B or 1, 1, L, T), True
    where a query sees a token, or None where it sees all; a query that sees none gives zeros.
    Returns (B, Q, L, width of a value) in the query's dtype.
    """
    dequantized = [
        with_first_tokens(dequantize_heads(rows, bits, group_size, torch.float64), first, start)
        for rows, first in ((keys, first_keys), (values, first_values))
    ]
    heads = query.shape[1] // keys.shape[1]
    k, v = (x.repeat_interleave(heads, 1) for x in dequantized)
    return attend(query.double() @ k.mT * scaling, v, mask).to(query.dtype)


def attend(scores: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(scores) · values, where `mask` is True; zeros for a query that sees nothing.

    scores: float (..., L, T); values: (..., T, D) of the same dtype; mask: as `cached_attention`.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return weights @ values


def int8_attention(
    codes: Tensor,
    scale: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """softmax(q̂ · k̂ · scaling) v̂, the sums of the first product in integers.

    q̂ · k̂ = s_q · (s_k · Σ_d a_d c_d + o_k · Σ_d a_d), a and c the codes of a query and a key.
    codes: int8 (B, Q, L, D) and scale: float32 (B, Q, L, 1), of `quantize_per_token`; keys: uint8
    (B, H, T, row_bytes), a group a head; values: rows of the same bits, or float (B, H, T, D);
    mask: as `cached_attention`. Returns (B, Q, L, width of a value) in `dtype`.
    Source: SmoothQuant (arXiv 2211.10438), section 4; SageAttention (arXiv 2410.02367).
    """
    heads = codes.shape[1] // keys.shape[1]
    key_codes, key_scale, key_offset = (
        part.squeeze(-2).repeat_interleave(heads, 1) for part in row_parts(keys, bits, None)
    )
    if values.dtype == torch.uint8:
        values = dequantize_heads(values, bits, None, torch.float64)
    total = (codes.long() @ key_codes.long().mT) * key_scale.double().mT
    total += codes.long().sum(-1, keepdim=True) * key_offset.double().mT
    values = values.double().repeat_interleave(heads, 1)
    return attend(total * scale.double() * scaling, values, mask).to(dtype)
