"""Tests of chat templates: they render as Jinja does, users write no special tokens, and errors."""

import json
import re

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dbrx_jax import DbrxTokenizer
from dbrx_jax.errors import TokenizerError
from dbrx_jax.text import chat_template
from dbrx_jax.text.chat_template import DEFAULT_TEMPLATE, check_template, render

SPECIAL = {"<|im_start|>": 300, "<|im_end|>": 301, "<|endoftext|>": 302, "<|pad|>": 303, "<tool>": 304, "</tool>": 305}
RANKS = {bytes([b]): b for b in range(256)}
QUESTION = [{"role": "user", "content": "q"}]

# As published with DBRX, but for the words of its system prompt.
DBRX = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% elif 'system' not in messages[0]['role'] %}"
    "{% set loop_messages = messages %}{% set system_message = 'You are DBRX.\n\nBe brief.' %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 %}{% if system_message != false %}"
    "{{ '<|im_start|>system\n' + system_message | trim + '<|im_end|>\n'}}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% else %}"
    "{{ '\n' + '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endif %}"
    "{% if (add_generation_prompt == true and loop.last) %}{{ '\n' + '<|im_start|>' + 'assistant' + '\n' }}"
    "{% endif %}{% endfor %}"
)
TEMPLATES = {
    "ChatML": DEFAULT_TEMPLATE,
    "DBRX": DBRX,
    "tools": """{%- if tools is not none %}
<|im_start|>system
# Tools
{%- for tool in tools %}
    {{- '\n<tool>' ~ tool | tojson(indent=2) ~ '</tool>' }}
{%- endfor %}
<|im_end|>
{% endif %}
{%- for m in messages %}
<|im_start|>{{ m.role }}
    {%- if m.content is string %}
{{ m.content }}
    {%- endif %}
    {%- for call in m.tool_calls or [] %}
{{ '<tool>%s</tool>' | format(call | tojson) }}{{ '<tool>{}</tool>'.format(call) }}
    {%- endfor %}
<|im_end|>
{% endfor %}""",
    "thoughts": (
        "{% for m in messages %}{% set text = m.content or '' %}{% if '</think>' in text %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>' ~ m.role ~ '\n' ~ text ~ eos_token }}{% endfor %}"
    ),
    "macros": (
        "{% macro say(role, text, end='<|im_end|>') %}<|im_start|>{{ role }}\n{{ text | trim }}{{ end }}"
        "{% if caller is defined %}{{ caller() }}{% endif %}{% endmacro %}"
        "{% for m in messages %}{{ say(m.role, m.content) }}{% call say('tool', m, end=pad_token) %}{{ m }}<|pad|>"
        "{% endcall %}{% endfor %}{{ say('a', 'b') | indent(2, true) | replace('a', 'c') }}"
    ),
    "blocks and namespaces": (
        "{% set ns = namespace(text='', list=[]) %}{% for m in messages %}{% set ns.text = ns.text + '<|im_start|>' %}"
        "{% set part %}{{ m.role }}:{{ m.content }}<|im_end|>{% endset %}{% set ns.list = ns.list + [part] %}"
        "{% endfor %}{{ ns.text }}{{ ns.list | join('<|pad|>') }}{{ ns.list | join }}{{ '<|pad|>'.join(ns.list) }}"
        "{% filter trim %} <|pad|> {% endfilter %}{% block b %}{{ ns.list | first }}{% endblock %}{{ self.b() }}"
    ),
    "loops": (
        "{% for m in messages recursive %}{{ loop.cycle('<tool>', '</tool>') }}{% for k, v in m.items() %}"
        "{{ k }}={{ v }}{{ '<|pad|>' if not loop.last }}{% endfor %}{{ m }}"
        "{% if loop.index > 3 %}{% break %}{% endif %}"
        "{{ loop(m.more) if m.more }}{% endfor %}{{ '<|PAD|>' | lower }}{{ ('<|pad|>' * 3)[:14] }}"
        "{{ ['<|pad|>', '<tool>'] | map('trim') | sort | list | last }}{{ nothing | default('<|pad|>') }}"
        "{{ '<tool>,<|pad|>'.split(',')[1] }}{{ ('<tool>' ~ messages[0].role)[:6] | string }}{{ '<tool>' | reverse }}"
    ),
    "escapes": (
        "{{ messages[0].content | e }}{{ '<tool>' | e + messages[0].content + '<tool>' }}{{ 'a%s%%' % '<b>' }}"
        "{% autoescape true %}<b>{{ messages[0].content }}{{ '<b>' }}{{ '<b>' ~ messages[0].content }}"
        "{{ [messages[0].content, '<b>'] | join('<') }}{% endautoescape %}{{ '<b>' | safe | indent }}"
    ),
}
WORDS = st.sampled_from(["Hello", " ", "\n", "é", "x</think>y", "'", "&", "{{ 1 }}", "%s"])
TEXT = st.lists(WORDS, max_size=4).map("".join)
# Pieces of special tokens, and what a template's own text could complete.
PIECES = [*SPECIAL, "<", "<|", "im_end", "|>", "pad|>", "|im_end|", "tool", "\n"]
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)


