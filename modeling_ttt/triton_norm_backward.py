"""Triton kernel of both inner nets: what the inner LayerNorm and the value get from the adjoint of p.

p = gamma * (gamma * n + beta - v + k) is what the LayerNorm of the inner loss carries back; n is the normalised z.
"""

try:
    from triton import jit
    from triton import language as tl
except ImportError:  # inside try: the Hub loader demands what a checkpoint's files import outside
    raise

__all__ = ["norm_back_kernel"]


@jit(do_not_specialize=["heads", "mini_batches", "groups"])
def norm_back_kernel(
    k,
    v,
    ln_weight,
    ln_bias,
    normed_in,
    d_p,
    d_v,
    d_ln_weight,
    d_ln_bias,
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
    PER_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Adjoints of v and, per group, of the LayerNorm's weight and bias; grid (rows * heads * groups,)."""
    group, pid = tl.program_id(0) % groups, (tl.program_id(0) // groups).to(tl.int64)
    row, head = pid // heads, pid % heads
    d, r = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_T)
    in_f = d < F
    columns = mini_batches * K
    t = (group * PER_GROUP * K + r).to(tl.int64)
    in_t = (r < PER_GROUP * K) & (t < columns)
    tokens = in_t[:, None] & in_f[None, :]
    place = (pid * columns + t[:, None]) * F + d[None, :]
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    gamma = tl.load(ln_weight + head * F + d, mask=in_f, other=0.0)
    beta = tl.load(ln_bias + head * F + d, mask=in_f, other=0.0)
    keys = tl.load(k + t[:, None] * k_token + d[None, :], mask=tokens, other=0.0).to(tl.float32)
    values = tl.load(v + t[:, None] * v_token + d[None, :], mask=tokens, other=0.0).to(tl.float32)
    normed = tl.load(normed_in + place, mask=tokens, other=0.0)
    dp = tl.load(d_p + place, mask=tokens, other=0.0)
    d_gamma = dp * (2 * gamma[None, :] * normed + beta[None, :] - values + keys)
    d_beta = gamma[None, :] * dp
    tl.store(d_v + place, -d_beta, mask=tokens)
    state = (pid * groups + group) * F + d
    tl.store(d_ln_weight + state, tl.sum(d_gamma, 0), mask=in_f)
    tl.store(d_ln_bias + state, tl.sum(d_beta, 0), mask=in_f)
