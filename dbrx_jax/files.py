"""Local and remote paths, and readers of small untrusted files."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dbrx_jax.errors import CheckpointError, ConfigError, install_advice

MAX_JSON = 64 << 20  # bytes; a tokenizer.json of 100k entries is under 10 MB


def location(path: str | Path) -> Path:
    """Returns a local path made absolute, or for a URL such as gs://bucket/folder a UPath with a Path's methods.

    Raises:
      CheckpointError: the file system of such URLs is not installed, or is unknown; or it is no path.
    """
    if not (isinstance(path, str) or hasattr(path, "joinpath")):
        raise CheckpointError(f"expected a folder's path or URL, got {path!r:.40}")
    if "://" not in str(path):
        return Path(path).absolute()
    try:
        from upath import UPath

        remote: Any = UPath(path)
        _ = remote.fs  # raises if the file system is not available
    except ImportError as error:
        raise CheckpointError(
            f"{path}: needs the file system's client ({error}); {install_advice('gcs')} (for s3:// also s3fs)"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: no such kind of location ({error})") from None
    return Path(remote.path) if remote.protocol in ("file", "local") else remote


def is_remote(path: Path) -> bool:
    """Returns whether a path from :func:`location` is a remote one (a UPath)."""
    return not isinstance(path, Path)


def check_links(folder: Path, patterns: Iterable[str]) -> None:
    """Checks that every symbolic link of a local folder whose name has one of these patterns can be followed.

    Others seem not to exist, as if the file were not part of the checkpoint.

    Raises:
      CheckpointError: a link leads nowhere or in a circle, or the folder cannot be read.
    """
    if is_remote(folder):
        return
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from None
    for file in files:
        if file.is_symlink() and not file.exists() and any(fnmatch(file.name, pattern) for pattern in patterns):
            raise CheckpointError(
                f"{file}: is a link to {os.readlink(file)}, which cannot be followed; mend or remove it"
            )


def check_link(folder: Path, file: Path) -> None:
    """Checks that a symbolic link stays in the folder, or leads into blobs/ as in the hub's cache.

    Raises:
      CheckpointError: it leads elsewhere.
    """
    if not file.is_symlink():
        return
    target, folder = (Path(os.path.realpath(p)) for p in (file, folder))  # Path.resolve raises on some loops of links
    blobs = folder.parent.parent / "blobs"
    if not target.is_relative_to(folder) and not (folder.parent.name == "snapshots" and target.parent == blobs):
        raise CheckpointError(f"{file}: is a link out of the folder, to {target}; put the file itself there")


def read_text(path: Path) -> str:
    """Reads a UTF-8 file of at most MAX_JSON bytes.

    Raises:
      ConfigError: the file is missing, no regular file, too large, or not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
            raise ConfigError(f"{path}: not a regular file")
        if status.st_size > MAX_JSON:
            raise ConfigError(f"{path}: larger than {MAX_JSON >> 20} MiB; this is not a file of a checkpoint's")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      ConfigError: as in :func:`read_text`, or the text is not JSON, or repeats a key.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_dict_of_unique_keys)
    except _RepeatedKeyError as error:
        raise ConfigError(f"{path}: the key {error} occurs twice in one JSON object") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a plain ValueError
        raise ConfigError(f"{path}: not valid JSON ({error})") from None


class _RepeatedKeyError(Exception):
    pass


def _dict_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _RepeatedKeyError(repr(next(key for key, count in counts.items() if count > 1)))
    return result
