"""Which class a config stands for.

It is the class that the config's `architectures` names; without one, the class that the first of
transformers' auto classes has for it. A class with vision or audio towers goes before the causal
one, which would drop them. Code beside a model is imported only where the caller trusts it.
"""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from ..compat import (
    auto_classes,
    class_of_architecture,
    import_custom_class,
    is_custom_class,
)
from ..errors import UnsupportedModelError

OWN_CODE = (
    "has code of its own, which is run only where it is trusted: read it, and give "
    "trust_remote_code=True"
)
_WITH_TOWERS = (
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSpeechSeq2Seq",
)
_OF_TEXT = ("AutoModelForCausalLM",)
_OTHERS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModel")

# Classes with code of their own that were trusted, by the place of their model and their names.
_trusted: dict[tuple[str | None, str], type[PreTrainedModel]] = {}


def class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a config stands for.

    Args:
        config: of a model, float or quantized.

    Raises:
        UnsupportedModelError: for an encoder-decoder, a model without a decoder, or a class with
            code of its own that nobody trusted.
    """
    text = config.get_text_config(decoder=True)
    for part in (config, text):
        if getattr(part, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"'{config.model_type}' is an encoder-decoder: only decoders are quantized"
            )
    named = config.architectures or ()
    for name in named:
        if (config.name_or_path, name) in _trusted:
            return _trusted[config.name_or_path, name]
    composite = bool(config.sub_configs)
    preferred = (*_WITH_TOWERS, *_OF_TEXT) if composite else (*_OF_TEXT, *_WITH_TOWERS)
    candidates = _classes(config, preferred)
    if not candidates and not _classes(text, preferred):
        raise UnsupportedModelError(_no_decoder(config))
    known = {kind.__name__: kind for kind in (*_classes(config, _OTHERS), *candidates)}
    for name in named:
        kind = known.get(name) or class_of_architecture(name)
        if kind is not None and (name in known or kind.config_class is type(config)):
            return kind
    if not candidates:
        raise UnsupportedModelError(_no_decoder(config))
    return candidates[0]


def class_of_model(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class that a model in memory is of, as transformers finds it by its config.

    It is the model's own class, or for a subclass that transformers does not know the class that
    its config stands for.

    Raises:
        UnsupportedModelError: as `class_of`.
    """
    return class_of(config_naming_class(model))


def config_naming_class(model: PreTrainedModel) -> PretrainedConfig:
    """A copy of a model's config whose `architectures` names the model's class.

    `class_of` returns that class for it, also where the class has code of its own: the model was
    built by a caller who trusts it.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if is_custom_class(type(model)):
        _trusted[config.name_or_path, type(model).__name__] = type(model)
    return config


def trust_code(config: PretrainedConfig, directory: Path) -> None:
    """Import the model classes that a config's `auto_map` names, for `class_of`. Runs their code.

    Args:
        config: of a model whose code the user trusts.
        directory: of the model.
    """
    for auto, reference in (getattr(config, "auto_map", None) or {}).items():
        if auto in (*_WITH_TOWERS, *_OF_TEXT, *_OTHERS):
            kind = import_custom_class(reference, directory)
            _trusted[config.name_or_path, kind.__name__] = kind


def _classes(config: PretrainedConfig, autos: tuple[str, ...]) -> list[type[PreTrainedModel]]:
    """The classes that auto classes take for a config, without those of its text model alone."""
    text = type(config.get_text_config(decoder=True))
    return [
        kind
        for auto in autos
        for kind in auto_classes(config, auto)
        if text is type(config) or getattr(kind, "config_class", None) is not text
    ]


def _no_decoder(config: PretrainedConfig) -> str:
    if getattr(config, "auto_map", None):
        return f"'{config.model_type}' {OWN_CODE}"
    return f"'{config.model_type}' is no causal LM that transformers knows"
