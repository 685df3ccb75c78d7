# Copyright (c) 2026, the megatron-core gptoss authors.

"""gptoss tokenize --chat: tokens against openai-harmony and transformers, loss weights, bad input."""

import argparse
import json
import re
from contextlib import nullcontext

import numpy
import pytest

from megatron.gpt_oss.data.byte_tokenizer import build_byte_tokenizer
from megatron.gpt_oss.data.chat.conversation import parse_conversation
from megatron.gpt_oss.data.chat.harmony import Renderer, as_prompt, vocabulary
from megatron.gpt_oss.data.chat.template import ChatTemplate
from megatron.gpt_oss.data.indexed_dataset import check_loss_weights, read_lengths
from megatron.gpt_oss.data.tokenize import command
from megatron.gpt_oss.data.tokenize.arguments import add_tokenize_arguments
from megatron.gpt_oss.data.tokenize.documents import BadDocument
from megatron.gpt_oss.data.tokenizer_files import load_text_tokenizer
from megatron.gpt_oss.data.verify_data import verify_data
from megatron.gpt_oss.errors import UsageError
from tests.harness.conversations import write_conversations
from tests.harness.o200k import write_o200k

pytest.importorskip("bpe_openai")
harmony = pytest.importorskip("openai_harmony")

# As the published one: the reasoning of earlier turns, and before a call, is left out, and the result
# of a tool is JSON.
TEMPLATE = """\
<|start|>system<|message|>{{ model_identity or "You are ChatGPT, a large language model trained by OpenAI." }}
Knowledge cutoff: 2024-06
Current date: {{ strftime_now("%Y-%m-%d") }}

Reasoning: {{ reasoning_effort }}

# Valid channels: analysis, commentary, final. Channel must be included for every message.
{%- if tools %}{{ "\\nCalls to these tools must go to the commentary channel: 'functions'." }}{% endif -%}
<|end|>
{%- for message in messages -%}
{%- if message.role == "system" -%}
<|start|>developer<|message|># Instructions{{ "\\n\\n" + message.content }}<|end|>
{%- elif message.role == "user" -%}
<|start|>user<|message|>{{ message.content }}<|end|>
{%- elif message.role == "tool" -%}
<|start|>functions.weather to=assistant<|channel|>commentary<|message|>{{ message.content|tojson }}<|end|>
{%- elif message.tool_calls -%}
{%- set call = message.tool_calls[0].function -%}
<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary {{ "json<|message|>" }}
{{- call.arguments|tojson }}<|call|>
{%- else -%}
{%- if loop.last and message.thinking -%}
<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>
{%- endif -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}{{ "<|return|>" if loop.last else "<|end|>" }}
{%- endif -%}
{%- endfor -%}
"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Gets the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TURNS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2? <|end|>"},
        {"role": "assistant", "thinking": "Easy.", "content": "4"},
        {"role": "user", "content": [{"type": "text", "text": "3 + 3?"}]},
        {"role": "assistant", "reasoning_content": "Also easy.", "content": "6"},
    ],
    "reasoning_effort": "low",
}
CALL = {"id": "a", "function": {"name": "weather", "arguments": '{"city": "Kyoto"}'}}
TOOLS = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "thinking": "Call.", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": "20 C"},
        {"role": "assistant", "channel": "final", "content": "20 C.", "weight": 0.5},
    ],
    "tools": [WEATHER],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with gpt-oss' tokenizer and a chat template."""
    directory = write_o200k(tmp_path_factory.mktemp("o200k"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_text_tokenizer(model)


@pytest.fixture(scope="module")
def vocabulary_directory(tokenizer):
    with vocabulary(tokenizer.tokenizer) as directory:
        yield directory


@pytest.fixture
def read_before(tokenizer, vocabulary_directory, monkeypatch):
    """Commands take the tokenizer that was read before: 200,000 tokens take seconds."""
    monkeypatch.setattr(command, "load_text_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(command, "vocabulary", lambda _: nullcontext(vocabulary_directory))


@pytest.fixture(scope="module")
def render(vocabulary_directory):
    """The renderer of a record with a --loss-on."""
    directory = vocabulary_directory
    renderers = {on: Renderer(directory, on) for on in ("assistant", "final", "last-turn")}

    def run(record, loss_on="assistant"):
        return renderers[loss_on].render(parse_conversation(record))

    run.encoding = renderers["final"].encoding
    run.decode = run.encoding.decode
    return run


def with_loss(render, record, loss_on="assistant"):
    """The parts of a conversation with loss, as text."""
    rendered = render(record, loss_on)
    has_loss = numpy.array(rendered.weights) > 0
    edges = numpy.flatnonzero(numpy.diff(has_loss)) + 1
    parts = zip(numpy.split(numpy.array(rendered.ids), edges), numpy.split(has_loss, edges))
    return [render.decode(ids.tolist()) for ids, loss in parts if loss[0]]


def test_tokens_are_those_of_harmony(render):
    """One conversation with every role, against the package's renderer of conversations."""
    role, message = harmony.Role, harmony.Message.from_role_and_content
    parameters = WEATHER["function"]["parameters"]
    tool = harmony.ToolDescription.new("weather", "Gets the weather.", parameters)
    result = harmony.Message.from_author_and_content(
        harmony.Author.new(role.TOOL, "functions.weather"), "20 C"
    )
    call = message(role.ASSISTANT, '{"city": "Kyoto"}').with_channel("commentary")
    expected = [
        message(role.SYSTEM, harmony.SystemContent.new()),
        message(role.DEVELOPER, harmony.DeveloperContent.new().with_function_tools([tool])),
        message(role.USER, "Weather?"),
        message(role.ASSISTANT, "Call.").with_channel("analysis"),
        call.with_recipient("functions.weather").with_content_type("json"),
        result.with_channel("commentary").with_recipient("assistant"),
        message(role.ASSISTANT, "20 C.").with_channel("final"),
    ]
    tokens = render.encoding.render_conversation_for_training(
        harmony.Conversation.from_messages(expected),
        harmony.RenderConversationConfig(auto_drop_analysis=False),
    )
    assert render(TOOLS).ids == tokens


@pytest.mark.parametrize(
    "record, loss_on, expected",
    [
        (
            TURNS,
            "assistant",
            [
                "<|channel|>final<|message|>4",
                "<|channel|>analysis<|message|>Also easy.<|end|><|start|>assistant"
                "<|channel|>final<|message|>6<|return|>",
            ],
        ),
        (
            TURNS,
            "final",
            [
                "<|channel|>final<|message|>4",
                "<|start|>assistant<|channel|>final<|message|>6<|return|>",
            ],
        ),
        (
            TOOLS,
            "last-turn",
            [
                "<|channel|>analysis<|message|>Call.<|end|><|start|>assistant to=functions.weather"
                '<|channel|>commentary json<|message|>{"city": "Kyoto"}<|call|>',
                "<|channel|>final<|message|>20 C.<|return|>",
            ],
        ),
    ],
    ids=["assistant", "final", "last-turn-with-call"],
)
def test_loss_is_on_what_the_model_generates(render, record, loss_on, expected):
    """With the stop tokens; without the prompt, tools' results, and earlier turns' reasoning."""
    assert with_loss(render, record, loss_on) == expected


def test_last_turn_and_weights(render):
    assert len(with_loss(render, TURNS, "last-turn")) == 1
    weights = set(render(TOOLS).weights)
    assert weights == {0.0, 0.5, 1.0}
    assert "Easy." not in render.decode(render(TURNS).ids)
    assert render(TURNS).num_dropped == 1


def test_prompt_of_samples(tokenizer, render):
    record = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}]
    }
    prompt = tokenizer.encode(as_prompt("Hi"))
    assert render(record).ids[: len(prompt)] == prompt


