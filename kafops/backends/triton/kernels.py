"""The Triton kernels. Imports triton, so only `kafops.backends.triton` imports it, and only when there is work.

Geometry. Memory is a matrix [B, M] with M = C L columns, of which column j has channel j // L. A program takes tiles
[R, W] of it, one after the other. RUNS: of one channel, whose units of W neighbours are numbered through its B runs,
and every parameter below is a scalar. Otherwise a tile has W columns of any channels and R of the B rows, and every
parameter is a vector [W]. Scalars and vectors broadcast against [R, W] alike, so that both cases share all formulas.

Curves are polynomials on cells of the x axis, as in csrc/cuda/cells.cuh, which has the mathematics: `tables_kernel`
makes a channel's tables, and the others look up, through the L1 cache, eight coefficients for each element and curve.
Sums over elements for an even dictionary are formed by powers, as in csrc/cuda/even.cuh. Where a call has no tables, or
a channel of a program no cells, the program is DIRECT: an exponential for each element and point, of any dictionary.

Numerics. Arithmetic is float64 for float64 x, which is always DIRECT, else float32. A name with _hi and one with _lo
are one number, their sum. `tl.fma` is written where a product must not be rounded. Sums over elements: a few tens of
them in registers, or in the program's own row of memory, and a tree over its threads; one row of partial sums for each
program, and `add_partial_sums_kernel` adds those in float64.
"""

# ruff: noqa: SIM102, SIM108, SIM300  (which branches Triton decides at compile time depends on how they are written)
# mypy: ignore-errors

import triton
import triton.language as tl

from kafops.backends.triton import cells

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(1e18)  # as in the reference: squares stay finite
MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it rounds to an integer, left in the low bits
MAGIC_BITS = tl.constexpr(0x4B400000)

WIDTH, WIDEST = tl.constexpr(cells.WIDTH), tl.constexpr(cells.WIDEST)
TAIL, UNDERFLOW = tl.constexpr(cells.TAIL), tl.constexpr(cells.UNDERFLOW)
LEAST_T, MOST_T = tl.constexpr(cells.LEAST_T), tl.constexpr(cells.MOST_T)
ROWS = tl.constexpr(cells.ROWS)
N0, N1, N2, N3 = (tl.constexpr(n) for n in cells.NODES)
COEFFICIENTS = tl.constexpr(tuple(c for row in cells.coefficients() for c in row))

# Curves, as in csrc/cuda/call.h: f; f′ and f″; q, the derivative of f along v, and q′; by γ f, f′ and q; by α f′ and q.
VALUE, SLOPE, CURVATURE, ALONG, ALONG_SLOPE = (tl.constexpr(i) for i in range(5))
BY_GAMMA, SLOPE_BY_GAMMA, ALONG_BY_GAMMA, SLOPE_BY_ALPHA, ALONG_BY_ALPHA = (tl.constexpr(i) for i in range(5, 10))

# Bits of `flags`: which parameters have a row for each channel, and whether there are tables.
ALPHA_ROWS, GAMMA_ROWS, DICTIONARY_ROWS, TABLES = (tl.constexpr(1 << i) for i in range(4))

# What lies beneath a curve: codes of kafops/bases.py.
IDENTITY, RELU, SILU = (tl.constexpr(i) for i in range(1, 4))

GEOMETRY = ("B", "C", "L", "units", "gap", "parts", "part", "rows_each", "magic", "shift")


# ------------------------------------------------------------------------------------------------------ arithmetic


@triton.jit
def _split(value):
    """Split a float64 into hi + lo of float32."""
    hi = value.to(tl.float32)
    return hi, (value - hi.to(tl.float64)).to(tl.float32)


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """Round to nearest even. The interpreter's conversion to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(value == value, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def _clamped(x, low, high):
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _far(x):
    """Clamp x to where squares are finite; NaN stays. Written out, as LLVM has no such clamp of float64 for sm_90."""
    return tl.where(x < -FAR, -FAR, tl.where(x > FAR, FAR, x))


@triton.constexpr_function
def _float(ptr):
    """The dtype of arithmetic on what ptr points to."""
    return tl.float64 if ptr.dtype.element_ty == tl.float64 else tl.float32


# -------------------------------------------------------------------------------------------------------- geometry


@triton.jit
def _place(
    program, B, C, L, units, gap, parts, part, rows_each, R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr,
    RUNS: tl.constexpr,
):  # fmt: skip
    """Find what a program has.

    units ALIGN is the number of columns that a tile may run along: L where RUNS, else M. Written so, the compiler sees
    what it is a multiple of, and accesses as many elements at once.

    Returns:
        offset of its first element; how many rows of tiles it has;
        channel; where its partial sums go, as an index of [chunks, C (RUNS) or M]; whether each such exists.
    """
    width = units.to(tl.int64) * ALIGN
    if RUNS:
        channel = (program % C).to(tl.int64)
        chunk = program // C
        row = (chunk // parts).to(tl.int64) * rows_each
        begin = (chunk % parts).to(tl.int64) * part
        offset = (row * C + channel) * width + begin * ALIGN
        count = tl.minimum(units - begin, part) * tl.minimum(B - row, rows_each)
        return offset, count.to(tl.int32), channel, program.to(tl.int64), True
    else:
        row = (program // parts).to(tl.int64) * rows_each
        column = (program % parts).to(tl.int64) * W
        lanes = column + tl.arange(0, W)
        count = tl.minimum(B - row, rows_each)
        channel = tl.minimum(lanes, width - 1) // L
        return row * width + column, count.to(tl.int32), channel, (program // parts) * width + lanes, lanes < width


@triton.jit
def _tile(
    i, count, exists, units, gap, magic, shift, R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr,
    RUNS: tl.constexpr,
):  # fmt: skip
    """Offsets within the i-th tile [R, W] of a program, and which elements exist."""
    q = i * R + tl.arange(0, R)[:, None]
    w = tl.arange(0, W)[None, :]
    if RUNS:
        run = (q.to(tl.uint32).to(tl.uint64) * magic.to(tl.uint32).to(tl.uint64)) >> shift
        return (q.to(tl.int64) + run.to(tl.int32).to(tl.int64) * gap) * ALIGN + w, q < count
    else:
        return q.to(tl.int64) * units * ALIGN + w, (q < count) & exists[None, :]


@triton.jit
def _load(ptr, offsets, inside, FLOAT: tl.constexpr):
    return tl.load(ptr + offsets, inside, other=0).to(FLOAT)


@triton.jit
def _store(ptr, offsets, inside, value):
    tl.store(ptr + offsets, _rounded(value, ptr.dtype.element_ty), inside)


@triton.jit
def _rows(channel, flags, D):
    """Where a channel's rows of α, γ and δ are: 0 for parameters that all channels share."""
    alpha, gamma, dictionary = flags & ALPHA_ROWS, (flags & GAMMA_ROWS) != 0, (flags & DICTIONARY_ROWS) != 0
    return channel * tl.where(alpha != 0, D, 0), channel * gamma.to(tl.int32), channel * tl.where(dictionary, D, 0)


