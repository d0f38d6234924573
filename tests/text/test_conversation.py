"""Tests of apply_chat_template's arguments: batches, arrays, continued messages, masks and templates by name."""

import numpy as np
import pytest

from dbrx_jax import DbrxTokenizer
from dbrx_jax.errors import TokenizerError

SPECIAL = {"<|im_start|>": 300, "<|im_end|>": 301, "<|endoftext|>": 302, "<|pad|>": 303}
RANKS = {bytes([b]): b for b in range(256)}
SHORT = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ '>' if add_generation_prompt }}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}|{% endif %}{% endfor %}"
)
USER = {"role": "user", "content": "é?"}
CHAT = [USER, {"role": "assistant", "content": "日a"}]


@pytest.fixture
def tokenizer():
    return DbrxTokenizer(RANKS, SPECIAL, chat_template=SHORT)


class TestResults:
    def test_one_conversation_or_several(self, tokenizer):
        first, second = [*"é?".encode(), 301], [*"é?".encode(), 301, *"日a".encode(), 301]
        assert tokenizer.apply_chat_template([USER]) == first
        assert tokenizer.apply_chat_template([[USER], CHAT]) == [first, second]
        assert tokenizer.apply_chat_template([[USER], CHAT], tokenize=False) == [
            "é?<|im_end|>",
            "é?<|im_end|>日a<|im_end|>",
        ]
        assert tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False) == "é?<|im_end|>>"

    def test_dict_and_arrays(self, tokenizer):
        options = {"return_tensors": "np", "padding": True, "tokenizer_kwargs": {"pad_to_multiple_of": 6}}
        encoding = tokenizer.apply_chat_template([[USER], CHAT], return_dict=True, **options)
        assert encoding.input_ids.shape == (2, 12)
        assert encoding.attention_mask.sum(axis=1).tolist() == [4, 9]
        np.testing.assert_array_equal(tokenizer.apply_chat_template([[USER], CHAT], **options), encoding.input_ids)
        assert tokenizer.apply_chat_template([USER], return_tensors="np").shape == (1, 4)
        assert tokenizer.apply_chat_template(CHAT, truncation=True, max_length=2) == [*"é".encode()]
        assert len(tokenizer.apply_chat_template(CHAT, max_length=2)) == 9

    def test_assistant_mask_marks_generation_blocks(self, tokenizer):
        options = {"return_dict": True, "return_assistant_tokens_mask": True, "chat_template": MARKED}
        encoding = tokenizer.apply_chat_template([*CHAT, *CHAT], **options)
        assert tokenizer.decode(encoding.input_ids) == "é?|日a<|im_end|>" * 2
        assert encoding.assistant_masks == [0, 0, 0, 0, 1, 1, 1, 1, 1] * 2
        encoding = tokenizer.apply_chat_template([CHAT, [USER]], padding=True, return_tensors="np", **options)
        assert encoding.assistant_masks.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1], [0] * 9]

    def test_mask_includes_a_token_across_the_boundary(self):
        tokenizer = DbrxTokenizer(RANKS | {b"|a": 256}, SPECIAL, chat_template=MARKED)
        messages = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "a"}]
        encoding = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert (encoding.input_ids[-2:], encoding.assistant_masks[-2:]) == ([256, 301], [1, 1])


class TestContinueFinalMessage:
    TRIMMED = SHORT.replace("m.content", "m.content | trim")
    PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>{% endfor %}"

    @pytest.mark.parametrize(
        ("template", "content", "text"),
        [
            (SHORT, "ab ", "é?<|im_end|>ab "),
            (SHORT, "<|im_end|>", "é?<|im_end|><|im_end|>"),
            (TRIMMED, " ab ", "é?<|im_end|>ab"),
            (TRIMMED, "ab", "é?<|im_end|>ab"),
        ],
    )
    def test_text_ends_with_the_last_message(self, tokenizer, template, content, text):
        messages = [USER, {"role": "assistant", "content": content}]
        options = {"continue_final_message": True, "chat_template": template}
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        ids = tokenizer.apply_chat_template(messages, **options)
        assert (rendered, tokenizer.decode(ids), ids.count(301)) == (text, text, 1)
        assert tokenizer(rendered + "<|im_end|>").input_ids == [*ids, *b"<|im_end|>"]
        assert messages[1]["content"] == content

    def test_last_text_part_is_continued(self, tokenizer):
        messages = [{"role": "user", "content": [{"text": "a"}, {"text": "b"}, {"image": "x"}]}]
        options = {"continue_final_message": True, "chat_template": self.PARTS, "tokenize": False}
        assert tokenizer.apply_chat_template(messages, **options) == "ab"

    @pytest.mark.parametrize(
        ("messages", "template", "message"),
        [
            ([], SHORT, "the last message has no text"),
            ([{"role": "assistant", "content": None}], SHORT, "the last message has no text"),
            (CHAT, "x", "the chat template does not print the last message as it is"),
            (CHAT, "{{ messages[1].content[1:] }}", "the chat template does not print the last message as it is"),
        ],
    )
    def test_error(self, tokenizer, messages, template, message):
        with pytest.raises(TokenizerError, match=message):
            tokenizer.apply_chat_template(messages, continue_final_message=True, chat_template=template)


class TestTemplateByName:
    def test_name_template_or_default(self):
        tokenizer = DbrxTokenizer(RANKS, SPECIAL, chat_template={"default": "d", "tool_use": "t", "rag": "r"})

        def text(**options):
            return tokenizer.apply_chat_template(CHAT, tokenize=False, **options)

        assert (text(), text(tools=[{}]), text(chat_template="rag"), text(chat_template="{{ 1 }}")) == (
            "d",
            "t",
            "r",
            "1",
        )
        tokenizer.chat_template = {"rag": "r"}
        with pytest.raises(TokenizerError, match="give a name, because none is the default: rag"):
            text()


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        (CHAT, {"add_generation_prompt": True, "continue_final_message": True}, "choose one"),
        (CHAT, {"return_dict": True, "tokenize": False}, "return_dict: needs tokenize=True"),
        (CHAT, {"return_assistant_tokens_mask": True}, "needs return_dict=True"),
        (CHAT, {"return_assistant_tokens_mask": True, "return_dict": True}, "does not mark the assistant's text"),
        (CHAT, {"add_generation_promt": True}, "no argument add_generation_promt; did you mean add_generation_prompt?"),
        (CHAT, {"return_tensors": "pt"}, "return_tensors: expected"),
        (CHAT, {"tools": [len]}, "tools: number 0 is the Python function len; give its JSON schema"),
        ("text", {}, "conversation: expected a list of messages, got str"),
        (USER, {}, "conversation: expected a list of messages, got dict"),
        ([[USER], [{"content": "x"}]], {}, "conversation 1, message 0: expected an object with a role"),
        ([[USER], USER], {}, "conversation 1: expected a list of messages"),
    ],
)
def test_argument_that_does_not_fit_is_named(tokenizer, conversation, options, message):
    with pytest.raises(TokenizerError) as error:
        tokenizer.apply_chat_template(conversation, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
