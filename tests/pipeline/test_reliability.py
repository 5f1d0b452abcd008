"""What a run leaves behind, however it ends; and what a damaged checkpoint is answered with."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoothq import Recipe, preset, quantize
from smoothq.checkpoint import tensor_file, writer
from smoothq.checkpoint.open import open_source
from smoothq.checkpoint.shards import ShardState, ShardWriter
from smoothq.checkpoint.writer import CheckpointWriter
from smoothq.cli import main
from smoothq.errors import CheckpointError, OutputError, RecipeError, SmoothqError
from smoothq.pipeline.estimate import estimate_resources
from smoothq.pipeline.run import quantize_checkpoint
from smoothq.plan.resolve import make_plan
from smoothq.runtime.distributed import World
from smoothq.verify import verify_checkpoint
from tests.conftest import RECIPES
from tests.tiny_models import VOCABULARY

pytestmark = pytest.mark.reliability

RECIPE = RECIPES["w4a4"].edit(tuning__steps=2)  # rounds by GPTQ, smooths, tunes: two streams
SHARD_BYTES = 20_000  # so that there are several


class Killed(BaseException):
    """What nothing but the operating system could have stopped."""


def stopping_at(block: int, kind: type[BaseException] = Killed) -> Callable[[int, int, str], None]:
    """Progress that ends the run when a block begins."""

    def progress(at: int, blocks: int, stage: str) -> None:
        if at == block:
            raise kind

    return progress


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def below(directory: Path) -> dict[Path, bytes | None]:
    """What lies in a directory and below: the files' bytes, and the directories."""
    paths = directory.rglob("*")
    return {p.relative_to(directory): p.read_bytes() if p.is_file() else None for p in paths}


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run_in(float_checkpoint, data) -> Run:
    """Quantize a tiny Llama of three blocks into a directory of a folder."""

    def quantized(
        folder: Path,
        name: str = "out",
        recipe: Recipe = RECIPE,
        tokens: torch.Tensor = data,
        **kwargs: object,
    ) -> Path:
        out = folder / name
        taken = {key: kwargs.pop(key) for key in ("resume", "every", "overwrite") if key in kwargs}
        output = CheckpointWriter(out, shard_bytes=SHARD_BYTES, **taken)
        source = open_source(kwargs.pop("source", float_checkpoint("llama")))
        # The tests compare what is written with what `whole` has, which was checked.
        quantize_checkpoint(source, recipe, output, data=tokens, **{"check": False} | kwargs)
        return out

    return quantized


@pytest.fixture
def run(run_in, tmp_path) -> Run:
    """The same, into a directory of the test's."""
    return partial(run_in, tmp_path)


@pytest.fixture(scope="module")
def whole(run_in, tmp_path_factory) -> dict[str, bytes]:
    """The files of a run that nothing stopped."""
    return contents(run_in(tmp_path_factory.mktemp("whole"), check=True))


# ---- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_stopped_run_goes_on_to_the_same_bytes(run, whole, tmp_path, block, every) -> None:
    with pytest.raises(Killed):
        run(progress=stopping_at(block), every=every)
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    out = run(progress=lambda at, blocks, stage: seen.append(at), every=every)
    assert min(seen) == block // every * every
    assert contents(out) == whole
    assert not (tmp_path / "out.partial").exists()


def test_one_run_after_another_may_be_stopped(run, whole) -> None:
    for block in (0, 1, 1, 2, 2):
        with pytest.raises(Killed):
            run(progress=stopping_at(block))
    assert contents(run()) == whole


@pytest.mark.slow
def test_a_stop_at_any_step_on_the_disk_loses_nothing(run_in, tmp_path, monkeypatch, data) -> None:
    """What lies there before each renaming, sync or removal is what a killed run would leave."""
    recipe = RECIPES["w8a8"].edit(tuning={"steps": 1})  # the least work with two streams
    run_in, whole = partial(run_in, recipe=recipe, tokens=data[:1, :8]), tmp_path / "whole"
    whole.mkdir()
    stopped: list[Path] = []

    def before(function: Callable[..., object]) -> Callable[..., object]:
        def guarded(*args: object, **kwargs: object) -> object:
            if not stopped or below(stopped[-1]) != below(whole):
                stopped.append(tmp_path / f"stopped-{len(stopped)}")
                shutil.copytree(whole, stopped[-1])
            return function(*args, **kwargs)

        return guarded

    with monkeypatch.context() as patched:
        for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree")):
            patched.setattr(module, name, before(getattr(module, name)))
        expected = contents(run_in(whole))
    assert len(stopped) > 20
    assert (stopped[-1] / "out").exists()
    for folder in stopped:
        if not (folder / "out").exists():
            run_in(folder)
        assert contents(folder / "out") == expected


