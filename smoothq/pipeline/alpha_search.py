"""Search for the migration strength alpha of an edge that minimises the block's output error.

For each candidate alpha the edge is smoothed, its linears are rounded to nearest, its input is
quantized, and the block's output is compared with the float block's on the same hidden states.
SmoothQuant (arXiv 2211.10438, section 5) finds alpha by a grid search over a whole model.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import NumericsError
from ..modules import InputQuantizer
from ..plan.plan import SitePlan
from ..rounding.rtn import round_to_nearest
from ..transforms.rotation import rotate_input
from ..transforms.smoothing import smooth
from .block_tuning import relative_error
from .hidden_states import HiddenStates

CANDIDATES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def search_alpha(
    block: nn.Module, index: int, plan: SitePlan, maxima: Tensor, stream: HiddenStates
) -> float:
    """The candidate alpha for which quantizing one site changes the block's output least.

    Input scales that come from calibration or from a whole sequence are replaced by scales per
    token in this search.

    Args:
        block: the float block; unchanged on return.
        index: its number in the model.
        plan: the plan of the site to smooth.
        maxima: max_t |x_tk| of the site's input, float (K,).
        stream: the block's input; the micro-batches of one forward are used.

    Raises:
        NumericsError: the error is NaN or Inf for every candidate.
    """
    spec = plan.input
    if spec.mode not in ("float", "token", "smooth_token"):
        spec = replace(spec, mode="token", group_size=1, normalise=False)
    site_input = InputQuantizer(plan.site.name, spec).to(maxima.device)
    turn = stream.turns()[0]
    float_outputs = [stream.forward(block, index, number) for number, _ in turn]
    float_parameters = {name: parameter.clone() for name, parameter in block.named_parameters()}
    errors = {}
    for alpha in CANDIDATES:
        smooth(block, plan.site, maxima, alpha)
        hooks = [quantize_linear(block, module, plan, site_input) for module in plan.modules]
        error = sum(
            share * relative_error(stream.forward(block, index, number), float_output).item()
            for (number, share), float_output in zip(turn, float_outputs, strict=True)
        )
        if math.isfinite(error):
            errors[alpha] = error
        for hook in hooks:
            hook.remove()
        for name, parameter in block.named_parameters():
            parameter.copy_(float_parameters[name])
    if not errors:
        raise NumericsError(
            f"layer {index}, {plan.site.name}: no alpha leaves its output finite; give a number"
        )
    return min(errors, key=lambda alpha: errors[alpha])


def quantize_linear(
    block: nn.Module, module: str, plan: SitePlan, site_input: InputQuantizer
) -> RemovableHandle:
    """Simulate the quantization of one linear in float.

    Its weight is rotated as planned and rounded to nearest, in place; a hook quantizes and
    dequantizes its input.

    Args:
        block: the block; other modules are not changed.
        module: the linear's name within the block.
        plan: the plan of the site that the linear reads.
        site_input: quantizes that site's input.

    Returns: the hook; removing it makes the linear read the float input again.
    """
    linear = block.get_submodule(module)
    assert isinstance(linear, nn.Linear)
    if plan.input.rotation is not None:
        rotate_input(linear.weight.data, plan.input.rotation)
    linear.weight.copy_(round_to_nearest(linear.weight, plan.modules[module].grid).dequantize())
    return linear.register_forward_pre_hook(
        lambda _, args: (site_input.dequantized(args[0]).to(linear.weight.dtype),)
    )
