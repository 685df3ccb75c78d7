# Copyright (c) 2026, the megatron-core gptoss authors.

"""Refuses Megatron flags that are not tested, have no effect, or are wrong for gpt-oss."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from functools import cache
from typing import Iterable

from megatron.gpt_oss.arguments.flags import ALLOW_UNTESTED
from megatron.gpt_oss.arguments.ledger import INERT, SUPPORTED, UNTESTED, WRONG
from megatron.gpt_oss.errors import UsageError

PAGE = "docs/flags.md"


@dataclass(frozen=True)
class Entry:
    """The ledger's entry of a flag or of one value of it.

    Attributes:
        status: 'supported', 'inert', 'untested' or 'wrong'.
        note: the test that uses it, or the reason for a refusal.
    """

    status: str
    note: str


@cache
def ledger() -> dict[str, Entry]:
    """Entries by '--flag' and '--flag=value'.

    Raises:
        ValueError: the ledger has a flag twice.
    """
    entries: dict[str, Entry] = {}
    tables = {"supported": SUPPORTED, "inert": INERT, "untested": UNTESTED, "wrong": WRONG}
    for status, table in tables.items():
        for note, flags in table.items():
            for flag in flags.split():
                if flag in entries:
                    raise ValueError(f"the ledger has {flag} twice")
                entries[flag] = Entry(status, note)
    return entries


def entries_of(flag: str, value: object) -> Iterable[Entry]:
    """The entries of a flag with a value: one for each item of a list."""
    items = value if isinstance(value, (list, tuple)) and value else [value]
    for item in items:
        named = f"{flag}={getattr(item, 'name', item)}"
        yield ledger()[named if named in ledger() else flag]


def check_flags(words: Iterable[str], given: Namespace, parser: ArgumentParser) -> tuple[str, ...]:
    """Refuse flags that the ledger does not list as supported.

    A flag whose value equals the default of the run is allowed.

    Args:
        words: the command line.
        given: the arguments that it gives.
        parser: Megatron's parser, with the defaults of the run.
    Returns:
        The flags that --allow-untested-flags allows.
    Raises:
        UsageError: names the flag and why it is refused.
    """
    allowed = getattr(given, ALLOW_UNTESTED.removeprefix("--").replace("-", "_"), False)
    untested = {}
    for word in words:
        flag = word.split("=")[0]
        action = parser._option_string_actions.get(flag)
        if action is None or flag not in ledger():
            continue  # a value, or a flag of ours or of the entry script
        value = getattr(given, action.dest)
        if value == parser.get_default(action.dest):
            continue
        shown = flag if action.nargs == 0 else f"{flag} {_words(value)}"
        for entry in entries_of(flag, value):
            if entry.status == "supported":
                continue
            if entry.status == "wrong" or not allowed:
                raise UsageError(_refusal(shown, entry))
            untested[shown] = None
    return tuple(untested)


def _words(value: object) -> str:
    items = value if isinstance(value, (list, tuple)) else [value]
    return " ".join(str(getattr(item, "name", item)) for item in items)


def _refusal(shown: str, entry: Entry) -> str:
    if entry.status == "wrong":
        return f"{shown} is refused: {entry.note}."
    if entry.status == "inert":
        return f"{shown} has no effect on a gpt-oss run: it is {entry.note}. Drop it."
    return (
        f"{shown} is refused: {entry.note}. Drop it, or give {ALLOW_UNTESTED} to run with it "
        f"anyway ({PAGE})."
    )
