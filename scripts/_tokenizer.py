"""A byte-level BPE for natural text and hexadecimal needles."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

# A hexadecimal value behind `Key=` or `Value=` costs one token per digit, up to this many digits.
MAX_HEX_DIGITS = 8


def split_pattern() -> str:
    """The regular expression whose matches are the units inside which BPE may merge.

    ` Key=` and ` Value=` stay whole, digits stand alone everywhere, and up to `MAX_HEX_DIGITS` hexadecimal
    letters behind `Key=` or `Value=` stand alone too, so that the length of a needle in tokens is known.
    """
    behind = "|".join(f"[ye]={'[0-9a-f]' * done}" for done in range(MAX_HEX_DIGITS))
    return "|".join(
        [
            r" ?(?:Key|Value)=",
            rf"(?<={behind})[0-9a-f]",
            r"['’](?:s|d|m|t|ll|ve|re)(?!\p{L})",
            r" ?[\p{L}\p{M}]+",
            r"\p{N}",
            r" ?[^\s\p{L}\p{M}\p{N}]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )


def needle_texts(count: int, seed: int) -> Iterator[str]:
    """Short needle documents, only there to make the needle's words single tokens."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        key, value = (f"{int(part):08x}" for part in rng.integers(0, 2**32, 2))
        yield f"Define Key={key} Value={value}. Define Key={key} Value={value}. Query Key={key} Value={value}. "


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, model_max_length: int, needles: int = 20_000, seed: int = 0
) -> PreTrainedTokenizerFast:
    """Train a lossless byte-level BPE of exactly `vocab_size` entries.

    Encoding puts `<s>` in front of a text (`add_special_tokens=False` leaves it out); decoding gives back every
    byte. Raises ValueError when `vocab_size` cannot hold the 256 bytes and three special tokens, or when the
    texts are too small to fill it.
    """
    if vocab_size < 256 + 3:
        raise ValueError(f"vocab_size must be at least 259 (256 bytes and 3 special tokens), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split_pattern()), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def everything() -> Iterator[str]:
        yield from texts
        yield from needle_texts(needles, seed)

    tokenizer.train_from_iterator(everything(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} needs more text: only {tokenizer.get_vocab_size()} entries were found"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def read_texts(path: str | Path) -> dict[str, str]:
    """The UTF-8 text files of a folder (`*.txt`, sorted), or the one file, by name without suffix."""
    path = Path(path)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"data must be a text file or a folder of *.txt files, got {str(path)!r}")
    return {file.stem: file.read_text(encoding="utf-8") for file in files}
