"""`structkd quickstart`."""

from pathlib import Path

from structkd import quickstart as first_contact
from structkd.cli.output import Common, Output, Table


def quickstart(*, out: Path = Path("structkd-quickstart"), common: Common = Common()) -> Output:
    """Run both halves on embedded data, offline, and write one HTML report.

    Args:
        out: Folder for the run folders, teacher scores and report.html.
    """
    result = first_contact.quickstart(out, common.seed)
    return Output(
        {"graph": result.graph, "ranking": result.ranking, "report": str(result.report)},
        [
            Table("Graph: handwritten digits, few labels, gcn teacher to MLP", result.graph_rows),
            Table("Ranking: Python's documentation strings, nDCG@10 on held-out queries", result.ranking_rows),
        ],
        [f"speedup of the MLP over its teacher: {result.graph['speedup']:.0f}x", f"report: {result.report}"],
    )
