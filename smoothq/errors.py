"""Every error that smoothq raises on purpose: what was wrong, where, and what to do next."""

import importlib.util


class SmoothqError(Exception):
    """Base of all errors meant for the person at the keyboard; the CLI prints them as one line."""


class RecipeError(SmoothqError):
    """The recipe contradicts itself or cannot be applied to the model at hand."""


class UnsupportedModelError(SmoothqError):
    """The model's architecture, or its state (already quantized), is not one we can quantize."""


class CalibrationError(SmoothqError):
    """The calibration or evaluation text cannot be found, read or used."""


class NumericsError(SmoothqError):
    """A tensor holds NaN or Inf, or a factorisation failed for good."""


class CheckpointError(SmoothqError):
    """A checkpoint cannot be read, is incomplete, or cannot be written."""


class DeviceError(SmoothqError):
    """No kernel of ours runs on the device asked for."""


class OutputError(CheckpointError):
    """The disk does not take what is written to it; the work so far is kept."""


class StoppedError(SmoothqError):
    """A run was stopped on purpose, or cannot go on as asked; the work so far is kept."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def needs_package(package: str, extra: str) -> None:
    """Raise SmoothqError if an optional package is missing; extra: what installs it."""
    if importlib.util.find_spec(package) is None:
        raise SmoothqError(f"this needs {package}: pip install 'smoothq[{extra}]'")
