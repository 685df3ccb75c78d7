# Copyright (c) 2026, the megatron-core gptoss authors.

"""Render conversations with OpenAI's openai-harmony package, and weight the loss of each token.

openai-harmony tokenizes with a vocabulary file that it downloads, or reads from the directory of
TIKTOKEN_ENCODINGS_BASE. `write_vocabulary` makes the file from the model's tokenizer.json.
"""

import base64
import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Iterator

from tokenizers import Tokenizer

from megatron.gpt_oss.data.byte_tokenizer import byte_symbols
from megatron.gpt_oss.data.chat.conversation import ANALYSIS, FINAL, Conversation, Message
from megatron.gpt_oss.errors import UsageError

ASSISTANT, FINAL_ONLY, LAST_TURN = LOSS_ON = ("assistant", "final", "last-turn")
# Of o200k_harmony.
SPECIAL_TOKENS = {
    "<|endoftext|>": 199_999,
    "<|return|>": 200_002,
    "<|constrain|>": 200_003,
    "<|channel|>": 200_005,
    "<|start|>": 200_006,
    "<|end|>": 200_007,
    "<|message|>": 200_008,
    "<|call|>": 200_012,
}
RETURN = SPECIAL_TOKENS["<|return|>"]
USER_TURN = (SPECIAL_TOKENS["<|start|>"], 1_428)  # <|start|>user
_NUM_RANKS = 199_998
_PROMPT = 2  # tokens of <|start|>assistant, which end the prompt of a turn
_VOCABULARY_VARIABLE, _VOCABULARY_FILE = "TIKTOKEN_ENCODINGS_BASE", "o200k_base.tiktoken"
# openai-harmony refuses a file with another hash.
_VOCABULARY_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


_SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\n"
    "Reasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be included "
    "for every message."
)


def as_prompt(text: str) -> str:
    """The prompt of a user message after harmony's default system message, up to the answer."""
    return (
        f"<|start|>system<|message|>{_SYSTEM}<|end|><|start|>user<|message|>{text}<|end|>"
        "<|start|>assistant"
    )


@contextmanager
def vocabulary(tokenizer: Tokenizer) -> Iterator[str]:
    """A temporary directory with the vocabulary file.

    Raises:
        UsageError: the tokenizer is not that of gpt-oss.
    """
    with TemporaryDirectory(prefix="gptoss-harmony-") as directory:
        write_vocabulary(tokenizer, Path(directory))
        yield directory


