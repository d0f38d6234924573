"""Tests of the tokenizer: published ids, vocabulary files, chat templates, and special tokens in user text."""

import base64
import json
from pathlib import Path

import pytest
import tiktoken_ext
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax import DbrxTokenizer
from dbrx_jax.errors import TokenizerError
from dbrx_jax.text.tokenizer import stop_tokens
from dbrx_jax.text.vocabulary import CL100K_CACHE_NAME, DBRX_SPECIAL_TOKENS, _byte_characters

CL100K = next(p for d in tiktoken_ext.__path__ if (p := Path(d) / "data" / "cl100k_base.tiktoken").exists())
HELLO = "Hello, world! 12345  \n\n  x"
HELLO_IDS = [9906, 11, 1917, 0, 220, 4513, 1774, 19124, 220, 865]
QUESTION = [{"role": "user", "content": "What is Machine Learning?"}]
QUESTION_IDS = [100278, 882, 198, 3923, 374, 13257, 21579, 30, 100279, 198, 100278, 78191, 198]


@pytest.fixture(scope="module")
def dbrx(tmp_path_factory):
    return DbrxTokenizer.from_pretrained(tmp_path_factory.mktemp("empty"), ranks_file=CL100K)


@pytest.fixture(scope="module")
def ranks():
    return {base64.b64decode(t): int(r) for t, r in (line.split() for line in CL100K.read_text().splitlines())}


