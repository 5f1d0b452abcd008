"""Every error that smoothq raises on purpose: what was wrong, where, and what to do next."""

import importlib.util


class SmoothqError(Exception):
    """Base of all errors meant for the person at the keyboard; the CLI prints them as one line."""


class RecipeError(SmoothqError):
    """The recipe contradicts itself or cannot be applied to the model at hand."""


class UnsupportedModelError(SmoothqError):
    """The model's architecture or state (such as already quantized) is not supported."""


class CalibrationError(SmoothqError):
    """The calibration or evaluation text cannot be found, read or used."""


class NumericsError(SmoothqError):
    """A tensor holds NaN or Inf, or a matrix could not be factorised."""


class CheckpointError(SmoothqError):
    """A checkpoint cannot be read, is incomplete, or cannot be written."""


class DeviceError(SmoothqError):
    """smoothq has no kernel for the requested device, or PyTorch does not see it."""


class OutputError(CheckpointError):
    """Writing the output failed, for example on a full disk; finished work is kept."""


class StoppedError(SmoothqError):
    """A run was stopped on purpose, or cannot resume as asked; finished work is kept."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def needs_package(package: str, extra: str) -> None:
    """Raise SmoothqError if an optional package is missing; extra: what installs it."""
    if importlib.util.find_spec(package) is None:
        raise SmoothqError(f"this needs {package}: pip install 'smoothq[{extra}]'")
