"""The Triton kernels. Imports triton, so only `kafops.backends.triton` imports it, and only when there is work.

Geometry. Memory is a matrix [B, M] with M = C L columns, of which column j has channel j // L. A program takes `tiles`
tiles [R, W] of it, one after the other along B, or along L where ALONG_L. RUNS: a tile lies within one channel, and
every parameter below is a scalar. Otherwise a tile has W columns of any channels, and every parameter is a vector [W].
Scalars and vectors broadcast against [R, W] alike, so that both cases share all formulas.

Two ways to evaluate. DIRECT sums D Gaussians, for any points. FAST is for evenly spaced points, Δ apart, and t = γΔ² in
a range that keeps all powers finite. Points come in groups of five, j = -2 ... 2 around an anchor a (in steps of Δ from
the middle of the dictionary, which is 0). With e = x/Δ - a, E = exp(-t e²) and r = exp(2 γ Δ x), the same for all
groups, a group's Gaussians are

    K_j = exp(-t (e - j)²) = E r^j w_j      w_j = exp(-t j² - 2 t a j)

and the constants w_j are applied to alpha beforehand, or to sums over elements afterwards.

Numerics. Arithmetic is float64 for float64 x, else float32. A name with _hi and one with _lo are one number, their
sum. `tl.fma` is written where a product must not be rounded. Sums over elements: a few tens of them in registers, a
tree over the tile, one partial sum for each program in memory; `add_partial_sums` adds those in float64.
"""

# ruff: noqa: SIM102, SIM108, SIM300  (which branches Triton decides at compile time depends on how they are written)
# mypy: ignore-errors

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(1e18)  # as in the reference: squares stay finite

INTEGERS = ("B", "C", "L", "D", "units", "column_chunks", "tiles", "alpha_row", "gamma_row", "dictionary_row")


# ------------------------------------------------------------------------------------------------------ arithmetic


@triton.jit
def _split(value):
    """Split a float64 into hi + lo of float32."""
    hi = value.to(tl.float32)
    return hi, (value - hi.to(tl.float64)).to(tl.float32)


@triton.jit
def _product(n, hi, lo):
    """n (hi + lo) = p + p_lo."""
    p = n * hi
    return p, tl.fma(n, lo, tl.fma(n, hi, -p))


