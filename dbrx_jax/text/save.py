"""Writes a tokenizer as files that DbrxTokenizer and transformers' AutoTokenizer load."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbrx_jax.errors import ConfigError, TokenizerError
from dbrx_jax.files import MAX_JSON, is_remote, location
from dbrx_jax.text.tokenizer_config import CONFIG_FILE, TEMPLATE_FILE, TEMPLATES_FOLDER
from dbrx_jax.text.vocabulary import SPLIT_REGEX, UNUSED_TOKEN, load_ranks, token_text

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def tokenizer_json(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> dict[str, Any]:
    """Returns tokenizer.json, from which the tokenizers library makes the same ids.

    Special tokens are entries of the vocabulary too, and unused ones fill the gaps, as in the published copies of
    DBRX: the library numbers added tokens without gaps, whatever ids they have.

    Raises:
      TokenizerError: a special token has the text of another entry.
    """
    vocabulary = {token_text(token): rank for token, rank in ranks.items()}
    if both := sorted(vocabulary.keys() & special.keys()):
        raise TokenizerError(
            f"{both[0]!r:.60} is a special token and an entry of the vocabulary; files cannot hold both"
        )
    vocabulary |= special
    gaps = sorted(set(range(max(vocabulary.values()))) - set(vocabulary.values()))
    vocabulary |= {UNUSED_TOKEN.format(number): gap for number, gap in enumerate(gaps)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_REGEX}, "behavior": "Isolated", "invert": False}
    added = sorted(special.items(), key=lambda entry: entry[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **_FLAGS, "special": True} for text, i in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is an entry is one token, as in tiktoken
            "vocab": dict(sorted(vocabulary.items(), key=lambda entry: entry[1])),
            "merges": merges(ranks),
        },
    }


def merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Returns the merges of byte-pair encoding that follow from ranks: every split of a token into two, by rank."""
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        splits.sort(key=lambda split: (ranks[split[0]], ranks[split[1]]))
        pairs += [(token_text(left), token_text(right)) for left, right in splits]
    return pairs


def tokenizer_files(
    ranks: Mapping[bytes, int],
    special: Mapping[str, int],
    named: Mapping[str, str | list[str]],
    templates: str | Mapping[str, str],
    settings: Mapping[str, Any],
) -> dict[str, str]:
    """Returns the text of each file, by name.

    Args:
      named: the texts of eos_token and others.
      settings: more entries of tokenizer_config.json, such as padding_side.
    """
    files = {"tokenizer.json": json.dumps(tokenizer_json(ranks, special), ensure_ascii=False) + "\n"}
    if len(files["tokenizer.json"].encode()) > MAX_JSON:
        raise TokenizerError(f"tokenizer.json would be larger than {MAX_JSON >> 20} MiB, because ids have large gaps")
    templates = {"default": templates} if isinstance(templates, str) else templates
    for name, template in templates.items():
        if not name.replace("-", "").replace("_", "").isalnum():  # it becomes the name of a file
            raise TokenizerError(f"chat_template: the name {name!r:.60} may have letters, digits, - and _ alone")
        files[TEMPLATE_FILE if name == "default" else f"{TEMPLATES_FOLDER}/{name}.jinja"] = template
    named = {
        name: [text for text in value if text in special] if isinstance(value, list) else value
        for name, value in named.items()
    }
    config = {
        "added_tokens_decoder": {str(i): {"content": text, **_FLAGS, "special": True} for text, i in special.items()},
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        **settings,
        **named,
    }
    objects = {
        name: [{"content": t, **_FLAGS} for t in value] if isinstance(value, list) else {"content": value, **_FLAGS}
        for name, value in named.items()
    }
    files["special_tokens_map.json"] = _json(objects)
    files[CONFIG_FILE] = _json(config)
    return files


def write_files(folder: str | Path, files: Mapping[str, str], ranks: Mapping[bytes, int]) -> tuple[str, ...]:
    """Writes a tokenizer's files into a folder, new or not, and returns their paths.

    Files are written aside and renamed, so that each is there as a whole; a new folder appears with all of them.

    Args:
      ranks: the vocabulary that the files hold.

    Raises:
      TokenizerError: the folder holds another tokenizer's files that these do not replace, or cannot be written.
    """
    path = location(folder)
    if is_remote(path):
        raise TokenizerError(f"{folder}: save_pretrained writes to a local folder; copy it from there")
    try:
        _check_others(path, files, ranks)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=path if path.exists() else path.parent) as aside:
            new = Path(aside) / path.name
            for name, text in files.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                _write(new / name, text)
            if path.exists():
                for name in files:
                    (path / name).parent.mkdir(exist_ok=True)
                    os.replace(new / name, path / name)
            else:
                new.rename(path)
    except OSError as error:
        raise TokenizerError(f"{folder}: cannot be written ({error.strerror})") from None
    return tuple(str(path / name) for name in files)


def _check_others(folder: Path, files: Mapping[str, str], ranks: Mapping[bytes, int]) -> None:
    """Raises TokenizerError for files in the folder that would be read beside these, and contradict them."""
    for other in sorted(folder.glob("*.tiktoken")):
        try:
            same = load_ranks(folder, other, {}) == ranks
        except (ConfigError, TokenizerError):
            same = False
        if not same:
            raise TokenizerError(f"{other}: is of another tokenizer; remove it or choose another folder")
    for other in sorted(folder.glob(f"{TEMPLATES_FOLDER}/*.jinja")):
        if f"{TEMPLATES_FOLDER}/{other.name}" not in files:
            raise TokenizerError(f"{other}: is of another tokenizer; remove it or choose another folder")


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
