"""Tools: functions that a conversation offers, and the calls of them in the model's text.

Their form is the one that most templates teach: `<tool_call>{"name": …, "arguments": …}</tool_call>`.
"""

import json
import re
import uuid
from typing import Any

from dbrx_jax.serving.errors import bad_request
from dbrx_jax.serving.protocol import ChatBody
from dbrx_jax.text.tokenizer import DbrxTokenizer

BEGIN, END = "<tool_call>", "</tool_call>"


def tools_of(body: ChatBody, tokenizer: DbrxTokenizer) -> list[dict[str, Any]] | None:
    """Returns the tools of a request for the chat template, or None.

    Raises:
      ApiError: the checkpoint's template has no tools, or a tool is not a function with a name.
    """
    tools = None if body.tool_choice == "none" else body.tools or None
    has_calls = any(
        message.role == "tool" or (message.model_extra or {}).get("tool_calls") for message in body.messages
    )
    if tools or has_calls:
        template = tokenizer.get_chat_template(tools=tools)
        if not re.search(r"\btools\b", template) or BEGIN not in template:
            field = "tools" if tools else "messages"
            raise bad_request(f"{field}: this model's chat template has no tools with {BEGIN}", field)
    if body.tool_choice not in (None, "none", "auto"):
        reason = "only none and auto are supported" if tools else "there are no tools"
        raise bad_request(f"tool_choice: {reason}", "tool_choice")
    for number, tool in enumerate(tools or ()):
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise bad_request(f"tools[{number}]: expected a function with a name", "tools")
    return tools


class ToolParser:
    """Finds the calls in a text that comes in pieces.

    Text that may begin a call is kept back; a call that is not valid JSON stays text.

    Attributes:
      num_calls: calls until now.
    """

    def __init__(self) -> None:
        self._text, self.num_calls, self._is_behind_call = "", 0, False

    def push(self, text: str, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Returns the text outside of calls, and the calls that are complete, as the API has them."""
        self._text += text
        outside = ""
        calls: list[dict[str, Any]] = []
        while (begin := self._text.find(BEGIN)) >= 0 and (end := self._text.find(END, begin)) >= 0:
            outside += self._take(begin)
            whole = self._take(end - begin + len(END))
            if (call := self._call(whole.removeprefix(BEGIN).removesuffix(END))) is None:
                outside += whole
            else:
                calls.append(call)
                self._is_behind_call = True
        if is_last:
            begin = len(self._text)
        elif begin < 0:
            begin = len(self._text) - _partial_tag(self._text)
        return outside + self._take(begin), calls

    def _take(self, length: int) -> str:
        """Removes and returns the beginning of the text, without the ends of lines behind a call."""
        text, self._text = self._text[:length], self._text[length:]
        if self._is_behind_call:
            text = text.lstrip("\n")
            self._is_behind_call = not text
        return text

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self.num_calls += 1
        return {
            "index": self.num_calls - 1,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": value["name"], "arguments": arguments},
        }


def _partial_tag(text: str) -> int:
    """Returns the length of the longest suffix that may begin a call."""
    return max((n for n in range(1, len(BEGIN)) if text.endswith(BEGIN[:n])), default=0)
