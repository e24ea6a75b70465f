"""Triton kernels of TTT-Linear, forward: a serial chain over the writes and a parallel read.

The gradients of a mini-batch need only k, v and the weights at its start, so the chain computes nothing but them and
commits, one program per row and head. Given the gradients, all reads are a causal linear attention over groups of
mini-batches that starts from the weights saved at every group, in parallel over groups:
z_t = q_t W + b - sum_s c[t, s] (q_t . k_s + 1) g_s, where c is tau_t * lr_s inside a mini-batch for s <= t, and for an
earlier mini-batch of the group what s committed with (`commit`), tau_{K-1} * lr_s or 0 if that one is not full.

The chain works feature-major: W^T is the accumulator of the commit and, from registers, the left factor of W^T k^T.
Layout: q, k, v are [B, H, M * K, f], float32 or bfloat16, with any strides but the last; all else is contiguous
float32. "pid" is row * heads + head.
"""

try:
    from triton import jit
    from triton import language as tl
except ImportError:  # inside try: the Hub loader demands what a checkpoint's files import outside
    raise

from .triton_math import add2, add5, dot

__all__ = ["linear_chain_kernel", "linear_read_kernel"]


@jit(do_not_specialize=["heads", "mini_batches", "groups"])
def linear_chain_kernel(
    k,
    v,
    commit,
    ln_weight,
    ln_bias,
    start_weight,
    start_bias,
    initial_weight,
    initial_bias,
    reset,
    carried_gradient,
    carried_slots,
    gradient_out,
    group_weight,
    group_bias,
    end_weight,
    end_bias,
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
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_GROUP: tl.constexpr,
    EPS: tl.constexpr,
    RESETS: tl.constexpr,
    CARRIED: tl.constexpr,
    ONE_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of all tokens, the weights at the start of every group and those at the end; grid (rows * heads,).

    With ONE_SUM the mean and the spread of z and those of the gradient come from one reduction over the features,
    which shortens the chain but loses digits where the mean of z is many times its spread.
    """
    pid = tl.program_id(0).to(tl.int64)
    row, head = pid // heads, pid % heads
    d, r = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K)
    in_f, in_k = d < F, r < K
    square, across = in_f[:, None] & in_f[None, :], in_f[:, None] & in_k[None, :]
    tokens = in_k[:, None] & in_f[None, :]
    transposed = d[None, :] * F + d[:, None]  # W [in, out] read as W^T [out, in]
    gamma = tl.load(ln_weight + head * F + d, mask=in_f, other=0.0)
    beta = tl.load(ln_bias + head * F + d, mask=in_f, other=0.0)
    gamma2 = gamma * gamma
    sum_gamma2 = tl.sum(gamma2, 0)
    weight = tl.load(start_weight + pid * F * F + transposed, mask=square, other=0.0)
    bias = tl.load(start_bias + pid * F + d, mask=in_f, other=0.0)
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    commit += pid * mini_batches * K
    gradient_out += pid * mini_batches * K * F
    for i in range(mini_batches):
        if RESETS:  # noqa: SIM102  (compiled away, which `and` is not)
            if tl.load(reset + row * mini_batches + i) != 0:
                weight = tl.load(initial_weight + head * F * F + transposed, mask=square, other=0.0)
                bias = tl.load(initial_bias + head * F + d, mask=in_f, other=0.0)
        if i % PER_GROUP == 0:
            group = pid * groups + i // PER_GROUP
            tl.store(group_weight + group * F * F + transposed, weight, mask=square)
            tl.store(group_bias + group * F + d, bias, mask=in_f)
        t = (i * K + r).to(tl.int64)
        values = tl.load(v + t[:, None] * v_token + d[None, :], mask=tokens, other=0.0)
        keys = tl.load(k + t[:, None] * k_token + d[None, :], mask=tokens, other=0.0)
        k_t = tl.trans(keys)
        rate = tl.load(commit + t, mask=in_k, other=0.0)
        place = d[:, None] + t[None, :] * F
        residual = gamma[:, None] * (beta[:, None] - tl.trans(values).to(tl.float32) + k_t.to(tl.float32))
        z = dot(weight, k_t, PRECISION) + bias[:, None]
        # The gradient of the inner loss at z: LayerNorm backward of p = gamma^2 z^ + residual.
        if ONE_SUM:
            squares = z * z
            s_z, s_zz, s_gz, s_gzz, s_rz = tl.reduce(
                (z, squares, gamma2[:, None] * z, gamma2[:, None] * squares, residual * z), 0, add5
            )
            s_r = tl.sum(residual, 0)
            mean = s_z * (1.0 / F)
            rstd = 1.0 / tl.sqrt(tl.maximum(s_zz * (1.0 / F) - mean * mean, 0.0) + EPS)
            s_p = (s_gz - mean * sum_gamma2) * rstd + s_r
            s_pz = (s_gzz - 2 * mean * s_gz + mean * mean * sum_gamma2) * rstd * rstd + (s_rz - mean * s_r) * rstd
            normed = (z - mean[None, :]) * rstd[None, :]
            p = gamma2[:, None] * normed + residual
        else:
            mean = tl.sum(z, 0) * (1.0 / F)
            centred = z - mean[None, :]
            if BLOCK_F != F:
                centred = tl.where(in_f[:, None], centred, 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) * (1.0 / F) + EPS)
            normed = centred * rstd[None, :]
            p = gamma2[:, None] * normed + residual
            s_p, s_pz = tl.reduce((p, p * normed), 0, add2)
        g = (p - s_p[None, :] * (1.0 / F) - normed * (s_pz[None, :] * (1.0 / F))) * rstd[None, :]
        if BLOCK_F != F:
            g = tl.where(in_f[:, None], g, 0.0)
        if CARRIED:  # noqa: SIM102  (compiled away, which `and` is not)
            if i == 0:
                written = tl.load(carried_slots + row * K + r, mask=in_k, other=0) != 0
                old = tl.load(carried_gradient + pid * K * F + d[:, None] + r[None, :] * F, mask=across, other=0.0)
                g = tl.where(written[None, :], old, g)
        tl.store(gradient_out + place, g, mask=across)
        step = g * (-rate)[None, :]
        weight += dot(step, keys, PRECISION)
        bias += tl.sum(step, 1)
    tl.store(end_weight + pid * F * F + transposed, weight, mask=square)
    tl.store(end_bias + pid * F + d, bias, mask=in_f)


@jit(do_not_specialize=["heads", "mini_batches", "groups"])
def linear_read_kernel(
    q,
    k,
    lr,
    commit,
    tau,
    gradient,
    group_weight,
    group_bias,
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
    K: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Read every query and take the norm of every token's gradient; grid (rows * heads * groups,)."""
    group, pid = tl.program_id(0) % groups, (tl.program_id(0) // groups).to(tl.int64)
    row, head = pid // heads, pid % heads
    d, r = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_T)
    in_f = d < F
    t = (group * PER_GROUP * K + r).to(tl.int64)
    in_t = (r < PER_GROUP * K) & (t < mini_batches * K)
    tokens = in_t[:, None] & in_f[None, :]
    lr += pid * mini_batches * K
    commit += pid * mini_batches * K
    place = (pid * mini_batches * K + t[:, None]) * F + d[None, :]
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    queries = tl.load(q + t[:, None] * q_token + d[None, :], mask=tokens, other=0.0)
    keys = tl.load(k + t[:, None] * k_token + d[None, :], mask=tokens, other=0.0)
    g = tl.load(gradient + place, mask=tokens, other=0.0)
    tau_t = tl.load(tau + r % K)
    lr_s = tl.load(lr + t, mask=in_t, other=0.0)
    commit_s = tl.load(commit + t, mask=in_t, other=0.0)
    mini_batch = r // K
    earlier = mini_batch[None, :] < mini_batch[:, None]
    own = (mini_batch[None, :] == mini_batch[:, None]) & (r[None, :] <= r[:, None])
    scale = tl.where(earlier, commit_s[None, :], tl.where(own, tau_t[:, None] * lr_s[None, :], 0.0))
    scores = scale * (dot(queries, tl.trans(keys), PRECISION) + 1.0)
    state = pid * groups + group
    weight = tl.load(
        group_weight + state * F * F + d[:, None] * F + d[None, :], mask=in_f[:, None] & in_f[None, :], other=0.0
    )
    bias = tl.load(group_bias + state * F + d, mask=in_f, other=0.0)
    z = dot(queries, weight, PRECISION) + bias[None, :] - dot(scores, g, PRECISION)
    tl.store(z_out + place, z, mask=tokens)
    keys = keys.to(tl.float32)
    norm = tl.sqrt((tl.sum(keys * keys, 1) + 1.0) * tl.sum(g * g, 1))
    tl.store(norm_out + pid * mini_batches * K + t, norm, mask=in_t)