def test_a_stop_before_the_last_act_and_another_soon_after_lose_nothing(
    run, whole, monkeypatch
) -> None:
    def stop(self: CheckpointWriter) -> None:
        (self.partial / "placing").touch()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "place", stop)
        with pytest.raises(Killed):
            run()
    with pytest.raises(Killed):
        run(progress=stopping_at(2))
    seen: list[int] = []
    assert contents(run(progress=lambda at, blocks, stage: seen.append(at))) == whole
    assert min(seen) == 2


def test_the_old_output_stays_until_the_new_one_is_whole(run, whole, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    with pytest.raises(Killed):
        run(overwrite=True, progress=stopping_at(2))
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert contents(run(overwrite=True)) == whole


def test_what_a_stop_after_the_last_act_left_is_cleared_away(run, tmp_path) -> None:
    out = run()
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "placing").touch()
    made = contents(out)
    run()  # which has nothing to do
    assert not partial.exists()
    assert contents(out) == made


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"recipe": RECIPE.edit(seed=1)}, "recipe"),
        ({"tokens": torch.zeros(6, 24, dtype=torch.long)}, "calibration"),
        ({"recipe": RECIPE.edit(seed=1), "tokens": torch.ones(6, 24).long()}, "recipe and cal"),
    ],
)
def test_the_work_of_another_run_is_refused_by_name(run, whole, tmp_path, change, name) -> None:
    with pytest.raises(Killed):
        run(progress=stopping_at(2))
    with pytest.raises(CheckpointError, match=rf"2 finished blocks.*{name}.*resume=False"):
        run(**change)
    assert contents(run()) == whole  # it was left as it was
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(Killed):
        run(progress=stopping_at(2))
    assert (run(**change, resume=False) / "config.json").is_file()


def test_the_work_on_another_model_is_refused_by_name(run, float_checkpoint, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(float_checkpoint("llama"), other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Killed):
        run(progress=stopping_at(1))
    with pytest.raises(CheckpointError, match="model differs"):
        run(source=other)


def test_resume_demands_work_to_go_on_with(run) -> None:
    with pytest.raises(CheckpointError, match="no finished block"):
        run(resume=True)


@pytest.mark.parametrize("file", ["state.json", "hidden-quantized-00002", "model/shard-00000.data"])
def test_damaged_work_is_not_gone_on_with(run, whole, tmp_path, file) -> None:
    with pytest.raises(Killed):
        run(progress=stopping_at(2))
    found = [*(tmp_path / "out.partial").glob(file)] or [
        *(tmp_path / "out.partial").glob("model/shard-00000.safetensors")
    ]
    damaged = bytearray(found[0].read_bytes())
    damaged[-200] ^= 1
    found[0].write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"damaged|not what was written"):
        run()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert contents(run(resume=False)) == whole


# ---- the disk ------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_keeps_the_finished_blocks(run, whole, tmp_path, monkeypatch) -> None:
    add = ShardWriter.add

    def full(self: ShardWriter, name: str, *args: object) -> None:
        if ".layers.2." in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, name, *args)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "add", full)
        with pytest.raises(OutputError, match="disk is full"):
            run()
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    assert contents(run(progress=lambda at, blocks, stage: seen.append(at))) == whole
    assert min(seen) == 2


def test_memory_that_ends_keeps_the_finished_blocks(run, whole, tmp_path) -> None:
    with pytest.raises(MemoryError):
        run(progress=stopping_at(1, MemoryError))
    assert (tmp_path / "out.partial" / "state.json").is_file()
    assert contents(run()) == whole


