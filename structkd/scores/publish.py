"""Publish a store as portable files, verify a store or a published folder to the last byte, remove leftovers."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from structkd.errors import DataError, StructKDError, UsageError
from structkd.files import inside, sha256_file, sync_file, sync_folder, write_json, write_text
from structkd.progress import track
from structkd.scores import bundle
from structkd.scores.card import card, croissant
from structkd.scores.compaction.merge import first_of_each
from structkd.scores.compaction.statistics import Summary
from structkd.scores.layout.part_list import PartList, names_digest
from structkd.scores.layout.parts import check_part, part_names
from structkd.scores.layout.sealed import read_parquet, sealed_bytes, temporary
from structkd.scores.layout.snapshot import Csr, file_entry, manifest_path, snapshot_numbers, write_rows
from structkd.scores.layout.topk import write_topk
from structkd.scores.manifest import HEADER, PUBLISHED, Header, Problem, Report, ScoreManifest, now
from structkd.scores.nodes import NodeScores
from structkd.scores.pairs import PairScores
from structkd.scores.store import open as open_store

_TEMPORARY = ".tmp-"
_TTL_SECONDS = 86_400.0
_DATA_NAME = re.compile(r"^(csr|rows)-\d{5}-([0-9a-f]{16})\.(arrow|safetensors)$")
_PARTS_NAME = re.compile(r"^\d{8}-([0-9a-f]{16})\.parts$")
_ID_NAME = re.compile(r"^(queries|docs)-(\d{5})\.parquet$")


# publish


def publish(
    folder: str | Path,
    to: str | Path,
    license: str,
    *,
    citation: str | None = None,
    title: str | None = None,
    top: int | None = None,
) -> ScoreManifest:
    """Write a store's scores as a folder for others: data, manifest with checksums, data-set card.

    The folder appears at once, complete; `scores.open` reads it and students train from it without the teacher.
    Published again with nothing changed, the folder stays as it is.

    Args:
        folder: a score store or a published folder.
        to: the new folder.
        license: of the scores, for example CC-BY-4.0 (an SPDX name); the teacher's and the corpus's terms bind it.
        citation: text or BibTeX to cite.
        title: of the card; default: the teacher's name.
        top: of node logits, how many classes of each node are published (see `topk`); all by default.

    Raises:
        UsageError: no licence given; `top` for pairs.
        DataError: `to` holds something else.
    """
    if not license.strip():
        raise UsageError("publish: the licence is empty. Name one, for example CC-BY-4.0.")
    store, target = open_store(folder), Path(to)
    manifest = _draft(store, license, citation, top)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        return _published_before(target, manifest)
    draft = temporary(target.resolve().parent)
    try:
        entries = _write_pairs(draft, store) if isinstance(store, PairScores) else _write_nodes(draft, store, top)
        name = title or store.spec.model
        write_json(draft / "croissant.json", croissant(manifest, draft, name))
        write_text(draft / "README.md", card(manifest, name))
        entries += [file_entry(draft, draft / written) for written in ("croissant.json", "README.md")]
        manifest = replace(manifest, files=entries)
        write_json(draft / PUBLISHED, manifest.to_json())
        for path in draft.rglob("*"):
            (sync_folder if path.is_dir() else sync_file)(path)
        if target.exists():
            target.rmdir()
        os.rename(draft, target)
        sync_folder(target.resolve().parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def _draft(store: PairScores | NodeScores, license: str, citation: str | None, top: int | None) -> ScoreManifest:
    """The manifest without its files."""
    rows, lists, stats = summarise(store)
    inputs = {}
    if isinstance(store, NodeScores):
        inputs = {"graph_fp": store.graph_fingerprint, "classes": str(store.logits.shape[1])}
        if top is not None:
            inputs["top"] = str(top)
    elif top is not None:
        raise UsageError("publish: top is for node logits; a store of pairs holds lists, not classes.")
    old = store.manifest
    return ScoreManifest(
        kind=store.spec.kind,
        snapshot=old.snapshot if old else 0,
        parent=old.parent if old else None,
        teacher=store.spec.fields(),
        teacher_fp=store.spec.fingerprint,
        provenance=old.provenance if old else {},
        inputs=inputs,
        parts={name: old.parts[name] for name in ("count", "names")}
        if old
        else {"count": 0, "names": names_digest(())},
        files=[],
        counts={"rows": rows, "queries": lists, "duplicates_dropped": 0, "failed": 0},
        stats=stats,
        dtype=store.dtype,
        quant_error=old.quant_error if old else {"max": 0.0, "rms": 0.0},
        created_at=now(),
        license=license,
        citation=citation,
        notes=old.notes if old else [],
    )


def summarise(store: PairScores | NodeScores) -> tuple[int, int, dict[str, Any]]:
    """Rows, lists and statistics of what a store shows: its manifest's, unless it shows more or less than that."""
    if isinstance(store, NodeScores):
        if store.manifest is not None:
            return len(store), 0, store.manifest.stats
        summary = Summary()
        summary.add(store.logits, store.logits)
        return len(store), 0, summary.stats()
    if store.manifest is not None and store.whole:
        return store.manifest.counts["rows"], store.manifest.counts["queries"], store.manifest.stats
    summary = Summary()
    queries, documents, scores = store.rows()
    starts = first_of_each(queries)
    if len(starts):
        summary.add(scores, scores)
        offsets = np.append(starts, len(queries)).astype(np.int32)
        summary.add_margins([Csr(queries[starts].astype(np.uint32), offsets, documents.astype(np.uint32), scores)])
    return len(scores), len(starts), summary.stats()


