"""What a published folder says about itself: the data-set card in the hub's format, and Croissant metadata."""

from pathlib import Path
from typing import Any

from structkd.files import sha256_file
from structkd.scores.manifest import ScoreManifest

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))  # fmt: skip
# what a reader must know of a teacher, also where nobody said it
_TEACHER_FIELDS = ("model", "revision", "prompt", "max_length", "truncation", "head", "dtype")


def card(manifest: ScoreManifest, title: str) -> str:
    """README.md: YAML head, what the scores are, how to check and to use them."""
    teacher = {name: manifest.teacher.get(name, "not stated") for name in _TEACHER_FIELDS} | manifest.teacher
    rows = "\n".join(f"| {name} | `{value}` |" for name, value in teacher.items())
    pairs = manifest.kind == "pairs"
    size = next((name for limit, name in _SIZES if manifest.counts["rows"] < limit), "n>1B")
    configs = "configs:\n- config_name: default\n  data_files: data/*.parquet\n" if pairs else ""
    task = "task_categories:\n- text-ranking\n" if pairs else "task_categories:\n- graph-ml\n"
    notes = "".join(f"- {note}\n" for note in manifest.notes)
    return f"""---
license: {str(manifest.license).lower()}
pretty_name: {_quoted(f"Teacher scores: {title}")}
{task}size_categories:
- {size}
tags:
- knowledge-distillation
- teacher-scores
{configs}---

# Teacher scores: {title}

{_what(manifest)}

## Teacher

| field | value |
|---|---|
{rows}

Fingerprint `{manifest.teacher_fp}`: scores of another fingerprint are never mixed with these.

## Scores

{_statistics(manifest)}

Scores are raw teacher output, not rescaled. Rounding to {manifest.dtype} changed them by at most
{manifest.quant_error["max"]:.3g} ({manifest.quant_error["rms"]:.3g} root mean square).

## Layout

{_layout(manifest)} `manifest.json` holds the SHA-256 of every file, `croissant.json` the Croissant metadata.

{notes}
## Check

    structkd scores verify path/to/this/folder

reads every byte and finds any that changed, and any file that is missing or foreign.

## Train on it

{_training(pairs)}

## Licence

{manifest.license}

## Citation

{manifest.citation or "No citation was given."}
"""


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _what(manifest: ScoreManifest) -> str:
    counts = manifest.counts
    if manifest.kind == "pairs":
        return f"{counts['rows']:,} scores of (query, document) pairs, {counts['queries']:,} queries."
    return f"Logits of {counts['rows']:,} graph nodes (graph {manifest.inputs['graph_fp'][:16]})."


def _statistics(manifest: ScoreManifest) -> str:
    flat = {name: value for name, value in manifest.stats.items() if isinstance(value, float)}
    flat |= {f"quantile {name}": value for name, value in manifest.stats.get("quantiles", {}).items()}
    flat |= {f"margin {name}": value for name, value in manifest.stats.get("margin", {}).items()}
    return "\n".join(
        ["| statistic | value |", "|---|---|", *(f"| {name} | {value:.5g} |" for name, value in flat.items())]
    )


def _layout(manifest: ScoreManifest) -> str:
    if manifest.kind == "pairs":
        return (
            "`data/*.parquet`: `query_id`, `document_ids` (list), `scores` (list, float32 rounded to "
            f"{manifest.dtype}). `ids/*.parquet`: id and the first 16 bytes of the SHA-256 of its text."
        )
    if "top" in manifest.inputs:
        return "`data/*.safetensors`: `topk_idx`, `topk_val` [nodes, k] and `rest` [nodes], log-sum-exp of the others."
    return "`data/*.safetensors`: `logits` [nodes, classes], float32."


def _training(pairs: bool) -> str:
    if pairs:
        return (
            "    structkd ranking distill --collection DIR --scores path/to/this/folder --student dot --init MODEL "
            '--out RUN\n\nNo teacher is needed. In Python, `scores.open("path/to/this/folder").lookup(query_ids,\n'
            "document_ids)`; other tools read the parquet files directly."
        )
    return "    structkd graph distill --dataset NAME --scores path/to/this/folder --method ff-g2m --out RUN"


def croissant(manifest: ScoreManifest, folder: Path, title: str) -> dict[str, Any]:
    """croissant.json (Croissant 1.0): every data file with its SHA-256, and the columns of the score table."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".parquet", ".safetensors"))
    distribution: list[dict[str, Any]] = [
        {
            "@type": "cr:FileObject",
            "@id": path.relative_to(folder).as_posix(),
            "name": path.relative_to(folder).as_posix(),
            "contentUrl": path.relative_to(folder).as_posix(),
            "contentSize": f"{path.stat().st_size} B",
            "encodingFormat": _ENCODING[path.suffix],
            "sha256": sha256_file(path),
        }
        for path in files
    ]
    value: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"Teacher scores: {title}",
        "description": _what(manifest),
        "license": str(manifest.license),
        "url": ".",
        "version": f"{manifest.snapshot}.0.0",
        "datePublished": manifest.created_at,
        "distribution": distribution,
    }
    if manifest.citation:
        value["citeAs"] = manifest.citation
    if manifest.kind == "pairs":
        # one record set a file: a file set would need an archive that holds the files
        value["recordSet"] = [_record_set(entry["@id"]) for entry in distribution if entry["@id"].startswith("data/")]
    return value


def _record_set(file: str) -> dict[str, Any]:
    name = Path(file).stem
    columns = (
        ("query_id", "sc:Text", False, "Query."),
        ("document_ids", "sc:Text", True, "Its documents."),
        ("scores", "sc:Float", True, "The teacher's score of each."),
    )
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": "One query a row, with parallel lists of documents and scores.",
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{name}/{column}",
                "name": column,
                "description": what,
                "dataType": kind,
                **({"repeated": True} if repeated else {}),
                "source": {"fileObject": {"@id": file}, "extract": {"column": column}},
            }
            for column, kind, repeated, what in columns
        ],
    }


_ENCODING = {".parquet": "application/x-parquet", ".safetensors": "application/octet-stream"}
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
