"""Statistics over tokens do not depend on how the tokens came in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smoothq import kernels
from smoothq.pipeline.observers import AbsMax, AbsQuantile, SecondMoment

FEW = settings(max_examples=20, deadline=None, derandomize=True)
WIDTH = 12

seeds = st.integers(0, 2**32 - 1)
cut_points = st.lists(st.integers(1, 39), max_size=4, unique=True).map(sorted)


def tokens(count: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator)
    return x * torch.randn(count, 1, generator=generator).exp()


def pieces(x: Tensor, cuts: list[int]) -> tuple[Tensor, ...]:
    return torch.tensor_split(x, cuts)


class TestAbsMax:
    def test_definition(self) -> None:
        seen = AbsMax(3)
        seen.update(torch.tensor([[1.0, -4.0, 0.0], [-2.0, 3.0, 0.0]]))
        assert seen.result().dtype == torch.float32
        assert seen.result().tolist() == [2.0, 4.0, 0.0]

    def test_normalised_every_token_weighs_alike(self) -> None:
        seen = AbsMax(3, normalise=True)
        seen.update(torch.tensor([[100.0, -400.0, 0.0], [-2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
        assert seen.result().tolist() == [1.0, 1.0, 0.0]
        seen = AbsMax(WIDTH, normalise=True)
        seen.update(tokens())
        live = kernels.reference.live_channel_maxima(tokens().unsqueeze(0), None, normalise=True)
        assert torch.equal(seen.result(), live[0])

    @pytest.mark.parametrize("normalise", [False, True])
    @FEW
    @given(seed=seeds, cuts=cut_points, first=st.integers(0, 5))
    def test_pieces_and_merges_give_exactly_the_whole(
        self, normalise: bool, seed: int, cuts: list[int], first: int
    ) -> None:
        x = tokens(seed=seed)
        whole, left, right = (AbsMax(WIDTH, normalise) for _ in range(3))
        whole.update(x)
        for i, piece in enumerate(pieces(x, cuts)):
            (left if i < first else right).update(piece)
        left.merge(right)
        assert torch.equal(left.result(), whole.result())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_seen_as_float32(self, dtype: torch.dtype) -> None:
        half, single = AbsMax(WIDTH), AbsMax(WIDTH)
        half.update(tokens().to(dtype))
        single.update(tokens().to(dtype).float())
        assert torch.equal(half.result(), single.result())

    def test_a_nan_is_not_lost(self) -> None:
        seen = AbsMax(2)
        seen.update(torch.tensor([[float("nan"), 1.0]]))
        seen.update(torch.tensor([[5.0, 1.0]]))
        assert seen.result().isnan().tolist() == [True, False]


class TestSecondMoment:
    def test_definition(self) -> None:
        seen = SecondMoment(2)
        seen.update(torch.tensor([[1.0, 2.0], [-3.0, 0.5]]))
        assert seen.result().dtype == torch.float64
        assert seen.result().tolist() == [[10.0, 0.5], [0.5, 4.25]]

    @FEW
    @given(seeds, cut_points, st.integers(0, 5))
    def test_pieces_and_merges_give_the_whole(self, seed: int, cuts: list[int], first: int) -> None:
        x = tokens(seed=seed)
        left, right = SecondMoment(WIDTH), SecondMoment(WIDTH)
        for i, piece in enumerate(pieces(x, cuts)):
            (left if i < first else right).update(piece)
        left.merge(right)
        exact = x.double().t() @ x.double()
        assert (left.result() - exact).norm() <= 1e-6 * exact.norm()

    def test_the_same_micro_batches_give_the_same_bits(self) -> None:
        first, second = SecondMoment(WIDTH), SecondMoment(WIDTH)
        for seen in (first, second):
            for piece in pieces(tokens(), [7, 8, 30]):
                seen.update(piece)
        assert torch.equal(first.result(), second.result())

    def test_merging_one_micro_batch_is_updating_with_it(self) -> None:
        head, tail = pieces(tokens(), [15])
        updated, merged, other = (SecondMoment(WIDTH) for _ in range(3))
        updated.update(head)
        updated.update(tail)
        merged.update(head)
        other.update(tail)
        merged.merge(other)
        assert torch.equal(updated.result(), merged.result())

    def test_many_micro_batches_do_not_wear_the_sum_out(self) -> None:
        # In float32 the sum would stop growing at 2^24.
        seen = SecondMoment(1)
        seen.update(torch.full((1, 1), 4096.0))
        for _ in range(100):
            seen.update(torch.ones(1, 1))
        assert seen.result().item() == 2**24 + 100

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_multiplied_in_float32(self, dtype: torch.dtype) -> None:
        half, single = SecondMoment(WIDTH), SecondMoment(WIDTH)
        half.update(tokens().to(dtype))
        single.update(tokens().to(dtype).float())
        assert torch.equal(half.result(), single.result())


class TestAbsQuantile:
    @pytest.mark.parametrize(("share", "above"), [(1.0, 0), (0.975, 1), (0.9, 4), (0.5, 20)])
    @FEW
    @given(seed=seeds, cuts=cut_points)
    def test_it_leaves_that_share_of_tokens_above(self, share, above, seed, cuts) -> None:
        x = tokens(seed=seed)
        seen = AbsQuantile(WIDTH, share, tokens=40)
        for piece in pieces(x, cuts):
            seen.update(piece)
        expected = x.abs().sort(0, descending=True).values[above]
        assert torch.equal(seen.result(), expected)

    def test_merging_is_exact(self) -> None:
        x = tokens()
        parts = [AbsQuantile(WIDTH, 0.9, tokens=40) for _ in range(2)]
        for part, piece in zip(parts, x.split(17), strict=False):
            part.update(piece)
        parts[1].update(x[34:])
        parts[0].merge(parts[1])
        whole = AbsQuantile(WIDTH, 0.9, tokens=40)
        whole.update(x)
        assert torch.equal(parts[0].result(), whole.result())

    def test_fewer_tokens_than_expected_and_none_at_all(self) -> None:
        seen = AbsQuantile(2, 0.9, tokens=1000)
        assert seen.result().tolist() == [0.0, 0.0]
        seen.update(torch.tensor([[1.0, -5.0], [3.0, 2.0]]))
        assert seen.result().tolist() == [3.0, 5.0]


def test_no_token_leaves_maxima_and_moments_at_zero() -> None:
    for seen in (AbsMax(3), SecondMoment(3)):
        seen.update(torch.empty(0, 3))
        assert not seen.result().any()
