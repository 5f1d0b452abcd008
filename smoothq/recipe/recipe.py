"""What to do to a model, as one frozen, validated, serialisable value.

A preset is a Recipe, a command-line flag edits one field of it, and the whole of it is written
into the output's `config.json`. Nothing downstream reads flags.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import RecipeError, first_line
from ..moved import also_named

Method = Literal["rtn", "smoothquant", "quarot", "smoothrot", "rs", "rrs"]
Preset = Literal[
    "w8a8",
    "w4a8",
    "w4a4",
    "w4a16",
    "w3a16",
    "w2a16",
    "fp8",
    "fp8-block",
    "w4a8-fp8",
    "mxfp8",
    "mxfp4",
    "nvfp4",
    "w4a16-nvfp4",
]
# Bits, granularity and scales of floating-point weights: FP8, MXFP8, MXFP4, NVFP4.
FLOAT_WEIGHTS = {
    (8, "tensor", "float"),
    (8, "channel", "float"),
    (8, "block", "float"),
    (8, "group", "e8m0"),
    (4, "group", "e8m0"),
    (4, "group", "e4m3"),
}
CodeType = Literal["int", "float"]
ScaleType = Literal["float", "e8m0", "e4m3"]
Scope = Literal["token", "calibrated", "live"]
Effort = Literal["fast", "default", "best"]
Edge = Literal["norms", "up_down", "value_output"]
Alpha = Annotated[float, Field(ge=0, le=1)] | Literal["auto"]
Attention = Literal["float", "int8", "int8-centred"]
GroupSize = int | Literal["auto"]
_ABSENT = object()
FLOAT_BITS = 16  # "16-bit activations" are activations left in the model's float dtype


# What other libraries call a field, by section ("" is the recipe itself) → its name here. They are
# read in files, mappings and edits; what is written has our names.
OTHER_WORDS: dict[str, dict[str, str]] = {
    "": {"exclude": "keep", "ignore": "keep", "modules_to_not_convert": "keep"},
    "weights": {"num_bits": "bits", "strategy": "granularity", "sym": "symmetric"},
    "activations": {"num_bits": "bits", "strategy": "granularity"},
    "smoothing": {"smoothing_strength": "alpha"},
    "gptq": {
        "damp_percent": "damping",
        "dampening_frac": "damping",
        "desc_act": "activation_order",
    },
    "tuning": {"iters": "steps", "lr": "code_rate"},
    "calibration": {
        "dataset": "source",
        "max_seq_length": "sequence_length",
        "nsamples": "samples",
        "num_calibration_samples": "samples",
        "seqlen": "sequence_length",
    },
}


def _renamed(section: str, fields: Any) -> Any:
    """The fields of a section by their names here. Raises RecipeError for one given twice."""
    if not isinstance(fields, Mapping):
        return fields
    words = OTHER_WORDS.get(section, {})
    ours: dict[Any, Any] = {}
    for word, value in fields.items():
        name = words.get(word, word)
        if name in ours:
            where = f"{section}.{name}" if section else name
            raise RecipeError(f"recipe: {where} is given twice, once as {word}")
        ours[name] = value
    return ours


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _in_our_words(cls, fields: Any) -> Any:
        return _renamed("" if cls.__name__ == "Recipe" else cls.__name__.lower(), fields)


class Weights(_Section):
    """How weights are rounded.

    Attributes:
        type: codes are integers, or floating-point numbers: E4M3 of 8 bits, E2M1 of 4.
        bits: width of a code.
        granularity: one scale per tensor, per output channel, per group of input channels, or, of
            floating-point codes, per block of 128 x 128.
        group_size: input channels per group; "auto" is the largest of 128, 64, 32 that divides.
        group_scale: a group's scale as a 16-bit float, or as an integer multiplier of its row's
            scale, which keeps the matrix product an integer one. Of floating-point codes "e8m0", a
            power of two (MXFP8, MXFP4), or "e4m3", times a float32 of the matrix (NVFP4).
        clip: search the scale with the least squared rounding error; else it covers the maximum.
        full_range: signed scales, chosen so that the largest weight gets code -2^(bits - 1).
            Integer multipliers always are.
        symmetric: False adds a zero point per scale; needs float activations.
        rounding: to nearest, or GPTQ.
    """

    type: CodeType = "int"
    bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    granularity: Literal["tensor", "channel", "group", "block"] = "channel"
    group_size: GroupSize = "auto"
    group_scale: Literal["float", "multiplier", "e8m0", "e4m3"] = "float"
    clip: bool = False
    full_range: bool = False
    symmetric: bool = True
    rounding: Literal["rtn", "gptq"] = "rtn"


class Activations(_Section):
    """How the inputs of linears are quantized while the model runs.

    Attributes:
        type: codes are integers, or floating-point numbers: E4M3 of 8 bits, E2M1 of 4.
        bits: width of a code; 16 leaves the inputs in float.
        granularity: one scale per token, per tensor, or, of floating-point codes, per group of a
            token's channels.
        group_size: channels per group.
        group_scale: a group's scale as a float32, as a power of two ("e8m0"), or as E4M3 times a
            calibrated float32 of the tensor ("e4m3").
        static: one calibrated scale per tensor, rather than one computed at run time.
        clip_ratio: the value of the largest code, as a share of the maximum.
        full_range: signed scales per token, chosen so that the largest value gets code
            -2^(bits - 1). Scales of runtime smoothing always are.
    """

    type: CodeType = "int"
    bits: Literal[4, 5, 6, 7, 8, 16] = 8
    granularity: Literal["token", "tensor", "group"] = "token"
    group_size: int = Field(128, ge=1)
    group_scale: ScaleType = "float"
    static: bool = False
    clip_ratio: float = Field(1.0, gt=0, le=1)
    full_range: bool = False

    @property
    def is_float(self) -> bool:
        """Whether they are quantized to floating-point codes."""
        return self.type == "float" and self.bits != FLOAT_BITS

    @property
    def mixes_tokens(self) -> bool:
        """Whether a scale depends on all tokens of a forward."""
        return self.bits != FLOAT_BITS and self.granularity == "tensor" and not self.static

    @property
    def calibrates(self) -> bool:
        """Whether a scale comes from calibration text: static ones, and NVFP4's of a tensor."""
        return self.static or (self.is_float and self.group_scale == "e4m3")


