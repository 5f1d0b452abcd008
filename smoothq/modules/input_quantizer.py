"""The quantizer of a site's input, at run time: rotate → smooth → quantize.

One InputQuantizer serves all readers of a site: q, k and v receive the same tensor and must see
the same codes, so it is quantized once: in eager mode the result is cached until every reader has
asked for it, while a compiler traces a block until the block ends (`TracedInputs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import kernels
from ..errors import SmoothqError
from ..kernels import QuantizedInput
from ..kernels.formats import E4M3, FORMATS
from ..kernels.reference import Scaling
from ..transforms.hadamard import Hadamard
from .online_rotation import OnlineRotation

Mode = Literal[
    "float",
    "token",
    "tensor",
    "static",
    "smooth_token",
    "smooth_calibrated",
    "smooth_live",
    "fp_token",
    "fp_tensor",
    "fp_static",
    "fp_group",
    "fp_e8m0",
    "fp_e4m3",
]
"""How a site's input is quantized.

| mode                | shared scale                                    | computed                |
|---------------------|-------------------------------------------------|-------------------------|
| `float`             | none, the input stays float                     | never                   |
| `token`             | a token                                         | at run time             |
| `tensor`            | the tensor, all its tokens                      | at run time             |
| `static`            | the site, all its inputs                        | by calibration          |
| `smooth_token`      | a token, times an integer a group of channels   | at run time             |
| `smooth_calibrated` | a token, times an integer a channel of the site | integers by calibration |
| `smooth_live`       | a token, times a float a group of a sequence    | at run time             |
| `fp_token`          | a token                                         | at run time             |
| `fp_tensor`         | the tensor, all its tokens                      | at run time             |
| `fp_static`         | the site, all its inputs                        | by calibration          |
| `fp_group`          | a group of a token's channels, float32          | at run time             |
| `fp_e8m0`           | a group of a token's channels, a power of two   | at run time             |
| `fp_e4m3`           | such a group, E4M3 times the site's float32     | at run time, calibrated |

