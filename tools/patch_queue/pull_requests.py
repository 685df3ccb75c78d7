# Copyright (c) 2026, the megatron-core gptoss authors.
"""The pull requests of patches/pull_requests.toml: their commits with tests, and their page."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from .errors import QueueError
from .evidence import tests_of
from .export import write_mails
from .extract_tests import extract, helper_modules, with_fixtures
from .foreign_tree import modules_of
from .series import Patch, Series
from .tree import Tree, apply_patch, diff_trees
from .upstream import VERSION

FILE = "pull_requests.toml"
MAXIMUM = 12
_HEAD = f"""# Pull requests to Megatron-LM

Written by `python tools/patches.py pull-requests --write` from `patches/{FILE}`; a test compares the
two.

These are the fixes of `patches/fixes/` whose tests do not need this project's model or entry script.
Each pull request applies to `core_v{VERSION}` alone, and all of them apply in this order, with `git am -3`
because two bring the same test helper. A commit contains one fix, its tests and the new modules that it imports. To add one to a branch that starts at
`core_v{VERSION}`, without a network:

```
python tools/patches.py export --pull-request yarn --out series/ && git -C /path/to/Megatron-LM am "$PWD"/series/*.patch
```

`series/pull_request.md` then contains title and body. The tests are those named in the patches' headers,
extracted from our test modules with their helpers. Their files end in `_regression.py`, so that they do
not collide with upstream's. On a machine without a GPU they also need the group `device/`; without
TransformerEngine and Apex those of optimizer-state need `fixes/distributed_optimizer_torch_adam_resume`.

Upstream: {{upstream}}
"""


@dataclass(frozen=True)
class PullRequest:
    """One entry of the file, with its patches resolved."""

    name: str
    title: str
    body: str
    patches: tuple[Patch, ...]

    @property
    def tests(self) -> list[str]:
        """Test ids as they are in the pull request."""
        return list(dict.fromkeys(_upstream_id(t) for p in self.patches for t in tests_of(p)))

    @property
    def text(self) -> str:
        """The body as it is opened: the defects, the commits, the command that runs the tests."""
        files = list(dict.fromkeys(test.split("::")[0] for test in self.tests))
        return "\n".join(
            [
                self.body.strip(),
                "",
                "Commits:",
                "",
                *(f"- {patch.subject}" for patch in self.patches),
                "",
                "Tests, which fail before and pass after:",
                "",
                f"    pytest {' '.join(files)}",
                "",
            ]
        )


def read_pull_requests(series: Series) -> list[PullRequest]:
    """The pull requests in order.

    Raises:
        QueueError: more than twelve, a name or a patch twice, or a patch that is not in the series.
    """
    with open(series.folder / FILE, "rb") as file:
        entries = tomllib.load(file)["pull_request"]
    found = [
        PullRequest(
            entry["name"],
            entry["title"],
            entry["body"],
            tuple(series[name] for name in entry["patches"]),
        )
        for entry in entries
    ]
    names = [request.name for request in found]
    patches = [patch.name for request in found for patch in request.patches]
    for kind, values in (("name", names), ("patch", patches)):
        twice = {value for value in values if values.count(value) > 1}
        if twice:
            raise QueueError(f"patches/{FILE} has the {kind} {min(twice)} twice.")
    if len(found) > MAXIMUM:
        raise QueueError(f"patches/{FILE} has {len(found)} pull requests; at most {MAXIMUM}.")
    return found


def find(series: Series, name: str) -> PullRequest:
    """One pull request by its name. Raises QueueError for an unknown name."""
    requests = {request.name: request for request in read_pull_requests(series)}
    if name not in requests:
        raise QueueError(f"No pull request is called '{name}'; there are {', '.join(requests)}.")
    return requests[name]


def export_pull_request(root: Path, request: PullRequest, upstream: Tree, out: Path) -> list[Path]:
    """Write one mail for each patch, and ``pull_request.md`` with title and body.

    Args:
        upstream: the pinned release.
        out: a new or empty directory.
    Raises:
        QueueError: ``out`` is not empty, or a patch needs one that the pull request lacks.
    """
    mails = commits(root, request, upstream)
    written = write_mails(out, mails)
    (out / "pull_request.md").write_text(f"# {request.title}\n\n{request.text}", encoding="utf-8")
    return written


def commits(root: Path, request: PullRequest, upstream: Tree) -> list[tuple[str, str, str]]:
    """(subject, body, diff) of each commit: a fix, its modules and its tests."""
    found, tree = [], dict(upstream)
    for number, patch in enumerate(request.patches, 1):
        after = apply_patch(tree, patch) | modules_of(root, [patch])
        after |= _tests(root, request.patches[:number])
        subject, _, body = patch.fields["Description"].partition("\n")
        area = Path(patch.paths[0]).stem
        found.append((f"{area}: {subject}", body, diff_trees(tree, after, patch.context)))
        tree = after
    return found


def _tests(root: Path, patches: tuple[Patch, ...]) -> Tree:
    """The tests of some patches and the helper modules that they import."""
    names: dict[str, set[str]] = {}
    for test in (test for patch in patches for test in tests_of(patch)):
        path, _, function = test.partition("::")
        names.setdefault(path, set()).add(function.partition("[")[0])
    files: dict[str, str] = {}
    conftest = (root / "tests/unit_tests/conftest.py").read_text(encoding="utf-8")
    for path, functions in names.items():
        module = with_fixtures((root / path).read_text(encoding="utf-8"), conftest)
        source = extract(module, functions)
        files |= {_upstream_id(path): source} | helper_modules(root, source)
    return {path: text.encode() for path, text in files.items()}


def _upstream_id(test: str) -> str:
    """The path or test id in the pull request: another file than upstream's of the same name."""
    return test.replace(".py", "_regression.py", 1)


def page(series: Series) -> str:
    """docs/upstreaming.md."""
    requests = read_pull_requests(series)
    sent = {patch.name for request in requests for patch in request.patches}
    parts = [_HEAD.format(upstream=series.upstream)]
    parts += [_section(number, request) for number, request in enumerate(requests, 1)]
    rest = [p for p in series.patches if p.group == "fixes" and p.name not in sent]
    parts.append(_rest(rest))
    return "\n".join(parts)


def _section(number: int, request: PullRequest) -> str:
    patches = "\n".join(f"- `{patch.name.removesuffix('.patch')}`" for patch in request.patches)
    tests = "\n".join(f"- `{test}`" for test in request.tests)
    quoted = "\n".join(f"> {line}".rstrip() for line in request.text.rstrip().splitlines())
    return (
        f"## {number}. {request.name}\n\n**{request.title}**\n\n{quoted}\n\n"
        f"Patches, in order:\n\n{patches}\n\nTests:\n\n{tests}\n"
    )


def _rest(patches: list[Patch]) -> str:
    lines = ["## Fixes in no pull request", ""]
    lines += [f"- `{p.name.removesuffix('.patch')}`: {_why_not_sent(p)}" for p in patches]
    return "\n".join(lines) + "\n"


def _why_not_sent(patch: Patch) -> str:
    if patch.fields.get("Applied-Upstream"):
        return f"fixed in {patch.fields['Applied-Upstream']}"
    if "fixed at" in patch.fields.get("Upstream", ""):
        return f"{patch.fields['Upstream']}"
    return "its test needs this project's model, entry script or CPU runtime"
