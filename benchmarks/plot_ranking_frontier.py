"""One picture of quality, speed and size of the students and the teacher: results/ranking_frontier_wikiqa.svg.

    python benchmarks/plot_ranking_frontier.py

Reads ranking_frontier_wikiqa.json. Right is fast, up is good, the area of a point grows with the logarithm of the bytes
kept per document.
"""

import json

import matplotlib
import numpy as np
from origin import RESULTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    value = json.loads((RESULTS / "ranking_frontier_wikiqa.json").read_text(encoding="utf-8"))
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row in value["rows"]:
        teacher = row["model"].startswith("teacher")
        place = (row["queries_per_second"], row["nDCG@10"])
        area = 60 * np.log10(row["bytes_per_document"])
        axes.scatter(*place, s=area, color="tab:orange" if teacher else "tab:blue", alpha=0.7, linewidths=0)
        label = f"{row['model']}\n{row['bytes_per_document']:,.0f} B"
        axes.annotate(label, place, xytext=(9, 9), textcoords="offset points", fontsize=8, va="center")
    axes.set(
        xscale="log", xlim=(5, 4000), ylim=(0.1, 0.8), xlabel="queries per second, 16 candidates, one CPU thread",
        ylabel="nDCG@10", title="WikiQA dev: quality, speed, bytes kept per document",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    plt.rcParams["svg.hashsalt"] = "structkd"  # the same picture from the same figures
    figure.savefig(RESULTS / "ranking_frontier_wikiqa.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
