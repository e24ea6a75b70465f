"""Which past token's write made a read, a logit or a later write what it is: exact, from one forward pass."""

from interp.logit_attribution import WriteAttribution, direct_logit_attribution
from interp.pooled_maps import PooledWriteMap, block_groups, pooled_write_map, span_groups
from interp.write_maps import (
    ReadContributions,
    inner_tracin,
    iterate_rows,
    read_contributions,
    write_read_matrix,
    write_write_matrix,
)

__all__ = [
    "PooledWriteMap",
    "ReadContributions",
    "WriteAttribution",
    "block_groups",
    "direct_logit_attribution",
    "inner_tracin",
    "iterate_rows",
    "pooled_write_map",
    "read_contributions",
    "span_groups",
    "write_read_matrix",
    "write_write_matrix",
]
