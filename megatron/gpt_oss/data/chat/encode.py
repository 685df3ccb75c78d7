# Copyright (c) 2026, the megatron-core gptoss authors.

"""Tokenize conversations, in the worker processes of `gptoss tokenize --chat`."""

import json
from collections import Counter
from dataclasses import dataclass, field

import numpy
from tokenizers import Tokenizer

from megatron.gpt_oss.data.chat.conversation import Conversation, parse_conversation
from megatron.gpt_oss.data.chat.harmony import Rendered, Renderer
from megatron.gpt_oss.data.chat.template import ChatTemplate
from megatron.gpt_oss.data.tokenize.documents import BadDocument, Record, object_of
from megatron.gpt_oss.data.tokenize.encode import Encoded, EncodeJob, is_held_out

# Names of `Encoded.counts`: these, and 'tokens ROLE' and 'loss ROLE' for each role and channel.
DROPPED, COMPARED, DIFFERENT = "dropped", "compared", "different"


class ChatEncoder:
    """Tokenizes batches of records that are conversations."""

    def __init__(self, job: EncodeJob):
        self._job, self._chat = job, job.chat
        self._renderer = Renderer(job.chat.vocabulary, job.chat.loss_on)
        self._template = None
        if job.chat.template is not None:
            self._template = ChatTemplate(job.chat.template, Tokenizer.from_str(job.tokenizer))

    def __call__(self, records: list[Record]) -> Encoded:
        batch = _Batch()
        for place, record in enumerate(records):
            try:
                value = object_of(record)
                if value is None:
                    batch.empty.append(place)
                    continue
                conversation = parse_conversation(value, self._chat.date)
                rendered = self._render(conversation)
            except BadDocument as error:
                batch.bad.append((place, str(error)))
                continue
            text = json.dumps(value["messages"], sort_keys=True)
            batch.held_out.append(is_held_out(text, self._job.validation_share))
            batch.rendered.append(rendered)
            self._compare(conversation, rendered, place, batch)
        return batch.encoded(self._job.dtype)

    def _render(self, conversation: Conversation) -> Rendered:
        try:
            rendered = self._renderer.render(conversation)
        except (ValueError, RuntimeError) as error:  # HarmonyError, and pydantic's
            reason = " ".join(str(error).split())[:200]
            raise BadDocument(f"openai-harmony cannot render it: {reason}") from None
        if len(rendered.ids) > self._chat.context:
            raise BadDocument(
                f"the conversation has {len(rendered.ids):,} tokens, the context (--context) "
                f"{self._chat.context:,}"
            )
        if not any(rendered.weights):
            raise BadDocument(
                f"no token has loss with --loss-on {self._chat.loss_on} and the weights of its "
                "messages"
            )
        return rendered

    def _compare(
        self, conversation: Conversation, rendered: Rendered, place: int, batch: "_Batch"
    ) -> None:
        if self._template is None:
            return
        batch.counts[COMPARED] += 1
        difference = self._template.difference(conversation, rendered.ids)
        if difference is not None:
            batch.counts[DIFFERENT] += 1
            batch.differences.append((place, difference))


@dataclass
class _Batch:
    """The conversations of a batch of records, before they are concatenated."""

    rendered: list[Rendered] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    differences: list[tuple[int, str]] = field(default_factory=list)

    def encoded(self, dtype: str) -> Encoded:
        """The batch as arrays, with the tokens of each role and channel counted."""
        for rendered in self.rendered:
            start = 0
            for name, size in rendered.parts:
                weights = rendered.weights[start : start + size]
                self.counts[f"tokens {name}"] += size
                self.counts[f"loss {name}"] += sum(weight > 0 for weight in weights)
                start += size
            self.counts[DROPPED] += rendered.num_dropped
        return Encoded(
            numpy.array([token for one in self.rendered for token in one.ids], dtype=dtype),
            numpy.array([len(one.ids) for one in self.rendered], dtype=numpy.int32),
            numpy.array(self.held_out, dtype=bool),
            self.empty,
            self.bad,
            numpy.array([w for one in self.rendered for w in one.weights], dtype=numpy.float32),
            dict(self.counts),
            self.differences,
        )