class Smoothing(_Section):
    """SmoothQuant (Xiao et al. 2022, eq. 4): difficulty moved from activations to weights.

    Attributes:
        alpha: migration strength, for all edges or by edge; "auto" searches it per layer.
        edges: the places at which inputs of linears are divided: where the divisor can be folded
            into a norm, into the rows of up_proj, or into the rows of v_proj.
        quantile: of a channel's magnitudes, taken as its maximum; 1 is the maximum itself.
    """

    alpha: Alpha | dict[Edge, Alpha] = 0.5
    edges: tuple[Edge, ...] = ("norms", "up_down")
    quantile: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _an_alpha_for_each_edge(self) -> Smoothing:
        if isinstance(self.alpha, dict) and set(self.edges) - set(self.alpha):
            missing = ", ".join(sorted(set(self.edges) - set(self.alpha)))
            raise ValueError(f"alpha has no value for the edge {missing}")
        return self

    def alpha_of(self, edge: Edge | None) -> float | Literal["auto"]:
        """The migration strength at an edge, or `auto`."""
        if isinstance(self.alpha, dict):
            assert edge is not None
            return self.alpha[edge]
        return self.alpha


class Rotation(_Section):
    """Random Hadamard rotations (QuaRot and SpinQuant, whose R1, R2 and R4 they are).

    Attributes:
        residual: of the residual stream (R1), folded into weights; "online", of the input of each
            linear that reads it, behind its norm: then norms can be smoothed.
        value_output: of values per head (R2), folded into v_proj and o_proj.
        down: of the input of down_proj (R4), online.
        block_size: the order of the Hadamard matrices; None is the whole width. Blocks of a group's
            channels, or of several groups', leave each group's outliers near it. A width that it
            does not divide gets blocks of what divides both.
    """

    residual: bool | Literal["online"] = True
    value_output: bool = True
    down: bool = True
    block_size: int | None = Field(None, ge=2)


