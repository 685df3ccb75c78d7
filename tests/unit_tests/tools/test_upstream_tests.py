# Copyright (c) 2026, the megatron-core gptoss authors.
"""tools/upstream_tests.py on invented trees."""

import json
from types import SimpleNamespace

import pytest
import upstream_tests  # noqa: I001

PAGE = "# Title\n\n## CPU\n\nold\n\n## What was run\n\ntable\n"


@pytest.fixture
def trees(tmp_path):
    """Two trees with a file that passes on both, and one that passes unpatched alone."""
    seen = tmp_path / "seen"
    seen.mkdir()
    for tree in upstream_tests.TREES:
        folder = tmp_path / "trees" / tree / upstream_tests.TESTS
        folder.mkdir(parents=True)
        (folder / "test_same.py").write_text("def test_x(): pass\n")
        (folder / "test_worse.py").write_text(f"def test_x(): assert {tree == 'unpatched'}\n")
        (folder / "test_folder.py").write_text(
            "import pathlib\n\ndef test_x(tmp_path_factory):\n"
            f"    found = tmp_path_factory.getbasetemp().parent\n    pathlib.Path({str(seen)!r})"
            f".joinpath({tree!r}).write_text(str(found))\n"
        )
    return tmp_path / "trees"


def run(trees, out, only, **others):
    args = dict(checkout=None, chunk=1, jobs=2, timeout=300, total=600, site=[]) | others
    upstream_tests.run(SimpleNamespace(trees=trees, out=out, only=only, **args))
    return json.loads(out.read_text())


def outcomes(results, tree):
    return {test.split("/")[-1]: found[0] for test, found in results[tree].items()}


def test_rerun_keeps_other_results(trees, tmp_path):
    out = tmp_path / "out.json"
    first = run(trees, out, "test_(same|worse)")
    assert outcomes(first, "patched") == {
        "test_same.py::test_x": "passed",
        "test_worse.py::test_x": "failed",
    }
    assert [test.split("/")[-1] for test in upstream_tests.regressions(first)] == [
        "test_worse.py::test_x"
    ]
    worse = trees / "patched" / upstream_tests.TESTS / "test_worse.py"
    worse.write_text("def test_x(): pass\n")
    second = run(trees, out, "worse")
    assert set(outcomes(second, "patched").values()) == {"passed"} and len(second["patched"]) == 2


def test_processes_share_no_folder(trees, tmp_path):
    """Upstream's checkpoint tests empty and remove the parent of pytest's directory."""
    run(trees, tmp_path / "out.json", "test_folder")
    first, second = (path.read_text() for path in (tmp_path / "seen").iterdir())
    assert first != second


def test_no_time_left_runs_neither_tree(trees, tmp_path):
    assert run(trees, tmp_path / "out.json", "same", total=0.5)["patched"] == {}


def test_results_of_another_machine_are_refused(tmp_path):
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"machine": "an abacus", "patched": {}, "unpatched": {}}))
    with pytest.raises(SystemExit, match="an abacus"):
        upstream_tests.known_results(out, "CPU", [])


def test_section_is_put_in_once(trees, tmp_path):
    results = run(trees, tmp_path / "out.json", "test_(same|worse)")
    page = upstream_tests.with_section(PAGE, upstream_tests.render_rerun(results))
    assert (
        "| test_worse.py | 1 / 1 | 0 / 1 |" in page and "| test_same.py | 1 / 1 | 1 / 1 |" in page
    )
    assert page.index("## CPU") < page.index("## Rerun on") < page.index("## What was run")
    assert upstream_tests.with_section(page, upstream_tests.render_rerun(results)) == page
