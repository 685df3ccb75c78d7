# Copyright (c) 2026, the megatron-core gptoss authors.

"""docs/parity.md says what the committed results say: its tables are written, not edited."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    before = set(sys.modules)
    import convert
    import parity
    import report

    yield convert, parity, report
    for name in {'convert', 'parity', 'report'} - before:
        del sys.modules[name]


def test_the_page_is_that_of_the_results(scripts):
    convert, parity, report = scripts
    found = json.loads(parity.RESULT.read_text())
    assert report.read_section(parity.PAGE, parity.SECTION) == parity.page_text(found)
    assert report.read_section(convert.PAGE, convert.SECTION) == convert.page_text()


def test_every_figure_is_below_its_limit(scripts):
    _, parity, _ = scripts
    rows = json.loads(parity.RESULT.read_text())['rows']
    assert len(rows) > 60
    for row in rows:
        assert row['measured'] <= row['limit'], row


def test_sections(scripts, tmp_path):
    _, _, report = scripts
    page = tmp_path / 'page.md'
    page.write_text('a\n<!-- begin one, by hand -->\nold\n<!-- end one -->\nb\n')
    report.write_section(page, 'one', report.markdown(['x', 'y'], [['1', '2']]))
    assert report.read_section(page, 'one') == '| x | y |\n| --- | --- |\n| 1 | 2 |'
    assert page.read_text().startswith('a\n<!-- begin one, by hand -->\n\n| x')
    assert page.read_text().endswith('\n\n<!-- end one -->\nb\n')
    with pytest.raises(SystemExit, match="no section 'two'"):
        report.write_section(page, 'two', '')
