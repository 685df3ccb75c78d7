# Copyright (c) 2026, the megatron-core gptoss authors.

"""Read a conversation in the field names of OpenAI or Hugging Face.

    {"messages": [{"role": "user", "content": "2 + 2?"},
                  {"role": "assistant", "thinking": "Easy.", "content": "4", "weight": 1}],
     "tools": [...], "reasoning_effort": "low"}

Any mistake is a `BadDocument`, so that `--bad-lines` applies to it.
"""

import json
import math
from dataclasses import dataclass
from typing import Iterator

from megatron.gpt_oss.data.tokenize.documents import BadDocument

ROLES = ("system", "developer", "user", "assistant", "tool")
ANALYSIS, COMMENTARY, FINAL = CHANNELS = ("analysis", "commentary", "final")
EFFORTS = ("low", "medium", "high")
FUNCTIONS = "functions."
_REASONING = ("thinking", "reasoning_content", "reasoning")
_KEYS = {"role", "content", "name", "channel", "weight", "tool_calls", "tool_call_id", *_REASONING}
_WRITTEN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Message:
    """One message as harmony renders it.

    Attributes:
        role: 'developer', 'user', 'assistant' or 'tool'.
        text: the content.
        channel: of an assistant's or tool's message.
        name: 'functions.NAME' of a tool.
        recipient: 'functions.NAME' of a tool call, 'assistant' of a tool's result.
        content_type: of a tool call's arguments.
        weight: factor of the loss.
    """

    role: str
    text: str
    channel: str | None = None
    name: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """A conversation with what its system and developer messages state.

    Attributes:
        messages: without the system message and the first developer message.
        instructions: text of the leading system and developer messages.
        tools: functions, each with name, description and parameters.
        effort: 'low', 'medium' or 'high'.
        identity: first sentence of the system message; None for harmony's default.
        date: 'YYYY-MM-DD' of the system message, or None.
        source: the messages under the names that a chat template reads.
    """

    messages: tuple[Message, ...]
    instructions: str
    tools: tuple[dict, ...]
    effort: str
    identity: str | None
    date: str | None
    source: tuple[dict, ...]


def parse_conversation(record: object, date: str | None = None) -> Conversation:
    """Check a record.

    Args:
        record: a JSON object.
        date: of conversations without a `date`.
    Raises:
        BadDocument: names the message, its value and what is expected.
    """
    if not isinstance(record, dict):
        raise BadDocument("not a JSON object with 'messages'")
    record = _without_nulls(record)
    for kind in (("messages", "conversations"), ("tools", "functions")):
        _one_of(record, kind, "the record")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadDocument(f"'messages' is {_shown(messages)}; expected a list of messages")
    tools = _tools(record)
    reader = _Reader({tool["name"] for tool in tools})
    found = [reader.read(number, message) for number, message in enumerate(messages, 1)]
    turns = tuple(message for messages in found for message in messages)
    if not any(message.role == "assistant" for message in turns):
        raise BadDocument("the conversation has no assistant message")
    return Conversation(
        turns,
        "\n\n".join(reader.instructions),
        tools,
        _choice(record, "reasoning_effort", EFFORTS, "medium"),
        _text(record, "model_identity", None),
        _text(record, "date", date),
        tuple(reader.source),
    )


