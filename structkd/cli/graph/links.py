"""structkd graph links: edges instead of nodes, a graph teacher and MLPs that score pairs without the graph."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from structkd import graph
from structkd.cli.output import Common, Output, Table
from structkd.errors import UsageError

LinkFlags = Annotated[graph.LinkConfig, Parameter(name="*")]


def links(
    *,
    dataset: str,
    data_root: Path | None = None,
    methods: str = "mlp,llp",
    seeds: int = 1,
    out: Path,
    config: LinkFlags = graph.LinkConfig(),
    common: Common = Common(),
) -> Output:
    """Link prediction over seeds: a GraphSAGE teacher, an MLP on edges alone, and LLP; continues where it stopped.

    Parameters
    ----------
    dataset: as for `graph bench`; its labels are not used.
    data_root: folder with torch_geometric's raw layouts.
    methods: comma list of mlp and llp.
    seeds: how many splits of the edges, counted from --seed.
    out: run folder.
    """
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: expected 1 or more.")
    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    chosen = tuple(range(common.seed, common.seed + seeds))
    root = None if data_root is None else str(data_root)
    value = graph.bench_links(graph.LinkBenchConfig(dataset, root, names, chosen, config), out)
    shown = [{key: item for key, item in row.items() if key != "auc"} for row in value["rows"]]
    return Output({**value, "run": str(out)}, [Table(f"{dataset}: links held out, {seeds} seeds", shown)])
