# Copyright (c) 2026, the megatron-core gptoss authors.

"""Compare harmony's rendering with the chat template of the model directory."""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from megatron.gpt_oss.data.byte_tokenizer import TOKENIZER_CONFIG_NAME
from megatron.gpt_oss.data.chat.conversation import Conversation
from megatron.gpt_oss.errors import UsageError
from megatron.gpt_oss.json_file import read_json

TEMPLATE_NAME = "chat_template.jinja"
_NO_DATE = "no-date"
_AROUND = 4  # tokens shown from the first difference on


def read_template(directory: str | Path) -> str | None:
    """The chat template of a model directory, from its own file or tokenizer_config.json."""
    directory = Path(directory)
    directory = directory if directory.is_dir() else directory.parent
    if (file := directory / TEMPLATE_NAME).is_file():
        return file.read_text(encoding="utf-8")
    if not (file := directory / TOKENIZER_CONFIG_NAME).is_file():
        return None
    template = read_json(file, hint="Download it again.").get("chat_template")
    return template if isinstance(template, str) else None


class ChatTemplate:
    """A chat template and the tokenizer of its directory.

    Args:
        source: Jinja source, which is run as transformers runs it.
        tokenizer: recognizes special tokens.
    Raises:
        UsageError: jinja2 is not installed, or the template is not valid.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise UsageError(
                "Reading a chat template needs jinja2, which is not installed: "
                "pip install 'megatron-core[chat]'."
            ) from error
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UsageError(f"The model's chat template is not valid Jinja: {error}.") from error

    def text(self, conversation: Conversation) -> str:
        """The conversation as the template renders it."""
        date = conversation.date or _NO_DATE
        values = {"strftime_now": lambda _: date, "reasoning_effort": conversation.effort}
        if conversation.identity is not None:
            values["model_identity"] = conversation.identity
        if conversation.tools:
            values["tools"] = [{"type": "function", "function": t} for t in conversation.tools]
        text = self._template.render(
            messages=list(conversation.source), add_generation_prompt=False, **values
        )
        # Without a date harmony writes no line for it.
        return re.sub(rf"[^\n]*{_NO_DATE}[^\n]*\n", "", text, count=1)

    def difference(self, conversation: Conversation, ids: list[int]) -> str | None:
        """The first token in which the template differs from harmony's `ids`; None if it agrees."""
        try:
            text = self.text(conversation)
        except Exception as error:  # a template raises what it likes
            return f"the chat template refuses it: {' '.join(str(error).split())[:200]}"
        own = self._tokenizer.encode(text, add_special_tokens=False).ids
        if own == ids:
            return None
        pairs = zip(ids, own)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(own)))
        harmony, template = (self._decode(found[at : at + _AROUND]) for found in (ids, own))
        return f"token {at}: harmony has {harmony!r}, the chat template {template!r}"

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _to_json(value: object, ensure_ascii: bool = False, **options) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise ValueError(message)
