"""Whole quantized models on the Triton operators: the logits of the CPU's, and the reported names.

Without a GPU the operators of the CPU are exchanged for Triton's, which its interpreter runs.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from smoothq import Recipe, kernels, quantize
from smoothq.modules import InputQuantizer, QuantizedLinear
from smoothq.modules.prepare import prepare
from tests.conftest import RECIPES
from tests.tiny_models import VOCABULARY, tiny_model

pytest.importorskip("triton")

# Groups of 32 fit the packed blocks; conftest's recipes, of 16, do not and are unpacked.
WIDE = {
    f"{name}, groups of 32": RECIPES[name].edit(weights__group_size=32)
    for name in ("w4a4", "w4a8", "w4a16")
}
EVERY = RECIPES | WIDE
TOKENS = torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of one block whose widths are 64 and 192; the interpreter is slow."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("source")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def run_by_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Called, it makes Triton's interpreter run the CPU's tensors, by every way to an operator."""
    with torch.library._scoped_library("smoothq", "IMPL") as library:

        def run() -> None:
            monkeypatch.setattr(kernels, "_BACKENDS", {"cpu": "triton"})
            for name in vars(kernels):
                operator = getattr(kernels, name)
                if isinstance(operator, kernels.Product):
                    registered = operator.registered.name().partition("::")[2]
                    library.impl(registered, operator.direct, "CPU", allow_override=True)

        yield run


@pytest.fixture
def triton_for_cpu(run_by_triton: Callable[[], None]) -> None:
    run_by_triton()


@pytest.fixture(scope="module")
def made(source: Path, data: Tensor) -> Callable[[Recipe], PreTrainedModel]:
    """The quantized model of a recipe, made once, prepared for the backend of the moment."""
    models: dict[Recipe, PreTrainedModel] = {}

    def of(recipe: Recipe) -> PreTrainedModel:
        recipe = recipe.edit(weights__rounding="rtn", weights__clip=False)
        if recipe not in models:
            models[recipe] = quantize(source, recipe, data=data)
        prepare(models[recipe])
        return models[recipe]

    return of


Made = Callable[[Recipe], PreTrainedModel]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


class Called(TorchDispatchMode):
    """The operators of ours that run: on the CPU's backend no quantizer is one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        space, _, name = func.name().partition("::")
        if space == "smoothq":
            self.names[name.removeprefix("triton_")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", EVERY)
def test_logits_are_those_of_the_cpu_by_the_operators_that_are_named(
    name: str, made: Made, run_by_triton: Callable[[], None]
) -> None:
    expected = logits(made(EVERY[name]))
    run_by_triton()
    model = made(EVERY[name])
    lines = kernels.report(model).splitlines()
    assert all(line.endswith("triton on cpu") for line in lines)
    with Called() as called:
        error = (logits(model) - expected).abs()
    # Hadamards differ in their last bits, so that a code near a tie may be its neighbour.
    assert error.mean() < (0.02 if EVERY[name].rotation else 1e-5) * expected.abs().mean()
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    products = Counter(linear.operators()[-1] for linear in linears)
    gemms = {"int8_gemm", "int4_gemm", "group_gemm", "weight_only_gemm"}
    assert {name: count for name, count in called.names.items() if name in gemms} == products


def test_four_bit_weights_stay_packed_where_their_groups_allow(
    made: Made, triton_for_cpu: None
) -> None:
    packed = made(WIDE["w4a4, groups of 32"]).model.layers[0].mlp.down_proj
    assert packed.operators() == ("hadamard_quantize", "int4_gemm")
    assert packed._running.operand is None
    unpacked = made(RECIPES["w4a4"]).model.layers[0].mlp.down_proj
    assert unpacked.operators() == ("hadamard_quantize", "int8_gemm")
    assert unpacked._running.operand.dtype == torch.int8


def test_the_report_names_every_layer_once(data: Tensor) -> None:
    recipe = RECIPES["w4a4-rrs-live"].edit(weights__rounding="rtn")
    model = quantize(tiny_model("llama", torch.float32), recipe, data=data)
    report = kernels.report(model).splitlines()
    assert len(report) == 7
    (down,) = [line.split("   ") for line in report if "down_proj" in line]
    assert [cell.strip() for cell in down if cell.strip()] == [
        "model.layers.*.mlp.down_proj",
        "x3",
        "hadamard, runtime_smooth_quantize, group_gemm",
        "cpu on cpu",
    ]
    assert kernels.report(nn.Linear(2, 2)) == ""


@pytest.mark.parametrize("name", ["w8a8", "w4a4, groups of 32", "w4a16, groups of 32"])
def test_a_whole_model_is_one_graph(name: str, made: Made, triton_for_cpu: None) -> None:
    model = made(EVERY[name])
    expected = logits(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(logits(compiled), expected, rtol=1e-4, atol=1e-5)


def quantizers(graph: torch.fx.GraphModule) -> int:
    """The quantizers of ours among a graph's calls: of the CPU's operators, or of Triton's."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return sum(name.startswith("smoothq.") and "quantize" in name.split(".")[1] for name in names)


