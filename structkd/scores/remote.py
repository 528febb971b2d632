"""Object stores through fsspec: only local files can be mapped, so a remote folder is mirrored first.

`s3://`, `gs://` and the like need the extra `remote`; `memory://` and plain paths need nothing.
"""

import os
import re
from pathlib import Path

import fsspec

from structkd.errors import CorruptFileError, DataError, MissingExtraError
from structkd.files import atomic_path, inside, sha256_file
from structkd.ids import fingerprint_fields
from structkd.scores.manifest import PUBLISHED, ScoreManifest

_PROTOCOL = re.compile(r"^([a-z][a-z0-9+.-]+):/+(?=[^/])")


def is_remote(uri: str | Path) -> bool:
    """True for an address with a protocol."""
    return "://" in address(uri)


def address(uri: str | Path) -> str:
    """The address as it was written: a Path drops one of two slashes."""
    return _PROTOCOL.sub(r"\1://", str(uri))


def mirror(uri: str | Path) -> Path:
    """The local mirror of a published folder, fetched or brought up to date.

    It lies below $STRUCTKD_CACHE (by default ~/.cache/structkd) in a folder named after the address.
    """
    root = Path(os.environ.get("STRUCTKD_CACHE", Path.home() / ".cache" / "structkd"))
    where = address(uri)
    return download(where, root / "scores" / fingerprint_fields([where])[:24])


def download(uri: str, to: str | Path) -> Path:
    """Mirror a published folder; files that are there with the right checksum are not fetched again.

    Args:
        uri: address of a published folder.
        to: local folder.

    Raises:
        DataError: no manifest at the address, or it names a file outside the folder.
        CorruptFileError: a fetched file differs from the manifest.
        MissingExtraError: the protocol's package is not installed.
    """
    folder = Path(to)
    system, root = _open(uri)
    if not system.exists(f"{root}/{PUBLISHED}"):
        raise DataError(f"{uri}: no {PUBLISHED} there; expected a published folder of scores.")
    with atomic_path(folder / f"{PUBLISHED}.remote") as draft:
        system.get_file(f"{root}/{PUBLISHED}", str(draft))
    manifest = ScoreManifest.read(folder / f"{PUBLISHED}.remote")
    for entry in manifest.files:
        path = inside(folder, entry["path"])
        if path.is_file() and sha256_file(path) == entry["sha256"]:
            continue
        with atomic_path(path) as draft:
            system.get_file(f"{root}/{entry['path']}", str(draft))
            if sha256_file(draft) != entry["sha256"]:
                raise CorruptFileError(f"{uri}/{entry['path']}: differs from the manifest's checksum. Fetch it again.")
    (folder / f"{PUBLISHED}.remote").replace(folder / PUBLISHED)  # last: a folder with a manifest is complete
    return folder


def upload(folder: str | Path, uri: str) -> None:
    """Copy a published folder to an address, its manifest last.

    Raises:
        DataError: the folder is not published, or the address holds a manifest already.
    """
    folder = Path(folder)
    if not (folder / PUBLISHED).is_file():
        raise DataError(f"{folder}: no {PUBLISHED} there; publish the store first.")
    system, root = _open(uri)
    if system.exists(f"{root}/{PUBLISHED}"):
        raise DataError(f"{uri}: holds a published folder already. Use another address.")
    for entry in ScoreManifest.read(folder / PUBLISHED).files:
        target = f"{root}/{entry['path']}"
        system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        system.put_file(str(inside(folder, entry["path"])), target)
    system.put_file(str(folder / PUBLISHED), f"{root}/{PUBLISHED}")


def _open(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        system, root = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        raise MissingExtraError(str(error), "remote", f"the address {uri}") from None
    except ValueError as error:
        raise DataError(f"{uri}: {error}") from None
    return system, root.rstrip("/")
