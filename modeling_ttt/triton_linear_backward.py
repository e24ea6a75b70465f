"""Triton kernels of TTT-Linear, backward: what the reads need, the serial reverse chain, and the rest in parallel.

Notation as in `triton_linear`; adjoints begin with "d". With n the normalised z, J its LayerNorm Jacobian and U the
adjoint of a gradient g = J(p), the second-order terms of the LayerNorm are dp = J(U) and
dz = (dn - mean(dn) - n * (mean(dn * n) + mean(U * g))) / sigma, dn = gamma^2 dp - (U mean(p n) + p mean(U n)) / sigma.
z is not kept by the forward but taken again from the weights of the groups. Whatever does not depend on U comes
precomputed per token ("moments"), so that the chain takes one reduction per mini-batch.
"""

try:
    from triton import jit
    from triton import language as tl
except ImportError:  # inside try: the Hub loader demands what a checkpoint's files import outside
    raise

from .triton_math import add5, dot

__all__ = ["MOMENTS", "linear_back_chain_kernel", "linear_back_read_kernel", "linear_back_tokens_kernel"]

MOMENTS = tl.constexpr(6)
"""Rows of `moments` [N, 6, M * K]: 1 / sigma, mean p, mean p n, mean gamma^2 n, mean gamma^2 n^2, mean U_0 g."""


