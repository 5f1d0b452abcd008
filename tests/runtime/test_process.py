"""The process around us: what a caller set changes no result, and is afterwards as it was."""

import ast
import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    StableLmConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from smoothq import kernels, quantize
from smoothq.checkpoint.skeleton import empty_model
from smoothq.discovery.infer import discover_family
from smoothq.errors import UnsupportedModelError
from smoothq.modules import QuantizedLinear
from smoothq.runtime import memory
from smoothq.runtime.memory import busy_heap, steady_heap
from tests.conftest import RECIPES
from tests.tiny_models import TINY, VOCABULARY, tiny_model

IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
KERNELS = Path(kernels.__file__).parent
SOURCES = [*KERNELS.rglob("*.py"), *Path(memory.__file__).parent.rglob("*.py")]
SOME = ["w8a8", "w4a8", "w4a4-rrs", "w4a4-rrs-live", "w4a16-asymmetric", "w8a8-kv8-int8"]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def checkpoint(float_checkpoint, tmp_path_factory, data) -> Callable[..., Path]:
    """The directory of a quantized model by the names of recipe and wiring, made once."""
    known: dict[tuple[str, str], Path] = {}

    def of(recipe: str, name: str = "llama") -> Path:
        if (recipe, name) not in known:
            directory = known[recipe, name] = tmp_path_factory.mktemp("process") / recipe
            source = float_checkpoint(name)
            quantize(source, RECIPES[recipe], data=data, output=directory, check=False)
        return known[recipe, name]

    return of


class TestSurroundings:
    @pytest.mark.parametrize("surroundings", SURROUNDINGS)
    @pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a4-rrs", "w4a16"])
    def test_the_stored_bytes_are_the_same(
        self, checkpoint, float_checkpoint, tmp_path, data, recipe, surroundings
    ) -> None:
        source = float_checkpoint("llama")
        with SURROUNDINGS[surroundings]():
            quantize(source, RECIPES[recipe], data=data, output=tmp_path / "out", check=False)
        expected = load_file(checkpoint(recipe) / "model.safetensors")
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name

    @pytest.mark.parametrize("recipe", SOME)
    @pytest.mark.parametrize("surroundings", ["bfloat16 by default", "float64 by default"])
    def test_logits_are_the_same(self, checkpoint, recipe, surroundings) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint(recipe))
        before = logits(model)
        with SURROUNDINGS[surroundings]():
            assert torch.equal(logits(model), before)

    @pytest.mark.parametrize("recipe", SOME)
    def test_every_linear_is_the_same_under_autocast(self, checkpoint, recipe) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint(recipe))
        linears = [each for each in model.modules() if isinstance(each, QuantizedLinear)]
        for linear in linears[:7]:
            x = torch.randn(1, 5, linear.in_features)
            before = linear(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(linear(x.clone()), before)

    @pytest.mark.parametrize("recipe", SOME)
    def test_a_model_that_was_loaded_in_inference_mode_runs_outside(
        self, checkpoint, recipe
    ) -> None:
        with torch.inference_mode():
            model = AutoModelForCausalLM.from_pretrained(checkpoint(recipe))
            before = model(IDS).logits
        assert torch.equal(model(IDS).logits, before)

    def test_parameters_ask_for_no_gradient(self, checkpoint) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint("w8a8"))
        assert not any(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.slow
    def test_a_model_compiles_with_gradients_on(self, checkpoint) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint("w8a8"))
        model.model.layers = model.model.layers[:1]  # the compiler takes its time for each
        compiled = torch.compile(model.forward, fullgraph=True)
        assert torch.allclose(compiled(IDS).logits, logits(model), atol=1e-4)


