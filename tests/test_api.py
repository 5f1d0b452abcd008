"""`smoothq.quantize`: recipes in any form, its result, and every option of the command line."""

import warnings
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import smoothq
from smoothq import BlockDone, Probe, QuantizeResult, Recipe, evaluate, preset, quantize
from smoothq.errors import RecipeError, SmoothqError, StoppedError
from tests.conftest import RECIPES

RTN = RECIPES["w8a8-rtn"]


class TestARecipeInAnyForm:
    @pytest.mark.parametrize("name", ["w8a8", "W4A8", "w4A4", "W4a16"])
    def test_a_presets_name_in_any_case(self, float_checkpoint, data, tmp_path, name) -> None:
        with pytest.raises(SmoothqError):  # the tiny model's widths take no groups of 32
            quantize(float_checkpoint("llama"), f"{name}x", data=data, output=tmp_path / "out")
        assert smoothq.recipe.presets.recipe_of(name) == preset(name.lower())

    def test_file_mapping_and_recipe_mean_the_same(self, tmp_path) -> None:
        file = tmp_path / "recipe.yaml"
        file.write_text(RTN.to_yaml())
        for form in (RTN, file, str(file), RTN.model_dump(), yaml.safe_load(RTN.to_yaml())):
            assert smoothq.recipe.presets.recipe_of(form) == RTN
        assert Recipe.from_yaml(file) == RTN

    def test_what_is_none_is_refused_before_the_model_is_looked_at(self, tmp_path) -> None:
        for wrong in ("w5a5", 7, None, tmp_path / "absent.yaml", {"weights": {"bits": "many"}}):
            with pytest.raises(RecipeError):
                quantize("no/such-model", wrong, output=tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_the_recipe_of_a_checkpoint(self, float_checkpoint, tmp_path) -> None:
        quantize(float_checkpoint("llama"), RTN, output=tmp_path / "out")
        assert Recipe.from_pretrained(tmp_path / "out") == RTN
        with pytest.raises(RecipeError, match="not quantized by smoothq"):
            Recipe.from_pretrained(float_checkpoint("llama"))

    @given(st.integers(1, 64), st.sampled_from(["builtin", "wikitext2"]))
    def test_dotted_paths_keywords_and_mappings_edit_alike(self, samples: int, text: str) -> None:
        base = preset("w4a8", effort="best")
        dotted = base.edit({"calibration.samples": samples, "calibration.source": text})
        assert dotted == base.edit(calibration__samples=samples, calibration__source=text)
        assert dotted == base.edit(calibration={"samples": samples, "source": text})
        assert dotted.calibration.sequence_length == base.calibration.sequence_length

    @pytest.mark.parametrize("path", ["nothing", "weights.nothing", "seed.nothing", "tuning.x.y"])
    def test_an_unknown_path_is_refused(self, path: str) -> None:
        with pytest.raises(RecipeError):
            preset("w4a8").edit({path: 1})


class TestTheResult:
    def test_it_is_the_closing_table_and_loads_the_model(
        self, float_checkpoint, data, tmp_path
    ) -> None:
        result = quantize(float_checkpoint("llama"), RTN, output=tmp_path / "out")
        assert isinstance(result, QuantizeResult)
        assert result.path == tmp_path / "out"
        for label, value in result.rows():
            assert label in repr(result)
            assert value in repr(result)
        model = result.load(dtype=torch.float32)
        direct = quantize(float_checkpoint("llama"), RTN, dtype=torch.float32)
        assert torch.equal(model(data).logits, direct(data).logits)

    def test_for_one_version_it_answers_as_the_model_did_with_a_warning(
        self, float_checkpoint, data, tmp_path
    ) -> None:
        result = quantize(
            float_checkpoint("llama"), RTN, output=tmp_path / "out", dtype=torch.float32
        )
        with pytest.warns(DeprecationWarning, match=r"result\.load\(\)"):
            logits = result(data).logits
        with pytest.warns(DeprecationWarning, match="config"):
            assert result.config.model_type == "llama"
        assert torch.equal(logits, result.load()(data).logits)

    def test_nothing_of_its_own_warns(self, float_checkpoint, tmp_path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            result = quantize(float_checkpoint("llama"), RTN, output=tmp_path / "out")
            repr(result)
            result.as_dict()
            assert not result.repeated
            assert quantize(float_checkpoint("llama"), RTN, output=tmp_path / "out").repeated


class TestEverythingTheCommandLineDoes:
    def test_another_format(self, float_checkpoint, tmp_path) -> None:
        out = tmp_path / "out"
        result = quantize(float_checkpoint("llama"), RTN, output=out, format="compressed-tensors")
        assert result.export is not None
        config = yaml.safe_load((out / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_what_only_smoothq_runs_is_left_out(self, float_checkpoint, data, tmp_path) -> None:
        result = quantize(
            float_checkpoint("llama"),
            RECIPES["w4a8"],
            data=data,
            output=tmp_path / "out",
            servable=True,
        )
        assert result.recipe != RECIPES["w4a8"]

    def test_the_stop_rule(self, float_checkpoint, data, tmp_path) -> None:
        seen: list[BlockDone] = []
        with pytest.raises(StoppedError, match="over 1e-06"):
            quantize(
                float_checkpoint("llama"),
                RTN,
                output=tmp_path / "out",
                probe=Probe(data),
                stop_above=1e-6,
                on_block=seen.append,
            )
        assert not (tmp_path / "out").exists()
        with pytest.raises(RecipeError, match="probe"):
            quantize(float_checkpoint("llama"), RTN, output=tmp_path / "out", stop_above=2.0)

    def test_a_probe_of_a_text_every_so_many_blocks(self, float_checkpoint, tmp_path) -> None:
        seen: list[BlockDone] = []
        quantize(
            float_checkpoint("llama"),
            RTN,
            output=tmp_path / "out",
            probe=1,
            probe_text="builtin",
            on_block=seen.append,
        )
        assert all(done.perplexity is not None for done in seen)

    def test_memory_as_text(self, float_checkpoint, tmp_path) -> None:
        with pytest.raises(RecipeError, match="too little"):
            quantize(float_checkpoint("llama"), RTN, output=tmp_path / "out", max_memory="1MB")

    @pytest.mark.parametrize("option", [{"format": "gguf"}, {"memory": "less"}, {"device": "tpu"}])
    def test_an_option_that_is_none_is_named(self, float_checkpoint, tmp_path, option) -> None:
        with pytest.raises(SmoothqError, match=next(iter(option.values()))):
            quantize(float_checkpoint("llama"), RTN, output=tmp_path / "out", **option)

    def test_a_text_is_evaluated_by_name(self, float_checkpoint, tokenizer, tmp_path) -> None:
        model = quantize(float_checkpoint("llama"), RTN)
        by_name = evaluate(model, tokenizer, text="builtin", windows=1, sequence_length=32)
        assert by_name.texts[0].text == "builtin"


class TestSet:
    def test_it_reaches_every_field(self, run, float_checkpoint, tmp_path: Path) -> None:
        settings = ("--set", "calibration.source=builtin", "--set", "activations.full_range=true")
        code, _, error = run(
            "quantize", float_checkpoint("llama"), "--w8a8", *settings, "-o", tmp_path / "out"
        )
        assert code == 0, error
        recipe = Recipe.from_pretrained(tmp_path / "out")
        assert recipe.activations.full_range
        assert recipe.calibration.source == "builtin"

    def test_what_is_no_assignment_is_misuse(self, run, tmp_path: Path) -> None:
        code, _, error = run("quantize", "M", "--w8a8", "--set", "x", "-o", tmp_path / "out")
        assert code == 2
        assert "--set" in error

    def test_the_help_begins_with_what_people_use_first(self, run) -> None:
        _, text, _ = run("quantize", "--help")
        for flag in ("--w4a8", "--effort", "--recipe", "--calibration", "--set", "--dry-run"):
            assert flag in text
        for flag in ("--smooth-scope", "--edges", "--w-bits"):
            assert flag not in text
