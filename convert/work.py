"""A folder that becomes the destination when it is complete, and can be continued until then."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any

from dbrx_jax.checkpoint.folder import PLAN, CheckpointFolder
from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import is_remote


def work_folder(destination: Path, plan: dict[str, Any], needed: int) -> "WorkFolder | RemoteWorkFolder":
    """The one of the two that fits the destination."""
    return RemoteWorkFolder(destination, plan) if is_remote(destination) else WorkFolder(destination, plan, needed)


class WorkFolder:
    """`DST.incomplete`: made by one run, continued by another, renamed to DST at the end.

    Args:
      destination: what it is to become.
      plan: what identifies the work: a run with another plan does not continue this one.
      needed: bytes that it will take on the disk.

    Raises (also on entering and leaving):
      CheckpointError: the destination exists, another run is at it, the plan is another than that of
        the run that was killed, the disk is too small, or nothing can be written.
    """

    def __init__(self, destination: Path, plan: dict[str, Any], needed: int):
        self.destination, self.plan, self.needed = destination, plan, needed
        self.folder = destination.with_name(f"{destination.name}.incomplete")
        self._refuse_existing()

    def _refuse_existing(self) -> None:
        if self.destination.exists() or self.destination.is_symlink():
            raise CheckpointError(f"{self.destination}: exists already; choose another folder or remove it")

    def __enter__(self) -> Path:
        with _description(self.destination):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._refuse_existing()  # another run may have completed it between the look and the lock
                self._check_space()
                self._begin()
            except BaseException as error:
                if isinstance(error, BlockingIOError):
                    os.close(self._lock)
                    raise CheckpointError(f"{self.folder}: another conversion is at work there; wait for it") from None
                with contextlib.suppress(OSError):
                    self.folder.rmdir()  # where nothing is in it
                os.close(self._lock)
                raise
        return self.folder

    def _check_space(self) -> None:
        """Checks that the bytes still to be written fit on the disk."""
        written = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())
        free = shutil.disk_usage(self.folder).free
        if free + written < self.needed:
            raise CheckpointError(
                f"{self.folder.parent}: {free / 1e9:.1f} GB are free and the checkpoint needs "
                f"{(self.needed - written) / 1e9:.1f} GB"
            )

    def _begin(self) -> None:
        path = self.folder / PLAN
        if path.exists():
            _check_plan(path, self.plan)
            return
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(self.plan, indent=2))
        aside.rename(path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _description(self.destination):
                    (self.folder / PLAN).unlink()
                    os.sync()
                    self.folder.rename(self.destination)
            elif isinstance(error, OSError):
                raise CheckpointError(
                    f"{self.destination}: cannot be written ({error.strerror or error}); "
                    "run the same command again to continue"
                ) from None
        finally:
            os.close(self._lock)


class RemoteWorkFolder:
    """A destination behind a URL, where nothing can be renamed: while PLAN lies in it, it is not complete.

    There is no lock and no look at the free space: two runs at once would write the same bytes twice.

    Args:
      destination: a folder as :func:`dbrx_jax.files.location` gives them.
      plan: what identifies the work.

    Raises (also on entering and leaving):
      CheckpointError: the destination exists, the plan is another than that of the run that was
        killed, or nothing can be written.
    """

    def __init__(self, destination: Path, plan: dict[str, Any]):
        self.destination, self.plan = destination, plan

    def __enter__(self) -> Path:
        with _description(self.destination):
            path = self.destination / PLAN
            if path.exists():
                _check_plan(path, self.plan)
            elif self.destination.exists() and any(self.destination.iterdir()):
                raise CheckpointError(f"{self.destination}: exists already; choose another folder or remove it")
            else:
                self.destination.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(self.plan, indent=2))
        return self.destination

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            with _description(self.destination):
                (self.destination / PLAN).unlink()
        elif isinstance(error, OSError):
            raise CheckpointError(
                f"{self.destination}: cannot be written ({error.strerror or error}); "
                "run the same command again to continue"
            ) from None


def _check_plan(path: Path, plan: dict[str, Any]) -> None:
    """Checks that a killed run, which this one continues, had the same plan."""
    plan = json.loads(json.dumps(plan))
    try:
        begun = json.loads(path.read_text())
    except ValueError:
        begun = None
    if begun != plan:
        what = _difference(begun, plan)
        raise CheckpointError(
            f"{path.parent}: was begun with another {what}; remove it to begin anew, or undo that change"
        )


@contextlib.contextmanager
def _description(destination: Path):
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written ({error.strerror or error})") from None


def _difference(begun: Any, plan: dict[str, Any]) -> str:
    """Names the part of the plan that has changed."""
    if not isinstance(begun, dict):
        return "plan"
    return ", ".join(key for key in plan if begun.get(key) != plan[key]) or "plan"


def fingerprint(checkpoint: CheckpointFolder) -> str:
    """Changes when a file of the checkpoint does, by name, size or time of last change."""
    digest = hashlib.sha256()
    files: list[Any] = [*checkpoint.files, checkpoint.path / "config.json"]
    for file in files:
        status = file.stat()
        changed = file.fs.ukey(file.path) if is_remote(file) else status.st_mtime_ns
        digest.update(f"{file.name} {status.st_size} {changed}\n".encode())
    return digest.hexdigest()


def parallel(work: Callable[[Any], None], items: Iterable[Any], workers: int | None) -> None:
    """Runs work on every item in threads; the first error ends the rest and is raised."""
    with ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
