"""Names of presets, edits of a recipe, amounts of memory, and what `import smoothq` binds."""

import importlib
import pkgutil
from types import ModuleType

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

import smoothq
from smoothq import preset
from smoothq.cli.common import parse_memory
from smoothq.cli.in_flags import in_flags
from smoothq.errors import RecipeError
from smoothq.recipe.recipe import OTHER_WORDS, Recipe

BEST = preset("w4a8", effort="best")


@pytest.mark.parametrize("name", ["W4A8", "w4a8", "W4a8"])
def test_a_preset_is_spelled_in_any_case(name) -> None:
    assert preset(name) == preset("w4a8")
    assert preset(name, "SmoothRot", effort="Default") == preset("w4a8", "smoothrot")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("w4a9",), "no preset 'w4a9': there are w8a8, w4a8, w4a4, w4a16"),
        (("W4A16_ASYM",), "there are w8a8, w4a8, w4a4, w4a16"),
        ((4,), "no preset 4"),
        (("w4a8", "gptq"), "no method 'gptq': there are rtn, smoothquant"),
        (("w4a4", None, "global"), "no scope 'global': there are token, calibrated, live"),
        (("w4a8", None, None, "max"), "no effort 'max': there are fast, default, best"),
    ],
)
def test_another_name_is_refused_with_those_there_are(arguments, message) -> None:
    with pytest.raises(RecipeError, match=message):
        preset(*arguments)


EDITS = {
    "calibration": {"source": "builtin", "split": "test", "samples": 7, "sequence_length": 99},
    "tuning": {"steps": 3, "code_rate": 0.5, "scale_rate": 0.25},
    "gptq": {"block_size": 64, "damping": 0.5, "least_tokens": 3},
    "smoothing": {"alpha": 0.25, "quantile": 0.5},
    "rotation": {"value_output": False, "down": False},
}


@given(st.data())
def test_an_edit_of_a_section_leaves_its_other_fields(data) -> None:
    """`edit(section={field: value})` is `edit(section__field=value)`."""
    section = data.draw(st.sampled_from(sorted(EDITS)))
    names = data.draw(st.sets(st.sampled_from(sorted(EDITS[section]))))
    values = {name: EDITS[section][name] for name in names}
    one_by_one = BEST.edit(**{f"{section}__{name}": value for name, value in values.items()})
    assert BEST.edit(**{section: values}) == one_by_one
    assert (one_by_one == BEST) == (not names)


WORDS = [(section, word) for section, words in OTHER_WORDS.items() for word in words]
VALUES = {
    "keep": ["*.o_proj"],
    "bits": 4,
    "granularity": "tensor",
    "source": "builtin",
    "sequence_length": 7,
}


@pytest.mark.parametrize(("section", "word"), WORDS)
def test_a_field_is_also_known_by_what_other_libraries_call_it(section, word) -> None:
    name = OTHER_WORDS[section][word]
    value = VALUES.get(name, False if name in ("symmetric", "activation_order") else 1)
    tuning = None if name == "granularity" else {}
    base = Recipe(activations={"bits": 16}, smoothing={}, tuning=tuning)

    def nested(field: str) -> dict[str, object]:
        return {section: {field: value}} if section else {field: value}

    dots = f"{section}." if section else ""
    assert base.edit(nested(word)) == base.edit(nested(name)) == base.edit({dots + word: value})
    assert base.edit(nested(word)) != base
    assert Recipe.model_validate(base.edit(nested(word)).model_dump()) == base.edit(nested(name))
    assert f" {word}:" not in base.edit(nested(word)).to_yaml()


def test_an_override_s_sections_read_the_same_words() -> None:
    base = preset("w8a8")
    ours, theirs = ({"match": "*.o_proj", "weights": {word: 4}} for word in ("bits", "num_bits"))
    assert base.edit(overrides=[theirs]) == base.edit(overrides=[ours])


def test_one_field_by_two_words_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"keep is given twice, once as ignore"):
        Recipe.model_validate({"keep": ["a"], "ignore": ["b"]})
    with pytest.raises(RecipeError, match=r"calibration\.samples is given twice, once as nsamples"):
        BEST.edit(calibration={"samples": 3, "nsamples": 4})


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("'OUT' is not empty; overwrite=True replaces it", "--overwrite replaces it"),
        ("or begin anew with resume=False", "or begin anew with --no-resume"),
        ("needs float activations: activations.bits=16", "--set activations.bits=16"),
        ("alone or with method=rs or method=rrs", "with --method rs or --method rrs"),
        ("the tensor 'a.b' has x=1 and model.layers.0.q=False?", "and model.layers.0.q=False?"),
    ],
)
def test_the_command_line_prints_arguments_and_fields_as_flags(message, printed) -> None:
    assert in_flags(message).endswith(printed)


def test_an_edit_makes_a_section_that_was_not_there() -> None:
    assert preset("w8a8").edit(tuning={"steps": 3}).tuning == Recipe(tuning={"steps": 3}).tuning


@given(st.integers(1, 4096), st.sampled_from("kmgt"), st.booleans(), st.booleans())
def test_units_of_memory_are_decimal_or_binary(amount, unit, binary, upper) -> None:
    text = f"{amount}{unit}{'i' if binary else ''}b"
    factor = (1024 if binary else 1000) ** (" kmgt".index(unit))
    assert parse_memory(text.upper() if upper else text) == amount * factor


@pytest.mark.parametrize("text", ["", "GB", "8iB", "8XB", "1e999", "-1GB", "nan"])
def test_what_is_no_amount_is_misuse(text) -> None:
    with pytest.raises(typer.BadParameter, match="no amount of memory"):
        parse_memory(text)


def test_a_linear_s_recipe_is_also_looked_up_by_the_earlier_name() -> None:
    recipe = preset("w4a4").edit(overrides=[{"match": "*.v_proj", "weights": {"bits": 8}}])
    with pytest.warns(DeprecationWarning, match=r"Recipe\.of is now Recipe\.for_module"):
        assert recipe.of("layers.0.v_proj").weights.bits == 8


def test_no_function_hides_a_module() -> None:
    for found in pkgutil.iter_modules(smoothq.__path__):
        if not found.name.startswith("__"):
            module = importlib.import_module(f"smoothq.{found.name}")
            assert isinstance(getattr(smoothq, found.name), ModuleType)
            assert getattr(smoothq, found.name) is module


def test_the_module_export_is_called_as_its_function_is(tmp_path) -> None:
    for call in (smoothq.export, smoothq.export_checkpoint):
        with pytest.raises(smoothq.errors.SmoothqError, match=r"config\.json"):
            call(tmp_path, tmp_path / "out")
