"""Converts official TTT checkpoints (JAX or PyTorch) into a folder for Transformers, or one of ours to the JAX format.

python scripts/convert_checkpoint.py --source experiments/run/step_4800 --output converted --tokenizer <name>
python scripts/convert_checkpoint.py --source converted --output back --to jax
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from _shared import option, parse, prepare, run
from tqdm import tqdm

from interp.loading import local_copy
from modeling_ttt.convert_jax import Conversion, convert_checkpoint, export_jax


@dataclass
class ConvertArguments:
    """Convert a checkpoint, verify what was written, and say what was left out."""

    source: str = option(help="stream file, folder with one, PyTorch checkpoint, or Hub id of any of these")
    output: str = option(help="folder to write; it is whole or absent")
    to: Literal["transformers", "jax"] = option("transformers", "format to write")
    config: str | None = option(None, "preset (125m, 350m, 760m, 1b) or json file (default: what lies beside it)")
    tokenizer: str | None = option(None, "folder or Hub id of a tokenizer to put beside the weights")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = option(
        None, "dtype of the parameters (default: as they are)"
    )
    max_shard_gb: float = option(5.0, "largest file of weights, in 10^9 bytes")
    revision: str | None = option(None, "revision of a Hub id")
    overwrite: bool = option(False, "replace the output of an earlier conversion")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, convert, print."""
    arguments = parse(ConvertArguments, argv)
    if arguments.to == "jax" and arguments.tokenizer:
        raise ValueError(f"the JAX format has no tokenizer beside it, got {arguments.tokenizer!r}")
    prepare(seed=0)
    source = local_copy(arguments.source, revision=arguments.revision)
    common = {name: getattr(arguments, name) for name in ("config", "dtype", "overwrite")}
    with tqdm(unit="B", unit_scale=True, desc="parameters") as bar:
        if arguments.to == "jax":
            done = export_jax(source, arguments.output, progress=_shown_in(bar), **common)
        else:
            done = convert_checkpoint(
                source,
                arguments.output,
                tokenizer=arguments.tokenizer,
                max_shard_bytes=int(arguments.max_shard_gb * 10**9),
                progress=_shown_in(bar),
                **common,
            )
    summarise(done)


def summarise(done: Conversion) -> None:
    """Print what was written and what was not."""
    print(f"{done.output}: {done.parameters} parameters in {done.dtype}, {', '.join(done.files)}")
    if done.skipped:
        print(f"left out: {done.skipped} values of the training's state (step, moments)")
    if done.dropped:
        print(f"left out, no parameters: {', '.join(done.dropped)}")
    if done.fingerprint is not None:
        shown = ", ".join(f"{value:.4f}" for value in done.fingerprint["last_position"][:4])
        print(f"verified: names, shapes, finite numbers; first logits after a fixed text: {shown}")


def _shown_in(bar: tqdm) -> Callable[[int, int], None]:
    def show(count: int, total: int) -> None:
        bar.total = total
        bar.update(count - bar.n)

    return show


if __name__ == "__main__":
    run(main)