def test_special_tokens_in_a_text_stay_text(render):
    ids = render(TURNS).ids
    assert render.decode(ids).count("<|end|>") == ids.count(200_007) + 1


def test_chat_template(model, tokenizer, render):
    """Jinja as in transformers; it agrees where it writes the same format, else a token is named."""
    from transformers import PreTrainedTokenizerFast

    source = (model / "chat_template.jinja").read_text()
    template = ChatTemplate(source, tokenizer.tokenizer)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    for record in (TURNS, TOOLS):
        conversation = parse_conversation(record, date="2026-01-31")
        text = theirs.apply_chat_template(
            list(conversation.source),
            tools=[WEATHER] if record is TOOLS else None,
            chat_template=source,
            tokenize=False,
            reasoning_effort=conversation.effort,
        )
        today = re.search("Current date: (.*)", text)[1]
        assert template.text(conversation).replace("2026-01-31", today) == text
    record = json.loads(json.dumps(TURNS).replace(" <|end|>", ""))
    assert template.difference(parse_conversation(record), render(record).ids) is None
    difference = template.difference(parse_conversation(TURNS), render(TURNS).ids)
    assert re.fullmatch(r"token \d+: harmony has ' <\|end.*, the chat template .*", difference)
    assert "harmony has" in template.difference(parse_conversation(TOOLS), render(TOOLS).ids)


