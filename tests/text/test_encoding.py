"""Tests of calling the tokenizer: padding, truncation, arrays, names of tokens, and errors of options."""

import numpy as np
import pytest

from dbrx_jax import DbrxTokenizer
from dbrx_jax.errors import TokenizerError

SPECIAL = {"<|im_start|>": 300, "<|im_end|>": 301, "<|endoftext|>": 302, "<|pad|>": 303}
RANKS = {bytes([b]): b for b in range(256)} | {b"ab": 256}


@pytest.fixture
def tokenizer():
    return DbrxTokenizer(RANKS, SPECIAL, other_tokens={"additional_special_tokens": ["<|im_end|>", "<|pad|>"]})


class TestCall:
    def test_one_text_gives_a_row_as_dict_and_attributes(self, tokenizer):
        encoding = tokenizer("abc")
        assert encoding == {"input_ids": [256, 99], "attention_mask": [1, 1]}
        assert (encoding.input_ids, encoding.attention_mask) == ([256, 99], [1, 1])
        assert tokenizer(["abc"], return_length=True) == {
            "input_ids": [[256, 99]],
            "attention_mask": [[1, 1]],
            "length": [2],
        }
        with pytest.raises(AttributeError, match="has no token_type_ids; it has input_ids, attention_mask"):
            _ = encoding.token_type_ids

    @pytest.mark.parametrize(
        ("options", "ids"),
        [
            ({}, [[97], [], [98, 99, 100, 101]]),
            ({"padding": "do_not_pad", "truncation": "do_not_truncate"}, [[97], [], [98, 99, 100, 101]]),
            ({"padding": True}, [[303, 303, 303, 97], [303] * 4, [98, 99, 100, 101]]),
            ({"padding": "longest", "padding_side": "right"}, [[97, 303, 303, 303], [303] * 4, [98, 99, 100, 101]]),
            ({"padding": True, "pad_to_multiple_of": 3}, [[*[303] * 5, 97], [303] * 6, [303, 303, 98, 99, 100, 101]]),
            ({"padding": "max_length", "max_length": 2}, [[303, 97], [303, 303], [98, 99, 100, 101]]),
            ({"padding": "max_length", "max_length": 2, "truncation": True}, [[303, 97], [303, 303], [98, 99]]),
            ({"max_length": 2}, [[97], [], [98, 99]]),
            ({"max_length": 2, "truncation": False}, [[97], [], [98, 99, 100, 101]]),
            ({"max_length": 2, "truncation": True, "truncation_side": "left"}, [[97], [], [100, 101]]),
            ({"truncation": True}, [[97], [], [98, 99, 100]]),  # model_max_length
        ],
    )
    def test_rows_are_padded_and_cut(self, tokenizer, options, ids):
        tokenizer.model_max_length = 3
        encoding = tokenizer(["a", "", "bcde"], **options)
        assert encoding.input_ids == ids
        assert encoding.attention_mask == [[int(i != 303) for i in row] for row in ids]

    def test_the_tokenizers_sides_are_the_default(self, tokenizer):
        tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
        assert tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2).input_ids == [[97, 303], [99, 100]]
        assert tokenizer.pad([[5], [6, 7]])["input_ids"].tolist() == [[5, 303], [6, 7]]

    @pytest.mark.parametrize("kind", ["np", "jax"])
    def test_arrays_are_int32_with_a_batch_dimension(self, tokenizer, kind):
        encoding = tokenizer("abc", return_tensors=kind)
        assert {k: (np.asarray(v).tolist(), v.dtype) for k, v in encoding.items()} == {
            "input_ids": ([[256, 99]], np.int32),
            "attention_mask": ([[1, 1]], np.int32),
        }
        assert isinstance(encoding.input_ids, np.ndarray) == (kind == "np")
        assert tokenizer("", return_tensors=kind).input_ids.shape == (1, 0)
        assert tokenizer.encode("abc", return_tensors=kind).shape == (1, 2)
        assert list(tokenizer("a", return_tensors=kind, return_attention_mask=False)) == ["input_ids"]

    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("a", {"paddding": True}, "tokenizer: no argument paddding; did you mean padding?"),
            ("a", {"xyz": True}, "tokenizer: no argument xyz; it takes max_length, pad_to_multiple_of, padding"),
            ("a", {"pad_token_id": 1}, "no argument pad_token_id"),
            ("a", {"return_tensors": "pt"}, "got 'pt'; torch.from_numpy takes np arrays"),
            ("a", {"return_offsets_mapping": True}, "return_offsets_mapping=True is not supported"),
            ("a", {"text_pair": "b"}, "text_pair='b' is not supported"),
            ("a", {"padding": "most"}, "padding: expected False or True or 'longest'"),
            ("a", {"padding": 1}, "padding: expected"),
            ("a", {"truncation": "only_second"}, "truncation: expected"),
            ("a", {"padding_side": "both"}, "padding_side: expected 'left' or 'right'"),
            ("a", {"max_length": 0}, "max_length: expected a whole number above 0, got 0"),
            ("a", {"max_length": 2.5}, "max_length: expected a whole number"),
            ("a", {"padding": "max_length"}, "needs max_length="),
            ("a", dict(padding=True, truncation=True, max_length=5, pad_to_multiple_of=4), "5 is not a multiple of"),
            (["a", "bc"], {"return_tensors": "np"}, "the rows have 1 to 2 tokens; padding=True makes them equal"),
            (5, {}, "expected a text, or a list of texts, got 5"),
            ([["a"]], {}, "expected a text, or a list of texts, got ['a']"),
            ([{"role": "user", "content": "x"}], {}, "apply_chat_template takes messages"),
        ],
    )
    def test_error_names_the_argument(self, tokenizer, text, options, message):
        with pytest.raises(TokenizerError) as error:
            tokenizer(text, **options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_arguments_that_ask_for_nothing_are_accepted(self, tokenizer):
        options = {"add_special_tokens": True, "return_token_type_ids": False, "text_pair": None, "stride": 0}
        assert tokenizer("abc", **options) == tokenizer("abc")
        assert tokenizer.encode("abc", add_special_tokens=False) == [256, 99]
        assert tokenizer.decode([97], clean_up_tokenization_spaces=False) == "a"


class TestSpecialTokensInText:
    TEXT = "a<|im_end|><|pad|>"

    def test_text_stays_text_unless_allowed(self, tokenizer):
        assert tokenizer(self.TEXT).input_ids == [*self.TEXT.encode()]
        assert tokenizer(self.TEXT, allowed_special="all").input_ids == [97, 301, 303]
        assert tokenizer.encode(self.TEXT, allowed_special={"<|pad|>"}) == [*b"a<|im_end|>", 303]
        for wrong in ("<|pad|>", ["<|x|>"]):
            with pytest.raises(TokenizerError, match='allowed_special: expected "all" or a list of'):
                tokenizer(self.TEXT, allowed_special=wrong)

    def test_rendered_text_keeps_the_templates_special_tokens(self, tokenizer):
        messages = [{"role": "user", "content": "<|im_end|>"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == "<|im_start|>user\n<|im_end|><|im_end|>"
        ids = tokenizer.apply_chat_template(messages)
        assert (ids[0], ids[-1], ids.count(301)) == (300, 301, 1)
        assert tokenizer(text).input_ids == ids
        assert tokenizer(text + "<|pad|>").input_ids == [*ids, *b"<|pad|>"]
        assert tokenizer(f"{text}!").input_ids == [*text.encode(), 33]


class TestTokens:
    def test_ids_and_tokens(self, tokenizer):
        tokens = ["ab", "Ġ", "Ã", "<|pad|>", None]
        assert tokenizer.convert_ids_to_tokens(np.array([256, 32, 0xC3, 303, 299])) == tokens
        assert tokenizer.convert_tokens_to_ids([*tokens[:4], "<pad>", "日"]) == [256, 32, 0xC3, 303, None, None]
        assert (tokenizer.convert_tokens_to_ids("ab"), tokenizer.convert_ids_to_tokens(256)) == (256, "ab")
        assert tokenizer.tokenize("ab é") == ["ab", "Ġ", "Ã", "©"]

    def test_vocabulary(self, tokenizer):
        vocabulary = tokenizer.get_vocab()
        assert (vocabulary["ab"], vocabulary["Ġ"], vocabulary["<|pad|>"], len(vocabulary)) == (256, 32, 303, 261)
        assert len(tokenizer) == tokenizer.vocab_size == 304

    def test_named_tokens(self, tokenizer):
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 302)
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 303)
        assert (tokenizer.bos_token_id, tokenizer.unk_token, tokenizer.unk_token_id) == (302, None, None)
        assert tokenizer.all_special_tokens == ["<|endoftext|>", "<|pad|>", "<|im_end|>"]
        assert tokenizer.all_special_ids == [302, 303, 301]

    def test_named_token_can_be_set(self, tokenizer):
        tokenizer.pad_token = tokenizer.eos_token
        assert (tokenizer.pad_token_id, tokenizer(["a", ""], padding=True).input_ids) == (302, [[97], [302]])
        tokenizer.eos_token_id = 301
        assert tokenizer.eos_token == "<|im_end|>"
        tokenizer.chat_template = "{{ eos_token }}{{ pad_token }}"
        assert tokenizer.apply_chat_template([]) == [301, 302]
        tokenizer.pad_token = None
        assert tokenizer.pad_token_id is None
        with pytest.raises(TokenizerError, match=r"pad_token: 'x' is no special token; there are <\|endoftext\|>"):
            tokenizer.pad_token = "x"
        with pytest.raises(TokenizerError, match="pad_token: '97' is no special token"):
            tokenizer.pad_token_id = 97

    def test_decode_takes_ids_lists_and_arrays(self, tokenizer):
        assert [tokenizer.decode(x) for x in (97, np.int32(97), [97, 301], np.array([97, 301]))] == [
            *("a", "a", "a<|im_end|>", "a<|im_end|>")
        ]
        assert tokenizer.batch_decode(np.array([[97, 301], [98, 303]]), skip_special_tokens=True) == ["a", "b"]
        assert tokenizer.batch_decode([[97], [98, 98]]) == ["a", "bb"]
        assert tokenizer.batch_decode([97, 98]) == ["a", "b"]
        for wrong in ([[97]], [1.5], np.array([[97]]), "a"):
            with pytest.raises(TokenizerError, match=r"expected token ids of one row, got .*; batch_decode takes rows"):
                tokenizer.decode(wrong)
        with pytest.raises(TokenizerError, match="decode: no argument skip_special; did you mean skip_special_tokens"):
            tokenizer.decode([97], skip_special=True)
