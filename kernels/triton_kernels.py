"""Triton kernels of the tile loop: everything between the two matrix products. No tl.dot, so every card runs them.

One program per row (grid axis 0, the only one without a 65535 limit). Offsets that grow with rows are 64-bit. log1p and
tanh are defined here, because the language has none and the interpreter does not support those of libdevice.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-3.0e38)
"""Replacement for -inf in differences."""
NEAR = tl.constexpr(0.25)
"""Up to this size, exp(-r) - 1 + r and x - log(1 + x) are computed as series, in which nothing cancels."""
KL_NEAR = tl.constexpr(0.25)
"""Largest b / s for which KL is taken from b."""
HALF_MAX = tl.constexpr(65504.0)
"""Largest float16."""


@triton.jit
def _log1p(x):
    """Return log(1 + x) for x in [0, 1], exact where 1 + x rounds (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def _tanh(x):
    """Return tanh(x) to a relative error of 2e-7: below |x| = 0.25, where the closed form loses digits, by a series."""
    x2 = x * x
    near_0 = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    t = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(tl.abs(x) < 0.25, near_0, tl.where(x < 0, -far, far))


@triton.jit
def _excess_series(r):
    """Return exp(-r) - 1 + r for |r| < NEAR."""
    tail = 1.0 / 24 + r * (-1.0 / 120 + r * (1.0 / 720 - r * (1.0 / 5040)))
    return r * r * (0.5 + r * (-1.0 / 6 + r * tail))


@triton.jit
def _lag(x):
    """Return x - log(1 + x) for |x| < NEAR, from log(1 + x) = 2 (v + v^3 / 3 + ...) with v = x / (2 + x)."""
    v = x / (2.0 + x)
    v2 = v * v
    return v * (x - v2 * (2.0 / 3 + v2 * (2.0 / 5 + v2 * (2.0 / 7 + v2 * (2.0 / 9 + v2 * (2.0 / 11))))))


@triton.jit
def fold_kernel(
    z_ptr,
    p_ptr,
    target_ptr,
    bias_ptr,
    m_ptr,
    s_ptr,
    a_ptr,
    z_t_ptr,
    acc_ptr,
    first,
    columns,
    z_stride,
    p_stride,
    width,
    gain,
    inner,
    cap,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WANT_P: tl.constexpr,
    P_SCALE: tl.constexpr,
):
    """Add one tile of products to the running sums of `tiles.py`, and replace it with exp(z - m) slope P_SCALE.

    Each product is read once. `p_ptr` may be the same memory as `z_ptr` in a narrower dtype: a program owns its row,
    and holds the whole row in registers before it writes.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < columns
    z_ptr += row * z_stride
    p_ptr += row * p_stride
    acc_ptr += row * width
    z = tl.load(z_ptr + column, mask=live, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=live, other=0.0).to(tl.float32)
    if HAS_CAP:
        z = _tanh(z * inner) * cap
    else:
        z = z * gain
    target = (tl.load(target_ptr + row) - first).to(tl.int32)
    at_target = column == target
    if (target >= 0) & (target < columns):
        tl.store(z_t_ptr + row, tl.sum(tl.where(at_target, z, 0.0), 0))
    z = tl.where(at_target, float("-inf"), tl.where(live, z, float("-inf")))

    m_old = tl.load(m_ptr + row)
    m_new = tl.maximum(m_old, tl.max(z, 0))
    shift = tl.maximum(m_old, FLOOR) - tl.maximum(m_new, FLOOR)
    alpha = tl.exp(shift)
    d = z - tl.maximum(m_new, FLOOR)
    e = tl.exp(d)
    s_old = tl.load(s_ptr + row)
    tl.store(a_ptr + row, (tl.load(a_ptr + row) + s_old * tl.maximum(shift, FLOOR)) * alpha
             + tl.sum(e * tl.maximum(d, FLOOR), 0))  # fmt: skip
    tl.store(s_ptr + row, s_old * alpha + tl.sum(e, 0))
    tl.store(m_ptr + row, m_new)
    if WANT_P:
        if HAS_CAP:
            # From d, because keeping tanh would need another register per column; 0 at the target, where d is -inf.
            t = (d + tl.maximum(m_new, FLOOR)) / cap
            e = tl.where(e == 0.0, 0.0, e * (1.0 - t * t))
        tl.debug_barrier()
        tl.store(p_ptr + column, (e * P_SCALE).to(p_ptr.dtype.element_ty), mask=live)
        if (m_new > m_old) & (m_old > FLOOR):
            for start in range(0, width, BLOCK_H):
                h = start + tl.arange(0, BLOCK_H)
                tl.store(acc_ptr + h, tl.load(acc_ptr + h, mask=h < width, other=0.0) * alpha, mask=h < width)


@triton.jit
def finish_kernel(
    m_ptr,
    s_ptr,
    a_ptr,
    z_t_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    to_target_ptr,
    to_others_ptr,
    rows,
    gain,
    cap,
    BLOCK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    P_SCALE: tl.constexpr,
):
    """Write logp, entropy, lse and the two coefficients of u, from the finished sums."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    m = tl.load(m_ptr + row, mask=live, other=0.0)
    s = tl.load(s_ptr + row, mask=live, other=1.0)
    a = tl.load(a_ptr + row, mask=live, other=0.0)
    z_t = tl.load(z_t_ptr + row, mask=live, other=0.0)
    alone = s == 0.0  # no other token has any probability
    log_s = tl.where(alone, float("-inf"), tl.log(tl.where(alone, 1.0, s)))
    d = (z_t - m) - log_s
    x = tl.exp(-tl.abs(d))
    log1p_x = _log1p(x)
    logp = tl.where(d < 0.0, d, 0.0) - log1p_x
    logq = tl.where(d < 0.0, 0.0, -d) - log1p_x
    p = tl.where(d < 0.0, x, 1.0) / (1.0 + x)
    q = tl.where(d < 0.0, 1.0, x) / (1.0 + x)
    others = tl.where(alone, 0.0, log_s - a / tl.where(alone, 1.0, s))
    entropy = tl.where(p == 0.0, 0.0, -p * logp) + tl.where(q == 0.0, 0.0, q * (others - logq))
    tl.store(logp_ptr + row, logp, mask=live)
    tl.store(entropy_ptr + row, entropy, mask=live)
    tl.store(lse_ptr + row, tl.where(d >= 0.0, z_t - logp, m + log_s - logq), mask=live)
    to_target = q * gain
    tl.store(to_others_ptr + row, to_target / (tl.where(alone, 1.0, s) * P_SCALE), mask=live)
    if HAS_CAP:
        t = z_t / cap
        to_target = to_target * (1.0 - t * t)
    tl.store(to_target_ptr + row, to_target, mask=live)


@triton.jit
def direction_kernel(
    acc_ptr,
    weight_ptr,
    target_ptr,
    to_target_ptr,
    to_others_ptr,
    u_ptr,
    width,
    weight_stride_v,
    weight_stride_h,
    BLOCK_H: tl.constexpr,
):
    """Write u = to_target w_t - to_others acc, rounded once; `u_ptr` may be `acc_ptr`."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.int64)
    to_target = tl.load(to_target_ptr + row)
    to_others = tl.load(to_others_ptr + row)
    weight_ptr += target * weight_stride_v
    acc_ptr += row * width
    u_ptr += row * width
    for start in range(0, width, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < width
        w = tl.load(weight_ptr + h.to(tl.int64) * weight_stride_h, mask=inside, other=0.0)
        acc = tl.load(acc_ptr + h, mask=inside, other=0.0)
        u = to_target * w.to(tl.float32) - to_others * acc
        tl.store(u_ptr + h, u.to(u_ptr.dtype.element_ty), mask=inside)


@triton.jit
def fold_pairs_kernel(
    z_ptr,
    p_ptr,
    bias_ptr,
    m_ptr,
    n_ptr,
    s_ptr,
    a_ptr,
    b_ptr,
    t_ptr,
    c_ptr,
    acc_ptr,
    pairs,
    columns,
    z_stride,
    p_stride,
    width,
    gain,
    inner,
    cap,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    WANT_P: tl.constexpr,
    P_SCALE: tl.constexpr,
    R_SCALE: tl.constexpr,
):
    """Add one tile of products to the running sums of a pair, and replace it with exp(z - m) slope and its r-fold.

    One program owns both rows of a pair, `pairs` rows apart, and has both in registers before it writes.
    """
    row = tl.program_id(0).to(tl.int64)
    other = row + pairs
    column = tl.arange(0, BLOCK)
    live = column < columns
    z = tl.load(z_ptr + row * z_stride + column, mask=live, other=0.0)
    d = tl.load(z_ptr + other * z_stride + column, mask=live, other=0.0)
    if not DIFFERENCES:
        d = z - d
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=live, other=0.0).to(tl.float32)
    if HAS_CAP:
        teacher = _tanh(z * inner - d * inner)
        student = _tanh(z * inner)
        # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b) does not cancel.
        d = _tanh(d * inner) * (1.0 - student * teacher) * cap
        z = student * cap
    else:
        z = z * gain
        d = d * gain
    z = tl.where(live, z, float("-inf"))

    m_old = tl.load(m_ptr + row)
    c_old = tl.load(c_ptr + row)
    s_old = tl.load(s_ptr + row)
    a_old = tl.load(a_ptr + row)
    top = tl.max(z, 0)
    m_new = tl.maximum(m_old, top)
    rises = m_new > m_old
    c_new = tl.where(rises, tl.max(tl.where(z == top, d, float("-inf")), 0), c_old)
    tl.store(m_ptr + row, m_new)
    tl.store(c_ptr + row, c_new)
    shift = tl.maximum(m_old, FLOOR) - tl.maximum(m_new, FLOOR)
    alpha = tl.exp(shift)
    move = tl.where(s_old > 0.0, c_new - c_old, 0.0)
    z = z - tl.maximum(m_new, FLOOR)
    r = d - c_new

    x = z - r  # y - y_k
    n_old = tl.load(n_ptr + row) + shift + move
    n_new = tl.maximum(n_old, tl.max(x, 0))
    tl.store(n_ptr + row, n_new)
    w = tl.exp(x - tl.maximum(n_new, FLOOR))
    shrink = tl.exp(tl.maximum(n_old, FLOOR) - tl.maximum(n_new, FLOOR))
    tl.store(t_ptr + row, tl.load(t_ptr + row) * shrink + tl.sum(w, 0))

    e = tl.exp(z)
    er = e * r
    # Infinite or NaN where the teacher is far away, and then not used.
    excess = tl.sum(tl.where(tl.abs(r) < NEAR, e * _excess_series(r), w * tl.exp(n_new) - e + er), 0)
    grown = tl.where(tl.abs(move) < NEAR, _excess_series(-move), tl.exp(move) - 1.0 - move)
    growth = grown + move
    b = tl.load(b_ptr + row)
    tl.store(b_ptr + row, (b + b * growth + s_old * grown - a_old * growth) * alpha + excess)
    tl.store(a_ptr + row, (a_old - s_old * move) * alpha + tl.sum(er, 0))
    tl.store(s_ptr + row, s_old * alpha + tl.sum(e, 0))
    if WANT_P:
        if HAS_CAP:
            t = (z + tl.maximum(m_new, FLOOR)) / cap
            slope = tl.where(e == 0.0, 0.0, 1.0 - t * t)
            e = e * slope
            er = er * slope
        er = er * R_SCALE
        if R_SCALE != 1.0:
            er = tl.minimum(tl.maximum(er, -HALF_MAX), HALF_MAX)
        tl.debug_barrier()
        tl.store(p_ptr + row * p_stride + column, (e * P_SCALE).to(p_ptr.dtype.element_ty), mask=live)
        tl.store(p_ptr + other * p_stride + column, er.to(p_ptr.dtype.element_ty), mask=live)
        if rises & (m_old > FLOOR):
            for start in range(0, width, BLOCK_H):
                h = start + tl.arange(0, BLOCK_H)
                inside = h < width
                acc_p = tl.load(acc_ptr + row * width + h, mask=inside, other=0.0)
                acc_r = tl.load(acc_ptr + other * width + h, mask=inside, other=0.0)
                tl.store(acc_ptr + row * width + h, acc_p * alpha, mask=inside)
                acc_r = (acc_r - acc_p * (move * (R_SCALE / P_SCALE))) * alpha
                tl.store(acc_ptr + other * width + h, acc_r, mask=inside)


@triton.jit
def finish_pairs_kernel(
    n_ptr,
    s_ptr,
    a_ptr,
    b_ptr,
    t_ptr,
    kl_ptr,
    to_r_ptr,
    to_p_ptr,
    rows,
    gain,
    BLOCK: tl.constexpr,
    P_SCALE: tl.constexpr,
    R_SCALE: tl.constexpr,
):
    """Write the KL divergence and the two coefficients of u, from the finished sums."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    s = tl.load(s_ptr + row, mask=live, other=1.0)
    a = tl.load(a_ptr + row, mask=live, other=0.0) / s
    b = tl.load(b_ptr + row, mask=live, other=0.0) / s
    x = b - a
    far = a + tl.load(n_ptr + row, mask=live, other=0.0) + tl.log(tl.load(t_ptr + row, mask=live, other=1.0) / s)
    kl = tl.where((b < KL_NEAR) & (tl.abs(x) < NEAR), b - _lag(x), far)
    tl.store(kl_ptr + row, tl.where(kl < 0.0, 0.0, kl), mask=live)  # rounding only
    tl.store(to_r_ptr + row, gain / (s * R_SCALE), mask=live)
    tl.store(to_p_ptr + row, gain * a / (s * P_SCALE), mask=live)
