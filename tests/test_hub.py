"""Publishing a quantized model and taking it back, by the hub's real client from a local hub."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from smoothq import Evaluation, Perplexity, export, quantize
from smoothq.checkpoint.hub_files import parse_hub_id
from smoothq.checkpoint.open import open_source
from smoothq.checkpoint.shards import SHARD_BYTES
from smoothq.checkpoint.writer import CheckpointWriter
from smoothq.errors import CheckpointError
from smoothq.evaluation.divergence import Agreement
from smoothq.evaluation.evaluate import TextResult
from smoothq.evaluation.tasks import TaskResults, TaskValue
from smoothq.hub import push_to_hub
from smoothq.pipeline.run import quantize_checkpoint
from smoothq.verify import verify_checkpoint
from tests.conftest import RECIPES
from tests.fake_hub import FakeHub, connect, serving
from tests.tiny_models import VOCABULARY

REPO = "somebody/tiny-w8a8"
TOKENS = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(4))
EVALUATION = Evaluation(
    model="out/tiny",
    reference="/home/somebody/tiny",
    texts=(
        TextResult(
            "wikitext2",
            Perplexity(12.5, tokens=1022, windows=2, sequence_length=512, seconds=3.0),
            Perplexity(12.0, tokens=1022, windows=2, sequence_length=512, seconds=3.0),
            Agreement(0.0125, 0.96875, tokens=1024),
        ),
        TextResult("/tmp/notes.txt", Perplexity(8.25, 63, 1, 64, 1.0)),
    ),
    decoded=Agreement(2e-7, 1.0, tokens=32),
    tasks=TaskResults(
        (
            TaskValue("arc_easy", "acc", "none", 0.625, 0.01, True, 100),
            TaskValue("gsm8k", "exact_match", "flexible-extract", 0.25, None, True, 50),
        ),
        seconds=9.0,
    ),
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty hub, which this process's client asks."""
    root = tmp_path / "hub"
    root.mkdir()
    with serving(root) as layer_kernels:
        connect(monkeypatch, layer_kernels.url, tmp_path / "cache")
        yield layer_kernels


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    float_checkpoint: Callable[[str], Path],
    data: Tensor,
) -> Path:
    """A tiny Llama, quantized."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize(float_checkpoint("llama"), RECIPES["w8a8-rtn"], data=data, output=out)
    return out


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(checkpoint, tmp_path / "out"))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def logits(model: str | Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model)(input_ids=TOKENS).logits


def with_base(directory: Path, base: str) -> None:
    """Say in a checkpoint's card that it was made from another model."""
    card = ModelCard.load(directory / "README.md")
    card.text = card.text.replace(card.data["base_model"], base)
    card.data["base_model"] = base
    card.save(directory / "README.md")


# ---- pushing -------------------------------------------------------------------------------------


def test_every_file_arrives_in_one_commit(hub, checkpoint) -> None:
    before = contents(checkpoint)
    assert push_to_hub(checkpoint, REPO, message="the first") == f"{hub.url}/{REPO}"
    commits = hub.repos[REPO].branches["main"]
    assert [commit.message for commit in commits] == ["initial commit", "the first"]
    assert sorted(commits[-1].brought) == sorted(before)
    arrived = hub.contents(REPO)
    changed = {"README.md", "manifest.json"}
    for name in before.keys() - changed:
        assert arrived[name] == before[name]
    assert hub.head(REPO).files["model.safetensors"].large
    assert contents(checkpoint) == before


