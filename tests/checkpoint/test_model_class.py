"""Which class a config stands for: the one that it names, none that drops a tower, no encoder."""

import copy

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PretrainedConfig,
)

from smoothq.architectures.graph import decoder_of, final_output
from smoothq.checkpoint.model_class import class_of, class_of_model
from smoothq.errors import UnsupportedModelError
from tests.tiny_classes import CLASSES, batch_of, tiny_class
from tests.tiny_models import TINY, tiny_model

WITHOUT_A_NAME = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
    "pp_chart2table": "GotOcr2ForConditionalGeneration",  # a class of another type's config
    "phi4_multimodal": "Phi4MultimodalForCausalLM",  # the towers are inside the causal class
    "qwen3_5": "Qwen3_5ForConditionalGeneration",  # the causal class has no vision tower
    "qwen3_5_text": "Qwen3_5ForCausalLM",
}


def config_of(model_type: str, *architectures: str) -> PretrainedConfig:
    config = AutoConfig.for_model(model_type)
    config.architectures = list(architectures) or None
    return config


@pytest.mark.parametrize("model_type", WITHOUT_A_NAME)
def test_a_config_that_names_no_class_stands_for_the_one_with_all_its_parts(model_type) -> None:
    assert class_of(config_of(model_type)).__name__ == WITHOUT_A_NAME[model_type]


@pytest.mark.parametrize(
    "name", ["LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification"]
)
def test_the_class_that_a_config_names_counts(name) -> None:
    assert class_of(config_of("llama", name)).__name__ == name


@pytest.mark.parametrize(
    "name", ["Qwen3_5ForCausalLM", "GPT2LMHeadModel", "NoSuchModel", "Pipeline"]
)
def test_a_name_that_is_no_class_of_its_type_does_not_count(name) -> None:
    assert class_of(config_of("qwen3_5", name)).__name__ == "Qwen3_5ForConditionalGeneration"


@pytest.mark.parametrize(
    "model_type", ["t5", "bart", "whisper", "florence2", "vision-encoder-decoder"]
)
def test_an_encoder_decoder_is_refused_by_name(model_type) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^'{model_type}' is an encoder-decoder"):
        class_of(AutoConfig.for_model(model_type))


@pytest.mark.parametrize(
    ("model_type", "named"), [("clip", ()), ("clip", ("CLIPModel",)), ("vit", ("ViTModel",))]
)
def test_a_model_without_a_decoder_is_refused_by_name(model_type, named) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^'{model_type}' is no causal LM"):
        class_of(config_of(model_type, *named))


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_in_memory_is_of_its_own_class(name) -> None:
    model = CLASSES[name]()
    assert class_of_model(model) is type(model)


def test_a_subclass_that_transformers_does_not_know_is_of_the_class_that_it_loads() -> None:
    class Mine(LlamaForCausalLM):
        pass

    with_another_name = copy.deepcopy(TINY["llama"]())
    with_another_name.architectures = ["Mine"]
    assert class_of_model(Mine(with_another_name)) is LlamaForCausalLM
    assert class_of(with_another_name) is LlamaForCausalLM


def test_a_class_registered_with_an_auto_class_is_known() -> None:
    class OtherConfig(LlamaConfig):
        model_type = "other-llama"

    class OtherForCausalLM(LlamaForCausalLM):
        config_class = OtherConfig

    AutoConfig.register("other-llama", OtherConfig)
    AutoModelForCausalLM.register(OtherConfig, OtherForCausalLM)
    assert class_of(OtherConfig()) is OtherForCausalLM


@pytest.mark.parametrize("name", CLASSES)
def test_the_decoder_of_a_model_is_its_text_model_without_a_head(name) -> None:
    model = tiny_class(name)
    assert decoder_of(model).get_output_embeddings() is None
    hidden = model.config.get_text_config(decoder=True).hidden_size
    ids = batch_of("embedder")["input_ids"]
    width = hidden if model.get_output_embeddings() is None else 97
    assert final_output(model, ids).shape == (1, ids.shape[1], width)


def test_the_decoder_of_a_causal_lm_is_its_base_model() -> None:
    model = tiny_model("llama")
    assert isinstance(decoder_of(model), LlamaModel)
