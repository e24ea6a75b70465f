"""How numbers, intervals, counts and names are put into words."""

import math

import pandas as pd


def format_number(value: float) -> str:
    """Give three significant digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def format_share(share: float) -> str:
    """Give a share of 1 in percent: `95%`, `99.9%`."""
    return f"{100 * share:.6g}%"


def count_of(number: float, noun: str) -> str:
    """Count: `1 document`, `2,000 documents`."""
    return f"{int(number):,} {noun}{'' if int(number) == 1 else 's'}"


def token_label(lag: int) -> str:
    """Name the token `lag` places before token t: `t`, `t-1`, `t+1`."""
    return "t" if lag == 0 else f"t{-lag:+d}"


def scope_of(row: pd.Series) -> str:
    """Give a sentence on what the intervals of a row hold for; empty when documents were resampled."""
    if row["unit"] == "documents":
        return ""
    these = "this one document" if row["documents"] == 1 else f"these {int(row['documents']):,} documents"
    return f"Intervals hold within {these} and say nothing about others."


def format_interval(row: pd.Series, name: str, *, digits: int | None = None) -> str:
    """Give `[low, high]` of the columns `name_low` and `name_high`, or a remark that there is none."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if not (math.isfinite(low) and math.isfinite(high)):
        return "[no interval: too little data]"
    if digits is None:
        return f"[{format_number(low)}, {format_number(high)}]"
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def freezing_label(name: str) -> str:
    """Put a freezing configuration into words: `all` and lists of layers are spelt out, other names stay."""
    if name == "all":
        return "all layers"
    if name.isdigit():
        return f"layer {name}"
    return f"layers {name}" if name.replace(",", "").replace("-", "").isdigit() else name


def excludes(row: pd.Series, name: str, value: float) -> bool:
    """Tell whether the interval of `name` lies wholly on one side of `value`; False when there is no interval."""
    return bool(row[f"{name}_low"] > value or row[f"{name}_high"] < value)
