"""Parts that the row kernels share: the arithmetic of rows, the tile of a program, and what
launchers need.
"""

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import capturing

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def finite(maximum):
    """What log-sum-exp subtracts while it adds up: infinite, it would make NaN of inf - inf."""
    return tl.minimum(tl.maximum(maximum, -LARGEST), LARGEST)


# the interpreter has no inline assembly
INTERPRETED = tl.constexpr(not isinstance(finite, triton.JITFunction))


@triton.jit
def exp2(x):
    """2^x in one instruction, within 2 ulp; 0 below 2^-126.

    `tl.exp2` and `tl.exp` spend three more on subnormals.
    """
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exp(x):
    """e^x.

    For e^(logit - maximum) the difference has to come first: it is exact where it matters, near 0.
    """
    return exp2(x * LOG2_E)


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0, in full accuracy near 0."""
    # the Taylor series to x^10, within half an ulp for |x| <= 0.7, where e^x > 1/2
    series = 1.0 + x * 0.1
    series = 1.0 + x * (1.0 / 9.0) * series
    series = 1.0 + x * (1.0 / 8.0) * series
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * 0.25 * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * 0.5 * series
    return tl.where(x > -0.7, x * series, exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= -1, in full accuracy near 0: what 1 + x rounds away comes back as a
    quotient.
    """
    total = 1.0 + x
    return tl.log(total) + tl.where(tl.abs(x) < 0.5, (x - (total - 1.0)) / total, 0.0)


@triton.jit
def widen(x):
    """A block of logits as fp32: two of bf16 share a register, so a shift and a mask, where the
    compiler takes four.
    """
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            tl.float32,
            is_pure=True,
            pack=2,
        )