def test_two_processes_on_one_output_are_one_error(run, tmp_path) -> None:
    def again(at: int, blocks: int, stage: str) -> None:
        if at == 1:
            with pytest.raises(CheckpointError, match="another process is writing"):
                run()

    assert run(progress=again).exists()


def test_a_symbolic_link_is_not_written_through(run, tmp_path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "target")
    with pytest.raises(CheckpointError, match="symbolic link"):
        run()
    assert not any((tmp_path / "target").iterdir())


def test_a_directory_without_permission_is_one_error(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writer.os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="no permission"):
        run()
    assert not (tmp_path / "out.partial").exists()


def test_shards_are_the_files_that_safetensors_writes(tmp_path) -> None:
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randint(-9, 9, (7,), dtype=torch.int8),
        "c": torch.randn(()),
        "empty": torch.empty(0, 4),
    }
    output = ShardWriter(tmp_path, ShardState())
    for name, tensor in tensors.items():
        rows = tensor.split(1) if tensor.dim() > 1 and len(tensor) else [tensor]
        output.add(name, rows, tuple(tensor.shape), tensor.nbytes)
    output.finish(tmp_path)
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


# ---- memory --------------------------------------------------------------------------------------


def test_hidden_states_on_the_disk_give_the_same_bytes(run, whole, monkeypatch) -> None:
    files = 0
    made = tensor_file.TensorFile.append

    def counted(self: tensor_file.TensorFile, *args: object) -> object:
        nonlocal files
        files += self.path.parent.name == "scratch"
        return made(self, *args)

    monkeypatch.setattr(tensor_file.TensorFile, "append", counted)
    monkeypatch.setattr("smoothq.pipeline.estimate.STATES_BYTES", 0)
    assert contents(run("spilled")) == whole
    assert files


def test_too_little_memory_is_refused_before_any_work(run, tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"max_memory of 0\.00 GB is too little: .* takes \d"):
        run(max_memory=1000)
    assert not (tmp_path / "out.partial").exists()


def test_needs_count_the_states_where_they_are(float_checkpoint) -> None:
    recipe = preset("w8a8").edit(calibration__samples=1000, calibration__sequence_length=2048)
    plan = make_plan(open_source(float_checkpoint("llama")).skeleton(), recipe)
    states = 4 * 1000 * 2048 * 48
    roomy = estimate_resources(plan, 10**12)
    tight = estimate_resources(plan, roomy.memory - 1)
    assert not roomy.states_on_disk
    assert tight.states_on_disk
    assert roomy.memory - tight.memory > states / 2
    assert tight.disk - roomy.disk == 2 * states


# Each depth is quantized by a forked process, whose peak begins at what it has then. Both are
# deeper than the blocks that are in hand at a time: read ahead, computed, and written behind. The
# comparison at the end loads a small output whole if it takes no more than SMALL_BYTES: not here.
PEAKS = """
import os, sys
from pathlib import Path
import transformers.models.llama.modeling_llama
from make_random_model import Shapes, config_of, write_random_model
from smoothq import preset
from smoothq.checkpoint.open import open_source
from smoothq.checkpoint.writer import CheckpointWriter
from smoothq.pipeline import round_trip
from smoothq.pipeline.run import quantize_checkpoint
from smoothq.runtime.memory import peak_memory
round_trip.SMALL_BYTES = 0
models = {layers: Path(sys.argv[1]) / f"float-{layers}" for layers in (6, 14)}
for layers, model in models.items():
    config = config_of(Shapes.TINYLLAMA, layers)
    config.update({"vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2816})
    config.update({"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64})
    write_random_model(model, config)
recipe = preset("w4a4", "rrs").edit(weights={"rounding": "rtn", "clip": False})
for model in models.values():
    process = os.fork()
    if process == 0:
        before = peak_memory()
        writer = CheckpointWriter(Path(f"{model}-out"))
        result = quantize_checkpoint(open_source(model), recipe, writer)
        print(result.peak_memory - before, flush=True)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth(tmp_path) -> None:
    scripts = Path(__file__).parents[2] / "scripts"
    paths = os.pathsep.join(filter(None, (str(scripts), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, tmp_path],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shallow, deep = map(int, done.stdout.split())
    block = sum(file.stat().st_size for file in tmp_path.glob("float-14/*.safetensors")) / 14
    assert shallow > block
    assert deep - shallow < 8 * block / 3  # of each of eight blocks more, not a third is kept


# ---- several processes ---------------------------------------------------------------------------


def run_as_rank(rank: int, port: int, commands: list[list[str]], results: Path) -> None:
    """Run commands one after the other as a launcher's process; write how each ended."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState._reset_state()  # an earlier test may have made it, for one process
    torch.set_num_threads(1)  # the parent's others are not here
    sys.stdout = sys.stderr = (results / f"log of rank {rank}").open("w", buffering=1)
    for index, each in enumerate(commands):
        sys.argv = ["smoothq", *each]
        try:
            main()
            code: object = 0
        except SystemExit as stop:
            code = stop.code
        (results / f"{index} of rank {rank}").write_text(str(code))


