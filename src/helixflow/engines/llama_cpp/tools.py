"""Tool calls where the model's template knows no tools: a demanded call is enforced by a JSON schema.

With `tool_choice` "auto" such a model answers in prose, which "auto" allows; for "required" or a named function, prose
would be wrong, so the engine's grammar leaves it no choice.
"""

from typing import Any

import msgspec
from msgspec import Raw, Struct

from helixflow.dialects.openai_chat import ChatParams, FunctionDefinition, NamedTool


class _ForcedCall(Struct, frozen=True):
    name: str
    arguments: Raw


_CALL = msgspec.json.Decoder(_ForcedCall)


class ForcedTool:
    """The functions of which exactly one must be called."""

    def __init__(self, functions: list[FunctionDefinition]) -> None:
        self._functions = functions

    @classmethod
    def needed(cls, params: ChatParams, *, template_knows_tools: bool) -> "ForcedTool | None":
        """Whether this request demands a call that the template cannot be trusted with."""
        choice = params.tool_choice
        if not params.tools or choice in (None, "auto", "none") or (template_knows_tools and choice == "required"):
            return None
        functions = [tool.function for tool in params.tools]
        if isinstance(choice, NamedTool):
            functions = [function for function in functions if function.name == choice.function.name]
        return cls(functions)

    def response_format(self) -> dict[str, Any]:
        """What makes the engine produce `{"name": …, "arguments": …}` and nothing else."""
        options = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    "arguments": function.parameters or {"type": "object", "properties": {}},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for function in self._functions
        ]
        schema = options[0] if len(options) == 1 else {"anyOf": options}
        return {"type": "json_schema", "json_schema": {"name": "call", "strict": True, "schema": schema}}

    def tool_calls(self, text: str, call_id: str) -> list[dict[str, Any]] | None:
        """The call in `text`; None when it was cut short, since half a call is none."""
        try:
            call = _CALL.decode(text)
        except msgspec.DecodeError:
            return None
        function = {"name": call.name, "arguments": bytes(call.arguments).decode()}
        return [{"id": f"call_{call_id}", "type": "function", "function": function}]

    def finish(self, choice: dict[str, Any], text: str, call_id: str) -> dict[str, Any]:
        """A finished choice with its text turned into the call."""
        calls = self.tool_calls(text, call_id)
        message = {**choice["message"], "content": None}
        if calls is None:
            return {**choice, "message": message, "finish_reason": "length"}
        return {**choice, "message": {**message, "tool_calls": calls}, "finish_reason": "tool_calls"}
