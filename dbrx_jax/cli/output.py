"""Results files of generate --file: rows are kept whatever ends the command, which goes on behind them.

OUTPUT.incomplete grows and becomes OUTPUT when it is complete. OUTPUT.incomplete.json says which prompts and options
the rows are from.
"""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from dbrx_jax.cli.prompts import STANDARD_STREAM
from dbrx_jax.errors import ConfigError, GenerationError
from dbrx_jax.files import read_json


class Output(Protocol):
    """Destination of the lines of results."""

    num_done: int  # lines, at first those of an earlier run
    num_errors: int  # of these, rows with an error

    def write(self, results: Sequence[dict[str, Any]]) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...

    def explain(self, total: int) -> str | None:
        """Returns a line for the user about what an unfinished run leaves."""


def check_output(path: Path | None, prompts: Path) -> None:
    """Checks that results can be written here, before anything is read.

    Raises:
      GenerationError: they cannot.
    """
    if path is None or path == STANDARD_STREAM:
        return
    if path.is_dir():
        raise GenerationError(f"{path}: is a folder; name a file")
    for file in (path, incomplete_path(path), identity_path(path)):
        if prompts != STANDARD_STREAM and os.path.realpath(file) == os.path.realpath(prompts):
            raise GenerationError(f"--output {path}: would overwrite the prompts of --file; name another file")
    _refuse_complete(path)
    if not path.exists() and not os.access(path.parent, os.W_OK | os.X_OK):
        reason = "not yours to write to" if path.parent.is_dir() else "there is no such folder"
        raise GenerationError(f"{path}: cannot be written ({path.parent}: {reason})")


def _refuse_complete(path: Path) -> None:
    """Raises GenerationError if there are complete results, which are never overwritten."""
    if path.is_file():
        raise GenerationError(f"{path}: exists already; remove it, or name another file")


def open_output(path: Path | None, identity: dict[str, Any]) -> Output:
    """Opens stdout, a device or pipe, or a file in which an earlier run's rows are kept.

    Args:
      identity: what the results depend on: "prompts", a digest, and options by their names; JSON values.

    Raises:
      GenerationError: the file cannot be written, or its rows are of other prompts or options.
    """
    if path is None or path == STANDARD_STREAM:
        return StreamOutput()
    _refuse_complete(path)  # the prompts have been read since the first check
    with _naming(path):
        return StreamOutput(path) if path.exists() else ResumableOutput(path, identity)


def incomplete_path(path: Path) -> Path:
    return path.with_name(path.name + ".incomplete")


def identity_path(path: Path) -> Path:
    return path.with_name(path.name + ".incomplete.json")


class StreamOutput:
    """Results on stdout, a pipe or a device, which keep nothing of an earlier run."""

    num_done = num_errors = 0

    def __init__(self, path: Path | None = None):
        # JSON may hold half of a surrogate pair, which is written as an escape.
        file: Any = sys.stdout if path is None else path.open("w", encoding="utf-8")
        file.reconfigure(errors="backslashreplace")
        self._path, self._file = path, file

    def write(self, results: Sequence[dict[str, Any]]) -> None:
        with _naming(self._path):
            self._file.write(_json_lines(results))
            self._file.flush()
        self.num_errors += _count_errors(results)

    def finish(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError):  # write reported it
                self._file.close()

    def explain(self, total: int) -> str | None:
        return None


class ResumableOutput:
    """Results in a file that grows as OUTPUT.incomplete and is renamed when it is complete."""

    def __init__(self, path: Path, identity: dict[str, Any]):
        self._path, self._incomplete = path, incomplete_path(path)
        self._file = _open_alone(self._incomplete)
        try:  # only now: the files of a process that writes here stay as they are
            if self._incomplete.stat().st_size:
                self._check_identity(identity)
            else:
                identity_path(path).write_text(json.dumps(identity, indent=1) + "\n")
        except BaseException:
            self._file.close()
            raise
        self.num_done, self.num_errors, self._end = _complete_lines(self._incomplete)
        self._file.truncate(self._end)  # half a line, if the last run was killed

    def write(self, results: Sequence[dict[str, Any]]) -> None:
        """Appends the lines of results, all of them or none.

        Raises:
          GenerationError: the disk is full or fails.
        """
        data = _json_lines(results).encode(errors="backslashreplace")
        with _naming(self._incomplete):
            try:
                written = 0
                while written < len(data):
                    written += self._file.write(data[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._end)
                raise
        self._end += len(data)
        self.num_done += len(results)
        self.num_errors += _count_errors(results)

    def finish(self) -> None:
        """Gives the complete file its name.

        Raises:
          GenerationError: that cannot be done; the results are in the incomplete file.
        """
        _refuse_complete(self._path)
        with _naming(self._path):
            self._incomplete.replace(self._path)
            identity_path(self._path).unlink()

    def close(self) -> None:
        self._file.close()
        if self.num_done == 0:  # nothing to keep
            with contextlib.suppress(OSError):
                for file in (self._incomplete, identity_path(self._path)):
                    file.unlink(missing_ok=True)

    def explain(self, total: int) -> str | None:
        if self.num_done == 0:
            return None
        return f"{self._incomplete} holds {self.num_done} of {total} rows; the same command goes on behind them"

    def _check_identity(self, identity: dict[str, Any]) -> None:
        """Checks that the rows of an earlier run are from the same prompts and options."""
        remedy = f"give the same, or remove {self._incomplete} to begin anew"
        try:
            before = read_json(identity_path(self._path))
        except ConfigError:
            before = None
        if not isinstance(before, dict):
            raise GenerationError(f"{self._incomplete}: is of an unknown run; remove it to begin anew")
        for name, value in identity.items():
            if (other := before.get(name)) != value:
                shown = "" if name == "prompts" else f" ({other!r:.40}, and now {value!r:.40})"
                raise GenerationError(f"{self._incomplete}: is from a run with other {name}{shown}; {remedy}")


@contextlib.contextmanager
def _naming(path: Path | None) -> Iterator[None]:
    """Reports an OSError in a `with` block as one of this file's; one of stdout, None, is the program's to report."""
    try:
        yield
    except OSError as error:
        if path is None:
            raise
        raise GenerationError(f"{path}: cannot be written ({error.strerror})") from None


def _open_alone(path: Path) -> FileIO:
    """Opens a file to read and append, which no other process may do at the same time."""
    file = path.open("a+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise GenerationError(f"{path}: another process is writing it") from None
    except OSError:
        pass  # a file system without locks
    return file


def _complete_lines(path: Path) -> tuple[int, int, int]:
    """Returns the number of complete lines of results, of those with an error, and the position behind them."""
    lines = errors = end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                result = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                result = None
            if not isinstance(result, dict):
                break
            lines, errors, end = lines + 1, errors + ("error" in result), end + len(line)
    return lines, errors, end


def _json_lines(results: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)


def _count_errors(results: Sequence[dict[str, Any]]) -> int:
    return sum("error" in result for result in results)
