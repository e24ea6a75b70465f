"""Trains the byte-level BPE tokenizer of the small checkpoints.

python scripts/train_tokenizer.py --data <folder of txt files> --output model_cards/ttt-linear-tiny
"""

from collections.abc import Sequence
from dataclasses import dataclass

from _shared import option, parse, run
from _tokenizer import read_texts, train_bpe


@dataclass
class TokenizerArguments:
    """Train a byte-level BPE tokenizer on text files and save it in the layout of the Hub."""

    data: str = option(help="text file, or folder of *.txt files")
    output: str = option(help="folder that receives tokenizer.json and tokenizer_config.json")
    vocab_size: int = option(4096, "entries, the three special tokens included")
    model_max_length: int = option(1_048_576, "longest text, in tokens, that encodes without a warning")
    needles: int = option(20_000, "needle documents added to the text")
    seed: int = option(0, "seed of the needle documents")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train, save."""
    arguments = parse(TokenizerArguments, argv)
    texts = read_texts(arguments.data)
    tokenizer = train_bpe(
        texts.values(),
        vocab_size=arguments.vocab_size,
        model_max_length=arguments.model_max_length,
        needles=arguments.needles,
        seed=arguments.seed,
    )
    tokenizer.save_pretrained(arguments.output)
    print(f"{len(tokenizer)} entries from {len(texts)} texts in {arguments.output}")


if __name__ == "__main__":
    run(main)