@triton.jit
def _moved(ptr, offset):
    """ptr + offset, or None."""
    if ptr is None:
        return None
    else:
        return ptr + offset


@triton.jit
def _half(boundary, D, FLOAT: tl.constexpr):
    """Δ/2, of float32 arithmetic as hi + lo."""
    half = tl.full([], boundary, tl.float64) / tl.maximum(D - 1, 1).to(tl.float64)
    if FLOAT == tl.float64:
        return half, half
    else:
        return _split(half)


@triton.jit
def _bandwidth(gamma_ptr, FLOAT: tl.constexpr):
    """γ, and γ log2 e."""
    gamma = tl.load(gamma_ptr)
    return gamma.to(FLOAT), (gamma.to(tl.float64) * LOG2E).to(FLOAT)


# ------------------------------------------------------------------------------------------------------- one point


@triton.jit
def _point(dictionary_ptr, k, D, boundary, half_hi, half_lo, inside, FLOAT: tl.constexpr):
    """δ_k as hi + lo: that of the dictionary, or b (2k/(D - 1) - 1)."""
    if dictionary_ptr is not None:
        point = tl.load(dictionary_ptr + k, inside, other=0)
        hi = point.to(FLOAT)
        # 0 but for float64 points in float32 arithmetic, where hi may have overflown.
        lo = (point.to(tl.float64) - hi.to(tl.float64)).to(FLOAT)
        return hi, tl.where(tl.abs(hi) == float("inf"), 0.0, lo)
    else:
        n = (2 * k - (D - 1)).to(FLOAT)
        if FLOAT == tl.float64:
            hi = n / tl.maximum(D - 1, 1).to(tl.float64) * tl.full([], boundary, tl.float64)
            return hi, tl.zeros_like(hi)
        else:
            hi = tl.fma(n, half_hi, n * half_lo)
            lo = tl.fma(n, half_lo, tl.fma(n, half_hi, -hi))
            # The pair is good to 44 bits or more: points that float32 holds, as the outermost may be, are to be exact.
            return hi, tl.where(tl.abs(lo) < tl.abs(hi) * 5.7e-14, 0.0, lo)


@triton.jit
def _gaussian(d, gamma_log2e):
    """d and K = exp(-γ d²). Where K = 0, d is 0, so that no power of it times K is inf · 0."""
    K = tl.exp2(-(gamma_log2e * d * d))
    return tl.where(K == 0, 0.0, d), K


@triton.jit
def _optional(ptr, k, inside, like):
    """The k-th value, or 0 where there is no pointer; as `like`."""
    if ptr is None:
        return tl.zeros_like(like)
    else:
        return tl.load(ptr + k, inside, other=0).to(like.dtype)


@triton.jit
def _term(CURVE: tl.constexpr, d, K, gamma, alpha, v_alpha, v_gamma, v_dictionary):
    """What a point adds to a curve; csrc/kaf_math.h has the formulas (second_order)."""
    f = alpha * K
    w = gamma * -2 * d  # K' = w K
    m = v_gamma * -(d * d) - v_dictionary * w  # along v, K changes by m K
    if CURVE == VALUE:
        return f
    elif CURVE == SLOPE:
        return w * f
    elif CURVE == CURVATURE:
        return (w * w - 2 * gamma) * f
    elif CURVE == ALONG:
        return v_alpha * K + m * f
    elif CURVE == ALONG_SLOPE:
        return (gamma * v_dictionary * 2 - v_gamma * 2 * d) * f + w * (v_alpha * K + m * f)
    elif CURVE == BY_GAMMA:
        return -d * d * f
    elif CURVE == SLOPE_BY_GAMMA:
        return -d * (w * d + 2) * f
    elif CURVE == ALONG_BY_GAMMA:
        return (v_dictionary * 2 * d - d * d * m) * f - d * d * v_alpha * K
    elif CURVE == SLOPE_BY_ALPHA:
        return w * K
    else:
        return m * K


@triton.jit
def _base(x, ORDER: tl.constexpr, BASE: tl.constexpr):
    """The derivative of some order, at most 2, of a base at x: at ±inf its limit. csrc/cuda/base.cuh explains."""
    above, zero = tl.where(x > 0, x, 0.0), tl.zeros_like(x)
    a = tl.minimum(tl.abs(x), 750.0)  # where the tails are 0
    if BASE == IDENTITY:
        return x if ORDER == 0 else zero + (1 if ORDER == 1 else 0)
    elif BASE == RELU:
        return above if ORDER == 0 else tl.where(x > 0, zero + (1 if ORDER == 1 else 0), zero)
    elif BASE == SILU:
        e = tl.exp(-a)
        t = 1 / (e + 1)
        s = e * t  # σ(-|x|), and t = σ(|x|); σ′ = s t
        if ORDER == 0:
            return tl.fma(-a, s, above)
        elif ORDER == 1:
            return tl.where(x > 0, tl.fma(a * s, t, t), tl.fma(-a * s, t, s))
        else:
            return s * t * tl.fma(a, s - t, zero + 2)
    else:
        tail = 0.5 - tl.erf(a * 0.7071067811865476) * 0.5  # Φ(-|x|)
        density = tl.exp(a * a * -0.5) * 0.3989422804014327
        if ORDER == 0:
            return tl.fma(-a, tail, above)
        elif ORDER == 1:
            return tl.where(x > 0, tl.fma(a, density, 1 - tail), tl.fma(-a, density, tail))
        else:
            return density * (2 - a * a)


