"""Serving through vLLM: a plugin that gives it `quant_method: smoothq`.

vLLM loads the plugin through its entry point in every process. The models are vLLM's; the format of
each layer is taken from the skeleton that transformers would load the checkpoint into. Linears that
vLLM merges (q, k and v; gate and up) read the same input, so they become one QuantizedLinear with
all their rows.

A rotated residual stream needs a rotation where it enters the blocks and one where it leaves them,
and vLLM has no hook for either. The stream enters only through the embedding (other inputs are
refused), so the embedding rotates the rows that it looks up. At the end, an RMSNorm without weight
commutes with a rotation: the final norm keeps a weight of ones, and the head rotates back and
multiplies by the norm's weight, which is loaded into the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import base_config, register_quantization_config
from vllm.model_executor.models.utils import WeightsMapper

from ..checkpoint.skeleton import empty_model
from ..errors import CheckpointError, RecipeError, SmoothqError
from ..modules import (
    InputQuantizer,
    OnlineRotation,
    QuantizedEmbedding,
    QuantizedLinear,
    TiedHead,
    WeightSpec,
)
from ..modules.quantized_embedding import row_grid
from ..plan.config import METHOD, SmoothqConfig
from ..plan.plan import Plan
from ..plan.portability import refuse_in_plugin
from ..transforms.hadamard import Hadamard
from .transformers import SmoothqHfQuantizer


def register() -> None:
    """Register `quant_method: smoothq` with vLLM. The entry point; repeated calls are harmless."""
    register_quantization_config(METHOD)(SmoothqVllmConfig)


def skeleton(
    config: PretrainedConfig, quantization: dict[str, Any]
) -> tuple[PreTrainedModel, Plan]:
    """Build the model that transformers would load a checkpoint into, on the meta device.

    Args:
        config: of the model.
        quantization: the checkpoint's `quantization_config`.

    Returns:
        The model with its quantized modules, and its plan.

    Raises:
        UnsupportedModelError, RecipeError, CheckpointError: for a model that the plugin cannot run.
    """
    with torch.device("cpu"):  # vLLM builds models under a device of its own
        model = empty_model(config)
    quantizer = SmoothqHfQuantizer(SmoothqConfig(**quantization), pre_quantized=True)
    quantizer.preprocess_model(model)
    refuse_in_plugin(quantizer.plan)
    return model, quantizer.plan


class SmoothqVllmConfig(base_config.QuantizationConfig):  # type: ignore[misc]
    """Tells vLLM the method of each layer, and under which names to load the tensors.

    vLLM pickles it into its worker processes; each builds the skeleton again.

    Attributes:
        quantization: the checkpoint's `quantization_config`.
        model_config: the model's config, set by `maybe_update_config`.
    """

    model_config: PretrainedConfig

    def __init__(self, quantization: dict[str, Any]) -> None:
        super().__init__()
        self.quantization = quantization

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SmoothqVllmConfig:
        """Create it from a checkpoint's `quantization_config`."""
        return cls(config)

    @classmethod
    def get_min_capability(cls) -> int:
        """The minimum compute capability times 10: 80, because of the Triton kernels."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No further files: everything is in `config.json`."""
        return []

    def get_name(self) -> str:
        """The value of `quant_method`."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The activation dtypes: all of vLLM's."""
        return [torch.float32, torch.bfloat16, torch.float16]

    def maybe_update_config(
        self, model_name: str, hf_config: PretrainedConfig, revision: str | None = None
    ) -> None:
        """Keep the model's config, and refuse an unsupported model before any process starts."""
        self.model_config = hf_config
        skeleton(hf_config, self.quantization)

    @cached_property
    def _skeleton(self) -> tuple[PreTrainedModel, Plan]:
        return skeleton(self.model_config, self.quantization)

    def get_quant_method(
        self, layer: nn.Module, prefix: str
    ) -> base_config.QuantizeMethodBase | None:
        """The method that loads and runs a layer, or None for layers that smoothq leaves to vLLM.

        Args:
            layer: of vLLM's model.
            prefix: its full name in the model.

        Raises:
            RecipeError: for linears that vLLM merges but that are quantized differently, and for
                pooling or prompt embeddings with a rotated residual stream.
        """
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        if not isinstance(layer, vocabulary.VocabParallelEmbedding):
            return None
        model, plan = self._skeleton
        head = isinstance(layer, vocabulary.ParallelLMHead)
        module: Any = model.get_submodule(plan.parts.ends[-1 if head else 0])
        quantized = isinstance(module, QuantizedEmbedding | QuantizedLinear | TiedHead)
        method = SmoothqMethod(module) if quantized else vocabulary.UnquantizedEmbeddingMethod()
        if plan.residual_rotation is None:
            return method
        asked = get_current_vllm_config().model_config
        if asked.runner_type == "pooling" or asked.enable_prompt_embeds:
            raise RecipeError(
                "this checkpoint's hidden states are rotated between embedding and head: it "
                "serves generation from tokens, neither pooling nor prompt embeddings"
            )
        return RotatedEnd(method, plan.residual_rotation, head)

    def _linear_method(self, prefix: str) -> base_config.QuantizeMethodBase:
        parent, _, name = prefix.rpartition(".")
        names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(name, [name])]
        modules = [self._skeleton[0].get_submodule(name) for name in names]
        readers = [module for module in modules if isinstance(module, QuantizedLinear)]
        if not readers:
            return UnquantizedLinearMethod()
        if len(readers) < len(modules) or len({reader.spec.grid for reader in readers}) > 1:
            raise RecipeError(
                f"vLLM merges {', '.join(names)}: quantize without a keep or an override that "
                "gives them different weights"
            )
        return SmoothqMethod(*readers)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Rename tensors that vLLM's model does not have under the checkpoint's names.

        Tensors of an input quantizer go to the first linear that reads it, and vLLM maps that name
        further, to merged linears. The final norm's weight goes to a head that rotates back.
        """
        model, plan = self._skeleton
        moved: dict[str, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear) and module.site_input.state_dict():
                moved.setdefault(f"{module.site_input.name}.", f"{name}.input_")
        if plan.residual_rotation is not None:
            moved[f"{plan.parts.final_norm}.weight"] = f"{plan.parts.head}.norm_weight"
        return WeightsMapper(orig_to_new_substr=moved)


class SmoothqMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads and runs a quantized module in place of a vLLM layer's weight.

    Attributes:
        parts: the skeleton's module for the layer, or all modules that vLLM merges into it.
        module: the module that runs, created by `create_weights`.
    """

    module: QuantizedLinear | QuantizedEmbedding

    def __init__(self, *parts: QuantizedLinear | QuantizedEmbedding | TiedHead) -> None:
        self.parts = parts

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None],
    ) -> None:
        """Register the module's tensors, uninitialised, as parameters that vLLM loads.

        Raises:
            SmoothqError: for tensor parallelism.
        """
        if layer.tp_size > 1:
            raise SmoothqError(
                "tensor parallelism splits the input channels of o_proj and down_proj, but their "
                "rotations and scales go over all channels; use --pipeline-parallel-size"
            )
        self.module = _empty_like(self.parts[0], sum(output_partition_sizes), params_dtype)
        for name, tensor in self.module.state_dict().items():
            if name.startswith("input."):  # of the input quantizer, which the merged linears share
                _register(layer, name, tensor, _copy)
            else:
                _register(layer, name, tensor, weight_loader, len(self.parts), output_dim=0)

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> Any:
        """Share the embedding's parameters with a tied head, and return the head's layer."""
        for name in self.module.state_dict():
            setattr(layer, name, embed_tokens.get_parameter(name))
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Move the loaded tensors into the module, and prepare it to run."""
        names = {name: name.replace(".", "_") for name in self.module.state_dict()}
        loaded = {name: _loaded(layer, parameter) for name, parameter in names.items()}
        self.module.load_state_dict(loaded, assign=True)
        if isinstance(self.module, QuantizedLinear):
            if layer.bias is not None:
                self.module.bias = layer.bias.data
            if self.module.site_input.rotation is not None:
                self.module.site_input.rotation.prepare(self.module.device)
            self.module.prepare()
        layer.quantized = self.module

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: float (..., K) → float (..., N); `bias` is ignored, as the module has the bias."""
        return layer.quantized(x)  # type: ignore[no-any-return]

    embedding = apply  # token ids, int64 (...) → rows, float (..., K)