def _published_before(target: Path, manifest: ScoreManifest) -> ScoreManifest:
    """The manifest of an existing folder when it publishes the same; DataError otherwise."""
    if (target / PUBLISHED).is_file():
        found = ScoreManifest.read(target / PUBLISHED)
        volatile = {"files", "created_at"}
        same = {name: value for name, value in asdict(found).items() if name not in volatile}
        if same == {name: value for name, value in asdict(manifest).items() if name not in volatile}:
            return found
    raise DataError(f"{target}: exists and holds something else. Publish to a new folder.")


def _write_pairs(draft: Path, store: PairScores) -> list[dict[str, Any]]:
    files = bundle.write_pairs(draft, store.queries, store.documents, store.rows())
    ids = [file_entry(draft, draft / "ids" / f"{name}.parquet") for name in ("queries", "docs")]
    return [*(file_entry(draft, path, rows=rows) for path, rows in files), *ids]


def _write_nodes(draft: Path, store: NodeScores, top: int | None) -> list[dict[str, Any]]:
    if top is not None:
        write_topk(draft / "data" / "topk-00000.safetensors", store.logits, top)
        return [file_entry(draft, draft / "data" / "topk-00000.safetensors", rows=len(store), lo=0, hi=len(store))]
    path = write_rows(draft / "data", "logits-00000", store.logits)
    plain = path.rename(draft / "data" / "logits-00000.safetensors")
    return [file_entry(draft, plain, rows=len(store), lo=0, hi=len(store))]


# verify


def verify(folder: str | Path) -> Report:
    """Read every byte of a store or published folder and compare it with its checksums.

    Found are: changed, cut, absent and foreign files, parts of another teacher, gaps in the id tables, manifests that
    name files outside the folder. A part that no manifest names yet is covered by the digest in its own footer.
    """
    folder = Path(folder)
    if (folder / PUBLISHED).is_file():
        checks = _published_checks(folder)
    elif (folder / HEADER).is_file():
        checks = _store_checks(folder)
    else:
        raise DataError(f"{folder}: neither {HEADER} nor {PUBLISHED} there; expected a folder of teacher scores.")
    problems, files = [], 0
    for path, check in track(checks, "checking files", late=True):
        files += 1
        try:
            if message := check():
                problems.append(Problem(path, message))
        except FileNotFoundError:
            problems.append(Problem(path, "absent, though the manifest names it"))
        except (StructKDError, OSError) as error:
            problems.append(Problem(path, str(error)))
    return Report(files, tuple(problems))


Checks = Iterator[tuple[str, Callable[[], str | None]]]


def _published_checks(folder: Path) -> Checks:
    try:
        manifest = ScoreManifest.read(folder / PUBLISHED)
    except StructKDError as error:
        yield PUBLISHED, _fail(str(error))
        return
    yield PUBLISHED, _pass
    yield from _file_checks(folder, manifest)
    named = {entry["path"] for entry in manifest.files} | {PUBLISHED}
    for name in _files(folder):
        if name not in named:
            yield name, _fail("not named in the manifest")


def _store_checks(folder: Path) -> Checks:
    try:
        header = Header.read(folder)
    except StructKDError as error:
        yield HEADER, _fail(str(error))
        return
    yield HEADER, _pass
    manifests = []
    for number in snapshot_numbers(folder):
        path = manifest_path(folder, number)
        try:
            manifests.append(ScoreManifest.read(path))
            yield path.relative_to(folder).as_posix(), _pass
        except StructKDError as error:
            yield path.relative_to(folder).as_posix(), _fail(str(error))
    known: list[int] = []
    for name in ("queries", "docs") if header.spec.kind == "pairs" else ():
        known.append(0)
        paths = sorted((folder / "ids").glob(f"{name}-*.parquet"))
        for number, path in enumerate(paths):
            yield path.relative_to(folder).as_posix(), _segment_check(path, f"{name}-{number:05d}.parquet", known)
    expected: dict[str, str] = {}
    for manifest in manifests:
        try:
            expected |= PartList.read(folder, manifest.parts).digests()
            yield manifest.parts["path"], _pass
        except (StructKDError, OSError) as error:
            yield manifest.parts["path"], _fail(str(error))
    names = part_names(folder)
    for name in names:
        yield f"parts/{name}.parquet", _part_check(folder, name, header, expected.get(name), known)
    for name in sorted(set(expected) - set(names)):
        yield f"parts/{name}.parquet", _fail("absent, though the manifest names it")
    seen = {manifest.parts["path"] for manifest in manifests}
    for manifest in manifests:
        if manifest.teacher_fp != header.spec.fingerprint:
            yield manifest_path(folder, manifest.snapshot).name, _fail("its teacher is not the store's")
        fresh = replace(manifest, files=[entry for entry in manifest.files if entry["path"] not in seen])
        seen |= {entry["path"] for entry in manifest.files}
        yield from _file_checks(folder, fresh)
    yield from _stray_checks(folder, seen)