@jit(do_not_specialize=["heads", "mini_batches", "groups"])
def linear_back_read_kernel(
    q,
    k,
    v,
    lr,
    commit,
    tau,
    ln_weight,
    ln_bias,
    gradient,
    group_weight,
    group_bias,
    d_read,
    d_norm,
    d_rows,
    last,
    d_gradient,
    normed_out,
    moments,
    d_group_weight,
    d_group_bias,
    d_lr,
    d_commit,
    d_tau,
    heads,
    mini_batches,
    groups,
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
    K: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adjoints from the reads, the norms and the kept rows: of g, the groups' weights, lr, commit and tau; z again.

    Grid (rows * heads * groups,). `d_commit` holds only what later reads of the group add. Score tiles are [s, t].
    """
    group, pid = tl.program_id(0) % groups, (tl.program_id(0) // groups).to(tl.int64)
    row, head = pid // heads, pid % heads
    d, r = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_T)
    in_f = d < F
    t = (group * PER_GROUP * K + r).to(tl.int64)
    in_t = (r < PER_GROUP * K) & (t < mini_batches * K)
    tokens = in_t[:, None] & in_f[None, :]
    line = pid * mini_batches * K + t
    place = line[:, None] * F + d[None, :]
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    queries = tl.load(q + t[:, None] * q_token + d[None, :], mask=tokens, other=0.0)
    keys = tl.load(k + t[:, None] * k_token + d[None, :], mask=tokens, other=0.0)
    g = tl.load(gradient + place, mask=tokens, other=0.0)
    d_z = tl.load(d_read + place, mask=tokens, other=0.0)
    lr_s = tl.load(lr + line, mask=in_t, other=0.0)
    commit_s = tl.load(commit + line, mask=in_t, other=0.0)
    tau_t = tl.load(tau + r % K)
    mini_batch = r // K
    later = mini_batch[:, None] < mini_batch[None, :]
    own = (mini_batch[:, None] == mini_batch[None, :]) & (r[:, None] <= r[None, :])
    scores = dot(keys, tl.trans(queries), PRECISION) + 1.0
    scale = tl.where(later, commit_s[:, None], tl.where(own, tau_t[None, :] * lr_s[:, None], 0.0))
    d_g = -dot(scale * scores, d_z, PRECISION)
    weighed = dot(g, tl.trans(d_z), PRECISION) * scores
    weighed_own = tl.where(own, weighed, 0.0)
    tl.store(d_lr + line, -tl.sum(weighed_own * tau_t[None, :], 1), mask=in_t)
    tl.store(d_tau + line, -tl.sum(weighed_own * lr_s[:, None], 0), mask=in_t)
    tl.store(d_commit + line, -tl.sum(tl.where(later, weighed, 0.0), 1), mask=in_t)
    state = pid * groups + group
    d_weight = dot(tl.trans(queries), d_z, PRECISION)
    corner, square = state * F * F + d[:, None] * F + d[None, :], in_f[:, None] & in_f[None, :]
    tl.store(d_group_weight + corner, d_weight, mask=square)
    tl.store(d_group_bias + state * F + d, tl.sum(d_z, 0), mask=in_f)
    exact_keys = keys.to(tl.float32)
    if NORM:
        d_n = tl.load(d_norm + line, mask=in_t, other=0.0)
        g_squared = tl.sum(g * g, 1)
        ratio = tl.sqrt((tl.sum(exact_keys * exact_keys, 1) + 1.0) / tl.where(g_squared > 0, g_squared, 1.0))
        d_g += tl.where(g_squared > 0, d_n * ratio, 0.0)[:, None] * g
    if ROWS:
        kept = in_t & (t // K == tl.load(last + row))
        slot = pid * K + r % K
        d_g += tl.load(d_rows + slot[:, None] * F + d[None, :], mask=kept[:, None] & in_f[None, :], other=0.0)
    tl.store(d_gradient + place, d_g, mask=tokens)

    # z at the keys again: the weights of the mini-batch are those of the group less the commits between.
    weight = tl.load(group_weight + corner, mask=square, other=0.0)
    z = dot(keys, weight, PRECISION) + tl.load(group_bias + state * F + d, mask=in_f, other=0.0)[None, :]
    if PER_GROUP > 1:
        earlier = tl.where(mini_batch[None, :] < mini_batch[:, None], commit_s[None, :], 0.0)
        z -= dot(earlier * (dot(keys, tl.trans(keys), PRECISION) + 1.0), g, PRECISION)
    mean = tl.sum(z, 1) * (1.0 / F)
    centred = tl.where(in_f[None, :], z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) * (1.0 / F) + EPS)
    normed = centred * rstd[:, None]
    tl.store(normed_out + place, normed, mask=tokens)
    gamma = tl.load(ln_weight + head * F + d, mask=in_f, other=0.0)
    beta = tl.load(ln_bias + head * F + d, mask=in_f, other=0.0)
    values = tl.load(v + t[:, None] * v_token + d[None, :], mask=tokens, other=0.0).to(tl.float32)
    gamma2_normed = (gamma * gamma)[None, :] * normed
    p = gamma2_normed + gamma[None, :] * (beta[None, :] - values + exact_keys)
    columns = mini_batches * K
    moments += pid * MOMENTS * columns + t
    tl.store(moments, rstd, mask=in_t)
    tl.store(moments + columns, tl.sum(p, 1) * (1.0 / F), mask=in_t)
    tl.store(moments + 2 * columns, tl.sum(p * normed, 1) * (1.0 / F), mask=in_t)
    tl.store(moments + 3 * columns, tl.sum(gamma2_normed, 1) * (1.0 / F), mask=in_t)
    tl.store(moments + 4 * columns, tl.sum(gamma2_normed * normed, 1) * (1.0 / F), mask=in_t)
    tl.store(moments + 5 * columns, tl.sum(d_g * g, 1) * (1.0 / F), mask=in_t)


@jit(do_not_specialize=["heads", "mini_batches", "groups"])
def linear_back_chain_kernel(
    k,
    commit,
    ln_weight,
    reset,
    carried_slots,
    gradient,
    normed_in,
    moments,
    d_gradient,
    d_group_weight,
    d_group_bias,
    d_end_weight,
    d_end_bias,
    d_p,
    d_z_write,
    d_step,
    after_group,
    d_carried,
    d_start_weight,
    d_start_bias,
    d_initial_weight,
    d_initial_bias,
    heads,
    mini_batches,
    groups,
    k_row,
    k_head,
    k_token,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_GROUP: tl.constexpr,
    RESETS: tl.constexpr,
    CARRIED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the last mini-batch to the first: adjoints of p, of z, of the weights; grid (rows * heads,).

    `after_group` gets the adjoint of the weights at the end of every group, `d_step` that of a token's commit rate
    from its own commit. At carried slots the adjoint of g belongs to the carried gradient and goes no further.
    """
    pid = tl.program_id(0).to(tl.int64)
    row, head = pid // heads, pid % heads
    d, r = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K)
    in_f, in_k = d < F, r < K
    square, across = in_f[:, None] & in_f[None, :], in_f[:, None] & in_k[None, :]
    transposed = d[None, :] * F + d[:, None]
    gamma = tl.load(ln_weight + head * F + d, mask=in_f, other=0.0)
    gamma2 = gamma * gamma
    mean_gamma2 = tl.sum(gamma2, 0) * (1.0 / F)
    d_weight = tl.load(d_end_weight + pid * F * F + transposed, mask=square, other=0.0)  # transposed: [out, in]
    d_bias = tl.load(d_end_bias + pid * F + d, mask=in_f, other=0.0)
    columns = mini_batches * K
    k += row * k_row + head * k_head
    moments += pid * MOMENTS * columns
    for back in range(mini_batches):
        i = mini_batches - 1 - back
        if (i % PER_GROUP == PER_GROUP - 1) | (back == 0):
            state = pid * groups + i // PER_GROUP
            tl.store(after_group + state * F * F + transposed, d_weight, mask=square)
        t = (i * K + r).to(tl.int64)
        line = pid * columns + t
        place = d[:, None] + line[None, :] * F
        keys = tl.load(k + t[:, None] * k_token + d[None, :], mask=in_k[:, None] & in_f[None, :], other=0.0)
        normed = tl.load(normed_in + place, mask=across, other=0.0)
        g = tl.load(gradient + place, mask=across, other=0.0)
        u_0 = tl.load(d_gradient + place, mask=across, other=0.0)
        rate = tl.load(commit + line, mask=in_k, other=0.0)
        rstd = tl.load(moments + t, mask=in_k, other=0.0)
        mean_p = tl.load(moments + columns + t, mask=in_k, other=0.0)
        mean_pn = tl.load(moments + 2 * columns + t, mask=in_k, other=0.0)
        mean_gn = tl.load(moments + 3 * columns + t, mask=in_k, other=0.0)
        mean_gnn = tl.load(moments + 4 * columns + t, mask=in_k, other=0.0)
        mean_u0g = tl.load(moments + 5 * columns + t, mask=in_k, other=0.0)
        # The chain: adjoint of g with what the commit adds, then of z.
        y = dot(d_weight, tl.trans(keys), PRECISION) + d_bias[:, None]
        u = u_0 - rate[None, :] * y
        s_u, s_un, s_yg, s_gu, s_gun = tl.reduce(
            (u, u * normed, y * g, gamma2[:, None] * u, gamma2[:, None] * u * normed), 0, add5
        )
        mean_u, mean_un = s_u * (1.0 / F), s_un * (1.0 / F)
        mean_ug = mean_u0g - rate * (s_yg * (1.0 / F))
        mean_dn = rstd * (
            s_gu * (1.0 / F) - mean_u * mean_gamma2 - mean_un * mean_gn - mean_pn * mean_u - mean_un * mean_p
        )
        mean_dnn = rstd * (s_gun * (1.0 / F) - mean_u * mean_gn - mean_un * mean_gnn - 2 * mean_pn * mean_un)
        dp = (u - mean_u[None, :] - normed * mean_un[None, :]) * rstd[None, :]
        p = g + (mean_p[None, :] + normed * mean_pn[None, :]) * rstd[None, :]  # p / sigma, from g = J(p)
        dn = gamma2[:, None] * dp - u * (mean_pn * rstd)[None, :] - p * mean_un[None, :]
        dz = (dn - mean_dn[None, :] - normed * (mean_dnn + mean_ug)[None, :]) * rstd[None, :]
        if BLOCK_F != F:
            dp = tl.where(in_f[:, None], dp, 0.0)
            dz = tl.where(in_f[:, None], dz, 0.0)
        if CARRIED:  # noqa: SIM102  (compiled away, which `and` is not)
            if i == 0:
                written = tl.load(carried_slots + row * K + r, mask=in_k, other=0) != 0
                here = d[:, None] + (pid * K + r)[None, :] * F
                tl.store(d_carried + here, tl.where(written[None, :], u, 0.0), mask=across)
                dp = tl.where(written[None, :], 0.0, dp)
                dz = tl.where(written[None, :], 0.0, dz)
        tl.store(d_p + place, dp, mask=across)
        tl.store(d_z_write + place, dz, mask=across)
        tl.store(d_step + line, -s_yg, mask=in_k)
        d_weight += dot(dz, keys, PRECISION)
        d_bias += tl.sum(dz, 1)
        if i % PER_GROUP == 0:
            state = pid * groups + i // PER_GROUP
            d_weight += tl.load(d_group_weight + state * F * F + transposed, mask=square, other=0.0)
            d_bias += tl.load(d_group_bias + state * F + d, mask=in_f, other=0.0)
        if RESETS:  # noqa: SIM102  (compiled away, which `and` is not)
            if tl.load(reset + row * mini_batches + i) != 0:
                there = d_initial_weight + pid * F * F + transposed
                tl.store(there, tl.load(there, mask=square, other=0.0) + d_weight, mask=square)
                there_bias = d_initial_bias + pid * F + d
                tl.store(there_bias, tl.load(there_bias, mask=in_f, other=0.0) + d_bias, mask=in_f)
                d_weight = tl.zeros([BLOCK_F, BLOCK_F], dtype=tl.float32)
                d_bias = tl.zeros([BLOCK_F], dtype=tl.float32)
                tl.debug_barrier()  # the sums above are read again by whichever thread comes next
    tl.store(d_start_weight + pid * F * F + transposed, d_weight, mask=square)
    tl.store(d_start_bias + pid * F + d, d_bias, mask=in_f)


