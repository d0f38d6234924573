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
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise bad_request("tool_choice: there are no tools", "tool_choice")
        return None
    template = tokenizer.get_chat_template(tools=body.tools)
    if not re.search(r"\btools\b", template) or BEGIN not in template:
        raise bad_request(f"tools: this model's chat template does not describe tools with {BEGIN}", "tools")
    if body.tool_choice not in (None, "none", "auto"):
        raise bad_request("tool_choice: only none and auto are supported", "tool_choice")
    for number, tool in enumerate(body.tools):
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise bad_request(f"tools[{number}]: expected a function with a name", "tools")
    return None if body.tool_choice == "none" else body.tools


class ToolParser:
    """Finds the calls in a text that comes in pieces.

    Text that may begin a call is kept back; a call that is not valid JSON stays text.

    Attributes:
      num_calls: calls until now.
    """

    def __init__(self) -> None:
        self._text, self.num_calls = "", 0

    def push(self, text: str, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Returns the text outside of calls, and the calls that are complete, as the API has them."""
        self._text += text
        outside: list[str] = []
        calls: list[dict[str, Any]] = []
        while (begin := self._text.find(BEGIN)) >= 0:
            end = self._text.find(END, begin)
            if end < 0:
                break
            outside.append(self._text[:begin])
            inner = self._text[begin + len(BEGIN) : end]
            call = self._call(inner)
            calls += [call] if call else []
            outside.append("" if call else f"{BEGIN}{inner}{END}")
            self._text = self._text[end + len(END) :].lstrip("\n")
        keep = len(self._text) if is_last else (begin if begin >= 0 else len(self._text) - _partial_tag(self._text))
        outside.append(self._text[:keep])
        self._text = self._text[keep:]
        text = "".join(outside)
        return (text.rstrip("\n") if calls else text), calls

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