def test_the_card_that_arrives_is_of_the_repo(hub, checkpoint, float_checkpoint) -> None:
    push_to_hub(checkpoint, REPO)
    text = hub.read(REPO, "README.md").decode()
    assert f'from_pretrained("{REPO}")' in text
    assert "PATH" not in text
    assert str(float_checkpoint("llama")) not in text
    assert "# llama, quantized with smoothq" in text
    assert "## Measured" not in text
    metadata = ModelCard(text).data.to_dict()
    assert metadata == {"library_name": "transformers", "tags": ["smoothq", "quantized"]}
    files = json.loads(hub.read(REPO, "manifest.json"))["files"]
    assert files["README.md"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_base_model_of_the_hub_stays_in_the_metadata(hub, copied, monkeypatch) -> None:
    with_base(copied, "someone/tiny")
    push_to_hub(copied, REPO)
    assert ModelCard(hub.read(REPO, "README.md").decode()).data["base_model"] == "someone/tiny"
    (copied.parent / "someone" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(copied.parent)
    push_to_hub(copied, REPO)
    card = ModelCard(hub.read(REPO, "README.md").decode())
    assert card.data.get("base_model") is None
    assert "# tiny, quantized with smoothq" in card.text


def test_an_evaluation_is_a_table_and_a_model_index(hub, checkpoint) -> None:
    figures = json.loads(json.dumps(EVALUATION.as_dict()))
    push_to_hub(checkpoint, REPO, evaluation=figures)
    card = ModelCard(hub.read(REPO, "README.md").decode())
    _, measured, rest = card.text.partition("## Measured\n\n")
    assert measured
    table, loading, _ = rest.partition("\n\n## Load it")
    assert loading
    assert table.splitlines() == [
        f"|  | {REPO} |",
        "| --- | --- |",
        "| text | wikitext2, 2 windows of 512 tokens |",
        "| perplexity | 12.5000 |",
        "| perplexity of tiny | 12.0000, ratio 1.0417 |",
        "| KL to it, nats a token | 0.01250 |",
        "| same next token | 96.88% |",
        "| text | notes.txt, 1 windows of 64 tokens |",
        "| perplexity | 8.2500 |",
        "| KL of 32 tokens decoded, to prefill | 2e-07 |",
        "| same next token, decoded and prefilled | 100.00% |",
        "| arc_easy: acc | 0.6250 ± 0.0100 |",
        "| gsm8k: exact_match (flexible-extract) | 0.2500 |",
    ]
    assert card.data.model_name == "tiny-w8a8"
    results = card.data.eval_results
    assert [(each.dataset_name, each.metric_type, each.metric_value) for each in results] == [
        ("wikitext2", "perplexity", 12.5),
        ("notes.txt", "perplexity", 8.25),
        ("arc_easy", "acc", 0.625),
        ("gsm8k", "exact_match", 0.25),
    ]


def test_only_what_has_changed_travels_again(hub, checkpoint) -> None:
    push_to_hub(checkpoint, REPO)
    push_to_hub(checkpoint, REPO)
    assert len(hub.repos[REPO].branches["main"]) == 2
    push_to_hub(checkpoint, REPO, evaluation=EVALUATION.as_dict())
    assert hub.head(REPO).brought == ["README.md", "manifest.json"]


def test_the_weights_of_an_earlier_push_do_not_stay(
    hub, checkpoint, float_checkpoint, data, tmp_path
) -> None:
    sharded = tmp_path / "sharded"
    writer = CheckpointWriter(sharded, shard_bytes=SHARD_BYTES >> 20)
    quantize_checkpoint(
        open_source(float_checkpoint("llama")), RECIPES["w8a8-rtn"], writer, data=data
    )
    push_to_hub(sharded, REPO)
    assert "model.safetensors.index.json" in hub.contents(REPO)
    push_to_hub(checkpoint, REPO)
    assert hub.contents(REPO).keys() == {*contents(checkpoint), ".gitattributes"}


def test_the_chat_templates_of_an_earlier_push_do_not_stay(hub, checkpoint, copied) -> None:
    (copied / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (copied / name).write_text("{{ messages }}")
    push_to_hub(copied, REPO)
    assert "additional_chat_templates/tool_use.jinja" in hub.contents(REPO)
    push_to_hub(checkpoint, REPO)
    assert hub.contents(REPO).keys() == {*contents(checkpoint), ".gitattributes"}


def test_hidden_files_stay_here(hub, copied) -> None:
    (copied / ".env").write_text("SECRET=1")
    (copied / ".cache").mkdir()
    (copied / ".cache" / "part").touch()
    push_to_hub(copied, REPO)
    assert not {".env", ".cache/part"} & hub.contents(REPO).keys()


def test_a_push_to_a_branch_leaves_the_main_one(hub, checkpoint, tmp_path) -> None:
    push_to_hub(checkpoint, REPO)
    before = hub.head(REPO)
    HfApi().create_branch(REPO, branch="refs-4bit")
    url = push_to_hub(checkpoint, REPO, revision="refs-4bit", message="the second")
    assert url == f"{hub.url}/{REPO}/tree/refs-4bit"
    assert hub.head(REPO) == before
    assert hub.head(REPO, "refs-4bit").message == "the second"
    there = snapshot_download(REPO, revision="refs-4bit")
    assert f'from_pretrained("{REPO}", revision="refs-4bit")' in (
        Path(there, "README.md").read_text()
    )


def test_a_private_repo_is_made_private_and_a_public_one_refused(hub, checkpoint) -> None:
    push_to_hub(checkpoint, REPO, private=True)
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    commits = len(hub.repos[REPO].branches["main"])
    with pytest.raises(CheckpointError, match="public"):
        push_to_hub(checkpoint, REPO, private=True)
    assert len(hub.repos[REPO].branches["main"]) == commits


# ---- taking it back ------------------------------------------------------------------------------


def test_what_is_taken_back_is_whole_and_gives_the_same_logits(hub, checkpoint) -> None:
    push_to_hub(checkpoint, REPO)
    expected = logits(checkpoint)
    there = Path(snapshot_download(REPO))
    assert verify_checkpoint(there).tensors > 0
    assert torch.equal(logits(there), expected)


def test_the_snippet_of_the_card_loads_it_from_the_hub(hub, checkpoint) -> None:
    push_to_hub(checkpoint, REPO)
    assert torch.equal(logits(REPO), logits(checkpoint))


def test_patterns_choose_what_is_taken(hub, checkpoint) -> None:
    push_to_hub(checkpoint, REPO)
    there = Path(snapshot_download(REPO, allow_patterns=["*.json"]))
    names = {path.name for path in there.iterdir()}
    assert names == {name for name in contents(checkpoint) if name.endswith(".json")}


@pytest.mark.parametrize("stored", ["model.safetensors", "pytorch_model.bin", "both"])
def test_a_float_model_comes_with_what_lies_beside_its_weights(
    hub, float_checkpoint, tmp_path, stored
) -> None:
    there = Path(shutil.copytree(float_checkpoint("llama"), tmp_path / "float"))
    beside = ["LICENSE", "preprocessor_config.json", "additional_chat_templates/tool_use.jinja"]
    beside += ["modeling_own.py", "chat_template.jinja", "tokenizer.model", "Notice.pdf"]
    (there / "additional_chat_templates").mkdir()
    for name in [*beside, "model.onnx"]:
        (there / name).write_text("{}")
    if stored != "model.safetensors":
        torch.save(load_file(there / "model.safetensors"), there / "pytorch_model.bin")
    if stored == "pytorch_model.bin":
        (there / "model.safetensors").unlink()
    HfApi().create_repo("somebody/float")
    files = [path for path in sorted(there.rglob("*")) if path.is_file()]
    operations = [CommitOperationAdd(str(path.relative_to(there)), path) for path in files]
    HfApi().create_commit("somebody/float", operations, commit_message="float")
    source = open_source("hf://somebody/float")
    assert set(beside) <= set(source.side_files().files)
    read = "model.safetensors" if stored == "both" else stored
    assert {path.name for path in set(source.files.values())} == {read}
    taken = {path.name for path in source.directory.iterdir()}
    assert not taken & ({"model.onnx", "pytorch_model.bin", "model.safetensors"} - {read})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://owner/name", ("owner/name", None)),
        ("hf://owner/name-4bit_v1.0@main", ("owner/name-4bit_v1.0", "main")),
        ("hf://owner/name@refs/pr/1", ("owner/name", "refs/pr/1")),
        ("owner/name", ("owner/name", None)),
    ],
)
def test_names_of_the_hub(text, expected) -> None:
    assert parse_hub_id(text) == expected


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://name", "hf://a/b/c", "hf://owner/", "hf:///name", "hf://a/b@", "hf://a/ b"],
)
def test_no_names_of_the_hub(text) -> None:
    with pytest.raises(CheckpointError, match="hf://owner/name"):
        parse_hub_id(text)


