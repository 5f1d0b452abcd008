"""Nothing is lost: every tensor of a source is quantized, kept as it was, or named as left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from smoothq import export, preset, quantize
from smoothq.checkpoint.writer import CheckpointWriter
from smoothq.errors import CheckpointError, OutputError, UnsupportedModelError
from smoothq.pipeline import round_trip as roundtrip_module
from smoothq.pipeline import shared_writer as output_module
from smoothq.verify import verify_checkpoint
from tests.conftest import RECIPES
from tests.tiny_models import TINY, tiny_model

RTN = preset("w8a8", "rtn")
TOKENS = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(2))
MTP = {
    "mtp.layers.0.eh_proj.weight": torch.arange(96.0 * 48).reshape(48, 96),
    "mtp.norm.weight": torch.ones(48, dtype=torch.bfloat16),
}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's files."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are one, to the bit."""
    alike = left.dtype == right.dtype and left.shape == right.shape
    octets = (tensor.reshape(-1).view(torch.uint8) for tensor in (left, right))
    return alike and torch.equal(*octets)


def glm(seed: int = 0) -> PreTrainedModel:
    """A mixture whose router has a persistent buffer, with random values in it."""
    config = AutoConfig.for_model(
        "glm4_moe",
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape))
    return model


def with_tensors(directory: Path, **changes: Any) -> None:
    """Add tensors to a checkpoint of one file; None takes one out."""
    path = directory / "model.safetensors"
    held = load_file(path) | {name: t for name, t in changes.items() if t is not None}
    held = {name: t for name, t in held.items() if changes.get(name, t) is not None}
    save_file({name: t.contiguous() for name, t in held.items()}, path, {"format": "pt"})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny checkpoint of its own, to be changed."""
    tiny_model("llama-untied", torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class TestRoundingAloneTouchesTheWeightsAlone:
    """Without a transform all that is not a quantized weight comes out bit by bit."""

    @staticmethod
    def _kept(model: PreTrainedModel, out: Path) -> None:
        stored, held = tensors_of(out), dict(model.state_dict())
        tied = model.all_tied_weights_keys
        kept = {name: t for name, t in held.items() if name in stored and name not in tied}
        quantized = {name for name in kept if stored[name].dtype in (torch.int8, torch.uint8)}
        assert quantized
        for name in set(kept) - quantized:
            assert same_bits(stored[name], held[name].detach()), name
        unnamed = set(held) - set(stored) - set(tied)
        assert all("mlp" in n or "experts" in n or "attn" in n or "attention" in n for n in unnamed)

    @pytest.mark.parametrize("name", TINY)
    def test_of_a_model_in_memory(self, tmp_path: Path, name: str) -> None:
        model = tiny_model(name, torch.float32)
        quantize(model, RTN, output=tmp_path / "out", check=False)
        self._kept(model, tmp_path / "out")

    def test_of_persistent_buffers_from_a_folder(self, tmp_path: Path) -> None:
        model = glm()
        model.save_pretrained(tmp_path / "model")
        out = tmp_path / "out"
        loaded = quantize(tmp_path / "model", RTN, output=out, check=False).load()
        self._kept(model, tmp_path / "out")
        bias = "model.layers.1.mlp.gate.e_score_correction_bias"
        assert torch.equal(loaded.get_buffer(bias), model.get_buffer(bias))

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test_of_any_dtypes(self, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
        model = tiny_model("llama-untied")
        for parameter in model.parameters():
            parameter.data = parameter.data.to(data.draw(st.sampled_from(FLOATS)))
        folder = tmp_path_factory.mktemp("dtypes")
        model.save_pretrained(folder / "model")
        quantize(folder / "model", RTN, output=folder / "out", check=False)
        self._kept(model, folder / "out")


class TestDtypes:
    def test_are_those_of_the_tensors_where_the_config_names_none(self, llama: Path) -> None:
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float16).save_pretrained(llama)
        config = json.loads((llama / "config.json").read_text())
        del config["dtype"]
        (llama / "config.json").write_text(json.dumps(config))
        quantize(llama, RTN, output=llama.parent / "out", check=False)
        stored = tensors_of(llama.parent / "out")
        assert stored["model.norm.weight"].dtype == torch.float16
        assert AutoConfig.from_pretrained(llama.parent / "out").dtype == torch.float16

    def test_that_disagree_with_the_config_are_named(self, llama: Path) -> None:
        config = json.loads((llama / "config.json").read_text()) | {"dtype": "bfloat16"}
        (llama / "config.json").write_text(json.dumps(config))
        quantize(llama, RTN, output=llama.parent / "out", check=False)
        assert tensors_of(llama.parent / "out")["model.norm.weight"].dtype == torch.float32
        assert "its config says torch.bfloat16" in (llama.parent / "out/README.md").read_text()

    def test_named_by_the_recipe_are_those_of_all_floats(self, llama: Path) -> None:
        quantize(llama, RTN.edit(dtype="float16"), output=llama.parent / "out", check=False)
        stored = tensors_of(llama.parent / "out")
        floats = {n: t.dtype for n, t in stored.items() if not n.endswith("weight_scale")}
        assert set(floats.values()) <= {torch.float16, torch.int8, torch.uint8}

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
    def test_that_mean_nothing_alone_are_refused_by_name(
        self, llama: Path, dtype: torch.dtype
    ) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        with_tensors(llama, **{name: load_file(llama / "model.safetensors")[name].to(dtype)})
        with pytest.raises(UnsupportedModelError, match=f"{name}.*{dtype}"):
            quantize(llama, RTN, output=llama.parent / "out")
        assert not list(llama.parent.glob("out*"))


class TestTies:
    """A head is the embedding where transformers takes it for that, whatever the config says."""

    def _made(self, directory: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
        loaded = AutoModelForCausalLM.from_pretrained(directory)
        out = directory.parent / "out"
        return loaded, quantize(directory, RTN, output=out, check=False).load()

    @staticmethod
    def _distance(left: PreTrainedModel, right: PreTrainedModel) -> float:
        with torch.no_grad():
            a, b = (model(TOKENS).logits.log_softmax(-1) for model in (left, right))
        return float((a.exp() * (a - b)).sum(-1).mean())

    @staticmethod
    def _say_tied(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))

    def test_a_stored_head_of_its_own_is_the_head(self, llama: Path) -> None:
        self._say_tied(llama)
        loaded, quantized = self._made(llama)
        assert self._distance(loaded, quantized) < 0.01
        assert not quantized.config.tie_word_embeddings
        again = quantize(loaded, RTN, check=False)  # the model in memory says the same
        assert self._distance(loaded, again) < 0.01

    def test_a_stored_head_that_is_the_embedding_is_stored_once(self, llama: Path) -> None:
        self._say_tied(llama)
        embedding = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
        with_tensors(llama, **{"lm_head.weight": embedding.clone()})
        loaded, quantized = self._made(llama)
        assert self._distance(loaded, quantized) < 0.01
        assert "lm_head.weight" not in tensors_of(llama.parent / "out")

    def test_a_head_alone_is_the_embedding_too(self, llama: Path) -> None:
        self._say_tied(llama)
        with_tensors(llama, **{"model.embed_tokens.weight": None})
        loaded, quantized = self._made(llama)
        assert self._distance(loaded, quantized) < 0.01

    @pytest.mark.parametrize("recipe", ["w4a8", "w4a4-quarot"])
    def test_hold_under_rotation(self, llama: Path, data: Tensor, recipe: str) -> None:
        self._say_tied(llama)
        loaded = AutoModelForCausalLM.from_pretrained(llama)
        recipes = RECIPES[recipe].edit(tuning=None)
        rotated = quantize(llama, recipes, data=data, check=False)
        model = tiny_model("llama-untied", torch.float32)
        untied = quantize(model, recipes, data=data, check=False)
        assert self._distance(loaded, rotated) < 1.01 * self._distance(loaded, untied) + 1e-3


class TestWhatTheClassDoesNotKnow:
    """Tensors of modules that the class lacks are kept; what its own modules do not use is not."""

    @pytest.mark.parametrize("recipe", ["w8a8-rtn", "w4a8"])
    def test_is_kept_as_it_is(self, llama: Path, data: Tensor, recipe: str) -> None:
        with_tensors(llama, **MTP)
        out = llama.parent / "out"
        quantize(llama, RECIPES[recipe], data=data, output=out)
        stored = tensors_of(out)
        assert all(same_bits(stored[name], tensor) for name, tensor in MTP.items())
        assert "mtp.layers.*.eh_proj.weight" in (out / "README.md").read_text()
        assert verify_checkpoint(out).tensors == len(stored)

    def test_may_hold_anything(self, llama: Path) -> None:
        odd = {
            "tower.mask": torch.tensor([float("-inf"), float("nan"), 0.0]),
            "tower.table": torch.arange(4),
            "tower.flags": torch.tensor([True, False]),
            "tower.codes": torch.ones(2, 2).to(torch.float8_e4m3fn),
            "tower.scalar": torch.tensor(2.5, dtype=torch.float64),
        }
        with_tensors(llama, **odd)
        quantize(llama, RTN, output=llama.parent / "out")
        stored = tensors_of(llama.parent / "out")
        assert all(same_bits(stored[name], tensor) for name, tensor in odd.items())
        assert verify_checkpoint(llama.parent / "out").tensors == len(stored)

    def test_of_its_own_modules_is_named_and_left_out(self, llama: Path) -> None:
        stray = {"model.layers.0.self_attn.masked_bias": torch.ones(1)}
        with_tensors(llama, **stray)
        quantize(llama, RTN, output=llama.parent / "out")
        assert not set(stray) & set(tensors_of(llama.parent / "out"))
        card = (llama.parent / "out/README.md").read_text()
        assert "model.layers.*.self_attn.masked_bias" in card

    def test_is_no_excuse_for_a_foreign_tensor_in_a_checkpoint(self, llama: Path) -> None:
        out = llama.parent / "out"
        quantize(llama, RTN, output=out)
        with_tensors(out, **{"model.layers.0.mlp.up_proj.weight_zero_point": torch.ones(1)})
        with pytest.raises(CheckpointError, match="weight_zero_point"):
            AutoModelForCausalLM.from_pretrained(out)

    def test_is_exported_and_ignored_where_nothing_is_rotated(self, llama: Path) -> None:
        with_tensors(llama, **MTP)
        quantize(llama, RTN, output=llama.parent / "out")
        export(llama.parent / "out", llama.parent / "served")
        stored = tensors_of(llama.parent / "served")
        assert all(same_bits(stored[name], tensor) for name, tensor in MTP.items())
        config = json.loads((llama.parent / "served/config.json").read_text())
        assert "mtp.layers.0.eh_proj" in config["quantization_config"]["ignore"]

    def test_is_left_out_by_name_of_an_export_with_a_rotated_stream(
        self, llama: Path, data: Tensor
    ) -> None:
        with_tensors(llama, **MTP)
        config = json.loads((llama / "config.json").read_text())
        config["num_nextn_predict_layers"] = 1
        (llama / "config.json").write_text(json.dumps(config))
        recipe = RECIPES["w4a16"].edit(rotation__down=False, weights__group_scale="float")
        quantize(llama, recipe, data=data, output=llama.parent / "out", check=False)
        exported = export(llama.parent / "out", llama.parent / "served")
        assert set(exported.left_out) == set(MTP)
        assert not set(MTP) & set(tensors_of(llama.parent / "served"))
        config = json.loads((llama.parent / "served/config.json").read_text())
        assert config["num_nextn_predict_layers"] == 0


class TestOneStoredTensorMakesSeveral:
    """A stored tensor that transformers cuts into several parameters is read as it reads it."""

    def test_as_the_model_that_transformers_loads(self, tmp_path: Path) -> None:
        config = AutoConfig.for_model(
            "sarvam_moe",
            vocab_size=97,
            hidden_size=64,
            intermediate_size=128,
            moe_intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            max_position_embeddings=64,
            pad_token_id=0,
        )
        model = AutoModelForCausalLM.from_config(config).float().eval()
        model.save_pretrained(tmp_path / "model")
        stored = tensors_of(tmp_path / "model")
        assert not any(name.endswith("q_proj.weight") for name in stored)
        quantized = quantize(tmp_path / "model", RTN, check=False)
        with torch.no_grad():
            error = quantized(TOKENS).logits - model(TOKENS).logits
        assert error.norm() < 0.05 * model(TOKENS).logits.norm()


class TestInMemory:
    """A model in memory is quantized as it is, or what is not its class's is refused by name."""

    @pytest.mark.parametrize(
        ("name", "module"),
        [
            ("model.layers.0.self_attn.v_proj", torch.nn.Linear(48, 32, bias=True)),
            ("model.layers.1.mlp.act_fn", torch.nn.ReLU()),
            ("model.norm", torch.nn.LayerNorm(48)),
            ("lm_head", torch.nn.Linear(48, 97, bias=True)),
        ],
    )
    def test_a_module_of_another_kind_is_refused(self, name: str, module: torch.nn.Module) -> None:
        model = tiny_model("llama", torch.float32)
        model.set_submodule(name, module)
        with pytest.raises(UnsupportedModelError, match=name):
            quantize(model, RTN)

    def test_its_notes_are_told(self, llama: Path, caplog: pytest.LogCaptureFixture) -> None:
        with_tensors(llama, weird=torch.ones(3), **MTP)
        result = quantize(llama, RTN, output=llama.parent / "out", check=False)
        quantize(llama, RTN, check=False)
        for told in (repr(result), caplog.text):
            assert "kept as they are: mtp" in told
            assert "left out, for the model's code does not use them: weird" in told