def factories(path: Path) -> Iterator[tuple[int, str, set[str | None]]]:
    """Every call in a file that makes a tensor of no other: line, function, keywords."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
            yield node.lineno, node.func.attr, {keyword.arg for keyword in node.keywords}


FACTORIES = {"empty", "zeros", "ones", "full", "eye", "rand", "randn", "linspace", "empty_strided"}


@pytest.mark.parametrize("path", sorted(SOURCES), ids=lambda path: path.stem)
def test_no_tensor_has_the_default_dtype(path) -> None:
    """A thread that loads a model sets it for all; what C++ fills has a device of its own too."""
    wanted = {"dtype", "device"} if KERNELS in path.parents else {"dtype"}
    for line, function, keywords in factories(path):
        assert None in keywords or wanted <= keywords, f"{path.name}:{line}: torch.{function}"


class TestCopies:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_a_pickle_and_a_copy_compute_the_same(self, checkpoint, recipe) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint(recipe))
        self.check(model)

    @pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt2", "bloom", "falcon", "qwen3_moe"])
    def test_of_every_kind_of_layer(self, data, tokenizer, name) -> None:
        recipe = RECIPES["w8a8-rtn"]
        self.check(quantize(tiny_model(name, torch.float32), recipe, tokenizer, data, check=False))

    def test_of_a_family_that_was_inferred(self) -> None:
        config = StableLmConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        family, written = discover_family(config)
        for copied in (copy.deepcopy(family), pickle.loads(pickle.dumps(family))):
            assert copied.block(config, 0) == family.block(config, 0)
            assert copied.written == written

    def check(self, model: PreTrainedModel) -> None:
        before = logits(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for copied in (torch.load(file, weights_only=False), copy.deepcopy(model)):
            assert type(copied) is type(model)
            assert [type(each) for each in copied.modules()] == [type(e) for e in model.modules()]
            assert torch.equal(logits(copied), before)


class TestThreads:
    def together(self, work: Callable[[], object], count: int = 4) -> None:
        """Run the same in threads that start together; raises what any of them raises."""
        start, faults = threading.Barrier(count), []

        def run() -> None:
            start.wait()
            try:
                work()
            except Exception as error:
                faults.append(error)

        threads = [threading.Thread(target=run) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for fault in faults:
            raise fault

    def test_skeletons_are_built_side_by_side_and_torch_is_as_before(self) -> None:
        config = TINY["llama"]()

        def build() -> None:
            for _ in range(5):
                model = empty_model(config)
                assert all(parameter.is_meta for parameter in model.parameters())
                assert not any(buffer.is_meta for buffer in model.buffers())

        self.together(build)
        assert not torch.nn.Linear(2, 2).weight.is_meta
        assert torch.get_default_dtype() == torch.float32

    def test_models_are_quantized_side_by_side(self, float_checkpoint, data) -> None:
        source = float_checkpoint("llama")
        expected = logits(quantize(source, RECIPES["w8a8"], data=data))

        def work() -> None:
            assert torch.equal(logits(quantize(source, RECIPES["w8a8"], data=data)), expected)

        self.together(work, 3)
        assert not torch.nn.Linear(2, 2).weight.is_meta

    @pytest.mark.parametrize("recipe", SOME)
    def test_one_model_runs_in_several(self, checkpoint, recipe) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint(recipe))
        generator = torch.Generator().manual_seed(1)
        inputs = [torch.randint(0, VOCABULARY, (1, 9), generator=generator) for _ in range(6)]
        with torch.no_grad():
            expected = [model(each).logits for each in inputs]

        def work() -> None:
            with torch.no_grad():
                for each, wanted in zip(inputs, expected, strict=True):
                    assert torch.equal(model(each).logits, wanted)

        self.together(work)

    def test_the_heap_is_as_before_when_the_last_has_left(self) -> None:
        def work() -> None:
            for context in (steady_heap, busy_heap) * 20:
                with context():
                    pass

        self.together(work)
        assert not memory._thresholds


class TestSkeleton:
    @pytest.mark.parametrize("name", TINY)
    def test_buffers_are_those_of_a_real_model(self, name) -> None:
        empty, real = empty_model(TINY[name]()), tiny_model(name, torch.float32)
        buffers = dict(real.named_buffers())
        assert buffers.keys() == dict(empty.named_buffers()).keys()
        for key, buffer in empty.named_buffers():
            assert torch.equal(buffer, buffers[key]), key
            assert buffer.dtype == buffers[key].dtype

    def test_a_buffer_that_no_loading_computes_is_refused_by_name(self, monkeypatch) -> None:
        init = LlamaRotaryEmbedding.__init__

        def with_a_table(module: Any, *args: Any, **kwargs: Any) -> None:
            init(module, *args, **kwargs)
            module.register_buffer("table", torch.ones(3), persistent=False)

        monkeypatch.setattr(LlamaRotaryEmbedding, "__init__", with_a_table)
        with pytest.raises(UnsupportedModelError, match=r"rotary_emb\.table"):
            empty_model(TINY["llama"]())


WITHOUT_ASSERTIONS = """
import sys
from importlib.machinery import SourceFileLoader

read, without = SourceFileLoader.get_code, []

def get_code(loader, name):
    if name.partition(".")[0] != "smoothq":
        return read(loader, name)
    without.append(name)
    path = loader.get_filename(name)
    return compile(loader.get_data(path), path, "exec", dont_inherit=True, optimize=1)

SourceFileLoader.get_code = get_code
import smoothq, torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(9)[None]).logits, sys.argv[2])
assert {"smoothq", "smoothq.kernels", "smoothq.modules.quantized_linear"} <= set(without)
"""


@pytest.mark.slow
def test_results_do_not_hang_on_assertions(checkpoint, tmp_path) -> None:
    """Our modules are compiled as by `python -O`, which would compile all of PyTorch anew."""
    directory, file = checkpoint("w8a8"), tmp_path / "logits.pt"
    command = [sys.executable, "-c", WITHOUT_ASSERTIONS, str(directory), str(file)]
    subprocess.run(command, check=True, capture_output=True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory)(torch.arange(9)[None]).logits
    assert torch.equal(torch.load(file), expected)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_class_without_a_head_is_refused_by_name(checkpoint, kind) -> None:
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        kind.from_pretrained(checkpoint("w8a8"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16", "utf-8"])
def test_a_terminal_without_arrows_gets_others(encoding) -> None:
    program = (
        "from smoothq import terminal; terminal.show_what_can_be_shown();"
        "terminal.out.print('A', chr(0x2192), 'B', chr(0x43a), chr(0xd800));"
        "terminal.err.print(chr(0x2192))"
    )
    surroundings = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", program]
    shown = subprocess.run(command, check=True, capture_output=True, env=surroundings).stdout
    arrow = "\u2192 B \u043a" if encoding.startswith("utf") else "-> B ?"
    assert shown.decode(encoding).strip() == f"A {arrow} ?"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak is not handed down")
def test_a_peak_is_that_of_the_process_and_not_of_its_parent() -> None:
    ballast = b"\1" * 2**30
    script = "from smoothq.runtime.memory import peak_memory; print(peak_memory())"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert memory.peak_memory() > len(ballast) > int(done.stdout)
