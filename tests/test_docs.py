"""The manual against the code: links, commands, program text, paths, recipe fields."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from pydantic import BaseModel

from smoothq.cli import app
from smoothq.recipe.recipe import OTHER_WORDS, Override, Recipe

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    ROOT / "kernels" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
MANUAL = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which speaks of the past too
FENCE = re.compile(r"^```(\S*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
PATH = re.compile(r"(?:smoothq|kernels|scripts|tests|examples|benchmarks|docs)/[\w./*-]*")
LOCAL = re.compile(r"\]\(([^)\s]+)\)")
COMMANDS = typer.main.get_command(app).commands
OPERATORS = {"|", "||", "&&", ";", "<", ">", ">>", "&"}
FOREIGN = {  # flags of other programs that the manual speaks of
    *("--kv-cache-dtype", "--linear-backend", "--pipeline-parallel-size"),
    *("--tensor-parallel-size", "--readme"),
}


def flags_of(command: str) -> set[str]:
    """The flags that a command has."""
    parameters = COMMANDS[command].params
    found = {flag for each in parameters for flag in (*each.opts, *each.secondary_opts)}
    return found | {"--help", "--debug"}


ALL_FLAGS = set().union(*map(flags_of, COMMANDS))


def fences(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language on a page."""
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def words_of(text: str) -> Iterator[list[str]]:
    """The words of each simple command in shell text."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in OPERATORS:
                words.append(word)
            elif words:
                yield words
                words = []


def wrong_in(words: list[str]) -> list[str]:
    """What of a `smoothq …` command line does not exist; nothing for other programs."""
    if "smoothq" not in words[:1] and words[max(0, words.index("smoothq") - 1)] != "-m":
        return []
    _, *arguments = words[words.index("smoothq") :]
    if not arguments or arguments[0] == "COMMAND":
        return []
    if arguments[0] not in COMMANDS:
        return [f"no command {arguments[0]}"]
    known = flags_of(arguments[0])
    given = [word.partition("=")[0] for word in arguments[1:] if word.startswith("-")]
    return [f"{arguments[0]} has no {flag}" for flag in given if flag not in known and flag != "-"]


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def test_slugs_are_githubs(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`: three!\n## A → B\n## A → B\n```sh\n# no heading\n```\n## kv_cache\n"
    )
    assert anchors(page) == {"one-two-three", "a--b", "a--b-1", "kv_cache"}


def test_wrong_commands_are_found() -> None:
    lines = (
        "torchrun -m smoothq quantize M --w9a9 -o OUT && smoothq evil | smoothq eval \\\n --gone"
    )
    found = [wrong for words in words_of(lines) for wrong in wrong_in(words)]
    assert found == ["quantize has no --w9a9", "no command evil", "eval has no --gone"]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
class TestEveryPage:
    def test_links_resolve(self, page: Path) -> None:
        wrong = []
        for target in LOCAL.findall(prose(page)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            if not there.exists() or (anchor and anchor not in anchors(there)):
                wrong.append(target)
        assert not wrong

    def test_programs_compile(self, page: Path) -> None:
        for number, text in enumerate(fences(page, "python")):
            compile(text, f"{page.name}, program {number}", "exec")

    def test_commands_exist(self, page: Path) -> None:
        wrong = []
        for text in fences(page, "sh"):
            for words in words_of(text):
                wrong += wrong_in(words) if "smoothq" in words else []
        assert not wrong


@pytest.mark.parametrize("page", MANUAL, ids=names(MANUAL))
class TestTheManual:
    def test_named_commands_and_flags_exist(self, page: Path) -> None:
        scripts = "".join(path.read_text() for path in (ROOT / "scripts").glob("*.py"))
        wrong = []
        for span in SPAN.findall(prose(page)):
            text = " ".join(span.split())
            if re.match(r"smoothq [a-z]", text):
                wrong += [each for words in words_of(text) for each in wrong_in(words)]
            elif text.startswith("--"):
                flags = re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", text)
                known = ALL_FLAGS | FOREIGN
                wrong += [f for f in flags if f not in known and f'"{f}"' not in scripts]
        assert not wrong

    def test_named_files_exist(self, page: Path) -> None:
        wrong = []
        for span in SPAN.findall(prose(page)):
            for path in PATH.findall(span) if "NAME" not in span else ():
                wrong += [path] if not list(ROOT.glob(path.rstrip("."))) else []
        assert not wrong


def test_the_readme_is_a_front_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "make test" in text


def test_the_readme_quotes_the_benchmarks() -> None:
    pages = [path.read_text() for path in (ROOT / "docs" / "benchmarks").glob("*.md")]
    sections = re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    for name, least in (("Accuracy", 6), ("Speed", 4)):
        (section,) = [each for each in sections if each.startswith(name)]
        rows = [line for line in section.splitlines() if line.startswith("|") and "---" not in line]
        assert len(rows) > least
        assert not [row for row in rows if not any(row in page for page in pages)]


def test_every_page_is_reached_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    targets = (target.partition("#")[0] for target in LOCAL.findall(prose(index)))
    linked = {(index.parent / target).resolve() for target in targets}
    assert not set((ROOT / "docs").rglob("*.md")) - {index} - linked


def test_every_recipe_field_is_in_the_manual() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    fields = {name: [f"`{name}`"] for name in Recipe.model_fields}
    for name, field in Recipe.model_fields.items():
        for section in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(section, type) and issubclass(section, BaseModel):
                prefix = "overrides[]" if section is Override else name
                fields[name] += [f"`{prefix}.{leaf}`" for leaf in section.model_fields]
    missing = [each for paths in fields.values() for each in paths if each not in text]
    assert not missing
    assert sum(map(len, fields.values())) > 50


def test_the_manual_s_defaults_are_the_recipe_s() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text().partition("## The words")[0]
    values = Recipe().model_dump(mode="json")
    for name in ("smoothing", "rotation", "runtime_smoothing", "kv_cache", "tuning"):
        section = Recipe.model_fields[name].annotation.__args__[0]
        values[name] = section().model_dump(mode="json")
    checked = 0
    for path, default in re.findall(r"^\| `([\w.]+)` \| (`[^`]+`|[^|,…]+)", text, re.M):
        section, _, field = path.rpartition(".")
        value = (values[section] if section else values).get(field)
        if section in ("", *values) and not isinstance(value, dict):
            shown = default.strip(" `")
            assert (value is None or value == []) == (shown == "none"), path
            assert shown == "none" or yaml.safe_load(shown) == value, path
            checked += 1
    assert checked > 30


def test_the_words_of_other_libraries_are_those_that_a_recipe_reads() -> None:
    """In the manual's table, all but the words in italics are read, and only they."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| (.+?) \|(.+)\|$", text.partition("## The words of other")[2], re.M)
    printed = set()
    for fields, words in rows:
        names = [name.rpartition(".") for name in SPAN.findall(fields)]
        for word in SPAN.findall(re.sub(r"\*[^*]+\*", "", words)):
            printed |= {(section, word, name) for section, _, name in names if name != word}
    read = {
        (section, word, name)
        for section, words in OTHER_WORDS.items()
        for word, name in words.items()
    }
    assert read <= printed
    assert {word for _, word, _ in printed} == {word for _, word, _ in read}
