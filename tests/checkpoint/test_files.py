"""Files: what is read of a model's folder, what goes along, where an output goes, and when."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from smoothq import preset, quantize
from smoothq.checkpoint import placing, side_files
from smoothq.checkpoint.manifest import MANIFEST, Manifest
from smoothq.checkpoint.open import open_source
from smoothq.checkpoint.placing import Place
from smoothq.checkpoint.side_files import SideFiles
from smoothq.checkpoint.writer import CheckpointWriter
from smoothq.data.tokenizer import encode_prompt
from smoothq.errors import CheckpointError, OutputError, SmoothqError
from smoothq.evaluation.load import load_model
from smoothq.export import export
from smoothq.pipeline.run import quantize_checkpoint
from smoothq.verify import verify_checkpoint
from tests.tiny_models import VOCABULARY, tiny_model

RTN = preset("w8a8", "rtn")


class Killed(BaseException):
    """What nothing but the operating system could have stopped."""


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a directory and below, by relative name."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def model(float_checkpoint, tmp_path) -> Path:
    """A copy of a tiny Llama's folder, to be changed."""
    return Path(shutil.copytree(float_checkpoint("llama"), tmp_path / "model"))


def run(source: Path, out: Path, recipe=RTN, **taken: object) -> bool:
    """Quantize a folder; whether the output was there already."""
    writer = CheckpointWriter(out, **taken)
    return quantize_checkpoint(open_source(source), recipe, writer, check=False).repeated


# ---- what goes along -----------------------------------------------------------------------------

ALONG = [
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"),
    *("configuration_own.py", "modeling_own.py", "__init__.py", "custom_generate/generate.py"),
    *("LICENSE", "LICENSE.txt", "Notice", "USE_POLICY.md", "LLAMA_LICENSE.pdf", "COPYING"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "qwen.tiktoken", "special_tokens_map.json"),
    *("generation_config_for_vision.json", "audio_tokenizer_config.json", "tekken.json"),
]
LEFT = [
    *("README.md", "pytorch_model.bin", "model.fp16.safetensors", "consolidated.safetensors"),
    *("model.safetensors.index.json", "tf_model.h5", "flax_model.msgpack", "model.onnx"),
    *("onnx/model.onnx", "onnx/config.json", "original/params.json", "original/tokenizer.model"),
    *("llama-Q4_0.gguf", ".git/config", ".gitattributes", ".env", "__pycache__/own.pyc"),
    *("params.json", "hf_quant_config.json", "trainer_state.json", "optimizer.pt"),
    *("additional_chat_templates/.hidden.jinja", "photo.png", "data.csv", "runs/events.json"),
]


def put(directory: Path, names: list[str]) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"of": name}))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(along=st.sets(st.sampled_from(ALONG)), left=st.sets(st.sampled_from(LEFT)))
def test_all_that_a_loader_may_want_goes_along_and_nothing_else(along, left) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "model"), Path(scratch, "out")
        put(source, ["config.json", *along, *left])
        out.mkdir()
        SideFiles.of(source).write(out)
        before = contents(source)
        assert contents(out) == {name: before[name] for name in along}


def test_it_arrives_in_the_output_and_in_its_export(model, tmp_path) -> None:
    put(model, [*ALONG, *LEFT])
    (model / "model.safetensors.index.json").write_text("an earlier save's")
    run(model, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "export")
    before = contents(model)
    own = {"config.json", "README.md", "manifest.json", "model.safetensors"}
    beside = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", *ALONG}
    for made in ("out", "export"):
        after = contents(tmp_path / made)
        assert set(after) == own | beside
        assert all(after[name] == before[name] for name in beside)
        hashed = set(Manifest.read(tmp_path / made).files)
        assert hashed == {"config.json", "README.md"} | beside
    verify_checkpoint(tmp_path / "out")


def test_what_stays_behind_is_named_but_what_everybody_expects(model, tmp_path, caplog) -> None:
    put(model, ["README.md", "photo.png", "original/params.json", ".env", "hf_quant_config.json"])
    with caplog.at_level("INFO", logger="smoothq"):
        run(model, tmp_path / "out")
    (line,) = [each.message for each in caplog.records if "not copied" in each.message]
    assert line.endswith(": hf_quant_config.json, original/, photo.png")