class TestMissing:
    def test_a_tensor_is_named_before_any_work(self, llama: Path) -> None:
        with_tensors(llama, **{"model.layers.2.mlp.up_proj.weight": None})
        blocks: list[object] = []
        with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.2\.mlp\.up_proj"):
            quantize(llama, RTN, output=llama.parent / "out", on_block=blocks.append)
        assert not blocks
        assert not list(llama.parent.glob("out*"))

    def test_a_buffer_is_as_the_class_makes_it_and_named(self, tmp_path: Path) -> None:
        model = glm()
        model.save_pretrained(tmp_path / "model")
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        with_tensors(tmp_path / "model", **{name: None})
        out = tmp_path / "out"
        quantized = quantize(tmp_path / "model", RTN, output=out, check=False).load()
        assert not quantized.get_buffer(name).any()
        assert f"{name} is not stored" in (tmp_path / "out/README.md").read_text()


class TestTheAccount:
    def test_a_tensor_that_is_not_written_keeps_the_output_from_being_placed(
        self, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add = output_module.SharedWriter.add

        def forgetful(self: Any, tensors: dict[str, Tensor]) -> None:
            forgotten = "model.layers.1.input_layernorm.weight"
            add(self, {name: t for name, t in tensors.items() if name != forgotten})

        monkeypatch.setattr(output_module.SharedWriter, "add", forgetful)
        with pytest.raises(OutputError, match=r"layers\.1\.input_layernorm\.weight.*written none"):
            quantize(llama, RTN, output=llama.parent / "out", check=False)
        assert not (llama.parent / "out").exists()


class TestTheLastLook:
    """An output that computes something else than the pass did is not placed."""

    # Held whole, every recipe and every family passes in test_loading and test_families.
    @pytest.mark.parametrize(
        ("name", "recipe", "whole"),
        [
            *(("llama", recipe, False) for recipe in ("w8a8", "w4a8", "w4a4", "w8a8-kv4")),
            *(("opt", "w8a8", True), ("opt", "w4a8", False)),
            *(("gpt_oss", "w8a8", False), ("gpt_oss", "w4a8", True)),
        ],
    )
    def test_passes_what_is_right(
        self,
        data: Tensor,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        recipe: str,
        whole: bool,
    ) -> None:
        self._hold_little(monkeypatch, whole)
        quantize(tiny_model(name, torch.float32), RECIPES[recipe], data=data, output=tmp_path)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", ["gemma2", "llama", "opt"])
    def test_passes_models_of_16_bits(
        self, data: Tensor, tmp_path: Path, name: str, dtype: torch.dtype
    ) -> None:
        quantize(tiny_model(name, dtype), RECIPES["w8a8"], data=data, output=tmp_path)

    @pytest.mark.parametrize("whole", [True, False])
    def test_passes_8_bit_embeddings(
        self, data: Tensor, monkeypatch: pytest.MonkeyPatch, whole: bool
    ) -> None:
        self._hold_little(monkeypatch, whole)
        for name in ("llama", "llama-untied"):
            quantize(tiny_model(name, torch.float32), RTN.edit(embeddings=8), data=data)

    @pytest.mark.parametrize("whole", [True, False])
    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ("model.layers.1.input_layernorm.weight", "block 1"),
            ("model.layers.2.mlp.down_proj.weight_scale", "block 2"),
            ("model.norm.weight", "what follows the blocks|model.norm.weight"),
        ],
    )
    def test_names_the_first_that_differs_and_places_nothing(
        self, llama: Path, monkeypatch: pytest.MonkeyPatch, changed: str, named: str, whole: bool
    ) -> None:
        self._hold_little(monkeypatch, whole)
        rows = CheckpointWriter.add_rows

        def wrong(self: Any, name: str, rows_: Any, *args: Any) -> None:
            rows(self, name, (r * 1.5 if name == changed else r for r in rows_), *args)

        monkeypatch.setattr(CheckpointWriter, "add_rows", wrong)
        with pytest.raises(OutputError, match=f"{named}.*nothing was placed"):
            quantize(llama, RTN, output=llama.parent / "out")
        assert not (llama.parent / "out").exists()
        quantize(llama, RTN, output=llama.parent / "unchecked", check=False)
        assert (llama.parent / "unchecked").exists()

    @staticmethod
    def _hold_little(monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
        needed = 0 if whole else 1 << 60
        monkeypatch.setattr(roundtrip_module.RoundTrip, "_whole_bytes", lambda self: needed)
