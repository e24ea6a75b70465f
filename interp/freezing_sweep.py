"""What freezing costs: every configuration of a run against nothing frozen, everything frozen and random subsets."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from interp._columns import provenance, with_intervals
from interp.resampling import DEFAULT_BOOTSTRAP, Bootstrap, Resampler, cell_sums, divide, make_blocks, share_interval
from interp.run_folder import GREEDY, Run
from interp.tables import UNFROZEN, loss_columns

__all__ = ["answer_table", "depth_table", "location_table", "loss_change", "sweep_table"]

ALL_FROZEN = "all"
UNFROZEN_FAMILY = "baseline"


def sweep_table(
    run: Run,
    families: Mapping[str, Mapping[str, str]],
    *,
    select: Any = None,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
) -> pd.DataFrame:
    """Give the cost of every freezing of a run, a row per family and label, the two baselines first.

    `families` is {family: {label: configuration}} as from `interp.presets.sweep_freezings`; the run must hold "all".
    select: bool [N], tokens that count (default: all with a loss). All differences are paired, token by token.

    Columns: family, label, configuration; layers and heads frozen (text), frozen (how many layers),
    active_layer_fraction (heads count as their share of a layer); count (tokens), mean_loss (nats per token), delta
    (mean loss less that with nothing frozen, nats) with _low and _high; recovered (what is left of the gap between
    everything and nothing frozen: 1 loses nothing, 0 is as bad as all frozen) with _low and _high, NaN where the
    gap's interval holds 0; null_low, null_high and null_count (smallest and largest delta of the random subsets with
    as many layers frozen, and how many there are); unit, blocks, documents, confidence.
    """
    losses = loss_columns(run)
    chosen = _selected(run, select)
    names = list(losses)
    if ALL_FROZEN not in names:
        raise ValueError(f"run {str(run.path)!r} has no freezing {ALL_FROZEN!r}, it has {names[1:]}")
    stacked = np.stack([np.where(chosen, losses[name], np.nan) for name in names], axis=1)
    blocks = make_blocks(run.tokens["document"], boot)
    draw = Resampler(blocks, boot)
    one = np.zeros(len(stacked), dtype=np.int64)
    cells = [cell_sums(column, one, 1, blocks) for column in stacked.T]
    # All configurations have their losses at the same tokens.
    sums, number = np.concatenate([cell[0] for cell in cells], axis=1), cells[0][1]
    means = divide(sums.sum(0), number.sum())
    draws = divide(draw.sums(sums), draw.sums(number))
    used = int((number > 0).sum())
    delta, delta_draws = means - means[0], draws - draws[:, [0]]
    gap = names.index(ALL_FROZEN)
    columns = with_intervals({"delta": (delta, delta_draws, used)}, boot)
    # Without a gap there is nothing to recover.
    there = columns["delta_low"][gap] > 0 or columns["delta_high"][gap] < 0
    nothing = np.full_like(delta, np.nan)
    recovered = 1 - delta / delta[gap] if there else nothing
    recovered_draws = 1 - divide(delta_draws, delta_draws[:, [gap]]) if there else np.full_like(draws, np.nan)
    columns |= with_intervals({"recovered": (recovered, recovered_draws, used)}, boot)
    table = pd.DataFrame({"configuration": names, "count": int(number.sum()), "mean_loss": means, **columns})
    table = table.assign(**provenance(blocks, used, boot))
    return _by_family(_with_layers(run, table), families)


def answer_table(
    run: Run, families: Mapping[str, Mapping[str, str]], *, boot: Bootstrap = DEFAULT_BOOTSTRAP
) -> pd.DataFrame:
    """Give `sweep_table` on the answer tokens of a run of retrieval documents, with the answers that are right.

    Further columns: answers (documents with one), exact (share whose every token greedy decoding gets right) and
    digits (share of single tokens), each with _low and _high: of exact Wilson's, of digits over documents. ValueError
    for a run without answers.
    """
    answer = run.tokens["is_answer"].to_numpy()
    if not answer.any():
        raise ValueError(f"run {str(run.path)!r} has no answer tokens")
    table = sweep_table(run, families, select=answer, boot=boot)
    names = [UNFROZEN, *(entry["name"] for entry in run.freezing)]
    scores = pd.DataFrame(_scores(run, answer, boot))
    return table.merge(scores.assign(configuration=names), on="configuration", how="left", validate="many_to_one")


def location_table(
    run: Run,
    families: Mapping[str, Mapping[str, str]],
    *,
    select: Any = None,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
) -> pd.DataFrame:
    """Set each third of the layers against the other subsets of as many layers that were frozen in the run.

    Columns: third, configuration, subsets (how many others there are), delta (nats, as in `sweep_table`), excess
    (delta less the mean delta of the others) and lead (delta less that of the costliest other, `strongest`), both
    paired, with _low and _high; unit, blocks, documents, confidence. A third is where it matters when its excess and
    its lead are above 0.
    """
    losses = loss_columns(run)
    base = losses.pop(UNFROZEN)
    size = {entry["name"]: len(entry["layers"]) for entry in run.freezing if not entry.get("heads")}
    chosen = _selected(run, select)
    blocks = make_blocks(run.tokens["document"], boot)
    draw = Resampler(blocks, boot)
    one = np.zeros(len(base), dtype=np.int64)
    sums, draws = {}, {}
    for name in size:
        block_sums, counts = cell_sums(np.where(chosen, losses[name] - base, np.nan), one, 1, blocks)
        sums[name] = float(divide(block_sums.sum(), counts.sum()))
        draws[name] = draw.means(block_sums, counts)[:, 0]
        used = int((counts > 0).sum())
    rows = []
    for third, name in families.get("thirds", {}).items():
        others = [other for other in size if size[other] == size[name] and other != name]
        strongest = max(others, key=sums.get) if others else None
        nothing = (np.nan, np.full(boot.n_boot, np.nan), 0)
        excess = lead = nothing
        if others:
            mean = np.mean([draws[other] for other in others], axis=0)
            excess = (sums[name] - np.mean([sums[other] for other in others]), draws[name] - mean, used)
            lead = (sums[name] - sums[strongest], draws[name] - draws[strongest], used)
        row = {"third": third, "configuration": name, "subsets": len(others), "delta": sums[name]}
        row |= {"strongest": strongest, **with_intervals({"excess": excess, "lead": lead}, boot)}
        rows.append(row | provenance(blocks, used, boot))
    return pd.DataFrame(rows)


def depth_table(run: Run, *, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> pd.DataFrame:
    """Give, for a run of needle documents, the answers that are right by distance and configuration.

    Columns: configuration, distance (tokens between the end of the definition and the answer, as in the name of the
    document: depth), answers, exact, digits, loss (nats per answer token).
    """
    answer = run.tokens["is_answer"].to_numpy()
    depth = pd.Series({entry["document"]: entry["name"].rpartition(" ")[2] for entry in run.meta["documents"]})
    rows = pd.DataFrame({"document": run.tokens["document"][answer], "depth": 0.0})
    rows["depth"] = rows["document"].map(depth).astype(float)
    tables = []
    for column, (name, loss) in enumerate(loss_columns(run).items()):
        own = rows.assign(right=run.extras[GREEDY][answer, column] > 0, loss=loss[answer])
        by_document = own.groupby(["depth", "document"], as_index=False).agg(
            exact=("right", "all"), digits=("right", "mean"), loss=("loss", "mean")
        )
        grouped = by_document.groupby("depth", as_index=False)
        found = grouped.agg(
            answers=("document", "size"), exact=("exact", "mean"), digits=("digits", "mean"), loss=("loss", "mean")
        )
        tables.append(found.assign(configuration=name))
    return pd.concat(tables, ignore_index=True)


def loss_change(run: Run) -> pd.DataFrame:
    """Give how much each configuration changes the loss of each token (nats): document, position, a column each."""
    losses = loss_columns(run)
    base = losses.pop(UNFROZEN)
    changes = {name: (loss - base).astype(np.float32) for name, loss in losses.items()}
    return pd.DataFrame({"document": run.tokens["document"], "position": run.tokens["position"], **changes})


def _selected(run: Run, select: Any) -> np.ndarray:
    if select is None:
        return np.ones(len(run.tokens), dtype=bool)
    select = np.asarray(select)
    if select.shape != (len(run.tokens),) or select.dtype != bool:
        raise ValueError(f"select must be bool [{len(run.tokens)}], got {select.dtype} {list(select.shape)}")
    return select


def _with_layers(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    frozen = {UNFROZEN: {"layers": [], "heads": {}}, **{entry["name"]: entry for entry in run.freezing}}
    total, heads = len(run.ttt_layers), run.meta["model"]["num_heads"]
    rows = []
    for name in table["configuration"]:
        layers, some = frozen[name]["layers"], frozen[name].get("heads", {})
        share = len(layers) + sum(len(chosen) for chosen in some.values()) / heads
        told = ";".join(f"{layer}:{','.join(map(str, chosen))}" for layer, chosen in some.items())
        rows.append((",".join(map(str, layers)), told, len(layers), 1 - share / total))
    extra = pd.DataFrame(rows, columns=["layers", "heads", "frozen", "active_layer_fraction"])
    return pd.concat([table[["configuration"]], extra, table.drop(columns="configuration")], axis=1)


def _by_family(table: pd.DataFrame, families: Mapping[str, Mapping[str, str]]) -> pd.DataFrame:
    """A row per family and label, with the band of the random subsets of the same size."""
    by_name = table.set_index("configuration")
    chance = [by_name.loc[name] for name in families.get("random", {}).values()]
    bands = pd.DataFrame(chance).groupby("frozen")["delta"].agg(["min", "max", "size"]) if chance else None
    baselines = {UNFROZEN_FAMILY: {"nothing frozen": UNFROZEN, "everything frozen": ALL_FROZEN}}
    rows = []
    for family, members in {**baselines, **families}.items():
        for label, name in members.items():
            row = by_name.loc[name]
            known = bands is not None and not row["heads"] and row["frozen"] in bands.index
            band = bands.loc[row["frozen"]] if known else {"min": np.nan, "max": np.nan, "size": 0}
            null = {"null_low": band["min"], "null_high": band["max"], "null_count": int(band["size"])}
            rows.append({"family": family, "label": label, "configuration": name, **row, **null})
    return pd.DataFrame(rows)


def _scores(run: Run, answer: np.ndarray, boot: Bootstrap) -> dict[str, Any]:
    """Answers wholly right and single tokens right, per configuration, with intervals over documents."""
    documents = run.tokens["document"].to_numpy()[answer]
    _, index = np.unique(documents, return_inverse=True)
    right = run.extras[GREEDY][answer] > 0  # [tokens, 1 + F]
    size = np.bincount(index)
    hits = np.stack([np.bincount(index, weights=column) for column in right.T], axis=1)  # [answers, 1 + F]
    values = {"exact": (hits == size[:, None]).astype(float), "digits": hits / size[:, None]}
    blocks = make_blocks(np.arange(len(size)), boot)
    draw = Resampler(blocks, boot)
    columns = {}
    for name, value in values.items():
        sums = np.stack([np.bincount(blocks.index, column, blocks.count) for column in value.T], axis=1)
        draws = draw.sums(sums) / draw.sums(np.bincount(blocks.index, minlength=blocks.count).astype(float))[:, None]
        columns[name] = (value.mean(0), draws, blocks.count)
    low, high = share_interval(values["exact"].sum(0), len(size), boot.confidence)
    return {"answers": len(size), **with_intervals(columns, boot), "exact_low": low, "exact_high": high}
