"""`structkd report`."""

from pathlib import Path

from structkd import report as reports
from structkd.cli.output import Common, Output


def report(runs: tuple[Path, ...], *, out: Path = Path("report.html"), common: Common = Common()) -> Output:
    """Draw one self-contained HTML report of run folders.

    Args:
        runs: Run folders, as commands write them with --out.
        out: The HTML file to write.
    """
    path = reports.write(runs, out)
    return Output({"report": str(path)}, lines=[f"report: {path}"])
