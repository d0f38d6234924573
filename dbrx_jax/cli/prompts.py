"""Files of prompts for generate: JSON lines, each a text or an object with a prompt, options and fields to keep."""

import dataclasses
import hashlib
import json
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_jax.cli.generation_options import check_seed, read_options, refuse_foreign_options
from dbrx_jax.errors import DbrxError, GenerationError

if TYPE_CHECKING:
    from dbrx_jax.cli.load import Checkpoint
    from dbrx_jax.generation_config import GenerationConfig

MAX_LINE = 64 << 20  # bytes
STANDARD_STREAM = Path("-")  # stdin or stdout
# Fields of a result. A row's own fields of these names are left out, so that results can be prompts again.
RESULT_FIELDS = ("completion", "finish_reason", "usage", "token_ids", "logprobs", "error")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a prompts file.

    Attributes:
      line: its number, from 1.
      fields: what it holds, for its results.
      options: its own options of generation, by GenerationConfig's names, checked.
      seed: its own, if it has one.
      error: what is wrong with it, else None.
      num_bytes: of the line.
    """

    line: int
    fields: dict[str, Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    error: str | None = None
    num_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Item:
    """A completion to make: a row's first, or another one of the same prompt; or what keeps it from being made.

    Attributes:
      index: which of the row's completions.
      copies: the number of them.
      ids: tokens of the prompt.
      config: all options of generation; None if there is an error.
    """

    row: Row
    index: int
    ids: list[int]
    config: "GenerationConfig | None"
    error: str | None
    copies: int = 1


@dataclasses.dataclass(frozen=True)
class Survey:
    """Summary of a prompts file, from one pass over it.

    Attributes:
      sha256: of the file.
      num_items: completions and errors, each a line of the results.
      positions: of the longest prompt with its new tokens.
      lengths: numbers of tokens that prompts have.
      has_same_options: all rows that can be used have the same options but for the seed.
      errors: rows that cannot be used.
      first_error: of these.
    """

    sha256: str
    num_items: int
    positions: int
    lengths: frozenset[int]
    has_same_options: bool
    errors: int
    first_error: str | None


class PromptsFile:
    """A file of prompts that can be read again and again; stdin and pipes are copied to a temporary file first.

    Raises:
      GenerationError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.name = "stdin" if path == STANDARD_STREAM else str(path)
        if path == STANDARD_STREAM and sys.stdin is None:
            raise GenerationError("stdin: cannot be read (it is closed)")
        try:
            self._file = _open_seekable(path)
        except OSError as error:
            raise GenerationError(f"{self.name}: cannot be read ({error.strerror})") from None

    def close(self) -> None:
        self._file.close()

    def items(self, checkpoint: "Checkpoint", options: dict[str, Any], start: int = 0) -> Iterator[Item]:
        """Yields the completions to make, from number `start` on, with each row's options over `options`."""
        number = 0
        for row in self._rows():
            copies = 1 if row.error else _num_copies(row, checkpoint, options)
            if number + copies > start:
                item = _prepare(row, checkpoint, options)
                for index in range(max(0, start - number), copies):
                    yield dataclasses.replace(item, index=index, copies=copies)
            number += copies

    def survey(self, checkpoint: "Checkpoint", options: dict[str, Any]) -> Survey:
        """Reads and tokenises all prompts, of which it keeps nothing.

        Raises:
          GenerationError: there is no prompt that can be used.
        """
        num_items = positions = errors = 0
        first_error, first_config = None, None
        lengths, has_same_options = set(), True
        for item in self.items(checkpoint, options):
            num_items += 1
            if item.config is not None:
                lengths.add(len(item.ids))
                first_config = first_config or item.config
                has_same_options = has_same_options and item.config == first_config
                positions = max(positions, len(item.ids) + (item.config.max_new_tokens or 0))
            elif item.index == 0:
                errors += 1
                first_error = first_error or item.error
        if not positions:
            raise GenerationError(f"{self.name}: holds no prompts" if not errors else f"{self.name}, {first_error}")
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        return Survey(digest, num_items, positions, frozenset(lengths), has_same_options, errors, first_error)

    def _rows(self) -> Iterator[Row]:
        self._file.seek(0)
        line = 0
        while text := self._file.readline(MAX_LINE):
            line += 1
            if len(text) == MAX_LINE and not text.endswith(b"\n"):
                while len(text) == MAX_LINE and not text.endswith(b"\n"):
                    text = self._file.readline(MAX_LINE)
                yield Row(line, {}, error=f"line {line}: longer than {MAX_LINE >> 20} MiB")
            elif text.strip():
                yield parse_row(line, text)


def parse_row(line: int, text: bytes) -> Row:
    """Returns the row of a line, with its error if it has one."""
    data: Any = None
    try:
        data = json.loads(text.decode("utf-8-sig"), parse_constant=_refuse_constant)
        if isinstance(data, str):
            data = {"prompt": data}
        _check_prompt(data)
        options, seed = read_options(data), data.get("seed")
        check_seed(seed)
        refuse_foreign_options(data)
    except GenerationError as error:
        return Row(line, _kept(data), error=f"line {line}: {error}", num_bytes=len(text))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return Row(line, {}, error=f"line {line}: not JSON ({error})")
    return Row(line, _kept(data), options, seed, num_bytes=len(text))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is none of its numbers")


def _check_prompt(data: Any) -> None:
    prompt, messages = (data.get("prompt"), data.get("messages")) if isinstance(data, dict) else (None, None)
    has_prompt = isinstance(prompt, str) and prompt != ""
    has_messages = isinstance(messages, list) and messages != []
    if not (has_prompt or has_messages):
        raise GenerationError('expected a text, {"prompt": …} or {"messages": […]}')
    if has_prompt and has_messages:
        raise GenerationError("has both prompt and messages; give one of them")


def _kept(data: Any) -> dict[str, Any]:
    """Returns the fields of a row that its results repeat."""
    return {k: v for k, v in data.items() if k not in RESULT_FIELDS} if isinstance(data, dict) else {}


def _prepare(row: Row, checkpoint: "Checkpoint", command_options: dict[str, Any]) -> Item:
    """Returns a row's first completion to make: its tokens and options, or its error."""
    error = row.error
    if error is None:
        try:
            ids = prompt_ids(row.fields, checkpoint)
            return Item(row, 0, ids, checkpoint.options(len(ids), command_options, row.options), None)
        except DbrxError as caught:
            error = f"line {row.line}: {caught}"
    return Item(row, 0, [], None, error)


def _num_copies(row: Row, checkpoint: "Checkpoint", command_options: dict[str, Any]) -> int:
    """Returns the number of completions of a row."""
    name = "num_return_sequences"
    return row.options.get(name) or command_options.get(name) or checkpoint.generation.num_return_sequences or 1


def prompt_ids(fields: dict[str, Any], checkpoint: "Checkpoint") -> list[int]:
    """Returns the tokens of a prompt, or of messages in the checkpoint's chat template."""
    if fields.get("messages"):
        return checkpoint.tokenizer.apply_chat_template(fields["messages"], add_generation_prompt=True)
    return checkpoint.tokenizer.encode(fields["prompt"])


def _open_seekable(path: Path) -> Any:
    """Opens a regular file, or a temporary copy of stdin or of a pipe."""
    source = sys.stdin.buffer if path == STANDARD_STREAM else path.open("rb")
    if path != STANDARD_STREAM and stat.S_ISREG(path.stat().st_mode):
        return source
    copy = tempfile.TemporaryFile()  # noqa: SIM115  PromptsFile closes it
    shutil.copyfileobj(source, copy)
    return copy