def write_vocabulary(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the tokens of a tokenizer.json in tiktoken's format: base64 of the bytes, and rank.

    Raises:
        UsageError: the tokenizer is not that of gpt-oss.
    """
    for token, expected in SPECIAL_TOKENS.items():
        if (found := tokenizer.token_to_id(token)) != expected:
            raise UsageError(
                f"The tokenizer has {token} as token {found}, gpt-oss as {expected}. --chat renders "
                "gpt-oss' harmony format: give the directory of a gpt-oss model with --tokenizer."
            )
    value = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    ranks = sorted((rank, token) for token, rank in tokenizer.get_vocab(False).items())
    try:
        lines = [
            b"%s %d\n" % (base64.b64encode(bytes(value[symbol] for symbol in token)), rank)
            for rank, token in ranks
            if rank < _NUM_RANKS
        ]
    except KeyError:  # not a byte-level vocabulary
        lines = []
    content = b"".join(lines)
    if hashlib.sha256(content).hexdigest() != _VOCABULARY_SHA256:
        raise UsageError(
            "The vocabulary of --tokenizer is not o200k, which gpt-oss uses. Give the directory of "
            "a gpt-oss model."
        )
    (directory / _VOCABULARY_FILE).write_bytes(content)


@dataclass(frozen=True)
class Rendered:
    """A conversation in tokens.

    Attributes:
        ids: tokens.
        weights: factor of each token's loss; 0 for a token without loss.
        parts: (name, number of tokens) of each message, in order; the name is the role, followed
            by a slash and the channel.
        num_dropped: reasoning messages of earlier turns, which are not rendered.
    """

    ids: list[int]
    weights: list[float]
    parts: list[tuple[str, int]]
    num_dropped: int


class Renderer:
    """Renders conversations.

    Args:
        directory: has the vocabulary file, see `vocabulary`.
        loss_on: one of `LOSS_ON`.
    Attributes:
        encoding: HarmonyEncoding of the package.
    Raises:
        UsageError: openai-harmony is not installed.
    """

    def __init__(self, directory: str, loss_on: str):
        self._loss_on, self._harmony = loss_on, import_harmony()
        before = os.environ.get(_VOCABULARY_VARIABLE)
        os.environ[_VOCABULARY_VARIABLE] = directory
        try:
            name = self._harmony.HarmonyEncodingName.HARMONY_GPT_OSS
            self.encoding = self._harmony.load_harmony_encoding(name)
        finally:
            del os.environ[_VOCABULARY_VARIABLE]
            if before is not None:
                os.environ[_VOCABULARY_VARIABLE] = before

    def render(self, conversation: Conversation) -> Rendered:
        """Render a conversation as for training.

        As at inference, the reasoning (channel analysis) of earlier turns is left out, and only a
        final message that ends the conversation ends with <|return|>.
        """
        last_turn = _last_turn(conversation.messages)
        kept = [
            (number, message)
            for number, message in enumerate(conversation.messages)
            if number >= last_turn or message.channel != ANALYSIS
        ]
        options = self._harmony.RenderOptions(
            conversation_has_function_tools=bool(conversation.tools)
        )
        ids, weights, parts = [], [], []
        for role, content in self._head(conversation):
            found = self.encoding.render(role_message(self._harmony, role, content), options)
            ids += found
            weights += [0.0] * len(found)
            parts.append((role, len(found)))
        before = None
        for number, message in kept:
            found = self.encoding.render(self._converted(message), options)
            ends = message.channel == FINAL and number == len(conversation.messages) - 1
            if ends:
                found[-1] = RETURN
            weight = message.weight if self._has_loss(message, number >= last_turn) else 0.0
            ids += found
            weights += _weights(message, len(found), weight, before, ends)
            parts.append((f"{message.role}/{message.channel}".removesuffix("/None"), len(found)))
            before = message
        return Rendered(ids, weights, parts, len(conversation.messages) - len(kept))

    def _head(self, conversation: Conversation) -> Iterator[tuple[str, object]]:
        """Roles and contents of the system message, and of the developer message if there is one."""
        system = self._harmony.SystemContent.new()
        if conversation.identity is not None:
            system.model_identity = conversation.identity
        system.reasoning_effort = self._harmony.ReasoningEffort(conversation.effort.capitalize())
        system.conversation_start_date = conversation.date
        yield "system", system
        if conversation.instructions or conversation.tools:
            developer = self._harmony.DeveloperContent.new()
            if conversation.instructions:
                developer.instructions = conversation.instructions
            if conversation.tools:
                tools = [self._harmony.ToolDescription(**tool) for tool in conversation.tools]
                developer = developer.with_function_tools(tools)
            yield "developer", developer

    def _converted(self, message: Message):
        content = message.text
        if message.role == "developer":
            content = self._harmony.DeveloperContent.new().with_instructions(message.text)
        converted = role_message(self._harmony, message.role, content, message.name)
        converted.channel, converted.recipient = message.channel, message.recipient
        converted.content_type = message.content_type
        return converted

    def _has_loss(self, message: Message, is_last_turn: bool) -> bool:
        if message.role != "assistant":
            return False
        if self._loss_on == FINAL_ONLY:
            return message.channel == FINAL
        return is_last_turn or self._loss_on == ASSISTANT


def import_harmony():
    """The openai_harmony package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import openai_harmony
    except ImportError as error:
        raise UsageError(
            "--chat needs openai-harmony, which is not installed: pip install 'megatron-core[chat]'."
        ) from error
    return openai_harmony


def role_message(harmony, role: str, content: object, name: str | None = None):
    """A message of openai-harmony."""
    author = harmony.Author(role=harmony.Role(role), name=name)
    return harmony.Message.from_author_and_content(author, content)


def _last_turn(messages: tuple[Message, ...]) -> int:
    """Index of the user message that the last assistant message answers; 0 if there is none."""
    roles = [message.role for message in messages]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    return max((i for i in range(last) if roles[i] == "user"), default=0)


def _weights(
    message: Message, size: int, weight: float, before: Message | None, ends: bool
) -> list[float]:
    """Loss weights of a message: those of the tokens that the model generates.

    <|start|>assistant is part of the prompt, except after another message of the assistant that
    does not wait for a tool. The <|end|> of an earlier final message has no loss: where history has
    <|end|>, the model has to generate <|return|>.
    """
    weights = [weight] * size
    follows = before is not None and before.role == "assistant" and before.recipient is None
    if not follows or before.channel == FINAL:
        weights[:_PROMPT] = [0.0] * _PROMPT
    if message.channel == FINAL and not ends:
        weights[-1] = 0.0
    return weights
