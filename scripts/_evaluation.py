"""What a checkpoint has learnt: nats per byte against n-gram baselines, loss by position, needles answered."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from _mix import KEY_DIGITS, NeedleWords
from _step import token_losses
from torch import nn
from transformers import PreTrainedTokenizerBase

Tick = Callable[[int], object]
"""Is told how many tokens were read."""


def no_tick(tokens: int) -> None:
    """Nobody watches."""


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens of a tokenizer are strings of bytes, written one character per byte."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in str(backend.decoder)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Bytes of text each token of a byte-level tokenizer stands for: int64 [V], 0 for special tokens.

    Raises ValueError for another kind of tokenizer.
    """
    if not is_byte_level(tokenizer):
        raise ValueError(f"tokenizer must be a byte-level one to count bytes, got a {type(tokenizer).__name__}")
    sizes = np.asarray([len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    sizes[tokenizer.all_special_ids] = 0
    return sizes


@torch.no_grad()
def window_losses(
    model: nn.Module, ids: np.ndarray, *, bos: int, length: int, rows: int = 4, tick: Tick = no_tick
) -> tuple[np.ndarray, np.ndarray]:
    """Surprisal in nats of `ids` [N], read in windows of bos and `length` - 1 tokens: both [windows, length - 1].

    Returns the losses (float64) and the tokens they belong to. A rest that fills no window is left out; raises
    ValueError when not even one window is filled.
    """
    windows = cut_windows(ids, length)
    return _losses(model, windows, length - 1, bos=bos, rows=rows, tick=tick), windows


def cut_windows(ids: np.ndarray, length: int) -> np.ndarray:
    """The whole windows of `ids` [N], without the bos in front of them: int64 [windows, length - 1]."""
    count = len(ids) // (length - 1)
    if count == 0:
        raise ValueError(f"length must be at most the {len(ids) + 1} tokens at hand, got {length}")
    return np.asarray(ids[: count * (length - 1)]).astype(np.int64).reshape(count, length - 1)


@torch.no_grad()
def loss_by_context(
    model: nn.Module,
    ids: np.ndarray,
    *,
    bos: int,
    length: int,
    most: int | None = None,
    rows: int = 2,
    tick: Tick = no_tick,
) -> list[dict[str, float | None]]:
    """What the same tokens cost behind more and more text, which the loss by position, of other tokens each, hides.

    The last sixteenth of every window of `length` tokens, of at most `most` windows spread over `ids`, is read in its
    last `length` / 8, / 4, / 2 and all tokens, bos in front. Rows: "length" of what is read, mean "loss" in nats per
    token, "difference" from the loss at the full length, the standard "error" of that mean over windows (None for one
    window), "windows", "tokens" counted in each. ValueError for fewer than 32 tokens.
    """
    if length < 32:
        raise ValueError(f"length must be at least 32 for a loss by context, got {length}")
    windows, counted = cut_windows(ids, length), length // 16
    if most is not None and most < len(windows):
        windows = windows[np.linspace(0, len(windows) - 1, most).round().astype(int)]
    lengths = (length // 8, length // 4, length // 2, length)
    found = {
        part: _losses(model, windows[:, -(part - 1) :], counted, bos=bos, rows=rows, tick=tick) for part in lengths
    }
    return [
        {
            "length": part,
            "loss": float(losses.mean()),
            **_paired(losses.mean(1) - found[length].mean(1)),
            "windows": len(windows),
            "tokens": counted,
        }
        for part, losses in found.items()
    ]


def _paired(differences: np.ndarray) -> dict[str, float | None]:
    error = float(differences.std(ddof=1) / len(differences) ** 0.5) if len(differences) > 1 else None
    return {"difference": float(differences.mean()), "error": error}


def _losses(model: nn.Module, windows: np.ndarray, last: int, *, bos: int, rows: int, tick: Tick) -> np.ndarray:
    """Surprisal in nats of the `last` tokens of windows [windows, T] behind bos: float64 [windows, last]."""
    device = next(model.parameters()).device
    model.eval()
    losses = []
    for start in range(0, len(windows), rows):
        part = torch.from_numpy(windows[start : start + rows])
        part = torch.cat([torch.full((len(part), 1), bos), part], 1).to(device)
        logits = model(input_ids=part, use_cache=False, logits_to_keep=last + 1).logits
        losses.append(token_losses(logits, part[:, -last - 1 :]).double().cpu().numpy())
        tick(part.numel())
    return np.concatenate(losses)


def nats_per_byte(losses: np.ndarray, tokens: np.ndarray, sizes: np.ndarray) -> float:
    """Total surprisal over total bytes, special tokens left out of both."""
    ordinary = sizes[tokens] > 0
    return float(losses[ordinary].sum() / sizes[tokens].sum())


class NgramBaseline:
    """Witten-Bell interpolated n-gram model over token ids: order 1 (unigram, add one) to 3 (trigram).

    `probabilities` of an order mixes its counts with the next lower order, each context weighing its own count
    against the number of different tokens seen behind it.
    """

    def __init__(self, stream: np.ndarray, vocab_size: int, order: int):
        if order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {order}")
        self.vocab_size = vocab_size
        ids = stream.astype(np.int64)
        self.unigram = np.bincount(ids, minlength=vocab_size) + 1.0
        self.unigram /= self.unigram.sum()
        self.tables = [self._count(ids, size) for size in range(2, order + 1)]

    def losses(self, windows: np.ndarray, bos: int) -> np.ndarray:
        """Surprisal in nats of each token [windows, length], bos standing in front of every window."""
        padded = np.concatenate([np.full((len(windows), 2), bos), windows], 1).astype(np.int64)
        probability = self.unigram[windows]
        for size, (grams, counts, contexts, totals, kinds) in enumerate(self.tables, start=2):
            context = np.zeros_like(windows)
            for back in range(size - 1, 0, -1):
                context = context * self.vocab_size + padded[:, 2 - back : padded.shape[1] - back]
            seen = _look_up(contexts, totals, context)
            different = _look_up(contexts, kinds, context)
            joint = _look_up(grams, counts, context * self.vocab_size + windows)
            weight = np.maximum(seen + different, 1)
            mixed = (joint + different * probability) / weight
            probability = np.where(seen > 0, mixed, probability)
        return -np.log(probability)

    def _count(self, ids: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
        code = np.zeros(len(ids) - size + 1, np.int64)
        for offset in range(size):
            code = code * self.vocab_size + ids[offset : offset + len(code)]
        grams, counts = np.unique(code, return_counts=True)
        contexts, first = np.unique(grams // self.vocab_size, return_index=True)
        kinds = np.diff(np.append(first, len(grams)))
        return grams, counts, contexts, np.add.reduceat(counts, first), kinds


def needle_windows(
    tokenizer: PreTrainedTokenizerBase,
    stream: np.ndarray,
    *,
    value_digits: int,
    distance: int,
    count: int,
    seed: int,
    before: int = 0,
) -> np.ndarray:
    """`count` documents text ` Define Key=.. Value=..` text ` Query Key=.. Value=..` as ids int64 [count, T].

    `before` tokens of a passage of `stream` stand in front of the definition and `distance` between it and the
    query; the last `value_digits` tokens are the answer. Raises ValueError where `stream` is shorter than that.
    """
    if before + distance >= len(stream):
        raise ValueError(f"distance must be below the {len(stream) - before} tokens at hand, got {distance}")
    words, rng = NeedleWords.of(tokenizer), np.random.default_rng([seed, value_digits, distance])
    documents = []
    for _ in range(count):
        key, value = rng.integers(0, 16, KEY_DIGITS), rng.integers(0, 16, value_digits)
        start = int(rng.integers(0, len(stream) - before - distance))
        text = stream[start : start + before + distance].astype(np.int64).tolist()
        document = [tokenizer.bos_token_id, *text[:before], *words.define_ids(key, value), *text[before:]]
        documents.append([*document, *words.query_ids(key), *words.spell(value)])
    return np.asarray(documents, np.int64)


def depth_windows(
    tokenizer: PreTrainedTokenizerBase,
    stream: np.ndarray,
    *,
    value_digits: int,
    length: int,
    depth: float,
    count: int,
    seed: int,
) -> np.ndarray:
    """Needle documents of `length` tokens whose definition stands behind the share `depth` of their text.

    Returns ids int64 [count, length]. Raises ValueError when `depth` is no share or `length` leaves no text.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must lie between 0 and 1, got {depth}")
    bare = needle_windows(tokenizer, stream, value_digits=value_digits, distance=0, count=1, seed=seed).shape[1]
    if length <= bare:
        raise ValueError(f"length must be above the {bare} tokens of the needle itself, got {length}")
    before = round(depth * (length - bare))
    return needle_windows(
        tokenizer,
        stream,
        value_digits=value_digits,
        distance=length - bare - before,
        count=count,
        seed=seed,
        before=before,
    )


@torch.no_grad()
def needle_accuracy(
    model: nn.Module, windows: Iterable[np.ndarray], value_digits: int, rows: int = 8, tick: Tick = no_tick
) -> dict[str, float]:
    """Share of answers that greedy decoding gets wholly right ("exact"), and share of right digits ("digits").

    `windows` as from `needle_windows`. A whole answer counts when every digit is the most likely token behind the
    true ones before it, which is when greedy decoding writes it.
    """
    device = next(model.parameters()).device
    model.eval()
    right = []
    ids = torch.from_numpy(np.asarray(windows))
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows].to(device)
        logits = model(input_ids=part, use_cache=False, logits_to_keep=value_digits + 1).logits[:, :-1]
        right.append((logits.argmax(-1) == part[:, -value_digits:]).cpu())
        tick(part.numel())
    answers = torch.cat(right)
    return {"exact": float(answers.all(1).double().mean()), "digits": float(answers.double().mean())}


class Validation:
    """Measures a model on held-out ids: nats per token and per byte, and needles of 1, 4 and 8 digits answered.

    Windows have `length` tokens, fewer where the text is shorter; 16 needle documents per number of digits have a
    quarter of that between definition and query. Bytes are counted for byte-level tokenizers only, and needles asked
    only if `needles`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, held_out: np.ndarray, length: int, *, needles: bool = True):
        self.held_out, self.length, self.bos = held_out, min(length, len(held_out)), tokenizer.bos_token_id
        self.sizes = token_bytes(tokenizer) if is_byte_level(tokenizer) else None
        self.needles = {
            digits: needle_windows(
                tokenizer, held_out, value_digits=digits, distance=self.length // 4, count=16, seed=0
            )
            for digits in ((1, 4, 8) if needles else ())
        }

    def __call__(self, model: nn.Module) -> dict[str, float]:
        losses, tokens = window_losses(model, self.held_out, bos=self.bos, length=self.length)
        row = {"validation_loss": float(losses.mean())}
        if self.sizes is not None:
            row["validation_nats_per_byte"] = nats_per_byte(losses, tokens, self.sizes)
        for digits, windows in self.needles.items():
            found = needle_accuracy(model, windows, digits)
            row |= {f"needle_{digits}_{name}": value for name, value in found.items()}
        return row


def loss_by_position(losses: np.ndarray) -> list[dict[str, float]]:
    """Mean loss in nats per token of [windows, length - 1] over spans of positions that double: 1-15, 16-31, ..."""
    length = losses.shape[1]
    edges = [0, *(2**power - 1 for power in range(4, 40) if 2**power - 1 < length), length]
    return [
        {"from": first + 1, "to": last, "loss": float(losses[:, first:last].mean())}
        for first, last in zip(edges, edges[1:], strict=False)
    ]


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
