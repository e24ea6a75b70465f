"""Draw the four figures of a run folder and write their tables, captions and the coloured text beside them.

    python scripts/plot_results.py results/demo
    python scripts/plot_results.py results/demo --output_dir figures

Leave plasticity_heatmap.png, surprisal.png, buckets.png, perplexity.png, their tables as CSV, captions.json and
text.html (by default in RUN_FOLDER/figures), and print what the figures say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _results import parse_with_folder
from _shared import option, run

from interp.report import write_report
from interp.run_folder import read_run
from interp.statistics import Bootstrap
from interp.text_view import MAX_DOCUMENTS, MAX_TOKENS


@dataclass
class PlotArguments:
    """Draw the figures of a run folder and print what they say, with confidence intervals."""

    run_folder: str = option(help="folder with run.json and tokens-*.parquet")
    output_dir: str | None = option(None, "folder for the figures, instead of figures in the run folder")
    n_boot: int = option(2000, "resamples behind every interval, 80 at least")
    seed: int = option(0, "seed of the resamples")
    max_documents: int = option(MAX_DOCUMENTS, "documents in the coloured text")
    max_tokens: int = option(MAX_TOKENS, "tokens per document in the coloured text")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report of a run and print its summary."""
    arguments = parse_with_folder(PlotArguments, argv)
    folder = Path(arguments.output_dir or Path(arguments.run_folder) / "figures")
    report = write_report(
        read_run(arguments.run_folder),
        folder,
        boot=Bootstrap(n_boot=arguments.n_boot, seed=arguments.seed),
        max_documents=arguments.max_documents,
        max_tokens=arguments.max_tokens,
    )
    print(report.summary)
    print(f"{len(report.files)} files in {folder}")


if __name__ == "__main__":
    run(main)
