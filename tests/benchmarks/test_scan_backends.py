"""The benchmark of the scan backends times each of them and compares with the reference."""

import json

from benchmarks.scan_backends import main

TINY = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --mini_batch_size 4 --tokens 8 --device cpu"


def test_each_backend_is_timed_against_the_reference(tmp_path, capsys):
    path = main([*TINY.split(), "--repeats", "3", "--warm_up", "1", "--output", str(tmp_path / "out.json")])
    record = json.loads(path.read_text())
    cases = {(row["layer_type"], row["step"], row["backend"]): row for row in record["rows"]}
    assert len(cases) == 2 * 2 * 2
    table = capsys.readouterr().out
    for (layer_type, step, backend), row in cases.items():
        assert row["tokens_per_second"] == 8 / row["median_seconds"]
        assert row["quartiles_seconds"][0] <= row["median_seconds"] <= row["quartiles_seconds"][1]
        assert (row["speed_up"] == 1.0) == (backend == "reference")
        assert f"{layer_type:<10}{step:<9}{backend:<11}" in table
    assert record["versions"].keys() == {"modeling_ttt", "python", "torch", "transformers"}


def test_without_the_reference_there_is_no_speed_up(tmp_path):
    options = ["--backends", "chunked", "--layer_types", "linear", "--repeats", "1", "--warm_up", "0"]
    path = main([*TINY.split(), *options, "--output", str(tmp_path / "out.json")])
    assert [row["speed_up"] for row in json.loads(path.read_text())["rows"]] == [None, None]
