"""Triton kernels of TTT-MLP, forward: a serial chain over the writes and a parallel read, as in `triton_linear`.

The two matrices of a head (f x 4f and 4f x f in float32) do not fit in registers beside anything else. The chain
keeps them in global memory, where they stay in the cache of the GPU, and goes twice over tiles of the inner width:
forward to the gradient at the output, then through the update. A barrier parts what one thread writes from what
another reads.
"""

try:
    from triton import jit
    from triton import language as tl
except ImportError:  # inside try: the Hub loader demands what a checkpoint's files import outside
    raise

from .triton_math import dot

__all__ = ["mlp_chain_kernel", "mlp_read_kernel"]


@jit
def gelu(x):
    """GELU in its tanh form."""
    return x * tl.sigmoid(2 * 0.7978845608028654 * x * (1 + 0.044715 * x * x))


@jit
def gelu_slope(x):
    """The derivative of `gelu`."""
    s = tl.sigmoid(2 * 0.7978845608028654 * x * (1 + 0.044715 * x * x))
    return s + x * s * (1 - s) * (2 * 0.7978845608028654) * (1 + 0.134145 * x * x)


@jit(do_not_specialize=["heads", "mini_batches", "groups"])
def mlp_chain_kernel(
    k,
    v,
    commit,
    ln_weight,
    ln_bias,
    initial_weight1,
    initial_bias1,
    initial_weight2,
    initial_bias2,
    reset,
    carried_inner,
    carried_gradient1,
    carried_gradient2,
    carried_slots,
    weight1,
    bias1,
    weight2,
    bias2,
    inner_out,
    gradient1_out,
    gradient2_out,
    group_weight1,
    group_bias1,
    group_weight2,
    group_bias2,
    heads,
    mini_batches,
    groups,
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
    PER_GROUP: tl.constexpr,
    EPS: tl.constexpr,
    RESETS: tl.constexpr,
    CARRIED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Commit every mini-batch to `weight1` .. `bias2` in place; grid (rows * heads,).

    Gives per token the input of the second map and both gradients, and the weights at the start of every group.
    """
    pid = tl.program_id(0).to(tl.int64)
    row, head = pid // heads, pid % heads
    d, r, tile = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    in_f, in_k = d < F, r < K
    tokens = in_k[:, None] & in_f[None, :]
    gamma = tl.load(ln_weight + head * F + d, mask=in_f, other=0.0)
    beta = tl.load(ln_bias + head * F + d, mask=in_f, other=0.0)
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    weight1 += pid * F * M
    bias1 += pid * M
    weight2 += pid * M * F
    bias2 += pid * F
    for i in range(mini_batches):
        if RESETS:
            if tl.load(reset + row * mini_batches + i) != 0:
                for j in range(0, M, BLOCK_M):
                    m = j + tile
                    in_m = m < M
                    first = d[:, None] * M + m[None, :]
                    second = m[:, None] * F + d[None, :]
                    mask1, mask2 = in_f[:, None] & in_m[None, :], in_m[:, None] & in_f[None, :]
                    tl.store(weight1 + first, tl.load(initial_weight1 + head * F * M + first, mask=mask1), mask=mask1)
                    tl.store(bias1 + m, tl.load(initial_bias1 + head * M + m, mask=in_m), mask=in_m)
                    tl.store(
                        weight2 + second, tl.load(initial_weight2 + head * M * F + second, mask=mask2), mask=mask2
                    )
                tl.store(bias2 + d, tl.load(initial_bias2 + head * F + d, mask=in_f), mask=in_f)
            tl.debug_barrier()
        t = (i * K + r).to(tl.int64)
        line = pid * mini_batches * K + t
        keys = tl.load(k + t[:, None] * k_token + d[None, :], mask=tokens, other=0.0)
        values = tl.load(v + t[:, None] * v_token + d[None, :], mask=tokens, other=0.0).to(tl.float32)
        rate = tl.load(commit + line, mask=in_k, other=0.0)
        written = in_k & (i < 0)
        if CARRIED:
            written = (tl.load(carried_slots + row * K + r, mask=in_k, other=0) != 0) & (i == 0)
        last_bias = tl.load(bias2 + d, mask=in_f, other=0.0)
        if i % PER_GROUP == 0:
            tl.store(group_bias2 + (pid * groups + i // PER_GROUP) * F + d, last_bias, mask=in_f)

        z = tl.zeros([BLOCK_K, BLOCK_F], dtype=tl.float32) + last_bias[None, :]
        for j in range(0, M, BLOCK_M):
            m = j + tile
            in_m = m < M
            mask1, mask2 = in_f[:, None] & in_m[None, :], in_m[:, None] & in_f[None, :]
            w1 = tl.load(weight1 + d[:, None] * M + m[None, :], mask=mask1, other=0.0)
            w2 = tl.load(weight2 + m[:, None] * F + d[None, :], mask=mask2, other=0.0)
            b1 = tl.load(bias1 + m, mask=in_m, other=0.0)
            if i % PER_GROUP == 0:
                state = pid * groups + i // PER_GROUP
                tl.store(group_weight1 + state * F * M + d[:, None] * M + m[None, :], w1, mask=mask1)
                tl.store(group_bias1 + state * M + m, b1, mask=in_m)
                tl.store(group_weight2 + state * M * F + m[:, None] * F + d[None, :], w2, mask=mask2)
            inner = gelu(dot(keys, w1, PRECISION) + b1[None, :])
            inner_mask = in_k[:, None] & in_m[None, :]
            if CARRIED:
                old = tl.load(
                    carried_inner + (pid * K + r)[:, None] * M + m[None, :],
                    mask=inner_mask & written[:, None],
                    other=0.0,
                )
                inner = tl.where(written[:, None], old, inner)
            tl.store(inner_out + line[:, None] * M + m[None, :], inner, mask=inner_mask)
            z += dot(inner, w2, PRECISION)

        mean = tl.sum(z, 1) * (1.0 / F)
        centred = tl.where(in_f[None, :], z - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) * (1.0 / F) + EPS)
        normed = centred * rstd[:, None]
        p = gamma[None, :] * (gamma[None, :] * normed + beta[None, :] - values + keys.to(tl.float32))
        mean_p, mean_pn = tl.sum(p, 1) * (1.0 / F), tl.sum(p * normed, 1) * (1.0 / F)
        g2 = (p - mean_p[:, None] - normed * mean_pn[:, None]) * rstd[:, None]
        g2 = tl.where(in_f[None, :], g2, 0.0)
        if CARRIED:
            old = tl.load(
                carried_gradient2 + (pid * K + r)[:, None] * F + d[None, :], mask=tokens & written[:, None], other=0.0
            )
            g2 = tl.where(written[:, None], old, g2)
        tl.store(gradient2_out + line[:, None] * F + d[None, :], g2, mask=tokens)
        step2 = g2 * rate[:, None]
        tl.store(bias2 + d, last_bias - tl.sum(step2, 0), mask=in_f)
        tl.debug_barrier()  # the inner activations come back transposed

        for j in range(0, M, BLOCK_M):
            m = j + tile
            in_m = m < M
            mask1, mask2 = in_f[:, None] & in_m[None, :], in_m[:, None] & in_f[None, :]
            inner_mask = in_k[:, None] & in_m[None, :]
            w1 = tl.load(weight1 + d[:, None] * M + m[None, :], mask=mask1, other=0.0)
            w2 = tl.load(weight2 + m[:, None] * F + d[None, :], mask=mask2, other=0.0)
            w2_t = tl.load(weight2 + d[:, None] + m[None, :] * F, mask=mask1, other=0.0)
            b1 = tl.load(bias1 + m, mask=in_m, other=0.0)
            inner_t = tl.load(
                inner_out + line[None, :] * M + m[:, None], mask=in_m[:, None] & in_k[None, :], other=0.0
            )
            slope = gelu_slope(dot(keys, w1, PRECISION) + b1[None, :])
            g1 = dot(g2, w2_t, PRECISION) * slope
            if CARRIED:
                old = tl.load(
                    carried_gradient1 + (pid * K + r)[:, None] * M + m[None, :],
                    mask=inner_mask & written[:, None],
                    other=0.0,
                )
                g1 = tl.where(written[:, None], old, g1)
            tl.store(gradient1_out + line[:, None] * M + m[None, :], g1, mask=inner_mask)
            step1 = g1 * rate[:, None]
            w1 -= dot(tl.trans(keys), step1, PRECISION)
            w2 -= dot(inner_t, step2, PRECISION)
            tl.debug_barrier()  # every thread has its part of the tiles before any of them changes
            tl.store(weight1 + d[:, None] * M + m[None, :], w1, mask=mask1)
            tl.store(weight2 + m[:, None] * F + d[None, :], w2, mask=mask2)
            tl.store(bias1 + m, b1 - tl.sum(step1, 0), mask=in_m)
        tl.debug_barrier()  # the next mini-batch reads what was committed


@jit(do_not_specialize=["heads", "mini_batches", "groups"])
def mlp_read_kernel(
    q,
    k,
    lr,
    commit,
    tau,
    inner,
    gradient1,
    gradient2,
    group_weight1,
    group_bias1,
    group_weight2,
    group_bias2,
    z_out,
    norm_out,
    heads,
    mini_batches,
    groups,
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
    PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Read every query and take the norm of every token's gradient; grid (rows * heads * groups,)."""
    group, pid = tl.program_id(0) % groups, (tl.program_id(0) // groups).to(tl.int64)
    row, head = pid // heads, pid % heads
    d, r, tile = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    in_f = d < F
    t = (group * PER_GROUP * K + r).to(tl.int64)
    in_t = (r < PER_GROUP * K) & (t < mini_batches * K)
    tokens = in_t[:, None] & in_f[None, :]
    line = pid * mini_batches * K + t
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    state = pid * groups + group
    queries = tl.load(q + t[:, None] * q_token + d[None, :], mask=tokens, other=0.0)
    keys = tl.load(k + t[:, None] * k_token + d[None, :], mask=tokens, other=0.0)
    tau_t = tl.load(tau + r % K)
    lr_s = tl.load(lr + line, mask=in_t, other=0.0)
    commit_s = tl.load(commit + line, mask=in_t, other=0.0)
    mini_batch = r // K
    earlier = mini_batch[None, :] < mini_batch[:, None]
    own = (mini_batch[None, :] == mini_batch[:, None]) & (r[None, :] <= r[:, None])
    scale = tl.where(earlier, commit_s[None, :], tl.where(own, tau_t[:, None] * lr_s[None, :], 0.0))
    scores = scale * (dot(queries, tl.trans(keys), PRECISION) + 1.0)
    overlap = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
    z = tl.zeros([BLOCK_T, BLOCK_F], dtype=tl.float32)
    g1_squared = tl.zeros([BLOCK_T], dtype=tl.float32)
    x2_squared = tl.zeros([BLOCK_T], dtype=tl.float32)
    for j in range(0, M, BLOCK_M):
        m = j + tile
        in_m = m < M
        inner_mask = in_t[:, None] & in_m[None, :]
        w1 = tl.load(
            group_weight1 + state * F * M + d[:, None] * M + m[None, :], mask=in_f[:, None] & in_m[None, :], other=0.0
        )
        b1 = tl.load(group_bias1 + state * M + m, mask=in_m, other=0.0)
        g1 = tl.load(gradient1 + line[:, None] * M + m[None, :], mask=inner_mask, other=0.0)
        x2 = tl.load(inner + line[:, None] * M + m[None, :], mask=inner_mask, other=0.0)
        g1_squared += tl.sum(g1 * g1, 1)
        x2_squared += tl.sum(x2 * x2, 1)
        read = gelu(dot(queries, w1, PRECISION) + b1[None, :] - dot(scores, g1, PRECISION))
        w2 = tl.load(
            group_weight2 + state * M * F + m[:, None] * F + d[None, :], mask=in_m[:, None] & in_f[None, :], other=0.0
        )
        z += dot(read, w2, PRECISION)
        overlap += dot(read, tl.trans(x2), PRECISION)
    g2 = tl.load(gradient2 + line[:, None] * F + d[None, :], mask=tokens, other=0.0)
    z -= dot(scale * (overlap + 1.0), g2, PRECISION)
    z += tl.load(group_bias2 + state * F + d, mask=in_f, other=0.0)[None, :]
    tl.store(z_out + line[:, None] * F + d[None, :], z, mask=tokens)
    exact_keys = keys.to(tl.float32)
    squared = (tl.sum(exact_keys * exact_keys, 1) + 1.0) * g1_squared + (x2_squared + 1.0) * tl.sum(g2 * g2, 1)
    tl.store(norm_out + line, tl.sqrt(squared), mask=in_t)