def test_huge_files_stay_behind(model, monkeypatch) -> None:
    monkeypatch.setattr(side_files, "LARGEST_BYTES", 10)
    put(model, ["vocab.txt"])
    (model / "merges.txt").write_text("small")
    found = open_source(model).side_files()
    assert set(found.files) == {"merges.txt"}
    assert "vocab.txt" in found.left_out


def test_a_file_that_cannot_be_read_is_found_before_the_first_block(
    model, tmp_path, monkeypatch
) -> None:
    put(model, ["LICENSE"])
    opened = Path.open

    def refusing(path: Path, *how: object, **more: object) -> object:
        if path.name == "LICENSE":
            raise PermissionError(13, "Permission denied")
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(CheckpointError, match=r"LICENSE goes along.*Permission denied"):
        run(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_several_chat_templates_arrive_from_memory_too(tokenizer, tmp_path) -> None:
    several = AutoTokenizer.from_pretrained(save(tokenizer, tmp_path / "tokenizer"))
    several.chat_template = {"default": "D{{ messages }}", "tool_use": "T{{ messages }}"}
    out = tmp_path / "out"
    quantize(tiny_model("llama"), RTN, tokenizer=several, output=out)
    assert AutoTokenizer.from_pretrained(out).chat_template == several.chat_template
    verify_checkpoint(out)
    template = out / "additional_chat_templates" / "tool_use.jinja"
    template.write_text("changed")
    with pytest.raises(CheckpointError, match=r"tool_use\.jinja is not the file"):
        verify_checkpoint(out)


def save(tokenizer, directory: Path) -> Path:
    tokenizer.save_pretrained(directory)
    return directory


def test_a_tokenizer_that_is_given_takes_the_place_of_the_folders(model, tmp_path) -> None:
    put(model, ["chat_template.jinja", "additional_chat_templates/tool_use.jinja", "vocab.txt"])
    given = AutoTokenizer.from_pretrained(model)
    given.chat_template = "mine"
    quantize(model, RTN, tokenizer=given, output=tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "mine"
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert not (tmp_path / "out" / "additional_chat_templates").exists()


def test_a_generation_config_that_transformers_would_not_write_is_written(tmp_path) -> None:
    model = tiny_model("llama")
    model.generation_config.temperature = 0.5
    quantize(model, RTN, output=tmp_path / "out")
    held = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert held["temperature"] == 0.5


@pytest.mark.parametrize("own", [False, True])
def test_generation_parameters_in_a_config_count_as_transformers_counts_them(
    model, tmp_path, own
) -> None:
    if not own:
        (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"temperature": 0.7, "do_sample": True}))
    wanted = AutoModelForCausalLM.from_pretrained(model).generation_config
    run(model, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "export")
    for made in ("out", "export"):
        loaded = GenerationConfig.from_pretrained(tmp_path / made)
        assert loaded == wanted
        assert loaded.temperature == (None if own else 0.7)


def test_generation_parameters_in_a_config_in_memory_are_no_obstacle(tmp_path) -> None:
    model = tiny_model("llama")
    model.config.temperature = 0.7
    quantize(model, RTN, output=tmp_path / "out")


def test_what_cannot_be_written_is_found_before_the_first_block(tmp_path) -> None:
    model, blocks = tiny_model("llama"), []
    model.generation_config.temperature = object()
    with pytest.raises(CheckpointError, match="generation config cannot be written"):
        quantize(model, RTN, output=tmp_path / "out", on_block=blocks.append)
    model = tiny_model("llama")
    model.config.something = object()
    with pytest.raises(CheckpointError, match="config cannot be written"):
        quantize(model, RTN, output=tmp_path / "out", on_block=blocks.append)
    assert not blocks
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_of_own_code_is_copied_where_no_text_is_read(model, tmp_path, caplog) -> None:
    path = model / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(own))
    (model / "tokenization_own.py").write_text("raise SystemExit('run')")
    run(model, tmp_path / "out")
    assert "copied as they are" in caplog.text
    assert (tmp_path / "out" / "tokenization_own.py").is_file()
    with pytest.raises(CheckpointError, match="give trust_remote_code=True"):
        run(model, tmp_path / "other", preset("w8a8").edit(calibration__source="builtin"))


# ---- what is read --------------------------------------------------------------------------------