class TestOneQuantizerASite:
    """q, k and v share one, gate and up another; o and down have their own: four a block."""

    @pytest.fixture(autouse=True)
    def nothing_compiled_before(self) -> None:
        torch.compiler.reset()

    @pytest.fixture(params=["cpu", "triton"])
    def model(
        self, request: pytest.FixtureRequest, made: Made, run_by_triton: Callable[[], None]
    ) -> PreTrainedModel:
        if request.param == "triton":
            run_by_triton()
        elif not kernels.cpu.is_compiled():
            pytest.skip("PyTorch's own operators are plain tensor code")
        return made(EVERY["w8a8"])

    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_in_a_compiled_graph(
        self, model: PreTrainedModel, backend: str, gradients: bool
    ) -> None:
        counted: list[int] = []

        def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
            counted.append(quantizers(graph))
            return graph.forward

        compiler = count if backend == "eager" else aot_autograd(fw_compiler=count)
        expected = logits(model)
        compiled = torch.compile(model, fullgraph=True, backend=compiler)
        for _ in range(2):
            with torch.set_grad_enabled(gradients):
                found = compiled(input_ids=TOKENS, use_cache=False).logits
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert counted == [4]
        self.assert_nothing_stays(model)

    def test_a_block_by_itself(self, model: PreTrainedModel) -> None:
        counted: list[int] = []

        def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
            counted.append(quantizers(graph))
            return graph.forward

        block = model.model.layers[0]
        x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
        positions = model.model.rotary_emb(x, torch.arange(5)[None])
        compiled = torch.compile(block, fullgraph=True, backend=count)
        with torch.no_grad():
            found = compiled(x, position_embeddings=positions)
            expected = block(x, position_embeddings=positions)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert counted == [4]
        self.assert_nothing_stays(model)

    @pytest.mark.parametrize("strict", [False, True])
    def test_exported(self, model: PreTrainedModel, strict: bool) -> None:
        class Logits(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, tokens: Tensor) -> Tensor:
                found: Tensor = self.model(input_ids=tokens, use_cache=False).logits
                return found

        with torch.no_grad():
            program = torch.export.export(Logits(), (TOKENS,), strict=strict)
            found = program.module()(TOKENS)
        assert torch.allclose(found, logits(model), rtol=1e-4, atol=1e-5)
        assert quantizers(program.graph_module) == 4
        self.assert_nothing_stays(model)

    def test_a_linear_by_itself_reads_what_its_input_is_by_then(
        self, model: PreTrainedModel
    ) -> None:
        linear = model.model.layers[0].self_attn.q_proj
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        x = torch.ones(1, 3, 64)
        for factor in (1.0, 2.0, -3.0):
            x.fill_(factor)
            x[..., 7] = 1.0
            with torch.no_grad():
                found = compiled(x)
                self.assert_nothing_stays(model)
                expected = linear(x.clone())
                linear.site_input._last = None  # the other readers do not ask
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)

    def test_a_trace_that_fails_is_over_with_the_next_forward(self, model: PreTrainedModel) -> None:
        with torch.no_grad(), pytest.raises(TypeError, match="unpack"):
            torch.export.export(model.model.layers[0], (torch.ones(1, 3, 64),), strict=False)
        logits(model)
        self.assert_nothing_stays(model)

    @staticmethod
    def assert_nothing_stays(model: nn.Module) -> None:
        sites = [module for module in model.modules() if isinstance(module, InputQuantizer)]
        assert len(sites) == 4
        assert all(site._last is None and site.traced.results is None for site in sites)


class TestTune:
    def test_a_cpu_has_nothing_to_tune(self, made: Made) -> None:
        line = kernels.tune(made(EVERY["w8a8"]))
        assert line == "LlamaForCausalLM: nothing to tune, its quantized layers are on cpu"
        float_model = nn.Linear(2, 2)
        expected = "Linear: nothing to tune, its quantized layers are on no device"
        assert kernels.tune(float_model) == expected

    @pytest.mark.parametrize("name", ["w4a8, groups of 32", "w4a16, groups of 32", "w8a8-kv8-int8"])
    def test_every_product_meets_every_size_class(
        self,
        name: str,
        made: Made,
        run_by_triton: Callable[[], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        made(EVERY[name])
        run_by_triton()
        model = made(EVERY[name])
        launch = importlib.import_module("smoothq.kernels.triton.launch")
        launched: set[tuple[object, ...]] = set()

        def record(self, form, grid, *args, **named):  # type: ignore[no-untyped-def]
            # The index of the GPU, then the product's N, K and size class, or the attention's.
            at = 6 if named.keys() & {"VALUE_WIDTH"} else 3
            launched.add(("attention" if at == 6 else form[1:3], form[at]))

        monkeypatch.setattr(launch.Tuned, "launch", record)
        line = kernels.tune(model, (1, 4, 20))
        assert line.startswith("LlamaForCausalLM: tuned for 1, 4, 20 tokens on cpu in ")
        linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        expected: set[object] = {
            ((linear.out_features, linear.in_features), bucket)
            for linear in linears
            for bucket in (1, 4, 128)
        }
        if "kv8" in name:
            expected |= {("attention", 1), ("attention", 128)}
        assert launched == expected


class TestWithoutTriton:
    @pytest.fixture(autouse=True)
    def no_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str, package: str) -> None:
            raise ImportError("No module named 'triton'")

        monkeypatch.delitem(kernels._LOADED, "triton", raising=False)
        monkeypatch.setattr(kernels.importlib, "import_module", absent)

    def test_a_gpu_is_refused_with_the_way_out(self, triton_for_cpu: None) -> None:
        with pytest.raises(NotImplementedError, match="pip install triton"):
            kernels.quantize_per_token(torch.ones(1, 2), 4)

    def test_a_cpu_does_not_need_it(self) -> None:
        assert kernels.quantize_per_token(torch.ones(1, 2), 4).codes.tolist() == [[7, 7]]
