"""Tests of save_pretrained: what is written loads as the same tokenizer, whole or not at all."""

import json
import os

import pytest

from dbrx_jax import DbrxTokenizer
from dbrx_jax.demo import source_folder
from dbrx_jax.errors import TokenizerError
from dbrx_jax.text.save import merges, tokenizer_json

SPECIAL = {"<|endoftext|>": 262, "<|pad|>": 260, "<|im_end|>": 265}
RANKS = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258, b"xyz": 259}
FILES = {"chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def tokenizer():
    tokenizer = DbrxTokenizer(RANKS, SPECIAL, other_tokens={"additional_special_tokens": ["<|im_end|>", "nowhere"]})
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ eos_token }}\r\n{{ messages }}\n"
    tokenizer.model_max_length, tokenizer.padding_side = 77, "right"
    return tokenizer


def state(tokenizer):
    names = ("special_tokens", "all_special_tokens", "pad_token", "padding_side", "truncation_side", "model_max_length")
    return tokenizer.get_vocab(), [getattr(tokenizer, name) for name in names]


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class TestRoundTrip:
    def test_saved_tokenizer_loads_as_the_same(self, tokenizer, tmp_path):
        paths = tokenizer.save_pretrained(tmp_path / "a" / "b")
        assert (
            {os.path.relpath(path, tmp_path / "a" / "b") for path in paths} == FILES == files_in(tmp_path / "a" / "b")
        )
        loaded = DbrxTokenizer.from_pretrained(tmp_path / "a" / "b")
        assert loaded.all_special_tokens == ["<|endoftext|>", "<|im_end|>"]
        tokenizer.special_tokens_map["additional_special_tokens"].remove("nowhere")
        assert state(loaded) == state(tokenizer)
        assert loaded.chat_template == "{{ eos_token }}\n{{ messages }}\n"
        assert loaded.name_or_path == str(tmp_path / "a" / "b")
        for text in ("abcbc", "xyz", "12345 ab", "é\n"):
            assert loaded.encode(text) == tokenizer.encode(text)

    def test_several_templates(self, tokenizer, tmp_path):
        tokenizer.chat_template = {"default": "d", "tool_use": "t"}
        tokenizer.save_pretrained(tmp_path)
        assert files_in(tmp_path) == {*FILES, "additional_chat_templates/tool_use.jinja"}
        assert DbrxTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template

    def test_demo_has_transformers_ids(self):
        """The tokenizers library takes a special token's id from the entries, and else numbers without gaps."""
        data = json.loads((source_folder() / "tokenizer.json").read_text())
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        vocabulary = data["model"]["vocab"]
        assert {text: vocabulary.get(text) for text in special} == special
        assert sorted(vocabulary.values()) == list(range(2554))
        made = tokenizer_json(*_contents(DbrxTokenizer.from_pretrained(source_folder())))
        assert made["pre_tokenizer"] == data["pre_tokenizer"]
        assert made["decoder"] == data["decoder"]
        assert made["model"]["vocab"] == vocabulary


def _contents(tokenizer):
    return tokenizer._ranks, tokenizer.special_tokens


class TestTokenizerJson:
    def test_merges_are_all_splits_by_rank(self):
        ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 4, b"bc": 3, b"abc": 5, b"xyz": 6}
        assert merges(ranks) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]

    def test_gaps_are_filled_with_unused_tokens(self):
        vocabulary = tokenizer_json(RANKS, SPECIAL)["model"]["vocab"]
        assert [text for text, i in vocabulary.items() if i > 258] == [
            *(
                "xyz",
                "<|pad|>",
                "<||_unused_0_||>",
                "<|endoftext|>",
                "<||_unused_1_||>",
                "<||_unused_2_||>",
                "<|im_end|>",
            )
        ]

    def test_special_token_that_is_also_text_is_refused(self):
        with pytest.raises(TokenizerError, match="'ab' is a special token and an entry of the vocabulary"):
            tokenizer_json(RANKS, {"ab": 300})


