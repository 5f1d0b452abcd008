"""What `smoothq plan` takes for models of real sizes: the default configs of config classes.

    python scripts/plan_sizes.py                # all of TYPES
    python scripts/plan_sizes.py deepseek_v3

A plan reads no weight, so that a directory with config.json is enough. Exit code 1 where one takes
more than SECONDS of a processor or MEMORY.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoConfig

TYPES = (
    *("deepseek_v2", "deepseek_v3", "ernie4_5_moe", "falcon_h1", "gemma4", "glm4_moe"),
    *("glm4_moe_lite", "granitemoehybrid", "internvl", "jamba", "kimi_linear", "lfm2", "lfm2_moe"),
    *("llama4", "llava", "minimax_m2", "mistral3", "nemotron_h", "qwen2_5_vl", "qwen3_5"),
    *("qwen3_5_moe", "qwen3_next", "qwen3_vl"),
)
SECONDS, MEMORY = 60.0, 3e9
# Runs smoothq and writes the peak of its memory to a file. What the system says of a process that
# has ended counts the memory of the one that started it, too.
MEASURED = """
import atexit, runpy, sys
path = sys.argv.pop(1)
def write_peak():
    with open("/proc/self/status") as status, open(path, "w") as file:
        file.write(next(line for line in status if line.startswith("VmHWM")).split()[1])
atexit.register(write_peak)
runpy.run_module("smoothq", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Taken:
    """What a plan took.

    Attributes:
        code: the exit code.
        seconds: of a processor.
        memory: bytes at the peak.
        log: what went to standard error.
    """

    code: int
    seconds: float
    memory: float
    log: str

    @property
    def fits(self) -> bool:
        """Whether it came to its end within the limits."""
        return self.code == 0 and self.seconds < SECONDS and self.memory < MEMORY


def plan(model_type: str, *flags: str) -> Taken:
    """Plan the default config of a model type in a process of its own, on one thread.

    Args:
        model_type: of transformers.
        flags: of the recipe.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="plan-") as folder, tempfile.TemporaryFile() as log:
        AutoConfig.for_model(model_type).save_pretrained(folder)
        peak = Path(folder) / "peak"
        process = subprocess.Popen(
            [sys.executable, "-c", MEASURED, str(peak), "plan", folder, *flags],
            env=environment,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        return Taken(
            code=process.returncode,
            seconds=usage.ru_utime + usage.ru_stime,
            memory=1024.0 * int(peak.read_text()),
            log=log.read().decode(),
        )


def main(
    types: Annotated[list[str] | None, typer.Argument(help="Model types; else TYPES.")] = None,
    flag: Annotated[str, typer.Option(help="The recipe's flag.")] = "--w8a8",
) -> None:
    """Print a line for each."""
    fitting = True
    for model_type in types or TYPES:
        taken = plan(model_type, flag)
        fitting &= taken.fits
        last = "" if taken.code == 0 else taken.log.strip().rpartition("\n")[2]
        print(
            f"{model_type:18} {taken.seconds:5.1f} s {taken.memory / 1e9:5.2f} GB {last}",
            flush=True,
        )
    sys.exit(not fitting)


if __name__ == "__main__":
    typer.run(main)
