"""Triton kernel of TTT-MLP, backward: the serial reverse chain; notation as in `triton_mlp_backward`.

As in the forward the adjoints of the two matrices stay in global memory, and the chain goes twice over tiles of the
inner width: back to the adjoint of z, then through the first map and the update. Barriers part writing from reading.
"""

try:
    from triton import jit
    from triton import language as tl
except ImportError:  # inside try: the Hub loader demands what a checkpoint's files import outside
    raise

from .triton_math import dot

__all__ = ["mlp_back_chain_kernel"]


@jit(do_not_specialize=["heads", "mini_batches"])
def mlp_back_chain_kernel(
    q,
    k,
    commit,
    ln_weight,
    reset,
    carried_slots,
    inner,
    gradient1,
    gradient2,
    weight1,
    weight2,
    read_inner,
    d_read,
    d_read_hidden,
    slope_in,
    curve_in,
    normed_in,
    moments,
    d_inner,
    d_gradient1,
    d_gradient2,
    d_e,
    d_keys,
    d_weight1,
    d_bias1,
    d_weight2,
    d_bias2,
    d_initial_weight1,
    d_initial_bias1,
    d_initial_weight2,
    d_initial_bias2,
    d_carried_inner,
    d_carried1,
    d_carried2,
    d_p,
    d_commit,
    d_k,
    heads,
    mini_batches,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESETS: tl.constexpr,
    CARRIED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the last mini-batch to the first; grid (rows * heads,).

    `d_weight1` .. `d_bias2` hold the adjoints of the weights at the end and become those at the start; `d_gradient1`
    becomes the whole adjoint of g1; `d_keys` holds the reads' part of k's.
    """
    pid = tl.program_id(0).to(tl.int64)
    row, head = pid // heads, pid % heads
    d, r, tile = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    in_f, in_k = d < F, r < K
    tokens = in_k[:, None] & in_f[None, :]
    gamma = tl.load(ln_weight + head * F + d, mask=in_f, other=0.0)
    gamma2 = gamma * gamma
    columns = mini_batches * K
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    moments += pid * 3 * columns
    d_weight1 += pid * F * M
    d_bias1 += pid * M
    d_weight2 += pid * M * F
    d_bias2 += pid * F
    for back in range(mini_batches):
        i = mini_batches - 1 - back
        t = (i * K + r).to(tl.int64)
        line = pid * columns + t
        place = line[:, None] * F + d[None, :]
        w1 = weight1 + (pid * mini_batches + i) * F * M
        w2 = weight2 + (pid * mini_batches + i) * M * F
        queries = tl.load(q + t[:, None] * q_token + d[None, :], mask=tokens, other=0.0)
        keys = tl.load(k + t[:, None] * k_token + d[None, :], mask=tokens, other=0.0)
        g2 = tl.load(gradient2 + place, mask=tokens, other=0.0)
        dz_read = tl.load(d_read + place, mask=tokens, other=0.0)
        normed = tl.load(normed_in + place, mask=tokens, other=0.0)
        rate = tl.load(commit + line, mask=in_k, other=0.0)
        rstd = tl.load(moments + t, mask=in_k, other=0.0)
        mean_p = tl.load(moments + columns + t, mask=in_k, other=0.0)
        mean_pn = tl.load(moments + 2 * columns + t, mask=in_k, other=0.0)
        written = in_k & (i < 0)
        if CARRIED:
            written = (tl.load(carried_slots + row * K + r, mask=in_k, other=0) != 0) & (i == 0)
        slot = pid * K + r

        lam2 = tl.load(d_bias2 + d, mask=in_f, other=0.0)
        y2 = tl.zeros([BLOCK_K, BLOCK_F], dtype=tl.float32) + lam2[None, :]
        through = tl.zeros([BLOCK_K, BLOCK_F], dtype=tl.float32)
        y1_g1 = tl.zeros([BLOCK_K], dtype=tl.float32)
        for j in range(0, M, BLOCK_M):
            m = j + tile
            in_m = m < M
            wide, mask = line[:, None] * M + m[None, :], in_k[:, None] & in_m[None, :]
            mask1, mask2 = in_f[:, None] & in_m[None, :], in_m[:, None] & in_f[None, :]
            lam_w1 = tl.load(d_weight1 + d[:, None] * M + m[None, :], mask=mask1, other=0.0)
            lam_b1 = tl.load(d_bias1 + m, mask=in_m, other=0.0)
            lam_w2 = tl.load(d_weight2 + m[:, None] * F + d[None, :], mask=mask2, other=0.0)
            w2_tile = tl.load(w2 + m[:, None] * F + d[None, :], mask=mask2, other=0.0)
            x2 = tl.load(inner + wide, mask=mask, other=0.0)
            g1 = tl.load(gradient1 + wide, mask=mask, other=0.0)
            slope = tl.load(slope_in + wide, mask=mask, other=0.0)
            u1 = tl.load(d_gradient1 + wide, mask=mask, other=0.0)
            y1 = dot(keys, lam_w1, PRECISION) + lam_b1[None, :]
            y1_g1 += tl.sum(y1 * g1, 1)
            u1 -= rate[:, None] * y1
            de = u1 * slope
            y2 += dot(x2, lam_w2, PRECISION)
            through += dot(de, w2_tile, PRECISION)
            tl.store(d_e + wide, de, mask=mask)
            tl.debug_barrier()
            tl.store(d_gradient1 + wide, u1, mask=mask)
            if CARRIED:
                tl.store(d_carried1 + slot[:, None] * M + m[None, :], u1, mask=mask & written[:, None])

        u = tl.load(d_gradient2 + place, mask=tokens, other=0.0) - rate[:, None] * y2 + through
        tl.store(d_commit + line, -y1_g1 - tl.sum(y2 * g2, 1), mask=in_k)
        if CARRIED:
            tl.store(d_carried2 + slot[:, None] * F + d[None, :], u, mask=tokens & written[:, None])
        mean_u, mean_un = tl.sum(u, 1) * (1.0 / F), tl.sum(u * normed, 1) * (1.0 / F)
        dp = tl.where(in_f[None, :], (u - mean_u[:, None] - normed * mean_un[:, None]) * rstd[:, None], 0.0)
        p = g2 + (mean_p[:, None] + normed * mean_pn[:, None]) * rstd[:, None]  # p / sigma
        dn = gamma2[None, :] * dp - u * (mean_pn * rstd)[:, None] - p * mean_un[:, None]
        dn = tl.where(in_f[None, :], dn, 0.0)
        mean_dn = tl.sum(dn, 1) * (1.0 / F)
        mean_rest = tl.sum(dn * normed + u * g2, 1) * (1.0 / F)
        dz = (dn - mean_dn[:, None] - normed * mean_rest[:, None]) * rstd[:, None]
        dz = tl.where(in_f[None, :] & ~written[:, None], dz, 0.0)
        dp = tl.where(written[:, None], 0.0, dp)
        tl.store(d_p + place, dp, mask=tokens)
        tl.debug_barrier()  # d_e and d_gradient1 come back, one of them transposed

        dk = tl.load(d_keys + place, mask=tokens, other=0.0) + gamma[None, :] * dp
        for j in range(0, M, BLOCK_M):
            m = j + tile
            in_m = m < M
            wide, mask = line[:, None] * M + m[None, :], in_k[:, None] & in_m[None, :]
            wide_t, mask_t = line[None, :] * M + m[:, None], in_m[:, None] & in_k[None, :]
            mask1, mask2 = in_f[:, None] & in_m[None, :], in_m[:, None] & in_f[None, :]
            g1 = tl.load(gradient1 + wide, mask=mask, other=0.0)
            u1 = tl.load(d_gradient1 + wide, mask=mask, other=0.0)
            slope = tl.load(slope_in + wide, mask=mask, other=0.0)
            curve = tl.load(curve_in + wide, mask=mask, other=0.0)
            lam_w2_t = tl.load(d_weight2 + d[:, None] + m[None, :] * F, mask=mask1, other=0.0)
            w2_t = tl.load(w2 + d[:, None] + m[None, :] * F, mask=mask1, other=0.0)
            dx2 = tl.load(d_inner + wide, mask=mask, other=0.0) - rate[:, None] * dot(g2, lam_w2_t, PRECISION)
            dx2 += dot(dz, w2_t, PRECISION)
            if CARRIED:
                tl.store(d_carried_inner + slot[:, None] * M + m[None, :], dx2, mask=mask & written[:, None])
            dz1 = dx2 * slope + u1 * curve
            lam_w1_t = tl.load(d_weight1 + d[None, :] * M + m[:, None], mask=mask2, other=0.0)
            w1_t = tl.load(w1 + d[None, :] * M + m[:, None], mask=mask2, other=0.0)
            dk += dot(dz1, w1_t, PRECISION) - rate[:, None] * dot(g1, lam_w1_t, PRECISION)
            dh1 = tl.load(d_read_hidden + wide, mask=mask, other=0.0)
            lam_w1 = tl.load(d_weight1 + d[:, None] * M + m[None, :], mask=mask1, other=0.0)
            lam_w1 += dot(tl.trans(keys), dz1, PRECISION) + dot(tl.trans(queries), dh1, PRECISION)
            lam_b1 = tl.load(d_bias1 + m, mask=in_m, other=0.0) + tl.sum(dz1 + dh1, 0)
            x2_t = tl.load(inner + wide_t, mask=mask_t, other=0.0)
            de_t = tl.load(d_e + wide_t, mask=mask_t, other=0.0)
            h2_t = tl.load(read_inner + wide_t, mask=mask_t, other=0.0)
            lam_w2 = tl.load(d_weight2 + m[:, None] * F + d[None, :], mask=mask2, other=0.0)
            lam_w2 += dot(x2_t, dz, PRECISION) + dot(de_t, g2, PRECISION) + dot(h2_t, dz_read, PRECISION)
            tl.debug_barrier()  # every thread has its part of the tiles before any of them changes
            tl.store(d_weight1 + d[:, None] * M + m[None, :], lam_w1, mask=mask1)
            tl.store(d_bias1 + m, lam_b1, mask=in_m)
            tl.store(d_weight2 + m[:, None] * F + d[None, :], lam_w2, mask=mask2)
        tl.store(d_k + place, dk, mask=tokens)
        tl.store(d_bias2 + d, lam2 + tl.sum(dz + dz_read, 0), mask=in_f)
        tl.debug_barrier()
        if RESETS:  # noqa: SIM102  (compiled away, which `and` is not)
            if tl.load(reset + row * mini_batches + i) != 0:
                _move(d_weight1, d_initial_weight1 + pid * F * M, F * M, BLOCK_M)
                _move(d_bias1, d_initial_bias1 + pid * M, M, BLOCK_M)
                _move(d_weight2, d_initial_weight2 + pid * M * F, M * F, BLOCK_M)
                _move(d_bias2, d_initial_bias2 + pid * F, F, BLOCK_M)
                tl.debug_barrier()


@jit
def _move(source, target, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Add `source` to `target` and leave zeros."""
    for start in range(0, COUNT, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < COUNT
        value = tl.load(source + place, mask=inside, other=0.0)
        tl.store(target + place, tl.load(target + place, mask=inside, other=0.0) + value, mask=inside)
        tl.store(source + place, tl.zeros([BLOCK], dtype=tl.float32), mask=inside)