STATIC = ("--w8a8", "--activation-scales", "static")
GPTQ = ("--w4a16", "--group-size", "16", "--effort", "fast")


def command(model: Path, out: Path, *flags: str) -> list[str]:
    # Of 64 tokens, the text of 40 samples makes two micro-batches.
    text = ["--calibration", "builtin", "--samples", "40", "--sequence-length", "64"]
    return ["quantize", str(model), "-o", str(out), *text, "--device", "cpu", *flags]


@pytest.fixture(scope="module")
def two_processes(float_checkpoint, tmp_path_factory) -> tuple[Path, str]:
    """The folder of what two processes of one thread made and of how they ended; what they said.

    They quantize a model by nearest and by GPTQ, and one that is damaged. They are forked, as a
    launcher's would import everything anew.
    """
    folder = tmp_path_factory.mktemp("two")
    model, damaged = float_checkpoint("llama"), folder / "damaged"
    shutil.copytree(model, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    commands = [
        command(model, folder / "static", *STATIC),
        command(model, folder / "gptq", *GPTQ),
        command(damaged, folder / "refused", "--w8a8"),
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=run_as_rank, args=(rank, port, commands, folder)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()  # does nothing to one that has ended
    said = "".join((folder / f"log of rank {rank}").read_text() for rank in (0, 1))
    assert [process.exitcode for process in ranks] == [0, 0], said
    return folder, said


def ends(folder: Path, index: int) -> list[str]:
    """The exit codes of a command on both ranks."""
    return [(folder / f"{index} of rank {rank}").read_text() for rank in range(2)]


def test_a_process_that_knows_of_no_others_does_not_join_them(monkeypatch) -> None:
    monkeypatch.setattr(PartialState, "_shared_state", {})
    PartialState(cpu=True)  # as a library made it before the launcher's variables were set
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match="WORLD_SIZE is 2, but accelerate's state was made for 1"
    ):
        World.join("cpu")


@pytest.mark.parametrize(("index", "name"), [(0, "static"), (1, "gptq")])
def test_two_processes_make_what_one_makes(
    two_processes, float_checkpoint, tmp_path, monkeypatch, index, name
) -> None:
    folder, log = two_processes
    assert ends(folder, index) == ["0", "0"], log
    alone = command(float_checkpoint("llama"), tmp_path / "one", *(STATIC, GPTQ)[index])
    monkeypatch.setattr(sys, "argv", ["smoothq", *alone])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    one, two = (load_file(out / "model.safetensors") for out in (tmp_path / "one", folder / name))
    assert one.keys() == two.keys()
    differing = [key for key in one if not torch.equal(one[key], two[key])]
    if name == "static":
        assert not differing
    moved = sum(int((one[key] != two[key]).sum()) for key in differing)
    assert moved <= 0.001 * sum(tensor.numel() for tensor in one.values())


@pytest.mark.slow
def test_a_launcher_starts_two_processes(two_processes, float_checkpoint, tmp_path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += ["-m", "smoothq", *command(float_checkpoint("llama"), tmp_path / "out", *STATIC)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(launch, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(two_processes[0] / "static")


def test_an_error_in_one_of_two_processes_ends_both(two_processes) -> None:
    folder, log = two_processes
    assert "0" not in ends(folder, 2)
    assert "up_proj.weight' holds NaN or Inf" in log
    assert not (folder / "refused").exists()
    assert not (folder / "refused.partial").exists()


# ---- damaged checkpoints -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(float_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """A float checkpoint of one block and a quantized one of three, both as they should be."""
    folder = tmp_path_factory.mktemp("pristine")
    out, shallow = folder / "quantized", folder / "float"
    model = AutoModelForCausalLM.from_pretrained(float_checkpoint("llama"), num_hidden_layers=1)
    model.save_pretrained(shallow)
    AutoTokenizer.from_pretrained(float_checkpoint("llama")).save_pretrained(shallow)
    quantize(
        float_checkpoint("llama"),
        preset("w4a4", "rrs").edit(weights__rounding="rtn", runtime_smoothing__group_size=16),
        output=out,
    )
    return {"float": shallow, "quantized": out}


def test_verify_finds_nothing_in_a_whole_checkpoint(pristine) -> None:
    checked = verify_checkpoint(pristine["quantized"])
    stored = load_file(pristine["quantized"] / "model.safetensors")
    assert checked.tensors == len(stored)
    assert checked.bytes == sum(tensor.nbytes for tensor in stored.values())


def test_verify_wants_a_checkpoint_of_ours(pristine, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_checkpoint(pristine["float"])
    with pytest.raises(CheckpointError, match="not a directory"):
        verify_checkpoint(tmp_path / "nowhere")


@st.composite
def damage(draw: st.DrawFn) -> Callable[[Path], None]:
    """Something done to a checkpoint's directory: bits, ends, fields of the config, files."""
    kind = draw(st.sampled_from(["flip", "flip header", "truncate", "config", "remove", "text"]))
    where = draw(st.floats(0, 1, exclude_max=True))
    bit = draw(st.integers(0, 7))
    value = draw(
        st.sampled_from(
            [None, -1, 0, 1, 3, 10**6, 10**9, 10**18, 0.5, "many", [], {}, True, [1, 2]]
        )
    )

    def apply(directory: Path) -> None:
        weights, config = directory / "model.safetensors", directory / "config.json"
        if kind in ("flip", "flip header", "truncate"):
            held = bytearray(weights.read_bytes())
            header = 8 + int.from_bytes(held[:8], "little")
            at = int(where * (header if kind == "flip header" else len(held)))
            if kind == "truncate":
                del held[at:]
            else:
                held[at] ^= 1 << bit
            weights.write_bytes(held)
        elif kind == "config":
            fields = json.loads(config.read_text())
            name = sorted(fields)[int(where * len(fields))]
            fields[name] = value
            config.write_text(json.dumps(fields))
        else:
            files = sorted(path for path in directory.iterdir() if path.is_file())
            path = files[int(where * len(files))]
            if kind == "remove":
                path.unlink()
            else:
                path.write_text("<html>404</html>")

    return apply


def damaged_copy(pristine: Path, apply: Callable[[Path], None], scratch: Path) -> Path:
    copied = scratch / "damaged"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(pristine, copied)
    apply(copied)
    return copied


def error_of(act: Callable[[], object]) -> SmoothqError | None:
    """What an act is refused with, if it is."""
    try:
        act()
    except SmoothqError as error:
        return error
    return None


FEW = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.slow
@FEW
@given(apply=damage())
def test_a_damaged_model_is_one_clear_error_or_quantized(pristine, tmp_path, apply) -> None:
    source = damaged_copy(pristine["float"], apply, tmp_path)
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    recipe = preset("w8a8", "rtn")
    error = error_of(
        lambda: quantize_checkpoint(open_source(source), recipe, CheckpointWriter(out))
    )
    if error is None:  # so the check has loaded it whole
        assert json.loads((out / "config.json").read_text())["vocab_size"] == VOCABULARY
    else:
        assert "\n" not in str(error).strip()
        assert not out.exists()
        assert not out.with_name("out.partial").exists()


@FEW
@given(apply=damage())
def test_a_damaged_quantized_model_does_not_pass_for_whole(pristine, tmp_path, apply) -> None:
    damaged = damaged_copy(pristine["quantized"], apply, tmp_path)
    if contents(damaged) == contents(pristine["quantized"]):
        return
    with pytest.raises(SmoothqError) as caught:
        verify_checkpoint(damaged)
    assert "\n" not in str(caught.value).strip()
