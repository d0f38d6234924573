"""Reads a vocabulary (byte-level BPE ranks and special tokens) in any of the formats that checkpoints have."""

import base64
import binascii
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dbrx_jax.errors import ConfigError, TokenizerError
from dbrx_jax.files import read_json, read_text

# cl100k_base splits text so before byte-pair encoding; so does DBRX, even if its tokenizer_class says GPT2.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# The same for the tokenizers library, to which {1,3}+ is a repetition of {1,3}.
SPLIT_REGEX = SPLIT_PATTERN.replace("{1,3}+", "{1,3}")
CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
# The name under which tiktoken caches the cl100k_base ranks file.
CL100K_CACHE_NAME = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
DBRX_SPECIAL_TOKENS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
    "<|pad|>": 100277,
    "<|im_start|>": 100278,
    "<|im_end|>": 100279,
}
MAX_ID = 1 << 22
UNUSED_TOKEN = "<||_unused_{}_||>"  # fills the gaps between ids in converted vocabularies
_UNUSED = re.compile(re.escape(UNUSED_TOKEN).replace(r"\{\}", r"\d+"))


def load_ranks(folder: Path, ranks_file: Path | None, special: Mapping[str, int]) -> dict[bytes, int]:
    """Reads the BPE ranks: from `ranks_file`, else the folder's own files, else tiktoken's cache of cl100k_base.

    Raises:
      TokenizerError: there is none, or it is damaged; the message says what to do.
    """
    if ranks_file is not None:
        return _from_tiktoken(ranks_file)
    if tiktoken_files := sorted(folder.glob("*.tiktoken")):
        return _from_tiktoken(tiktoken_files[0])
    if (folder / "tokenizer.json").exists():
        return _from_tokenizer_json(folder / "tokenizer.json", special)
    if (folder / "vocab.json").exists():
        merges = [m for m in read_text(folder / "merges.txt").splitlines() if m and not m.startswith("#version")]
        return _from_vocabulary(folder / "vocab.json", read_json(folder / "vocab.json"), merges, special)
    for cache in _tiktoken_caches():
        if (cache / CL100K_CACHE_NAME).exists():
            return _from_tiktoken(cache / CL100K_CACHE_NAME, CL100K_SHA256)
    raise TokenizerError(
        f"{folder}: holds no vocabulary (tokenizer.json, vocab.json with merges.txt, or *.tiktoken); "
        "put the ranks file cl100k_base.tiktoken of OpenAI's tiktoken there, "
        "or set TIKTOKEN_CACHE_DIR to tiktoken's cache"
    )


def special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Reads special tokens and their ids: from tokenizer_config.json, else tokenizer.json, else DBRX's own.

    Raises:
      TokenizerError: an entry cannot be used.
    """
    if added := config.get("added_tokens_decoder"):
        path = folder / "tokenizer_config.json"
        if not isinstance(added, Mapping) or not all(isinstance(t, Mapping) for t in added.values()):
            raise TokenizerError(f"{path}: added_tokens_decoder: expected an object of objects")
        entries = [(entry.get("content"), key) for key, entry in added.items()]
    elif (path := folder / "tokenizer.json").exists():
        added = _object(path, read_json(path)).get("added_tokens") or []
        if not isinstance(added, list) or not all(isinstance(t, Mapping) for t in added):
            raise TokenizerError(f"{path}: added_tokens: expected a list of objects")
        entries = [(t.get("content"), t.get("id")) for t in added]
    else:
        return dict(DBRX_SPECIAL_TOKENS)
    result: dict[str, int] = {}
    for text, number in entries:
        if not isinstance(text, str) or not 1 <= len(text) <= 256:
            raise TokenizerError(f"{path}: a special token's content must be 1 to 256 characters, got {text!r:.60}")
        if not _UNUSED.fullmatch(text):
            result[text] = _id(path, text, _number(number))
    if len(set(result.values())) != len(result):
        raise TokenizerError(f"{path}: two special tokens have the same id")
    return result


def token_text(token: bytes) -> str:
    """Returns a token as GPT-2's files and transformers show it: one printable character for each byte."""
    characters = _byte_characters()
    return "".join(characters[byte] for byte in token)


