"""From packed bytes to what a product multiplies, in registers.

A byte holds a column of a block's first half and one of its second half (`unpack_int4`), so that a
tile of bytes becomes two tiles of the same shape, and the two meet the two halves of the tokens'
columns: nothing is moved between threads. Four bytes of a 32-bit register are worked on at once.
Compilers do not find these forms (they take bytes apart, 4 to 8 instructions a weight instead of
1 to 2), so NVIDIA's are written out in PTX; elsewhere the plain form beside each runs.
"""

import triton
import triton.language as tl

from .tiles import load_columns

# Bytes 16 · code, first half and second half: the nibble stays in the byte's upper half.
SHIFTED_PTX = """{
.reg .b32 t;
shl.b32 t, $2, 4;
and.b32 $1, $2, 0xf0f0f0f0;
and.b32 $0, t, 0xf0f0f0f0;
}"""

# Bytes code · m in 16-bit lanes: (code + 8) · m + (256 - 8 m), positive in the end whatever m's
# sign, so that the lanes' borrows cancel. $3 is m and $7 is 256 - 8 m in both lanes, of the first
# half; $11 and $15 of the second.
MULTIPLIED_PTX = """{
.reg .b32 u, a, b, c, d;
xor.b32 u, $2, 0x88888888;
and.b32 a, u, 0x000f000f;
mad.lo.u32 a, a, $3, $7;
shr.u32 b, u, 8;
and.b32 b, b, 0x000f000f;
mad.lo.u32 b, b, $3, $7;
shr.u32 c, u, 4;
and.b32 c, c, 0x000f000f;
mad.lo.u32 c, c, $11, $15;
shr.u32 d, u, 12;
and.b32 d, d, 0x000f000f;
mad.lo.u32 d, d, $11, $15;
prmt.b32 $0, a, b, 0x6240;
prmt.b32 $1, c, d, 0x6240;
}"""

# Codes as pairs of 16-bit floats: code + 8 is put below a power of two, then that and 8 are
# subtracted, exactly. The first two registers are the first half's four columns.
_FLOAT_PTX = """{{
.reg .b32 u, v, z, one, less, a, b, c, d;
mov.b32 z, 0;
mov.b32 one, {one};
mov.b32 less, {less};
xor.b32 u, $4, 0x88888888;
shr.u32 v, u, 4;
prmt.b32 a, u, z, 0x4140;
prmt.b32 b, u, z, 0x4342;
prmt.b32 c, v, z, 0x4140;
prmt.b32 d, v, z, 0x4342;
and.b32 a, a, 0x000f000f;
and.b32 b, b, 0x000f000f;
and.b32 c, c, 0x000f000f;
and.b32 d, d, 0x000f000f;
or.b32 a, a, {magic};
or.b32 b, b, {magic};
or.b32 c, c, {magic};
or.b32 d, d, {magic};
fma.rn.{kind}x2 $0, a, one, less;
fma.rn.{kind}x2 $1, b, one, less;
fma.rn.{kind}x2 $2, c, one, less;
fma.rn.{kind}x2 $3, d, one, less;
}}"""
BFLOAT16_PTX = _FLOAT_PTX.format(  # 128 + code + 8, then - 136
    kind="bf16", magic="0x43004300", one="0x3f803f80", less="0xc308c308"
)
FLOAT16_PTX = _FLOAT_PTX.format(  # 1024 + code + 8, then - 1032
    kind="f16", magic="0x64006400", one="0x3c003c00", less="0xe408e408"
)

_SHIFTED = tl.constexpr(SHIFTED_PTX)
_MULTIPLIED = tl.constexpr(MULTIPLIED_PTX)
_BFLOAT16 = tl.constexpr(BFLOAT16_PTX)
_FLOAT16 = tl.constexpr(FLOAT16_PTX)


@triton.jit
def shifted(packed, PTX: tl.constexpr):
    """16 · code as int8, first half and second half, of packed bytes as int8 (rows, bytes)."""
    if PTX:
        halves = tl.inline_asm_elementwise(
            _SHIFTED, "=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        halves = packed << 4, packed & -16
    return halves


@triton.jit
def times_multipliers(packed, m_first, m_second, PTX: tl.constexpr):
    """code · m as int8, both halves; packed: int8 (rows, bytes), m: int32 (rows,)."""
    if PTX:
        first, second = m_first * 0x00010001, m_second * 0x00010001
        halves = tl.inline_asm_elementwise(
            _MULTIPLIED,
            "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [
                packed,
                m_first[:, None],
                (0x01000100 - first * 8)[:, None],
                m_second[:, None],
                (0x01000100 - second * 8)[:, None],
            ],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        first = ((packed << 4) >> 4) * m_first.to(tl.int8)[:, None]
        halves = first, (packed >> 4) * m_second.to(tl.int8)[:, None]
    return halves


@triton.jit
def as_floats(packed, OPERAND: tl.constexpr, PTX: tl.constexpr):
    """Codes as floats of dtype OPERAND, both halves; packed: int8 (rows, bytes)."""
    if PTX and tl.bfloat16 == OPERAND:
        halves = tl.inline_asm_elementwise(
            _BFLOAT16,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    elif PTX and tl.float16 == OPERAND:
        halves = tl.inline_asm_elementwise(
            _FLOAT16,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        halves = ((packed << 4) >> 4).to(OPERAND), (packed >> 4).to(OPERAND)
    return halves


@triton.jit
def columns_of(k, K, BYTES: tl.constexpr, EVEN_K: tl.constexpr):
    """Where the columns of a tile of bytes stand: first half, second half, and which exist.

    k: the tile's first column, a multiple of 64. The last block of a row may be shorter than 64.
    """
    byte = tl.arange(0, BYTES)
    block, within = k + byte // 32 * 64, byte % 32
    half = 32
    if not EVEN_K:
        half = tl.where(block + 64 <= K, 32, (K - block + 1) // 2)
    return block + within, block + half + within, within < half


@triton.jit
def load_packed(token_pointers, weight_pointers, k, K, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """At columns k …: the tokens' first and second halves, and the bytes that both meet."""
    first, second, inside = columns_of(k, K, BLOCK_K // 2, EVEN_K)
    a = load_columns(token_pointers, first[:, None], inside[:, None], EVEN_K)
    b = load_columns(token_pointers, second[:, None], (inside & (second < K))[:, None], EVEN_K)
    byte = k // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    return a, b, load_columns(weight_pointers, byte, inside[None, :], EVEN_K)
