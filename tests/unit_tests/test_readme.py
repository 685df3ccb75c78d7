# Copyright (c) 2026, the megatron-core gptoss authors.
"""Links and paths of the pages; their commands are in test_documented_commands.py."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREES = ("benchmarks", "docs", "examples", "megatron", "patches", "tests", "tools")
PAGES = ["README.md", "tests/README.md", "patches/README.md", "examples/gpt_oss/README.md"]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_and_paths_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not heading or heading in anchors(target), f"{page}: {link}#{heading}"
    for path in re.findall(rf"`((?:{'|'.join(TREES)})/[\w./-]+)`", text):
        exists = (ROOT / path).exists() or path.startswith("patches/fixes/what_is_wrong")
        assert exists, f"{page}: {path}"


def test_architecture_names_files_that_exist():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    files = [file.as_posix() for tree in TREES for file in (ROOT / tree).rglob("*.py")]
    files += [file.as_posix() for file in ROOT.glob("*.py")]
    named = set(re.findall(r"(?<![\w*/])(?:\w+/)*\w+\.py\b", text))
    missing = {name for name in named if not any(file.endswith(f"/{name}") for file in files)}
    assert not missing