`smooth_` and a scope is runtime smoothing (RRS, arXiv 2409.20361) in that scope of the recipe. In
`smooth_live` a group is of channels with similar maxima over the sequence; groups of one channel
have integers in place of floats. `fp_` and a `Scaling` is floating-point codes: of 8 bits E4M3, of
4 bits E2M1.
"""


@dataclass(frozen=True)
class InputSpec:
    """The settings of an InputQuantizer, resolved for one site.

    Attributes:
        width: channels of the input (in_features of its readers).
        bits: width of a code.
        mode: as `Mode`.
        clip: scales cover this share of the maximum.
        group_size: channels of a group in `smooth_token`, `smooth_live`, `fp_group`, `fp_e8m0` and
            `fp_e4m3`; 1 in `smooth_live` is one factor a channel.
        normalise: in `smooth_live`, divide every token by its maximum before the factors are
            computed.
        full_range: in `token`, signed scales: the value of largest magnitude gets the lowest code.
        rotation: what the input is multiplied by first, or None.
    """

    width: int
    bits: int
    mode: Mode
    clip: float = 1.0
    group_size: int = 1
    normalise: bool = False
    full_range: bool = False
    rotation: Hadamard | None = None

    def scale_bits(self, tokens: int) -> float:
        """Bits of scales and multipliers a token, in a sequence of `tokens` tokens.

        A float32 scale a token; in `smooth_token` besides a multiplier and its sign a group; in
        `smooth_live` a float32 factor (with groups of one channel a multiplier) a group and
        sequence.
        """
        groups = -(-self.width // self.group_size)
        match self.mode:
            case "float" | "static" | "fp_static":
                return 0.0
            case "token" | "smooth_calibrated" | "fp_token":
                return 32.0
            case "tensor" | "fp_tensor":
                return 32.0 / tokens
            case "fp_group":
                return 32.0 * groups
            case "fp_e8m0" | "fp_e4m3":
                return 8.0 * groups
            case "smooth_token":
                largest: int = kernels.largest_group_multiplier(self.bits)
                return 32.0 + (2 * largest - 1).bit_length() * groups
        bits = 32
        if self.group_size == 1:
            bits = (kernels.largest_multiplier(self.bits) - 1).bit_length()
        return 32.0 + bits * groups / tokens

    @property
    def blocked(self) -> bool:
        """Whether codes come with a float scale a group of channels."""
        return self.mode == "smooth_live" and self.group_size > 1

    @property
    def smoothed(self) -> bool:
        """Whether the input is smoothed at run time."""
        return self.mode.startswith("smooth_")

    @property
    def calibrates_scale(self) -> bool:
        """Whether calibration finds a scale of the whole input."""
        return self.mode in ("static", "fp_static", "fp_e4m3")

    @property
    def calibrated(self) -> bool:
        """Whether calibration finds something of the input: a scale, or multipliers."""
        return self.calibrates_scale or self.mode == "smooth_calibrated"

    @property
    def largest(self) -> float:
        """What a calibrated scale of one stands for at most."""
        if not self.emulated:
            return float(kernels.highest_code(self.bits))
        largest: float = FORMATS[self.element].largest
        if self.mode == "fp_e4m3":
            largest *= E4M3.largest
        return largest

    @property
    def emulated(self) -> bool:
        """Whether the input is rounded to floating-point codes.

        Where the hardware at hand multiplies no such codes, a product is of what they stand for.
        """
        return self.mode.startswith("fp_")

    @property
    def floating(self) -> bool:
        """Whether a product takes the input as floats, rounded or not."""
        return self.mode == "float" or self.emulated

    @property
    def element(self) -> str:
        """The format of floating-point codes: `e4m3` or `e2m1`."""
        return "e4m3" if self.bits == 8 else "e2m1"

    @property
    def fused(self) -> bool:
        """Whether rotation and quantizer run as one operator, `hadamard_quantize`."""
        return self.rotation is not None and self.mode in ("token", "smooth_token")

    @property
    def _code_quantizer(self) -> str:
        return "mx_quantize" if self.mode == "fp_e8m0" else "fp8_quantize"

    def operators(self, codes: bool = False) -> tuple[str, ...]:
        """The operators of `smoothq.kernels` that quantize an input, in order.

        codes: whether floating-point codes are asked for, not what they stand for.
        """
        quantizer = {
            "float": (),
            "token": ("quantize_per_token",),
            "tensor": ("quantize_per_tensor",),
            "static": ("static_quantize",),
            "smooth_calibrated": ("quantize_smoothed",),
            "smooth_token": ("quantize_token_groups",),
            "smooth_live": ("runtime_smooth_quantize",),
        }.get(self.mode, (self._code_quantizer if codes else "fp_quantize",))
        if self.fused:
            return ("hadamard_quantize",)
        return quantizer if self.rotation is None else ("hadamard", *quantizer)


class SequenceContext:
    """The padding mask of the current forward, which quantizers in mode `smooth_live` need.

    mask: bool (batch, tokens), False at padding, or None.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._hook: RemovableHandle | None = None

    def attach(self, base_model: nn.Module) -> None:
        """Record `attention_mask`, (batch, tokens so far), at each forward of `base_model`."""
        self._hook = base_model.register_forward_pre_hook(self._take, with_kwargs=True)

    def detach(self) -> None:
        """Undo `attach`."""
        if self._hook is not None:
            self._hook.remove()

    def _take(self, _module: nn.Module, _args: object, kwargs: dict[str, object]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise SmoothqError(
                "live runtime smoothing needs a padding mask of (batch, tokens), "
                f"not one of shape {tuple(mask.shape)}; use runtime_smoothing.scope=token"
            )
        self.mask = mask.bool() if isinstance(mask, Tensor) else None


class TracedInputs:
    """The quantized inputs of a block's forward that a compiler traces, so that each is one node.

    Compilers do not merge equal calls of custom operators. What is kept while one traces is part of
    the trace and must end with it: hooks open and close it with the block's forward, and a module
    that is traced without its block keeps nothing. Nor does a block in training mode, whose forward
    a checkpoint may repeat.

    results: the input and its codes by the InputQuantizer's name; None outside of such a forward.
    """

    def __init__(self) -> None:
        self.results: dict[str, tuple[Tensor, QuantizedInput | Tensor]] | None = None
        self._hooks: list[RemovableHandle] = []

    def attach(self, block: nn.Module) -> None:
        """Keep the inputs of a block's InputQuantizers."""
        self._hooks = [
            block.register_forward_pre_hook(self._open),
            block.register_forward_hook(self._close),
        ]

    def detach(self) -> None:
        """Undo `attach`."""
        for hook in self._hooks:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: without handles of a block that is gone."""
        alive = [hook for hook in self._hooks if hook.hooks_dict_ref() is not None]
        return self.__dict__ | {"_hooks": alive, "results": None}

    def _open(self, block: nn.Module, _args: object) -> None:
        if torch.compiler.is_compiling() and not block.training:
            self.results = {}

    def _close(self, _block: nn.Module, _args: object, _output: object) -> None:
        if self.results is not None:
            self.results = None


def _version(x: Tensor) -> int | None:
    """A counter that every in-place change of a tensor raises; None for inference tensors."""
    return None if x.is_inference() else x._version


class InputQuantizer(nn.Module):
    """Rotates, smooths and quantizes a site's input, float (..., K).

    Persistent buffers: `scale`, float32 (), in the modes `static`, `fp_static` and `fp_e4m3`;
    `multiplier`, int8 (K,), in mode `smooth_calibrated`.
    """

    scale: Tensor
    multiplier: Tensor

    def __init__(
        self,
        name: str,
        spec: InputSpec,
        readers: int = 1,
        context: SequenceContext | None = None,
        traced: TracedInputs | None = None,
    ) -> None:
        """Create the quantizer, not calibrated yet.

        Args:
            name: the site's, for messages.
            spec: its settings.
            readers: how many modules ask for each result.
            context: the padding mask, for mode `smooth_live`; None for none.
            traced: of the block; None where a compiler may trace each reader by itself.
        """
        super().__init__()
        self.name, self.spec, self.readers = name, spec, readers
        self.context, self.traced = context or SequenceContext(), traced or TracedInputs()
        if spec.calibrates_scale:
            self.register_buffer("scale", torch.ones((), dtype=torch.float32, device="cpu"))
        if spec.mode == "smooth_calibrated":
            ones = torch.ones(spec.width, dtype=torch.int8, device="cpu")
            self.register_buffer("multiplier", ones)
        self.rotation = None if spec.rotation is None else OnlineRotation(spec.rotation)
        self._last: tuple[Tensor, int | None, bool, QuantizedInput | Tensor, int] | None = None

    def calibrate(self, maxima: Tensor) -> None:
        """Set the static scale or the calibrated multipliers from max_t |x_tk|, float (K,)."""
        if self.spec.calibrates_scale:
            largest = maxima.max() * self.spec.clip / self.spec.largest
            self.scale.copy_(largest if largest > 0 else torch.ones_like(largest))
        elif self.spec.mode == "smooth_calibrated":
            self.multiplier.copy_(kernels.channel_multipliers(maxima, self.spec.bits))

    def rotate(self, x: Tensor) -> Tensor:
        """x R, float (..., K); x itself where the site has no online rotation."""
        return x if self.rotation is None else self.rotation(x)

    def forward(self, x: Tensor, codes: bool = False) -> QuantizedInput | Tensor:
        """The input, float (..., K), as codes and scales; as a float tensor in mode `float`.

        codes: in the modes `fp_`, ask for codes as well, not for what they stand for.
        """
        if self.readers == 1:
            return self._quantize(x, codes)
        if torch.compiler.is_compiling():
            return self._quantize_traced(x, codes)
        last = self._last  # read once: another thread may run the same model
        if last is not None and last[0] is x and last[1:3] == (_version(x), codes):
            _, version, _, result, remaining = last
        else:
            version, result, remaining = _version(x), self._quantize(x, codes), self.readers
        self._last = (x, version, codes, result, remaining - 1) if remaining > 1 else None
        return result

    def _quantize_traced(self, x: Tensor, codes: bool) -> QuantizedInput | Tensor:
        """As `forward`: a tensor's identity is known while it is traced, its version is not."""
        results = self.traced.results
        if results is None:
            return self._quantize(x, codes)
        name = f"{self.name}, codes" if codes else self.name
        last = results.get(name)
        if last is None or last[0] is not x:
            last = results[name] = (x, self._quantize(x, codes))
        return last[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputQuantizer:
        scale = self._buffers.get("scale")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None and self.scale.dtype != scale.dtype:
            # `.to(dtype)` is about activations; a scale that lost bits would move all of them.
            self.scale = scale.to(self.scale.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: without the cached result."""
        return self.__dict__ | {"_last": None}

    def operators(self) -> tuple[str, ...]:
        """The operators of `smoothq.kernels` that a forward runs, in order."""
        return self.spec.operators()

    def _quantize(self, x: Tensor, codes: bool = False) -> QuantizedInput | Tensor:
        spec = self.spec
        if spec.fused:
            assert self.rotation is not None
            group_size = spec.group_size if spec.mode == "smooth_token" else None
            return self.rotation.quantize(x, spec.bits, group_size, spec.clip, spec.full_range)
        x = self.rotate(x)
        match spec.mode:
            case "float":
                return x
            case "token":
                return kernels.quantize_per_token(x, spec.bits, spec.clip, spec.full_range)
            case "tensor":
                return kernels.quantize_per_tensor(x, spec.bits, spec.clip)
            case "static":
                return kernels.static_quantize(x, self.scale, spec.bits)
            case "smooth_calibrated":
                return kernels.quantize_smoothed(x, self.multiplier, spec.bits, spec.clip)
            case "smooth_token":
                return kernels.quantize_token_groups(x, spec.bits, spec.group_size, spec.clip)
            case "smooth_live":
                return self._smooth_live(x)
        return self._round(x, codes)

    def _round(self, x: Tensor, codes: bool) -> QuantizedInput | Tensor:
        """x as floating-point codes and scales, or as what they stand for."""
        spec = self.spec
        scaling = cast(Scaling, spec.mode.removeprefix("fp_"))
        tensor_scale = self.scale if spec.calibrates_scale else None
        if codes and spec.mode == "fp_e8m0":
            blocks: QuantizedInput = kernels.mx_quantize(x, spec.element)
            return blocks
        if codes:
            coded: QuantizedInput = kernels.fp8_quantize(x, scaling, spec.group_size, tensor_scale)
            return coded
        rounded: Tensor = kernels.fp_quantize(
            x, spec.element, scaling, spec.group_size, tensor_scale
        )
        return rounded

    def _smooth_live(self, x: Tensor) -> QuantizedInput:
        spec = self.spec
        if x.dim() != 3:
            raise SmoothqError(
                f"{self.name}: live runtime smoothing needs an input of (batch, tokens, channels), "
                f"not {tuple(x.shape)}; use runtime_smoothing.scope=token"
            )
        mask = self.context.mask
        smoothed: QuantizedInput = kernels.runtime_smooth_quantize(
            x,
            spec.bits,
            spec.group_size,
            spec.clip,
            None if mask is None else mask[:, -x.shape[1] :].to(x.device),
            spec.normalise,
        )
        return smoothed

    def dequantized(self, x: Tensor) -> Tensor:
        """The input rotated, quantized and dequantized: float32 (..., K).

        It is what the weights are multiplied by, so GPTQ's Hessian is computed from it.
        """
        quantized = self._quantize(x)
        if isinstance(quantized, Tensor):
            return quantized.float()
        values: Tensor = quantized.codes.float() * quantized.scale
        if quantized.block_scale is None or quantized.order is None:
            return values
        blocks = quantized.block_scale.repeat_interleave(self.spec.group_size, -1).unsqueeze(-2)
        order = quantized.order.unsqueeze(-2).expand_as(values)
        return torch.empty_like(values).scatter_(-1, order, values * blocks)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.name}, {self.spec}"