class RotatedEnd(base_config.QuantizeMethodBase):  # type: ignore[misc]
    """An embedding that rotates its rows, or a head that rotates its input back.

    Args:
        inner: method of the embedding or head without rotation.
        rotation: of the residual stream.
        head: True for the head, False for the embedding.
    """

    def __init__(
        self, inner: base_config.QuantizeMethodBase, rotation: Hadamard, head: bool
    ) -> None:
        self.inner, self.rotation, self.head = inner, rotation, head

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Create the inner method's weights, and for a head the final norm's weight (K,)."""
        self.inner.create_weights(layer, *sizes, **attributes)
        if self.head:
            weight = torch.empty(self.rotation.order, dtype=attributes["params_dtype"])
            _register(layer, "norm_weight", weight, _copy)

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> Any:
        """Tie as the inner method does."""
        return self.inner.tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Process the inner method's weights, and construct the rotation's factors."""
        self.inner.process_weights_after_loading(layer)
        if self.head:
            _loaded(layer, "norm_weight")
        layer.online_rotation = OnlineRotation(self.rotation, transposed=self.head)
        layer.online_rotation.prepare(layer.get_parameter("weight").device)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: output of the final norm with a weight of ones, float (..., K) → logits (..., V)."""
        normed = layer.online_rotation(x) * layer.norm_weight
        return self.inner.apply(layer, normed, bias)  # type: ignore[no-any-return]

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Token ids, int64 (...) → rows times the rotation R, float (..., K)."""
        rows = self.inner.embedding(layer, input_)
        return layer.online_rotation(rows)  # type: ignore[no-any-return]


