"""Builds the CPU operators: one library, its loops compiled once for each instruction set."""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

SOURCES = Path("kernels/cpu/csrc")
WITHOUT = "SMOOTHQ_WITHOUT_CPU_OPERATORS"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a product and a sum are rounded one after the other, as in reference.py
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
]
# Headers of instruction sets use what they leave undefined, and older compilers say so.
LOOP_FLAGS = ["-fopenmp-simd", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Of the functions that give an instruction set's table, what the compiler may use.
ISAS = {
    "x86_64": {
        "plain": ["-march=x86-64-v2"],
        "avx2": ["-march=x86-64-v3"],
        "avxvnni": ["-march=x86-64-v3", "-mavxvnni"],
        "avx512": ["-march=x86-64-v4"],
        "avx512vnni": ["-march=x86-64-v4", "-mavx512vnni"],
        "amx": ["-march=x86-64-v4", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": {
        "plain": ["-march=armv8-a"],
        "dotprod": ["-march=armv8.2-a+dotprod"],
        "i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
    },
}
ISAS |= {"AMD64": ISAS["x86_64"], "arm64": ISAS["aarch64"]}
OLDEST_TORCH = "0x020b000000000000"  # 2.11: what the stable interface is asked to stay within


class BuildOperators(build_ext):
    """Compiles what needs a C++ compiler, and says so where none works."""

    def build_extension(self, extension: Extension) -> None:
        """Compile the loops once an instruction set, then the rest, into one library."""
        extension.extra_objects = []
        try:
            for name, flags in ISAS.get(platform.machine(), {"plain": []}).items():
                directory = Path(self.build_temp) / name
                extension.extra_objects += self.compiler.compile(
                    [str(SOURCES / "isa.cpp")],
                    output_dir=str(directory),
                    macros=[("ISA", name)],
                    extra_postargs=[*FLAGS, *LOOP_FLAGS, *flags],
                    depends=extension.depends,
                )
            extension.extra_objects += self.compiler.compile(
                [str(SOURCES / "python.cpp")],  # DLPack's header is not for a stable target
                output_dir=self.build_temp,
                include_dirs=self.compiler.include_dirs + extension.include_dirs,
                extra_postargs=FLAGS,
                depends=extension.depends,
            )
            super().build_extension(extension)
        except (CompileError, LinkError) as error:
            raise PlatformError(
                f"smoothq's CPU operators need a compiler of C++17 (CXX names it): {error}; "
                f"{WITHOUT}=1 installs without them"
            ) from error


class PlatformWheel(bdist_wheel):
    """A wheel for a platform and every Python: the library uses the limited API alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM."""
        return "py3", "none", super().get_tag()[2]


def operators() -> list[Extension]:
    """The library to build; none where the environment says so."""
    if os.environ.get(WITHOUT):
        return []
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        sys.exit(
            "smoothq's CPU operators are built against PyTorch, which is not installed here: "
            f"pip install torch, then pip install --no-build-isolation ({error}); "
            f"{WITHOUT}=1 installs without them"
        )
    return [
        Extension(
            "smoothq.kernels.cpu._operators",
            [str(SOURCES / name) for name in ("isas.cpp", "library.cpp", "operators.cpp")],
            depends=[str(path) for path in sorted(SOURCES.iterdir())],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", OLDEST_TORCH)],
            extra_compile_args=FLAGS,
            language="c++",
            py_limited_api=True,
        )
    ]


if __name__ == "__main__":
    commands = {"build_ext": BuildOperators, "bdist_wheel": PlatformWheel}
    setup(ext_modules=operators(), cmdclass=commands)