class _Reader:
    """Reads the messages of a conversation in order."""

    def __init__(self, tools: set[str]):
        self._tools = tools
        self._calls: dict[str | None, str] = {}  # {id: tool}; None is the last call
        self._is_leading = True
        self.instructions: list[str] = []
        self.source: list[dict] = []

    def read(self, number: int, message: object) -> list[Message]:
        """The harmony messages of one message; [] for the leading instructions."""
        place = f"message {number}"
        if not isinstance(message, dict):
            raise BadDocument(f"{place} is {_shown(message)}; expected an object")
        if unknown := sorted(set(message) - _KEYS):
            raise BadDocument(
                f"{place} has the unknown field '{unknown[0]}'; known are "
                f"{', '.join(sorted(_KEYS))}"
            )
        role = message.get("role")
        if role not in ROLES:
            raise BadDocument(f"{place} has the role {_shown(role)}; known: {', '.join(ROLES)}")
        if role != "assistant":
            for key in ("tool_calls", "channel", *_REASONING):
                if message.get(key) and (role, key) != ("tool", "channel"):
                    raise BadDocument(f"{place}: '{key}' in a message of role {role}")
        text, weight = _content(message, place), _weight(message, place)
        self.source.append({"role": role, "content": text})
        if role == "assistant":
            self._is_leading = False
            return list(self._assistant(message, text, weight, place))
        if role == "tool":
            return [self._tool(message, text, place)]
        if not text.strip():
            raise BadDocument(f"{place}: the message of role {role} is empty")
        if role in ("system", "developer"):
            if self._is_leading:
                self.instructions.append(text)
                return []
            return [Message("developer", text)]
        self._is_leading = False
        return [Message("user", text)]

    def _assistant(self, message: dict, text: str, weight: float, place: str) -> Iterator[Message]:
        key = _one_of(message, _REASONING, place)
        thinking = _text(message, key, "", place) if key else ""
        call = self._call(message, place)
        if not text.strip() and not thinking.strip() and call is None:
            raise BadDocument(f"{place}: the message of role assistant is empty")
        # As the published chat template: the text before a call is reasoning.
        usual = FINAL if call is None else COMMENTARY if thinking else ANALYSIS
        channel = _choice(message, "channel", CHANNELS, usual, place)
        if thinking.strip():
            self.source[-1]["thinking"] = thinking
            yield Message("assistant", thinking, ANALYSIS, weight=weight)
        if text.strip():
            yield Message("assistant", text, channel, weight=weight)
        if call is not None:
            yield Message(
                "assistant",
                call["text"],
                COMMENTARY,
                recipient=FUNCTIONS + call["name"],
                content_type=call["content_type"],
                weight=weight,
            )

    def _call(self, message: dict, place: str) -> dict | None:
        """Name, arguments as text, and content type of the tool call."""
        calls = message.get("tool_calls")
        if not calls:
            return None
        if not isinstance(calls, list) or not isinstance(calls[0], dict):
            raise BadDocument(f"{place}: tool_calls is {_shown(calls)}; expected a list of objects")
        if len(calls) > 1:
            raise BadDocument(
                f"{place} has {len(calls)} tool calls; in harmony each call is a message, which "
                "its result follows"
            )
        function = calls[0].get("function", calls[0])
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise BadDocument(f"{place}: a tool call without a name")
        name = name.removeprefix(FUNCTIONS)
        if name not in self._tools:
            raise BadDocument(f"{place} calls {_shown(name)}, which 'tools' does not define")
        self._calls[None] = name
        if isinstance(identifier := calls[0].get("id"), str):
            self._calls[identifier] = name
        arguments = function.get("arguments", {})
        text = (
            arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        )
        content_type = _text(function, "content_type", "json", place)
        described = {"name": name, "arguments": _parsed(arguments), "content_type": content_type}
        self.source[-1]["tool_calls"] = [{"type": "function", "function": described}]
        return {"name": name, "text": _unicode(text, place), "content_type": content_type}

    def _tool(self, message: dict, text: str, place: str) -> Message:
        identifier = message.get("tool_call_id")
        called = self._calls.get(identifier, self._calls.get(None))
        if called is None or (isinstance(identifier, str) and identifier not in self._calls):
            which = f" {_shown(identifier)}" if identifier else ""
            raise BadDocument(f"{place} is the result of a tool call{which} that is not before it")
        name = _text(message, "name", called, place).removeprefix(FUNCTIONS)
        if name not in self._tools:
            raise BadDocument(
                f"{place} is the result of {_shown(name)}, which 'tools' does not define"
            )
        return Message("tool", text, COMMENTARY, FUNCTIONS + name, recipient="assistant")


def _tools(record: dict) -> tuple[dict, ...]:
    """The functions of `tools` (or the older `functions`), a list or its JSON."""
    tools = _parsed(record.get("tools", record.get("functions", [])))
    if not isinstance(tools, list):
        raise BadDocument(f"'tools' is {_shown(tools)}; expected a list")
    found = []
    for number, tool in enumerate(tools, 1):
        function = _parsed(tool.get("function", tool)) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadDocument(f"tool {number} is {_shown(tool)}; expected a function with a name")
        parameters = _parsed(function.get("parameters"))
        if parameters is not None and not isinstance(parameters, dict):
            raise BadDocument(f"tool {number}: parameters is {_shown(parameters)}")
        description = _text(function, "description", "", f"tool {number}")
        found.append({"name": function["name"], "description": description})
        if parameters:
            found[-1]["parameters"] = parameters
    return tuple(found)


def _content(message: dict, place: str) -> str:
    """The text of a message; a list of text parts is concatenated."""
    content = message.get("content", "")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type", "text") != "text":
                raise BadDocument(f"{place}: content has {_shown(part)}; gpt-oss reads only text")
        return "".join(_text(part, "text", "", place) for part in content)
    return _text(message, "content", "", place)


def _weight(message: dict, place: str) -> float:
    weight = message.get("weight", 1.0)
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not (0 <= weight < 1e6 and math.isfinite(weight)):
        raise BadDocument(f"{place}: weight is {_shown(weight)}; expected a number of 0 or more")
    return float(weight)


def _one_of(fields: dict, names: tuple[str, ...], place: str) -> str | None:
    """The one field of several that is given.

    Raises:
        BadDocument: several are given.
    """
    given = [name for name in names if fields.get(name)]
    if len(given) > 1:
        raise BadDocument(f"{place} mixes two schemas: it has '{given[0]}' and '{given[1]}'")
    return given[0] if given else None


def _choice(fields: dict, key: str, choices: tuple[str, ...], default: str, place: str = "") -> str:
    value = fields.get(key, default)
    if value not in choices:
        at = f"{place} has the " if place else ""
        raise BadDocument(f"{at}{key} {_shown(value)}; known: {', '.join(choices)}")
    return value


def _text(fields: dict, key: str, default: str | None, place: str = "") -> str | None:
    value = fields.get(key, default)
    if value is not default and not isinstance(value, str):
        raise BadDocument(f"{place + ': ' if place else ''}{key} is {_shown(value)}, not a string")
    return value if value is None else _unicode(value, place or key)


def _unicode(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        raise BadDocument(f"{place} is not Unicode text") from None
    return text


def _parsed(value: object) -> object:
    """The value of a JSON string; any other value unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _without_nulls(value: object) -> object:
    """Remove the fields that are null: in parquet every row has the fields of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _WRITTEN else f"{text[:_WRITTEN]}..."
