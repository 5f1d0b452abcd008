"""What the products of a linear multiply by, derived from its stored tensors."""

from __future__ import annotations

import sys
import weakref

from torch import Tensor


class RunningForm:
    """Operands that are derived from codes and scales, and live as long as the codes.

    Whoever replaces a module's tensors (accelerate brings those of an offloaded module before each
    forward, and drops them afterwards) thereby drops these, on whatever device they are.

    Attributes:
        packed_tokens: the most tokens for which a product multiplies by the packed codes.
        row_scale: float32 (N,), or None where groups have scales of their own.
        shift: float32 zero points times scales, or None without zero points.
        block_scale: float32 (N, G), scales that rows share by row and group, or None.
        multiplies_codes: whether the product is of floating-point codes on both sides.
        operand: int8 (N, K), for products with more tokens; None until it is needed.
    """

    packed_tokens: int
    row_scale: Tensor | None
    shift: Tensor | None
    block_scale: Tensor | None
    multiplies_codes: bool
    operand: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        packed_tokens: int,
        row_scale: Tensor | None,
        shift: Tensor | None,
        block_scale: Tensor | None = None,
        multiplies_codes: bool = False,
    ) -> None:
        """Create it without `operand`.

        Args:
            codes: the tensor whose end is its end.
            packed_tokens: as of the class.
            row_scale: as of the class.
            shift: as of the class.
            block_scale: as of the class.
            multiplies_codes: as of the class.
        """
        self.packed_tokens, self.row_scale, self.shift = packed_tokens, row_scale, shift
        self.block_scale, self.multiplies_codes = block_scale, multiplies_codes
        self.operand = None
        # Weak in both directions: a cycle would stay in memory until the collector runs.
        this = weakref.ref(self)
        self._codes = weakref.ref(codes, lambda _: _drop(this()))

    def is_of(self, codes: Tensor) -> bool:
        """Whether it was derived from that very tensor."""
        return self._codes() is codes

    def multiplies_packed(self, tokens: int) -> bool:
        """Whether a product with that many tokens multiplies by the packed codes."""
        return self.packed_tokens == sys.maxsize or tokens <= self.packed_tokens


def _drop(form: RunningForm | None) -> None:
    if form is not None:
        form.operand = form.row_scale = form.shift = form.block_scale = None
