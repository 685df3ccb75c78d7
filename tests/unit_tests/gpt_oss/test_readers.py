# Copyright (c) 2026, the megatron-core gptoss authors.

"""Damaged files of every format: one sentence, no code execution, no hang, bounded memory."""

import os
import re
import resource
import signal

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.harness.reader_cases import READERS, good_files, read_damaged

EXAMPLES = int(os.environ.get("READER_EXAMPLES", 15))
SECONDS, BYTES = 10, 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return good_files(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("name", READERS)
def test_the_good_file_is_read(folder, name):
    reader = READERS[name]
    assert read_damaged(reader, folder, (folder / reader.path).read_bytes()) is None


TOKENS = re.compile(
    rb'"(?:[^"\\\n]|\\.){0,80}"|-?\d+(?:\.\d+)?(?:e-?\d+)?|true|false|null|[\[\]{}:,]'
)
WORDS = st.sampled_from(
    [
        b'-1', b'0', b'1e9', b'1e400', b'-0.5', b'9' * 400, b'99999999999', b'2147483648', b'NaN',
        b'null', b'true', b'""', b'"x"', b'"../../etc/passwd"', b'"/etc/passwd"', b'"\\ud800"',
        b'"\\u0000"', b'"<script>"', b'"$\\\\frac"', b'[]', b'{}', b'[[0]]', b'{"a": {}}',
        b'[' * 5000, b'{"a":' * 5000, b'\xff', b'\xc3', b'\x00', b'\xef\xbb\xbf', b',', b']',
    ]
)  # fmt: skip
PLACES = st.integers(0, 2**30)
EDITS = st.one_of(
    st.tuples(st.just("token"), PLACES, WORDS),
    st.tuples(st.just("replace"), PLACES, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), PLACES, st.one_of(WORDS, st.binary(min_size=1, max_size=8))),
    st.tuples(st.just("delete"), PLACES, st.integers(1, 64)),
    st.tuples(st.just("repeat"), PLACES, st.integers(1, 64)),
    st.tuples(st.just("cut"), PLACES, st.none()),
    st.tuples(st.just("end"), PLACES, st.binary(min_size=1, max_size=16)),
)


def damaged(content: bytes, edits) -> bytes:
    """A file's content with some edits, most of them in its first or last 4 KB."""
    for kind, place, what in edits:
        size = len(content)
        at = place % (size + 1) if place % 3 == 0 else place % min(size + 1, 4096)
        if place % 7 == 0:
            at = size - at % min(size + 1, 4096)
        if kind == "token":
            found = list(TOKENS.finditer(content[: 2**16]))
            if found:
                start, stop = found[place % len(found)].span()
                content = content[:start] + what + content[stop:]
        elif kind == "replace":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + what :]
        elif kind == "repeat":
            content = content[:at] + content[at : at + what] * 2 + content[at + what :]
        elif kind == "cut":
            content = content[:at]
        else:
            content += what
    return content


@pytest.mark.parametrize("name", READERS)
def test_mutations(folder, name):
    """READER_EXAMPLES=2000 (make fuzz-readers) for more than a look."""
    reader = READERS[name]
    good = (folder / reader.path).read_bytes()

    def hang(number, frame):
        raise AssertionError(f"more than {SECONDS} s")

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(EDITS, min_size=1, max_size=3))
    def run(edits):
        signal.alarm(SECONDS)
        try:
            read_damaged(reader, folder, damaged(good, edits))
        finally:
            signal.alarm(0)

    before, peak = signal.signal(signal.SIGALRM, hang), _peak()
    try:
        run()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert _peak() - peak < BYTES


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
