"""A damaged, foreign or hostile checkpoint ends in an error that names it, and nothing is left behind."""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_ttt.convert_jax import convert_checkpoint
from modeling_ttt.convert_metadata import read_model_config

from .helpers import tiny
from .jax_streams import packed, read_records, write_records
from .test_convert_jax import GOLDENS, MAMBA, PARAMS, as_leaves, jax_config

ROOT = GOLDENS.parents[3]


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint of the JAX code to break, with its configuration."""
    source = tiny(dtype=torch.float32, num_hidden_layers=1, **MAMBA)
    leaves = as_leaves(source)
    write_records(tmp_path / "jax" / "streaming_params", leaves)
    (tmp_path / "jax" / "model_config.json").write_text(json.dumps(jax_config(source)))
    return tmp_path / "jax"


def refused(folder, message):
    """The conversion fails with ValueError of this message, and leaves nothing."""
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder, folder.parent / "out")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


# -------------------------------------------------------------------- damaged files


def test_a_file_cut_off_anywhere_is_refused(folder):
    file = folder / "streaming_params"
    whole = file.read_bytes()
    ends = {0}
    for key, value in read_records(file).items():
        ends.add(max(ends) + len(msgpack.packb((list(key), value))))
    assert max(ends) == len(whole)
    for cut in [*range(0, 200), *range(200, len(whole), 997), len(whole) - 1]:
        file.write_bytes(whole[:cut])
        refused(folder, "missing names" if cut in ends - {0} else "streaming_params: leaf")


def test_a_flipped_bit_gives_an_error_or_another_number_and_never_anything_else(folder):
    """Numbers have no checksum in this format; everything around them must hold."""
    file, out = folder / "streaming_params", folder.parent / "out"
    whole = bytearray(file.read_bytes())
    rng, refusals = np.random.default_rng(0), 0
    headers = [i for i in range(len(whole)) if whole[i : i + 1].isalnum() and rng.random() < 0.01]
    for place in [*range(0, 120), *headers[:60]]:
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        try:
            convert_checkpoint(folder, out)
            shutil.rmtree(out)
        except ValueError as error:
            assert "streaming_params" in str(error) or str(out.parent) in str(error)
            refusals += 1
        assert [path.name for path in folder.parent.iterdir()] == ["jax"]
    assert refusals > 40


def test_announced_sizes_that_do_not_exist_take_no_memory(folder):
    file = folder / "streaming_params"
    for hostile in (
        b"\xdd\xff\xff\xff\xff",  # an array of four billion
        b"\x92\x91\xdb\xff\xff\xff\xff",  # a name of four gigabytes
        b"\x92\x91\xa5model\xc6\xff\xff\xff\xff",  # a value of four gigabytes
        b"\x92\x91\xa5model\xc4\x04\xc9\xff\xff\xff",
        b"\x81" * 100_000,  # maps in maps
        b"\x92" * 100_000,
    ):
        file.write_bytes(hostile)
        refused(folder, "streaming_params: leaf")


def test_names_shapes_and_values_are_checked_and_all_are_listed(folder):
    file = folder / "streaming_params"
    leaves = read_records(file)
    first = ("model", "h", "0", "seq_modeling_block")
    wq = (*first, "wq", "kernel")
    write_records(file, {**leaves, ("model", "rope"): packed(torch.ones(2)), ("extra",): packed(torch.ones(1))})
    refused(folder, "unknown names: 'extra', 'model/rope'")
    missing = {key: value for key, value in leaves.items() if key not in (wq, (*first, "ttt_norm/scale"))}
    write_records(file, missing)
    refused(folder, "missing names: .*seq_modeling_block/ttt_norm/scale.*, .*seq_modeling_block/wq/kernel")
    write_records(file, {**leaves, wq: packed(torch.ones(32, 31))})
    refused(folder, r"wrong shapes .*'model/h/0/seq_modeling_block/wq/kernel' \[31, 32\] instead of \[32, 32\]")
    write_records(file, {**leaves, wq: packed(torch.full((32, 32), float("nan")))})
    refused(folder, "leaf .*q_proj.* holds 1024 values that are infinite or not a number")
    write_records(file, {**leaves, wq: msgpack.packb("text")})
    refused(folder, "expected an array")
    integers = msgpack.ExtType(1, msgpack.packb(([32, 32], "int32", b"\0" * 4096)))
    write_records(file, {**leaves, wq: msgpack.packb(integers)})
    refused(folder, "dtype must be one of .*, got 'int32'")
    short = msgpack.ExtType(1, msgpack.packb(([32, 32], "float32", b"\0" * 4092)))
    write_records(file, {**leaves, wq: msgpack.packb(short)})
    refused(folder, r"its shape \[32, 32\] of torch.float32 needs 4096 bytes, it has 4092")


@pytest.mark.parametrize("shape", [[0], [0, 32], [2**40, 0], [0, 2**40, 2**40], [2**64 - 1, 0]], ids=str)
def test_an_array_without_numbers_may_have_any_shape_and_is_refused(folder, shape):
    file = folder / "streaming_params"
    leaves = read_records(file)
    empty = msgpack.packb(msgpack.ExtType(1, msgpack.packb((shape, "float32", b""))))
    for key in (("model", "wte", "embedding"), ("model", "h", "0", "seq_modeling_block", "ttt_dense_0")):
        write_records(file, {**leaves, key: empty})
        refused(folder, rf"leaf '{'/'.join(key)}': its shape \[.*0.*\] holds no numbers")


def test_a_name_twice_is_refused(folder):
    file = folder / "streaming_params"
    file.write_bytes(file.read_bytes() * 2)
    refused(folder, "is there twice")


def test_a_train_state_without_parameters_is_refused(folder):
    write_records(folder / "streaming_params", {("step",): msgpack.packb(1), ("opt_state", "mu"): b"\xc0"})
    refused(folder, "holds no parameters, only 2 leaves of an optimizer's state")


def test_configurations_that_do_not_fit_are_refused(folder):
    good = json.loads((folder / "model_config.json").read_text())
    for changes, message in (
        ({"hidden_size": 64}, "hidden_size is 64 there, 32 here"),
        ({"seq_modeling_block": "self_attention"}, "seq_modeling_block must be one of"),
        ({"seq_modeling_block": "ttt_mlp"}, "ttt_layer_type is 'mlp' there, 'linear' here"),
        ({"rms_norm_eps": "tiny"}, "the model configuration is refused"),
        ({"rms_norm_eps": float("inf")}, "(?s)the model configuration is refused: .*rms_norm_eps must be positive"),
        ({"rope_theta": float("inf")}, "(?s)the model configuration is refused: .*rope_theta must be positive"),
        ({"rope_theta": 2**1200}, "(?s)the model configuration is refused: .*rope_theta must be positive"),
        ({"rope_theta": "10000"}, "the model configuration is refused"),
        ({"ttt_base_lr": None}, r"the model configuration lacks \['ttt_base_lr'\]"),
    ):
        (folder / "model_config.json").write_text(json.dumps({**good, **changes}))
        refused(folder, message)
    (folder / "model_config.json").write_text(json.dumps({k: v for k, v in good.items() if k != "rope_theta"}))
    refused(folder, r"the model configuration lacks \['rope_theta'\]")
    (folder / "model_config.json").write_text("[" * 100_000)
    refused(folder, "cannot be read as JSON")


# -------------------------------------------------------------------- hostile pickles


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, print], ids=lambda f: f.__name__)
def test_metadata_that_names_anything_else_is_refused_unrun(function, tmp_path):
    shutil.copytree(PARAMS["linear"], tmp_path / "jax")
    flag = tmp_path / "flag"
    argument = f"open({str(flag)!r}, 'w')" if function in (eval, exec) else f"touch {flag}"
    arguments = (argument, "x") if function is getattr else (argument,)
    payload = {"model_config": {"x": Hostile(function, *arguments)}}
    (tmp_path / "jax" / "metadata.pkl").write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match=r"metadata\.pkl: not the metadata of a TTT model: it names .*allowed are"):
        convert_checkpoint(tmp_path / "jax", tmp_path / "out")
    assert not flag.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["jax"]


def test_metadata_of_the_official_code_is_read(tmp_path):
    found = read_model_config(PARAMS["mlp"] / "metadata.pkl")
    want = {"seq_modeling_block": "ttt_mlp", "ttt_base_lr": 0.1, "mini_batch_size": 16, "conv_width": 4}
    assert want.items() <= found.items()


def test_damaged_metadata_is_refused(tmp_path):
    whole = (PARAMS["linear"] / "metadata.pkl").read_bytes()
    file = tmp_path / "metadata.pkl"
    huge_memo = b"\x80\x04N" + b"r" + struct.pack("<I", 2**31 - 1) + b"."
    nested = b"\x80\x04)" + b"\x85" * 50_000 + b"."
    for content in (
        b"",
        whole[:-1],
        whole[:500],
        huge_memo,
        nested,
        pickle.dumps([1]),
        pickle.dumps({"a": 1}),
        b"x" * 2**21,
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"metadata\.pkl"):
            read_model_config(file)
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(whole)
        broken[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        try:
            assert isinstance(read_model_config(file), dict)
        except ValueError as error:
            assert "metadata.pkl" in str(error)


# -------------------------------------------------------------------- killed and out of room

SLOWED = """
import sys, time
from modeling_ttt.convert_jax import convert_checkpoint
def slow(done, total):
    print(done, flush=True)
    time.sleep(0.05)