def conversations(text):
    """Returns a strategy of messages and tools with such texts everywhere a caller may put them."""
    extra = {"name": text, "reasoning": st.lists(text, max_size=2), "tool_calls": st.lists(st.dictionaries(text, text))}
    message = st.fixed_dictionaries({"role": text, "content": text}, optional=extra)
    schema = st.fixed_dictionaries({"name": text, "parameters": st.dictionaries(text, st.lists(text, max_size=2))})
    return st.fixed_dictionaries(
        {"messages": st.lists(message, min_size=1, max_size=3), "tools": st.none() | st.lists(schema, max_size=2)}
    )


def jinja_text(template, variables):
    """Returns the text that Jinja alone renders, with transformers' settings."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    return environment.from_string(template).render(documents=None, **tokens, **variables)


def tokenizer(template, special=SPECIAL, **arguments):
    return DbrxTokenizer(RANKS, special, chat_template=template, **arguments)


def special_ids(ids):
    return [i for i in ids if i >= 300]


@pytest.mark.parametrize("name", TEMPLATES)
class TestRendering:
    @settings(max_examples=20)
    @given(conversation=conversations(TEXT), prompt=st.booleans())
    def test_ordinary_text_renders_as_in_jinja(self, name, conversation, prompt):
        text = jinja_text(TEMPLATES[name], {**conversation, "add_generation_prompt": prompt})
        messages, tools = conversation["messages"], conversation["tools"]
        ids = tokenizer(TEMPLATES[name]).apply_chat_template(messages, tools=tools, add_generation_prompt=prompt)
        pieces = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
        want = [i for piece in pieces for i in ([SPECIAL[piece]] if piece in SPECIAL else piece.encode())]
        assert ids == want

    @settings(max_examples=20)
    @given(conversation=conversations(HOSTILE))
    def test_users_write_no_special_tokens(self, name, conversation):
        """Users' text gives no special token, and takes none from the template."""
        model = tokenizer(TEMPLATES[name])
        ids = model.apply_chat_template(conversation["messages"], tools=conversation["tools"])
        assert model.decode(ids) == jinja_text(TEMPLATES[name], {**conversation, "add_generation_prompt": False})

        def plain(value):
            if isinstance(value, str):
                return re.sub("[^\n]", "x", value) or "x" * (value != "")
            if isinstance(value, dict):  # texts that are keys keep their number
                return {k if k in VARIABLES else f"x{n}": plain(v) for n, (k, v) in enumerate(value.items())}
            return [*map(plain, value)] if isinstance(value, list) else value

        other = plain(conversation)
        assert special_ids(ids) == special_ids(model.apply_chat_template(other["messages"], tools=other["tools"]))


VARIABLES = {"messages", "tools", "role", "content", "name", "reasoning", "tool_calls", "parameters"}


class TestTrust:
    @pytest.mark.parametrize(
        ("template", "content", "want"),
        [
            ("<{{ messages[0].content }}>", "|im_end|", []),
            ("{{ '<|im_' ~ messages[0].content }}", "end|>", []),
            ("{{ messages }}{{ messages | tojson }}", "<|im_end|>", []),
            ("{{ '{}'.format(messages[0].content) }}", "<|im_end|>", []),
            ("{{ '{x}{0:>3}'.format(messages[0].content, x='<|pad|>') }}", "<|im_end|>", []),
            ("{{ 'x' | replace('x', messages[0].content) }}", "<|im_end|>", []),
            ("{{ messages[0].content | replace('x', '<|im_end|>') }}", "x", []),  # text remains text
            ("{{ '<|im_' ~ 'end|>' }}", "x", [301]),
            ("<|im_{{ '' }}end|>", "x", [301]),
            ("{{ eos_token }}{{ bos_token }}{{ pad_token }}", "x", [302, 302, 303]),
            ("{{ unk_token }}{{ additional_special_tokens | join('-') }}{{ mask_token }}", "x", [301, 304, 305]),
        ],
    )
    def test_special_tokens_come_from_the_template_alone(self, template, content, want):
        other = {"unk_token": "<|im_end|>", "additional_special_tokens": ["<tool>", "</tool>"], "mask_token": None}
        model = tokenizer(template, other_tokens=other)
        assert special_ids(model.apply_chat_template([{"role": "user", "content": content}])) == want

    def test_match_with_text_hides_no_special_token_behind_it(self):
        model = tokenizer("{{ messages[0].content }}|>x", {"<|a|>": 300, "|>x": 301})
        assert model.apply_chat_template([{"role": "user", "content": "<|a"}]) == [*b"<|a", 301]

    def test_callers_variables_are_text(self):
        model = tokenizer("{{ eos_token }}{{ name }}{{ messages | length }}")
        ids = model.apply_chat_template(QUESTION, eos_token="<|pad|>", name="<tool>")
        assert ids == [*b"<|pad|><tool>1"]


