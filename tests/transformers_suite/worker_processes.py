"""Run a function in several processes with a gloo process group, as the tensor-parallel and FSDP tests ask for it."""

import functools
import os
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_MODULES_OF_THE_WORKERS = ["torch", "transformers", "modeling_ttt", "tests.transformers_suite.upstream"]


def run_distributed(world_size):
    """A decorator: `function(rank, *args)` runs in `world_size` processes joined in one process group."""

    def decorate(function):
        @functools.wraps(function)
        def run(*args):
            with tempfile.TemporaryDirectory() as folder:
                rendezvous = (Path(folder) / "rendezvous").as_uri()
                _start_rank_processes(_in_process_group, (function, world_size, rendezvous, args), world_size)

        return run

    return decorate


def _in_process_group(rank, function, world_size, rendezvous, args):
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def _start_rank_processes(function, args, nprocs):
    # A fork server imports the heavy modules once, before any thread pool of torch has started.
    mp.get_context("forkserver").set_forkserver_preload(_MODULES_OF_THE_WORKERS)
    # Its processes compute on the CPU, also on a machine with one GPU for two ranks.
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        mp.start_processes(_with_one_thread, (function, args), nprocs=nprocs, start_method="forkserver")


def _with_one_thread(rank, function, args):
    torch.set_num_threads(1)
    function(rank, *args)


def _get_distributed_backend():
    return "gloo"


def _get_distributed_device_type():
    return "cpu"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    """Nothing to choose: every rank computes on the CPU."""
