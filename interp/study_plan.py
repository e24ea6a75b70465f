"""The cells of a study: which model reads which documents, how long, with what frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["SETTINGS", "Cell", "Setting", "Shape", "StudyModel", "plan_cells", "share_out"]

NEEDLE_DEPTHS = (0.0, 0.5, 0.9)
FREEZE_FAMILIES = ("single", "leave-one-in", "prefix", "suffix", "thirds", "presets", "random")


@dataclass(frozen=True)
class StudyModel:
    """A model of a study: `name` (a folder name), `path` or Hub id, and `untrained`, a seed for random weights."""

    name: str
    path: str
    untrained: int | None = None


@dataclass(frozen=True)
class Setting:
    """How much is read, per model and sample.

    Lengths in tokens, numbers of documents per sample: `text` for buckets, surprisal and inner losses; `sweep` and
    `needle` for freezing; `long` for the burn-in and its controls; `repeated` for drift; `context` for the use of a
    long context (models that are no TTT models: up to the length they were trained for). A length of 0 leaves that
    part out. `heads`: parts in which single heads are frozen, too. `controls`: of the burn-in, for every model;
    `first_controls`: for the first one only. `skip_shares`: of writes left out.
    """

    samples: int = 2
    text: tuple[int, int] = (2048, 5)
    sweep: tuple[int, int] = (512, 8)
    needle: tuple[int, int] = (384, 9)
    long: tuple[int, int] = (8192, 5)
    repeated: tuple[int, int] = (2048, 2)
    context: tuple[int, int] = (32768, 1)
    random_subsets: int = 8
    heads: tuple[str, ...] = ("needle",)
    controls: tuple[str, ...] = ("iid",)
    first_controls: tuple[str, ...] = ("shuffled", "middle", "carried")
    skip_shares: tuple[float, ...] = (0.5, 0.9)
    skip_rounds: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        for name in ("text", "sweep", "needle", "long", "repeated", "context"):
            length, number = getattr(self, name)
            if length < 0 or number < 1:
                raise ValueError(f"{name} must be (tokens from 0, documents from 1), got {(length, number)}")


SETTINGS = {
    "smoke": Setting(
        text=(256, 5),
        sweep=(128, 5),
        needle=(128, 5),
        long=(512, 5),
        repeated=(256, 2),
        context=(1024, 1),
        random_subsets=2,
        heads=(),
        skip_shares=(0.5,),
    ),
    "small": Setting(),
    "full": Setting(
        samples=4,
        text=(8192, 6),
        sweep=(2048, 8),
        needle=(2048, 24),
        long=(16384, 4),
        repeated=(16384, 4),
        context=(32768, 3),
        random_subsets=32,
        heads=("sweep", "needle"),
        controls=("iid", "shuffled", "middle", "carried"),
        first_controls=(),
        skip_shares=(0.1, 0.25, 0.5, 0.75, 0.9),
        skip_rounds=3,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One model and one sample of documents.

    kind: "run" (a run folder), "losses" (surprisal only, for models without TTT layers) or "skip" (writes left out).
    corpus: `kind` ("text" or "needle"), `length`, `number`, `sample`, `control` (None: the text itself).
    families: of freezings; stats: whether inner diagnostics are kept; cost: in tokens read, for sharing out.
    """

    model: StudyModel
    kind: str
    part: str
    corpus: dict[str, Any]
    families: tuple[str, ...] = ()
    stats: bool = False
    cost: float = field(default=0.0, compare=False)

    @property
    def folder(self) -> str:
        """Where it lies below the folder of the cells."""
        return f"{self.model.name}/{self.part}-{self.corpus['sample']}"

    def arguments(self) -> dict[str, Any]:
        """What the cell depends on, ready for JSON."""
        described = asdict(self)
        described.pop("cost")
        return described


@dataclass(frozen=True)
class Shape:
    """What of a model its cells depend on: TTT layers (0 for other models), heads, tokens it was trained for."""

    layers: int
    heads: int
    context: int