def _file_checks(folder: Path, manifest: ScoreManifest) -> Checks:
    for entry in manifest.files:
        yield entry["path"], _entry_check(folder, entry)


def _entry_check(folder: Path, entry: dict[str, Any]) -> Callable[[], str | None]:
    def check() -> str | None:
        path = inside(folder, entry["path"])
        if (size := path.stat().st_size) != entry["bytes"]:
            return f"{size} bytes, the manifest says {entry['bytes']}"
        return None if sha256_file(path) == entry["sha256"] else "its bytes differ from the manifest's checksum"

    return check


def _segment_check(path: Path, expected: str, known: list[int]) -> Callable[[], str | None]:
    """Checks a segment of an id table and adds its rows to the last of `known`."""

    def check() -> str | None:
        if path.name != expected:
            return f"follows a gap: {expected} is absent"
        data = sealed_bytes(path)
        table, footer = read_parquet(path, data)
        start, known[-1] = known[-1], known[-1] + len(table)
        whole = footer.get("rows") == str(len(table)) and footer.get("start") == str(start)
        return None if whole else "its rows differ from its footer"

    return check


def _part_check(
    folder: Path, name: str, header: Header, expected: str | None, known: list[int]
) -> Callable[[], str | None]:
    def check() -> str | None:
        digest, needed = check_part(folder, name, header)
        if any(need > have for need, have in zip(needed, known, strict=True)):
            return f"names rows up to {needed} (queries, documents), the id tables hold {known}"
        return "its bytes differ from the manifest's checksum" if expected and expected != digest else None

    return check


def _stray_checks(folder: Path, named: set[str]) -> Checks:
    """Files that no manifest names: leftovers of a crash are sound when their content fits their name."""
    for name in _files(folder):
        parts = name.split("/")
        if name in named or parts[-1].startswith(_TEMPORARY) or name == HEADER:
            continue
        if parts[0] == "data" and (match := _DATA_NAME.match(parts[-1])):
            yield name, _name_check(folder / name, match.group(2))
        elif parts[0] == "snapshots" and (match := _PARTS_NAME.match(parts[-1])):
            yield name, _name_check(folder / name, match.group(1))
        elif parts[0] == "plans" and name.endswith(".parquet"):
            yield name, _plan_check(folder / name)
        elif not (
            (parts[0] == "parts" and name.endswith(".parquet"))
            or (parts[0] == "ids" and _ID_NAME.match(parts[-1]))
            or (parts[0] == "snapshots" and re.fullmatch(r"\d{8}\.json", parts[-1]))
        ):
            yield name, _fail("not a file of a score store")


def _plan_check(path: Path) -> Callable[[], str | None]:
    def check() -> str | None:
        sealed_bytes(path)
        return None

    return check


def _name_check(path: Path, digest: str) -> Callable[[], str | None]:
    def check() -> str | None:
        return None if sha256_file(path).startswith(digest) else "its bytes differ from the checksum in its name"

    return check


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _pass() -> str | None:
    return None


def _fail(message: str) -> Callable[[], str | None]:
    return lambda: message


# gc


def gc(folder: str | Path, *, keep: int = 2, ttl_seconds: float = _TTL_SECONDS) -> list[str]:
    """Remove what a crash left behind and what old snapshots held; returns the removed paths. Parts stay.

    Args:
        folder: a score store.
        keep: newest snapshots to keep; readers of an older one keep their mapped files until they close them.
        ttl_seconds: age below which temporary and unnamed data files stay: another process may be writing them.
    """
    folder = Path(folder)
    Header.read(folder)
    if keep < 1:
        raise UsageError(f"gc: keep={keep}; at least the newest snapshot stays.")
    numbers = snapshot_numbers(folder)
    old = [
        path
        for number in numbers[:-keep]
        for path in (manifest_path(folder, number), *(folder / "snapshots").glob(f"{number:08d}-*.parts"))
    ]
    kept = [ScoreManifest.read(manifest_path(folder, number)) for number in numbers[-keep:]]
    named = {entry["path"] for manifest in kept for entry in (*manifest.files, manifest.parts)}
    limit = time.time() - ttl_seconds
    stale = [
        folder / name
        for name in _files(folder)
        if folder / name not in old
        and (
            name.split("/")[-1].startswith(_TEMPORARY)
            or ((name.startswith("data/") or name.endswith(".parts")) and name not in named)
        )
        and (folder / name).stat().st_mtime < limit
    ]
    for path in [*old, *stale]:  # manifests first, so that none names a file that is gone
        path.unlink(missing_ok=True)
    return [path.relative_to(folder).as_posix() for path in [*old, *stale]]
