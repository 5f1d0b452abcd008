"""Hadamard matrices and the rotation made of them: constructed, orthogonal, reproducible."""

import json
import math

import pytest
import torch

from smoothq.errors import CheckpointError, RecipeError
from smoothq.transforms.hadamard import Hadamard, hadamard_matrix

NOT_CONSTRUCTIBLE = (92, 116, 156, 172, 184, 188, 232, 236)
CONSTRUCTIBLE = [n for n in range(4, 257, 4) if n not in NOT_CONSTRUCTIBLE]

# Hidden and intermediate sizes of SmolLM2, Qwen, Llama, Mistral and Gemma models.
MODEL_WIDTHS = {
    576: (36, 16),
    1536: (48, 32),
    2560: (40, 64),
    3584: (56, 64),
    4864: (76, 64),
    5120: (80, 64),
    5376: (84, 64),
    8960: (140, 64),
    9728: (76, 128),
    11008: (344, 32),
    13824: (108, 128),
    14336: (112, 128),
    18944: (148, 128),
    21504: (168, 128),
    25600: (200, 128),
    29568: (924, 32),
}
# Full, with a left factor of each construction, and block-diagonal.
SMALL = [Hadamard.of(n, seed=3) for n in (1, 2, 64, 96, 144, 344, 92, 116)]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestHadamardMatrix:
    @pytest.mark.parametrize("order", [1, 2, *CONSTRUCTIBLE, 344, 924])
    def test_rows_are_orthogonal_and_entries_are_signs(self, order: int) -> None:
        matrix = hadamard_matrix(order)
        assert matrix.dtype == torch.int8
        assert matrix.shape == (order, order)
        assert bool((matrix.abs() == 1).all())
        wide = matrix.to(torch.float32)  # sums of at most 924 signs are exact
        assert torch.equal(wide @ wide.T, order * torch.eye(order))

    @pytest.mark.parametrize("order", [-4, 0, 3, 6, 90, *NOT_CONSTRUCTIBLE, 13696])
    def test_an_order_without_construction_is_refused_by_number(self, order: int) -> None:
        with pytest.raises(RecipeError, match=rf"order {order} "):
            hadamard_matrix(order)

    def test_the_caller_owns_the_result(self) -> None:
        expected = hadamard_matrix(12).clone()
        hadamard_matrix(12).zero_()
        assert torch.equal(hadamard_matrix(12), expected)


class TestChoiceOfConstruction:
    @pytest.mark.parametrize("width", MODEL_WIDTHS)
    def test_model_widths_get_a_full_rotation_of_two_small_factors(self, width: int) -> None:
        rotation = Hadamard.of(width, seed=0)
        assert (rotation.left, rotation.right) == MODEL_WIDTHS[width]
        assert rotation.left * rotation.right == width
        assert rotation.blocks == 1
        assert rotation.fallback is None

    @pytest.mark.parametrize("order", [64, 4096, 16384])
    def test_powers_of_two_split_evenly(self, order: int) -> None:
        rotation = Hadamard.of(order, seed=0)
        assert rotation.left == rotation.right == math.isqrt(order)

    @pytest.mark.parametrize(
        ("order", "block", "blocks"), [(13696, 128, 107), (92, 4, 23), (1150, 2, 575), (9, 1, 9)]
    )
    def test_other_widths_fall_back_to_blocks_and_say_so(
        self, order: int, block: int, blocks: int
    ) -> None:
        rotation = Hadamard.of(order, seed=0)
        assert (rotation.left * rotation.right, rotation.blocks) == (block, blocks)
        note = rotation.fallback
        assert note is not None
        assert "\n" not in note
        assert f"order {order} " in note
        assert f"block-diagonal rotation, {blocks} blocks of order {block}" in note

    def test_blocks_asked_for_are_no_fallback(self) -> None:
        assert Hadamard(order=192, left=8, right=8, blocks=3, seed=0).fallback is None

    @pytest.mark.parametrize("order", [0, -12])
    def test_a_width_must_be_positive(self, order: int) -> None:
        with pytest.raises(RecipeError, match=f"positive order, not {order}"):
            Hadamard.of(order, seed=0)

    @pytest.mark.parametrize(
        ("left", "right", "blocks", "reason"),
        [
            (12, 16, 1, "cannot be 1 blocks of 12 x 16"),
            (-12, -32, 1, "cannot be 1 blocks"),
            (32, 12, 1, "power of two, not 12"),
            (3, 128, 1, "order 3 "),
        ],
    )
    def test_impossible_factors_are_refused(
        self, left: int, right: int, blocks: int, reason: str
    ) -> None:
        with pytest.raises(RecipeError, match=reason):
            Hadamard(order=384, left=left, right=right, blocks=blocks, seed=0)


