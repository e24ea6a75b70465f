"""The benchmark of the Triton backend without a GPU: it says that it needs one."""

import pytest
import torch

from benchmarks.triton_scan import CELLS, main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_benchmark_says_so():
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        main([])


def test_sizes_are_whole_mini_batches():
    assert all(tokens % 16 == 0 for _, _, tokens in CELLS)
