"""Hidden states go through any decoder's blocks as through the stock model's own loop.

Decoders differ in what they pass to blocks and what blocks hand on: several streams, embeddings of
a layer, keys and values that later layers read, results between blocks, blocks that are skipped or
called again. The families here are written by machine: every linear is a site by itself.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV4Config,
    FalconH1Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    HrmTextConfig,
    MllamaForCausalLM,
    OlmoConfig,
    PreTrainedModel,
    Zamba2Config,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from smoothq import Probe, architectures, preset, quantize
from smoothq.architectures import BlockGraph, Family, Parts, Site, WeightRef
from smoothq.architectures.graph import text_config
from smoothq.architectures.linearize import linearize_block
from smoothq.checkpoint.open import open_source
from smoothq.checkpoint.source import Source
from smoothq.errors import StoppedError
from smoothq.pipeline import weights_on_demand
from smoothq.pipeline.ends import ModelTail, embed_tokens, load_block
from smoothq.pipeline.hidden_states import HiddenStates
from smoothq.plan.plan import Plan
from smoothq.plan.resolve import make_plan
from smoothq.runtime.distributed import World

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
TYPES = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, Callable[[], Any]] = {
    "several streams, embeddings of a layer, shared keys": lambda: Gemma3nTextConfig(
        **GROUPED | {"intermediate_size": [128] * 5},
        num_hidden_layers=5,
        head_dim=16,
        layer_types=[*TYPES, *TYPES, "full_attention"],
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0, 0.0],
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
        laurel_rank=16,
    ),
    "embeddings of a layer": lambda: Gemma4TextConfig(
        **GROUPED,
        num_hidden_layers=4,
        head_dim=16,
        global_head_dim=32,
        layer_types=[*TYPES, *TYPES],
        num_kv_shared_layers=1,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
    ),
    "streams beside the tokens": lambda: DeepseekV4Config(
        **COMMON,
        num_hidden_layers=3,
        head_dim=16,
        qk_rope_head_dim=16,
        q_lora_rank=32,
        o_lora_rank=32,
        o_groups=2,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=16,
        sliding_window=16,
        max_position_embeddings=256,
        mlp_layer_types=["hash_moe", "moe", "moe"],
        layer_types=[
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
    ),
    "weights shared by blocks": lambda: Zamba2Config(
        **COMMON,
        num_hidden_layers=4,
        num_key_value_heads=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        mamba_d_state=16,
        mamba_ngroups=1,
        n_mamba_heads=8,
        chunk_size=16,
        adapter_rank=16,
        max_position_embeddings=64,
    ),
    "a norm without weight": lambda: OlmoConfig(**COMMON, num_hidden_layers=2),
    "attention beside a state space": lambda: FalconH1Config(
        **GROUPED,
        num_hidden_layers=2,
        mamba_d_ssm=128,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_chunk_size=16,
    ),
    "blocks that text skips": lambda: MllamaTextConfig(
        **GROUPED, num_hidden_layers=3, cross_attention_layers=[1]
    ),
    "blocks that are called again": lambda: HrmTextConfig(
        **COMMON, num_hidden_layers=16, num_layers_per_stack=2, H_cycles=2, L_cycles=3
    ),
    "a result in a tuple": lambda: BloomConfig(
        vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, hidden_dropout=0.0
    ),
}
LAYERS = {"hrm_text": "L_module.layers", "bloom": "h"}
REPEATED = "blocks that are called again"
SKIPPED = "blocks that text skips"


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families may be registered anew, and Mllama's text model has an auto class."""
    monkeypatch.setattr(architectures, "_BY_MODEL_TYPE", dict(architectures._BY_MODEL_TYPE))
    AutoModelForCausalLM.register(MllamaTextConfig, MllamaForCausalLM, exist_ok=True)


