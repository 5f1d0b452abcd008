"""The stack of blocks in a decoder, found by structure, and the kinds of its blocks."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..architectures.graph import decoder_of, text_config
from ..compat import tied_weights
from ..errors import UnsupportedModelError


def find_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name of the list of blocks within a model's decoder, and the list.

    Of several lists it is that with as many blocks as the config has layers, then that with the
    most parameters; lists within blocks and those of vision or audio towers do not count.

    Raises:
        UnsupportedModelError: the decoder has no list of blocks.
    """
    decoder, config = decoder_of(model), text_config(model)
    beside = {
        id(module)
        for name in towers(model, decoder)
        for module in model.get_submodule(name).modules()
    }
    everywhere = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None
    }
    outside = {name: m for name, m in everywhere.items() if id(m) not in beside}
    lists = outside or everywhere
    outer = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outer:
        raise UnsupportedModelError(
            f"'{config.model_type}' has no list of blocks in its decoder, {type(decoder).__name__}"
        )
    count = getattr(config, "num_hidden_layers", None)

    def rank(item: tuple[str, nn.ModuleList]) -> tuple[bool, int]:
        return len(item[1]) == count, sum(p.numel() for p in item[1].parameters())

    return max(outer.items(), key=rank)


def towers(model: PreTrainedModel, core: nn.Module) -> list[str]:
    """The full names of the models within a model that are no part of its decoder, as for vision.

    Args:
        model: any class of model around a decoder.
        core: a module of it; what holds it is no tower, but a wrapper.
    """
    config = text_config(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        and type(module.config) is not type(config)
        and not any(inner is core for inner in module.modules())
    ]


def kinds_of(model: PreTrainedModel) -> list[int]:
    """The kind of each block: a number from 0, equal for blocks with the same parameter names.

    Blocks that are tied to earlier ones (Zamba) are of another kind than these.
    """
    blocks = find_stack(model)[1]
    names = {id(module): full for full, module in model.named_modules()}
    stack, tied = names[id(blocks)], tied_weights(model)
    kinds: dict[tuple[tuple[str, bool], ...], int] = {}
    numbers = []
    for index, block in enumerate(blocks):
        parameters = [name for name, _ in block.named_parameters()]
        signature = tuple((name, f"{stack}.{index}.{name}" in tied) for name in parameters)
        numbers.append(kinds.setdefault(signature, len(kinds)))
    return numbers
