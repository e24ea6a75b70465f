"""Documents that lack one thing a text has: its order, its words, its start, its novelty. For comparison with it."""

from collections.abc import Sequence

import numpy as np

from interp.documents import Document

__all__ = ["CONTROLS", "control_documents", "sample_documents"]

# What each control takes away, and how many times the length of a document it is made from.
CONTROLS = {
    "shuffled": ("the tokens of each document in random order: same words, no text", 1.0),
    "iid": ("tokens drawn from all documents, independently and with their frequency: no document either", 1.0),
    "repeated": ("the first 128 tokens of each document again and again: nothing new after them", 1.0),
    "middle": ("each document from the end of its first third on: no beginning", 1.5),
    "carried": ("each document read after another one, with the state that it left: no fresh state", 1.0),
}
PERIOD = 128


def control_documents(
    kind: str, documents: Sequence[Document], *, length: int, seed: int = 0, bos: int | None = None
) -> tuple[list[Document], int]:
    """Make the control `kind` from some documents, as many as there are, each of `length` tokens.

    Documents are at least as long as `CONTROLS` says times `length`; a leading `bos` token stays where it is.
    Gives the documents and how many of their first tokens only prepare the state (of "carried" `length`, else 0).
    ValueError for an unknown kind, and for documents that are too short or too few ("carried" needs two).
    """
    if kind not in CONTROLS:
        raise ValueError(f"control must be one of {list(CONTROLS)}, got {kind!r}")
    needed = int(CONTROLS[kind][1] * length)
    short = [document.name for document in documents if len(document.input_ids) < needed]
    if short or len(documents) < (2 if kind == "carried" else 1):
        raise ValueError(
            f"control {kind!r} of {length} tokens needs documents of {needed} tokens, two at least for 'carried'; "
            f"got {len(documents)}, too short: {short[:5]}"
        )
    pool = np.concatenate([_body(document.input_ids, bos) for document in documents])
    made = []
    for index, document in enumerate(documents):
        rng = np.random.default_rng([seed, index])
        head = document.input_ids[: len(document.input_ids) - len(_body(document.input_ids, bos))]
        body = _body(document.input_ids, bos)
        room = length - len(head)
        if kind == "shuffled":
            ids = rng.permutation(body[:room])
        elif kind == "iid":
            ids = rng.choice(pool, room)
        elif kind == "repeated":
            ids = np.resize(body[:PERIOD], room)
        elif kind == "middle":
            ids = body[needed // 3 :][:room]
        else:
            other = documents[(index + 1) % len(documents)].input_ids[:length]
            head, ids = other, document.input_ids[:length]
        made.append(Document(f"{document.name} {kind}", np.concatenate([head, ids]).astype(np.int64)))
    return made, length if kind == "carried" else 0


def sample_documents(documents: Sequence[Document], number: int, sample: int, *, length: int) -> list[Document]:
    """Give sample number `sample` (from 0) of `number` documents of `length` tokens; samples do not overlap.

    Documents that are shorter than `length` do not count. ValueError when there are not enough.
    """
    whole = [document for document in documents if len(document.input_ids) >= length]
    order = np.random.default_rng(0).permutation(len(whole))
    chosen = order[sample * number : (sample + 1) * number]
    if len(chosen) < number:
        raise ValueError(
            f"sample {sample} of {number} documents of {length} tokens: the corpus has only {len(whole)} of them"
        )
    return [whole[index] for index in chosen]


def _body(ids: np.ndarray, bos: int | None) -> np.ndarray:
    return ids[1:] if bos is not None and ids[0] == bos else ids
