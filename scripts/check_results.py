"""Check a run folder and print one line per check; end with status 1 when a check fails.

    python scripts/check_results.py results/demo
    python scripts/check_results.py results/demo --require_decay --verbose

SUCCESS and FAILED lines are checks that a healthy run must pass: the folder can be read, shapes, finite values,
buckets, totals, layers that write, freezing that has an effect, and buckets that can be told apart at like
positions in some layer (a FINDING with --allow_equal_buckets, for runs of few tokens or untrained models). FINDING
lines report what may be either way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from _results import parse_with_folder
from _shared import option, run

from interp.checks import CheckResult, run_checks


@dataclass
class CheckArguments:
    """Check a run folder; the status is 1 when a check fails."""

    run_folder: str = option(help="folder with run.json and tokens-*.parquet")
    allow_equal_buckets: bool = option(False, "do not fail when no two buckets can be told apart in any layer")
    require_decay: bool = option(False, "fail unless plasticity falls from the first to the last 100 tokens")
    verbose: bool = option(False, "print every layer and pair of buckets also where nothing failed")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the checks; return 1 when one failed."""
    arguments = parse_with_folder(CheckArguments, argv)
    results = run_checks(
        arguments.run_folder,
        require_buckets=not arguments.allow_equal_buckets,
        require_decay=arguments.require_decay,
    )
    for result in results:
        whole = arguments.verbose or result.failed
        print(f"{_status(result)} {result.name}: {result.message if whole else result.message.splitlines()[0]}")
    failed = sum(result.failed for result in results)
    print(f"{failed} of {len(results)} checks failed" if failed else f"all {len(results)} checks done, none failed")
    return int(failed > 0)


def _status(result: CheckResult) -> str:
    if not result.required:
        return f"FINDING ({'yes' if result.passed else 'no'})"
    return "SUCCESS" if result.passed else "FAILED"


if __name__ == "__main__":
    run(main)
