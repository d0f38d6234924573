"""Locates a checkpoint's folder: local, at a URL, or on the Hugging Face hub (extra [hub])."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from dbrx_jax.console import announce, can_redraw, is_shown
from dbrx_jax.errors import CheckpointError, install_advice
from dbrx_jax.files import check_links, location

SCHEME = "hf://"
WEBSITE = "https://huggingface.co/"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
# The files of a checkpoint, without the pickled weights that a repository may hold beside them; params/ are Orbax's.
WEIGHTS = ("params/*", "*.safetensors")
SMALL_FILES = ("*.json", "merges.txt", "*.jinja", "*.tiktoken", "additional_chat_templates")
FILES = (*SMALL_FILES, *WEIGHTS)


def is_on_hub(path: str | Path) -> bool:
    """Returns whether a checkpoint is named as a repository of the Hugging Face hub, `hf://owner/name`."""
    return str(path).startswith(SCHEME)


def checkpoint_folder(path: str | Path, progress: bool | None = None) -> Path:
    """Returns the folder, or for `hf://owner/name` the local copy of that repository, without its weights.

    The small files of a repository are downloaded if necessary. They are enough for the tokenizer and for checking
    options; :func:`download_weights` adds the weights.

    Args:
      progress: show the progress of a download; see :func:`dbrx_jax.console.is_shown`.

    Raises:
      CheckpointError: the folder does not exist, or the repository cannot be downloaded.
    """
    if is_on_hub(path):
        return _download(path, SMALL_FILES, None, progress)
    if str(path).startswith(WEBSITE):
        raise CheckpointError(f"{path}: is a page of the hub; write {SCHEME}owner/name")
    folder = location(path)
    try:
        if folder.is_dir():
            check_links(folder, FILES)
            return folder
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    hint = f"; on the hub it would be {SCHEME}{path}" if REPOSITORY.fullmatch(str(path)) else ""
    raise CheckpointError(f"{path}: there is no such folder{hint}")


def download_weights(path: str | Path, folder: Path, progress: bool | None = None) -> None:
    """Downloads the weights of a repository on the hub, those of the commit that its small files are of.

    Args:
      path: `hf://owner/name`.
      folder: its small files, from :func:`checkpoint_folder`.
      progress: as there.

    Raises:
      CheckpointError: they cannot be downloaded.
    """
    _download(path, WEIGHTS, folder.name, progress)  # the hub's cache names a folder by its commit


def _download(path: str | Path, patterns: tuple[str, ...], commit: str | None, progress: bool | None) -> Path:
    """Downloads the files of a repository that match the patterns, of its newest commit or the one given."""
    name = str(path).removeprefix(SCHEME)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"{path}: reading from the Hugging Face hub needs its client; {install_advice('hub')}"
        ) from None
    try:
        with announce(f"Downloading {path}", shown=progress), _bars_of_hub(is_shown(progress) and can_redraw()):
            return Path(snapshot_download(name, revision=commit, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path}: the hub does not give it ({reason})") from None


@contextlib.contextmanager
def _bars_of_hub(shown: bool) -> Iterator[None]:
    """Lets the hub's client draw its progress bars, which it also draws into files, only if they are shown."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