@jit(do_not_specialize=["heads", "mini_batches", "groups"])
def linear_back_tokens_kernel(
    q,
    k,
    lr,
    commit,
    tau,
    ln_weight,
    gradient,
    group_weight,
    after_group,
    d_read,
    d_norm,
    d_p,
    d_z_write,
    d_q,
    d_k,
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
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adjoints of q and k; grid (rows * heads * groups,)."""
    group, pid = tl.program_id(0) % groups, (tl.program_id(0) // groups).to(tl.int64)
    row, head = pid // heads, pid % heads
    d, r = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_T)
    in_f = d < F
    t = (group * PER_GROUP * K + r).to(tl.int64)
    in_t = (r < PER_GROUP * K) & (t < mini_batches * K)
    tokens = in_t[:, None] & in_f[None, :]
    line = pid * mini_batches * K + t
    place = line[:, None] * F + d[None, :]
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    keys = tl.load(k + t[:, None] * k_token + d[None, :], mask=tokens, other=0.0)
    g = tl.load(gradient + place, mask=tokens, other=0.0)
    d_z = tl.load(d_read + place, mask=tokens, other=0.0)
    lr_s = tl.load(lr + line, mask=in_t, other=0.0)
    commit_s = tl.load(commit + line, mask=in_t, other=0.0)
    tau_t = tl.load(tau + r % K)
    mini_batch = r // K
    earlier = mini_batch[None, :] < mini_batch[:, None]
    later = mini_batch[:, None] < mini_batch[None, :]
    same = mini_batch[:, None] == mini_batch[None, :]
    state = (pid * groups + group) * F * F
    square = in_f[:, None] & in_f[None, :]
    weight_t = tl.load(group_weight + state + d[None, :] * F + d[:, None], mask=square, other=0.0)

    own = same & (r[None, :] <= r[:, None])
    scale = tl.where(earlier, commit_s[None, :], tl.where(own, tau_t[:, None] * lr_s[None, :], 0.0))
    scores = scale * dot(d_z, tl.trans(g), PRECISION)
    tl.store(d_q + place, dot(d_z, weight_t, PRECISION) - dot(scores, keys, PRECISION), mask=tokens)

    dz = tl.load(d_z_write + place, mask=tokens, other=0.0)
    dk = dot(dz, weight_t, PRECISION)
    if PER_GROUP > 1:
        writes = tl.where(earlier, dot(dz, tl.trans(g), PRECISION) * commit_s[None, :], 0.0)
        writes += tl.where(later, dot(g, tl.trans(dz), PRECISION) * commit_s[:, None], 0.0)
        dk -= dot(writes, keys, PRECISION)
    queries = tl.load(q + t[:, None] * q_token + d[None, :], mask=tokens, other=0.0)
    own = same & (r[:, None] <= r[None, :])
    scale = tl.where(later, commit_s[:, None], tl.where(own, tau_t[None, :] * lr_s[:, None], 0.0))
    scores = scale * dot(g, tl.trans(d_z), PRECISION)
    dk -= dot(scores, queries, PRECISION)
    d_end_t = tl.load(after_group + state + d[None, :] * F + d[:, None], mask=square, other=0.0)
    dk -= commit_s[:, None] * dot(g, d_end_t, PRECISION)
    gamma = tl.load(ln_weight + head * F + d, mask=in_f, other=0.0)
    dk += gamma[None, :] * tl.load(d_p + place, mask=tokens, other=0.0)
    if NORM:
        d_n = tl.load(d_norm + line, mask=in_t, other=0.0)
        keys = keys.to(tl.float32)
        dk += (d_n * tl.sqrt(tl.sum(g * g, 1) / (tl.sum(keys * keys, 1) + 1.0)))[:, None] * keys
    tl.store(d_k + place, dk, mask=tokens)