def changed(number, **fields):
    """TOOLS with another message."""
    messages = [dict(message) for message in TOOLS["messages"]]
    messages[number].update(fields)
    return TOOLS | {"messages": messages}


BAD = {
    "no-object": ([], "not a JSON object"),
    "no-messages": ({"text": "a"}, "'messages' is None"),
    "role": (changed(0, role="human"), "message 1 has the role 'human'; known: system"),
    "channel": (changed(3, channel="thoughts"), "message 4 has the channel 'thoughts'"),
    "empty-user": (changed(0, content=" "), "message 1: the message of role user is empty"),
    "empty-assistant": (
        changed(3, content=""),
        "message 4: the message of role assistant is empty",
    ),
    "tool-not-defined": (TOOLS | {"tools": []}, "message 2 calls 'weather', which 'tools' does"),
    "result-without-call": (changed(1, tool_calls=None), "message 3 is the result of a tool call"),
    "result-of-another-call": (changed(2, tool_call_id="b"), "tool call 'b' that is not before"),
    "two-calls": (changed(1, tool_calls=[CALL, CALL]), "message 2 has 2 tool calls"),
    "no-assistant": ({"messages": TURNS["messages"][:2]}, "has no assistant message"),
    "two-names": (changed(1, reasoning_content="b"), "'thinking' and 'reasoning_content'"),
    "two-records": (TURNS | {"conversations": [{}]}, "'messages' and 'conversations'"),
    "unknown-field": (changed(0, value="b"), "message 1 has the unknown field 'value'"),
    "image": (changed(0, content=[{"type": "image_url"}]), "gpt-oss reads only text"),
    "weight": (changed(3, weight=-1), "message 4: weight is -1"),
    "effort": (TURNS | {"reasoning_effort": "max"}, "reasoning_effort 'max'; known: low"),
    "surrogate": (changed(0, content="\ud800"), "message 1 is not Unicode text"),
}


@pytest.mark.parametrize("record, words", BAD.values(), ids=list(BAD))
def test_bad_conversation(record, words):
    with pytest.raises(BadDocument) as error:
        parse_conversation(record)
    assert words in str(error.value) and "\n" not in str(error.value)


def tokenize(argv):
    parser = argparse.ArgumentParser()
    add_tokenize_arguments(parser)
    command.run_tokenize(parser.parse_args(argv))


