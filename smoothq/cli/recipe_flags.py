"""The flags that make a recipe, for every command that takes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
import yaml

from ..recipe.presets import preset
from ..recipe.recipe import Attention, Effort, Method, Preset, Recipe, Scope, load_recipe
from .common import DtypeName

BY_NAME = inspect.Parameter.KEYWORD_ONLY
PRESETS: tuple[Preset, ...] = get_args(Preset)


@dataclass(frozen=True)
class _Flag:
    """An option.

    edits: path of the recipe's field that it sets, or value → {path: value}; None where
    `RecipeFlags` reads it.
    """

    kind: Any
    help: str
    edits: str | Callable[[Any], dict[str, Any]] | None = None
    default: Any = None
    hidden: bool = True

    def parameter(self, name: str) -> inspect.Parameter:
        """The option as a parameter of a command; without a default it may be left out."""
        kind = self.kind if self.default is not None else self.kind | None
        names = (f"--{name.replace('_', '-')}",) if self.kind is bool else ()  # without a --no-
        option = typer.Option(*names, help=self.help, hidden=self.hidden)
        kind = Annotated[kind, option]
        return inspect.Parameter(name, BY_NAME, default=self.default, annotation=kind)


_visible = partial(_Flag, hidden=False)


def _group_size(text: str) -> dict[str, Any]:
    size = int(text) if text.isdecimal() else text
    return {"weights.group_size": size, "weights.granularity": "group"}


def _asymmetric(asked: bool) -> dict[str, Any]:
    return {"weights.symmetric": False, "weights.group_scale": "float"} if asked else {}


def _activation_scales(scales: str) -> dict[str, Any]:
    static = scales == "static"
    granularity = "tensor" if static else scales
    return {"activations.static": static, "activations.granularity": granularity}


def _alpha(text: str) -> dict[str, Any]:
    try:
        return {"smoothing.alpha": float(text)}
    except ValueError:
        return {"smoothing.alpha": text}


FLAGS = {  # parameter of a command → its option, in the order of the help
    "w8a8": _visible(bool, "8-bit weights and activations.", default=False),
    "w4a8": _visible(bool, "4-bit weights, 8-bit activations.", default=False),
    "w4a4": _visible(bool, "4-bit weights and activations.", default=False),
    "w4a16": _visible(bool, "4-bit weights only.", default=False),
    "w3a16": _visible(bool, "3-bit weights only.", default=False),
    "w2a16": _visible(bool, "2-bit weights only.", default=False),
    "fp8": _visible(bool, "FP8 weights by channel, activations by token.", default=False),
    "fp8_block": _visible(bool, "FP8 in blocks of 128 x 128, as DeepSeek's.", default=False),
    "w4a8_fp8": _visible(bool, "4-bit weights, FP8 activations.", default=False),
    "mxfp8": _visible(bool, "MXFP8: FP8 in groups of 32, powers of two.", default=False),
    "mxfp4": _visible(bool, "MXFP4: FP4 in groups of 32, powers of two.", default=False),
    "nvfp4": _visible(bool, "NVFP4: FP4 in groups of 16, FP8 scales.", default=False),
    "w4a16_nvfp4": _visible(bool, "NVFP4 weights only.", default=False),
    "method": _visible(Method, "A paper's method at these bits; without it, our best."),
    "effort": _visible(
        Effort, "Time for accuracy: more text, more steps of tuning.", default="default"
    ),
    "rounding": _Flag(Literal["rtn", "gptq"], "Round to nearest, or GPTQ.", "weights.rounding"),
    "recipe": _visible(Path, "A YAML recipe in place of the flags above."),
    "alpha": _Flag(str, "Migration strength of smoothing, or auto to search it.", _alpha),
    "smooth_quantile": _Flag(
        float, "Smooth by this quantile in place of the maximum.", "smoothing.quantile"
    ),
    "edges": _Flag(
        str,
        "Smoothed edges: norms,up_down,value_output.",
        lambda text: {"smoothing.edges": text.split(",")},
    ),
    "group_size": _Flag(str, "Weights in groups of this many channels, or auto.", _group_size),
    "asymmetric": _Flag(bool, "Weights with zero points; --a-bits 16 only.", _asymmetric, False),
    "w_bits": _Flag(int, "Bits of a weight.", "weights.bits"),
    "a_bits": _Flag(int, "Bits of an activation; 16 is float.", "activations.bits"),
    "activation_scales": _Flag(
        Literal["token", "tensor", "static"],
        "One scale a token, a tensor, or a tensor calibrated (O1, O2, O3).",
        _activation_scales,
    ),
    "smooth_scope": _Flag(Scope, "Where runtime smoothing takes its scale from."),
    "keep": _Flag(
        list[str], "Leave these linears in float: a pattern of full names; repeatable.", "keep"
    ),
    "embeddings": _Flag(int, "Bits of embedding and head: 8, or 16 for float.", "embeddings"),
    "vision": _Flag(
        bool,
        "Quantize the linears of vision and audio towers too, to 8 bits.",
        lambda asked: {"vision": 8} if asked else {},
        False,
    ),
    "kv_bits": _Flag(
        int,
        "Bits of a cached key or value, 8 or 4; without it, float.",
        lambda bits: {"kv_cache": {"bits": bits}},
    ),
    "attention": _Flag(
        Attention,
        "Queries times keys in float or int8, the keys' mean removed or not.",
        "attention",
    ),
    "calibration": _visible(
        str, "wikitext2, c4, ptb, a data set id, a text file, or builtin.", "calibration.source"
    ),
    "split": _Flag(str, "Split of the calibration data set.", "calibration.split"),
    "text_column": _Flag(str, "Column of its text.", "calibration.text_column"),
    "samples": _Flag(int, "Calibration sequences.", "calibration.samples"),
    "sequence_length": _Flag(int, "Tokens a sequence.", "calibration.sequence_length"),
    "seed": _Flag(int, "Seed of rotations and of sampling.", "seed"),
    "dtype": _Flag(
        DtypeName, "dtype of all that is not quantized; auto is the model's own.", "dtype", "auto"
    ),
    "set": _visible(
        list[str], "Any field of the recipe: activations.bits=8, as in YAML; repeatable."
    ),
}


@dataclass(frozen=True)
class RecipeFlags:
    """What a command line gives for `FLAGS`, by parameter."""

    values: dict[str, Any]

    @property
    def name_a_recipe(self) -> bool:
        """Whether a preset or a file is among them."""
        return self.values["recipe"] is not None or bool(self._presets)

    def chosen(self) -> Recipe:
        """The recipe that the flags come to.

        Raises typer.BadParameter for flags that exclude each other, RecipeError for values that do
        not fit.
        """
        edits: dict[str, Any] = {}
        for name, value in self.values.items():
            path = FLAGS[name].edits
            if path is not None and value not in (None, []):
                edits |= {path: value} if isinstance(path, str) else path(value)
        return self._base().edit(edits | dict(map(_setting, self.values["set"] or ())))

    @property
    def _presets(self) -> list[Preset]:
        """The presets whose flags are given."""
        return [name for name in PRESETS if self.values[name.replace("-", "_")]]

    def _base(self) -> Recipe:
        """The preset, or the file, whose fields the other flags edit."""
        presets = self._presets
        file, method, scope, effort = (
            self.values[name] for name in ("recipe", "method", "smooth_scope", "effort")
        )
        if file is not None:
            if presets or method or scope or effort != "default":
                raise typer.BadParameter(
                    "--recipe replaces presets, --method, --smooth-scope, --effort"
                )
            return load_recipe(file)
        if len(presets) != 1:
            raise typer.BadParameter(f"give one of --{', --'.join(PRESETS)}, or --recipe FILE")
        return preset(presets[0], method, scope, effort)


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in the place of its parameter `flags`, one option for each of `FLAGS`."""
    options = [flag.parameter(name) for name, flag in FLAGS.items()]
    parameters = [
        parameter.replace(kind=BY_NAME)
        for name, given in inspect.signature(command, eval_str=True).parameters.items()
        for parameter in (options if name == "flags" else [given])
    ]

    @wraps(command)
    def taking(**values: Any) -> None:
        flags = RecipeFlags({name: values.pop(name) for name in FLAGS})
        command(flags=flags, **values)

    taking.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    taking.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return taking


def _setting(text: str) -> tuple[str, Any]:
    """A field's dotted path and its value, of `path=value`."""
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise typer.BadParameter(f"--set {text}: write it as section.field=value")
    try:
        return path.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"--set {text}: its value is no YAML") from error