def build(name: str) -> PreTrainedModel:
    """The random model of a config, with a family in which every linear is a site."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), experts_implementation="eager")
    model.float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * parameter.shape[-1] ** -0.5)
    model.tie_weights()
    register(model)
    return model


def decoder_of(model: PreTrainedModel) -> str:
    """The decoder's name; `get_decoder` of some classes returns the whole model."""
    return "model" if hasattr(model, "model") else "transformer"


def register(model: PreTrainedModel) -> None:
    """Register the family of a model: every linear of its blocks is a site by itself."""
    config, decoder = text_config(model), model.get_submodule(decoder_of(model))
    layers = LAYERS.get(config.model_type, "layers")
    norms = [n for n, _ in decoder.named_modules() if "norm" in n or n.endswith("ln_f")]
    final_norm = [name for name in norms if not name.startswith(f"{layers}.")][-1]
    graphs = []
    for stock in decoder.get_submodule(layers):
        block = copy.deepcopy(stock).to("meta")
        linearize_block(block)
        graphs.append(BlockGraph(tuple(sites(block)), ()))
    family = _Family(
        (config.model_type,), lambda _, index: graphs[index], layers=layers, final_norm=final_norm
    )
    architectures._BY_MODEL_TYPE[config.model_type] = family


class _Family(Family):
    """Names within the base model, for not every class names its decoder."""

    def parts(self, model: PreTrainedModel) -> Parts:
        decoder = decoder_of(model)
        names = {id(module): name for name, module in model.named_modules()}
        return Parts(
            decoder=decoder,
            layers=f"{decoder}.{self.layers}",
            embedding=names[id(model.get_input_embeddings())],
            final_norm=f"{decoder}.{self.final_norm}",
            head=names[id(model.get_output_embeddings())],
            positions=None,
            entry_norm=None,
        )


def sites(block: nn.Module) -> Iterator[Site]:
    for name, module in block.named_modules():
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if plain and module.out_features > 4:
            yield Site(name.replace(".", "_"), "mlp", (WeightRef(f"{name}.weight"),), None)


def tokens() -> list[Tensor]:
    """Three micro-batches of two lengths."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, 24), (2, 24), (3, 11)]
    return [torch.randint(2, VOCABULARY, shape, generator=generator) for shape in shapes]


def relative(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).norm() / wanted.norm())


class Pass:
    """A model's float blocks, one after another."""

    def __init__(self, name: str, tmp_path: Path) -> None:
        self.model = build(name)
        self.model.save_pretrained(tmp_path / "float")
        self.source: Source = open_source(str(tmp_path / "float"))
        self.skeleton = self.source.skeleton()
        self.plan: Plan = make_plan(self.skeleton, preset("w8a8", method="rtn"))
        self.world = World(0, 1, torch.device("cpu"))

    def entered(self, directory: Path | None = None) -> HiddenStates:
        return embed_tokens(self.source, self.skeleton, self.plan, tokens(), self.world, directory)

    def advance(self, stream: HiddenStates, blocks: range) -> None:
        for index in blocks:
            block = load_block(self.source, self.skeleton, self.plan, index, self.world.device)
            stream.advance(block.module, index)

    @property
    def count(self) -> int:
        return len(self.plan.blocks)

    def assert_logits(self, stream: HiddenStates) -> None:
        """What the blocks return leads to the stock model's logits."""
        tail = ModelTail(self.source, self.plan, stream)
        for number, batch in enumerate(tokens()):
            wanted = self.model(input_ids=batch, use_cache=False).logits
            assert relative(tail.logits(stream, number), wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "in a file"])
@pytest.mark.parametrize("name", CONFIGS)
def test_block_by_block_is_the_stock_model(name: str, on_disk: bool, tmp_path: Path) -> None:
    run = Pass(name, tmp_path)
    stream = run.entered(tmp_path if on_disk else None)
    run.advance(stream, range(run.count))
    run.assert_logits(stream)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != REPEATED])