def write_lines(path, *records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_command(model, tokenizer, render, tmp_path, capsys):
    """jsonl, parquet and .json give the same files; the summary; --show; verify-data."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    write_lines(tmp_path / "a.jsonl", TURNS, TOOLS)
    (tmp_path / "a.json").write_text(json.dumps([TURNS, TOOLS]))
    # In one table all rows have the same fields.
    rows = [record | {"tools": json.dumps(record.get("tools", []))} for record in (TURNS, TOOLS)]
    for row in rows:
        row["messages"] = [
            m | ({"content": m["content"][0]["text"]} if isinstance(m["content"], list) else {})
            for m in row["messages"]
        ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    files = {}
    for number, end in enumerate(("jsonl", "json", "parquet")):
        flags = f"--tokenizer {model} --chat --workers {1 + number // 2} --show 1"
        tokenize([f"{tmp_path}/a.{end}", "--output", f"{tmp_path}/{end}", *flags.split()])
        names = (".bin", ".idx", ".loss.bin", ".loss.idx")
        files[end] = [(tmp_path / f"{end}{name}").read_bytes() for name in names]
    assert files["jsonl"] == files["json"] == files["parquet"]
    output = capsys.readouterr().out
    assert "\x1b[90m<|start|>system" in output and "\x1b[32m<|channel|>final<|message|>4" in output
    assert "renders 0 of 2 conversations to the same tokens" in output
    assert re.search(r"assistant/final +\d+", output) and "a.jsonl, line 1: token" in output
    prefix = tmp_path / "jsonl"
    expected = [render(record) for record in (TURNS, TOOLS)]
    assert read_lengths(prefix).tolist() == [len(one.ids) for one in expected]
    ids = numpy.fromfile(f"{prefix}.bin", dtype=numpy.int32)
    weights = numpy.fromfile(f"{prefix}.loss.bin", dtype=numpy.float32)
    assert ids.tolist() == [token for one in expected for token in one.ids]
    assert weights.tolist() == [weight for one in expected for weight in one.weights]
    assert verify_data([prefix])
    weights[-1] = -1
    weights.tofile(f"{prefix}.loss.bin")
    assert not verify_data([prefix]) and "negative or not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    "record, flags, words",
    [
        (changed(0, role="human"), "", "a.jsonl, line 2: message 1 has the role 'human'"),
        (TURNS, "--context 20", "tokens, the context (--context) 20"),
        (changed(3, weight=0), "--loss-on final", "no token has loss with --loss-on final"),
    ],
    ids=["role", "context", "no-loss"],
)
def test_bad_line(model, read_before, tmp_path, record, flags, words):
    """File and line; --bad-lines skip leaves it out."""
    file = write_lines(tmp_path / "a.jsonl", TURNS, record)
    argv = [str(file), "--output", str(tmp_path / "out"), "--tokenizer", str(model)]
    argv += ["--chat", "--workers", "1", *flags.split()]
    with pytest.raises(UsageError) as error:
        tokenize(argv)
    assert words in str(error.value) and "--bad-lines skip" in str(error.value)
    if "--context" not in flags:
        tokenize([*argv, "--bad-lines", "skip"])
        assert len(read_lengths(tmp_path / "out")) == 1


def test_refused(model, read_before, tmp_path):
    """A tokenizer that is not gpt-oss'; flags without --chat; weights of another dataset."""
    with pytest.raises(UsageError, match="gpt-oss as 199999"), vocabulary(build_byte_tokenizer()):
        pass
    file = write_lines(tmp_path / "a.jsonl", TURNS)
    argv = [str(file), "--output", str(tmp_path / "out"), "--workers", "1"]
    for flags, words in (
        ("--loss-on final", "--loss-on is for conversations"),
        ("--chat", "--chat without --tokenizer"),
        (f"--chat --tokenizer {model} --date today", "--date today: give YYYY-MM-DD"),
    ):
        with pytest.raises(UsageError, match=words):
            tokenize([*argv, *flags.split()])
    for name, size in (("a", 3), ("b", 4)):
        write_conversations(tmp_path / name, [(range(size), [1] * size)])
    for end in (".bin", ".idx"):
        (tmp_path / f"b.loss{end}").replace(tmp_path / f"a.loss{end}")
    with pytest.raises(UsageError, match="other lengths"):
        check_loss_weights(tmp_path / "a")
