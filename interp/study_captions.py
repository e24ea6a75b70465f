"""Titles and captions of the figures of a study, computed from its tables."""

import math

import pandas as pd

from interp._columns import POOLED
from interp.captions import Caption
from interp.tables import UNFROZEN
from interp.wording import count_of, excludes, format_interval, format_number, format_share, scope_of

__all__ = [
    "burn_in_caption",
    "context_caption",
    "drift_caption",
    "freezing_caption",
    "inner_losses_caption",
    "lags_caption",
    "skipping_caption",
    "traces_caption",
]


def context_caption(table: pd.DataFrame) -> Caption:
    """Say how perplexity changes from the second window of the text to the last, for every model and configuration."""
    told = []
    for (model, _, configuration), rows in table.groupby(["model", "corpus", "configuration"], sort=False):
        first, last = rows.iloc[min(1, len(rows) - 1)], rows.iloc[-1]
        frozen = "" if configuration == UNFROZEN else ", everything frozen"
        told.append(
            f"{model}{frozen} goes from {format_number(first['windowed'])} {format_interval(first, 'windowed')} at "
            f"{int(first['position']):,} tokens to {format_number(last['windowed'])} "
            f"{format_interval(last, 'windowed')} at {int(last['position']):,} "
            f"({count_of(last['documents'], 'document')})"
        )
    longest = int(table["position"].max())
    title = f"Perplexity by tokens read, up to {longest:,}"
    return Caption(title, f"{title}. " + "; ".join(told) + f". {_intervals(table.iloc[0])}")


def burn_in_caption(table: pd.DataFrame) -> Caption:
    """Give the height of the first stretch over the second half, for the text and every control."""
    told = []
    for (model, corpus), rows in table.groupby(["model", "corpus"], sort=False):
        name = "text" if corpus == "long" else corpus.removeprefix("long-")
        if model != table["model"].iloc[0]:
            name += " with random weights"
        told.append((name, rows.iloc[0]))
    first = told[0][1]
    title = (
        f"In the first {int(first['stop'])} tokens of a text plasticity is {format_number(first['relative'])} "
        f"{format_interval(first, 'relative')} times that of the second half"
    )
    others = [f"{name} {format_number(row['relative'])} {format_interval(row, 'relative')}" for name, row in told[1:]]
    return Caption(title, f"{title}. The controls: {'; '.join(others) or 'none'}. {_intervals(first)}")


def freezing_caption(table: pd.DataFrame) -> Caption:
    """Say what freezing everything costs, which single layer costs most, and how thirds compare with their null."""
    everything = table[table["label"] == "everything frozen"].iloc[0]
    singles = table[table["family"] == "single"]
    on = "answer" if "exact" in table and (table["corpus"] == "needle").all() else "text"
    title = f"Freezing everything costs {_nats(everything)} per token of the {on}"
    text = []
    if len(singles):
        worst = singles.loc[singles["delta"].idxmax()]
        title += f"; of single layers {worst['label']} costs most, {_nats(worst)}"
    for _, row in table[table["family"] == "thirds"].iterrows():
        band = ""
        if row["null_count"] > 1:
            low, high = row["null_low"], row["null_high"]
            band = f"; {int(row['null_count'])} choices of as many cost {low:+.3f} to {high:+.3f}"
        left = f", {row['recovered']:.0%} of the gap recovered" if math.isfinite(row["recovered"]) else ""
        text.append(f"{row['label'].capitalize()} (layers {row['layers']}) {_nats(row)}{left}{band}.")
    if "exact" in table:
        base = table[table["label"] == "nothing frozen"].iloc[0]
        text.append(
            f"Answers wholly right: {base['exact']:.0%} [{base['exact_low']:.0%}, {base['exact_high']:.0%}] of "
            f"{int(base['answers'])} with nothing frozen, {everything['exact']:.0%} with everything frozen."
        )
    text.append(f"Differences are paired, token by token. {_intervals(everything)}")
    return Caption(title, f"{title}. {' '.join(text)}")


def traces_caption(table: pd.DataFrame) -> Caption:
    """Say which bucket writes most in how many stretches of the document."""
    known = table[table["count"] > 0]
    most = known.loc[known.groupby("start")["plasticity"].idxmax(), "bucket"].value_counts()
    title = "No bucket holds a token"
    if len(most):
        title = f"{most.index[0]} writes most in {int(most.iloc[0])} of {int(most.sum())} stretches of the document"
    width = int((table["stop"] - table["start"]).iloc[0])
    return Caption(
        title,
        f"{title}, over all tokens of a stretch of {width} tokens, all layers pooled. {_intervals(table.iloc[0])}",
    )


