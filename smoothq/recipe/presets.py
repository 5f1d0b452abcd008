"""Recipes by name: the bits, a paper's method or our best, and the effort."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from ..errors import RecipeError
from .recipe import (
    FLOAT_BITS,
    Effort,
    Method,
    Preset,
    Recipe,
    Scope,
    load_recipe,
    recipe_from_dict,
    validated,
)

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
    chosen: Preset = _one_of(name, "preset", get_args(Preset))
    paper: Method | None = None if method is None else _one_of(method, "method", get_args(Method))
    smooth: Scope | None = None if scope is None else _one_of(scope, "scope", get_args(Scope))
    time: Effort = _one_of(effort, "effort", get_args(Effort))
    if paper is not None or chosen == "w8a8":
        if time != "default":
            raise RecipeError(
                f"effort={time} is of presets that are tuned, without a method, which takes a "
                "paper's own settings; W8A8 has nothing to spend it on"
            )
        values = _paper(chosen, paper or "smoothquant")
    elif chosen in _FLOAT_FORMATS:
        values = _float(chosen) | (_EFFORTS[time] if chosen in _TUNED else {})
        if time != "default" and chosen not in _TUNED:
            raise RecipeError(f"effort={time}: {chosen} is rounded once, and has nothing to tune")
    else:
        values = _best(chosen) | _EFFORTS[time]
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
    "w3a16": (3, 16),
    "w2a16": (2, 16),
}

_FP8_TOKEN: dict[str, Any] = {"type": "float", "bits": 8}
_NVFP4: dict[str, Any] = {
    "type": "float",
    "bits": 4,
    "granularity": "group",
    "group_size": 16,
    "group_scale": "e4m3",
}


def _mx(bits: int) -> dict[str, Any]:
    """MXFP8 or MXFP4, of weights or activations."""
    return _NVFP4 | {"bits": bits, "group_size": 32, "group_scale": "e8m0"}


# Weights and activations of the presets of floating-point formats.
_FLOAT_FORMATS: dict[Preset, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp8": (_FP8_TOKEN, _FP8_TOKEN),
    "fp8-block": (
        _FP8_TOKEN | {"granularity": "block"},
        _FP8_TOKEN | {"granularity": "group", "group_size": 128},
    ),
    "w4a8-fp8": ({"bits": 4, "granularity": "group", "group_size": 32}, _FP8_TOKEN),
    "mxfp8": (_mx(8), _mx(8)),
    "mxfp4": (_mx(4), _mx(4)),
    "nvfp4": (_NVFP4, _NVFP4),
    "w4a16-nvfp4": (_NVFP4, {"bits": FLOAT_BITS}),
}
_TUNED: tuple[Preset, ...] = ("w4a8-fp8", "mxfp4", "nvfp4", "w4a16-nvfp4")
# Rotations of these. A power of two is a coarse scale for a group with an outlier: MXFP4 spreads
# it within its group, after norms are smoothed. NVFP4's groups have scales fine enough without.
_ROTATED: dict[Preset, dict[str, Any]] = {
    "w4a8-fp8": {},
    "mxfp4": {"residual": "online", "block_size": 32},
    "w4a16-nvfp4": {},
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


def _float(name: Preset) -> dict[str, Any]:
    """Our best for a preset of floating-point formats."""
    weights, activations = _FLOAT_FORMATS[name]
    values: dict[str, Any] = {
        "name": name,
        "weights": weights | {"clip": True, "rounding": "gptq"},
        "activations": dict(activations),
        "smoothing": {"alpha": 0.5, "edges": ["norms", "up_down"]},
    }
    if name in _ROTATED:
        values["rotation"] = dict(_ROTATED[name])
        if "residual" not in _ROTATED[name]:
            values["smoothing"]["edges"] = ["up_down"]
    return values


def _best(name: Preset) -> dict[str, Any]:
    w_bits, a_bits = _BITS[name]
    values: dict[str, Any] = {
        "name": name,
        "weights": {
            "bits": w_bits,
            "granularity": "group",
            "group_size": 32,
            "group_scale": "multiplier" if w_bits == 4 else "float",
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


def _paper(name: Preset, method: Method) -> dict[str, Any]:
    if name not in _BITS:
        raise RecipeError(f"method={method} is of integers: {', '.join(_BITS)}; not of {name}")
    w_bits, a_bits = _BITS[name]
    gptq = w_bits <= 4 and method != "rtn"
    weights = {"bits": w_bits, "clip": w_bits <= 4, "rounding": "gptq" if gptq else "rtn"}
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
