"""A needle document as a question about attribution: which digit is asked for where, and which tokens told it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.captum_targets import LogitTarget
from interp.documents import Document

__all__ = ["NeedleQuestion", "needle_question"]


@dataclass(frozen=True)
class NeedleQuestion:
    """A document [T] with an answer of n digits that stands in it twice: `source` are the columns of the digits where
    they were told, `answer` those where they are asked for; `digits` are the ids of all digits.
    """

    name: str
    input_ids: Tensor
    source: tuple[int, ...]
    answer: tuple[int, ...]
    digits: tuple[int, ...]

    def target(self, digit: int) -> LogitTarget:
        """The logit of one digit of the answer minus the mean logit of all other digits, where it is predicted."""
        column = self.answer[digit]
        token = int(self.input_ids[column])
        return LogitTarget(column - 1, token, [i for i in self.digits if i != token])

    @torch.no_grad()
    def answered(self, model: Any) -> list[bool]:
        """Whether each digit is the most likely token behind the true ones before it, as greedy decoding sees it."""
        first = torch.tensor([column - 1 for column in self.answer])
        ids = self.input_ids[None].to(model.device)
        logits = model(input_ids=ids, logits_to_keep=first.to(ids.device), use_cache=False).logits[0]
        return (logits.argmax(-1).cpu() == self.input_ids[first + 1]).tolist()


def needle_question(document: Document, tokenizer: Any) -> NeedleQuestion:
    """Find the answer of a needle document (`interp.needle`) where it was told.

    Raises:
        ValueError: the document has no answer, or the answer with the token before it stands nowhere before.
    """
    ids, mask = document.input_ids, document.answer_mask
    if mask is None or not mask.any():
        raise ValueError(f"document {document.name!r} has no answer")
    answer = np.flatnonzero(mask)
    wanted = ids[answer[0] - 1 : answer[-1] + 1]
    windows = np.lib.stride_tricks.sliding_window_view(ids[: answer[0] - 1], len(wanted))
    found = np.flatnonzero((windows == wanted).all(1))
    if not len(found):
        raise ValueError(f"document {document.name!r}: its answer was not told before the question")
    source = found[0] + 1 + np.arange(len(answer))
    return NeedleQuestion(
        document.name, torch.from_numpy(ids), tuple(source.tolist()), tuple(answer.tolist()), _digits(tokenizer)
    )


def _digits(tokenizer: Any) -> tuple[int, ...]:
    """The ids of the 16 hexadecimal digits; ValueError unless each is a token."""
    found = [tokenizer(f"={digit}", add_special_tokens=False)["input_ids"][-1] for digit in "0123456789abcdef"]
    if len(set(found)) != 16 or any(
        tokenizer.decode([i]) != d for i, d in zip(found, "0123456789abcdef", strict=True)
    ):
        raise ValueError("the tokenizer must have a token for each of the 16 hexadecimal digits")
    return tuple(found)
