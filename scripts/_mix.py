"""Training windows: passages of books and needle documents, as a function of the seed and a window's number."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

HEX_DIGITS = "0123456789abcdef"
KEY_DIGITS = 8
MAX_VALUE_DIGITS = 8
FREE_KEY_DIGITS = 3

Stages = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class MixSettings:
    """What the windows are made of.

    The first `recall_windows` all hold nothing but repeated digits, because copying is learnt soon on its own and
    hardly at all beside language; over the next `curriculum_windows`, of both kinds, needles reach their full
    difficulty.
    """

    seed: int = 0
    needle_fraction: float = 0.375
    random_filler: float = 0.2
    answer_weight: float = 2.0
    recall_windows: int = 0
    curriculum_windows: int = 8192

    def __post_init__(self) -> None:
        for name in ("needle_fraction", "random_filler"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not self.answer_weight > 1:
            raise ValueError(f"answer_weight must be above 1, the weight of other tokens, got {self.answer_weight}")
        if self.recall_windows < 0:
            raise ValueError(f"recall_windows must be at least 0, got {self.recall_windows}")
        if self.curriculum_windows < 1:
            raise ValueError(f"curriculum_windows must be at least 1, got {self.curriculum_windows}")


@dataclass(frozen=True)
class NeedleWords:
    """Token ids of the needle's fixed pieces, of the filler's start and of the 16 digits."""

    define: tuple[int, ...]
    query: tuple[int, ...]
    value: tuple[int, ...]
    stop: tuple[int, ...]
    digits: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "NeedleWords":
        """Read the pieces off the tokenizer; raises ValueError where a digit is not one token of its own."""

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        digits = []
        for digit in HEX_DIGITS:
            prefix, whole = ids(" Value="), ids(f" Value={digit}")
            if len(whole) != len(prefix) + 1:
                raise ValueError(f"tokenizer must give a hexadecimal digit one token, {digit!r} behind Value= has not")
            digits.append(whole[-1])
        if len(set(digits)) < len(digits):
            raise ValueError(
                f"tokenizer must tell the {len(digits)} hexadecimal digits apart, got the tokens {digits}"
            )
        return cls(ids(" Define Key="), ids(" Query Key="), ids(" Value="), ids("."), tuple(digits))

    def define_ids(self, key: np.ndarray, value: np.ndarray) -> list[int]:
        """The tokens of ` Define Key=<key> Value=<value>.` for digits 0..15 of key and value."""
        return [*self.define, *self.spell(key), *self.value, *self.spell(value), *self.stop]

    def query_ids(self, key: np.ndarray) -> list[int]:
        """The tokens of ` Query Key=<key> Value=`; the answer follows."""
        return [*self.query, *self.spell(key), *self.value]

    def spell(self, digits: np.ndarray) -> list[int]:
        """Token ids of digits 0..15."""
        return [self.digits[digit] for digit in digits]


@dataclass(frozen=True)
class Difficulty:
    """How hard a needle window may be at one point of the curriculum, and the share of plain copying instead."""

    value_digits: int
    live_keys: int
    mean_gap: float
    copying: float

    @classmethod
    def at(cls, progress: float, length: int) -> "Difficulty":
        """From one digit, one key and short gaps at `progress` 0 to the full task at 1 (`length` in tokens)."""
        progress = min(max(progress, 0.0), 1.0)
        digits = 1 + int(progress * (MAX_VALUE_DIGITS - 1) + 1e-9)
        longest = length / 2
        gap = 16.0 * (longest / 16.0) ** progress
        return cls(digits, 1 + int(progress * 7 + 1e-9), gap, 0.75 * (1.0 - progress))


class WindowMix:
    """Windows of token ids with a loss weight per token.

    `stream` is int [N], documents joined as bos .. eos. A window is a function of the settings, its length, its
    number in the stage and the stages before, `(length, windows)` each: all of them move the curriculum, and those
    of the same length are gone on from. Book windows walk through the stream in a shuffled order, an epoch at a
    time, with a new offset per epoch. Raises ValueError when the stream is shorter than a window, and for a tokenizer
    that breaks up needles where the settings ask for some.
    """

    def __init__(self, stream: np.ndarray, tokenizer: PreTrainedTokenizerBase, settings: MixSettings):
        self.stream = stream
        self.settings = settings
        if settings.needle_fraction or settings.recall_windows:
            self.words = NeedleWords.of(tokenizer)
        self.bos = tokenizer.bos_token_id
        self.special = max(tokenizer.all_special_ids) + 1
        self.vocab_size = len(tokenizer)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, first: int, rows: int, length: int, earlier: Stages = ()) -> tuple[np.ndarray, np.ndarray]:
        """Windows `first .. first + rows - 1` of a stage: ids int64 and weights float32, both [rows, length]."""
        if length + 1 > len(self.stream):
            raise ValueError(f"length must be below the {len(self.stream)} tokens of the data, got {length}")
        windows = [self.window(first + row, length, earlier) for row in range(rows)]
        return np.stack([ids for ids, _ in windows]), np.stack([weights for _, weights in windows])

    def window(self, index: int, length: int, earlier: Stages = ()) -> tuple[np.ndarray, np.ndarray]:
        """One window: ids int64 [length] that begin with bos, and loss weights float32 [length]."""
        share, recall = self.settings.needle_fraction, self.settings.recall_windows
        before = sum(windows for _, windows in earlier)
        alike, alike_mixed = self._of_length(length, earlier)
        rng = np.random.default_rng([self.settings.seed, 2, length, alike + index])
        if before + index < recall:
            return self._copy_window(rng, length)
        mixed = alike_mixed + index - max(0, recall - before)
        needles = int(np.floor(mixed * share))
        if int(np.floor((mixed + 1) * share)) == needles:
            return self._book_window(mixed - needles, length)
        return self._needle_window(rng, length, (before + index - recall) / self.settings.curriculum_windows)

    def state_dict(self) -> dict:
        """Nothing: what a window holds follows from its number."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to do."""

    def _of_length(self, length: int, earlier: Stages) -> tuple[int, int]:
        """How many windows the stages of a length hold, and how many of them hold more than repeated digits."""
        before = alike = mixed = 0
        for other, windows in earlier:
            if other == length:
                alike += windows
                mixed += max(0, windows - max(0, self.settings.recall_windows - before))
            before += windows
        return alike, mixed

    def _book_window(self, index: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        body = length - 1
        per_epoch = len(self.stream) // body - 1
        if per_epoch < 1:
            per_epoch = 1
        epoch, place = divmod(index, per_epoch)
        order, offset = self._order(length, per_epoch, epoch)
        start = min(offset + int(order[place]) * body, len(self.stream) - body)
        ids = np.concatenate([[self.bos], self.stream[start : start + body]]).astype(np.int64)
        return ids, np.ones(length, np.float32)

    def _shuffled(self, length: int, per_epoch: int, epoch: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng([self.settings.seed, 1, length, epoch])
        return rng.permutation(per_epoch), int(rng.integers(0, length - 1))

    def _needle_window(self, rng: np.random.Generator, length: int, progress: float) -> tuple[np.ndarray, np.ndarray]:
        limits = Difficulty.at(progress, length)
        if rng.random() < limits.copying:
            return self._copy_window(rng, length)
        filler, filler_weight = self._filler(rng, length)
        gap = float(np.exp(rng.uniform(np.log(2.0), np.log(max(limits.mean_gap, 2.1)))))
        keys = int(rng.integers(1, limits.live_keys + 1))
        ids, weights = [self.bos], [1.0]
        live: list[tuple[np.ndarray, np.ndarray]] = []
        used = 0

        def add(pieces: list[int], weight: float) -> None:
            ids.extend(pieces)
            weights.extend([weight] * len(pieces))

        while len(ids) < length:
            if live and (len(live) >= keys or rng.random() < 0.6) and rng.random() < 0.85:
                key, value = live[int(rng.integers(len(live)))]
                self._ask(add, key, value)
                add(list(self.words.stop), 1.0)
            else:
                needle = self._needle(rng, limits.value_digits)
                live = [*live, needle][-keys:]
                add(self.words.define_ids(*needle), 1.0)
            wanted = min(int(rng.geometric(1.0 / (gap + 1.0))) - 1, length - len(ids))
            if wanted > 0:
                add(filler[used : used + wanted].tolist(), filler_weight)
                used += wanted
        return np.asarray(ids[:length], np.int64), np.asarray(weights[:length], np.float32)

    def _ask(self, add: Callable[[list[int], float], None], key: np.ndarray, value: np.ndarray) -> None:
        """A query and its answer; once `FREE_KEY_DIGITS` of a key are read the rest of it is an answer too."""
        ids, rest = self.words.query_ids(key), KEY_DIGITS - FREE_KEY_DIGITS
        end = len(ids) - len(self.words.value)
        add(ids[: end - rest], 1.0)
        add(ids[end - rest : end], self.settings.answer_weight)
        add(ids[end:], 1.0)
        add(self.words.spell(value), self.settings.answer_weight)

    def _copy_window(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Runs of 4 to 32 random digits, each two to four times in a row: what recall is first learnt on."""
        ids, weights = [self.bos], [1.0]
        while len(ids) < length:
            run = self.words.spell(rng.integers(0, 16, int(np.exp(rng.uniform(np.log(4), np.log(33))))))
            times = int(rng.integers(2, 5))
            ids.extend(run * times)
            weights.extend([1.0] * len(run) + [self.settings.answer_weight] * (len(run) * (times - 1)))
        return np.asarray(ids[:length], np.int64), np.asarray(weights[:length], np.float32)

    def _needle(self, rng: np.random.Generator, digits: int) -> tuple[np.ndarray, np.ndarray]:
        count = digits if rng.random() < 0.5 else int(rng.integers(1, digits + 1))
        return rng.integers(0, 16, KEY_DIGITS), rng.integers(0, 16, count)

    def _filler(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, float]:
        """A passage of the books, or ids drawn at random, which nothing can predict and which weigh nothing."""
        if rng.random() < self.settings.random_filler:
            return rng.integers(self.special, self.vocab_size, length), 0.0
        start = int(rng.integers(0, len(self.stream) - length))
        return self.stream[start : start + length].astype(np.int64), 1.0


def token_stream(texts: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Join documents as bos .. eos, in order: uint16 (or uint32 for a large vocabulary) [N]."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    parts = []
    for text in texts.values():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        parts.append(np.asarray([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], dtype))
    return np.concatenate(parts)


def cached_token_stream(texts: dict[str, str], tokenizer: PreTrainedTokenizerBase, folder: Path) -> np.ndarray:
    """`token_stream`, kept in `folder` under a name that changes with the texts and the tokenizer.

    A tokenizer without a fast backend cannot be told from another and is asked each time.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return token_stream(texts, tokenizer)
    digest = hashlib.sha256(backend.to_str().encode())
    for text in [tokenizer.bos_token, tokenizer.eos_token, *texts.values()]:
        digest.update(hashlib.sha256(text.encode()).digest())
    path = folder / f"tokens-{digest.hexdigest()[:16]}.safetensors"
    if path.is_file():
        return load_file(path)["ids"]
    ids = token_stream(texts, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file({"ids": ids}, beside)
    os.replace(beside, path)
    return ids
