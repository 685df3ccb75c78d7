# Copyright (c) 2026, the megatron-core gptoss authors.
"""Names that a Python file uses and does not define: a patch can apply to a version and break it."""

import ast
import builtins
import symtable

_KNOWN = set(dir(builtins)) | {"__file__", "__name__", "__doc__", "__path__", "__spec__", "__all__"}


def undefined_names(source: str) -> set[str]:
    """Global names that a module reads and does not bind.

    Raises:
        SyntaxError: the source is not Python.
    """
    top = symtable.symtable(source, "module", "exec")
    if "import *" in source:
        return set()
    bound = {symbol.get_name() for symbol in top.get_symbols() if _binds(symbol)}
    used: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            outside = symbol.is_global() or table is top
            if outside and symbol.is_declared_global() and symbol.is_assigned():
                bound.add(symbol.get_name())
            if outside and symbol.is_referenced():
                used.add(symbol.get_name())
    return used - bound - _KNOWN


def _binds(symbol: symtable.Symbol) -> bool:
    return symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()


def unbound_attributes(source: str) -> set[str]:
    """CLASS.NAME of each self.NAME that a class reads and neither sets nor defines.

    These include inherited ones: compare with the unpatched file.
    """
    found: set[str] = set()
    for owner in ast.walk(ast.parse(source)):
        if not isinstance(owner, ast.ClassDef):
            continue
        read, bound = set(), set()
        for node in ast.walk(owner):
            if isinstance(node, ast.FunctionDef):
                bound.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "self":
                    (read if isinstance(node.ctx, ast.Load) else bound).add(node.attr)
        found |= {f"{owner.name}.{name}" for name in read - bound}
    return found


def broken_by(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """What is new in the changed Python files: syntax errors, undefined names, unset attributes."""
    found = []
    for path in sorted(after):
        if not path.endswith(".py") or before.get(path) == after[path]:
            continue
        try:
            known = _missing(before.get(path, b""))
        except SyntaxError:
            continue  # not Python before either
        try:
            names = _missing(after[path]) - known
        except SyntaxError as error:
            found.append(f"{path}:{error.lineno}: {error.msg}")
            continue
        found += [f"{path}: nothing defines {name}" for name in sorted(names)]
    return found


def _missing(content: bytes) -> set[str]:
    source = content.decode()
    return undefined_names(source) | unbound_attributes(source)