class TestWriting:
    def test_existing_files_are_replaced_and_others_stay(self, tokenizer, tmp_path):
        (tmp_path / "tokenizer.json").write_text("old")
        (tmp_path / "model.safetensors").write_text("weights")
        tokenizer.save_pretrained(str(tmp_path))
        assert files_in(tmp_path) == {*FILES, "model.safetensors"}
        assert state(DbrxTokenizer.from_pretrained(tmp_path))[0] == tokenizer.get_vocab()

    @pytest.mark.parametrize("exists", [True, False])
    def test_full_disk_leaves_what_was_there(self, tokenizer, tmp_path, monkeypatch, exists):
        folder = tmp_path / "new"
        if exists:
            folder.mkdir()
            (folder / "tokenizer.json").write_text("old")
        calls = []

        def full(_):
            calls.append(1)
            if len(calls) == 3:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(TokenizerError, match=r"new: cannot be written \(No space left on device\)"):
            tokenizer.save_pretrained(folder)
        assert files_in(tmp_path) == ({"new/tokenizer.json"} if exists else set())
        assert folder.exists() == exists
        if exists:
            assert (folder / "tokenizer.json").read_text() == "old"

    @pytest.mark.parametrize("name", ["x.tiktoken", "additional_chat_templates/x.jinja"])
    def test_other_tokenizers_files_are_not_mixed_in(self, tokenizer, tmp_path, name):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("other")
        with pytest.raises(TokenizerError, match=f"{name}: is of another tokenizer; remove it"):
            tokenizer.save_pretrained(tmp_path)
        assert files_in(tmp_path) == {name}

    def test_own_ranks_file_stays(self, tmp_path):
        ranks = "".join(f"{base64(token)} {rank}\n" for token, rank in RANKS.items())
        (tmp_path / "x.tiktoken").write_text(ranks)
        tokenizer = DbrxTokenizer.from_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert DbrxTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()

    @pytest.mark.parametrize("name", ["../x", "a/b", ".", ""])
    def test_template_names_stay_in_the_folder(self, tokenizer, tmp_path, name):
        tokenizer.chat_template = {name: "x"}
        with pytest.raises(TokenizerError, match="may have letters, digits, - and _ alone"):
            tokenizer.save_pretrained(tmp_path / "new")
        assert not list(tmp_path.iterdir())

    def test_what_is_no_folder_is_refused(self, tokenizer, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(TokenizerError, match="file: cannot be written"):
            tokenizer.save_pretrained(tmp_path / "file")
        with pytest.raises(TokenizerError, match="writes to a local folder"):
            tokenizer.save_pretrained("memory://x")
        with pytest.raises(TokenizerError, match="push_to_hub=True is not supported"):
            tokenizer.save_pretrained(tmp_path, push_to_hub=True)


def base64(token):
    import base64

    return base64.b64encode(token).decode()


class TestLoadingOptions:
    def test_options_replace_the_folders(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        loaded = DbrxTokenizer.from_pretrained(
            tmp_path,
            padding_side="left",
            pad_token="<|pad|>",
            model_max_length=5,
            use_fast=True,
            trust_remote_code=True,
        )
        assert (loaded.padding_side, loaded.pad_token_id, loaded.model_max_length) == ("left", 260, 5)
        with pytest.raises(TokenizerError, match="from_pretrained: no argument pading_side; did you mean padding_side"):
            DbrxTokenizer.from_pretrained(tmp_path, pading_side="left")

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"padding_side": "both"}, "padding_side: expected left or right, got 'both'"),
            ({"model_max_length": -1}, "model_max_length: expected a number above 0, got -1"),
            ({"chat_template": [{"name": "x"}]}, "chat_template: expected objects with name and template"),
        ],
    )
    def test_unusable_setting_is_reported(self, tokenizer, tmp_path, entry, message):
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").unlink()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | entry))
        with pytest.raises(TokenizerError, match=message):
            DbrxTokenizer.from_pretrained(tmp_path)