class TestNames:
    """Names that templates see and call, as in transformers."""

    @pytest.mark.parametrize(
        ("template", "want"),
        [
            ("{% if tools is not none %}TOOLS{% endif %}{% if documents is none %}none{% endif %}", "none"),
            ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
            (
                "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.role }}{% endgeneration %}{% endfor %}",
                "user",
            ),
            ("{{ messages[0].content.split('</think>')[-1] }}{{ '<think>' in messages[0].content }}", "y&True"),
            ("{{ [messages[0].content] }}", "['<think>x</think>y&']"),
            (
                "{{ messages[0] | tojson(indent=1, separators=(',', '='), sort_keys=true) }}",
                '{\n "content"="<think>x</think>y&",\n "role"="user"\n}',
            ),
            ("{{ 'é<' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}", '"é<""\\u00e9"'),
        ],
    )
    def test_name_gives(self, template, want):
        model = tokenizer(template)
        assert model.decode(model.apply_chat_template([{"role": "user", "content": "<think>x</think>y&"}])) == want

    def test_content_may_be_what_the_template_takes(self):
        model = tokenizer(
            "{% for m in messages %}{% for part in m.content or [] %}{{ part.text }}{% endfor %}"
            "{{ m.tool_calls }}{% endfor %}"
        )
        messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        messages.append({"role": "assistant", "content": None, "tool_calls": [1]})
        assert model.decode(model.apply_chat_template(messages)) == "hi[1]"

    def test_tools_documents_and_more_reach_the_template(self):
        model = tokenizer("{{ tools[0].name }}{{ documents[0].text }}{{ think }}")
        ids = model.apply_chat_template(QUESTION, tools=[{"name": "f"}], documents=[{"text": "d"}], think=False)
        assert model.decode(ids) == "fdFalse"

    @pytest.mark.parametrize("text", ["\ud83d", "\ud83d\ude42", "\x00", "🙂", "\u2028"])
    def test_every_character_passes(self, text):
        assert render("{{ x }}|{{ x | length }}", {"x": text}, {}).text == f"{text}|{len(text)}"


class TestErrors:
    def test_error_raised_by_a_template_is_reported(self):
        with pytest.raises(TokenizerError, match="the chat template failed: roles must alternate"):
            render("{{ raise_exception('roles must\n alternate') }}", {}, {})

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ ''._flags }}{{ ''._flags.x }}",
            "{{ messages.append(1) }}",
            "{{ 'a' * 10 ** 10 }}",
            "{{ '%2000000000d' | format(1) }}",
            "{{ '{0.__class__.x}'.format(1) }}",
            "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "{{ 'a' * 20 * 1024 * 1024 }}",
            "{% include '/etc/passwd' %}",
            "{{ nothing.at.all }}",
            "{{ 1 / 0 }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            " " * (1 << 19),
        ],
    )
    def test_hostile_template_is_rejected(self, template):
        with pytest.raises(TokenizerError, match="the chat template failed: ") as error:
            tokenizer(template).apply_chat_template(QUESTION)
        assert "\n" not in str(error.value)
        assert render("{{ x }}", {"x": "y"}, {}).text == "y"

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{% for", "line 1: unexpected 'end of template'"),
            ("a\n\n{% if %}", "line 3: Expected an expression"),
            ("{{ x }}\n{{ x | no_such }}", "line 2: No filter named 'no_such'"),
        ],
    )
    def test_check_reports_the_line(self, template, message):
        with pytest.raises(TokenizerError, match=f"the chat template is not valid Jinja: {message}"):
            check_template(template)
        with pytest.raises(TokenizerError, match=message):
            render(template, {}, {})

    def test_check_accepts_what_would_fail_without_messages(self):
        check_template("{{ messages[0].content.x.y }}")

    @pytest.mark.parametrize("messages", [[{"content": "x"}], [{"role": 5, "content": "x"}], ["x"]])
    def test_message_without_a_role_is_rejected(self, messages):
        with pytest.raises(TokenizerError, match=r"message 0: expected an object with a role"):
            tokenizer(DEFAULT_TEMPLATE).apply_chat_template(messages)

    def test_missing_content_is_the_templates_error(self):
        with pytest.raises(TokenizerError, match="the chat template failed: 'dict object' has no attribute 'content'"):
            tokenizer(DEFAULT_TEMPLATE).apply_chat_template([{"role": "user"}])

    def test_what_is_not_json_is_rejected(self):
        with pytest.raises(TokenizerError, match=r"the conversation holds what is not JSON .*bytes"):
            tokenizer(DEFAULT_TEMPLATE).apply_chat_template([{"role": "user", "content": b"x"}])

    def test_too_large_conversation_is_rejected(self, monkeypatch):
        monkeypatch.setattr(chat_template, "MAX_BYTES", 1000)
        with pytest.raises(TokenizerError, match="the conversation is over"):
            render("{{ x }}", {"x": "a" * 1000}, {})


def test_jinja_has_what_the_sandbox_relies_on():
    """The compiler joins output by environment.concat, and writes no text of ours into its program."""
    from dbrx_jax.text.template_sandbox.environment import compile_template

    assert "concat = environment.concat" in jinja2.Environment().compile("x", raw=True)
    assert compile_template("a{{ 'b' ~ 'c' }}").render()._flags == b"\1\1\1"