def token_from_text(text: str) -> bytes | None:
    """Returns the token that :func:`token_text` shows as `text`; None if a character stands for no byte."""
    byte_of = _bytes_of_characters()
    return bytes(byte_of[c] for c in text) if all(c in byte_of for c in text) else None


def num_bytes(text: str) -> int:
    """Returns the bytes that tiktoken encodes of a text: it pairs surrogates, and replaces single ones by U+FFFD."""
    return len(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())


def _tiktoken_caches() -> Iterable[Path]:
    """Yields the folders where tiktoken looks for its cache, in its order."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
            return
    yield Path(tempfile.gettempdir()) / "data-gym-cache"


def _from_tiktoken(path: Path, sha256: str | None = None) -> dict[bytes, int]:
    """Reads a ranks file: on each line a token in base64 and its rank."""
    try:
        text = read_text(path)
        if sha256 is not None and (got := hashlib.sha256(text.encode()).hexdigest()) != sha256:
            raise TokenizerError(f"{path}: SHA-256 is {got}, expected {sha256}: delete the file, it is damaged")
        ranks = {}
        for line in text.splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        if isinstance(error, TokenizerError | ConfigError):
            raise TokenizerError(str(error)) from None
        raise TokenizerError(f"{path}: not a tiktoken ranks file (a line is not base64 and a number)") from None
    return _checked(path, ranks)


def _from_tokenizer_json(path: Path, special: Mapping[str, int]) -> dict[bytes, int]:
    model = _object(path, _object(path, read_json(path)).get("model"))
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"{path}: model.type: expected 'BPE', got {model.get('type')!r}")
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise TokenizerError(f"{path}: model.merges: expected a list")
    lines = [" ".join(map(str, m)) if isinstance(m, list) else str(m) for m in merges]
    return _from_vocabulary(path, model.get("vocab"), lines, special)


def _from_vocabulary(path: Path, vocabulary: Any, merges: list[str], special: Mapping[str, int]) -> dict[bytes, int]:
    """Reads GPT-2 style entries, which have a printable character per byte; an entry's id is its rank."""
    ranks: dict[bytes, int] = {}
    for text, number in _object(path, vocabulary).items():
        if text in special or _UNUSED.fullmatch(text):
            continue
        if (token := token_from_text(text)) is None:
            raise TokenizerError(f"{path}: the entry {text!r:.60} holds a character which stands for no byte")
        ranks[token] = _id(path, text, number)
    last = -1
    for merge in merges:
        number = vocabulary.get(merge.replace(" ", "", 1), -1)
        if not isinstance(number, int) or number < last:
            raise TokenizerError(
                f"{path}: the merge {merge!r:.60} does not follow the order of ids, as byte-pair ranks must"
            )
        last = number
    return _checked(path, ranks)


@functools.cache
def _byte_characters() -> list[str]:
    """Returns GPT-2's printable character for each byte: itself where printable, else from U+0100 on, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(_byte_characters())}


def _checked(path: Path, ranks: dict[bytes, int]) -> dict[bytes, int]:
    """Returns the ranks; raises TokenizerError where tiktoken would abort without a message."""
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise TokenizerError(f"{path}: no entry for the byte 0x{missing[0]:02x}; a byte-level vocabulary has all 256")
    if len(set(ranks.values())) != len(ranks):
        raise TokenizerError(f"{path}: two entries have the same id")
    if not 0 <= min(ranks.values()) <= max(ranks.values()) < MAX_ID:
        raise TokenizerError(f"{path}: ids must lie from 0 to {MAX_ID - 1}")
    return ranks


def _id(path: Path, text: str, number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MAX_ID:
        raise TokenizerError(
            f"{path}: the id of {text!r:.60} must be a whole number below {MAX_ID}, got {number!r:.60}"
        )
    return number


def _number(key: Any) -> Any:
    """Returns a JSON key that is an id as a number; anything else unchanged."""
    return int(key) if isinstance(key, str) and re.fullmatch(r"[0-9]{1,9}", key) else key


def _object(path: Path, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TokenizerError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
