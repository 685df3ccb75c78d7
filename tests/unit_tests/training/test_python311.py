# Copyright (c) 2026, the megatron-core gptoss authors.
"""Upstream 0.19.2 requires Python 3.12 because of one name in typing."""

import ast
from pathlib import Path

import megatron.core

TREE = Path(megatron.core.__file__).parents[1]


def test_training_imports_on_python_311():
    """No module takes from typing what Python 3.11 does not have there."""
    since_312 = {"override", "TypeAliasType", "get_protocol_members", "is_protocol", "NoDefault"}
    found = []
    for path in TREE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if not any(name in text for name in since_312):
            continue  # parsing all of them takes seconds
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "typing":
                found += [(path.name, a.name) for a in node.names if a.name in since_312]
    assert not found