def lags_caption(table: pd.DataFrame) -> Caption:
    """Say at which lag surprisal and plasticity are tied most, and how many of the ties are told from none."""
    pooled = table[table["layer"] == POOLED]
    best = pooled.loc[pooled["pearson_log"].abs().idxmax()]
    names = {-1: "the next token", 0: "the token itself", 1: "the token before"}
    title = (
        f"Plasticity is tied most to the surprisal of {names.get(best['lag'], best['lag'])}: "
        f"r = {best['pearson_log']:+.2f} {format_interval(best, 'pearson_log', digits=2)} (all layers)"
    )
    apart = int(table["pearson_log_apart"].sum())
    text = (
        f"{title}. {apart} of {len(table)} correlations (*) are told from 0 when the confidence of "
        f"{format_share(best['confidence'])} is shared out among all of them. At like positions the pooled ones are "
        + ", ".join(f"{row['partial']:+.2f} ({names.get(row['lag'], row['lag'])})" for _, row in pooled.iterrows())
    )
    return Caption(title, f"{text}. {_intervals(best)}")


def inner_losses_caption(table: pd.DataFrame) -> Caption:
    """Say in which layers a write lowers the inner loss of its own token, and in which learning lowers it at all."""
    means = table.groupby("layer")[["inner_loss_init", "inner_loss_before", "inner_loss_after"]].mean()
    lower = [str(layer) for layer in means.index[means["inner_loss_after"] < means["inner_loss_before"]]]
    learnt = [str(layer) for layer in means.index[means["inner_loss_before"] < means["inner_loss_init"]]]
    title = f"A write lowers the inner loss of its own token in {len(lower)} of {len(means)} layers"
    text = [
        f"{title} ({', '.join(lower) or 'none'}); the weights learnt so far are better than W_0 for the next "
        f"mini-batch in {len(learnt)} ({', '.join(learnt) or 'none'})."
    ]
    for layer, row in means.iterrows():
        text.append(
            f"Layer {layer}: {format_number(row['inner_loss_init'])} at W_0, "
            f"{format_number(row['inner_loss_before'])} before, {format_number(row['inner_loss_after'])} after."
        )
    return Caption(title, " ".join(text))


def drift_caption(table: pd.DataFrame) -> Caption:
    """Say how far each layer has moved from W_0 at the end, on the text and on repeated text."""
    end = table.groupby(["corpus", "layer"], sort=False)["state_drift"].last().unstack(0)
    still = int((end["text"] > table[table["corpus"] == "text"].groupby("layer")["state_drift"].median()).sum())
    title = f"The weights still move away from W_0 at the end of the text in {still} of {len(end)} layers"
    told = [
        f"layer {layer} {format_number(row['text'])}"
        + (f" ({format_number(row['repeated'])} on repeated text)" if "repeated" in row else "")
        for layer, row in end.iterrows()
    ]
    return Caption(title, f"{title}. Distance in the last stretch: {', '.join(told)}.")


def skipping_caption(table: pd.DataFrame) -> Caption:
    """Say what skipping the largest share of small updates costs, against as many at random."""
    own = table[table["rule"] == "small gradient"]
    most = own.loc[own["share"].idxmax()]
    chance = table[(table["rule"] != "small gradient") & (table["share"] == most["share"])].iloc[0]
    title = (
        f"Skipping the {most['skipped']:.0%} of writes with the smallest gradients changes the loss by {_nats(most)}, "
        f"as many at random by {_nats(chance)}"
    )
    text = (
        f"{title}. {most['unsettled']:.1%} of the decisions would change in one more round. That saves "
        f"{most['saved_writes']:.1%} of all operations, {most['saved_inner']:.1%} if the gradients were not computed "
        f"either. {_intervals(most)}"
    )
    return Caption(title, text)


def _nats(row: pd.Series) -> str:
    told = "" if excludes(row, "delta", 0.0) else " (not told from 0)"
    return f"{row['delta']:+.3f} nats {format_interval(row, 'delta', digits=3)}{told}"


def _intervals(row: pd.Series) -> str:
    documents = count_of(row["documents"], "document")
    text = f"Intervals: {format_share(row['confidence'])}, {row['unit']} resampled ({documents})."
    return f"{text} {scope_of(row)}".strip()
