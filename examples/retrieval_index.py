"""Build a retrieval index from a distilled student: BM25 teaches static embeddings, an index serves them.

Runs on the embedded collection (Python's documentation strings), or on a folder in BEIR layout:

    python examples/retrieval_index.py
    python examples/retrieval_index.py path/to/scifact
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from structkd import index, ranking, scores
from structkd.ranking.teachers.sources import open_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("collection", nargs="?", default="pydocs")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--queries", type=int, help="train on so many queries; all by default")
    arguments = parser.parse_args()

    collection = ranking.load(arguments.collection)
    collection = collection.with_queries(list(collection.queries.ids)[: arguments.queries])
    student = ranking.student("static", documents=collection.documents)
    with TemporaryDirectory() as folder:
        work = Path(folder)
        teacher = scores.CachedScorer(open_teacher("bm25", collection.documents), work / "scores")
        config = ranking.DistillConfig(objective="margin-mse", epochs=arguments.epochs)
        result = ranking.distill(student, teacher, collection, config)

        vectors = result.student.encode(list(collection.documents.texts), "document")
        built = index.build(vectors, ids=collection.documents.ids, kind="flat", metric="ip", out=work / "index")
        question = "read a file line by line"
        found = built.search(result.student.encode([question], "query"), k=3)
        print(question)
        for name, score in zip(found.document_ids()[0], found.scores[0], strict=True):
            print(f"  {score:.3f}  {name}")


if __name__ == "__main__":
    main()