def plan_cells(models: Sequence[tuple[StudyModel, Shape]], setting: Setting) -> list[Cell]:
    """List the cells of a study.

    A model without TTT layers is read without freezing and plasticity, and only where losses say something; an
    untrained one without freezing.
    """
    cells: list[Cell] = []
    first = next((model for model, shape in models if shape.layers and model.untrained is None), None)
    for model, shape in models:
        for sample in range(setting.samples):
            if shape.layers == 0:
                cells += _plain_cells(model, shape, setting, sample)
            else:
                cells += _cells(model, shape, setting, sample, model == first)
    return [cell for cell in cells if cell.corpus["length"] > 0]


def share_out(cells: Sequence[Cell], processes: int) -> list[list[Cell]]:
    """Give every process its cells, the dearest first, so that all take about as long; the same in every process."""
    shares: list[list[Cell]] = [[] for _ in range(processes)]
    load = [0.0] * processes
    for cell in sorted(cells, key=lambda cell: (-cell.cost, cell.folder)):
        least = load.index(min(load))
        shares[least].append(cell)
        load[least] += cell.cost
    return shares


def _cells(model: StudyModel, shape: Shape, setting: Setting, sample: int, first: bool) -> list[Cell]:
    def cell(part: str, size: tuple[int, int], **options: Any) -> Cell:
        kind = options.pop("kind", "run")
        source, control = options.pop("source", "text"), options.pop("control", None)
        families = options.get("families", ())
        if part in setting.heads:
            options["families"] = families = (*families, "heads")
        corpus = {"kind": source, "length": size[0], "number": size[1], "sample": sample, "control": control}
        passes = (2.2 if options.get("stats") else 1.0) + _passes(families, shape, setting.random_subsets)
        if kind == "skip":
            passes = 2.2 + len(setting.skip_shares) * (2.2 * setting.skip_rounds + 1)
        cost = size[0] * size[1] * passes * (2.0 if control == "carried" else 1.0)
        return Cell(model, kind, part, corpus, cost=cost, **options)

    if model.untrained is not None:
        return [cell("text", setting.text, stats=True), cell("long", setting.long)]
    controls = (*setting.controls, *(setting.first_controls if first else ()))
    return [
        cell("text", setting.text, stats=True, families=("thirds",)),
        cell("long", setting.long, families=("all",)),
        cell("sweep", setting.sweep, families=FREEZE_FAMILIES),
        cell("needle", setting.needle, families=FREEZE_FAMILIES, source="needle"),
        cell("repeated", setting.repeated, stats=True, control="repeated"),
        cell("context", setting.context),
        cell("skip", setting.sweep, kind="skip"),
        *(cell(f"long-{name}", setting.long, control=name) for name in controls),
    ]


def _plain_cells(model: StudyModel, shape: Shape, setting: Setting, sample: int) -> list[Cell]:
    parts: Mapping[str, tuple[tuple[int, int], str]] = {
        "needle": (setting.needle, "needle"),
        "long": ((min(setting.long[0], shape.context), setting.long[1]), "text"),
    }
    cells = []
    for part, (size, source) in parts.items():
        corpus = {"kind": source, "length": size[0], "number": size[1], "sample": sample, "control": None}
        # Attention takes longer the longer the text is: about twice as long at 8,192 tokens.
        cost = size[0] * size[1] * (1 + size[0] / 8192)
        cells.append(Cell(model, "losses", part, corpus, cost=cost))
    return cells


def _passes(families: Sequence[str], shape: Shape, random_subsets: int) -> float:
    """About how many freezings the families hold."""
    if not families or tuple(families) == ("all",):
        return len(families)
    passes = 1.0 + ("heads" in families) * shape.heads * shape.layers
    if "single" in families:
        return passes + min(2**shape.layers - 2, 4 * shape.layers + 5 * random_subsets)
    return passes + 3 * ("thirds" in families)