@pytest.mark.parametrize(
    "name", ["somebody/float", "hf://somebody/float", "hf://somebody/float@main"]
)
def test_a_model_of_the_hub_is_quantized_under_any_of_its_names(
    hub, float_checkpoint, data, name
) -> None:
    api = HfApi()
    api.create_repo("somebody/float")
    api.upload_folder(repo_id="somebody/float", folder_path=float_checkpoint("llama"))
    here = quantize(float_checkpoint("llama"), RECIPES["w8a8-rtn"], data=data)
    there = quantize(name, RECIPES["w8a8-rtn"], data=data)
    assert torch.equal(here(input_ids=TOKENS).logits, there(input_ids=TOKENS).logits)


def test_an_unknown_revision_of_a_model_is_named(hub) -> None:
    HfApi().create_repo("somebody/float")
    with pytest.raises(CheckpointError, match="no revision 'other'"):
        quantize("hf://somebody/float@other", RECIPES["w8a8-rtn"])


def test_an_export_is_pushed_with_what_loads_it(hub, checkpoint, tmp_path) -> None:
    export(checkpoint, tmp_path / "export")
    push_to_hub(tmp_path / "export", REPO)
    there = Path(snapshot_download(REPO))
    card = (there / "README.md").read_text()
    assert f"vllm serve {REPO}" in card
    assert f'from_pretrained("{REPO}")' in card
    assert contents(there).keys() - {".gitattributes"} == contents(tmp_path / "export").keys()


