"""Prompts of requests as token ids: texts, ids and conversations."""

import json
from collections.abc import Sequence
from typing import Any

from dbrx_jax.serving.errors import bad_request, context_length_error
from dbrx_jax.serving.protocol import Message
from dbrx_jax.serving.settings import Settings
from dbrx_jax.text.tokenizer import DbrxTokenizer

EMPTY = "the prompt is empty; give at least one token"
EXPECTED = "prompt: expected a text, token ids, or a list of either"


class PromptReader:
    """Reads the prompts of requests, and refuses what is too long before it is tokenised."""

    def __init__(self, tokenizer: DbrxTokenizer, settings: Settings):
        self._tokenizer, self._settings = tokenizer, settings
        longest = max(len(tokenizer.token_bytes(token)) for token in range(len(tokenizer)))
        self._max_bytes = settings.max_model_len * longest

    def prompts(self, prompt: Any) -> list[list[int]]:
        """Returns the token ids of the prompts of /v1/completions; special tokens in texts are text.

        Args:
          prompt: a text, ids, or a list of either.

        Raises:
          ApiError: the prompt is something else, empty or too long, or has an id that the model has not.
        """
        if isinstance(prompt, str) or _is_ids(prompt):
            prompt = [prompt]
        if not isinstance(prompt, list):
            raise bad_request(EXPECTED, "prompt")
        if not prompt:
            raise bad_request(f"prompt: {EMPTY}", "prompt")
        if len(prompt) > self._settings.max_prompts:
            raise bad_request(f"prompt: at most {self._settings.max_prompts} prompts, got {len(prompt)}", "prompt")
        return [self._prompt(one) for one in prompt]

    def messages(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Returns the token ids of a conversation, by the checkpoint's chat template.

        Args:
          tools: for templates that describe them.

        Raises:
          ApiError: a message has what is no text, or there are too many.
          TokenizerError: the template refused the conversation.
        """
        if len(messages) > self._settings.max_messages:
            raise bad_request(f"messages: at most {self._settings.max_messages}, got {len(messages)}", "messages")
        conversation = [_as_dict(message, number) for number, message in enumerate(messages)]
        self._check_length("".join(message["content"] for message in conversation), "messages")
        ids = self._tokenizer.apply_chat_template(
            conversation,
            tools=tools or None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        if not ids:
            raise bad_request(f"messages: {EMPTY}", "messages")
        return ids

    def text(self, text: str, field: str) -> list[int]:
        """Returns the token ids of a text.

        Raises:
          ApiError: the text is too long.
        """
        self._check_length(text, field)
        return self._tokenizer.encode(text)

    def _prompt(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            ids = self.text(prompt, "prompt")
        elif _is_ids(prompt):
            ids = prompt
            self.check_ids(ids, "prompt")
        else:
            raise bad_request(EXPECTED, "prompt")
        if not ids:
            raise bad_request(f"prompt: {EMPTY}", "prompt")
        return ids

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Raises ApiError for an id outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self._settings.vocab_size:
                raise bad_request(f"{field}: {token!r:.40} is no token id below {self._settings.vocab_size}", field)

    def _check_length(self, text: str, field: str) -> None:
        """Raises ApiError for a text that is too long whatever its tokens are."""
        num_bytes = len(text.encode(errors="surrogatepass"))
        if num_bytes > self._max_bytes:
            raise context_length_error(
                f"{field}: {num_bytes} bytes are more than {self._settings.max_model_len} tokens", field
            )


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(part) is int for part in prompt)


def _as_dict(message: Message, number: int) -> dict[str, Any]:
    """Returns a message as templates expect it: with a text, and with the arguments of calls as objects."""
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _text(message, number), **_other_fields(message)}


def _text(message: Message, number: int) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for index, part in enumerate(message.content):
        if part.type not in ("text", "input_text", "refusal") or (part.type != "refusal" and part.text is None):
            raise bad_request(
                f"messages[{number}].content[{index}]: the model reads text alone, got type {part.type!r:.40}",
                "messages",
            )
    return "\n".join(part.text or str((part.model_extra or {}).get("refusal", "")) for part in message.content)


def _other_fields(message: Message) -> dict[str, Any]:
    fields = {name: value for name, value in (message.model_extra or {}).items() if value is not None}
    if isinstance(calls := fields.get("tool_calls"), list):
        fields["tool_calls"] = [_with_arguments(call) for call in calls]
    return fields


def _with_arguments(call: Any) -> Any:
    """Returns a tool call with its arguments as an object, if they are the JSON of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}
