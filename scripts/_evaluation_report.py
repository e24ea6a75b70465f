"""The table and the picture of what evaluate_checkpoint.py measured."""

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLUMNS = ("measure", "text", "from", "to", "value_digits", "distance", "length", "depth", "documents", "value")


def write_table(results: dict, path: Path) -> None:
    """Write every number as a row of a csv: nats per byte and token, by position and context, needles answered."""
    rows: list[dict] = []
    for text, found in _texts(results).items():
        rows += [
            {"measure": f"nats per byte, {name}", "text": text, "value": value}
            for name, value in found["nats_per_byte"].items()
        ]
        rows.append({"measure": "nats per token", "text": text, "value": found["loss_nats_per_token"]})
        for row in found["loss_by_position"]:
            place = {"from": row["from"], "to": row["to"]}
            rows.append({"measure": "nats per token by position", "text": text, **place, "value": row["loss"]})
        for row in found.get("loss_by_context", []):
            place = {"text": text, "length": row["length"]}
            measure = f"nats per token, last {row['tokens']}"
            rows.append({"measure": measure, **place, "value": row["loss"]})
            rows.append({"measure": f"{measure}, beyond the full length", **place, "value": row["difference"]})
    for row in [*results["needles"], *results.get("needles_by_depth", [])]:
        place = {name: value for name, value in row.items() if name in COLUMNS}
        for score in ("exact", "digits"):
            rows.append({"measure": f"needles, {score}", **place, "value": row[score]})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "value": float(f"{row['value']:.6g}")} for row in rows)


def draw(results: dict, path: Path) -> None:
    """Draw loss by position and context (nats per token), and needles answered wholly by depth and length."""
    depths = results.get("needles_by_depth", [])
    figure = Figure(figsize=(10 if depths else 5.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if depths else 1, squeeze=False)[0]
    _draw_positions(panels[0], results)
    if depths:
        _draw_depths(figure, panels[1], depths)
    figure.savefig(path, dpi=130)


def _texts(results: dict) -> dict[str, dict]:
    return {"data": results, **({"test": results["test"]} if "test" in results else {})}


def _draw_positions(axes: Axes, results: dict) -> None:
    for text, found in _texts(results).items():
        rows = found["loss_by_position"]
        middles = [(row["from"] * row["to"]) ** 0.5 for row in rows]
        (line,) = axes.plot(middles, [row["loss"] for row in rows], marker="o", label=text)
        rows = found.get("loss_by_context", [])
        if rows:
            middles, style = [row["length"] - row["tokens"] / 2 for row in rows], {"linestyle": "--", "marker": "s"}
            label = f"{text}, the same tokens"
            axes.plot(middles, [row["loss"] for row in rows], label=label, color=line.get_color(), **style)
    axes.set(xscale="log", xlabel="position in tokens", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_depths(figure: Figure, axes: Axes, rows: list[dict]) -> None:
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
    shares = {(row["depth"], row["length"]): row["exact"] for row in rows}
    grid = [[shares[depth, length] for length in lengths] for depth in depths]
    image = axes.imshow(grid, vmin=0.0, vmax=1.0, aspect="auto", cmap="viridis")
    axes.set(xlabel="tokens of the document", ylabel="share of the text in front of the needle")
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(depths)), depths)
    figure.colorbar(image, ax=axes, label="share answered wholly")
