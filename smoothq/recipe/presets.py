"""Recipes by name: the bits, a paper's method or our best, and the effort."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from ..errors import RecipeError
from .recipe import Effort, Method, Preset, Recipe, Scope, load_recipe, recipe_from_dict, validated

Choice = TypeVar("Choice", bound=str)


def recipe_of(recipe: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    """The recipe that a caller means.

    Args:
        recipe: a Recipe, a preset's name in upper or lower case, the path of a YAML file, or a
            mapping of a Recipe's fields.

    Raises RecipeError for a name that is none of these, or a field that does not fit.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return recipe_from_dict(dict(recipe))
    if isinstance(recipe, str) and recipe.lower() in get_args(Preset):
        return preset(recipe)
    if isinstance(recipe, str | Path) and (
        Path(recipe).is_file() or Path(recipe).suffix in (".yaml", ".yml")
    ):
        return load_recipe(Path(recipe))
    raise RecipeError(
        f"{recipe!r} is no recipe: give {', '.join(get_args(Preset))}, a YAML file, a mapping, or "
        "a Recipe"
    )


def preset(
    name: str,
    method: str | None = None,
    scope: str | None = None,
    effort: str = "default",
) -> Recipe:
    """The recipe of a named preset: our best for these bits, or a paper's method at them.

    Without a method: w8a8 is SmoothQuant; 4-bit weights are rotated, smoothed up→down, rounded by
    GPTQ in groups with integer multipliers and tuned, w4a4 with runtime smoothing in the scope
    `token`. With one: the paper's settings, weights per channel, activations per token.
    scope: where runtime smoothing takes its scale from, for recipes that have it: by default
    `token`; `live` is RRS as published. effort: how much calibration text and how many steps of
    tuning, for 4-bit weights without a method. Raises RecipeError where they have no meaning
    together. Upper and lower case are the same.
    """
    bits: Preset = _one_of(name, "preset", get_args(Preset))
    paper: Method | None = None if method is None else _one_of(method, "method", get_args(Method))
    smooth: Scope | None = None if scope is None else _one_of(scope, "scope", get_args(Scope))
    time: Effort = _one_of(effort, "effort", get_args(Effort))
    w_bits, a_bits = _BITS[bits]
    if paper is not None or bits == "w8a8":
        if time != "default":
            raise RecipeError(
                f"effort={time} is of w4a4, w4a8 and w4a16 without a method, which "
                "takes a paper's own settings; W8A8 has nothing to spend it on"
            )
        values = _paper(bits, paper or "smoothquant", w_bits, a_bits)
    else:
        values = _best(bits, a_bits) | _EFFORTS[time]
    if smooth is not None:
        if "runtime_smoothing" not in values:
            raise RecipeError(
                f"recipe '{values['name']}' has no runtime smoothing whose scope could be set; "
                "use w4a4, alone or with method=rs or method=rrs"
            )
        values["runtime_smoothing"] = _SCOPES[smooth]
    return validated(values)


_SCOPES: dict[Scope, dict[str, Any]] = {
    "token": {"scope": "token", "group_size": 16},
    "calibrated": {"scope": "calibrated", "normalise": True},
    "live": {"scope": "live", "group_size": "auto"},
}


_BITS: dict[Preset, tuple[int, int]] = {
    "w8a8": (8, 8),
    "w4a8": (4, 8),
    "w4a4": (4, 4),
    "w4a16": (4, 16),
}


_EFFORTS: dict[Effort, dict[str, Any]] = {
    "fast": {"calibration": {"samples": 8}},
    "default": {"tuning": {"steps": 16}},
    "best": {"calibration": {"samples": 64}, "tuning": {"steps": 128}},
}


def _one_of(given: object, kind: str, known: tuple[Choice, ...]) -> Choice:
    """The known name that was given, in whatever case. Raises RecipeError naming all of them."""
    for choice in known:
        if isinstance(given, str) and given.lower() == choice:
            return choice
    raise RecipeError(f"no {kind} {given!r}: there are {', '.join(known)}")


def _best(name: Preset, a_bits: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": name,
        "weights": {
            "bits": 4,
            "granularity": "group",
            "group_size": 32,
            "group_scale": "multiplier",
            "clip": True,
            "rounding": "gptq",
        },
        "activations": {"bits": a_bits},
        "rotation": {},
        "smoothing": {"alpha": 0.5, "edges": ["up_down"]},
    }
    if name == "w4a4":
        values["activations"]["clip_ratio"] = 0.925
        values["runtime_smoothing"] = _SCOPES["token"]
    return values


def _paper(name: Preset, method: Method, w_bits: int, a_bits: int) -> dict[str, Any]:
    gptq = w_bits == 4 and method != "rtn"
    weights = {"bits": w_bits, "clip": w_bits == 4, "rounding": "gptq" if gptq else "rtn"}
    values: dict[str, Any] = {
        "name": f"{name}-{method}",
        "weights": weights,
        "activations": {"bits": a_bits},
    }
    if method == "smoothquant":
        values["smoothing"] = {"alpha": 0.5, "edges": ["norms", "up_down"]}
    if method in ("quarot", "smoothrot", "rrs"):
        values["rotation"] = {}
    if method == "smoothrot":
        values["smoothing"] = {"alpha": 0.5, "edges": ["up_down"]}
    if method in ("quarot", "smoothrot") and a_bits == 4:
        values["activations"]["clip_ratio"] = 0.9
    if method in ("rs", "rrs"):
        if a_bits != 4:
            raise RecipeError(
                f"method={method} smooths 4-bit activations at run time; {name} has {a_bits}"
                "-bit ones: take w4a4, or another method"
            )
        values["runtime_smoothing"] = _SCOPES["token"]
    return values