class TestRotation:
    @pytest.mark.parametrize("rotation", SMALL, ids=lambda r: str(r.order))
    def test_the_matrix_is_orthogonal_and_flat_within_its_blocks(self, rotation: Hadamard) -> None:
        matrix = rotation.matrix()
        eye = torch.eye(rotation.order, dtype=torch.float64)
        assert (matrix @ matrix.T - eye).abs().max() < 1e-12
        block = rotation.left * rotation.right
        assert (matrix[:block, :block].abs() - block**-0.5).abs().max() < 1e-15

    def test_it_is_signs_then_the_hadamard_matrix(self) -> None:
        rotation = Hadamard.of(96, seed=1)
        signed = rotation.signs()[:, None] * hadamard_matrix(96)
        assert torch.equal(rotation.matrix(), signed.double() / math.sqrt(96))
        assert torch.equal(torch.kron(*rotation.factors()), hadamard_matrix(96))
        assert rotation.matrix(torch.float32).dtype == torch.float32

    @pytest.mark.parametrize("rotation", SMALL, ids=lambda r: str(r.order))
    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [
            (torch.float64, 1e-12),
            (torch.float32, 1e-5),
            (torch.float16, 4e-3),
            (torch.bfloat16, 3e-2),
        ],
    )
    def test_apply_is_the_product_with_the_matrix(
        self, rotation: Hadamard, dtype: torch.dtype, tolerance: float
    ) -> None:
        x = random(2, 3, rotation.order).to(dtype)
        matrix = rotation.matrix()
        for result, expected in (
            (rotation.apply(x), x.double() @ matrix),
            (rotation.apply_transposed(x), x.double() @ matrix.T),
        ):
            assert result.dtype == dtype
            assert result.shape == x.shape
            assert (result.double() - expected).abs().max() < tolerance

    @pytest.mark.parametrize("width", [*MODEL_WIDTHS, 13696])
    def test_model_widths_keep_norms_and_are_undone(self, width: int) -> None:
        rotation = Hadamard.of(width, seed=5)
        x = random(3, width)
        rotated = rotation.apply(x)
        assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-12)
        assert (rotated - x).abs().max() > 1
        assert (rotation.apply_transposed(rotated) - x).abs().max() < 1e-12

    def test_half_precision_is_computed_in_float32(self) -> None:
        rotation = Hadamard.of(64, seed=None)
        x = torch.full((1, 64), 60000.0, dtype=torch.float16)
        x[0, 1::2] *= -1  # the sums reach 64 · 60000, far beyond float16, before they are scaled
        expected = x.double() @ rotation.matrix() / 16
        assert torch.equal(rotation.apply(x / 16).double(), expected)

    def test_inputs_beyond_one_chunk_give_the_same_rows(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rotation = Hadamard.of(48, seed=2)
        x = random(7, 48)
        whole = rotation.apply(x)
        monkeypatch.setattr("smoothq.transforms.hadamard._CHUNK_ELEMENTS", 2 * 48)
        assert torch.allclose(rotation.apply(x), whole, rtol=0, atol=1e-14)

    def test_strides_and_empty_batches_do_not_matter(self) -> None:
        rotation = Hadamard.of(48, seed=2)
        x = random(48, 5)
        assert torch.equal(rotation.apply(x.T), rotation.apply(x.T.contiguous()))
        assert rotation.apply(torch.empty(0, 48)).shape == (0, 48)
        assert rotation.apply(x[:, 0]).shape == (48,)

    def test_the_input_is_left_alone(self) -> None:
        x = random(4, 48)
        before = x.clone()
        Hadamard.of(48, seed=2).apply(x)
        assert torch.equal(x, before)

    def test_an_outlier_is_spread_over_all_channels(self) -> None:
        x = torch.zeros(1, 576)
        x[0, 17] = 24.0
        assert torch.allclose(Hadamard.of(576, seed=0).apply(x).abs(), torch.ones(1, 576))

    @pytest.mark.parametrize(
        "x", [torch.ones(2, 1), torch.ones(()), torch.ones(48, 2), torch.ones(48, dtype=torch.int8)]
    )
    def test_other_inputs_are_refused(self, x: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=r"expected a floating tensor \(\.\.\., 48\)"):
            Hadamard.of(48, seed=0).apply(x)


class TestSeed:
    def test_signs_are_fixed_by_order_and_seed(self) -> None:
        signs = Hadamard.of(1536, seed=0).signs()
        assert signs.dtype == torch.int8
        assert signs.shape == (1536,)
        assert set(signs.tolist()) == {-1, 1}
        assert torch.equal(signs, Hadamard.of(1536, seed=0).signs())
        assert abs(signs.sum(dtype=torch.int64).item()) < 4 * math.sqrt(1536)

    def test_without_a_seed_nothing_is_flipped(self) -> None:
        assert torch.equal(Hadamard.of(48, None).signs(), torch.ones(48, dtype=torch.int8))

    def test_seeds_differ_by_more_than_the_signs_of_the_outputs(self) -> None:
        x = random(4, 576)
        first, second = (Hadamard.of(576, seed).apply(x).abs() for seed in (0, 1))
        assert (first - second).abs().mean() > 0.1


class TestStoredForm:
    @pytest.mark.parametrize("seed", [7, None])
    @pytest.mark.parametrize("order", [96, 92])
    def test_survives_json(self, order: int, seed: int | None) -> None:
        rotation = Hadamard.of(order, seed)
        assert Hadamard.from_dict(json.loads(json.dumps(rotation.to_dict()))) == rotation

    def test_the_matrix_of_a_stored_rotation_never_changes(self) -> None:
        # Checkpoints in use depend on these: a new construction needs a new name, not new bytes.
        hashes = {n: Hadamard.of(n, seed=0).to_dict()["sha256"] for n in (256, 416, 576, 11008)}
        assert hashes == {
            256: "594130f6c0187e4360240d2eb1b1af0baa90659178b06e3c969e23f5b9c8d5a6",
            416: "2f9c7656ae07abf3116f46ebec16c51373a7a571fa1eba1bbaecbab4f21e2d61",
            576: "f24faf5859a5216ed38b5a40a4d10baa657c0698cdcff377eca26b810d928df6",
            11008: "10aee028b32407c46263fea27faf37d607aa264fe72cbc45d62d068491539e0e",
        }

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"sha256": "0" * 64}, "sha256 [0-9a-f]{64} instead of 0{64}"),
            ({"seed": 8}, "order=96.*seed=8.*sha256"),
            ({"left": 48, "right": 2}, "left=48.*sha256"),
            ({"left": 24}, "cannot be 1 blocks of 24 x 8"),
            ({"order": "96"}, "order = '96'"),
            ({"sha256": None}, "sha256 = None"),
        ],
    )
    def test_a_rotation_that_differs_is_refused(
        self, change: dict[str, object], named: str
    ) -> None:
        stored = Hadamard.of(96, seed=7).to_dict()
        with pytest.raises(CheckpointError, match=named):
            Hadamard.from_dict({**stored, **change})

    def test_a_missing_entry_is_named(self) -> None:
        stored = Hadamard.of(96, seed=7).to_dict()
        del stored["blocks"]
        with pytest.raises(CheckpointError, match="'blocks'"):
            Hadamard.from_dict(stored)