# ---- refusals ------------------------------------------------------------------------------------


def refusal(directory: Path, repo_id: str = REPO, **more: object) -> str:
    """The one line that a push is refused with."""
    with pytest.raises(CheckpointError) as caught:
        push_to_hub(directory, repo_id, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_finished_checkpoint_is_refused_before_the_hub_is_asked(
    hub, copied, float_checkpoint, tmp_path
) -> None:
    assert "holds no quantized model" in refusal(float_checkpoint("llama"))
    assert "holds no quantized model" in refusal(tmp_path / "nowhere")
    partial = Path(shutil.copytree(copied, tmp_path / "new.partial"))
    assert "is not finished" in refusal(partial)
    assert "is not finished" in refusal(tmp_path / "new")
    (copied / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(copied)
    assert not hub.repos


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("manifest.json", "manifest.json"),
        ("README.md", r"README.md is missing"),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_a_checkpoint_without_one_of_its_files_is_refused(hub, copied, name, message) -> None:
    (copied / name).unlink()
    assert message in refusal(copied)
    assert not hub.repos


def test_a_damaged_card_is_refused(hub, copied) -> None:
    (copied / "README.md").write_text("---\n- a\n- list\n---\n")
    assert "no model card" in refusal(copied)


@pytest.mark.parametrize(
    "figures", [{}, {"against": None, "texts": [{"text": "a"}], "decode": None, "tasks": None}]
)
def test_an_evaluation_that_is_none_is_refused(hub, checkpoint, figures) -> None:
    assert "smoothq eval --json" in refusal(checkpoint, evaluation=figures)
    assert not hub.repos


def test_a_name_that_is_none_is_refused(hub, checkpoint) -> None:
    assert "owner/name" in refusal(checkpoint, "name")
    assert "refused" in refusal(checkpoint, "somebody/a--b")


def test_a_wrong_token_or_none_is_told_to_log_in(hub, checkpoint, monkeypatch) -> None:
    assert "hf auth login" in refusal(checkpoint, token="hf_wrong")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal(checkpoint)
    assert not hub.repos


def test_the_name_of_another_is_refused(hub, checkpoint) -> None:
    assert "you may not write to 'other/tiny'" in refusal(checkpoint, "other/tiny")


def test_an_unknown_revision_is_refused_with_the_way_to_make_it(hub, checkpoint) -> None:
    line = refusal(checkpoint, revision="4bit")
    assert f"hf repos branch create {REPO} 4bit" in line
    assert len(hub.repos[REPO].branches["main"]) == 1


def test_metadata_that_the_hub_rejects_is_named(hub, copied) -> None:
    card = ModelCard.load(copied / "README.md")
    card.data["base_model"] = ["someone/tiny", "someone/not valid"]
    card.save(copied / "README.md")
    assert '"base_model" with value "someone/not valid" is not valid' in refusal(copied)


def test_without_a_network_it_says_so(hub, checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check the network" in refusal(checkpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(checkpoint)
