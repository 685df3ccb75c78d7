# Copyright (c) 2026, the megatron-core gptoss authors.
"""Links and paths of the pages; their commands are in test_documented_commands.py."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_and_paths_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
    for path in re.findall(r"`((?:examples|tools|docs|tests|patches)/[\w./-]+)`", text):
        exists = (ROOT / path).exists() or path.startswith("patches/fixes/what_is_wrong")
        assert exists, f"{page}: {path}"