class KvCache(_Section):
    """How keys and values are cached: asymmetric codes, in groups within a head.

    Attributes:
        bits: width of a code.
        group_size: numbers that share a scale and an offset; "head" is all of a head; "auto" is
            "head" at 8 bits, and at 4 bits 32, or what else divides a head.
        rotate_keys: rotate queries and keys after their position embedding (R3), online; "auto"
            does so at 4 bits.
        float_tokens: number of first tokens of a sequence that stay in float beside their codes.
    """

    bits: Literal[4, 8] = 8
    group_size: int | Literal["head", "auto"] = "auto"
    rotate_keys: bool | Literal["auto"] = "auto"
    float_tokens: int = Field(0, ge=0)


class RuntimeSmoothing(_Section):
    """Runtime smoothing (Rotated Runtime Smooth, section 3): inputs divided by scales per channel.

    Attributes:
        scope: "live", the maximum over the tokens of the sequence, as in the paper (not causal);
            "calibrated", fixed per channel; "token", integer multipliers per token and group.
        group_size: channels that share a scale in "live" and "token"; 1 is a scale per channel.
        normalise: divide each token by its maximum first, so that all tokens weigh alike.
    """

    scope: Scope = "token"
    group_size: GroupSize = 16
    normalise: bool = False


class Gptq(_Section):
    """Settings of GPTQ (Frantar et al. 2022), used where `weights.rounding` is "gptq".

    Attributes:
        block_size: columns per block of updates.
        damping: added to the Hessian's diagonal, as a share of its mean.
        activation_order: round columns with the largest inputs first.
        least_tokens: an expert that fewer tokens reach is rounded to nearest.
    """

    block_size: int = Field(128, ge=1)
    damping: float = Field(0.01, gt=0)
    activation_order: bool = True
    least_tokens: int = Field(128, ge=1)


class Tuning(_Section):
    """Block-wise tuning of codes and scales after rounding. Its rates fall linearly to zero.

    Attributes:
        steps: per block, each on one micro-batch of calibration text.
        code_rate: how far a step moves the value that a code is rounded from, in codes.
        scale_rate: how far a step moves a scale, as a share of it.
    """

    steps: int = Field(32, ge=1)
    code_rate: float = Field(0.02, gt=0)
    scale_rate: float = Field(1e-3, ge=0)


class Calibration(_Section):
    """The text that activation statistics come from.

    Attributes:
        source: a data set's name, a local file, or "builtin".
        split: of the data set; None is its training split.
        text_column: of the data set; None is found by name.
        samples: number of sequences.
        sequence_length: tokens per sequence.
    """

    source: str = "wikitext2"
    split: str | None = None
    text_column: str | None = None
    samples: int = Field(32, ge=1)
    sequence_length: int = Field(1024, ge=2)


class Override(_Section):
    """Other number formats for some linears.

    All linears that read one tensor need the same activations.

    Attributes:
        match: a pattern of full module names, as in a shell.
        weights: the whole section in place of the recipe's.
        activations: the whole section in place of the recipe's.
        runtime_smoothing: of these activations; None leaves them without.
    """

    match: str
    weights: Weights | None = None
    activations: Activations | None = None
    runtime_smoothing: RuntimeSmoothing | None = None


