"""Code that reads a weight itself: dtype and device are answered, what is read stays float."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from smoothq import preset, quantize
from smoothq.checkpoint.skeleton import empty_model
from smoothq.discovery.weight_watch import read_weights
from smoothq.errors import UnsupportedModelError
from smoothq.modules import QuantizedEmbedding, QuantizedLinear
from smoothq.plan.resolve import make_plan
from smoothq.report.figures import remarks
from tests.readers import READERS, reader
from tests.tiny_models import TINY, tiny_model

TOKENS = torch.randint(90, (2, 24), generator=torch.Generator().manual_seed(1))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
W8A8 = preset("w8a8", "rtn")
W4A16 = preset("w4a16", "rtn")
RAW = [name for name, (_, read) in READERS.items() if read is not None]


@pytest.fixture(scope="module", params=[W8A8, W4A16], ids=["int8", "int4"])
def quantized(request: pytest.FixtureRequest) -> nn.Module:
    return quantize(tiny_model("llama", torch.float32), request.param)


@pytest.fixture
def linear(quantized: nn.Module) -> QuantizedLinear:
    found = copy.deepcopy(quantized.model.layers[0].mlp.down_proj)
    assert isinstance(found, QuantizedLinear)
    return found


class TestAnswer:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtype_device_and_shape_are_those_of_the_float_weight(self, linear, dtype) -> None:
        weight = linear.to(dtype).weight
        assert (weight.dtype, weight.device.type) == (dtype, "cpu")
        assert weight.shape == (linear.out_features, linear.in_features)
        assert weight.data.dtype == weight.detach().dtype == torch.zeros_like(weight).dtype == dtype
        assert torch.ones(2).to(weight).dtype == torch.ones(2).type_as(weight).dtype == dtype
        assert "held as codes" in repr(weight)

    @pytest.mark.parametrize(
        "read",
        [
            lambda w: w @ torch.ones(w.shape[1], 1),
            lambda w: w[0],
            lambda w: w.T,
            lambda w: w.data.sum(),
            lambda w: w.tolist(),
            lambda w: nn.functional.linear(torch.ones(1, w.shape[1]), w),
            lambda w: w.to(torch.float64),
            lambda w: torch.ones(1).copy_(w[:1, :1]),
        ],
    )
    def test_values_are_refused_by_name(self, linear, read) -> None:
        with pytest.raises(UnsupportedModelError, match="reads a weight that is held as codes"):
            read(linear.weight)

    def test_what_is_stored_copied_and_loaded_is_the_codes(self, linear) -> None:
        codes = linear.codes
        assert not codes.dtype.is_floating_point
        others = [copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))]
        for other in [*others, linear.to("cpu"), linear.half()]:
            assert torch.equal(other.codes, codes)
            assert torch.equal(other.state_dict()["weight"], codes)
        assert linear.weight.to("cpu").dtype == codes.dtype  # as a tensor that is moved alone

    def test_it_is_answered_inside_of_a_compiled_graph(self, linear) -> None:
        class Casts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = linear

            def forward(self, x: Tensor) -> Tensor:
                weight = self.linear.weight
                return self.linear(x.to(weight.dtype).to(weight.device))

        x = torch.randn(3, linear.in_features, dtype=torch.bfloat16)
        with torch.no_grad():
            compiled = torch.compile(Casts(), fullgraph=True, backend="eager")(x)
            assert compiled.dtype == torch.float32
            assert torch.equal(compiled, Casts()(x))

    def test_embedding_and_head_in_8_bits_answer_too(self) -> None:
        model = quantize(tiny_model("llama", torch.float32), W8A8.edit(embeddings=8))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(embedding, QuantizedEmbedding)
        assert embedding.weight.dtype == head.weight.dtype == torch.float32
        assert model.bfloat16().get_output_embeddings().weight.dtype == torch.bfloat16
        with pytest.raises(UnsupportedModelError, match="held as codes"):
            head.weight.sum()


class TestWatch:
    @pytest.mark.parametrize("name", TINY)
    def test_no_family_with_a_file_reads_values(self, name) -> None:
        assert read_weights(tiny_model(name), TOKENS) == frozenset()

    @pytest.mark.parametrize("name", READERS)
    def test_reads_of_values_are_seen_and_those_of_a_dtype_are_not(self, name) -> None:
        read = READERS[name][1]
        expected = set() if read is None else {f"model.layers.{i}.{read}" for i in range(2)}
        assert read_weights(reader(name).double(), TOKENS) == expected

    def test_a_state_space_model_reads_one_of_its_projections(self) -> None:
        sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 97}
        config = AutoConfig.for_model("mamba", **sizes, pad_token_id=0, use_mambapy=False)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        expected = {f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)}
        assert read_weights(model, TOKENS) == expected


class TestRun:
    def test_what_asks_for_the_dtype_is_quantized_whole(self) -> None:
        model = reader("asks_dtype")
        made = quantize(model, W8A8)
        assert make_plan(model, W8A8).notes == ()
        assert all(isinstance(layer.mlp.down_proj, QuantizedLinear) for layer in made.model.layers)
        assert distance(made, model) < 0.06

    @pytest.mark.slow
    @pytest.mark.parametrize("recipe", [W8A8, preset("w8a8"), preset("w4a16", effort="fast")])
    @pytest.mark.parametrize("name", RAW)
    def test_what_is_read_stays_float_and_the_rest_is_quantized(
        self, name, recipe, tmp_path
    ) -> None:
        model, read = reader(name), READERS[name][1]
        recipe = recipe.edit(weights__group_size=16) if recipe.weights.bits == 4 else recipe
        data = torch.randint(3, 90, (8, 64), generator=torch.Generator().manual_seed(2))
        made = quantize(model, recipe, data=data, output=tmp_path / "out").load()
        for layer in made.model.layers:
            linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
            assert set(linears) == {read}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert distance(loaded, made) == 0

    @pytest.mark.parametrize("name", RAW)
    def test_it_is_named_in_the_notes_and_counted(self, name) -> None:
        plan = make_plan(empty_model(reader(name).config), W8A8)
        (note,) = [note for note in plan.notes if "stay in float" in note]
        assert f"model.layers.0.{READERS[name][1]}" in note
        assert plan.bits.weight > 1.2 * make_plan(reader("asks_dtype"), W8A8).bits.weight
        assert any("stay in float" in line for line in remarks(plan, name))

    def test_loading_watches_nothing(self, tmp_path, monkeypatch) -> None:
        quantize(reader("has_halved"), W8A8, output=tmp_path / "out")
        monkeypatch.setattr("smoothq.discovery.weight_reads._reads", {})
        monkeypatch.setattr("smoothq.discovery.weight_reads._watched", None)
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def distance(model: nn.Module, other: nn.Module) -> float:
    """Of two models' logits, as a share of the second's."""
    with torch.no_grad():
        found, expected = model(TOKENS).logits, other(TOKENS).logits
    return float((found - expected).norm() / expected.norm())