@triton.jit
def columns_of(DEPTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """[DEPTH * ROWS, LANES]: how far an element of a tile is from the tile's first column."""
    piece = tl.arange(0, DEPTH * ROWS) // ROWS
    return piece[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def tile(
    first_row,
    rows,
    length,
    first_column,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """ROWS rows of ``length`` elements, DEPTH * LANES columns from ``first_column``: (row, inside,
    start, at, mask).

    Blocks are [DEPTH, ROWS, LANES], of which DEPTH lies within a thread: to add up a row costs the
    fewest exchanges. In memory they are [DEPTH * ROWS, LANES], as ``at`` and ``mask`` are: from
    three axes Triton 3.6 would give each warp a part of DEPTH. An element is at start + at: start
    has 64 bits, as ``first_row`` has, what is added to it 32.
    """
    row = first_row + tl.arange(0, ROWS)
    inside = row < rows
    column = columns_of(DEPTH, ROWS, LANES)
    left = tl.minimum(length - first_column, DEPTH * LANES).to(tl.int32)
    at = (tl.arange(0, DEPTH * ROWS) % ROWS)[:, None] * length + column
    mask = lines(inside, DEPTH) & (column < left)
    return row, inside, first_row * length + first_column, at, mask


@triton.jit
def read(pointers, mask, other, DEPTH: tl.constexpr):
    """The elements of a tile as fp32: [DEPTH, ROWS, LANES]."""
    x = widen(tl.load(pointers, mask=mask, other=other))
    return tl.reshape(x, [DEPTH, x.shape[0] // DEPTH, x.shape[1]])


@triton.jit
def write(pointers, x, mask):
    """Stores a block [DEPTH, ROWS, LANES] where a tile is."""
    x = tl.reshape(x.to(pointers.dtype.element_ty), pointers.shape)
    tl.store(pointers, x, mask=mask)


@triton.jit
def part_of(parts, ROWS: tl.constexpr):
    """(part, first_row) of this program, where ``parts`` programs share ROWS rows."""
    return tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64) * ROWS


@triton.jit
def across(rows):
    """[ROWS] -> [1, ROWS, 1], for all columns of a block."""
    return rows[None, :, None]


@triton.jit
def lines(rows, DEPTH: tl.constexpr):
    """[ROWS] -> [DEPTH * ROWS, 1], the same for a tile in memory."""
    every = tl.broadcast_to(rows[None, :], [DEPTH, rows.shape[0]])
    return tl.reshape(every, [DEPTH * rows.shape[0]])[:, None]


@triton.jit
def row_max(x):
    """[DEPTH, ROWS, LANES] -> [ROWS]"""
    return tl.max(tl.max(x, 0), 1)


@triton.jit
def row_sum(x):
    """[DEPTH, ROWS, LANES] -> [ROWS]"""
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def interior(row, length, VECTOR: tl.constexpr):
    """(head, columns): after ``head`` elements a row of any length has ``columns`` that are aligned
    to VECTOR.
    """
    head = ((VECTOR - (row * length) % VECTOR) % VECTOR).to(tl.int32)
    return head, (length - head) // VECTOR * VECTOR


@triton.jit
def aligned_start(row, length, VECTOR: tl.constexpr):
    """Where the interior of a row begins in memory: row * length + head, seen to be aligned."""
    return (row * length + (VECTOR - 1)) // VECTOR * VECTOR


@triton.jit
def edges(lane, head, columns, length, VECTOR: tl.constexpr):
    """(column, mask) of the elements before and after the interior, of which there are fewer than 2
    VECTOR.
    """
    column = tl.where(lane < VECTOR, lane, head + columns + lane - VECTOR)
    return column, tl.where(lane < VECTOR, lane < head, column < length) & (lane < 2 * VECTOR)


# --- host side ------------------------------------------------------------------------------------

# As for the list ops: a product and a sum round twice, whatever Triton's default of the day
STRICT = {"enable_fp_fusion": False}


def split(temperature: float) -> tuple[float, float]:
    """temperature = high + low, high with 12 bits; past 1e30 the powers are 0, 1 and inf as for
    infinity.
    """
    temperature = min(temperature, 1e30)
    mantissa, exponent = math.frexp(temperature)
    high = math.ldexp(round(mantissa * 4096.0), exponent - 12)
    return high, temperature - high


def power_of_two(n: int) -> int:
    """Smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def alignment(n: int) -> int:
    """Largest power of two up to 16 that divides n: rows start aligned to that many elements."""
    return math.gcd(n, 16)


def peel(n: int, dtype: torch.dtype) -> int:
    """0 where rows of n elements start aligned to 16 bytes, else the elements of 16 bytes; see
    ``interior``.
    """
    elements = 16 // dtype.itemsize
    return 0 if n % elements == 0 else elements


_counters: dict[tuple[int, int], Tensor] = {}


def arrival_counter(like: Tensor) -> Tensor:
    """int32 [1], 0 between launches: one for each stream, whose launches cannot overlap."""
    if not like.is_cuda:
        return torch.zeros(1, dtype=torch.int32)  # the interpreter
    if capturing(like):  # a graph may be replayed on any stream: it gets its own
        return torch.zeros(1, dtype=torch.int32, device=like.device)
    key = (like.device.index, torch.cuda.current_stream(like.device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=like.device)
    return _counters[key]


def on_device(like: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the tensors may be on another."""
    return torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()


def sample_outputs(like: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], losses [samples], weights [samples], uninitialised fp32, and log_normaliser [] in
    fp64.
    """
    loss, losses, weights = (
        like.new_empty(shape, dtype=torch.float32) for shape in ((), (samples,), (samples,))
    )
    return loss, losses, weights, like.new_empty((), dtype=torch.float64)


def tile_shape(
    rows: int, columns: int, dtype: torch.dtype, size: int, share: int
) -> tuple[int, int, int]:
    """(DEPTH, ROWS, LANES) of a ``tile`` of about ``size`` elements over all columns, ``share`` of
    them a thread's.

    As few threads to a row as do; their accesses have 16 bytes, or what divides ``columns``.
    """
    block = power_of_two(columns)
    width = min(alignment(columns), 16 // dtype.itemsize)
    lanes = min(max(block * width // share, width), block)
    return block // lanes, max(min(size // share * width // lanes, power_of_two(rows)), 1), lanes
