"""Side files: the files beside a model's weights that are copied into an output.

Copied are files with a suffix of `SUFFIXES` and files that are named like a licence, up to
`LARGEST_BYTES` each, from the folder itself and from its `DIRECTORIES`. Not copied are weights in
any format, leftovers of training, and files that the output gets anew, such as `config.json`.
Python files are copied, never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from shutil import copyfile

from transformers import GenerationConfig

from ..data.tokenizer import Processor
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
LARGEST_BYTES = 100 << 20  # of one file; the largest tokenizers have some 40 MB
_LEGAL_WORDS = ("license", "licence", "notice", "policy", "copying", "copyright", "patents")
_LEGAL = re.compile("|".join(_LEGAL_WORDS), re.IGNORECASE)
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf"})
# Files that the output gets anew, or that describe the original weights, another format or another
# quantization.
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
# Files that are never copied and need not be reported as left out.
_EXPECTED = (CONFIG, CARD, MANIFEST, "*.index.json", "*.safetensors", "pytorch_model*.bin")
# Patterns of the files to download from a hub repo beside its weights.
DOWNLOADED = (
    *(f"*{suffix}" for suffix in sorted({*SUFFIXES, ".md"})),
    *(f"*{word}*" for lower in _LEGAL_WORDS for word in (lower, lower.capitalize(), lower.upper())),
)


@dataclass(frozen=True)
class SideFiles:
    """The files that go beside the weights of an output.

    Attributes:
        files: name in the output (relative, with `/`) → path of the original, which is copied.
        left_out: names in the model's folder that are not copied; directories end with `/`.
        tokenizer: an object, or a processor, to write with `save_pretrained`, instead of files.
        generation_config: an object to write as `generation_config.json`.
    """

    files: dict[str, Path]
    left_out: tuple[str, ...] = ()
    tokenizer: Processor | None = None
    generation_config: GenerationConfig | None = None

    @classmethod
    def of(cls, directory: Path) -> SideFiles:
        """Collect the side files of a model's folder.

        Raises:
            CheckpointError: for a side file that cannot be read.
        """
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

    def with_tokenizer(self, tokenizer: Processor | None) -> SideFiles:
        """Return a copy with this tokenizer instead of the folder's tokenizer files.

        Args:
            tokenizer: None keeps the folder's files.
        """
        if tokenizer is None:
            return self
        files = {name: path for name, path in self.files.items() if not is_of_tokenizer(name)}
        return replace(self, files=files, tokenizer=tokenizer)

    def write(self, directory: Path) -> None:
        """Copy the files and write the objects into a directory.

        Raises:
            OSError: if the disk refuses.
            CheckpointError: as `write_objects` does.
        """
        for name, path in self.files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            copyfile(path, directory / name)
        self.write_objects(directory)

    def write_objects(self, directory: Path) -> None:
        """Write the generation config and the tokenizer, where they are objects, into a directory.

        Raises:
            OSError: if the disk refuses.
            CheckpointError: if an object cannot be written as JSON.
        """
        for what, write in (
            ("generation config", self._write_generation_config),
            ("tokenizer", self._write_tokenizer),
        ):
            try:
                write(directory)
            except OSError:
                raise
            except Exception as error:  # transformers has no common base for bad content
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
    """Whether a file is copied beside the weights, judged by its name.

    Args:
        name: relative to the model's folder, with `/`.
    """
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
    """Whether a file is one of a tokenizer's, rather than a processor's or the model's."""
    return _is_one_of(name, _TOKENIZER)


def has_tokenizer(directory: Path) -> bool:
    """Whether a folder holds a file that a tokenizer can be loaded from."""
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
    """(name, path) of a folder's files, other directories, and files in `DIRECTORIES`.

    Hidden names and `__pycache__` are skipped.
    """
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
    """Rewrite a JSON file without whitespace, which is half of a tokenizer file's bytes."""
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        compact = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        path.write_text(compact, encoding="utf-8")
