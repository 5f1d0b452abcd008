"""Which devices and programs can run the checkpoint that a plan gives, and by which operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..errors import SmoothqError
from ..plan.plan import Plan
from ..plan.portability import export_blockers, refuse_in_plugin
from .chips import CHIPS


@dataclass(frozen=True)
class Runner:
    """A device or a program that could run a quantized checkpoint.

    Attributes:
        name: the device or the program, for the user.
        runs: whether it can run the checkpoint.
        how: the operators or the steps that this takes; the reason where it cannot.
    """

    name: str
    runs: bool
    how: str


def list_runners(model: PreTrainedModel, plan: Plan) -> list[Runner]:
    """Every runner that is known, with whether it can run a plan's checkpoint.

    Args:
        model: the float model, which may be on the meta device.
        plan: its plan.

    Returns:
        This machine's processor, the GPUs of `CHIPS`, transformers with smoothq, the runners of
        an export, and vLLM with smoothq's plugin, in this order.
    """
    runners = [_device_runner(f"this processor ({_processor()})", plan, "cpu")]
    runners += [
        _device_runner(f"{chip.name} ({chip.architecture})", plan, "cuda", chip.architecture)
        for chip in CHIPS
    ]
    ours = "after `import smoothq`: the format's modules and operators are smoothq's"
    runners.append(Runner("transformers", True, ours))
    blockers = "; ".join(map(str, export_blockers(model, plan)))
    how = "after `smoothq export`; `smoothq plan` of that names vLLM's kernels"
    runners.append(Runner("transformers without smoothq, vLLM", not blockers, blockers or how))
    refusal = ""
    try:
        refuse_in_plugin(plan)
    except SmoothqError as error:
        refusal = str(error)
    plugin = "by its plugin, with the operators above; not in tensor parallel"
    runners.append(Runner("vLLM with smoothq installed", not refusal, refusal or plugin))
    return runners


def _device_runner(name: str, plan: Plan, device: str, architecture: str | None = None) -> Runner:
    """A device type ("cpu", "cuda"), with the operators that it runs for each stage of a block."""
    place = torch.device(device)
    try:
        by_operators: dict[tuple[str, ...], list[str]] = {}
        for site in plan.sites:
            for spec in site.modules.values():
                operators = spec.operators(site.input, place, architecture=architecture)
                stages = by_operators.setdefault(operators, [])
                if site.site.stage not in stages:
                    stages.append(site.site.stage)
    except NotImplementedError as error:
        return Runner(name, True, f"its operators cannot be listed here: {error}")
    lines = (f"{', '.join(names)}: {' → '.join(ops)}" for ops, names in by_operators.items())
    return Runner(name, True, "; ".join(lines))


def _processor() -> str:
    """The instruction set that PyTorch uses on this machine's CPU, such as `AVX512`."""
    return str(torch.backends.cpu.get_cpu_capability())
