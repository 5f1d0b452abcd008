"""Outliers that are put in are found where they were put, and every method is set against them."""

import json
from pathlib import Path

import pytest
import torch

from smoothq.checkpoint.open import open_source
from smoothq.errors import RecipeError
from smoothq.inspection.outliers import METHODS, Inspection, inspect_model, pooled
from smoothq.inspection.summary import as_dict, massive_tokens
from tests.tiny_models import VOCABULARY, tiny_model

TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    """A tiny Llama with one loud channel behind the first norm of block 1."""
    model = tiny_model("llama", torch.float32)
    block = model.model.layers[1]
    block.input_layernorm.weight.data[5] *= 40
    for reader in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
        reader.weight.data[:, 5] /= 40
    return inspect_model(open_source(model), TOKENS)


def test_every_site_has_a_profile_of_every_method(inspection) -> None:
    assert [(each.block, each.site) for each in inspection.sites] == [
        (block, site) for block in range(3) for site in ("qkv", "o", "gate_up", "down")
    ]
    for each in inspection.sites:
        assert tuple(each.profiles) == inspection.methods == tuple(METHODS)
        for profile in each.profiles.values():
            assert profile.largest >= profile.median > 0
            assert profile.kurtosis >= 1
            assert 0 < profile.error < 1


def test_a_channel_that_was_made_loud_is_found_and_flattened(inspection) -> None:
    profiles = inspection.site(1, "qkv").profiles
    assert profiles["rtn"].channels == 1
    assert inspection.site(0, "qkv").profiles["rtn"].channels == 0
    for method in ("smoothquant", "quarot", "smoothrot", "rrs"):
        assert profiles[method].channels == 0, method
        assert profiles[method].kurtosis < profiles["rtn"].kurtosis / 2, method
        assert profiles[method].error < profiles["rtn"].error, method
    assert inspection.site(1, "qkv").best != "rtn"


def test_the_inputs_as_they_are_are_the_models_own(inspection) -> None:
    model = tiny_model("llama", torch.float32)
    seen = []
    down = model.model.layers[2].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(TOKENS)
    profile = inspection.site(2, "down").profiles["rtn"]
    assert profile.largest == pytest.approx(seen[0].abs().max().item(), rel=1e-4)
    assert profile.median == pytest.approx(seen[0].abs().median().item(), rel=1e-4)
    expected = pooled(seen[0].flatten(0, 1).abs())
    torch.testing.assert_close(profile.surface, expected, rtol=1e-3, atol=1e-5)


def test_a_massive_activation_is_named_by_its_token(tokenizer) -> None:
    model = tiny_model("llama", torch.float32)
    first, second = TOKENS[0, 0].item(), 7
    quiet = torch.full_like(TOKENS, second)
    quiet[:, 0] = first
    mlp = model.model.layers[0].mlp
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()  # the MLP reads the embedding alone
    stream = model.get_input_embeddings().weight.data
    stream[first] = 0
    stream[second, 3], stream[first, 3] = 0, 50.0
    usual = inspect_model(open_source(model), quiet).site(0, "down").profiles["rtn"].median
    for matrix in (mlp.gate_proj.weight.data, mlp.up_proj.weight.data):
        matrix[9] = 0
        matrix[9, 3] = (250 * usual) ** 0.5  # of 8 there after the norm: 16,000 times the median
    found = inspect_model(open_source(model), quiet)
    site = found.site(0, "down")
    assert site.profiles["rtn"].massive == (0, 24)
    assert site.profiles["rtn"].spikes >= 1
    assert found.worst() is site
    text = massive_tokens(found, site, tokenizer)
    assert text.count(" at 0") == 2
    assert repr(tokenizer.decode(first)) in text


def test_runtime_smoothing_is_left_out_where_it_does_not_exist() -> None:
    found = inspect_model(open_source(tiny_model("llama", torch.float32)), TOKENS, "w8a8")
    assert found.methods == ("rtn", "smoothquant", "quarot", "smoothrot")
    w4a4 = inspect_model(open_source(tiny_model("llama", torch.float32)), TOKENS, "w4a4")
    for site, coarse in zip(found.sites, w4a4.sites, strict=True):
        assert site.profiles["rtn"].error < coarse.profiles["rtn"].error


@pytest.mark.parametrize("name", ["mixtral", "opt", "gpt2", "gemma2"])
def test_other_wirings_are_inspected(name: str) -> None:
    found = inspect_model(open_source(tiny_model(name, torch.float32)), TOKENS, "w8a8")
    assert {profile.surface.ndim for s in found.sites for profile in s.profiles.values()} == {2}
    for site in found.sites:
        assert site.profiles["rtn"].error < 0.2


def test_plain_data_holds_all_but_the_surfaces(inspection) -> None:
    plain = json.loads(json.dumps(as_dict(inspection)))
    assert len(plain["sites"]) == len(inspection.sites)
    assert plain["sites"][3]["methods"]["rrs"]["error"] > 0
    with pytest.raises(RecipeError, match="sites are qkv, o"):
        inspection.site(1, "nowhere")


@pytest.mark.slow
def test_the_page_needs_nothing_beside_itself(inspection, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from smoothq.inspection.page import write_page
    from smoothq.inspection.plots import figures, save

    site = inspection.worst()
    drawn = figures(inspection, site)
    assert [path.name for path in save(drawn, tmp_path / "plots")] == [f"{n}.png" for n in drawn]
    page = tmp_path / "report.html"
    write_page(inspection, site, drawn, "'<s>' at 0", page)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == len(drawn)
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text
    assert "&#39;&lt;s&gt;&#39; at 0" in text
    assert text.count("<tr>") == 2 + len(inspection.sites)
