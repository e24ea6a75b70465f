"""Triton kernels of TTT-MLP, backward, in parallel: the weights of every mini-batch again, and its reads.

Notation as in `triton_linear_backward`; z1 and x2 = gelu(z1) are the output of the first map and the input of the
second at the keys, h1 and h2 = gelu(h1) the same at the queries, and e = g2 W2^T, so that g1 = e * gelu'(z1). The
forward keeps the weights of groups only; here those of every mini-batch are laid out first. Whatever must be had
transposed is stored first and loaded transposed, with a barrier between.
"""

try:
    from triton import jit
    from triton import language as tl
except ImportError:  # inside try: the Hub loader demands what a checkpoint's files import outside
    raise

from .triton_math import dot
from .triton_mlp import gelu, gelu_slope

__all__ = ["mlp_back_read_kernel", "mlp_expand_kernel"]


@jit
def gelu_curve(x):
    """The second derivative of `gelu`."""
    c = 2 * 0.7978845608028654
    s = tl.sigmoid(c * x * (1 + 0.044715 * x * x))
    u = c * (1 + 0.134145 * x * x)
    return s * (1 - s) * (2 * u + x * ((1 - 2 * s) * u * u + c * 0.26829 * x))


@jit(do_not_specialize=["heads", "mini_batches", "groups"])
def mlp_expand_kernel(
    k,
    commit,
    inner,
    gradient1,
    gradient2,
    group_weight1,
    group_bias1,
    group_weight2,
    group_bias2,
    weight1,
    bias1,
    weight2,
    bias2,
    heads,
    mini_batches,
    groups,
    k_row,
    k_head,
    k_token,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The weights at the start of every mini-batch from those of its group; grid (rows * heads * groups,)."""
    group, pid = tl.program_id(0) % groups, (tl.program_id(0) // groups).to(tl.int64)
    row, head = pid // heads, pid % heads
    d, r, tile = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    in_f, in_k = d < F, r < K
    k += row * k_row + head * k_head
    state = pid * groups + group
    last = tl.minimum((group + 1) * PER_GROUP, mini_batches)
    for j in range(0, M, BLOCK_M):
        m = j + tile
        in_m = m < M
        first, second = d[:, None] * M + m[None, :], m[:, None] * F + d[None, :]
        mask1, mask2 = in_f[:, None] & in_m[None, :], in_m[:, None] & in_f[None, :]
        w1 = tl.load(group_weight1 + state * F * M + first, mask=mask1, other=0.0)
        b1 = tl.load(group_bias1 + state * M + m, mask=in_m, other=0.0)
        w2 = tl.load(group_weight2 + state * M * F + second, mask=mask2, other=0.0)
        b2 = tl.load(group_bias2 + state * F + d, mask=in_f, other=0.0)
        for i in range(group * PER_GROUP, last):
            here = pid * mini_batches + i
            tl.store(weight1 + here * F * M + first, w1, mask=mask1)
            tl.store(bias1 + here * M + m, b1, mask=in_m)
            tl.store(weight2 + here * M * F + second, w2, mask=mask2)
            if j == 0:
                tl.store(bias2 + here * F + d, b2, mask=in_f)
            t = (i * K + r).to(tl.int64)
            line = pid * mini_batches * K + t
            rate = tl.load(commit + line, mask=in_k, other=0.0)
            keys = tl.load(k + t[:, None] * k_token + d[None, :], mask=in_k[:, None] & in_f[None, :], other=0.0)
            inner_t = tl.load(inner + line[None, :] * M + m[:, None], mask=in_m[:, None] & in_k[None, :], other=0.0)
            g1 = tl.load(gradient1 + line[:, None] * M + m[None, :], mask=in_k[:, None] & in_m[None, :], other=0.0)
            g2 = tl.load(gradient2 + line[:, None] * F + d[None, :], mask=in_k[:, None] & in_f[None, :], other=0.0)
            step1, step2 = g1 * rate[:, None], g2 * rate[:, None]
            w1 -= dot(tl.trans(keys), step1, PRECISION)
            b1 -= tl.sum(step1, 0)
            w2 -= dot(inner_t, step2, PRECISION)
            b2 -= tl.sum(step2, 0)


@jit(do_not_specialize=["heads", "mini_batches"])
def mlp_back_read_kernel(
    q,
    k,
    v,
    lr,
    tau,
    ln_weight,
    ln_bias,
    carried_slots,
    inner,
    gradient1,
    gradient2,
    weight1,
    bias1,
    weight2,
    bias2,
    d_read,
    d_norm,
    d_rows_inner,
    d_rows1,
    d_rows2,
    last,
    read_inner,
    d_read_hidden,
    slope_out,
    curve_out,
    normed_out,
    moments,
    d_inner,
    d_gradient1,
    d_gradient2,
    d_q,
    d_k,
    d_lr,
    d_tau,
    heads,
    mini_batches,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    CARRIED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adjoints from the reads, norms and kept rows of one mini-batch, and what the chain needs.

    Grid (rows * heads * M,). Gives h2 and the adjoint of h1 at the queries, gelu'(z1) and e * gelu''(z1) at the keys
    (zeros at carried slots), the adjoints of x2, g1 and g2, all of q's and the reads' part of k's.
    """
    i, pid = tl.program_id(0) % mini_batches, (tl.program_id(0) // mini_batches).to(tl.int64)
    row, head = pid // heads, pid % heads
    d, r, tile = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    in_f, in_k = d < F, r < K
    t = (i * K + r).to(tl.int64)
    tokens = in_k[:, None] & in_f[None, :]
    line = pid * mini_batches * K + t
    place = line[:, None] * F + d[None, :]
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    here = pid * mini_batches + i
    weight1 += here * F * M
    bias1 += here * M
    weight2 += here * M * F
    queries = tl.load(q + t[:, None] * q_token + d[None, :], mask=tokens, other=0.0)
    keys = tl.load(k + t[:, None] * k_token + d[None, :], mask=tokens, other=0.0)
    g2 = tl.load(gradient2 + place, mask=tokens, other=0.0)
    dz = tl.load(d_read + place, mask=tokens, other=0.0)
    lr_s = tl.load(lr + line, mask=in_k, other=0.0)
    tau_t = tl.load(tau + r, mask=in_k, other=0.0)
    live = in_k
    if CARRIED:
        live = in_k & ((tl.load(carried_slots + row * K + r, mask=in_k, other=0) == 0) | (i > 0))
    scale = tl.where(r[None, :] <= r[:, None], tau_t[:, None] * lr_s[None, :], 0.0)  # [t, s]
    scale_t = tl.where(r[:, None] <= r[None, :], lr_s[:, None] * tau_t[None, :], 0.0)  # [s, t]
    scores = scale * (dot(queries, tl.trans(keys), PRECISION) + 1.0)

    # h2 and gelu'(h1) at the queries; z and the derivatives of gelu at the keys.
    z = tl.zeros([BLOCK_K, BLOCK_F], dtype=tl.float32)
    z += tl.load(bias2 + here * F + d, mask=in_f, other=0.0)[None, :]
    g1_squared = tl.zeros([BLOCK_K], dtype=tl.float32)
    x2_squared = tl.zeros([BLOCK_K], dtype=tl.float32)
    for j in range(0, M, BLOCK_M):
        m = j + tile
        in_m = m < M
        wide, mask = line[:, None] * M + m[None, :], in_k[:, None] & in_m[None, :]
        mask1, mask2 = in_f[:, None] & in_m[None, :], in_m[:, None] & in_f[None, :]
        w1 = tl.load(weight1 + d[:, None] * M + m[None, :], mask=mask1, other=0.0)
        b1 = tl.load(bias1 + m, mask=in_m, other=0.0)
        w2 = tl.load(weight2 + m[:, None] * F + d[None, :], mask=mask2, other=0.0)
        w2_t = tl.load(weight2 + d[:, None] + m[None, :] * F, mask=mask1, other=0.0)
        g1 = tl.load(gradient1 + wide, mask=mask, other=0.0)
        x2 = tl.load(inner + wide, mask=mask, other=0.0)
        g1_squared += tl.sum(g1 * g1, 1)
        x2_squared += tl.sum(x2 * x2, 1)
        h1 = dot(queries, w1, PRECISION) + b1[None, :] - dot(scores, g1, PRECISION)
        tl.store(read_inner + wide, gelu(h1), mask=mask)
        tl.store(d_read_hidden + wide, gelu_slope(h1), mask=mask)
        z1 = dot(keys, w1, PRECISION) + b1[None, :]
        e = dot(g2, w2_t, PRECISION)
        tl.store(slope_out + wide, tl.where(live[:, None], gelu_slope(z1), 0.0), mask=mask)
        tl.store(curve_out + wide, tl.where(live[:, None], e * gelu_curve(z1), 0.0), mask=mask)
        z += dot(x2, w2, PRECISION)
    tl.debug_barrier()

    exact_keys = keys.to(tl.float32)
    ratio = tl.zeros([BLOCK_K], dtype=tl.float32)
    g2_squared, k_squared = tl.sum(g2 * g2, 1), tl.sum(exact_keys * exact_keys, 1)
    if NORM:
        squared = (k_squared + 1.0) * g1_squared + (x2_squared + 1.0) * g2_squared
        d_n = tl.load(d_norm + line, mask=in_k, other=0.0)
        ratio = tl.where(squared > 0, d_n / tl.sqrt(tl.where(squared > 0, squared, 1.0)), 0.0)
    kept = in_k & (i < 0)
    if ROWS:
        kept = in_k & (tl.load(last + row) == i)
    slot = pid * K + r

    # Adjoints of h1 and x2.
    d_score2 = scale * dot(dz, tl.trans(g2), PRECISION)
    pull2_t = dot(g2, tl.trans(dz), PRECISION)
    d_score2_t = scale_t * pull2_t
    overlap_t = tl.zeros([BLOCK_K, BLOCK_K], dtype=tl.float32)
    for j in range(0, M, BLOCK_M):
        m = j + tile
        in_m = m < M
        wide, mask = line[:, None] * M + m[None, :], in_k[:, None] & in_m[None, :]
        w2_t = tl.load(weight2 + d[:, None] + m[None, :] * F, mask=in_f[:, None] & in_m[None, :], other=0.0)
        x2 = tl.load(inner + wide, mask=mask, other=0.0)
        h2 = tl.load(read_inner + wide, mask=mask, other=0.0)
        h2_t = tl.load(read_inner + line[None, :] * M + m[:, None], mask=in_m[:, None] & in_k[None, :], other=0.0)
        slope = tl.load(d_read_hidden + wide, mask=mask, other=0.0)
        overlap_t += dot(x2, h2_t, PRECISION)
        d_h1 = (dot(dz, w2_t, PRECISION) - dot(d_score2, x2, PRECISION)) * slope
        d_x2 = (ratio * g2_squared)[:, None] * x2 - dot(d_score2_t, h2, PRECISION)
        if ROWS:
            d_x2 += tl.load(d_rows_inner + slot[:, None] * M + m[None, :], mask=mask & kept[:, None], other=0.0)
        tl.debug_barrier()  # gelu' has been read everywhere
        tl.store(d_read_hidden + wide, d_h1, mask=mask)
        tl.store(d_inner + wide, d_x2, mask=mask)
    tl.debug_barrier()

    # Adjoints of q, g1 and the reads' part of k.
    scores_t = dot(keys, tl.trans(queries), PRECISION) + 1.0
    pull1 = tl.zeros([BLOCK_K, BLOCK_K], dtype=tl.float32)
    pull1_t = tl.zeros([BLOCK_K, BLOCK_K], dtype=tl.float32)
    dq = tl.zeros([BLOCK_K, BLOCK_F], dtype=tl.float32)
    for j in range(0, M, BLOCK_M):
        m = j + tile
        in_m = m < M
        wide, mask = line[:, None] * M + m[None, :], in_k[:, None] & in_m[None, :]
        w1_t = tl.load(weight1 + d[None, :] * M + m[:, None], mask=in_m[:, None] & in_f[None, :], other=0.0)
        g1 = tl.load(gradient1 + wide, mask=mask, other=0.0)
        d_h1 = tl.load(d_read_hidden + wide, mask=mask, other=0.0)
        d_h1_t = tl.load(d_read_hidden + line[None, :] * M + m[:, None], mask=in_m[:, None] & in_k[None, :], other=0.0)
        dq += dot(d_h1, w1_t, PRECISION)
        pull1 += dot(d_h1, tl.trans(g1), PRECISION)
        pull1_t += dot(g1, d_h1_t, PRECISION)
        d_g1 = (ratio * (k_squared + 1.0))[:, None] * g1 - dot(scale_t * scores_t, d_h1, PRECISION)
        if ROWS:
            d_g1 += tl.load(d_rows1 + slot[:, None] * M + m[None, :], mask=mask & kept[:, None], other=0.0)
        tl.store(d_gradient1 + wide, d_g1, mask=mask)
    tl.store(d_q + place, dq - dot(scale * pull1, keys, PRECISION), mask=tokens)
    dk = (ratio * g1_squared)[:, None] * exact_keys - dot(scale_t * pull1_t, queries, PRECISION)
    tl.store(d_k + place, dk, mask=tokens)
    d_g2 = (ratio * (x2_squared + 1.0))[:, None] * g2 - dot(scale_t * (overlap_t + 1.0), dz, PRECISION)
    if ROWS:
        d_g2 += tl.load(d_rows2 + slot[:, None] * F + d[None, :], mask=tokens & kept[:, None], other=0.0)
    tl.store(d_gradient2 + place, d_g2, mask=tokens)
    weighed = tl.where(r[:, None] <= r[None, :], pull2_t * (overlap_t + 1.0) + pull1_t * scores_t, 0.0)
    tl.store(d_lr + line, -tl.sum(weighed * tau_t[None, :], 1), mask=in_k)
    tl.store(d_tau + line, -tl.sum(weighed * lr_s[:, None], 0), mask=in_k)

    mean = tl.sum(z, 1) * (1.0 / F)
    centred = tl.where(in_f[None, :], z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) * (1.0 / F) + EPS)
    normed = centred * rstd[:, None]
    tl.store(normed_out + place, normed, mask=tokens)
    gamma = tl.load(ln_weight + head * F + d, mask=in_f, other=0.0)
    beta = tl.load(ln_bias + head * F + d, mask=in_f, other=0.0)
    values = tl.load(v + t[:, None] * v_token + d[None, :], mask=tokens, other=0.0).to(tl.float32)
    p = gamma[None, :] * (gamma[None, :] * normed + beta[None, :] - values + exact_keys)
    columns = mini_batches * K
    moments += pid * 3 * columns + t
    tl.store(moments, rstd, mask=in_k)
    tl.store(moments + columns, tl.sum(p, 1) * (1.0 / F), mask=in_k)
    tl.store(moments + 2 * columns, tl.sum(p * normed, 1) * (1.0 / F), mask=in_k)
