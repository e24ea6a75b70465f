"""What the earlier study claimed, set against the tables of a study, with a verdict each."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from interp._columns import POOLED
from interp.claims import CANNOT_TELL, NOT_REPRODUCED, REPRODUCED, Verdict, judge_effect, judge_near_zero, judge_range
from interp.study_data import StudyData
from interp.study_tables import FIRST_TOKENS

__all__ = ["Claim", "claim_table"]

# How far from 0 a correlation may lie to count as near it.
MARGIN = 0.1
# Nats per token that a saving may cost.
FREE = 0.01
# Share of the compute that skipping was said to save at least.
SAVED = 0.3
UNTRAINED = "untrained model"

Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Claim:
    """One claim about one model.

    theme: "trigger", "location" or "efficiency". earlier: the figure of the earlier study, in words. quantity: what
    `value` is; low, high: its interval (NaN: none). control_name, control, control_low, control_high: the same
    quantity where the claimed cause is missing. note: what else must be said, in numbers. rule: key of
    `interp.claims.RULES`. documents, unit: what the interval was made from.
    """

    model: str
    theme: str
    claim: str
    earlier: str
    quantity: str
    value: float
    low: float
    high: float
    control_name: str
    control: float
    control_low: float
    control_high: float
    verdict: str
    why: str
    rule: str
    note: str
    documents: int
    unit: str


def claim_table(data: StudyData, tables: Tables) -> pd.DataFrame:
    """Give a row of `Claim` for every claim and trained model with TTT layers."""
    owners = {name: next(iter(data.of_model(name).values())).model for name in data.models}
    claims: list[Claim] = []
    for name, model in owners.items():
        text = data.of_model(name).get("text")
        if model.untrained is not None or text is None or text.run is None:
            continue
        same = [other for other, m in owners.items() if m.untrained is not None and m.path == model.path]
        for make in (_buckets, _burn_in, _surprisal, _location, _efficiency):
            claims += make(name, same[0] if same else None, tables)
    return pd.DataFrame([asdict(claim) for claim in claims])


def _buckets(model: str, untrained: str | None, tables: Tables) -> Iterator[Claim]:
    new = ("NOVELTY", "New words write 28% more than syntax words", 1.28)
    known = ("RETRIEVAL", "Known content words write more than syntax words", None)
    earlier = {"NOVELTY": "+28% (from its own data: +19% on books, -11% on needles)", "RETRIEVAL": "between the two"}
    for corpus, (bucket, claim, claimed) in (("text", new), ("text", known), ("needle", new)):
        where = {"corpus": corpus, "layer": POOLED, "bucket_a": bucket, "bucket_b": "SYNTAX"}
        row = _pick(tables, "contrasts", model=model, tokens="all", **where)
        if row is None:
            continue
        control = _pick(tables, "contrasts", model=untrained, tokens="all", **where)
        bounds = _bounds(control, "adjusted")
        verdict = judge_effect(
            *_bounds(row, "adjusted"), null=1.0, claimed=claimed, control=bounds, enough=_enough(row)
        )
        yield _make(
            row,
            "adjusted",
            verdict,
            control,
            UNTRAINED,
            theme="trigger",
            rule="effect",
            note=_bucket_note(model, where, row, tables),
            claim=claim if corpus == "text" else f"{claim} (needle documents)",
            earlier=earlier[bucket],
            quantity=f"plasticity of {bucket} / SYNTAX at like positions, all layers pooled",
        )


def _bucket_note(model: str, where: Mapping[str, Any], row: pd.Series, tables: Tables) -> str:
    starts = _pick(tables, "contrasts", model=model, tokens="word starts", **where)
    single = _pick(tables, "single_token_contrasts", model=model, **where)
    told = [f"Over all positions {row['ratio']:.2f}", f"first tokens of words {starts['adjusted']:.2f}"]
    if math.isfinite(row.get("lr_fixed", math.nan)):
        told.append(f"at a fixed inner learning rate {row['lr_fixed']:.2f}")
    told.append(f"buckets made as in the earlier study {single['adjusted']:.2f}")
    told.append(f"p of permuted labels {row['p']:.3f}")
    frame = tables["contrasts"]
    layers = frame[_matches(frame, {**where, "model": model, "tokens": "all", "layer": frame["layer"]})]
    layers = layers[layers["layer"] != POOLED]
    told.append("layer by layer " + ", ".join(f"{value:.2f}" for value in layers["adjusted"]))
    return "; ".join(told) + "."


def _burn_in(model: str, untrained: str | None, tables: Tables) -> Iterator[Claim]:
    decay = tables.get("decay")
    if decay is None or not (decay["model"] == model).any():
        return
    n = int(decay["n"].max())
    where = {"layer": POOLED, "comparison": "first/steady", "n": n}
    row = _pick(tables, "decay", model=model, corpus="long", **where)
    iid = _pick(tables, "decay", model=model, corpus="long-iid", **where)
    quantity = f"mean plasticity of the first {n:,} tokens / that of the second half, text"
    note = _burn_in_note(model, untrained, where, tables)
    bounds = _bounds(row, "ratio")
    words = {"theme": "trigger", "rule": "effect", "note": note, "quantity": quantity}
    verdict = judge_effect(*bounds, null=1.0, claimed=2.0, enough=_enough(row))
    if n < FIRST_TOKENS:
        # Shorter documents make every burn-in look like the one that was claimed.
        verdict = Verdict(CANNOT_TELL, f"documents too short: {n:,} tokens are not the {FIRST_TOKENS:,} of the claim")
    yield _make(
        row,
        "ratio",
        verdict,
        claim=f"Plasticity is twice as high in the first {n:,} tokens",
        earlier="2 times over the first 2,000 tokens",
        **words,
    )
    if iid is not None:
        yield _make(
            row,
            "ratio",
            judge_effect(*bounds, null=1.0, control=_bounds(iid, "ratio"), enough=_enough(row)),
            iid,
            "i.i.d. tokens",
            claim="The burn-in is adaptation to the document",
            earlier="said to be adaptation to the style of the document",
            **words,
        )
    fit = _pick(tables, "burn_in", model=model, corpus="long", layer=POOLED)
    told = f"No fit: {fit['refusal']}."
    if pd.isna(fit["refusal"]):
        told = f"Half-life {fit['half_life']:.0f} tokens; at the start {fit['relative']:.2f} times the level."
    yield _make(
        fit,
        "tau",
        judge_range(*_bounds(fit, "tau"), claimed=2000, enough=_enough(fit)),
        theme="trigger",
        rule="range",
        note=told,
        claim="The burn-in lasts about 2,000 tokens",
        earlier="about 2,000 tokens",
        quantity="time constant of an exponential decay of plasticity, tokens, text",
    )


def _burn_in_note(model: str, untrained: str | None, where: Mapping[str, Any], tables: Tables) -> str:
    named = {"shuffled tokens": "shuffled", "i.i.d. tokens": "iid", "from the middle": "middle"}
    named["state carried in"] = "carried"
    told = []
    for name, control in named.items():
        other = _pick(tables, "decay", model=model, corpus=f"long-{control}", **where)
        if other is not None:
            told.append(f"{name} {other['ratio']:.2f}")
    other = _pick(tables, "decay", model=untrained, corpus="long", **where)
    if other is not None:
        told.append(f"{UNTRAINED} {other['ratio']:.2f}")
    least = int(tables["decay"]["n"].min())
    short = _pick(tables, "decay", model=model, corpus="long", layer=POOLED, comparison="first/last", n=least)
    return f"Controls: {', '.join(told) or 'none'}. First {least} tokens over the last {least}: {short['ratio']:.2f}."


def _surprisal(model: str, untrained: str | None, tables: Tables) -> Iterator[Claim]:
    where = {"corpus": "text", "layer": POOLED}
    row, following, before = (
        _pick(tables, "surprisal_correlation", model=model, lag=lag, **where) for lag in (0, -1, 1)
    )
    if row is None:
        return
    yield _make(
        row,
        "pearson_log",
        judge_near_zero(*_bounds(row, "pearson_log"), margin=MARGIN, enough=_enough(row)),
        _pick(tables, "surprisal_correlation", model=untrained, lag=0, **where),
        UNTRAINED,
        theme="trigger",
        rule="near zero",
        note=f"Surprisal of the next token {following['pearson_log']:+.2f}, of the one before "
        f"{before['pearson_log']:+.2f}; Spearman {row['spearman']:+.2f}; at like positions {row['partial']:+.2f}.",
        claim="Surprisal and plasticity are hardly correlated",
        earlier="r = 0.03 to 0.05",
        quantity="r of a token's own surprisal and its plasticity, logarithms, all layers pooled",
    )


def _location(model: str, untrained: str | None, tables: Tables) -> Iterator[Claim]:
    claims = (
        ("sweep", "middle", "Middle layers matter most for narrative", "freezing them costs 0.39 nats", "the text"),
        ("needle", "late", "Late layers matter most for retrieval", "freezing them costs 0.96 nats", "the answers"),
    )
    for corpus, third, claim, earlier, on in claims:
        row = _pick(tables, "location", model=model, corpus=corpus, third=third)
        if row is None:
            continue
        verdict = judge_effect(*_bounds(row, "excess"), null=0.0, enough=_enough(row), ratio=False)
        if verdict.verdict == REPRODUCED and not row["lead_low"] > 0:
            beaten = row["lead_high"] < 0
            why = f"freezing layers {row['strongest']} instead costs {'more' if beaten else 'as much'}"
            verdict = Verdict(NOT_REPRODUCED if beaten else CANNOT_TELL, why)
        frame = tables["location"]
        thirds = frame[_matches(frame, {"model": model, "corpus": corpus})]
        costs = [f"{r['third']} (layers {r['configuration']}) {r['delta']:+.3f}" for _, r in thirds.iterrows()]
        note = f"Nats per token on {on}: {', '.join(costs)}. Of the other choices of as many layers, "
        yield _make(
            row,
            "excess",
            verdict,
            theme="location",
            rule="location",
            note=f"{note}{row['strongest']} costs most.",
            claim=claim,
            earlier=earlier,
            quantity=f"cost of freezing the {third} layers less the mean cost of as many others, nats on {on}",
        )


def _efficiency(model: str, untrained: str | None, tables: Tables) -> Iterator[Claim]:
    table = tables.get("skipping")
    own = table[_matches(table, {"model": model, "rule": "small gradient"})] if table is not None else ()
    if not len(own):
        return
    writes, inner = (own[f"saved_{name}"].iloc[0] / own["skipped"].iloc[0] for name in ("writes", "inner"))
    saved, low, high = _saved(own, inner)
    row = own.loc[own["share"].idxmax()]
    chance = _pick(tables, "skipping", model=model, rule="at random", share=row["share"])
    costs = ", ".join(f"{r['skipped']:.0%} {r['delta']:+.4f}" for _, r in own.iterrows())
    note = (
        f"Nats per token by share of writes skipped: {costs}; "
        f"{chance['skipped']:.0%} at random {chance['delta']:+.4f}. "
        f"All writes are {writes:.1%} of this model's operations, with their gradients {inner:.1%}."
    )
    verdict = Verdict(CANNOT_TELL, "shares that would save enough may or may not cost too much")
    if high < SAVED / 2:
        verdict = Verdict(NOT_REPRODUCED, f"at most {high:.1%} of all operations may be saved")
    elif low >= SAVED / 2:
        verdict = Verdict(REPRODUCED, f"at least {low:.1%} of all operations are saved")
    yield _make(
        pd.concat([row, pd.Series({"saved": saved, "saved_low": low, "saved_high": high})]),
        "saved",
        verdict,
        theme="efficiency",
        rule="counted",
        note=note,
        claim="Skipping small updates saves 30 to 50% of the compute",
        earlier="30 to 50%",
        quantity=f"share of all operations saved at less than {FREE} nats per token",
    )


def _saved(own: pd.DataFrame, everything: float) -> tuple[float, float, float]:
    """What is saved for free, and the least and most that may be; `everything`: without any write.

    A larger share costs more, so that shares between the last that may be free and the first that is not may be, too.
    Without intervals that speak about other documents nothing bounds the cost.
    """
    certain = bool((own["unit"] == "documents").all())
    free, surely_free = own["delta"] < FREE, (own["delta_high"] < FREE) & certain
    dear = (own["delta_low"] >= FREE) & certain
    saved, low = (float(own["saved_inner"][chosen].max()) if chosen.any() else 0.0 for chosen in (free, surely_free))
    high = float(own["saved_inner"][dear].min()) if dear.any() else everything
    return saved, low, max(saved, high)


def _matches(frame: pd.DataFrame, where: Mapping[str, Any]) -> Any:
    return np.logical_and.reduce([(frame[name] == value).to_numpy() for name, value in where.items()])


def _pick(tables: Tables, table: str, **where: Any) -> pd.Series | None:
    """The one row of a table with these values; None when there is none."""
    if table not in tables:
        return None
    found = tables[table][_matches(tables[table], where)]
    return found.iloc[0] if len(found) else None


def _enough(row: pd.Series) -> bool:
    """Whether documents were resampled: with fewer than ten, stretches of them are."""
    return row["unit"] == "documents"


def _bounds(row: pd.Series | None, name: str) -> tuple[float, float] | None:
    return None if row is None else (float(row[f"{name}_low"]), float(row[f"{name}_high"]))


def _make(
    row: pd.Series,
    name: str,
    verdict: Verdict,
    control: pd.Series | None = None,
    control_name: str = "",
    **words: str,
) -> Claim:
    """A claim from the columns `name`, `name_low`, `name_high` of a row, and those of its control."""
    ends = ("", "_low", "_high")
    value, low, high = (float(row[name + end]) for end in ends)
    bounds = [math.nan if control is None else float(control[name + end]) for end in ends]
    return Claim(
        model=row["model"],
        value=value,
        low=low,
        high=high,
        control=bounds[0],
        control_low=bounds[1],
        control_high=bounds[2],
        control_name="" if control is None else control_name,
        verdict=verdict.verdict,
        why=verdict.why,
        documents=int(row["documents"]),
        unit=row["unit"],
        **words,
    )
