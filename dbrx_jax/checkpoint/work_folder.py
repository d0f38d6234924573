"""Folder that a checkpoint is written in: becomes the destination when it is complete; a killed run resumes in it."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, cast

from dbrx_jax.checkpoint.folder import PLAN, RECORDS, CheckpointFolder
from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import is_remote

_RESUME = "; run the same command again to continue"


def work_folder(
    destination: Path, plan: dict[str, Any], num_bytes: int, resume: bool = True
) -> contextlib.AbstractContextManager[Path]:
    """Returns a context manager that yields the folder to write to and completes the destination at its end.

    On a disk the folder is `DST.incomplete`, locked, and renamed to DST at the end. Remote storage can neither rename
    nor lock: there the folder is DST itself, incomplete while PLAN is in it, and two runs at once write the same
    bytes twice.

    Args:
      destination: a path from :func:`dbrx_jax.files.location`.
      plan: identifies the work: a run with another plan does not resume this one.
      num_bytes: bytes of the complete destination, compared with the free space of a disk.
      resume: keep what a killed run with the same plan has written, rather than begin anew.

    Raises (on entering and leaving the context):
      CheckpointError: the destination exists, another run is writing it, the killed run had another plan, the disk
        is too small, or writing fails.
    """
    if is_remote(destination):
        return _remote_work_folder(destination, plan, resume)
    return _local_work_folder(destination, plan, num_bytes, resume)


@contextlib.contextmanager
def _local_work_folder(destination: Path, plan: dict[str, Any], num_bytes: int, resume: bool) -> Iterator[Path]:
    _refuse_existing(destination)
    folder = destination.with_name(f"{destination.name}.incomplete")
    with _report_os_errors(destination):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    try:
        with _report_os_errors(destination):
            _begin_local(folder, destination, lock, plan, num_bytes, resume)
        with _report_os_errors(destination, _RESUME if resume else ""):
            yield folder
        with _report_os_errors(destination):
            os.sync()  # may take minutes, after which a killed run must still resume
            _remove_marks(folder)
            folder.rename(destination)
    finally:
        os.close(lock)


def _begin_local(
    folder: Path, destination: Path, lock: int, plan: dict[str, Any], num_bytes: int, resume: bool
) -> None:
    """Locks the folder, checks it and the free space, and writes or compares its plan."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _refuse_existing(destination)  # another run may have completed it before the lock was taken
        path = folder / PLAN
        partial = path.with_suffix(".part")
        if path.exists():
            _check_plan(path, plan)
            if not resume:
                _clear(folder)
        elif any(file != partial for file in folder.iterdir()):
            raise CheckpointError(f"{folder}: holds files, and no {PLAN} says of what; remove it to begin anew")
        written = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        free = shutil.disk_usage(folder).free
        if free + written < num_bytes:
            raise CheckpointError(
                f"{folder.parent}: {free / 1e9:.3g} GB are free and the checkpoint needs "
                f"{(num_bytes - written) / 1e9:.3g} GB"
            )
        if not path.exists():
            partial.write_text(json.dumps(plan, indent=2))
            partial.rename(path)
    except BlockingIOError:
        raise CheckpointError(f"{folder}: another conversion is at work there; wait for it") from None
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only succeeds if it is empty
        raise


@contextlib.contextmanager
def _remote_work_folder(destination: Path, plan: dict[str, Any], resume: bool) -> Iterator[Path]:
    path = destination / PLAN
    with _report_os_errors(destination):
        if path.exists():
            _check_plan(path, plan)
            if not resume:
                _clear(destination)
        else:
            if destination.exists() and any(destination.iterdir()):
                _refuse_existing(destination)
            destination.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(plan, indent=2))
    with _report_os_errors(destination, _RESUME if resume else ""):
        yield destination
    with _report_os_errors(destination):
        _remove_marks(destination)


def _remove_marks(folder: Path) -> None:
    """Removes what marks a folder as incomplete, and its complete arrays."""
    remove_folder(folder / RECORDS)
    (folder / PLAN).unlink()


def _clear(folder: Path) -> None:
    """Removes all that a folder holds but its plan."""
    for path in list(folder.iterdir()):
        if path.is_dir():
            remove_folder(path)
        elif path.name != PLAN:
            path.unlink()


def remove_folder(folder: Path) -> None:
    """Removes a local or remote folder if it is there."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        cast(Any, folder).rmdir(recursive=True)


def _refuse_existing(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination}: exists already; choose another folder or remove it")


@contextlib.contextmanager
def _report_os_errors(destination: Path, advice: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written ({error.strerror or error}){advice}") from None


def _check_plan(path: Path, plan: dict[str, Any]) -> None:
    """Raises CheckpointError unless the killed run had the same plan."""
    plan = json.loads(json.dumps(plan))
    try:
        begun = json.loads(path.read_text())
    except ValueError:
        begun = None
    if begun != plan:
        changed = [key for key in plan if begun.get(key) != plan[key]] if isinstance(begun, dict) else []
        raise CheckpointError(
            f"{path.parent}: was begun with another {', '.join(changed) or 'plan'}; "
            "remove it to begin anew, or undo that change"
        )


def fingerprint(checkpoint: CheckpointFolder) -> str:
    """Returns a SHA-256 of the names, sizes and times of last change of the checkpoint's files."""
    digest = hashlib.sha256()
    files: list[Any] = [*checkpoint.files, checkpoint.path / "config.json"]
    for file in files:
        status = file.stat()
        changed = file.fs.ukey(file.path) if is_remote(file) else status.st_mtime_ns
        digest.update(f"{file.name} {status.st_size} {changed}\n".encode())
    return digest.hexdigest()


def check_workers(workers: int | None) -> None:
    """Raises CheckpointError unless :func:`parallel` can be called with this number of threads."""
    if workers is not None and workers < 1:
        raise CheckpointError(f"workers: expected a whole number above 0, got {workers}")


def parallel(work: Callable[[Any], None], items: Iterable[Any], workers: int | None) -> None:
    """Calls `work` on every item in threads; the first error cancels the remaining items and is raised."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1) if workers is None else workers) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
