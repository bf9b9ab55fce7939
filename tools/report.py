"""A run's report again, or several runs compared on one page.

    python -m tools.report output
    python -m tools.report output_full output_lora --output comparison.html

Reads what the runs have left in their output folders, finished or not, and computes nothing on a GPU. Others are
compared with the first folder's run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError, raise_all, run
from common.report import COMPARISON, REPORT, render


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; all missing folders reported at once."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description="Render the report of a run, or compare several runs on one page.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", metavar="OUTPUT_DIR", nargs="+", type=Path, help="--output_dir of a run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the page (OUTPUT_DIR/{REPORT}, of several runs {COMPARISON})"
    )
    options = parser.parse_args(words)
    raise_all([f"{folder}: there is no such folder" for folder in options.folders if not folder.is_dir()])
    if options.output is None:
        options.output = options.folders[0] / (REPORT if len(options.folders) == 1 else COMPARISON)
    return options


def main(words: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    options = parse(words)
    try:
        print(render(options.folders, options.output))
    except OSError as error:
        raise UserError(f"{options.output} cannot be written ({error}): choose another with --output") from error


if __name__ == "__main__":
    run(main)