def test_what_is_saved_between_two_blocks_is_enough_to_go_on(name: str, tmp_path: Path) -> None:
    run = Pass(name, tmp_path)
    for half in range(1, run.count):
        stream = run.entered()
        run.advance(stream, range(half))
        assert stream.resumable
        saved = [tensor.clone() for tensor in stream]
        resumed = run.entered()
        resumed.replace(iter(saved), half)
        run.advance(resumed, range(half, run.count))
        run.assert_logits(resumed)


@torch.no_grad()
def test_nothing_is_saved_while_a_block_is_still_to_be_called_again(tmp_path: Path) -> None:
    run = Pass(REPEATED, tmp_path)
    stream = run.entered()
    assert stream.resumable
    run.advance(stream, range(1))
    assert not stream.resumable


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_copies_advance_by_themselves(name: str, tmp_path: Path) -> None:
    run = Pass(name, tmp_path)
    stream = run.entered()
    run.advance(stream.copy(), range(run.count))
    run.advance(stream, range(1))
    run.advance(stream.copy(), range(1, run.count))
    run.advance(stream, range(1, run.count))
    run.assert_logits(stream)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_skeleton_has_no_weights_before_or_behind(name: str, tmp_path: Path) -> None:
    run = Pass(name, tmp_path)
    before = dict(run.skeleton.named_parameters())
    run.entered()
    after = dict(run.skeleton.named_parameters())
    assert all(after[key] is before[key] and after[key].is_meta for key in before)


@torch.no_grad()
def test_of_an_embedding_only_rows_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_on_demand, "ROWS_ELEMENTS", 1 << 10)
    run = Pass("embeddings of a layer", tmp_path)
    ids = [batch[:, :3] for batch in tokens()]
    entered = embed_tokens(run.source, run.skeleton, run.plan, ids, run.world)
    run.advance(entered, range(run.count))
    wanted = run.model(input_ids=ids[0], use_cache=False).logits
    logits = ModelTail(run.source, run.plan, entered).logits(entered, 0)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != SKIPPED])
def test_it_is_quantized_measured_and_compared(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    perplexities = []
    quantize(
        tmp_path / "float",
        preset("w8a8").edit(weights__rounding="gptq"),
        data=[row for batch in tokens() for row in batch],
        output=tmp_path / "quantized",
        probe=Probe(tokens()[0]),
        on_block=lambda done: perplexities.append((done.perplexity, done.float_perplexity)),
    )
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32)
    ids = tokens()[0]
    wanted = model(input_ids=ids, use_cache=False).logits
    assert relative(quantized(input_ids=ids, use_cache=False).logits, wanted) < 0.12
    assert all(ours == pytest.approx(stock, rel=0.2) for ours, stock in perplexities)


@pytest.mark.parametrize("name", ["several streams, embeddings of a layer, shared keys"])
def test_tuning_and_an_interrupted_run_come_to_the_same(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "float")
    recipe = preset("w8a8").edit(tuning={"steps": 3}, weights__rounding="gptq")
    run: dict[str, Any] = {"data": tokens()[0], "checkpoint_every": 1}

    def stop(done: Any) -> None:
        if done.block == 2:
            raise StoppedError("enough")

    quantize(tmp_path / "float", recipe, output=tmp_path / "whole", **run)
    with pytest.raises(StoppedError):
        quantize(tmp_path / "float", recipe, output=tmp_path / "halves", on_block=stop, **run)
    quantize(tmp_path / "float", recipe, output=tmp_path / "halves", **run)
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "halves")]
    assert weights[0] == weights[1]


def test_a_skipped_block_is_rounded_to_nearest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(SKIPPED).save_pretrained(tmp_path / "float")
    recipe = preset("w8a8").edit(weights__rounding="gptq")
    run = {"data": tokens()[0], "check": False}  # its class is none that loads a checkpoint alone
    quantize(tmp_path / "float", recipe, output=tmp_path / "quantized", **run)
    notes = [record.getMessage() for record in caplog.records]
    assert any("model.layers.1: the model does not run this block" in note for note in notes)
