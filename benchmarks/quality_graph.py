"""Quality table of the graph half: `graph bench` over datasets, one JSON per row set in benchmarks/results/.

python benchmarks/quality_graph.py --data-root DATA --seeds 5 planetoid:Cora planetoid:CiteSeer
"""

import argparse
import json
import sys
from pathlib import Path

from origin import RESULTS, commit, machine

from structkd import graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--split", default=None)
    parser.add_argument("--setting", default="transductive")
    parser.add_argument("--teacher", default="gcn")
    parser.add_argument("--methods", default="mlp,glnn,lfd,hfd,ff-g2m")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for dataset in arguments.datasets:
        config = graph.BenchConfig(
            dataset, arguments.data_root, arguments.split, arguments.setting, arguments.teacher,
            tuple(arguments.methods.split(",")), tuple(range(arguments.seed, arguments.seed + arguments.seeds)),
        )  # fmt: skip
        write(graph.bench(config), arguments)


def write(found: dict, arguments: argparse.Namespace) -> None:
    """One file per dataset, protocol and teacher, with what is needed to make it again."""
    name = f"{Path(found['dataset']).stem}".replace(":", "-").lower()
    kept = {key: value for key, value in found.items() if key not in ("asked", "out")}
    kept["dataset"] = name if found["dataset"].startswith("npz:") else found["dataset"]
    line = ["structkd", "graph", "bench", "--dataset", kept["dataset"], "--data-root", "DATA"]
    line += ["--split", found["split"], "--setting", found["setting"], "--teacher", arguments.teacher]
    line += ["--methods", arguments.methods, "--seeds", str(arguments.seeds), "--seed", str(arguments.seed)]
    kept |= {"command": " ".join(line), "commit": commit(), "machine": machine()}
    kept["python"] = sys.version.split()[0]
    target = RESULTS / f"graph_{name}_{found['split']}_{found['setting']}_{arguments.teacher}.json"
    target.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    for row in found["rows"]:
        print(f"{name} {row['method']}: {row['test_mean']:.4f} +- {row['test_std']:.4f}")


if __name__ == "__main__":
    main()
