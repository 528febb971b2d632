"""Files that are whole or absent: atomic writes, create-exclusive commits, checksums, paths that stay inside."""

import ctypes
import errno
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from structkd.errors import CorruptFileError, DataError

_CHUNK = 1 << 20
# what link() says where a file system has no hard links (some network and FAT file systems)
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_CLAIM_WAITS, _CLAIM_PAUSE = 100, 0.05


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename or link is not, before its folder is synced)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the bytes of a closed file durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path` (fsync, rename), on error it is removed.

    Readers see the old file or the new one, never a half.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write an indented JSON file atomically; not-a-number is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; DataError names the file and line when it is not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise CorruptFileError(f"{path}{line}: not valid JSON ({error}). Was it cut short?") from None


def create_exclusive(source: str | Path, target: str | Path) -> bool:
    """Give the complete file `source` the name `target` unless that name is taken; `source` disappears either way.

    The commit primitive of the score cache: two workers that race for one name cannot both win, without a lock.
    A hard link is create-exclusive on POSIX; where links are not supported the fallbacks are Linux's exclusive rename,
    then a claim file beside the target.

    Returns:
        True when this call created `target`, False when it existed.
    """
    source, target = Path(source), Path(target)
    sync_file(source)
    try:
        os.link(source, target)
    except FileExistsError:
        source.unlink()
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if not _rename_exclusive(source, target):
            source.unlink()
            return False
        sync_folder(target.parent)
        return True
    source.unlink()
    sync_folder(target.parent)
    return True


def _rename_exclusive(source: Path, target: Path) -> bool:
    """Rename unless `target` exists, without hard links: the kernel's own exclusive rename, else a claim file.

    The claim is created exclusively, so one process alone may rename. A process killed between claim and rename
    leaves the claim behind; the name is then free for nobody until the claim is deleted, and the error says so.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is not None:
        done = renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
        if done == 0:
            return True
        if ctypes.get_errno() == errno.EEXIST:
            return False
    claim = target.with_name(f".claim-{target.name}")
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        for _ in range(_CLAIM_WAITS):
            if target.exists():
                return False
            time.sleep(_CLAIM_PAUSE)
        raise DataError(f"{claim}: a process died between claiming and renaming. Delete this file.") from None
    try:
        if target.exists():
            return False
        os.rename(source, target)
        return True
    finally:
        claim.unlink()


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def inside(root: str | Path, relative: str) -> Path:
    """Join a path that came from a manifest to its folder; DataError when it would leave the folder."""
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in relative:
        raise DataError(f"{root}: the manifest names {relative!r}, a path outside its folder. Do not trust this copy.")
    path = Path(root, *pure.parts)
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise DataError(f"{root}: {relative!r} is a link that leaves the folder. Do not trust this copy.")
    return path
