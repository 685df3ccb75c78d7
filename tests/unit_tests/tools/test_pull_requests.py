# Copyright (c) 2026, the megatron-core gptoss authors.
"""The pull requests to Megatron-LM: each applies to the pinned release alone and in order."""

import subprocess
from pathlib import Path

import pytest
from patch_queue.errors import QueueError  # noqa: E402
from patch_queue.extract_tests import extract, helper_modules, with_fixtures  # noqa: E402
from patch_queue.materialise import Workspace  # noqa: E402
from patch_queue.pull_requests import (  # noqa: E402
    commits,
    export_pull_request,
    page,
    read_pull_requests,
)
from patch_queue.series import Patch  # noqa: E402

import patches as command_line  # noqa: I001

ROOT = Path(__file__).resolve().parents[3]
GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@invalid"]


@pytest.fixture(scope="module")
def workspace():
    return Workspace(ROOT)


@pytest.fixture(scope="module")
def requests(workspace):
    return read_pull_requests(workspace.series)


@pytest.fixture(scope="module")
def upstream(workspace):
    return workspace.pristine()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, requests, upstream):
    """A git repository of the pinned release: the files that the pull requests touch."""
    folder = tmp_path_factory.mktemp("release")
    for path in {path for request in requests for patch in request.patches for path in patch.paths}:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(upstream[path])
    for command in (["init", "-qb", "pinned"], ["add", "-A"], ["commit", "-qm", "release"]):
        git(folder, *command)
    git(folder, "branch", "in_order")
    return folder


def git(folder, *command):
    result = subprocess.run([*GIT, *command], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, f"git {command}: {result.stdout}{result.stderr}"
    return result.stdout


def test_applies_alone_and_in_order(workspace, requests, upstream, checkout, tmp_path):
    """Every commit alone by `git am`, which takes no line of context that differs.

    In order -3 accepts a test helper that an earlier pull request added.
    """
    for request in requests:
        mails = export_pull_request(ROOT, request, upstream, tmp_path / request.name)
        for branch, options in ((["-c", request.name, "pinned"], []), (["in_order"], ["-3"])):
            git(checkout, "switch", "-q", *branch)
            git(checkout, "am", "-q", *options, *mails)
        log = git(checkout, "log", "--format=%s", f"pinned..{request.name}").splitlines()
        assert len(log) == len(request.patches)
        text = (tmp_path / request.name / "pull_request.md").read_text()
        assert text.startswith(f"# {request.title}\n\n")


def test_contains_the_tests_and_nothing_of_this_project(requests, upstream):
    for request in requests:
        diffs = [diff for _, _, diff in commits(ROOT, request, upstream)]
        paths = {path for d in diffs for path in Patch.parse(request.name, f"\n---\n{d}").paths}
        tests = {test.split("::")[0] for test in request.tests}
        assert tests == {path for path in paths if path.endswith("_regression.py")}
        added = [line for diff in diffs for line in diff.splitlines() if line.startswith("+")]
        assert not [line for line in added if "megatron.gpt_oss" in line], request.name


def test_only_fixes(requests):
    assert {patch.group for request in requests for patch in request.patches} == {"fixes"}


def test_page_is_up_to_date(workspace):
    assert (ROOT / command_line.UPSTREAMING).read_text(encoding="utf-8") == page(workspace.series)


def test_command(monkeypatch, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert command_line.main(["export", "--pull-request", "nothing", "--out", out]) == 2
    assert "No pull request is called 'nothing'; there are yarn, " in capsys.readouterr().err
    assert command_line.main(["pull-requests"]) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 12


def test_file_is_checked(root):
    entry = '[[pull_request]]\nname = "{}"\ntitle = "t"\nbody = "b"\npatches = ["fixes/first"]\n'
    path = root / "patches/pull_requests.toml"
    path.write_text(entry.format("one") + entry.format("two"))
    with pytest.raises(QueueError, match="the patch fixes/first.patch twice"):
        read_pull_requests(Workspace(root).series)
    path.write_text("".join(entry.format("one") for _ in range(2)))
    with pytest.raises(QueueError, match="the name one twice"):
        read_pull_requests(Workspace(root).series)


MODULE = '''# Copyright
"""Docstring."""

import os
from pathlib import (
    Path,
    PurePath,
)

import pytest

SIZE = 3
OTHER = 4


# Why it is here.
@pytest.fixture
def parent():
    return Path(os.sep)


@pytest.fixture(autouse=True)
def always():
    yield PurePath


@pytest.fixture
def named():
    yield


def helper():
    return SIZE


@pytest.mark.usefixtures("named")
def test_one(parent):
    assert helper()


def test_two():
    assert OTHER
'''


def test_extract():
    one = extract(MODULE, {"test_one"})
    assert one == MODULE.replace("OTHER = 4\n", "").partition("\n\n\ndef test_two")[0] + "\n"
    two = extract(MODULE, {"test_two"})
    assert two.startswith('# Copyright\n"""Docstring."""\n\nfrom pathlib import PurePath\n\nimport')
    assert "parent" not in two and "SIZE" not in two and "import os" not in two
    with pytest.raises(KeyError, match="test_three"):
        extract(MODULE, {"test_three"})


def test_with_fixtures():
    """Fixtures of conftest.py that a module uses, with their imports; no others."""
    conftest = (
        "import os\nimport sys\n\nimport pytest\n\n\n@pytest.fixture\ndef shared():\n    return os\n"
        "\n\n@pytest.fixture(autouse=True)\ndef every():\n    return sys\n"
    )
    source = "import json\n\n\ndef test_one(shared, parent):\n    assert json\n"
    assert with_fixtures(source, conftest) == (
        "import json\nimport os\nimport pytest\n\n\n@pytest.fixture\ndef shared():\n    return os\n"
        "\n\ndef test_one(shared, parent):\n    assert json\n"
    )
    assert with_fixtures("import json\n", conftest) == "import json\n"


def test_helper_modules(tmp_path):
    """Found through imports in functions and from packages; modules of other packages are not."""
    (tmp_path / "tests/harness").mkdir(parents=True)
    (tmp_path / "tests/harness/a.py").write_text("def f():\n    from tests.harness.b import g\n")
    (tmp_path / "tests/harness/b.py").write_text("import os\n")
    found = helper_modules(tmp_path, "from tests.harness import a\nimport json\n")
    assert list(found) == ["tests/harness/a.py", "tests/harness/b.py"]
