"""Locates a checkpoint's folder: local, at a URL, or on the Hugging Face hub (extra [hub])."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dbrx_jax.console import announce, can_redraw, is_shown
from dbrx_jax.errors import CheckpointError, install_advice
from dbrx_jax.files import check_links, location

SCHEME = "hf://"
# The files of a checkpoint, without the pickled weights that a repository may hold beside them; params/ are Orbax's.
FILES = ("params/*", "*.json", "*.safetensors", "merges.txt", "*.jinja", "*.tiktoken", "additional_chat_templates")


def checkpoint_folder(path: str | Path, progress: bool | None = None) -> Path:
    """Returns the folder, or for `hf://owner/name` the local copy of that repository, downloaded if necessary.

    Args:
      progress: show the progress of a download; see :func:`dbrx_jax.console.is_shown`.

    Raises:
      CheckpointError: the folder does not exist, or the repository cannot be downloaded.
    """
    if not str(path).startswith(SCHEME):
        folder = location(path)
        try:
            if folder.is_dir():
                check_links(folder, FILES)
                return folder
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
        raise CheckpointError(f"{path}: there is no such folder")
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
            return Path(snapshot_download(name, allow_patterns=list(FILES)))
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
