"""`cellflux-bridge report`"""

import argparse
from pathlib import Path

from cellflux_bridge.cli.places import tell_written


def run(args: argparse.Namespace) -> None:
    """report RUN ...: write one HTML page about evaluated runs, and figures for a paper beside it."""
    from cellflux_bridge.report.page import write_report

    runs = [Path(text) for text in (args.config, *args.overrides)]
    page, figures = write_report(runs, args.output or runs[0] / "report.html", num_sequences=args.sequences)
    tell_written(figures)
    print(f"open in a browser: {page.resolve()}")
