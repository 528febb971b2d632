"""Publish teacher scores, and train on someone else's: import a run, publish it, verify it, open it elsewhere.

python examples/publish_teacher_scores.py path/to/run.trec
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from structkd import scores
from structkd.trec import read_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()

    queries, documents, values = read_run(arguments.run).pairs()
    with TemporaryDirectory() as folder:
        work = Path(folder)
        spec = scores.TeacherSpec(model=arguments.run.name, head="score")
        scores.write_pairs(work / "store", spec, queries, documents, values.astype("float32"))
        scores.publish(work / "store", to=work / "bundle", license="CC-BY-4.0")
        print("verified:", scores.verify(work / "bundle").ok)

        bundle = scores.open(work / "bundle", expect=spec)  # refuses another teacher, naming the differing field
        print(f"{len(bundle)} pairs; first query's best documents: {bundle.list(bundle.query_ids[0])[0][:3]}")


if __name__ == "__main__":
    main()