convert_checkpoint(sys.argv[1], sys.argv[2], overwrite=True, progress=slow)
"""


def test_killed_in_the_middle_leaves_the_old_output_and_the_next_run_cleans_up(tmp_path):
    out = tmp_path / "out"
    convert_checkpoint(PARAMS["linear"], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWED, PARAMS["mlp"], out], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    for _ in range(5):
        assert int(process.stdout.readline()) > 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 2, "what the killed process wrote lies beside"
    convert_checkpoint(PARAMS["mlp"], out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert AutoModelForCausalLM.from_pretrained(out).config.ttt_layer_type == "mlp"


SWAP_CUT = """
import os, sys
from modeling_ttt import convert_output
from modeling_ttt.convert_jax import convert_checkpoint
real, calls = os.replace, []
def replace(*places):
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    calls.append(places)
    real(*places)
convert_output.os.replace = replace
convert_checkpoint(sys.argv[1], sys.argv[2], overwrite=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_killed_while_folders_change_places_loses_neither(tmp_path):
    """Before the first renaming, between the two, and when all is done: the next run finds an output and no rest."""
    for renamings, kind in ((0, "linear"), (1, "linear"), (2, "mlp")):
        out = tmp_path / str(renamings) / "out"
        convert_checkpoint(PARAMS["linear"], out)
        command = [sys.executable, "-c", SWAP_CUT, PARAMS["mlp"], out, str(renamings)]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
        with pytest.raises(ValueError, match="is there already"):
            convert_checkpoint(PARAMS["linear"], out)
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert AutoModelForCausalLM.from_pretrained(out).config.ttt_layer_type == kind


def test_a_conversion_that_runs_is_left_alone_by_another(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWED, PARAMS["mlp"], out], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    process.stdout.readline()
    convert_checkpoint(PARAMS["linear"], tmp_path / "out2")
    beside = [path for path in tmp_path.iterdir() if path.name.startswith(".out.part")]
    assert len(beside) == 1
    process.stdout.read()
    assert process.wait() == 0
    process.stdout.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out2"]


def test_a_failing_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modeling_ttt.convert_jax.write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(PARAMS["linear"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------- memory

# VmHWM: `ru_maxrss` of a child begins with what its parent had.
MEASURED = """
import sys
from modeling_ttt.convert_jax import convert_checkpoint
convert_checkpoint(sys.argv[1], sys.argv[2])
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024)
"""


@pytest.mark.slow
def test_a_stream_of_one_gibibyte_needs_little_more_than_its_largest_leaf(tmp_path):
    """1.6 x the largest leaf + 300 MB at most, interpreter and libraries included."""
    from modeling_ttt import TTTConfig, TTTForCausalLM
    from modeling_ttt.convert_names import to_jax

    config = TTTConfig(vocab_size=65536, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, **MAMBA)
    with torch.device("meta"):
        model = TTTForCausalLM(config)
    file = tmp_path / "jax" / "streaming_params"
    file.parent.mkdir()
    largest = 0
    with file.open("wb") as target:
        for name, value in model.state_dict().items():
            if name != "lm_head.weight":
                key, turn = to_jax(name)
                leaf = torch.randn(turn(value).shape) * 0.02
                largest = max(largest, leaf.nbytes)
                target.write(msgpack.packb((list(key), packed(leaf))))
    assert file.stat().st_size > 2**30
    (tmp_path / "jax" / "model_config.json").write_text(json.dumps(jax_config(model)))
    runs = [tmp_path / "jax", PARAMS["linear"]]
    peaks = []
    for number, source in enumerate(runs):
        out = subprocess.run(
            [sys.executable, "-c", MEASURED, source, tmp_path / f"out{number}"],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        peaks.append(int(out.stdout.split()[-1]))
    total, floor = peaks
    shown = [round(value / 2**20) for value in (total, floor, largest)]
    print("\npeak {} MiB, of a tiny checkpoint {} MiB; largest leaf {} MiB".format(*shown))
    assert total < 1.6 * largest + 300e6
    assert len(load_file(tmp_path / "out1" / "model.safetensors")) > 10


def test_progress_counts_every_byte(tmp_path):
    seen = []
    convert_checkpoint(PARAMS["linear"], tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*nowhere.* does not exist"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no checkpoint: none of streaming_params"):
        convert_checkpoint(tmp_path / "empty", tmp_path / "out")
    for option, message in (({"dtype": "int8"}, "dtype must be one of"), ({"max_shard_bytes": 0}, "max_shard_bytes")):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(PARAMS["linear"], tmp_path / "out", **option)
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        convert_checkpoint(PARAMS["linear"], tmp_path / "out", tokenizer=Path(tmp_path / "empty"))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
