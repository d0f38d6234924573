"""Renders conversations with a chat template: checks messages, and continues the last one."""

import difflib
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from dbrx_jax.errors import TokenizerError
from dbrx_jax.text.chat_template import RenderedText, render

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def as_batch(conversation: Any) -> tuple[list[list[Mapping[str, Any]]], bool]:
    """Returns a list of conversations, and whether there was one given rather than a single conversation.

    Raises:
      TokenizerError: a message is not an object with a role.
    """
    if isinstance(conversation, str | Mapping) or not isinstance(conversation, Sequence):
        raise TokenizerError(f"conversation: expected a list of messages, got {type(conversation).__name__}")
    is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
    batch = list(conversation) if is_batch else [conversation]
    for number, messages in enumerate(batch):
        where = f"conversation {number}, " if is_batch else ""
        if not isinstance(messages, list | tuple):
            raise TokenizerError(f"{where.removesuffix(', ')}: expected a list of messages")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise TokenizerError(f"{where}message {index}: expected an object with a role (a text)")
    return [[dict(message) for message in messages] for messages in batch], is_batch


def check_chat_arguments(
    return_dict: bool, tokenize: bool, assistant_mask: bool, continue_final_message: bool, add_generation_prompt: bool
) -> None:
    """Raises TokenizerError for arguments of apply_chat_template that do not go together."""
    if return_dict and not tokenize:
        raise TokenizerError("return_dict: needs tokenize=True")
    if assistant_mask and not return_dict:
        raise TokenizerError("return_assistant_tokens_mask: needs return_dict=True")
    if continue_final_message and add_generation_prompt:
        raise TokenizerError(
            "continue_final_message: continues the last message, and add_generation_prompt begins a new one; choose one"
        )
    if continue_final_message and assistant_mask:
        raise TokenizerError("continue_final_message: does not go with return_assistant_tokens_mask")


def check_variables(template: str, variables: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Raises TokenizerError for a variable that the template does not name and that looks like an argument."""
    for name in variables:
        near = difflib.get_close_matches(name, arguments, 1, cutoff=0.8)
        if near and not re.search(rf"\b{re.escape(name)}\b", template):
            raise TokenizerError(f"apply_chat_template: no argument {name}; did you mean {near[0]}?")


def check_json_schemas(tools: Any) -> None:
    """Raises TokenizerError for tools that are Python functions."""
    for number, tool in enumerate(tools or []):
        if callable(tool):
            raise TokenizerError(
                f"tools: number {number} is the Python function {getattr(tool, '__name__', '')}; give its JSON schema: "
                '{"type": "function", "function": {"name": …, "description": …, "parameters": …}}'
            )


def check_generation_tag(template: str) -> None:
    """Raises TokenizerError if a template does not mark the assistant's text."""
    if not _GENERATION.search(template):
        raise TokenizerError(
            "return_assistant_tokens_mask: the chat template does not mark the assistant's text with {% generation %}"
        )


def render_conversation(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    special_tokens: Mapping[str, str | list[str]],
    continue_final_message: bool = False,
) -> RenderedText:
    """Renders one conversation; see :func:`dbrx_jax.text.chat_template.render`.

    Args:
      continue_final_message: end the text after the content of the last message.

    Raises:
      TokenizerError: the template failed, or the last message's text is not in its output.
    """
    if not continue_final_message:
        return render(template, {**variables, "messages": messages}, special_tokens)
    mark = f"END_OF_THE_FINAL_MESSAGE_{secrets.token_hex(8)}"  # no text has it
    messages, content = _with_mark(messages, mark + " ")
    rendered = render(template, {**variables, "messages": messages}, special_tokens)
    end = rendered.text.rfind(mark)
    if end < 0 or content.strip() not in rendered.text:
        raise TokenizerError("continue_final_message: the chat template does not print the last message as it is")
    if not rendered.text.startswith(mark + " ", end):  # the template strips messages
        end = len(rendered.text[:end].rstrip())
    return RenderedText(rendered.text[:end], _cut(rendered.trusted, end), _cut(rendered.generated, end))


def _with_mark(messages: Sequence[Mapping[str, Any]], mark: str) -> tuple[list[Mapping[str, Any]], str]:
    """Returns the messages with a mark after the last one's text, and that text."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        return [*messages[:-1], {**messages[-1], "content": content + mark}], content
    parts = list(content) if isinstance(content, list | tuple) else []
    for index in reversed(range(len(parts))):
        part = parts[index]
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts[index] = {**part, "text": part["text"] + mark}
            return [*messages[:-1], {**messages[-1], "content": parts}], part["text"]
    raise TokenizerError("continue_final_message: the last message has no text")


def _cut(runs: list[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    return [(start, min(stop, end)) for start, stop in runs if start < end]
