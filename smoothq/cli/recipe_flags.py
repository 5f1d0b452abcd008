"""The flags that make a recipe, for every command that takes one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
import yaml

from ..recipe.presets import preset
from ..recipe.recipe import (
    Attention,
    Effort,
    Method,
    Preset,
    Recipe,
    Scope,
    load_recipe,
)

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class RecipeFlags:
    """One option a field; see `takes_recipe`."""

    w8a8: Annotated[bool, typer.Option("--w8a8", help="8-bit weights and activations.")] = False
    w4a8: Annotated[bool, typer.Option("--w4a8", help="4-bit weights, 8-bit activations.")] = False
    w4a4: Annotated[bool, typer.Option("--w4a4", help="4-bit weights and activations.")] = False
    w4a16: Annotated[bool, typer.Option("--w4a16", help="4-bit weights only.")] = False
    method: Annotated[
        Method | None, typer.Option(help="A paper's method at these bits; without it, our best.")
    ] = None
    effort: Annotated[
        Effort, typer.Option(help="Time for accuracy: more text, more steps of tuning.")
    ] = "default"
    rounding: Annotated[
        Literal["rtn", "gptq"] | None, typer.Option(help="Round to nearest, or GPTQ.", hidden=True)
    ] = None
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML recipe in place of the flags above.")
    ] = None
    alpha: Annotated[
        str | None,
        typer.Option(help="Migration strength of smoothing, or auto to search it.", hidden=True),
    ] = None
    smooth_quantile: Annotated[
        float | None,
        typer.Option(help="Smooth by this quantile in place of the maximum.", hidden=True),
    ] = None
    edges: Annotated[
        str | None, typer.Option(help="Smoothed edges: norms,up_down,value_output.", hidden=True)
    ] = None
    group_size: Annotated[
        str | None,
        typer.Option(help="Weights in groups of this many channels, or auto.", hidden=True),
    ] = None
    asymmetric: Annotated[
        bool,
        typer.Option(
            "--asymmetric", help="Weights with zero points; --a-bits 16 only.", hidden=True
        ),
    ] = False
    w_bits: Annotated[int | None, typer.Option(help="Bits of a weight.", hidden=True)] = None
    a_bits: Annotated[
        int | None, typer.Option(help="Bits of an activation; 16 is float.", hidden=True)
    ] = None
    activation_scales: Annotated[
        Literal["token", "tensor", "static"] | None,
        typer.Option(
            help="One scale a token, a tensor, or a tensor calibrated (O1, O2, O3).", hidden=True
        ),
    ] = None
    smooth_scope: Annotated[
        Scope | None,
        typer.Option(help="Where runtime smoothing takes its scale from.", hidden=True),
    ] = None
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave these linears in float: a pattern of full names; repeatable.", hidden=True
        ),
    ] = None
    embeddings: Annotated[
        int | None,
        typer.Option(help="Bits of embedding and head: 8, or 16 for float.", hidden=True),
    ] = None
    kv_bits: Annotated[
        int | None,
        typer.Option(help="Bits of a cached key or value, 8 or 4; without it, float.", hidden=True),
    ] = None
    attention: Annotated[
        Attention | None,
        typer.Option(
            help="Queries times keys in float or int8, the keys' mean removed or not.", hidden=True
        ),
    ] = None
    calibration: Annotated[
        str | None,
        typer.Option(help="wikitext2, c4, ptb, a data set id, a text file, or builtin."),
    ] = None
    split: Annotated[
        str | None, typer.Option(help="Split of the calibration data set.", hidden=True)
    ] = None
    text_column: Annotated[str | None, typer.Option(help="Column of its text.", hidden=True)] = None
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.", hidden=True)] = None
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a sequence.", hidden=True)] = (
        None
    )
    seed: Annotated[
        int | None, typer.Option(help="Seed of rotations and of sampling.", hidden=True)
    ] = None
    dtype: Annotated[
        DtypeName,
        typer.Option(
            help="dtype of all that is not quantized; auto is the model's own.", hidden=True
        ),
    ] = "auto"

    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any field of the recipe: activations.bits=8, as in YAML; repeatable."
        ),
    ] = None

    def chosen(self) -> Recipe:
        """The recipe that the flags come to.

        Raises typer.BadParameter for flags that exclude each other, RecipeError for values that do
        not fit.
        """
        size, scales = self.group_size, self.activation_scales
        edits = {
            "weights__rounding": self.rounding,
            "weights__group_size": None if size is None else _int_or_auto(size),
            "weights__granularity": None if size is None else "group",
            "weights__bits": self.w_bits,
            "weights__symmetric": False if self.asymmetric else None,
            "weights__group_scale": "float" if self.asymmetric else None,
            "activations__bits": self.a_bits,
            "activations__static": None if scales is None else scales == "static",
            "activations__granularity": "tensor" if scales == "static" else scales,
            "smoothing__alpha": None if self.alpha is None else _float_or_auto(self.alpha),
            "smoothing__quantile": self.smooth_quantile,
            "smoothing__edges": None if self.edges is None else self.edges.split(","),
            "keep": self.keep or None,
            "embeddings": self.embeddings,
            "kv_cache": None if self.kv_bits is None else {"bits": self.kv_bits},
            "attention": self.attention,
            "calibration__source": self.calibration,
            "calibration__split": self.split,
            "calibration__text_column": self.text_column,
            "calibration__samples": self.samples,
            "calibration__sequence_length": self.sequence_length,
            "seed": self.seed,
            "dtype": self.dtype,
        }
        given = {path: value for path, value in edits.items() if value is not None}
        return self._base().edit(given | dict(map(_setting, self.settings or ())))

    def _base(self) -> Recipe:
        """The preset, or the file, whose fields the other flags edit."""
        bits: dict[Preset, bool] = {
            "w8a8": self.w8a8,
            "w4a8": self.w4a8,
            "w4a4": self.w4a4,
            "w4a16": self.w4a16,
        }
        presets = [name for name, wanted in bits.items() if wanted]
        if self.recipe is not None:
            if presets or self.method or self.smooth_scope or self.effort != "default":
                raise typer.BadParameter(
                    "--recipe replaces --w…, --method, --smooth-scope, --effort"
                )
            return load_recipe(self.recipe)
        if len(presets) != 1:
            raise typer.BadParameter(
                "give one of --w8a8, --w4a8, --w4a4, --w4a16, or --recipe FILE"
            )
        return preset(presets[0], self.method, self.smooth_scope, self.effort)


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in the place of its parameter `flags: RecipeFlags`, one option a field."""
    hints = get_type_hints(RecipeFlags, include_extras=True)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(RecipeFlags)
    ]
    parameters_of_command = {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in parameters_of_command.items():
        parameters += options if name == "flags" else [parameter]

    @functools.wraps(command)
    def taking(**values: Any) -> None:
        flags = RecipeFlags(**{option.name: values.pop(option.name) for option in options})
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


def _float_or_auto(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _int_or_auto(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
