"""Hadamard matrices, constructed rather than stored, and the randomised rotation made of them.

Constructions: Sylvester (powers of two), Paley I and II over the finite fields GF(p^k), and their
Kronecker products with powers of two. Paley, "On orthogonal matrices" (1933); the randomised
rotation is QuaRot's (arXiv 2404.00456), with the signs on the input side of the Hadamard. The
rotation that keeps the mean, a random ±1 spectrum between two Hadamards, is smoothq's own.
"""

import hashlib
import itertools
import math
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError, RecipeError

_CHUNK_ELEMENTS = 1 << 22  # bounds the temporaries of one application to some 100 MB


def hadamard_matrix(order: int) -> torch.Tensor:
    """A Hadamard matrix H of the given order: H Hᵀ = order · I.

    Built as (base matrix) ⊗ (Sylvester matrix of order 2^k), where base is the smallest order with
    a Paley construction such that base · 2^k = order (1 for powers of two). The same order always
    gives the same matrix; the caller owns the returned tensor.

    Args:
        order: number of rows and columns.

    Returns:
        int8 (order, order), entries ±1.

    Raises:
        RecipeError: none of the constructions has that order.
    """
    base = _base_order(order)
    if base is None:
        raise RecipeError(
            f"no Hadamard matrix of order {order} can be constructed "
            "(Sylvester, Paley I and II, and their products with powers of two)"
        )
    return torch.kron(_base_matrix(base), _sylvester(order // base))


@dataclass(frozen=True)
class Hadamard:
    """The rotation X ← X R with R = diag(signs) · (I_blocks ⊗ H_left ⊗ H_right) / √(left · right).

    Signs come before the Hadamard: after it they would only flip the outputs, and a symmetric grid
    would see the same rotation whatever the seed.

    With `keeps_mean` it is R = A · diag(spectrum) · Aᵀ instead, where A = diag(flips) · (I_blocks ⊗
    H_left ⊗ H_right) / √(left · right) has a constant first column in every block, and the random
    spectrum of ±1 is 1 there: then R 1 = 1, and a LayerNorm without weight and bias commutes with
    it.

    Attributes:
        order: width that is rotated, blocks · left · right.
        left: order of H_left, which has the factor that is not a power of two.
        right: order of H_right, a power of two.
        blocks: how many equal diagonal blocks; 1 is a full Hadamard rotation.
        seed: of the signs, or of the spectrum; None leaves all of them +1.
        keeps_mean: R maps the all-ones vector to itself.

    Raises:
        RecipeError: the orders do not multiply to `order`, or a factor has no construction.
    """

    order: int
    left: int
    right: int
    blocks: int
    seed: int | None
    keeps_mean: bool = False

    def __post_init__(self) -> None:
        if min(self.left, self.right, self.blocks) < 1 or self.order != (
            self.blocks * self.left * self.right
        ):
            raise RecipeError(
                f"a Hadamard rotation of order {self.order} cannot be "
                f"{self.blocks} blocks of {self.left} x {self.right}"
            )
        if _base_order(self.right) != 1:
            raise RecipeError(
                f"the right factor of a Hadamard rotation must be a power of two, not {self.right}"
            )
        if _base_order(self.left) is None:
            raise RecipeError(f"no Hadamard matrix of order {self.left} can be constructed")

    @classmethod
    def of(
        cls, order: int, seed: int | None, keeps_mean: bool = False, block: int | None = None
    ) -> "Hadamard":
        """The rotation of a width, with the smallest sum of its two factors' orders.

        A width without a Hadamard matrix gets equal diagonal blocks of the largest constructible
        order that divides it; `fallback` then says so.

        Args:
            order: the width.
            seed: of the signs, or of the spectrum; None leaves all of them +1.
            keeps_mean: R maps the all-ones vector to itself.
            block: the order of equal diagonal blocks; None for the largest that there is.

        Raises:
            RecipeError: order is not positive, or is not made of such blocks.
        """
        if order < 1:
            raise RecipeError(f"a Hadamard rotation needs a positive order, not {order}")
        block = block or _largest_block(order)
        base = _base_order(block)
        if order % block or base is None:
            raise RecipeError(f"no Hadamard rotation of order {order} has blocks of {block}")
        lefts = [base << i for i in range((block // base).bit_length())]
        left = min(lefts, key=lambda left: left + block // left)
        return cls(order, left, block // left, order // block, seed, keeps_mean)

    @property
    def fallback(self) -> str | None:
        """One line for the user where the order forced a block-diagonal rotation, else None."""
        if self.blocks == 1 or self.left * self.right != _largest_block(self.order):
            return None
        return (
            f"no Hadamard matrix of order {self.order} can be constructed: "
            f"block-diagonal rotation, {self.blocks} blocks of order {self.left * self.right}"
        )

    def signs(self) -> torch.Tensor:
        """The signs that the input is multiplied by before the Hadamard: int8 (order,)."""
        return self._flips() if self.keeps_mean else self._random_signs()

    def spectrum(self) -> torch.Tensor:
        """The spectrum of a rotation that keeps the mean: int8 (order,), 1 first in every block."""
        spectrum = self._random_signs()
        spectrum[:: self.left * self.right] = 1
        return spectrum

    def _flips(self) -> torch.Tensor:
        """The signs of the Hadamard's first column, which make it constant: int8 (order,)."""
        left, right = self.factors()
        return torch.kron(left[:, 0], right[:, 0]).repeat(self.blocks)

    def _random_signs(self) -> torch.Tensor:
        """Random signs from SHAKE-256, independent of torch's version: int8 (order,)."""
        if self.seed is None:
            return torch.ones(self.order, dtype=torch.int8, device="cpu")
        digest = hashlib.shake_256(f"smoothq:{self.order}:{self.seed}".encode())
        packed = np.frombuffer(digest.digest(math.ceil(self.order / 8)), dtype=np.uint8)
        bits = np.unpackbits(packed, count=self.order).astype(np.int8)
        return torch.from_numpy(1 - 2 * bits)

    @property
    def base(self) -> int:
        """The order of a block's factor that is not Sylvester's; 1 where there is none."""
        base = _base_order(self.left * self.right)
        assert base is not None
        return base

    def factors(self, left: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """H_left, int8 (left, left), and H_right, int8 (right, right): entries ±1, unnormalised.

        Args:
            left: another order of H_left, `base` times a power of two; the Kronecker product is the
                same, for both factors are Sylvester's beyond the base. None: as stored.
        """
        left = self.left if left is None else left
        return hadamard_matrix(left), hadamard_matrix(self.left * self.right // left)

    def matrix(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """R itself, dense and orthogonal: (order, order) of the given floating dtype."""
        return self.apply(torch.eye(self.order, dtype=dtype, device="cpu"))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x R, without forming R.

        Args:
            x: float (..., order), any device; computed in float32, float64 in float64.

        Returns:
            (..., order) in x's dtype.

        Raises:
            ValueError: x is not floating, or its last dimension is not `order`.
        """
        return self._rotate(x, transposed=False)

    def apply_transposed(self, x: torch.Tensor) -> torch.Tensor:
        """x Rᵀ, the inverse of `apply`; arguments, result and errors as there."""
        return self._rotate(x, transposed=True)

    def to_dict(self) -> dict[str, int | str | None]:
        """The arguments of the rotation and the SHA-256 of its factors, for JSON."""
        stored: dict[str, int | str | None] = {
            "order": self.order,
            "left": self.left,
            "right": self.right,
            "blocks": self.blocks,
            "seed": self.seed,
            "sha256": self._sha256(),
        }
        return stored | ({"keeps_mean": True} if self.keeps_mean else {})

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "Hadamard":
        """The rotation of a `to_dict`, constructed again and compared by its hash.

        Raises:
            CheckpointError: an entry is missing, malformed or does not match; names it.
        """
        for name in ("order", "left", "right", "blocks", "seed", "sha256"):
            if name not in d:
                raise CheckpointError(f"the stored Hadamard rotation has no {name!r}")
            expected = str if name == "sha256" else int
            if type(d[name]) is not expected and not (name == "seed" and d[name] is None):
                raise CheckpointError(f"the stored Hadamard rotation has {name} = {d[name]!r}")
        try:
            values = {name: d[name] for name in ("order", "left", "right", "blocks", "seed")}
            rotation = cls(**values, keeps_mean=d.get("keeps_mean") is True)
        except RecipeError as error:
            raise CheckpointError(f"the stored Hadamard rotation is impossible: {error}") from error
        rebuilt = rotation._sha256()
        if rebuilt != d["sha256"]:
            raise CheckpointError(
                f"the rebuilt {rotation} differs from the stored one: "
                f"sha256 {rebuilt} instead of {d['sha256']}; "
                "load it with the version of smoothq that wrote it, or quantize again"
            )
        return rotation

    def _sha256(self) -> str:
        parts = [self.signs(), *self.factors()]
        if self.keeps_mean:
            parts.append(self.spectrum())
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()

    def _rotate(self, x: torch.Tensor, transposed: bool) -> torch.Tensor:
        if not x.is_floating_point() or x.shape[-1:] != (self.order,):
            raise ValueError(
                f"expected a floating tensor (..., {self.order}), got {tuple(x.shape)} of {x.dtype}"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        left, right = (factor.to(x.device, dtype) for factor in self.factors())
        # The factors stay at an exact ±1: the one rounded constant is folded into the signs.
        signs = self.signs().to(x.device, dtype) / math.sqrt(self.left * self.right)
        spectrum = self.spectrum().to(x.device, dtype) if self.keeps_mean else None

        rows = x.reshape(-1, self.order)
        out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        step = max(1, _CHUNK_ELEMENTS // self.order)
        for start in range(0, rows.shape[0], step):
            part = rows[start : start + step].to(dtype)
            if spectrum is not None:
                # R is symmetric: the transpose is the same.
                part = _forth(part, signs, left, right) * spectrum
                part = _back(part, signs, left, right)
            else:
                part = (_back if transposed else _forth)(part, signs, left, right)
            out[start : start + step] = part
        return out.reshape(x.shape)


def _forth(
    rows: torch.Tensor, signs: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """rows · diag(signs) · (I ⊗ left ⊗ right)."""
    # A row read as (left, right) blocks V: vec(V) (A ⊗ B) = vec(Aᵀ V B).
    blocks = (rows * signs).reshape(-1, len(left), len(right))
    return (left.T @ (blocks @ right)).reshape(rows.shape)


def _back(
    rows: torch.Tensor, signs: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """rows · (I ⊗ left ⊗ right)ᵀ · diag(signs)."""
    blocks = rows.reshape(-1, len(left), len(right))
    return (left @ (blocks @ right.T)).reshape(rows.shape) * signs


def _largest_block(order: int) -> int:
    """The largest order of a Hadamard matrix that divides an order."""
    orders = range(order, 0, -1)
    return next(n for n in orders if order % n == 0 and _base_order(n) is not None)


def _base_order(order: int) -> int | None:
    """The smallest directly constructible order that is `order` over a power of two, or None."""
    if order < 1:
        return None
    odd = order // (order & -order)
    if odd == 1:
        return 1
    base = 4 * odd  # beyond 1 and 2, Hadamard orders are multiples of 4
    while base <= order:
        if _paley_field(base) is not None:
            return base
        base *= 2
    return None


def _paley_field(order: int) -> tuple[int, int] | None:
    """(p, k) of the field GF(p^k) that gives a Paley matrix of this multiple of 4, or None.

    Paley I has order p^k + 1; Paley II, which needs p^k ≡ 1 mod 4, has order 2 (p^k + 1).
    """
    first = _prime_power(order - 1)
    return first if first or order % 8 == 0 else _prime_power(order // 2 - 1)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, for q ≥ 2; None if q is no prime power."""
    p = next((n for n in range(2, math.isqrt(q) + 1) if q % n == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def _sylvester(order: int) -> torch.Tensor:
    """Sylvester's matrix, int8 (order, order), for a power of two."""
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
    one = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    return reduce(torch.kron, [two] * (order.bit_length() - 1), one)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # it outlives the caller's mode
def _base_matrix(base: int) -> torch.Tensor:
    """The matrix of a base order, int8 (base, base); shared between callers, never written to."""
    field = _paley_field(base) if base > 1 else None
    if field is None:
        return torch.ones(1, 1, dtype=torch.int8, device="cpu")
    conference = _conference_matrix(*field)
    if base == len(conference):
        # Paley I: C is skew, so that (C + I)(C + I)ᵀ = C Cᵀ + I.
        return conference.fill_diagonal_(1)
    # Paley II: [[C + I, C - I], [C - I, -C - I]]; C is symmetric, so that the cross terms cancel.
    half = len(conference)
    matrix = torch.kron(_sylvester(2), conference)
    matrix.diagonal(half).fill_(-1)
    matrix.diagonal(-half).fill_(-1)
    matrix.diagonal()[:half] = 1
    matrix.diagonal()[half:] = -1
    return matrix


def _conference_matrix(p: int, k: int) -> torch.Tensor:
    """Paley's C over GF(q), q = p^k: zero diagonal, ±1 elsewhere, C Cᵀ = q I; int8 (q+1, q+1).

    C is [[0, 1], [χ(-1), Q]] with Q[a, b] = χ(b - a) and χ the quadratic character; it is skew for
    q ≡ 3 mod 4 and symmetric for q ≡ 1 mod 4. The field's elements come as 0, 1, x, x², ...
    """
    powers = _field_by_powers(p, k)
    character = {power: 1 - 2 * (e % 2) for e, power in enumerate(powers)}  # even powers: squares
    of_power = np.array(list(character.values()), dtype=np.int8)
    minus_one = np.int8(character[(p - 1,) + (0,) * (k - 1)])
    # χ(x^d - 1) for d = 0, 1, ...; zero, at d = 0, is no power.
    of_predecessor = np.array(
        [character.get(((units - 1) % p, *rest), 0) for units, *rest in powers], dtype=np.int8
    )
    # χ(x^j - x^i) = χ(x^i) χ(x^(j-i) - 1): a circulant with signed rows, filled without a table.
    cycle = np.concatenate([of_predecessor[1:], of_predecessor])
    circulant = np.lib.stride_tricks.sliding_window_view(cycle, len(powers))[::-1]

    conference = np.zeros((p**k + 1, p**k + 1), dtype=np.int8)
    conference[0, 1:] = 1
    conference[1:, 0] = minus_one
    conference[1, 2:] = of_power
    conference[2:, 1] = minus_one * of_power
    np.multiply(of_power[:, None], circulant, out=conference[2:, 2:])
    return torch.from_numpy(conference)


def _field_by_powers(p: int, k: int) -> list[tuple[int, ...]]:
    """The p^k - 1 non-zero elements of GF(p^k) as powers 1, x, x², ... of a generator x.

    An element is its digits: the coefficients mod p of 1, x, ..., x^(k-1).
    """
    # Try x^k = constant + upper · (x, ...) until x reaches everything: then the ring is a field.
    candidates = itertools.product(*[range(p)] * (k - 1), range(1, p))
    return next(
        powers
        for *upper, constant in candidates
        if len(powers := _powers_of_x(p, (constant, *upper))) == p**k - 1
    )


def _powers_of_x(p: int, reduction: tuple[int, ...]) -> list[tuple[int, ...]]:
    """1, x, x², ... until 1 comes round again, as digits mod p, where x^k = Σ reduction[i] x^i."""
    one = (1,) + (0,) * (len(reduction) - 1)
    powers = [one]
    while True:
        *rest, top = powers[-1]
        shifted = (0, *rest)
        power = tuple([(s + top * r) % p for s, r in zip(shifted, reduction, strict=True)])
        if power == one:
            return powers
        powers.append(power)