NAME = "model.layers.1.mlp.up_proj.weight"
FORMS = ("single", "index", "bin", "bin index")


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    """Of a tiny Llama."""
    torch.manual_seed(seed)
    shapes = tiny_model("llama", torch.float32).state_dict()
    return {name: torch.randn_like(held) for name, held in shapes.items()}


def store(directory: Path, form: str, seed: int) -> None:
    """Put the weights of a tiny Llama of some seed into a folder, beside what is there."""
    state = random_weights(seed)
    halves = [dict(list(state.items())[part::2]) for part in range(2)]
    if form == "single":
        save_file(state, directory / "model.safetensors", {"format": "pt"})
    elif form == "bin":
        torch.save(state, directory / "pytorch_model.bin")
    else:
        stem, suffix = ("model", "safetensors") if form == "index" else ("pytorch_model", "bin")
        names = [f"{stem}-{part + 1:05d}-of-00002.{suffix}" for part in range(2)]
        for name, half in zip(names, halves, strict=True):
            if form == "index":
                save_file(half, directory / name, {"format": "pt"})
            else:
                torch.save(half, directory / name)
        held = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        index = directory / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": held}))


@pytest.mark.parametrize("there", [each for each in product((0, 1), repeat=4) if any(each)])
def test_the_weights_are_those_that_transformers_loads(model, there) -> None:
    (model / "model.safetensors").unlink()
    for seed, (form, wanted) in enumerate(zip(FORMS, there, strict=True)):
        if wanted:
            store(model, form, seed)
    source = open_source(model)
    source.skeleton()
    loaded = AutoModelForCausalLM.from_pretrained(model).state_dict()
    read = dict(source.tensors(loaded))
    assert all(torch.equal(read[name], loaded[name]) for name in loaded)
    assert torch.equal(torch.cat(list(source.rows(NAME, 7))), loaded[NAME])


def test_what_the_shards_hold_counts_not_what_their_index_says(model) -> None:
    (model / "model.safetensors").unlink()
    store(model, "index", 1)
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    wrong = {name: files[file == files[0]] for name, file in index["weight_map"].items()}
    del wrong[NAME]
    path.write_text(json.dumps(index | {"weight_map": wrong}))
    source = open_source(model)
    source.skeleton()
    loaded = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(torch.equal(held, loaded[name]) for name, held in source.tensors(loaded))


