"""How long a sequence a model was made for, and nothing longer."""

from __future__ import annotations

import logging

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("smoothq")

_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")


def positions_of(model: PreTrainedModel) -> int | None:
    """Tokens of the longest sequence that a model takes; None where nothing limits it.

    Beyond a table of learned positions a model cannot run; beyond the number that its config names,
    a rotary one runs worse. The table, where there is one, counts: it is what the model has.
    """
    table = _position_table(model)
    if table is not None:
        rows = table.weight.shape[0]
        offset = getattr(table, "offset", None)  # OPT: rows before the first position's
        if offset is None:  # RoBERTa: positions begin behind the padding row
            offset = 0 if table.padding_idx is None else table.padding_idx + 1
        return int(rows - offset)
    return named_positions(model.config)


def named_positions(config: PretrainedConfig) -> int | None:
    """Tokens of the longest sequence that a model's config names; None where it names none."""
    text = config.get_text_config(decoder=True)
    named = [getattr(text, field, None) for field in _FIELDS]
    return min((n for n in named if isinstance(n, int) and n > 0), default=None)


def within_positions(model: PreTrainedModel, length: int, what: str) -> int:
    """The length, or the model's positions where they are fewer, with a line that says so.

    what: is shortened, in the plural: `calibration sequences`.
    """
    limit = positions_of(model)
    if limit is None or length <= limit:
        return length
    log.warning("%s of %d tokens are shortened to the model's %d positions", what, length, limit)
    return limit


def _position_table(model: PreTrainedModel) -> nn.Embedding | None:
    """Learned positions that are added to the embedding, if the decoder has some."""
    decoder, tokens = model.get_decoder(), model.get_input_embeddings()
    stacks = [name for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in decoder.named_modules():
        leaf = name.rpartition(".")[2]
        if (
            isinstance(module, nn.Embedding)
            and module is not tokens
            and ("pos" in leaf or leaf == "wpe")
            and not any(name.startswith(f"{stack}.") for stack in stacks)
        ):
            return module
    return None
