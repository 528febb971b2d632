"""From sentence-transformers' Margin-MSE to structkd and back: the same data set in, the same kind of folder out.

There, a data set has (query, positive, negative, label = margin), and the trainer learns from it:

    trainer = SentenceTransformerTrainer(model, train_dataset=dataset, loss=MarginMSELoss(model))
    trainer.train()
    model.save_pretrained("out")

Here, the same rows become lists in a score store (every pair once, checked, reusable by any student and objective), and
the student that comes out loads in sentence-transformers with equal scores. Offline, in seconds:

    python examples/from_sentence_transformers.py
"""

import tempfile
from pathlib import Path

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from structkd import ranking, scores


def user_dataset(collection: ranking.Collection) -> Dataset:
    """Stands for yours: margins that some cross-encoder gave (here: word overlap)."""
    rows = []
    for query, judged in list(collection.qrels.items())[:60]:
        (text,) = [collection.queries.texts[row] for row in collection.queries.ids.rows([query])]
        positive = next(iter(judged))
        for negative in collection.documents.ids.strings([3, 50, 200, 400]):
            margin = overlap(text, positive, collection) - overlap(text, negative, collection)
            rows.append({"query_id": query, "positive_id": positive, "negative_id": negative, "score": margin})
    return Dataset.from_list([row for row in rows if row["positive_id"] != row["negative_id"]])


def overlap(text: str, document: str, collection: ranking.Collection) -> float:
    words = set(collection.documents.texts[int(collection.documents.ids.rows([document])[0])].lower().split())
    return float(len(words & set(text.lower().split())))


def main() -> None:
    collection = ranking.load("pydocs", "train")
    dataset = user_dataset(collection)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dataset.to_parquet(work / "margins.parquet")

        # the migration: your rows -> a store -> a student of any kind, by any objective
        scores.import_file(
            work / "margins.parquet", work / "store", format="hf-margin", teacher_name="my-cross-encoder"
        )
        store = scores.open(work / "store")
        student = ranking.student("static", documents=collection.documents)
        config = ranking.DistillConfig(objective="margin-mse", epochs=1, held_out=0.0, validate_on="none")
        result = ranking.distill(
            student, scores.StoredScorer(scores.open(work / "store"), match="id"), collection, config
        )
        result.student.save(work / "student")
        print(f"{len(dataset)} margins -> {len(store)} pairs -> {result.metrics['steps']} steps")

        # and back: the folder is sentence-transformers' own
        model = SentenceTransformer(str(work / "student"))
        texts = ["read a file line by line", "open a socket"]
        theirs = model.encode(texts, normalize_embeddings=True)
        ours = result.student.encode(texts, "query")
        print("same vectors in sentence-transformers:", bool(np.allclose(theirs, ours, atol=1e-5)))


if __name__ == "__main__":
    main()
