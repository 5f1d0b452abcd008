"""Triton's interpreter without the search that it repeats at every call of a device function."""

import importlib
import inspect
import os
from collections.abc import Iterator
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":

    @pytest.fixture(scope="session", autouse=True)
    def builtins_are_listed_once() -> Iterator[None]:
        """Keep the names of Triton's builtins: the search for them is a third of a test's time."""
        try:
            language = importlib.import_module("triton.language")
        except ImportError:  # the tests that need it skip themselves
            yield
            return
        interpreter = importlib.import_module("triton.runtime.interpreter")
        is_builtin = language.core.is_builtin
        packages = (
            language,
            language.core,
            language.math,
            language.tensor,
            language.core.tensor_descriptor_base,
        )
        names = {
            package: [name for name, member in inspect.getmembers(package) if is_builtin(member)]
            for package in packages
        }

        def patch(package: Any, builder: Any, scope: Any) -> None:
            for name in names[package]:
                member = getattr(package, name)
                if is_builtin(member):  # not yet replaced by a function that called this one
                    interpreter._patch_attr(package, name, member, builder, scope)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(interpreter, "_patch_builtin", patch)
            yield
