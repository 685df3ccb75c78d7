# Copyright (c) 2026, the megatron-core gptoss authors.
"""Some tests of a test module with what they need of it, for the pull request of one fix."""

import ast
import builtins
from pathlib import Path

_BUILTINS = set(dir(builtins))


def extract(source: str, names: set[str]) -> str:
    """The module with only the definitions that ``names`` need: imports, helpers and fixtures.

    Comments and blank lines stay with the statement that follows them.

    Args:
        source: a Python module.
        names: functions or classes of it.
    Raises:
        KeyError: the module does not define one of the names.
    """
    statements = _statements(source)
    defined = {name for statement in statements for name in statement.binds}
    missing = names - defined
    if missing:
        raise KeyError(f"the module does not define {', '.join(sorted(missing))}")
    needed = set(names)
    for statement in statements:
        if statement.always:
            needed |= statement.reads
    while True:
        more = {
            name
            for statement in statements
            if statement.binds & needed
            for name in statement.reads & defined
        }
        if more <= needed:
            break
        needed |= more
    text, gap = _header(source), ""
    for statement in statements:
        gap = max(gap, statement.gap, key=len)
        if statement.always or statement.binds & needed:
            text += gap + statement.text(needed)
            gap = ""
    return text


def _header(source: str) -> str:
    """The comments on top: the copyright line."""
    lines = source.splitlines(keepends=True)
    count = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(lines[:count])


class _Statement:
    """One statement at module level, with the comments before it."""

    def __init__(self, node: ast.stmt, lines: list[str], start: int):
        self.node = node
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        before = "".join(lines[start : first - 1])
        self.before = before.lstrip("\n")
        self.gap = before[: len(before) - len(before.lstrip("\n"))]
        self.code = "".join(lines[first - 1 : node.end_lineno])
        self.is_import = isinstance(node, (ast.Import, ast.ImportFrom))
        self.binds = self._bound()
        self.reads = self._read()
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        self.always = docstring or "autouse=True" in self.code or "pytestmark" in self.binds

    def _bound(self) -> set[str]:
        node = self.node
        if self.is_import:
            return {_bound_name(alias) for alias in node.names}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return {node.name}
        stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
        return {n.id for n in stored if isinstance(n.ctx, ast.Store)}

    def _read(self) -> set[str]:
        if self.is_import:
            return set()
        found = {n.id for n in ast.walk(self.node) if isinstance(n, ast.Name)}
        # A fixture is named by an argument, or by a string in usefixtures().
        found |= {n.arg for n in ast.walk(self.node) if isinstance(n, ast.arg)}
        if "usefixtures(" in self.code:
            constants = (n.value for n in ast.walk(self.node) if isinstance(n, ast.Constant))
            found |= {value for value in constants if isinstance(value, str)}
        return found - _BUILTINS

    def text(self, needed: set[str]) -> str:
        """The source, of an import only the names that are needed."""
        if not self.is_import or self.binds <= needed:
            return self.before + self.code
        used = [alias for alias in self.node.names if _bound_name(alias) in needed]
        fields = {"names": used}
        if isinstance(self.node, ast.ImportFrom):
            fields |= {"module": self.node.module, "level": self.node.level}
        return self.before + ast.unparse(type(self.node)(**fields)) + "\n"


def _bound_name(alias: ast.alias) -> str:
    return (alias.asname or alias.name).split(".")[0]


def _statements(source: str) -> list[_Statement]:
    lines, found = source.splitlines(keepends=True), []
    start = len(_header(source).splitlines())
    for node in ast.parse(source).body:
        found.append(_Statement(node, lines, start))
        start = node.end_lineno
    return found


def with_fixtures(source: str, conftest: str) -> str:
    """The test module with the fixtures of a conftest.py that it uses and does not define itself."""
    own = _statements(source)
    defined = set().union(*(statement.binds for statement in own))
    missing = set().union(*(statement.reads for statement in own)) - defined
    shared = _statements(conftest)
    fixtures = [
        statement
        for statement in shared
        if statement.binds & missing and "pytest.fixture" in statement.code and not statement.always
    ]
    if not fixtures:
        return source
    read = set().union(*(statement.reads for statement in fixtures)) - defined
    imports = [statement for statement in shared if statement.is_import and statement.binds & read]
    lines = source.splitlines(keepends=True)
    end = max(statement.node.end_lineno for statement in own if statement.is_import)
    added = "".join(statement.text(read) for statement in imports)
    added += "".join(f"\n\n{statement.code}" for statement in fixtures)
    rest = "".join(lines[end:]).lstrip("\n")
    return f"{''.join(lines[:end])}{added}\n\n{rest}"


def helper_modules(root: Path, source: str) -> dict[str, str]:
    """Path -> text of the modules below ``root/tests`` that a test module imports, transitively."""
    found: dict[str, str] = {}
    pending = [source]
    while pending:
        for name in sorted(_test_imports(pending.pop())):
            path = Path(*name.split(".")).with_suffix(".py")
            if path.as_posix() not in found and (root / path).is_file():
                found[path.as_posix()] = (root / path).read_text(encoding="utf-8")
                pending.append(found[path.as_posix()])
    return found


def _test_imports(source: str) -> set[str]:
    """Dotted names of modules below tests/ that may be imported anywhere in the source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "tests"}