@triton.jit
def _exp2(p, p_lo):
    """2^(p + p_lo) = 2^p (1 + ln2 p_lo)."""
    power = tl.exp2(p)
    return tl.fma(power, p_lo * LN2, power)


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
def _sum_rows(t):
    """Sum over dimension 0; a tree on GPUs, whereas the interpreter adds one after the other: 64 at once."""
    if INTERPRETED:
        for _ in tl.static_range(2):
            if t.shape[0] >= 64:
                if len(t.shape) == 2:
                    t = tl.sum(tl.reshape(t, [t.shape[0] // 64, 64, t.shape[1]]), 1)
                else:
                    t = tl.sum(tl.reshape(t, [t.shape[0] // 64, 64, t.shape[1], t.shape[2]]), 1)
    return tl.sum(t, 0)


@triton.jit
def _sum_tile(t, RUNS: tl.constexpr):
    """Sum a tile [R, W] to a scalar where RUNS, else to [W]."""
    if RUNS:
        return tl.sum(t)
    else:
        return _sum_rows(t)


@triton.jit
def _fold(t, VECTOR: tl.constexpr, WRAPS: tl.constexpr, RUNS: tl.constexpr):
    """Sum the elements of a tile [R, W] that one thread holds: VECTOR neighbours (where RUNS), WRAPS rows.

    To [threads] where RUNS, else to [R / WRAPS, W].
    """
    R: tl.constexpr = t.shape[0]
    W: tl.constexpr = t.shape[1]
    if RUNS and VECTOR > 1:
        t = tl.sum(tl.reshape(t, [R, W // VECTOR, VECTOR]), 2)
    if WRAPS > 1:
        t = tl.sum(tl.reshape(t, [WRAPS, R // WRAPS, t.shape[1]]), 0)
    if RUNS:
        t = tl.reshape(t, [t.numel])
    return t


@triton.jit
def _zeros(VECTOR: tl.constexpr, WRAPS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, RUNS: tl.constexpr):
    """What `_fold` makes of a tile of zeros."""
    if RUNS:
        return tl.zeros([R * W // (VECTOR * WRAPS)], tl.float32)
    else:
        return tl.zeros([R // WRAPS, W], tl.float32)


# -------------------------------------------------------------------------------------------------------- geometry


@triton.jit
def _place(
    B, C, L, units, column_chunks, tiles,
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr, ALONG_L: tl.constexpr,
):  # fmt: skip
    """Find a program's first tile.

    units ALIGN is the number of columns that a tile may run along: L where RUNS, else M. Written so, the compiler sees
    what it is a multiple of, and accesses as many elements at once.

    Returns:
        offset of the tile, advance from one tile to the next, row stride M;
        rows and columns from the tile's corner on, at most those of the program's tiles;
        channel; where the program's partial sums go, as an index of [chunks, C (RUNS) or M]; whether each such exists.
    """
    width = units.to(tl.int64) * ALIGN
    program = tl.program_id(0)
    column_chunk = (program % column_chunks).to(tl.int64)
    row_chunk = program // column_chunks
    lanes = tl.arange(0, W)
    rows_each = R if ALONG_L else R * tiles
    columns_each = W * tiles if ALONG_L else W
    column = column_chunk * columns_each
    if RUNS:
        channel = (row_chunk % C).to(tl.int64)
        row_chunk = (row_chunk // C).to(tl.int64)
        stride = width * C
        offset = channel * width + column
        partial = (row_chunk * column_chunks + column_chunk) * C + channel
        exists = True
    else:
        row_chunk = row_chunk.to(tl.int64)
        stride = width
        offset = column
        exists = column + lanes < width
        channel = tl.minimum(column + lanes, width - 1) // L
        partial = row_chunk * width + column + lanes
    row = row_chunk * rows_each
    offset += row * stride
    rows = (B - row).to(tl.int64)
    rows = tl.where(rows < rows_each, rows, rows_each).to(tl.int32)
    columns = width - column
    columns = tl.where(columns < columns_each, columns, columns_each).to(tl.int32)
    advance = tl.full([], W, tl.int64) if ALONG_L else stride * R
    return offset, advance, stride, rows, columns, channel, partial, exists


@triton.jit
def _tile(i, stride, rows, columns, R: tl.constexpr, W: tl.constexpr, ALONG_L: tl.constexpr):
    """Offsets within the i-th tile [R, W], and which elements exist."""
    r = tl.arange(0, R)[:, None]
    w = tl.arange(0, W)[None, :]
    if ALONG_L:
        inside = (r < rows) & (w < columns - i * W)
    else:
        inside = (r < rows - i * R) & (w < columns)
    return r * stride.to(tl.int32) + w, inside


@triton.jit
def _any(condition, RUNS: tl.constexpr):
    """Whether it holds for any channel of a tile."""
    return condition if RUNS else tl.max(condition.to(tl.int32), 0) != 0


@triton.jit
def _where(inside, mine):
    """Those inside that are in the columns `mine`, or all of them for None."""
    if mine is None:
        return inside
    else:
        return inside & mine


@triton.constexpr_function
def _float(ptr):
    """The dtype of arithmetic on what ptr points to."""
    return tl.float64 if ptr.dtype.element_ty == tl.float64 else tl.float32


@triton.jit
def _load(ptr, offsets, inside, FLOAT: tl.constexpr):
    return tl.load(ptr + offsets, inside, other=0).to(FLOAT)


@triton.jit
def _store(ptr, offsets, inside, value):
    tl.store(ptr + offsets, _rounded(value, ptr.dtype.element_ty), inside)


# ---------------------------------------------------------------------------------------------------------- DIRECT


@triton.jit
def _half(step, FLOAT: tl.constexpr):
    """Δ/2 as hi + lo."""
    half = tl.full([], step, tl.float64) * 0.5
    if FLOAT == tl.float64:
        return half, half
    else:
        return _split(half)


@triton.jit
def _point(dictionary_ptr, k, D, boundary, half_hi, half_lo, FLOAT: tl.constexpr):
    """δ_k as hi + lo: that of the dictionary, or b (2k/(D - 1) - 1)."""
    if dictionary_ptr is not None:
        point = tl.load(dictionary_ptr + k)
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
def _gaussian(x, hi, lo, gamma_log2e):
    """d = x - δ and K = exp(-γ d²). Where K = 0, d is 0, so that no power of it times K is inf · 0."""
    d = (x - hi) - lo
    K = tl.exp2(-(gamma_log2e * d * d))
    return tl.where(K == 0, 0.0, d), K


@triton.jit
def _far(x):
    """Clamp x to where squares are finite; NaN stays. Written out, as LLVM has no such clamp of float64 for sm_90."""
    return tl.where(x < -FAR, -FAR, tl.where(x > FAR, FAR, x))


@triton.jit
def _bandwidth(gamma_ptr, FLOAT: tl.constexpr):
    """γ, and γ log2 e."""
    gamma = tl.load(gamma_ptr)
    return gamma.to(FLOAT), (gamma.to(tl.float64) * LOG2E).to(FLOAT)


# ------------------------------------------------------------------------------------------------------------ FAST


@triton.jit
def _fast_constants(gamma_ptr, step, inverse_step, D, MANY: tl.constexpr):
    """What FAST needs to know of a channel.

    Returns:
        ok: whether t = γΔ² suits FAST; limit: where |x| is clamped, with all Gaussians 0 from there on;
        t log2 e as hi + lo; 1/Δ as hi + lo; κ = 2γΔ log2 e as hi + lo; 2γΔ.
    """
    gamma = tl.load(gamma_ptr).to(tl.float64)
    step = tl.full([], step, tl.float64)
    t = gamma * step * step
    t_hi, t_lo = _split(t * LOG2E)
    inverse_hi, inverse_lo = _split(tl.full([], inverse_step, tl.float64))
    kappa_hi, kappa_lo = _split(gamma * step * 2 * LOG2E)
    t32 = t.to(tl.float32)
    end = (D - 1) * 0.5
    last = (D + 4) // 5 * 5 - 3 - end  # anchor, up to two steps beyond the last point where the group is not full
    edge = tl.maximum(end, last)
    # exp(-104) = 0, so Gaussians reach R = sqrt(104 / t). No power of r may overflow up to there, nor α r^j w_j of the
    # anchor that is farthest away, which is α exp(4 t (|e| - 1)); where there are many, _guarded takes care of that.
    reach = edge if MANY else edge + tl.maximum(last, end - 2) - 1
    # E is exp(-4 t) where K = 1 for j = ±2, and the roundings of its exponent count as much more: t stays moderate.
    ok = (t32 >= 0.0009765625) & (t32 <= 0.51) & (4 * t32 * reach + 4 * tl.sqrt(104 * t32) <= 70)
    limit = (edge + tl.sqrt(104 / t32)) * step.to(tl.float32)
    return ok, limit, t_hi, t_lo, inverse_hi, inverse_lo, kappa_hi, kappa_lo, (gamma * step * 2).to(tl.float32)


@triton.jit
def _guarded(E, P, MANY: tl.constexpr):
    """0 in place of P where E is 0, and P may have overflown."""
    return tl.where(E > 0, P, 0.0) if MANY else P


@triton.jit
def _constant(j, anchor, t_hi, t_lo):
    """w_j = exp(-t j² - 2 t a j)."""
    p, p_lo = _product(-(j * j + 2 * anchor * j), t_hi, t_lo)
    return _exp2(p, p_lo)


@triton.jit
def _anchor(group, D):
    """The middle point of a group, in steps from the middle of the dictionary."""
    return (group * 5 + 2) - (D - 1) * 0.5


@triton.jit
def _coefficients(alpha_ptr, first, D, t_hi, t_lo, GROUPS: tl.constexpr):
    """c = α w of GROUPS groups from `first` on, five for each; those of missing points are 0."""
    c = ()
    for q in tl.static_range(GROUPS):
        anchor = _anchor(first + q, D)
        for j in tl.static_range(-2, 3):
            k = (first + q) * 5 + 2 + j
            alpha = tl.load(alpha_ptr + k, k < D, other=0).to(tl.float32)
            if j != 0:
                alpha = tl.where(k < D, alpha * _constant(j * 1.0, anchor, t_hi, t_lo), 0.0)
            c += (alpha,)
    return c


@triton.jit
def _powers(x, kappa_hi, kappa_lo):
    """r = exp(2 γ Δ x) and 1/r."""
    p, p_lo = _product(x, kappa_hi, kappa_lo)
    return _exp2(p, p_lo), _exp2(-p, -p_lo)


@triton.jit
def _group(x, anchor, inverse_hi, inverse_lo, t_log2e):
    """e = x/Δ - a and E = exp(-t e²)."""
    e = tl.fma(x, inverse_lo, tl.fma(x, inverse_hi, -anchor))
    return e, tl.exp2(-(e * t_log2e) * e)


@triton.jit
def _clamped(x, limit):
    return tl.clamp(x, -limit, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _value(x, r, s, c, first, D, inverse_hi, inverse_lo, t_log2e, f, GROUPS: tl.constexpr, MANY: tl.constexpr):
    """f + Σ_groups E P, P = c_0 + r (c_1 + r c_2) + s (c_-1 + s c_-2), s = 1/r."""
    for q in tl.static_range(GROUPS):
        _, E = _group(x, _anchor(first + q, D), inverse_hi, inverse_lo, t_log2e)
        up = tl.fma(r, c[5 * q + 4], c[5 * q + 3])
        down = tl.fma(s, c[5 * q], c[5 * q + 1])
        P = tl.fma(r, up, tl.fma(s, down, c[5 * q + 2]))
        f = tl.fma(E, _guarded(E, P, MANY), f)
    return f


@triton.jit
def _slope(x, r, s, c, first, D, inverse_hi, inverse_lo, t_log2e, f, GROUPS: tl.constexpr, MANY: tl.constexpr):
    """f + Σ_groups E (e P - Q), Q = Σ_j j c_j r^j; times -2γΔ it is the derivative by x."""
    for q in tl.static_range(GROUPS):
        e, E = _group(x, _anchor(first + q, D), inverse_hi, inverse_lo, t_log2e)
        up = tl.fma(r, c[5 * q + 4], c[5 * q + 3])
        down = tl.fma(s, c[5 * q], c[5 * q + 1])
        P = tl.fma(r, up, tl.fma(s, down, c[5 * q + 2]))
        Q = tl.fma(r, tl.fma(r, c[5 * q + 4], up), -(s * tl.fma(s, c[5 * q], down)))
        f = tl.fma(E, _guarded(E, tl.fma(e, P, -Q), MANY), f)
    return f


@triton.jit
def _add_to_sums(
    sums, x, r, s, g, first, D, inverse_hi, inverse_lo, t_log2e,
    GROUPS: tl.constexpr, VECTOR: tl.constexpr, WRAPS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """sums + Σ_elements g E r^j, for GROUPS groups from `first` on and j = -2 ... 2."""
    result = ()
    for q in tl.static_range(GROUPS):
        w = g * _group(x, _anchor(first + q, D), inverse_hi, inverse_lo, t_log2e)[1]
        terms = (w * (s * s), w * s, w, w * r, w * (r * r))
        for j in tl.static_range(5):
            result += (sums[5 * q + j] + _fold(terms[j], VECTOR, WRAPS, RUNS),)
    return result


@triton.jit
def _stack(a, b, c, d):
    """[N, 4] or [N, W, 4] from four tensors."""
    t = tl.join(tl.join(a, c), tl.join(b, d))
    if len(a.shape) == 1:
        return tl.reshape(t, [a.shape[0], 4])
    else:
        return tl.reshape(t, [a.shape[0], a.shape[1], 4])


@triton.jit
def _store_sums(ptr, exists, sums, first, D, t_hi, t_lo, GROUPS: tl.constexpr, RUNS: tl.constexpr):
    """dα_k = w_j Σ g E r^j, reduced over the program's threads."""
    count: tl.constexpr = 5 * GROUPS
    zero = tl.zeros_like(sums[0])
    for m in tl.static_range(0, count, 4):
        four = ()
        for i in tl.static_range(4):
            four += (sums[m + i] if m + i < count else zero,)
        total = _sum_rows(_stack(four[0], four[1], four[2], four[3]))  # [4] or [W, 4]
        i = m + tl.arange(0, 4)
        j = (i % 5 - 2).to(tl.float32)
        anchor = _anchor(first + i // 5, D)
        k = first * 5 + i
        inside = (k < D) & (i < count)
        if RUNS:
            tl.store(ptr + k, total * _constant(j, anchor, t_hi, t_lo), inside)
        else:
            w = _constant(j[None, :], anchor[None, :], t_hi[:, None], t_lo[:, None])
            tl.store(ptr[:, None] + k[None, :], total * w, inside[None, :] & exists[:, None])


# ------------------------------------------------------------------------------------------------------- operators


@triton.jit(do_not_specialize=INTEGERS)
def kaf_kernel(
    x_ptr, y_ptr, alpha_ptr, gamma_ptr, dictionary_ptr,
    boundary: tl.float64, step: tl.float64, inverse_step: tl.float64,
    B, C, L, D, units, column_chunks, tiles, alpha_row, gamma_row, dictionary_row,
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr, ALONG_L: tl.constexpr,
    FAST: tl.constexpr, GROUPS: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """y = Σ_k α_k K."""
    offset, advance, stride, rows, columns, channel, _, _ = _place(
        B, C, L, units, column_chunks, tiles, R, W, ALIGN, RUNS, ALONG_L
    )
    x_ptr += offset
    y_ptr += offset
    alpha_ptr += channel * alpha_row
    gamma_ptr += channel * gamma_row
    if dictionary_ptr is not None:
        dictionary_ptr += channel * dictionary_row
    if FAST:
        fast = _fast_constants(gamma_ptr, step, inverse_step, D, MANY)
        ok = fast[0]
        if _any(ok, RUNS):
            _forward_fast(
                x_ptr, y_ptr, alpha_ptr, fast, D, advance, stride, rows, columns, tiles, R, W, ALONG_L, GROUPS, MANY
            )
        if _any(ok == 0, RUNS):
            if not RUNS:
                tl.debug_barrier()  # what FAST wrote for channels that it does not suit is overwritten
            _forward_direct(
                x_ptr, y_ptr, alpha_ptr, gamma_ptr, dictionary_ptr, None if RUNS else ok == 0, boundary, step, D,
                advance, stride, rows, columns, tiles, R, W, ALONG_L,
            )  # fmt: skip
    else:
        _forward_direct(
            x_ptr, y_ptr, alpha_ptr, gamma_ptr, dictionary_ptr, None, boundary, step, D,
            advance, stride, rows, columns, tiles, R, W, ALONG_L,
        )  # fmt: skip


@triton.jit
def _forward_fast(
    x_ptr, y_ptr, alpha_ptr, fast, D, advance, stride, rows, columns, tiles,
    R: tl.constexpr, W: tl.constexpr, ALONG_L: tl.constexpr, GROUPS: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    _, limit, t_hi, t_lo, inverse_hi, inverse_lo, kappa_hi, kappa_lo, _ = fast
    c = _coefficients(alpha_ptr, 0, D, t_hi, t_lo, GROUPS)
    for i in range(tiles):
        offsets, inside = _tile(i, stride, rows, columns, R, W, ALONG_L)
        x = _clamped(_load(x_ptr + i * advance, offsets, inside, tl.float32), limit)
        r, s = _powers(x, kappa_hi, kappa_lo)
        y = _value(x, r, s, c, 0, D, inverse_hi, inverse_lo, t_hi, tl.zeros([R, W], tl.float32), GROUPS, MANY)
        if MANY:
            for first in range(GROUPS, (D + 4) // 5, GROUPS):
                more = _coefficients(alpha_ptr, first, D, t_hi, t_lo, GROUPS)
                y = _value(x, r, s, more, first, D, inverse_hi, inverse_lo, t_hi, y, GROUPS, MANY)
        _store(y_ptr + i * advance, offsets, inside, y)


@triton.jit
def _forward_direct(
    x_ptr, y_ptr, alpha_ptr, gamma_ptr, dictionary_ptr, mine, boundary, step, D,
    advance, stride, rows, columns, tiles, R: tl.constexpr, W: tl.constexpr, ALONG_L: tl.constexpr,
):  # fmt: skip
    FLOAT: tl.constexpr = _float(x_ptr)
    gamma_log2e = _bandwidth(gamma_ptr, FLOAT)[1]
    half_hi, half_lo = _half(step, FLOAT)
    for i in range(tiles):
        offsets, inside = _tile(i, stride, rows, columns, R, W, ALONG_L)
        x = _far(_load(x_ptr + i * advance, offsets, inside, FLOAT))
        y = tl.zeros([R, W], FLOAT)
        for k in range(D):
            hi, lo = _point(dictionary_ptr, k, D, boundary, half_hi, half_lo, FLOAT)
            K = _gaussian(x, hi, lo, gamma_log2e)[1]
            y = tl.fma(tl.load(alpha_ptr + k).to(FLOAT), K, y)
        _store(y_ptr + i * advance, offsets, _where(inside, mine), y)


@triton.jit(do_not_specialize=INTEGERS)
def kaf_backward_kernel(
    grad_ptr, x_ptr, alpha_ptr, gamma_ptr, dictionary_ptr,
    dx_ptr, alpha_sums_ptr, gamma_sums_ptr, dictionary_sums_ptr,
    boundary: tl.float64, step: tl.float64, inverse_step: tl.float64,
    B, C, L, D, units, column_chunks, tiles, alpha_row, gamma_row, dictionary_row,
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr, ALONG_L: tl.constexpr,
    FAST: tl.constexpr, GROUPS: tl.constexpr, MANY: tl.constexpr, VECTOR: tl.constexpr, WRAPS: tl.constexpr,
):  # fmt: skip
    """dx = g Σ_k -2γ d α K    dα_k = Σ_n g K    dγ = -Σ_n g Σ_k α d² K    dδ_k = 2γ α Σ_n g d K.

    The sums over elements n are those of one program: [chunks, columns, D] for each k, [chunks, columns] for dγ.
    """
    offset, advance, stride, rows, columns, channel, partial, exists = _place(
        B, C, L, units, column_chunks, tiles, R, W, ALIGN, RUNS, ALONG_L
    )
    x_ptr += offset
    grad_ptr += offset
    alpha_ptr += channel * alpha_row
    gamma_ptr += channel * gamma_row
    if dictionary_ptr is not None:
        dictionary_ptr += channel * dictionary_row
    if dx_ptr is not None:
        dx_ptr += offset
    if FAST:
        fast = _fast_constants(gamma_ptr, step, inverse_step, D, MANY)
        ok = fast[0]
        if _any(ok, RUNS):
            _backward_fast(
                grad_ptr, x_ptr, alpha_ptr, dx_ptr, alpha_sums_ptr, partial, exists & ok, fast, D, advance, stride,
                rows, columns, tiles, R, W, RUNS, ALONG_L, GROUPS, MANY, VECTOR, WRAPS,
            )  # fmt: skip
        if _any(ok == 0, RUNS) & (tl.program_id(1) == 0):
            if not RUNS:
                tl.debug_barrier()
            _backward_direct(
                grad_ptr, x_ptr, alpha_ptr, gamma_ptr, dictionary_ptr, dx_ptr, alpha_sums_ptr, gamma_sums_ptr,
                dictionary_sums_ptr, partial, exists, None if RUNS else ok == 0, boundary, step, D, advance, stride,
                rows, columns, tiles, R, W, RUNS, ALONG_L,
            )  # fmt: skip
    else:
        _backward_direct(
            grad_ptr, x_ptr, alpha_ptr, gamma_ptr, dictionary_ptr, dx_ptr, alpha_sums_ptr, gamma_sums_ptr,
            dictionary_sums_ptr, partial, exists, None, boundary, step, D, advance, stride, rows, columns, tiles,
            R, W, RUNS, ALONG_L,
        )  # fmt: skip


@triton.jit
def _backward_fast(
    grad_ptr, x_ptr, alpha_ptr, dx_ptr, alpha_sums_ptr, partial, exists, fast, D, advance, stride, rows, columns, tiles,
    R: tl.constexpr, W: tl.constexpr, RUNS: tl.constexpr, ALONG_L: tl.constexpr,
    GROUPS: tl.constexpr, MANY: tl.constexpr, VECTOR: tl.constexpr, WRAPS: tl.constexpr,
):  # fmt: skip
    _, limit, t_hi, t_lo, inverse_hi, inverse_lo, kappa_hi, kappa_lo, scale = fast
    # Where there are many points, each program of axis 1 has the sums of some of them. The first also has dx.
    first = tl.program_id(1) * GROUPS if MANY else 0
    leads = tl.program_id(1) == 0 if MANY else True
    if dx_ptr is not None:
        c = _coefficients(alpha_ptr, 0, D, t_hi, t_lo, GROUPS)
    sums = ()
    if alpha_sums_ptr is not None:
        for _ in tl.static_range(5 * GROUPS):
            sums += (_zeros(VECTOR, WRAPS, R, W, RUNS),)
    for i in range(tiles):
        offsets, inside = _tile(i, stride, rows, columns, R, W, ALONG_L)
        x = _clamped(_load(x_ptr + i * advance, offsets, inside, tl.float32), limit)
        g = _load(grad_ptr + i * advance, offsets, inside, tl.float32)
        r, s = _powers(x, kappa_hi, kappa_lo)
        if dx_ptr is not None:
            if leads:
                f = tl.zeros([R, W], tl.float32)
                f = _slope(x, r, s, c, 0, D, inverse_hi, inverse_lo, t_hi, f, GROUPS, MANY)
                if MANY:
                    for other in range(GROUPS, (D + 4) // 5, GROUPS):
                        more = _coefficients(alpha_ptr, other, D, t_hi, t_lo, GROUPS)
                        f = _slope(x, r, s, more, other, D, inverse_hi, inverse_lo, t_hi, f, GROUPS, MANY)
                _store(dx_ptr + i * advance, offsets, inside, g * (f * -scale))
        if alpha_sums_ptr is not None:
            sums = _add_to_sums(sums, x, r, s, g, first, D, inverse_hi, inverse_lo, t_hi, GROUPS, VECTOR, WRAPS, RUNS)
    if alpha_sums_ptr is not None:
        _store_sums(alpha_sums_ptr + partial * D, exists, sums, first, D, t_hi, t_lo, GROUPS, RUNS)


@triton.jit
def _backward_direct(
    grad_ptr, x_ptr, alpha_ptr, gamma_ptr, dictionary_ptr, dx_ptr, alpha_sums_ptr, gamma_sums_ptr, dictionary_sums_ptr,
    partial, exists, mine, boundary, step, D, advance, stride, rows, columns, tiles,
    R: tl.constexpr, W: tl.constexpr, RUNS: tl.constexpr, ALONG_L: tl.constexpr,
):  # fmt: skip
    FLOAT: tl.constexpr = _float(x_ptr)
    gamma, gamma_log2e = _bandwidth(gamma_ptr, FLOAT)
    half_hi, half_lo = _half(step, FLOAT)
    if dx_ptr is not None or gamma_sums_ptr is not None:
        dgamma = tl.zeros([R, W], FLOAT)
        for i in range(tiles):
            offsets, inside = _tile(i, stride, rows, columns, R, W, ALONG_L)
            x = _far(_load(x_ptr + i * advance, offsets, inside, FLOAT))
            g = _load(grad_ptr + i * advance, offsets, inside, FLOAT)
            slope = tl.zeros([R, W], FLOAT)
            square = tl.zeros([R, W], FLOAT)
            for k in range(D):
                hi, lo = _point(dictionary_ptr, k, D, boundary, half_hi, half_lo, FLOAT)
                d, K = _gaussian(x, hi, lo, gamma_log2e)
                v = tl.load(alpha_ptr + k).to(FLOAT) * K * d
                slope += v
                square = tl.fma(v, d, square)
            if dx_ptr is not None:
                _store(dx_ptr + i * advance, offsets, _where(inside, mine), g * (slope * (gamma * -2)))
            dgamma = tl.fma(g, -square, dgamma)
        if gamma_sums_ptr is not None:
            tl.store(gamma_sums_ptr + partial, _sum_tile(dgamma, RUNS), _where(exists, mine))
    if alpha_sums_ptr is not None or dictionary_sums_ptr is not None:
        for k in range(D):
            hi, lo = _point(dictionary_ptr, k, D, boundary, half_hi, half_lo, FLOAT)
            dalpha = tl.zeros([R, W], FLOAT)
            ddictionary = tl.zeros([R, W], FLOAT)
            for i in range(tiles):
                offsets, inside = _tile(i, stride, rows, columns, R, W, ALONG_L)
                x = _far(_load(x_ptr + i * advance, offsets, inside, FLOAT))
                g = _load(grad_ptr + i * advance, offsets, inside, FLOAT)
                d, K = _gaussian(x, hi, lo, gamma_log2e)
                w = g * K
                dalpha += w
                ddictionary = tl.fma(w, d, ddictionary)
            if alpha_sums_ptr is not None:
                tl.store(alpha_sums_ptr + (partial * D + k), _sum_tile(dalpha, RUNS), _where(exists, mine))
            if dictionary_sums_ptr is not None:
                alpha = tl.load(alpha_ptr + k).to(FLOAT)
                tl.store(
                    dictionary_sums_ptr + (partial * D + k),
                    _sum_tile(ddictionary, RUNS) * (alpha * gamma * 2),
                    _where(exists, mine),
                )


@triton.jit(do_not_specialize=INTEGERS)
def kaf_double_backward_kernel(
    v_x_ptr, v_alpha_ptr, v_gamma_ptr, v_dictionary_ptr, grad_ptr, x_ptr, alpha_ptr, gamma_ptr, dictionary_ptr,
    dgrad_ptr, dx_ptr, alpha_sums_ptr, gamma_sums_ptr, dictionary_sums_ptr,
    boundary: tl.float64, step: tl.float64, inverse_step: tl.float64,
    B, C, L, D, units, column_chunks, tiles, alpha_row, gamma_row, dictionary_row,
    R: tl.constexpr, W: tl.constexpr, ALIGN: tl.constexpr, RUNS: tl.constexpr, ALONG_L: tl.constexpr,
):  # fmt: skip
    """The derivatives of <v_x, dx> + <v_α, dα> + <v_γ, dγ> + <v_δ, dδ>, where absent v are 0; DIRECT only.

    With h = v_x g, z = -2γ d, and l = d (2γ v_δ - v_γ d) the derivative of log K along v_γ and v_δ, m = v_α + α l:

        dgrad = Σ_k (v_x z α + m) K
        dx = Σ_k T_k      dδ_k = -Σ_n T_k      T_k = [h α (z² - 2γ) + g (α l' + z m)] K
        dα_k = Σ_n (h z + g l) K
        dγ = Σ_n Σ_k [g (2 α v_δ d - d² m) - h α d (2 + z d)] K

    The sums over elements n are those of one program, as in `kaf_backward_kernel`.
    """
    FLOAT: tl.constexpr = _float(x_ptr)
    offset, advance, stride, rows, columns, channel, partial, exists = _place(
        B, C, L, units, column_chunks, tiles, R, W, ALIGN, RUNS, ALONG_L
    )
    x_ptr += offset
    grad_ptr += offset
    if v_x_ptr is not None:
        v_x_ptr += offset
    if dgrad_ptr is not None:
        dgrad_ptr += offset
    if dx_ptr is not None:
        dx_ptr += offset
    if alpha_sums_ptr is not None:
        alpha_sums_ptr += partial * D
    if gamma_sums_ptr is not None:
        gamma_sums_ptr += partial
    if dictionary_sums_ptr is not None:
        dictionary_sums_ptr += partial * D
    alpha_ptr += channel * alpha_row
    if v_alpha_ptr is not None:
        v_alpha_ptr += channel * alpha_row
    if dictionary_ptr is not None:
        dictionary_ptr += channel * dictionary_row
    if v_dictionary_ptr is not None:
        v_dictionary_ptr += channel * dictionary_row
    gamma, gamma_log2e = _bandwidth(gamma_ptr + channel * gamma_row, FLOAT)
    v_gamma = _optional(v_gamma_ptr, channel * gamma_row, gamma)
    half_hi, half_lo = _half(step, FLOAT)

    if dgrad_ptr is not None or dx_ptr is not None or gamma_sums_ptr is not None:
        dgamma = tl.zeros([R, W], FLOAT)
        for i in range(tiles):
            offsets, inside = _tile(i, stride, rows, columns, R, W, ALONG_L)
            x, g, v_x = _data(x_ptr, grad_ptr, v_x_ptr, i * advance, offsets, inside, FLOAT)
            h = v_x * g
            dgrad = tl.zeros([R, W], FLOAT)
            dx = tl.zeros([R, W], FLOAT)
            for k in range(D):
                alpha = tl.load(alpha_ptr + k).to(FLOAT)
                v_alpha = _optional(v_alpha_ptr, k, alpha)
                v_dictionary = _optional(v_dictionary_ptr, k, alpha)
                hi, lo = _point(dictionary_ptr, k, D, boundary, half_hi, half_lo, FLOAT)
                d, K = _gaussian(x, hi, lo, gamma_log2e)
                z = d * (gamma * -2)
                m = v_alpha + alpha * _along(d, gamma, v_gamma, v_dictionary)
                if dgrad_ptr is not None:
                    dgrad = tl.fma(v_x * z * alpha + m, K, dgrad)
                if dx_ptr is not None:
                    dx += _T(d, z, K, g, h, m, alpha, gamma, v_gamma, v_dictionary)
                if gamma_sums_ptr is not None:
                    n = alpha * d * (2 + z * d)
                    dgamma += (g * (alpha * v_dictionary * 2 * d - d * d * m) - h * n) * K
            if dgrad_ptr is not None:
                _store(dgrad_ptr + i * advance, offsets, inside, dgrad)
            if dx_ptr is not None:
                _store(dx_ptr + i * advance, offsets, inside, dx)
        if gamma_sums_ptr is not None:
            tl.store(gamma_sums_ptr, _sum_tile(dgamma, RUNS), exists)

    if alpha_sums_ptr is not None or dictionary_sums_ptr is not None:
        for k in range(D):
            alpha = tl.load(alpha_ptr + k).to(FLOAT)
            v_alpha = _optional(v_alpha_ptr, k, alpha)
            v_dictionary = _optional(v_dictionary_ptr, k, alpha)
            hi, lo = _point(dictionary_ptr, k, D, boundary, half_hi, half_lo, FLOAT)
            dalpha = tl.zeros([R, W], FLOAT)
            ddictionary = tl.zeros([R, W], FLOAT)
            for i in range(tiles):
                offsets, inside = _tile(i, stride, rows, columns, R, W, ALONG_L)
                x, g, v_x = _data(x_ptr, grad_ptr, v_x_ptr, i * advance, offsets, inside, FLOAT)
                h = v_x * g
                d, K = _gaussian(x, hi, lo, gamma_log2e)
                z = d * (gamma * -2)
                along = _along(d, gamma, v_gamma, v_dictionary)
                dalpha = tl.fma(h * z + g * along, K, dalpha)
                if dictionary_sums_ptr is not None:
                    ddictionary -= _T(d, z, K, g, h, v_alpha + alpha * along, alpha, gamma, v_gamma, v_dictionary)
            if alpha_sums_ptr is not None:
                tl.store(alpha_sums_ptr + k, _sum_tile(dalpha, RUNS), exists)
            if dictionary_sums_ptr is not None:
                tl.store(dictionary_sums_ptr + k, _sum_tile(ddictionary, RUNS), exists)


@triton.jit
def _optional(ptr, k, like):
    """The k-th value, or 0 where there is no pointer; as `like`."""
    if ptr is None:
        return tl.zeros_like(like)
    else:
        return tl.load(ptr + k).to(like.dtype)


@triton.jit
def _data(x_ptr, grad_ptr, v_x_ptr, at, offsets, inside, FLOAT: tl.constexpr):
    """x, g and v_x of a tile."""
    x = _far(_load(x_ptr + at, offsets, inside, FLOAT))
    g = _load(grad_ptr + at, offsets, inside, FLOAT)
    if v_x_ptr is None:
        return x, g, tl.zeros_like(g)
    else:
        return x, g, _load(v_x_ptr + at, offsets, inside, FLOAT)


@triton.jit
def _along(d, gamma, v_gamma, v_dictionary):
    """l = d (2γ v_δ - v_γ d)."""
    return d * (gamma * v_dictionary * 2 - v_gamma * d)


@triton.jit
def _T(d, z, K, g, h, m, alpha, gamma, v_gamma, v_dictionary):
    """[h α (z² - 2γ) + g (α l' + z m)] K, with l' = 2γ v_δ - 2 v_γ d."""
    slope = gamma * v_dictionary * 2 - v_gamma * 2 * d
    return (h * alpha * (z * z - gamma * 2) + g * (alpha * slope + z * m)) * K


@triton.jit(do_not_specialize=["outer", "inner", "outer_stride", "inner_stride", "each", "K"])
def add_partial_sums_kernel(
    sums_ptr, result_ptr, outer, outer_stride, inner, inner_stride, each, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """result[row, k] = Σ over chunks and `each` columns of sums [chunks, columns, K], in float64, in a fixed order.

    The larger of both numbers, with its stride, is `inner`, which the lanes of a program run along.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float64)
    for i in range(outer):
        for start in range(0, inner, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)[:, None]
            at = n.to(tl.int64) * inner_stride + (row * each + outer_stride.to(tl.int64) * i)
            total += tl.load(sums_ptr + at * K + k, (n < inner) & (k < K), other=0).to(tl.float64)
    tl.store(result_ptr + row * K + k, tl.sum(total, 0)[None, :].to(result_ptr.dtype.element_ty), k < K)