class Recipe(_Section):
    """Everything that is done to a model: number formats, transforms, rounding, calibration.

    Attributes:
        name: how reports call it.
        weights: how weights are rounded.
        activations: how inputs of linears are quantized while the model runs.
        smoothing: SmoothQuant's migration, or None.
        rotation: Hadamard rotations, or None.
        runtime_smoothing: scales per channel computed while the model runs, or None.
        kv_cache: how keys and values are cached; None is in float. It acts on the finished model:
            calibration runs with float attention.
        attention: the product of queries and keys in float, or in int8 with a scale per head and
            token; "int8-centred" first subtracts the keys' mean over the tokens (SageAttention).
        gptq: settings of GPTQ.
        tuning: block-wise tuning after rounding, or None.
        calibration: the text that statistics come from.
        keep: patterns of full module names, as in a shell, that stay in float.
        overrides: other formats for some linears; the first that matches counts.
        embeddings: bits of embedding and head; 8 is one scale per row.
        vision: bits of the linears of vision and audio towers, projections included; 8 is one scale
            per row, and inputs in 8 bits per token unless the recipe leaves inputs in float.
        seed: of rotations and of sampling.
        dtype: of everything that stays float in the checkpoint; "auto" keeps each tensor's own.
    """

    name: str = "custom"
    weights: Weights = Weights()
    activations: Activations = Activations()
    smoothing: Smoothing | None = None
    rotation: Rotation | None = None
    runtime_smoothing: RuntimeSmoothing | None = None
    kv_cache: KvCache | None = None
    attention: Attention = "float"
    gptq: Gptq = Gptq()
    tuning: Tuning | None = None
    calibration: Calibration = Calibration()
    keep: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    embeddings: Literal[8, 16] = 16
    vision: Literal[8, 16] = 16
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        a, w, smooth = self.activations, self.weights, self.runtime_smoothing
        if a.static and a.granularity != "tensor":
            raise ValueError("static activations need granularity 'tensor'")
        if a.full_range and (a.granularity != "token" or smooth):
            raise ValueError("full_range is of one scale a token; a token's groups have it always")
        if a.bits == FLOAT_BITS and (smooth or a.static):
            raise ValueError("runtime smoothing and static scales need activations of ≤ 8 bits")
        if w.group_scale == "multiplier" and (w.granularity != "group" or w.bits != 4):
            raise ValueError("group_scale 'multiplier' needs 4-bit weights in groups")
        if not w.symmetric and a.bits != FLOAT_BITS:
            raise ValueError("weights with zero points need float activations: activations.bits=16")
        if not w.symmetric and (
            w.group_scale == "multiplier" or w.full_range or w.granularity == "tensor"
        ):
            raise ValueError("zero points go with positive float scales per channel or group")
        if self.tuning is not None and w.type == "int" and w.granularity == "tensor":
            raise ValueError("tuning learns a scale a row: it needs weights per channel or group")
        return self

    @model_validator(mode="after")
    def _consistent_floats(self) -> Recipe:
        if self.weights.type == "float":
            self._check_float_weights()
        elif self.weights.granularity == "block" or self.weights.group_scale in ("e8m0", "e4m3"):
            raise ValueError("blocks, e8m0 and e4m3 are of floating-point weights: weights.type")
        if self.activations.is_float:
            self._check_float_activations()
        elif self.activations.granularity == "group":
            raise ValueError("groups are of floating-point activations: activations.type")
        return self

    def _check_float_weights(self) -> None:
        a, w = self.activations, self.weights
        if (w.bits, w.granularity, w.group_scale) not in FLOAT_WEIGHTS:
            raise ValueError(
                f"floating-point weights of {w.bits} bits per {w.granularity} with scales "
                f"{w.group_scale} are no format: take bits 8 per tensor, channel or block, bits 8 "
                "or 4 per group with e8m0 (MX), or bits 4 per group with e4m3 (NVFP4)"
            )
        if not w.symmetric or w.full_range:
            raise ValueError("zero points and full_range are of integer weights")
        if a.bits != FLOAT_BITS and not a.is_float:
            raise ValueError(
                "floating-point weights need activations of the kind: activations.type 'float', "
                "or activations.bits 16"
            )

    def _check_float_activations(self) -> None:
        a = self.activations
        if self.weights.group_scale == "multiplier":
            raise ValueError(
                "integer multipliers of groups have no use beside floating-point activations: "
                "weights.group_scale 'float'"
            )
        if a.bits not in (4, 8) or (a.bits == 4 and a.group_scale == "float"):
            raise ValueError(
                "floating-point activations have 8 bits, or 4 in groups with scales e8m0 or e4m3"
            )
        if a.group_scale != "float" and a.granularity != "group":
            raise ValueError(f"scales {a.group_scale} are of groups: activations.granularity")
        if a.clip_ratio != 1 or a.full_range or self.runtime_smoothing is not None:
            raise ValueError(
                "clip_ratio, full_range and runtime smoothing are of integer activations"
            )

    @model_validator(mode="after")
    def _consistent_smoothing(self) -> Recipe:
        a, w, smooth = self.activations, self.weights, self.runtime_smoothing
        if smooth is None:
            return self
        if a.granularity != "token":
            raise ValueError("runtime smoothing needs activations quantized per token")
        from ..kernels import MULTIPLIED_BITS  # imports torch, which most of a recipe needs not

        integer = smooth.scope != "live" or smooth.group_size == 1
        if integer and a.bits > MULTIPLIED_BITS:
            raise ValueError(
                f"runtime smoothing by integer multipliers has no room beside {a.bits}-bit codes;"
                " use activations.bits=4, or runtime_smoothing.scope=live with groups"
            )
        if smooth.scope == "live" and w.granularity == "group" and w.group_scale == "float":
            raise ValueError(
                "live runtime smoothing reorders the channels, which breaks float weight groups;"
                " use per-channel weights or group_scale 'multiplier'"
            )
        return self

    @model_validator(mode="after")
    def _consistent_attention(self) -> Recipe:
        cache, attention = self.kv_cache, self.attention
        if cache is None or attention == "float":
            return self
        if attention == "int8-centred":
            raise ValueError("the keys of a kv_cache are codes already; use attention 'int8'")
        if cache.group_size not in ("head", "auto") or cache.float_tokens:
            raise ValueError(
                f"attention '{attention}' needs a kv_cache of one group a head, first tokens"
                " included: group_size 'head', float_tokens 0"
            )
        return self

    @property
    def quantizes_attention(self) -> bool:
        """Whether keys, values or their products are quantized."""
        return self.kv_cache is not None or self.attention != "float"

    @property
    def rotates(self) -> Rotation:
        """`rotation`, with every field False where the recipe has none."""
        return self.rotation or Rotation(residual=False, value_output=False, down=False)

    @property
    def calibrates(self) -> bool:
        """Whether the recipe, or a format of some linears, looks at calibration text at all."""
        return (
            self.smoothing is not None
            or self.tuning is not None
            or any(form.weights and form.weights.rounding == "gptq" for form in self._formats)
            or any(form.activations and form.activations.calibrates for form in self._formats)
            or "calibrated" in self._scopes
        )

    @property
    def _formats(self) -> tuple[Recipe | Override, ...]:
        """Itself, and the formats of some linears."""
        return (self, *self.overrides)

    @property
    def _scopes(self) -> set[Scope]:
        """Of runtime smoothing, of any linear."""
        smoothings = [form.runtime_smoothing for form in self._formats]
        return {smoothing.scope for smoothing in smoothings if smoothing is not None}

    @property
    def sees_quantized(self) -> bool:
        """Whether calibration must see the activations of the blocks already quantized.

        SmoothQuant's maxima are those of the float model, as in the paper.
        """
        return self.edit(smoothing=None).calibrates

    @property
    def causal(self) -> bool:
        """Whether a token's result never depends on later tokens, padding or the batch."""
        activations = [form.activations for form in self._formats if form.activations is not None]
        mixes_tokens = any(a.mixes_tokens for a in activations) or "live" in self._scopes
        return not mixes_tokens and self.attention != "int8-centred"

    def for_module(self, module: str) -> Recipe:
        """The recipe of one linear, by its full name: this one, or the first override that matches.

        Raises RecipeError where an override's sections do not go together.
        """
        override = self.override(module)
        if override is None:
            return self
        values: dict[str, Any] = {"overrides": ()}
        if override.weights is not None:
            values["weights"] = override.weights.model_dump()
        if override.activations is not None:
            smooth = override.runtime_smoothing
            values["activations"] = override.activations.model_dump()
            values["runtime_smoothing"] = smooth and smooth.model_dump()
        return self.edit(**values)

    of: ClassVar[Callable[[Recipe, str], Recipe]] = also_named("of", for_module)

    def for_tower(self, module: str) -> Recipe | None:
        """The recipe of a linear of a vision or audio tower; None where it stays in float.

        It is quantized if `vision` says so, or an override gives it weights.

        Raises RecipeError for activations that a tower's linear cannot have.
        """
        override = self.override(module)
        named = override is not None and override.weights is not None
        if self.keeps(module) or (self.vision == FLOAT_BITS and not named):
            return None
        bits = FLOAT_BITS if self.activations.bits == FLOAT_BITS else 8
        plain = self.edit(
            weights=Weights().model_dump(),
            activations=Activations(bits=bits).model_dump(),
            **dict.fromkeys(("smoothing", "runtime_smoothing", "tuning", "rotation")),
        )
        recipe = plain.for_module(module)
        if recipe.activations.granularity != "token" or recipe.runtime_smoothing is not None:
            raise RecipeError(
                f"{module} is a linear of a tower, whose inputs have one scale a token or stay in "
                "float: its override asks for others"
            )
        return recipe

    def override(self, module: str) -> Override | None:
        """The first override that matches a linear, by its full name."""
        matching = (override for override in self.overrides if fnmatchcase(module, override.match))
        return next(matching, None)

    def renamed(self, rename: Callable[[str], str], modules: Collection[str]) -> Recipe:
        """The recipe with its patterns in other names, of a model with fewer modules.

        Args:
            rename: a module's or a pattern's name → its name in that model.
            modules: names of its linears; patterns that match none are left out.
        """

        def known(pattern: str) -> bool:
            return any(fnmatchcase(module, pattern) for module in modules)

        overrides = [
            entry.model_copy(update={"match": rename(entry.match)}) for entry in self.overrides
        ]
        return self.edit(
            keep=[pattern for pattern in map(rename, self.keep) if known(pattern)],
            overrides=[entry for entry in overrides if known(entry.match)],
        )

    @property
    def names_modules(self) -> bool:
        """Whether linears may differ by their names."""
        return bool(self.keep or self.overrides)

    def keeps(self, module: str) -> bool:
        """Whether a linear, by its full name, stays in float."""
        return any(fnmatchcase(module, pattern) for pattern in self.keep)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file. Raises RecipeError naming the file or the field."""
        return load_recipe(Path(path))

    @classmethod
    def from_pretrained(cls, model: str | Path) -> Recipe:
        """The recipe of a checkpoint that `quantize` wrote, from its config.

        Args:
            model: a directory or a hub id.

        Raises RecipeError where its config cannot be read or holds no recipe of smoothq.
        """
        from transformers import PretrainedConfig

        try:
            config, _ = PretrainedConfig.get_config_dict(str(model))
        except OSError as error:
            raise RecipeError(f"{model} has no config: {first_line(error)}") from error
        quantization = config.get("quantization_config") or {}
        if quantization.get("quant_method") != "smoothq":
            raise RecipeError(f"{model} is not quantized by smoothq: its config has no recipe")
        return recipe_from_dict(quantization.get("recipe", {}))

    def edit(self, fields: Mapping[str, Any] | None = None, /, **others: Any) -> Recipe:
        """A copy with fields replaced.

        Args:
            fields: by their dotted paths: `{"calibration.source": "builtin"}`. A mapping for a
                section that is there replaces those of its fields that the mapping names.
            others: the same as keywords, with `section__field=value` for what lies in a section.

        Raises RecipeError for an unknown field or a value that does not fit.
        """
        values: dict[str, Any] = self.model_dump()
        for path, value in {**(fields or {}), **others}.items():
            *sections, leaf = path.replace("__", ".").split(".")
            leaf = OTHER_WORDS.get(".".join(sections), {}).get(leaf, leaf)
            value = value if sections else _renamed(leaf, value)
            target: Any = values
            for name in sections:
                target = target.get(name, _ABSENT) if isinstance(target, dict) else _ABSENT
                if target is None:
                    raise RecipeError(
                        f"recipe '{self.name}' has no {name.replace('_', ' ')} to set {leaf} of"
                    )
            if not isinstance(target, dict):
                raise RecipeError(f"a recipe has no field '{path}'")
            section = None if sections else target.get(leaf)
            if isinstance(value, Mapping) and isinstance(section, dict):
                target[leaf] = section | dict(value)
            else:
                target[leaf] = value
        return validated(values)

    def to_yaml(self) -> str:
        """The recipe as YAML, every field written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def validated(values: Any) -> Recipe:
    """The recipe of given fields. Raises RecipeError naming the first that is wrong."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"recipe: {where + ': ' if where else ''}{message}") from error


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe in a checkpoint's config. Raises RecipeError naming the field at fault."""
    return validated(values)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file. Raises RecipeError naming the file or the field at fault."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read recipe {path}: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} is not a mapping of fields; see Recipe.to_yaml()")
    return validated(values)
