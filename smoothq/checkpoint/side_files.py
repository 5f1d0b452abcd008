"""What lies beside a model's weights and goes along with them: by kind, never by a model's name.

Of a folder's files those go along that a loader may want, or that the law wants: files of
`SUFFIXES`, up to `LARGEST_BYTES` each, and what is named like a licence; of its directories
`DIRECTORIES` alone. Weights in any form, training's leftovers, other formats and all that is
written anew stay behind. Code is copied, never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from shutil import copyfile

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..errors import CheckpointError, first_line
from .manifest import MANIFEST

CONFIG = "config.json"
CARD = "README.md"
GENERATION_CONFIG = "generation_config.json"
TEMPLATES = "additional_chat_templates"
SUFFIXES = frozenset(
    {".json", ".jinja", ".jinja2", ".txt", ".py", ".model", ".tiktoken", ".vocab", ".bpe", ".spm"}
)
DIRECTORIES = (TEMPLATES, "custom_generate")
LARGEST_BYTES = 100 << 20  # of a file; the largest tokenizers have some 40 MB
_LEGAL_WORDS = ("license", "licence", "notice", "policy", "copying", "copyright", "patents")
_LEGAL = re.compile("|".join(_LEGAL_WORDS), re.IGNORECASE)
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf"})
# Written anew; or true of the weights as they were, in another format or another quantization.
_LEFT = (
    *(CONFIG, CARD, MANIFEST, "*.index.json", "params.json", "model_index.json"),
    *("*quant*config.json", "adapter_config.json", "zero_to_fp32.py"),
    *("trainer_state.json", "training_args.json", "*_results.json"),
)
_VOCABULARY = ("tokenizer*", "vocab*", "*.tiktoken", "*.model", "*.spm", "tekken.json")
_TOKENIZER = (
    *(*_VOCABULARY, "special_tokens_map.json", "added_tokens.json", "merges.txt", "*.bpe"),
    *("chat_template.jinja", f"{TEMPLATES}/*"),
)
# Of these it is no news that they stay behind.
_EXPECTED = (CONFIG, CARD, MANIFEST, "*.index.json", "*.safetensors", "pytorch_model*.bin")
# What to download of a repo beside its weights.
DOWNLOADED = (
    *(f"*{suffix}" for suffix in sorted({*SUFFIXES, ".md"})),
    *(f"*{word}*" for each in _LEGAL_WORDS for word in (each, each.capitalize(), each.upper())),
)


@dataclass(frozen=True)
class SideFiles:
    """What goes beside the weights of an output.

    files: by their names in the output, relative, with `/`. left_out: names of what a folder holds
    besides, a directory's with a `/` at its end. tokenizer, generation_config: what is there as an
    object, and is written as its own method writes it.
    """

    files: dict[str, Path]
    left_out: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    generation_config: GenerationConfig | None = None

    @classmethod
    def of(cls, directory: Path) -> SideFiles:
        """What of a folder goes along. Raises CheckpointError for a file that cannot be read."""
        files, left_out = {}, []
        for name, path in _entries(directory):
            if goes_along(name) and path.is_file() and path.stat().st_size <= LARGEST_BYTES:
                _refuse_unreadable(path)
                files[name] = path
            elif not _is_one_of(name, _EXPECTED):
                left_out.append(name)
        return cls(files, tuple(left_out))

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> SideFiles:
        """The same with another tokenizer, if one is given, in place of the folder's."""
        if tokenizer is None:
            return self
        files = {name: path for name, path in self.files.items() if not is_of_tokenizer(name)}
        return replace(self, files=files, tokenizer=tokenizer)

    def write(self, directory: Path) -> None:
        """Put all into a directory. Raises OSError, or as `write_objects` does."""
        for name, path in self.files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            copyfile(path, directory / name)
        self.write_objects(directory)

    def write_objects(self, directory: Path) -> None:
        """Put into a directory what is not copied. Raises CheckpointError for what is no JSON."""
        for what, write in (
            ("generation config", self._write_generation_config),
            ("tokenizer", self._write_tokenizer),
        ):
            try:
                write(directory)
            except OSError:
                raise
            except Exception as error:  # whatever transformers makes of an object's content
                raise CheckpointError(
                    f"the model's {what} cannot be written: {first_line(error)}"
                ) from error

    def _write_generation_config(self, directory: Path) -> None:
        # Not `save_pretrained`, which refuses to write what it would load with a warning.
        if self.generation_config is not None:
            path = directory / GENERATION_CONFIG
            self.generation_config.to_json_file(path, use_diff=True, keys_to_pop=["compile_config"])

    def _write_tokenizer(self, directory: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
            _without_spaces(directory / "tokenizer.json")


def goes_along(name: str) -> bool:
    """Whether a file of this name, relative to its folder, goes along with the weights."""
    directory, _, file = name.rpartition("/")
    if directory and directory not in DIRECTORIES:
        return False
    suffix = Path(file).suffix.lower()
    if suffix in _WEIGHTS or _is_one_of(file, _LEFT):
        return False
    return suffix in SUFFIXES or is_legal(file)


def is_legal(name: str) -> bool:
    """Whether a file is named like a licence, a notice or a policy."""
    return _LEGAL.search(name) is not None


def is_of_tokenizer(name: str) -> bool:
    """Whether a file belongs to the tokenizer, not to a processor or to the model."""
    return _is_one_of(name, _TOKENIZER)


def has_tokenizer(directory: Path) -> bool:
    """Whether a folder holds any file that a tokenizer could be made of."""
    return any(_is_one_of(path.name, _VOCABULARY) for path in directory.iterdir())


def _refuse_unreadable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(
            f"{path} goes along with the model, but cannot be read: {error.strerror}"
        ) from error


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _entries(directory: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths of a folder, and of the directories in it that go along; none hidden."""
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if not path.is_dir():
            yield path.name, path
        elif path.name not in DIRECTORIES:
            yield f"{path.name}/", path
        else:
            for inner in sorted(path.iterdir()):
                if inner.is_file() and not inner.name.startswith("."):
                    yield f"{path.name}/{inner.name}", inner


def _without_spaces(path: Path) -> None:
    """Write a JSON file again without the whitespace, which is half of a tokenizer's."""
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        compact = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        path.write_text(compact, encoding="utf-8")