def _empty_like(
    part: QuantizedLinear | QuantizedEmbedding | TiedHead, rows: int, dtype: torch.dtype
) -> QuantizedLinear | QuantizedEmbedding:
    """A module with `rows` output rows in the format of a part, and a separate input quantizer."""
    if isinstance(part, QuantizedEmbedding):
        return QuantizedEmbedding(rows, part.embedding_dim, dtype)
    grid = row_grid(part.in_features) if isinstance(part, TiedHead) else part.spec.grid
    source = part.site_input
    site_input = InputQuantizer(source.name, source.spec, 1, source.context)
    linear = QuantizedLinear(WeightSpec(rows, part.in_features, grid), site_input, dtype)
    linear.add_module("input", site_input)
    return linear


def _register(
    layer: Any,
    name: str,
    like: Tensor,
    loader: Callable[..., None],
    parts: int = 1,
    **attributes: Any,
) -> None:
    """Register an uninitialised parameter that is loaded in `parts` pieces.

    Its `missing` counts the pieces that are not loaded yet. like: gives shape and dtype.
    """

    def load(parameter: Any, tensor: Tensor, *shard: Any) -> None:
        loader(parameter, tensor, *shard)
        parameter.missing -= 1

    values = torch.empty(like.shape, dtype=like.dtype)
    parameter = nn.Parameter(values, requires_grad=False)
    for attribute, value in {"weight_loader": load, "missing": parts, **attributes}.items():
        setattr(parameter, attribute, value)
    layer.register_parameter(name.replace(".", "_"), parameter)


def _copy(parameter: Tensor, tensor: Tensor, *shard: Any) -> None:
    parameter.copy_(tensor)


def _loaded(layer: Any, name: str) -> Tensor:
    """A parameter's values; CheckpointError if pieces of it were not loaded."""
    parameter = layer.get_parameter(name)
    if parameter.missing > 0:
        raise CheckpointError(f"'{name}' of {layer.prefix} is missing in the checkpoint")
    return parameter.data  # type: ignore[no-any-return]