def test_a_file_that_the_config_names_is_read_first(model) -> None:
    state = random_weights(3)
    save_file(state, model / "other.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (model / "config.json").write_text(json.dumps(config))
    source = open_source(model)
    source.skeleton()
    loaded = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert torch.equal(dict(source.tensors([NAME]))[NAME], loaded[NAME])
    assert torch.equal(loaded[NAME], state[NAME])


def test_bin_files_give_the_same_codes(model, tmp_path) -> None:
    run(model, tmp_path / "one")
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    run(model, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    before = open_source(model).fingerprint()
    state[NAME][-1, -1] += 1
    torch.save(state, model / "pytorch_model.bin")
    assert open_source(model).fingerprint() != before


class Runs:
    """What runs code where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("run",)


def test_bin_files_that_cannot_be_mapped_are_refused_with_what_converts(
    model, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    path = model / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="cannot be mapped") as caught:
        open_source(model)
    line = str(caught.value)
    assert "\n" not in line
    code = line.partition("convert it: ")[2].replace("CONVERTED", str(tmp_path / "converted"))
    exec(compile(code, "the advice", "exec"), {})
    run(tmp_path / "converted", tmp_path / "out")
    for odd in ({**state, "other": Runs()}, {"state_dict": state}, [1]):
        torch.save(odd, path)
        with pytest.raises(CheckpointError, match="convert it"):
            open_source(model)
    assert not Path("run").exists()


def test_a_variant_alone_is_refused_with_what_makes_it_the_main_one(model) -> None:
    (model / "model.safetensors").rename(model / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="only the variant 'fp16'") as caught:
        open_source(model)
    exec(compile(str(caught.value).partition("main one: ")[2], "the advice", "exec"), {})
    open_source(model)


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_is_refused_with_what_merges_it(model, whole) -> None:
    (model / "adapter_config.json").write_text("{}")
    if not whole:
        (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter.*merge_and_unload") as caught:
        open_source(model)
    assert "\n" not in str(caught.value)


# ---- where an output goes ------------------------------------------------------------------------


def refused(match: str, act: Callable[[], object], *kept: Path) -> None:
    """An act is refused by a line, and what is kept is as it was."""
    before = [contents(path) for path in kept]
    with pytest.raises(CheckpointError, match=match) as caught:
        act()
    assert "\n" not in str(caught.value)
    assert [contents(path) for path in kept] == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_model_itself_is_never_the_output(model, tmp_path, overwrite) -> None:
    def to(out: Path, source: Path = model) -> Callable[[], object]:
        return lambda: run(source, out, overwrite=overwrite)

    match = "model itself" if overwrite else "not empty|model itself"
    refused(match, to(model), model)
    refused(match, to(tmp_path), model)  # holds it
    refused(match, to(model / ".." / "model"), model)
    (tmp_path / "link").symlink_to(model)
    refused(match, to(model, tmp_path / "link"), model)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in model.iterdir():
        (linked / path.name).symlink_to(path)
    refused(match, to(model, linked), model)  # whose files the other folder's are
    partial = Path(shutil.copytree(model, tmp_path / "out.partial"))
    refused("out.partial", to(tmp_path / "out", partial), partial)
    in_memory = AutoModelForCausalLM.from_pretrained(model)
    refused(match, lambda: quantize(in_memory, RTN, output=model, overwrite=overwrite), model)


def test_the_checkpoint_itself_is_never_its_export(model, tmp_path) -> None:
    own = tmp_path / "deep" / "own"
    run(model, own)
    refused("model itself", lambda: export(own, own, overwrite=True), own)
    refused("model itself", lambda: export(own, tmp_path / "deep", overwrite=True), own)
    for name in ("model.safetensors", "config.json"):
        to = own / name
        refused("checkpoint itself", lambda to=to: export(own, to, "gguf", overwrite=True), own)


def test_an_output_in_the_models_folder_loses_nothing_and_is_not_copied(model) -> None:
    before = contents(model)
    run(model, model / "quantized")
    run(model, model / "again")
    after = contents(model)
    assert all(after[name] == before[name] for name in before)
    assert set(contents(model / "again")) == set(contents(model / "quantized"))


def test_work_is_not_put_into_somebody_elses_directory(model, tmp_path) -> None:
    other = tmp_path / "out.partial"
    other.mkdir()
    (other / "precious").write_text("data")
    refused("holds something else", lambda: run(model, tmp_path / "out"), other)


@pytest.mark.parametrize("name", [".", "{cwd}", "../here"])
def test_the_current_directory_is_filled(model, tmp_path, monkeypatch, name) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    run(model, Path(name.format(cwd=here)))
    assert Path("config.json").is_file()  # so it is still the one we are in
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "model"]
    for out in (here, tmp_path):
        refused("current directory", lambda out=out: run_elsewhere(tmp_path, out), here)


def run_elsewhere(tmp_path: Path, out: Path) -> None:
    in_memory = tiny_model("llama", torch.float32)
    quantize(in_memory, RTN, output=out, overwrite=True)


def test_a_directory_that_is_there_is_filled_and_stays_what_it_is(model, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o2770)
    out.chmod(0o2770)
    before = out.stat()
    run(model, out)
    after = out.stat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    verify_checkpoint(out)


@pytest.fixture
def mounted(monkeypatch) -> Callable[[Path], None]:
    """Make directories look like mount points, which cannot be renamed."""
    mounts: set[Path] = set()
    replace = os.replace

    def guarded(source: Path, target: Path) -> None:
        if {Path(source), Path(target)} & mounts:
            raise OSError(16, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(placing, "mount_points", lambda: mounts)
    monkeypatch.setattr(os, "replace", guarded)

    def mount(path: Path) -> None:
        path.mkdir(exist_ok=True)
        mounts.add(path)

    return mount


def test_a_mount_point_is_filled_from_within(model, tmp_path, mounted) -> None:
    out = tmp_path / "out"
    mounted(out)
    (out / "lost+found").mkdir()
    seen: list[list[str]] = []
    quantize(
        model,
        RTN,
        output=out,
        on_block=lambda done: seen.append(sorted(path.name for path in tmp_path.iterdir())),
    )
    assert seen == [["model", "out"]] * 3  # nothing beside it, which is another disk
    assert not (out / ".partial").exists()
    verify_checkpoint(out)
    assert run(model, out)


def test_an_export_into_a_mount_point_is_made_of_what_lies_in_it(model, tmp_path, mounted) -> None:
    out = tmp_path / "out"
    mounted(out)
    own = CheckpointWriter(out).beside("smoothq")
    assert own.parent == out
    run(model, own)
    made = contents(own)
    export(own, out)
    assert contents(own) == made
    assert json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]


def test_what_is_mounted_below_an_output_is_not_removed(model, tmp_path, mounted) -> None:
    out = tmp_path / "out"
    out.mkdir()
    mounted(out / "data")
    refused("is mounted in", lambda: run(model, out, overwrite=True), out)


def is_finished(directory: Path) -> bool:
    """Whether a directory would pass for a quantized model."""
    config = directory / "config.json"
    return config.is_file() and "quantization_config" in json.loads(config.read_text())


@pytest.mark.parametrize("where", ["beside", "inside"])
@pytest.mark.parametrize("old", ["nothing", "another checkpoint"])
def test_a_stop_at_any_step_of_placing_loses_neither_old_nor_new(
    model, tmp_path, monkeypatch, mounted, where, old
) -> None:
    """Every renaming, removal and sync is the last thing that some run does."""
    quantized, out = tmp_path / "quantized", tmp_path / "out"
    run(model, quantized)
    new = contents(quantized)
    before = {"config.json": b'{"quantization_config": {}}', "old/notes": b"mine"}
    before = {} if old == "nothing" else before
    for step in range(200):
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if where == "inside":
            mounted(out)
        put_bytes(out, before)
        place = Place(out)
        shutil.copytree(quantized, place.final)
        (place.partial / "lock").touch()
        left = iter(range(step))

        def before_step(function: Callable[..., object], left=left) -> Callable[..., object]:
            def guarded(*args: object, **kwargs: object) -> object:
                if next(left, None) is None:
                    raise Killed
                return function(*args, **kwargs)

            return guarded

        with monkeypatch.context() as patched:
            acts = ((os, "replace"), (os, "fsync"), (shutil, "rmtree"))
            for module, name in (*acts, (Path, "unlink"), (Path, "rmdir")):
                patched.setattr(module, name, before_step(getattr(module, name)))
            try:
                place.put()
                break
            except Killed:
                pass
        found = {name: held for name, held in contents(out).items() if ".partial/" not in name}
        if is_finished(out):
            # The config is the first to go and the last to come: all of it is there, or was.
            assert found in (new, before)
        place = Place(out)
        if place.was_stopped:
            place.undo()
        found = {name: held for name, held in contents(out).items() if ".partial/" not in name}
        assert found == before or (found == new and not place.final.exists())
        if found == before and place.final.exists():
            assert contents(place.final) == new
    assert step > 10
    assert contents(out) == new


def put_bytes(directory: Path, files: dict[str, bytes]) -> None:
    for name, held in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(held)


def test_a_placing_that_fails_is_undone(model, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    replace = os.replace

    def refusing(source: Path, target: Path) -> None:
        if Path(target) == out / "config.json":
            raise OSError(1, "Operation not permitted")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refusing)
        with pytest.raises(OutputError, match="not permitted"):
            run(model, out, overwrite=True)
    assert contents(out) == {"precious": b"data"}
    run(model, out, overwrite=True)
    verify_checkpoint(out)


# ---- a command repeated --------------------------------------------------------------------------


def test_a_finished_output_is_done_and_that_of_another_run_is_refused(model, tmp_path) -> None:
    out = tmp_path / "out"
    assert not run(model, out)
    made = contents(out)
    assert run(model, out)
    assert run(model, out, resume=True)
    assert isinstance(quantize(model, RTN, output=out).load(), torch.nn.Module)
    assert contents(out) == made
    other = RTN.edit(seed=1)
    refused("not empty.*recipe differs.*overwrite=True", lambda: run(model, out, other), out)
    (model / "chat_template.jinja").write_text("new")
    refused("side files differ.*overwrite=True", lambda: run(model, out), out)
    (model / "chat_template.jinja").unlink()
    tensors = load_file(model / "model.safetensors")
    tensors[NAME][-1, -1] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused("model differs.*overwrite=True", lambda: run(model, out), out)
    assert not run(model, out, overwrite=True)


@pytest.mark.parametrize("damage", ["missing", "changed", "weights", "manifest", "of before"])
def test_an_output_that_is_not_whole_is_not_done(model, tmp_path, damage) -> None:
    out = tmp_path / "out"
    run(model, out)
    if damage == "missing":
        (out / "tokenizer.json").unlink()
    elif damage == "changed":
        (out / "generation_config.json").write_text("{}")
    elif damage == "weights":
        weights = out / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "manifest":
        (out / MANIFEST).unlink()
    else:  # as earlier versions wrote it
        held = json.loads((out / MANIFEST).read_text())
        del held["run"]
        (out / MANIFEST).write_text(json.dumps(held))
        verify_checkpoint(out)
    refused("not empty.*overwrite=True", lambda: run(model, out), out)


def test_an_export_repeated_is_done(model, tmp_path) -> None:
    own, out = tmp_path / "own", tmp_path / "export"
    run(model, own)
    first = export(own, out)
    made = contents(out)
    again = export(own, out)
    assert again.repeated
    assert again.schemes == first.schemes
    assert contents(out) == made
    run(model, own, preset("w8a8", "rtn").edit(seed=1), overwrite=True)
    refused("not empty.*recipe differs", lambda: export(own, out), out)


# ---- damaged tokenizers --------------------------------------------------------------------------


def cut_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content']")


def no_json(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:500])


def another_kind(directory: Path) -> None:
    path = directory / "tokenizer.json"
    held = json.loads(path.read_text())
    held["model"] = {"type": "Nothing"}
    path.write_text(json.dumps(held))


def beyond(directory: Path) -> None:
    path = directory / "tokenizer.json"
    held = json.loads(path.read_text())
    held["model"]["vocab"]["a"] = 10**6
    path.write_text(json.dumps(held))


def no_unknown(directory: Path) -> None:
    path = directory / "tokenizer.json"
    held = json.loads(path.read_text())
    del held["model"]["vocab"]["?!"]
    path.write_text(json.dumps(held))


DAMAGES = [cut_template, no_json, another_kind, beyond, no_unknown]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["generate", "eval", "quantize", "inspect"])
def test_a_damaged_tokenizer_is_one_line(
    model, tmp_path, monkeypatch, capsys, damage, command
) -> None:
    from smoothq.cli.commands import main

    damage(model)
    text = tmp_path / "text.txt"
    text.write_text("a banana, a \u00e9clair " * 40)
    short = ("--sequence-length", "32")
    words = {
        "generate": ("generate", model, "a banana \u00e9", "--max-new-tokens", "2"),
        "eval": ("eval", model, "--text", text, *short),
        "quantize": (
            *("quantize", model, "-o", tmp_path / "out", "--w8a8"),
            *("--calibration", text, "--samples", "2", *short),
        ),
        "inspect": ("inspect", model, "--text", text, "--sequences", "2", *short),
    }[command]
    monkeypatch.setattr(sys, "argv", ["smoothq", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    err = capsys.readouterr().err
    if damage is cut_template and command != "generate":
        assert code == 0, err  # no chat is rendered
        return
    assert code == 1
    assert err.strip().splitlines()[-1].startswith("smoothq: ") or "smoothq: " in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_a_token_is_refused(tokenizer) -> None:
    with pytest.raises(CheckpointError, match="no token"):
        encode_prompt(tokenizer, "", False, VOCABULARY)


def test_a_model_that_transformers_cannot_load_is_one_line(model) -> None:
    config = json.loads((model / "config.json").read_text())
    for name, value in (("num_attention_heads", 0), ("hidden_size", "many")):
        (model / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(SmoothqError) as caught:
            load_model(str(model))
        assert "\n" not in str(caught.value)


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_format_commands_work_goes_on_from_every_stop(model, tmp_path) -> None:
    out, own = tmp_path / "out", tmp_path / "out.smoothq"
    command = [
        *(sys.executable, "-m", "smoothq", "quantize", str(model), "-o", str(out)),
        *("--w8a8", "--method", "rtn", "--format", "compressed-tensors"),
    ]

    def repeat() -> str:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not own.exists()
        return done.stdout

    run(model, own)  # as a run that was stopped before the export leaves it
    repeat()
    made = contents(out)
    assert "is done" in repeat()
    run(model, own)  # as one that was stopped before this was removed
    assert "is done" in repeat()
    assert contents(out) == made
