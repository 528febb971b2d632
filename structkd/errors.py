"""Every error that structkd raises on purpose.

    StructKDError
    |-- UsageError            the call itself is wrong (command line: exit status 2)
    |-- DataError             what was read is not what was promised (exit status 1)
    |   |-- CorruptFileError      bytes differ from their checksum, or a file is cut
    |   |-- MissingScoreError     the store lacks pairs or nodes that were asked for
    |   `-- ConflictingScoresError  one key, one teacher, two values
    |-- TeacherMismatchError  a cache belongs to another teacher; names the differing fields
    |-- MissingExtraError     an optional package is absent; names its install line
    `-- DeviceError           the device asked for is absent or too small

A message says what was found, what was expected, where, and what to do, in one line.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class StructKDError(Exception):
    """Base of all errors of this package."""


class UsageError(StructKDError, ValueError):
    """The call is wrong: an unknown name, or options that exclude each other."""


class DataError(StructKDError, ValueError):
    """A file, array or folder does not hold what it should."""


class CorruptFileError(DataError):
    """A stored file differs from its checksum, or ends too early."""


class MissingScoreError(DataError):
    """The store has no score for some of the keys asked for.

    Attributes:
        count: how many keys are missing.
        examples: up to three of them.
    """

    def __init__(self, count: int, examples: Sequence[object], where: str, todo: str) -> None:
        self.count = count
        self.examples = tuple(examples)[:3]
        shown = ", ".join(map(str, self.examples))
        super().__init__(f"{where}: {count} missing, for example {shown}. {todo}")


class ConflictingScoresError(DataError):
    """The same key was scored twice by one teacher with two different values.

    Attributes:
        pair: query and document id of one such key, where it is a pair.
    """

    def __init__(self, message: str, pair: tuple[str, str] | None = None) -> None:
        self.pair = pair
        super().__init__(message)


class TeacherMismatchError(StructKDError):
    """A cache was written by another teacher than the one asked for.

    Attributes:
        fields: name of each differing field -> (found in the cache, expected).
    """

    def __init__(self, where: str, fields: dict[str, tuple[object, object]]) -> None:
        self.fields = dict(fields)
        shown = "; ".join(f"{name}: found {found!r}, expected {want!r}" for name, (found, want) in fields.items())
        super().__init__(f"{where} belongs to another teacher ({shown}). Use another folder for this teacher.")


class MissingExtraError(StructKDError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed. Run: pip install 'structkd[{extra}]'")


class DeviceError(StructKDError, RuntimeError):
    """The device asked for does not exist, or the work does not fit on it."""


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that looks like it, or nothing."""
    names = {name.lower(): name for name in known}
    near = get_close_matches(found.lower(), names, n=1, cutoff=0.6)
    return f" Did you mean {names[near[0]]}?" if near else ""
