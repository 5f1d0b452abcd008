"""The longest sequence that a model was trained for."""

from __future__ import annotations

import logging

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .graph import decoder_of

log = logging.getLogger("smoothq")

_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")


def positions_of(model: PreTrainedModel) -> int | None:
    """Tokens of the longest sequence that a model takes; None where nothing limits it.

    The size of a table of learned positions, beyond which the model cannot run; without a table
    the number in the config, beyond which a model with rotary positions gets worse.
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
    """The smallest sequence limit, in tokens, that a model's config has; None without any."""
    text = config.get_text_config(decoder=True)
    named = [getattr(text, field, None) for field in _FIELDS]
    return min((n for n in named if isinstance(n, int) and n > 0), default=None)


def within_positions(model: PreTrainedModel, length: int, what: str) -> int:
    """`length`, or the model's limit where that is smaller; then a warning is logged.

    Args:
        model: whose positions limit the length.
        length: in tokens.
        what: has that length, in the plural, for the warning: `calibration sequences`.
    """
    limit = positions_of(model)
    if limit is None or length <= limit:
        return length
    log.warning("%s of %d tokens are shortened to the model's %d positions", what, length, limit)
    return limit


def _position_table(model: PreTrainedModel) -> nn.Embedding | None:
    """The decoder's learned position embedding, or None."""
    decoder, tokens = decoder_of(model), model.get_input_embeddings()
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