def gpt2_files(ranks):
    """Returns vocab.json and merges as converters write them: every split of every token, by rank."""
    characters = _byte_characters()
    vocab = {"".join(characters[b] for b in token): rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        for left, right in sorted(splits, key=lambda s: (ranks[s[0]], ranks[s[1]])):
            merges.append([vocab_text(left, characters), vocab_text(right, characters)])
    return vocab, merges


def vocab_text(token, characters):
    return "".join(characters[b] for b in token)


class TestIds:
    def test_encode_matches_published_ids(self, dbrx):
        assert dbrx.encode(HELLO) == HELLO_IDS
        assert dbrx.apply_chat_template(QUESTION, add_generation_prompt=True) == QUESTION_IDS

    def test_merges_cross_the_boundary_of_template_and_content(self, dbrx):
        assert dbrx.apply_chat_template([{"role": "user", "content": "\nhello"}])[:4] == [100278, 882, 271, 15339]

    def test_special_tokens_match_published_ids(self, dbrx):
        assert dbrx.special_tokens == DBRX_SPECIAL_TOKENS
        assert (dbrx.eos_token_id, dbrx.pad_token_id, dbrx.vocab_size) == (100257, 100277, 100280)

    def test_decode_skips_unassigned_ids(self, dbrx):
        assert dbrx.decode([100280, 100351, 100256, 9906, 100270]) == "Hello"

    def test_decode_keeps_or_skips_special_tokens(self, dbrx):
        ids = [100278, 9906, 100279]
        assert dbrx.decode(ids) == "<|im_start|>Hello<|im_end|>"
        assert dbrx.decode(ids, skip_special_tokens=True) == "Hello"

    @settings(max_examples=200)
    @given(st.text())
    def test_decode_inverts_encode(self, dbrx, text):
        assert dbrx.decode(dbrx.encode(text)) == text.encode("utf-8", errors="replace").decode()

    def test_stream_withholds_incomplete_characters(self, dbrx):
        text = "naïve 日本語 🙂 done"
        stream = dbrx.stream()
        pieces = [stream.push([i]) for i in dbrx.encode(text)]
        assert "".join(pieces) + stream.finish() == text
        assert not any("�" in p for p in pieces)
        stream.push(dbrx.encode("🙂")[:1])
        assert stream.finish() == "�"

    def test_pad_fills_on_the_left(self, dbrx):
        padded = dbrx.pad([[1, 2, 3], [4]])
        assert padded["input_ids"].tolist() == [[1, 2, 3], [100277, 100277, 4]]
        assert padded["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.fixture(scope="module")
def small_ranks(ranks):
    """The first 3000 ranks, a vocabulary that is fast to write in every format."""
    return {token: rank for token, rank in ranks.items() if rank < 3000}


@pytest.fixture(scope="module")
def special():
    return {"<|endoftext|>": 3005, "<|im_start|>": 3006, "<|im_end|>": 3007}


class TestVocabularyFormats:
    """Every vocabulary format gives the same ids."""

    def write_vocabulary(self, folder, file_format, small_ranks, special):
        vocab, merges = gpt2_files(small_ranks)
        if file_format == "tiktoken":
            lines = [f"{base64.b64encode(t).decode()} {r}" for t, r in small_ranks.items()]
            (folder / "any.tiktoken").write_text("\n".join(lines) + "\n")
        elif file_format == "vocab.json":
            vocab |= special | {f"<||_unused_{i}_||>": 3000 + i for i in range(5)}
            (folder / "vocab.json").write_text(json.dumps(vocab))
            (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges))
        else:
            joined = [" ".join(m) for m in merges] if file_format == "tokenizer.json, old" else merges
            added = [{"id": i, "content": t, "special": True} for t, i in special.items()]
            data = {"added_tokens": added, "model": {"type": "BPE", "vocab": vocab | special, "merges": joined}}
            (folder / "tokenizer.json").write_text(json.dumps(data))
        if not file_format.startswith("tokenizer.json"):
            added = {str(i): {"content": t, "special": True} for t, i in special.items()}
            (folder / "tokenizer_config.json").write_text(
                json.dumps({"added_tokens_decoder": added, "eos_token": {"content": "<|im_end|>"}, "pad_token": None})
            )

    @pytest.mark.parametrize("file_format", ["tiktoken", "vocab.json", "tokenizer.json", "tokenizer.json, old"])
    def test_vocabulary_format_gives_expected_ids(self, tmp_path, file_format, small_ranks, special):
        self.write_vocabulary(tmp_path, file_format, small_ranks, special)
        tokenizer = DbrxTokenizer.from_pretrained(tmp_path)
        want = DbrxTokenizer(small_ranks, special)
        text = HELLO + " the quick brown fox's naïve 日本語 🙂\r\n\t if x:\n        return 3.14159"
        assert tokenizer.encode(text) == want.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.special_tokens == special
        if file_format in ("tiktoken", "vocab.json"):
            assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (3007, None)
            assert stop_tokens(tmp_path) == ((3007,), None)

    def test_cl100k_as_vocab_json_gives_published_ids(self, tmp_path, ranks, dbrx):
        characters = _byte_characters()
        vocab = {vocab_text(token, characters): rank for token, rank in ranks.items()}
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
        tokenizer = DbrxTokenizer.from_pretrained(tmp_path)
        assert tokenizer.encode(HELLO) == HELLO_IDS
        assert tokenizer.special_tokens == DBRX_SPECIAL_TOKENS

    def test_tiktoken_cache_is_read_and_verified(self, tmp_path, monkeypatch):
        (tmp_path / "checkpoint").mkdir()
        (tmp_path / CL100K_CACHE_NAME).write_bytes(CL100K.read_bytes())
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        assert DbrxTokenizer.from_pretrained(tmp_path / "checkpoint").encode(HELLO) == HELLO_IDS
        with (tmp_path / CL100K_CACHE_NAME).open("a") as f:
            f.write("\n")
        with pytest.raises(TokenizerError, match="SHA-256"):
            DbrxTokenizer.from_pretrained(tmp_path / "checkpoint")

    def test_missing_vocabulary_is_reported(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        with pytest.raises(TokenizerError, match=r"holds no vocabulary .* put the ranks file cl100k_base\.tiktoken"):
            DbrxTokenizer.from_pretrained(tmp_path)
        with pytest.raises(TokenizerError, match="no such folder"):
            DbrxTokenizer.from_pretrained(tmp_path / "x")


TIKTOKEN = "".join(f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
BYTES = {c: i for i, c in enumerate(_byte_characters())}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.tiktoken": "!!! 0"}, "not a tiktoken ranks file"),
        ({"a.tiktoken": "YQ== x"}, "not a tiktoken ranks file"),
        ({"a.tiktoken": "YQ== 0"}, "no entry for the byte 0x00"),
        ({"vocab.json": {**BYTES, "Ġa": 0}, "merges.txt": ""}, "two entries have the same id"),
        ({"vocab.json": {**BYTES, "aa": -4}, "merges.txt": ""}, "the id of 'aa' must be a whole number"),
        ({"vocab.json": {**BYTES, "aa": 10**9}, "merges.txt": ""}, "the id of 'aa' must be a whole number"),
        ({"vocab.json": {**BYTES, "日": 300}, "merges.txt": ""}, "which stands for no byte"),
        ({"vocab.json": {**BYTES, "aa": 300, "bb": 299}, "merges.txt": "a a\nb b"}, "does not follow the order of ids"),
        ({"vocab.json": [1], "merges.txt": ""}, "expected a JSON object"),
        ({"vocab.json": BYTES}, "merges.txt: there is no such file"),
        ({"tokenizer.json": {"model": {"type": "Unigram"}}}, "model.type: expected 'BPE'"),
        ({"tokenizer.json": {"model": {"vocab": BYTES}}}, "model.merges: expected a list"),
        ({"tokenizer.json": "{"}, "not valid JSON"),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "expected an object of objects"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"5": {}}}}, "1 to 256 characters"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "<s>"}}}}, "the id of '<s>'"),
        ({"tokenizer_config.json": {"additional_special_tokens": "x"}, "a.tiktoken": TIKTOKEN}, "expected a list"),
        (
            {"tokenizer_config.json": {"additional_special_tokens": [5]}, "a.tiktoken": TIKTOKEN},
            "expected a text, got 5",
        ),
        ({"tokenizer_config.json": {"chat_template": 5}, "vocab.json": BYTES, "merges.txt": ""}, "expected a text"),
        (
            {
                "tokenizer_config.json": {"added_tokens_decoder": {"65": {"content": "<s>"}}},
                "vocab.json": BYTES,
                "merges.txt": "",
            },
            "the id 65 belongs to a special token and to an entry",
        ),
    ],
)
def test_damaged_vocabulary_files_are_rejected(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(TokenizerError) as error:
        DbrxTokenizer.from_pretrained(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


SPECIAL_TEXTS = st.sampled_from([*DBRX_SPECIAL_TOKENS, "<|", "|>", "im_start", "<", "\n", "system", "\ue000"])


class TestSpecialTokensInText:
    @settings(max_examples=25)
    @given(st.lists(SPECIAL_TEXTS | st.text(max_size=4), max_size=6).map("".join))
    def test_content_never_becomes_a_special_token(self, dbrx, content):
        ids = dbrx.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert [i for i in ids if i >= 100257] == [100278, 100279, 100278]
        assert dbrx.decode(ids) == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"

    def test_role_never_becomes_a_special_token(self, dbrx):
        ids = dbrx.apply_chat_template([{"role": "user<|im_end|>", "content": "x"}])
        assert ids.count(100279) == 1

    @pytest.mark.parametrize("text", [*DBRX_SPECIAL_TOKENS])
    def test_encode_treats_special_tokens_as_text(self, dbrx, text):
        assert max(dbrx.encode(f"a{text}b")) < 100257
        assert dbrx.decode(dbrx.encode(text)) == text


class TestTemplates:
    def test_template_of_the_checkpoint_is_used(self, tmp_path):
        template = (
            "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe DBRX.<|im_end|>\\n' }}{% endif %}"
            + ("{% for m in messages %}{{ m.content | trim }}{% endfor %}{{ eos_token }}")
        )
        config = {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": template}]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = DbrxTokenizer.from_pretrained(tmp_path, CL100K)
        ids = tokenizer.apply_chat_template([{"role": "user", "content": " hi "}])
        assert tokenizer.decode(ids) == "<|im_start|>system\nBe DBRX.<|im_end|>\nhi<|endoftext|>"
        assert [i for i in ids if i >= 100257] == [100278, 100279, 100257]
        (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
        assert DbrxTokenizer.from_pretrained(tmp_path, CL100K).apply_chat_template(QUESTION) == [16]

    @pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
    def test_template_with_a_syntax_error_is_refused(self, tmp_path, file):
        template = "{% for m in messages %}\n{{ m.content }}"
        (tmp_path / file).write_text(template if file.endswith("jinja") else json.dumps({"chat_template": template}))
        with pytest.raises(TokenizerError, match=r"the chat template is not valid Jinja: line 2: .*endfor") as error:
            DbrxTokenizer.from_pretrained(tmp_path, CL100K)
        assert str(error.value).startswith(f"{tmp_path}: ")
        assert "\n" not in str(error.value)

    def test_templates_see_the_special_tokens_of_the_checkpoint(self, tmp_path):
        names = {
            "bos_token": {"content": "<|im_start|>"},
            "pad_token": None,
            "unk_token": "<|im_end|>",
            "sep_token": "nowhere",
            "additional_special_tokens": ["<|pad|>", {"content": "<|fim_prefix|>"}],
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
        (tmp_path / "chat_template.jinja").write_text(
            "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token }}{{ additional_special_tokens }}"
            "{{ additional_special_tokens[0] }}"
        )
        tokenizer = DbrxTokenizer.from_pretrained(tmp_path, CL100K)
        ids = tokenizer.apply_chat_template(QUESTION)
        assert tokenizer.decode(ids) == "<|im_start|><|endoftext|><|im_end|>['<|pad|>', '<|fim_prefix|>']<|pad|>"
        assert [i for i in ids if i >= 100257] == [100278, 100257, 100279, 100277]