# ---------------------------------------------------------------------------------------------------------- tables


@triton.jit
def _table_of(workspace_ptr, channel, C, COUNT: tl.constexpr, CAPACITY: tl.constexpr, RUNS: tl.constexpr):
    """Where a channel's tables begin.

    After what is known of all channels' cells come, where RUNS, [channel][curve][coefficient][cell], so that few lanes
    of a warp have to wait for each other; else [channels / 32][curve][cell][coefficient][32], for the same reason.
    """
    ptr = workspace_ptr + (C + (ROWS - 1)).to(tl.int64) // ROWS * (ROWS * 8)
    if RUNS:
        return ptr + channel * (COUNT * CAPACITY * 8)
    else:
        return ptr + channel // ROWS * (COUNT * CAPACITY * 8 * ROWS) + channel % ROWS


@triton.jit
def _cell(row, RUNS: tl.constexpr):
    """Where a cell is, from there."""
    return row if RUNS else row * (8 * ROWS)


@triton.constexpr_function
def _step(curve, m, CAPACITY, RUNS):
    """Where the m-th coefficient of a curve is, from there."""
    return (curve * 8 + m) * CAPACITY if RUNS else (curve * CAPACITY * 8 + m) * cells.ROWS


@triton.jit(do_not_specialize=["flags", "D", "C"])
def tables_kernel(
    alpha_ptr, gamma_ptr, dictionary_ptr, v_alpha_ptr, v_gamma_ptr, v_dictionary_ptr, workspace_ptr,
    boundary: tl.float64, flags, D, C, CURVES: tl.constexpr, CAPACITY: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """A channel's cells, and its curves on each of them: values at eight nodes, then the polynomial through these."""
    COUNT: tl.constexpr = len(CURVES)
    channel = tl.program_id(0).to(tl.int64)
    alpha_at, gamma_at, dictionary_at = _rows(channel, flags, D)
    alpha_ptr += alpha_at
    if v_alpha_ptr is not None:
        v_alpha_ptr += alpha_at
    if dictionary_ptr is not None:
        dictionary_ptr += dictionary_at
    if v_dictionary_ptr is not None:
        v_dictionary_ptr += dictionary_at
    gamma, gamma_log2e = _bandwidth(gamma_ptr + gamma_at, tl.float32)
    gamma64 = tl.load(gamma_ptr + gamma_at).to(tl.float64)
    v_gamma = _optional(v_gamma_ptr, gamma_at, True, gamma)
    half_hi, half_lo = _half(boundary, D, tl.float32)

    # The points' range, and whether all is finite.
    first = tl.full([], float("inf"), tl.float32)
    last, wrong = -first, v_gamma * 0
    for start in range(0, D, 128):
        k = start + tl.arange(0, 128)
        inside = k < D
        hi, lo = _point(dictionary_ptr, k, D, boundary, half_hi, half_lo, inside, tl.float32)
        alpha = tl.load(alpha_ptr + k, inside, other=0).to(tl.float32)
        total = hi + alpha + _optional(v_alpha_ptr, k, inside, alpha) + _optional(v_dictionary_ptr, k, inside, alpha)
        wrong += tl.sum(tl.where(inside, total * 0, 0.0), 0)
        first = tl.minimum(first, tl.min(tl.where(inside, hi, float("inf")), 0))
        last = tl.maximum(last, tl.max(tl.where(inside, hi, float("-inf")), 0))

    # Their cells: of 12 significant bits, so that their centres are exact, and x less a centre too.
    unit, span = 1 / tl.sqrt(gamma64), last.to(tl.float64) - first.to(tl.float64)
    low, high, width = first - unit * TAIL, last + unit * TAIL, unit * WIDTH
    # In cells much wider than the distances that matter, d² would be lost against the error of interpolation.
    width = tl.where(span > 0, tl.minimum(tl.maximum(span, width * 0.0625), width), width)
    width = tl.maximum(width, tl.minimum((high - low) * (1 / (CAPACITY - 3.1)), width * WIDEST))
    ok = (wrong == 0) & (gamma64 > 0) & (width > 1e-30) & (width < 1e30)
    bits = tl.where(ok, width, 1.0).to(tl.float32).to(tl.uint32, bitcast=True)
    width32 = ((bits + 0xFFF) & 0xFFFFF000).to(tl.float32, bitcast=True)
    inverse = 1 / width32.to(tl.float64)
    begin, end = tl.ceil(low * inverse - 0.5), tl.floor(high * inverse + 0.5) + 2
    ok = ok & (begin > -4096) & (end < 4096) & (end - begin <= CAPACITY)
    begin, end = tl.where(ok, begin, 0.0).to(tl.int32), tl.where(ok, end, 1.0).to(tl.int32)
    count = end - begin - 1  # the last cell's polynomial is 0, and serves for every x without a cell
    kind = ok.to(tl.float32)
    if dictionary_ptr is None:
        t = gamma64 * 4 * (half_hi.to(tl.float64) + half_lo.to(tl.float64)) * (half_hi.to(tl.float64) + half_lo)
        kind += (ok & (D > 1) & (t >= LEAST_T) & (t <= MOST_T)).to(tl.float32)
    low, high = first - unit * UNDERFLOW, last + unit * UNDERFLOW
    to = workspace_ptr + channel * 8
    tl.store(to, width32)
    tl.store(to + 1, inverse.to(tl.float32))
    tl.store(to + 2, (low - tl.abs(low) * 0.015625).to(tl.float32))
    tl.store(to + 3, (high + tl.abs(high) * 0.015625).to(tl.float32))
    tl.store(to + 4, begin.to(tl.float32))
    tl.store(to + 5, count.to(tl.float32))
    tl.store(to + 6, kind)

    if ok:
        node, cell = tl.arange(0, 8)[:, None], tl.arange(0, CAPACITY)[None, :]
        inner = tl.where((node == 3) | (node == 4), N3, tl.where((node == 2) | (node == 5), N2, N1))
        inner = tl.where((node == 0) | (node == 7), N0, inner)
        shift = tl.where(node < 4, -inner, inner) * width32
        centre = (begin + cell).to(tl.float32) * width32
        values = ()
        for _ in tl.static_range(COUNT):
            values += (tl.zeros([8, CAPACITY], tl.float32),)
        for k in range(D):
            alpha = tl.load(alpha_ptr + k).to(tl.float32)
            v_alpha = _optional(v_alpha_ptr, k, True, alpha)
            v_dictionary = _optional(v_dictionary_ptr, k, True, alpha)
            hi, lo = _point(dictionary_ptr, k, D, boundary, half_hi, half_lo, True, tl.float32)
            d, K = _gaussian(((centre - hi) - lo) + shift, gamma_log2e)
            more = ()
            for c in tl.static_range(COUNT):
                more += (values[c] + _term(CURVES[c], d, K, gamma, alpha, v_alpha, v_gamma, v_dictionary),)
            values = more
        tables = _table_of(workspace_ptr, channel, C, COUNT, CAPACITY, RUNS) + _cell(cell, RUNS)
        doubles = ()
        for c in tl.static_range(COUNT):
            doubles += (values[c].to(tl.float64),)
        for m in tl.static_range(8):
            weight = tl.zeros([8, 1], tl.float64)
            for i in tl.static_range(8):
                weight = tl.where(node == i, tl.full([8, 1], COEFFICIENTS[8 * m + i], tl.float64), weight)
            for c in tl.static_range(COUNT):
                value = tl.sum(weight * doubles[c], 0, keep_dims=True).to(tl.float32)
                tl.store(tables + _step(c, m, CAPACITY, RUNS), tl.where(cell < count, value, 0.0))


@triton.jit
def _kind(workspace_ptr, channel, flags, RUNS: tl.constexpr):
    """Of all of a program's channels: 0 where one has no cells, 2 where sums may be formed by powers, else 1."""
    kind = tl.load(workspace_ptr + channel * 8 + 6, (channel >= 0) & ((flags & TABLES) != 0), other=0)
    return kind if RUNS else tl.min(kind, 0)


@triton.jit
def _cells(workspace_ptr, channel, flags):
    """A channel's cells: width and 1/width; where x is clamped; the first; the last. 0 where it has none."""
    fields = ()
    for i in tl.static_range(6):
        fields += (tl.load(workspace_ptr + channel * 8 + i, (channel >= 0) & ((flags & TABLES) != 0), other=0),)
    width, inverse, low, high, first, last = fields
    first = (first.to(tl.int32) + MAGIC_BITS).to(tl.uint32)
    return width, inverse, low, high, first, last.to(tl.int32).to(tl.uint32)


@triton.jit
def _find(x, where):
    """The cell that has x, clamped, and the place in it: -½ to ½."""
    width, inverse, _, _, first, last = where
    m = tl.fma(x, inverse, MAGIC)
    row = tl.minimum(m.to(tl.uint32, bitcast=True) - first, last).to(tl.int32)
    return row, tl.fma(-(m - MAGIC), width, x) * inverse


@triton.jit
def _polynomial(tables, row, v, curve: tl.constexpr, CAPACITY: tl.constexpr, RUNS: tl.constexpr):
    tables += _cell(row, RUNS)
    y = tl.load(tables + _step(curve, 7, CAPACITY, RUNS))
    for m in tl.static_range(6, -1, -1):
        y = tl.fma(y, v, tl.load(tables + _step(curve, m, CAPACITY, RUNS)))
    return y


# ------------------------------------------------------------------------------------------------------------ sums


@triton.jit
def _sum_rows(t):
    """Sum over dimension 0; a tree on GPUs, whereas the interpreter adds one after the other: 64 at once."""
    if INTERPRETED:
        for _ in tl.static_range(2):
            if t.shape[0] >= 64:
                if len(t.shape) == 1:
                    t = tl.sum(tl.reshape(t, [t.shape[0] // 64, 64]), 1)
                elif len(t.shape) == 2:
                    t = tl.sum(tl.reshape(t, [t.shape[0] // 64, 64, t.shape[1]]), 1)
                else:
                    t = tl.sum(tl.reshape(t, [t.shape[0] // 64, 64, t.shape[1], t.shape[2]]), 1)
    return tl.sum(t, 0)


@triton.jit
def _fold(t, WRAPS: tl.constexpr, RUNS: tl.constexpr):
    """Sum the elements of a tile [R, W] that one thread holds for a channel: to [threads], or [R / WRAPS, W]."""
    R: tl.constexpr = t.shape[0]
    if RUNS:
        t = tl.sum(t, 1)
        if WRAPS > 1:
            t = tl.sum(tl.reshape(t, [WRAPS, R // WRAPS]), 0)
    elif WRAPS > 1:
        t = tl.sum(tl.reshape(t, [WRAPS, R // WRAPS, t.shape[1]]), 0)
    return t


@triton.jit
def _zeros(COUNT: tl.constexpr, R: tl.constexpr, W: tl.constexpr, WRAPS: tl.constexpr, RUNS: tl.constexpr,
           FLOAT: tl.constexpr):  # fmt: skip
    """So many of what `_fold` makes of a tile of zeros."""
    zeros = ()
    for _ in tl.static_range(COUNT):
        if RUNS:
            zeros += (tl.zeros([R // WRAPS], FLOAT),)
        else:
            zeros += (tl.zeros([R // WRAPS, W], FLOAT),)
    return zeros


@triton.jit
def _powers(gamma_ptr, half_hi, half_lo, first, D, WINDOW: tl.constexpr):
    """What sums by powers need to know of a channel: csrc/cuda/even.cuh has the formulas.

    Returns 1/Δ as hi + lo, κ = 2γΔ log2 e, κ c, -t log2 e, the first anchor in steps from the dictionary's middle, Δ.
    """
    step = (half_hi.to(tl.float64) + half_lo.to(tl.float64)) * 2
    inverse_hi, inverse_lo = _split(1 / step)
    # Rounded, κ stands for a γ that all of this is exact for.
    kappa = (tl.load(gamma_ptr).to(tl.float64) * step * (2 * LOG2E)).to(tl.float32)
    begin = first - 0.5 * (D - 1)
    centre = tl.floor((begin + 0.5 * (WINDOW - 1)) * step.to(tl.float32) * kappa + 0.5)
    return inverse_hi, inverse_lo, kappa, centre, (kappa.to(tl.float64) * step * -0.5).to(tl.float32), begin + 2, step


@triton.jit
def _add_powers(sums, x, g, powers, WINDOW: tl.constexpr, WRAPS: tl.constexpr, RUNS: tl.constexpr):
    """sums + Σ_elements g E r^j, for the window's groups of five points, j = -2 ... 2."""
    inverse_hi, inverse_lo, kappa, centre, exponent, anchor, _ = powers
    # r = 2^(κ x - κ c): the product's own rounding error comes back as a factor. The 0 keeps it from being fused.
    p = tl.fma(x, kappa, 0.0)
    error = tl.fma(x, kappa, -p) * LN2
    p = _clamped(p - centre, -60.0, 60.0)
    r, s = tl.exp2(p), tl.exp2(-p)
    r, s = tl.fma(r, error, r), tl.fma(s, -error, s)
    result = ()
    for q in tl.static_range(WINDOW // 5):
        e = tl.fma(x, inverse_lo, tl.fma(x, inverse_hi, -(anchor + 5 * q)))
        w = g * tl.exp2(exponent * e * e)
        terms = (w * (s * s), w * s, w, w * r, w * (r * r))
        for j in tl.static_range(5):
            result += (sums[5 * q + j] + _fold(terms[j], WRAPS, RUNS),)
    return result


@triton.jit
def _scales(powers, i, RUNS: tl.constexpr):
    """What the sum of the window's i-th point is to be multiplied by: exp(-t j² - 2 t a j), and κ c undone."""
    _, _, kappa, centre, _, anchor, step = powers
    if not RUNS:
        i, kappa, centre = i[None, :], kappa[:, None], centre[:, None]
    j = (i % 5 - 2).to(tl.float32)
    a = anchor + (i // 5 * 5).to(tl.float32)
    exponent = (-0.5 * j * (j + 2 * a)).to(tl.float64) * (kappa.to(tl.float64) * step) + j * centre
    hi, lo = _split(exponent)
    power = tl.exp2(hi)
    return tl.fma(power, lo * LN2, power)


@triton.jit
def _four(sums, m: tl.constexpr, COUNT: tl.constexpr):
    """The sums m ... m + 3 over a program: [4] or [W, 4]."""
    zero = tl.zeros_like(sums[0])
    four = ()
    for i in tl.static_range(4):
        four += (sums[m + i] if m + i < COUNT else zero,)
    t = tl.join(tl.join(four[0], four[2]), tl.join(four[1], four[3]))
    if len(zero.shape) == 1:
        return _sum_rows(tl.reshape(t, [t.shape[0], 4]))
    else:
        return _sum_rows(tl.reshape(t, [t.shape[0], t.shape[1], 4]))


# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _add_to_memory(ptr, k, i, term, factor, exists, RUNS: tl.constexpr):
    """Add a tile's sum times a factor to the program's sum of point k, which only this program has."""
    before = tl.load(ptr + k, (i > 0) & exists, other=0)
    total = tl.sum(term) if RUNS else _sum_rows(term)
    tl.store(ptr + k, tl.fma(total, factor, before), (i >= 0) & exists)


@triton.jit
def _store_sums(ptr, exists, sums, powers, first, D, WINDOW: tl.constexpr, RUNS: tl.constexpr):
    """Leave a program's sums for the window's points, as `_add_powers` formed them."""
    for m in tl.static_range(0, WINDOW, 4):
        i = m + tl.arange(0, 4)
        inside = (i < WINDOW) & (first + i < D)
        total = _four(sums, m, WINDOW) * _scales(powers, i, RUNS)
        if RUNS:
            tl.store(ptr + (first + i), total, inside)
        else:
            tl.store(ptr[:, None] + (first + i)[None, :], total, inside[None, :] & exists[:, None])


@triton.jit(do_not_specialize=["flags", "D", *GEOMETRY])
def kaf_kernel(
    x_ptr, y_ptr, alpha_ptr, gamma_ptr, dictionary_ptr, workspace_ptr, boundary: tl.float64, flags, D,
    B, C, L, units, gap, parts, part, rows_each, magic, shift,
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr, CAPACITY: tl.constexpr,
    BASE: tl.constexpr,
):  # fmt: skip
    """y = base(x) + Σ_k α_k exp(-γ (x - δ_k)²)."""
    offset, count, channel, _, exists = _place(
        tl.program_id(0), B, C, L, units, gap, parts, part, rows_each, R, W, ALIGN, RUNS
    )
    x_ptr += offset
    y_ptr += offset
    kind = 0
    if CAPACITY:
        kind = _kind(workspace_ptr, channel, flags, RUNS)
        if kind > 0:
            _on_cells(
                x_ptr, y_ptr, workspace_ptr, channel, flags, count, exists, C, units, gap, magic, shift, R, W, ALIGN,
                RUNS, CAPACITY, BASE,
            )  # fmt: skip
    if kind == 0:
        alpha_at, gamma_at, dictionary_at = _rows(channel, flags, D)
        _direct(
            x_ptr, y_ptr, alpha_ptr + alpha_at, gamma_ptr + gamma_at, _moved(dictionary_ptr, dictionary_at), D,
            boundary, count, exists, units, gap, magic, shift, R, W, ALIGN, RUNS, BASE,
        )  # fmt: skip


@triton.jit
def _on_cells(
    x_ptr, y_ptr, workspace_ptr, channel, flags, count, exists, C, units, gap, magic, shift,
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr, CAPACITY: tl.constexpr,
    BASE: tl.constexpr,
):  # fmt: skip
    where = _cells(workspace_ptr, channel, flags)
    tables = _table_of(workspace_ptr, channel, C, 1, CAPACITY, RUNS)
    for i in range(tl.cdiv(count, R)):
        offsets, inside = _tile(i, count, exists, units, gap, magic, shift, R, W, ALIGN, RUNS)
        x = _load(x_ptr, offsets, inside, tl.float32)
        row, v = _find(_clamped(x, where[2], where[3]), where)
        y = _polynomial(tables, row, v, 0, CAPACITY, RUNS)
        if BASE:
            y += _base(x, 0, BASE)
        _store(y_ptr, offsets, inside, y)


@triton.jit
def _direct(
    x_ptr, y_ptr, alpha_ptr, gamma_ptr, dictionary_ptr, D, boundary, count, exists, units, gap, magic, shift,
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    FLOAT: tl.constexpr = _float(x_ptr)
    _, gamma_log2e = _bandwidth(gamma_ptr, FLOAT)
    half_hi, half_lo = _half(boundary, D, FLOAT)
    for i in range(tl.cdiv(count, R)):
        offsets, inside = _tile(i, count, exists, units, gap, magic, shift, R, W, ALIGN, RUNS)
        x = _load(x_ptr, offsets, inside, FLOAT)
        near, y = _far(x), tl.zeros([R, W], FLOAT)
        for k in range(D):
            hi, lo = _point(dictionary_ptr, k, D, boundary, half_hi, half_lo, True, FLOAT)
            K = _gaussian((near - hi) - lo, gamma_log2e)[1]
            y = tl.fma(tl.load(alpha_ptr + k).to(FLOAT), K, y)
        if BASE:
            y += _base(x, 0, BASE)
        _store(y_ptr, offsets, inside, y)


@triton.jit(do_not_specialize=["flags", "D", *GEOMETRY, "windows", "slots"])
def kaf_backward_kernel(
    grad_ptr, x_ptr, dx_ptr, sums_ptr, alpha_ptr, gamma_ptr, dictionary_ptr, workspace_ptr, boundary: tl.float64,
    flags, D, B, C, L, units, gap, parts, part, rows_each, magic, shift, windows, slots,
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr, CAPACITY: tl.constexpr,
    WRAPS: tl.constexpr, WINDOW: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr, DICTIONARY: tl.constexpr,
    BASE: tl.constexpr,
):  # fmt: skip
    """dx = g (base + f)′(x)    dα_k = Σ_n g K    dγ = Σ_n g ∂f/∂γ(x)    dδ_k = 2γ α Σ_n g d K.

    The sums over elements n are those of one program, [chunks, C (RUNS) or M, slots]: for the points of α, for those of
    δ, and for γ. A program has a window of the points, and that of the first has dx and γ too.
    """
    POWERS: tl.constexpr = CAPACITY and ALPHA and not DICTIONARY and dictionary_ptr is None
    offset, count, channel, partial, exists = _place(
        tl.program_id(0) // windows, B, C, L, units, gap, parts, part, rows_each, R, W, ALIGN, RUNS
    )
    first = tl.program_id(0) % windows * WINDOW
    grad_ptr += offset
    x_ptr += offset
    dx_ptr = _moved(dx_ptr, offset)
    sums_ptr = _moved(sums_ptr, partial * slots)
    alpha_at, gamma_at, dictionary_at = _rows(channel, flags, D)
    alpha_ptr += alpha_at
    gamma_ptr += gamma_at
    dictionary_ptr = _moved(dictionary_ptr, dictionary_at)
    kind = _kind(workspace_ptr, channel, flags, RUNS) if CAPACITY else 0
    if POWERS:
        if kind == 2:
            _backward_by_powers(
                grad_ptr, x_ptr, dx_ptr, sums_ptr, gamma_ptr, workspace_ptr, channel, flags, boundary, D, first, slots,
                count, exists, C, units, gap, magic, shift, R, W, ALIGN, RUNS, CAPACITY, WRAPS, WINDOW, GAMMA, BASE,
            )  # fmt: skip
    count = tl.where((first == 0) & (kind < (2 if POWERS else 3)), count, 0)
    if count > 0:
        _backward_by_points(
            grad_ptr, x_ptr, dx_ptr, sums_ptr, alpha_ptr, gamma_ptr, dictionary_ptr, workspace_ptr, channel, flags,
            kind > 0, boundary, D, slots, count, exists, C, units, gap, magic, shift, R, W, ALIGN, RUNS, CAPACITY,
            WRAPS, ALPHA, GAMMA, DICTIONARY, BASE,
        )  # fmt: skip


@triton.jit
def _backward_by_powers(
    grad_ptr, x_ptr, dx_ptr, sums_ptr, gamma_ptr, workspace_ptr, channel, flags, boundary, D, first, slots,
    count, exists, C, units, gap, magic, shift,
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr, CAPACITY: tl.constexpr,
    WRAPS: tl.constexpr, WINDOW: tl.constexpr, GAMMA: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    half_hi, half_lo = _half(boundary, D, tl.float32)
    where = _cells(workspace_ptr, channel, flags)
    tables = _table_of(workspace_ptr, channel, C, 1 + GAMMA, CAPACITY, RUNS)
    powers = _powers(gamma_ptr, half_hi, half_lo, first, D, WINDOW)
    sums = _zeros(WINDOW, R, W, WRAPS, RUNS, tl.float32)
    dgamma = _zeros(1, R, W, WRAPS, RUNS, tl.float32)[0]
    for i in range(tl.cdiv(count, R)):
        offsets, inside = _tile(i, count, exists, units, gap, magic, shift, R, W, ALIGN, RUNS)
        raw = _load(x_ptr, offsets, inside, tl.float32)
        x = _clamped(raw, where[2], where[3])
        g = _load(grad_ptr, offsets, inside, tl.float32)
        if dx_ptr is not None or GAMMA:
            if first == 0:
                row, v = _find(x, where)
                if dx_ptr is not None:
                    slope = _polynomial(tables, row, v, 0, CAPACITY, RUNS)
                    if BASE:
                        slope += _base(raw, 1, BASE)
                    _store(dx_ptr, offsets, inside, g * slope)
                if GAMMA:
                    dgamma += _fold(g * _polynomial(tables, row, v, 1, CAPACITY, RUNS), WRAPS, RUNS)
        sums = _add_powers(sums, x, g, powers, WINDOW, WRAPS, RUNS)
    _store_sums(sums_ptr, exists, sums, powers, first, D, WINDOW, RUNS)
    if GAMMA:
        tl.store(sums_ptr + (slots - 1), _sum_rows(dgamma), (first == 0) & exists)


@triton.jit
def _backward_by_points(
    grad_ptr, x_ptr, dx_ptr, sums_ptr, alpha_ptr, gamma_ptr, dictionary_ptr, workspace_ptr, channel, flags,
    on_cells, boundary, D, slots, count, exists, C, units, gap, magic, shift,
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr, CAPACITY: tl.constexpr,
    WRAPS: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr, DICTIONARY: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    FLOAT: tl.constexpr = _float(x_ptr)
    gamma, gamma_log2e = _bandwidth(gamma_ptr, FLOAT)
    half_hi, half_lo = _half(boundary, D, FLOAT)
    if CAPACITY:
        where = _cells(workspace_ptr, channel, flags)
        tables = _table_of(workspace_ptr, channel, C, 1 + GAMMA, CAPACITY, RUNS)
    end = D if ALPHA or DICTIONARY else tl.where(on_cells, 0, D)
    dgamma = _zeros(1, R, W, WRAPS, RUNS, FLOAT)[0]
    for i in range(tl.cdiv(count, R)):
        if ALPHA or DICTIONARY:
            tl.debug_barrier()  # between what one tile and the next add to memory
        offsets, inside = _tile(i, count, exists, units, gap, magic, shift, R, W, ALIGN, RUNS)
        raw = _load(x_ptr, offsets, inside, FLOAT)
        x = _far(raw)
        g = _load(grad_ptr, offsets, inside, FLOAT)
        slope, square = tl.zeros([R, W], FLOAT), tl.zeros([R, W], FLOAT)
        for k in range(end):
            hi, lo = _point(dictionary_ptr, k, D, boundary, half_hi, half_lo, True, FLOAT)
            d, K = _gaussian((x - hi) - lo, gamma_log2e)
            alpha = tl.load(alpha_ptr + k).to(FLOAT)
            if on_cells == 0:
                f = alpha * K * d
                slope += f
                square = tl.fma(f, d, square)
            w = g * K
            if ALPHA:
                _add_to_memory(sums_ptr, k, i, w, 1.0, exists, RUNS)
            if DICTIONARY:
                _add_to_memory(sums_ptr + (D if ALPHA else 0), k, i, w * d, alpha * gamma * 2, exists, RUNS)
        slope, square = slope * (gamma * -2), -square
        if CAPACITY:
            if on_cells:
                row, v = _find(_clamped(x, where[2], where[3]), where)
                slope = _polynomial(tables, row, v, 0, CAPACITY, RUNS)
                if GAMMA:
                    square = _polynomial(tables, row, v, 1, CAPACITY, RUNS)
        if dx_ptr is not None:
            if BASE:
                slope += _base(raw, 1, BASE)
            _store(dx_ptr, offsets, inside, g * slope)
        if GAMMA:
            dgamma += _fold(g * square, WRAPS, RUNS)
    if GAMMA:
        tl.store(sums_ptr + (slots - 1), _sum_rows(dgamma), (count > 0) & exists)


@triton.jit(do_not_specialize=["flags", "D", *GEOMETRY, "slots"])
def kaf_double_backward_kernel(
    v_x_ptr, v_alpha_ptr, v_gamma_ptr, v_dictionary_ptr, grad_ptr, x_ptr, dgrad_ptr, dx_ptr, sums_ptr,
    alpha_ptr, gamma_ptr, dictionary_ptr, workspace_ptr, boundary: tl.float64,
    flags, D, B, C, L, units, gap, parts, part, rows_each, magic, shift, slots,
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr, CAPACITY: tl.constexpr,
    WRAPS: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr, DICTIONARY: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """The derivatives of <v_x, dx> + <v_α, dα> + <v_γ, dγ> + <v_δ, dδ>, where absent v are 0.

    With h = v_x g, f with its base, and q the derivative of f along (v_α, v_γ, v_δ):

        dgrad = v_x f′ + q    dx = h f″ + g q′    dα, dγ = Σ_n h ∂f′ + g ∂q by α, γ    dδ_k = -Σ_n the k-th term of dx

    The sums lie as in `kaf_backward_kernel`.
    """
    FLOAT: tl.constexpr = _float(x_ptr)
    ALONG_V: tl.constexpr = not (v_alpha_ptr is None and v_gamma_ptr is None and v_dictionary_ptr is None)
    COUNT: tl.constexpr = (2 + GAMMA) * (1 + ALONG_V)
    offset, count, channel, partial, exists = _place(
        tl.program_id(0), B, C, L, units, gap, parts, part, rows_each, R, W, ALIGN, RUNS
    )
    x_ptr += offset
    grad_ptr += offset
    v_x_ptr = _moved(v_x_ptr, offset)
    dgrad_ptr = _moved(dgrad_ptr, offset)
    dx_ptr = _moved(dx_ptr, offset)
    sums_ptr = _moved(sums_ptr, partial * slots)
    alpha_at, gamma_at, dictionary_at = _rows(channel, flags, D)
    alpha_ptr += alpha_at
    v_alpha_ptr = _moved(v_alpha_ptr, alpha_at)
    dictionary_ptr = _moved(dictionary_ptr, dictionary_at)
    v_dictionary_ptr = _moved(v_dictionary_ptr, dictionary_at)
    gamma, gamma_log2e = _bandwidth(gamma_ptr + gamma_at, FLOAT)
    v_gamma = _optional(v_gamma_ptr, gamma_at, True, gamma)
    half_hi, half_lo = _half(boundary, D, FLOAT)
    on_cells = False
    if CAPACITY:
        on_cells = _kind(workspace_ptr, channel, flags, RUNS) > 0
        where = _cells(workspace_ptr, channel, flags)
        tables = _table_of(workspace_ptr, channel, C, COUNT, CAPACITY, RUNS)
    end = D if ALPHA or DICTIONARY else tl.where(on_cells, 0, D)
    gamma_sum = _zeros(1, R, W, WRAPS, RUNS, FLOAT)[0]
    for i in range(tl.cdiv(count, R)):
        if ALPHA or DICTIONARY:
            tl.debug_barrier()  # between what one tile and the next add to memory
        offsets, inside = _tile(i, count, exists, units, gap, magic, shift, R, W, ALIGN, RUNS)
        raw = _load(x_ptr, offsets, inside, FLOAT)
        x = _far(raw)
        g = _load(grad_ptr, offsets, inside, FLOAT)
        if v_x_ptr is None:
            v_x = tl.zeros_like(g)
        else:
            v_x = _load(v_x_ptr, offsets, inside, FLOAT)
        h = v_x * g
        dgrad, dx, dgamma = tl.zeros_like(g), tl.zeros_like(g), tl.zeros_like(g)
        for k in range(end):
            alpha = tl.load(alpha_ptr + k).to(FLOAT)
            p = alpha, _optional(v_alpha_ptr, k, True, alpha), v_gamma, _optional(v_dictionary_ptr, k, True, alpha)
            hi, lo = _point(dictionary_ptr, k, D, boundary, half_hi, half_lo, True, FLOAT)
            d, K = _gaussian((x - hi) - lo, gamma_log2e)
            of_x = h * _term(CURVATURE, d, K, gamma, *p)
            if ALONG_V:
                of_x += g * _term(ALONG_SLOPE, d, K, gamma, *p)
            if on_cells == 0:
                dx += of_x
                dgrad += v_x * _term(SLOPE, d, K, gamma, *p)
                if GAMMA:
                    dgamma += h * _term(SLOPE_BY_GAMMA, d, K, gamma, *p)
                if ALONG_V:
                    dgrad += _term(ALONG, d, K, gamma, *p)
                    if GAMMA:
                        dgamma += g * _term(ALONG_BY_GAMMA, d, K, gamma, *p)
            if ALPHA:
                of_alpha = h * _term(SLOPE_BY_ALPHA, d, K, gamma, *p)
                if ALONG_V:
                    of_alpha += g * _term(ALONG_BY_ALPHA, d, K, gamma, *p)
                _add_to_memory(sums_ptr, k, i, of_alpha, 1.0, exists, RUNS)
            if DICTIONARY:
                _add_to_memory(sums_ptr + (D if ALPHA else 0), k, i, of_x, -1.0, exists, RUNS)
        if CAPACITY:
            if on_cells:
                row, v = _find(_clamped(x, where[2], where[3]), where)
                dgrad = v_x * _polynomial(tables, row, v, 0, CAPACITY, RUNS)
                dx = h * _polynomial(tables, row, v, 1, CAPACITY, RUNS)
                if ALONG_V:
                    dgrad += _polynomial(tables, row, v, 2, CAPACITY, RUNS)
                    dx = tl.fma(g, _polynomial(tables, row, v, 3, CAPACITY, RUNS), dx)
                if GAMMA:
                    dgamma = h * _polynomial(tables, row, v, COUNT - 1 - ALONG_V, CAPACITY, RUNS)
                    if ALONG_V:
                        dgamma = tl.fma(g, _polynomial(tables, row, v, COUNT - 1, CAPACITY, RUNS), dgamma)
        if BASE and v_x_ptr is not None:
            dgrad += v_x * _base(raw, 1, BASE)
            dx += h * _base(raw, 2, BASE)
        if dgrad_ptr is not None:
            _store(dgrad_ptr, offsets, inside, dgrad)
        if dx_ptr is not None:
            _store(dx_ptr, offsets, inside, dx)
        if GAMMA:
            gamma_sum += _fold(dgamma, WRAPS, RUNS)
    if GAMMA:
        tl.store(sums_ptr + (slots - 1), _sum_rows(gamma_sum), (count > 0) & exists)


@triton.jit(do_not_specialize=["outer", "inner", "outer_stride", "inner_stride", "each", "K"])
def add_partial_sums_kernel(
    sums_ptr, result_ptr, outer, outer_stride, inner, inner_stride, each, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """result[row, k] = Σ over chunks and `each` columns of sums [chunks, columns, K], in float64, in a fixed order.

    The larger of both numbers, with its stride, is `inner`, which the lanes of a program run along.
    """
    row = (tl.program_id(0) // tl.cdiv(K, BLOCK_K)).to(tl.int64)
    k = tl.program_id(0) % tl.cdiv(K, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float64)
    for i in range(outer):
        for start in range(0, inner, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)[:, None]
            at = n.to(tl.int64) * inner_stride + (row * each + outer_stride.to(tl.int64) * i)
            total += tl.load(sums_ptr + at * K + k, (n < inner) & (k < K), other=0).to(tl.float64)
    tl.store(result_ptr + row * K + k, tl.sum(total, 0)[None, :].to(result_ptr.dtype.element_ty), k < K)
