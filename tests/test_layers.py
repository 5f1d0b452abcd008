"""Each package imports only packages that stand below it; the kernels know nothing of smoothq."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from smoothq import moved

LAYERS = [  # from the ground up; names on one line do not import one another
    {"errors", "progress", "version", "compat", "moved"},
    {"recipe", "architectures", "runtime", "data"},
    {"transforms", "rounding", "checkpoint"},
    {"modules"},
    {"discovery"},
    {"plan"},
    {"report", "verify"},
    {"evaluation"},
    {"pipeline", "integrations", "hub"},
    {"export", "inspection"},
    {"api"},
    {"advisor"},
    {"cli", "lm_eval"},
    {"__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}
ROOT = Path(__file__).parent.parent / "smoothq"
KERNELS = ROOT.parent / "kernels"


def imported(file: Path, root: Path):
    """(dotted path below the root, line) of each import of the project's own, also in strings."""
    package = file.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield (*base, *name.split(".")), node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "smoothq":
            below = node.module.split(".")[1:]
            for name in [below] if below else [[alias.name] for alias in node.names]:
                yield tuple(name), node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("smoothq."):
                    yield tuple(alias.name.split(".")[1:]), node.lineno
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("smoothq.")
            and node.value.replace(".", "").replace("_", "").isalnum()
        ):
            yield tuple(node.value.split(".")[1:]), node.lineno  # importlib, lazy names


def test_packages_import_downwards():
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        own = file.relative_to(ROOT).with_suffix("").parts[0]
        if own == "__init__":
            continue
        if own not in FLOOR:
            wrong.append(f"{file}: {own} stands on no floor")
            continue
        for path, line in imported(file, ROOT):
            name = path[0]
            if name not in ("kernels", own) and name in FLOOR and FLOOR[name] >= FLOOR[own]:
                wrong.append(f"{file}:{line}: {own} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_kernels_know_nothing_of_smoothq():
    wrong = [
        f"{file}:{line}: {'.'.join(path)}"
        for file in sorted(KERNELS.rglob("*.py"))
        for path, line in imported(file, KERNELS)
        if not (KERNELS / path[0]).exists()
        and not (KERNELS / f"{path[0]}.py").exists()
        and path[0] != "kernels"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "package", sorted(p.name for p in ROOT.iterdir() if (p / "__init__.py").exists())
)
def test_no_circle_within_a_package(package):
    edges = {}
    for file in (ROOT / package).rglob("*.py"):
        here = file.relative_to(ROOT).with_suffix("").parts
        if here[-1] != "__init__":
            edges[here] = {
                path[: len(path) - cut]
                for path, _ in imported(file, ROOT)
                for cut in (0, 1)
                if path[0] == package
            } - {here}
    done: set[tuple[str, ...]] = set()

    def visit(node, trail):
        assert node not in trail, " -> ".join(
            ".".join(step) for step in (*trail[trail.index(node) :], node)
        )
        if node not in done:
            for following in edges.get(node, ()):
                visit(following, (*trail, node))
            done.add(node)

    for node in edges:
        visit(node, ())


def names_in(file: Path):
    """(name, line) of every variable, parameter, attribute, function and class of a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        for field in ("id", "arg", "attr", "name"):
            name = getattr(node, field, None)
            if isinstance(name, str) and not isinstance(node, ast.alias):
                yield name, node.lineno if hasattr(node, "lineno") else 0


@pytest.mark.parametrize("root", [ROOT, KERNELS])
def test_a_name_says_what_a_thing_is_not_when_it_came(root: Path):
    empty = {"held", "found", "made", "each", "own", "there"}
    wrong = [
        f"{file}:{line}: {name}"
        for file in sorted(root.rglob("*.py"))
        for name, line in names_in(file)
        if name.strip("_") in empty
    ]
    assert not wrong, "\n".join(wrong)


FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
COMMAND = re.compile(r"smoothq \w+( --[a-z-]+)+")  # a whole command, to be typed as it is
OTHERS = {  # of vLLM and of the hub's client
    *("--kv-cache-dtype", "--linear-backend", "--pipeline-parallel-size", "--revision"),
}


def test_below_the_command_line_messages_name_fields_not_flags():
    wrong = []
    commands = {*ROOT.glob("cli/*.py"), ROOT / "lm_eval.py"}
    for file in sorted({*ROOT.rglob("*.py"), *KERNELS.rglob("*.py")} - commands):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                flags = set(FLAG.findall(COMMAND.sub("", node.value))) - OTHERS
                wrong += [f"{file}:{node.lineno}: {flag}" for flag in flags]
    assert not wrong, "\n".join(wrong)


def test_importing_smoothq_imports_neither_torch_nor_transformers():
    code = "import sys, smoothq; assert not {'torch', 'transformers', 'lm_eval'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


@pytest.mark.parametrize("first", ["smoothq", "transformers.quantizers.auto"])
def test_the_format_is_registered_in_either_order_of_imports(first: str):
    second = {"smoothq": "transformers.quantizers.auto"}.get(first, "smoothq")
    code = (
        f"import {first}, {second}; from transformers.quantizers.auto import *; "
        "assert 'smoothq' in AUTO_QUANTIZER_MAPPING; "
        "assert 'smoothq' in AUTO_QUANTIZATION_CONFIG_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["quantize"], ["quantize", "MODEL", "-o", "OUT"]]
)
def test_help_and_misuse_are_answered_without_torch(arguments: list[str]):
    code = (
        "import sys; from smoothq.cli import main; sys.argv = sys.argv[1:]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, "smoothq", *arguments],
        check=True,
        cwd=ROOT.parent,
        capture_output=True,
    )


@pytest.mark.parametrize("old", sorted(moved.MODULES))
def test_a_module_is_importable_under_its_earlier_name(old: str):
    home = import_module(f"smoothq.{moved.MODULES[old][0]}")
    name = next(
        name
        for name, value in vars(home).items()
        if getattr(value, "__module__", "") == home.__name__ or name.isupper()
    )
    module = import_module(f"smoothq.{old}")
    with pytest.warns(DeprecationWarning, match="is now"):
        assert getattr(module, name) is getattr(home, name)


@pytest.mark.parametrize("example", sorted((ROOT.parent / "examples").glob("*.py")), ids=str)
def test_an_example_imports_from_smoothq_alone(example: Path):
    for node in ast.walk(ast.parse(example.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smoothq"):
            assert node.module == "smoothq"


def test_every_public_name_is_there():
    import smoothq

    for name in smoothq.__all__:
        assert getattr(smoothq, name) is not None
