#!/usr/bin/env python3
# Copyright (c) 2026, the megatron-core gptoss authors.
"""The patch queue: megatron/ is upstream's pinned wheel plus patches/, in the order of patches/series.

status                       edited files of megatron/, and the patches of each file
apply                        bring megatron/ up to date with patches/ (keeps edits)
apply --to PATH [--group G]  patch a Megatron-LM checkout or an unpacked container tree
try [VERSION|PATH ...]       what apply --to would change, and each patch's test before and after
table [--write]              the table patch x version of patches/README.md
new GROUP/NAME -m SUBJECT    start a patch
refresh PATCH [FILE ...]     add edits of megatron/ to a patch
refresh                      rewrite line numbers and index lines after a merge
export --out DIR [VERSION]   a `git am` series, our new modules included
export --pull-request NAME --out DIR    the commits of one pull request, with their tests
pull-requests [--write]      list the pull requests; write docs/upstreaming.md
check                        what CI checks of the series
"""

import argparse
import sys
from dataclasses import astuple
from pathlib import Path

from patch_queue import table
from patch_queue.errors import QueueError
from patch_queue.evidence import PASSED, run_tests, testable, tests_of
from patch_queue.export import export
from patch_queue.foreign_tree import apply_to, read_target
from patch_queue.leave_one_out import FAILS, PASSES, prove
from patch_queue.materialise import Workspace
from patch_queue.pull_requests import export_pull_request, find, page, read_pull_requests
from patch_queue.refresh import new_patch, refresh_patch, refresh_series
from patch_queue.resolve import APPLIES, PRESENT, REFUSED, VARIANT, Plan, make_plan
from patch_queue.series import GROUPS
from patch_queue.tree import Tree, apply_series, diff_trees
from patch_queue.upstream import RELEASES, VERSION, locate_release, read_wheel

UPSTREAMING = "docs/upstreaming.md"
ROOT = Path(__file__).resolve().parents[1]


def status(workspace: Workspace, args: argparse.Namespace) -> None:
    """Print the state of the tree and the owners of each patched file."""
    manifest = workspace.manifest()
    edits = workspace.edits()
    if manifest is None:
        print("megatron/ is not materialised. Run `python tools/patches.py apply`.")
    elif manifest["inputs"] != workspace.inputs_digest():
        print("megatron/ is older than patches/. Run `python tools/patches.py apply`.")
    elif not edits:
        print(f"clean: megatron-core {manifest['upstream']} + {len(workspace.series.patches)}")
    if edits:
        print("edited, in no patch yet (add with `refresh PATCH`):")
        for path in edits:
            deleted = "" if (workspace.root / path).exists() else "  (deleted)"
            print(
                f"  {path}{deleted}  owners: {', '.join(workspace.series.owners(path)) or 'none'}"
            )
    paths = sorted({path for patch in workspace.series.patches for path in patch.paths})
    width = max(map(len, paths), default=0)
    print("patched files and their patches:")
    for path in paths:
        print(f"  {path:<{width}}  {' '.join(workspace.series.owners(path))}")


def apply(workspace: Workspace, args: argparse.Namespace) -> None:
    """Write megatron/, or patch another source tree."""
    if args.to is None:
        if args.group:
            raise QueueError("--group needs --to; megatron/ here always has every group.")
        changed = workspace.materialise()
        print("megatron/ brought up to date" if changed else "megatron/ is up to date")
        return
    plan = apply_to(ROOT, workspace.series, args.to, _groups(args))
    _print_plan(plan)
    if not plan.with_status(APPLIES, VARIANT):
        print(f"{args.to} is already patched; nothing was changed.")


def _groups(args: argparse.Namespace) -> list[str]:
    return args.group.split(",") if args.group else list(GROUPS)


def _print_plan(plan: Plan) -> None:
    print(f"Megatron-Core {plan.found or 'of no known version'}", *plan.notes, sep="\n")
    width = max((len(outcome.patch.name) for outcome in plan.outcomes), default=0)
    for outcome in plan.outcomes:
        detail = "" if outcome.status in (VARIANT, PRESENT) else outcome.detail
        print(f"{outcome.patch.name:<{width}}  {table.cell(outcome)}  {detail}".rstrip())


def try_out(workspace: Workspace, args: argparse.Namespace) -> None:
    """Show what `apply --to` would change, and run each patch's test on the patched tree."""
    refused = 0
    for what in args.what or list(RELEASES):
        tree = _read(what)
        plan = make_plan(workspace.series, tree, _groups(args))
        print(f"== {what}")
        _print_plan(plan)
        refused += len(plan.with_status(REFUSED))
        if not args.no_tests:
            _test(workspace, args, what, tree, plan)
    if refused:
        raise QueueError(f"{refused} patches do not apply.")


def _read(what: str) -> Tree:
    """The tree of a known release, a wheel file or a directory."""
    if what in RELEASES:
        return read_wheel(locate_release(ROOT, what))
    path = Path(what)
    if path.suffix == ".whl" and path.is_file():
        return read_wheel(path)
    if not path.is_dir():
        locate_release(ROOT, what)  # raises, and lists the releases
    return read_target(path)


def _test(workspace: Workspace, args, what: str, tree: Tree, plan: Plan) -> None:
    chosen = {workspace.series[name].name for name in args.patch}
    patches = [patch for patch in testable(plan) if not chosen or patch.name in chosen]
    ids = list(dict.fromkeys(i for patch in patches for i in tests_of(patch)))
    after = run_tests(workspace, tree | plan.tree, ids)
    entries = {test: {"after": astuple(after[test])} for test in ids}
    if args.prove:
        for test, result in _before(workspace, tree, plan, after).items():
            entries[test]["before"] = astuple(result)
    width = max(map(len, ids), default=0)
    for test, entry in entries.items():
        results = [f"{name}: {' '.join(found)}".strip() for name, found in entry.items()]
        print(f"{test:<{width}}  {'; '.join(results)}")
    if args.prove and what in RELEASES and not args.group:
        table.write_evidence(workspace, what, entries, keep=bool(chosen))


def _before(workspace: Workspace, tree: Tree, plan: Plan, after: dict) -> dict:
    """The tests on the unpatched tree; those of other groups with device/ applied.

    Without device/, a machine without a GPU would fail before it reaches the defect. Tests that
    fail on the patched tree are not run.
    """
    patches = testable(plan)
    own = {test for patch in patches if patch.group == "device" for test in tests_of(patch)}
    passed = [test for test, result in after.items() if result.outcome == PASSED]
    runs = run_tests(workspace, tree, [test for test in passed if test in own])
    on_device = make_plan(workspace.series, tree, ["device"])
    rest = [test for test in passed if test not in own]
    return runs | run_tests(workspace, tree | on_device.tree, rest)


def show_table(workspace: Workspace, args: argparse.Namespace) -> None:
    """Check or write the table patch x version."""
    plans = table.release_plans(workspace)
    if args.write:
        print(table.write(workspace, plans))
    problems = table.check(workspace, plans)
    if problems:
        raise QueueError("\n".join(problems))
    print(f"{len(plans)} releases: every patch applies or has a reason; the table is up to date")


def new(workspace: Workspace, args: argparse.Namespace) -> None:
    """Start a patch."""
    patch = new_patch(workspace, args.name, args.message, args.test)
    print(
        f"patches/{patch.name}: edit megatron/, then `python tools/patches.py refresh {patch.name}`"
    )


def refresh(workspace: Workspace, args: argparse.Namespace) -> None:
    """Add edits of megatron/ to a patch; without a patch, rewrite the line numbers of all."""
    if args.patch:
        written = refresh_patch(workspace, args.patch, args.files)
    else:
        written = refresh_series(workspace)
    print("\n".join(f"wrote patches/{name}" for name in written) or "nothing to write")


def diff(workspace: Workspace, args: argparse.Namespace) -> None:
    """Show the edits that are in no patch."""
    expected, edits = workspace.expected(), workspace.edits()
    old = {path: expected[path] for path in edits if path in expected}
    print(diff_trees(old, workspace.read(edits)), end="")


def mailbox(workspace: Workspace, args: argparse.Namespace) -> None:
    """Write a `git am` series: all patches, or the commits and tests of one pull request."""
    if args.pull_request:
        request = find(workspace.series, args.pull_request)
        written = export_pull_request(ROOT, request, workspace.pristine(), args.out)
    else:
        plan = make_plan(workspace.series, _read(args.what), _groups(args))
        written = export(ROOT, plan, args.out, args.without_training)
    for path in written:
        print(path)


def pull_requests(workspace: Workspace, args: argparse.Namespace) -> None:
    """List the pull requests to Megatron-LM, or write docs/upstreaming.md."""
    if args.write:
        (ROOT / UPSTREAMING).write_text(page(workspace.series), encoding="utf-8")
        print(ROOT / UPSTREAMING)
        return
    for request in read_pull_requests(workspace.series):
        print(f"{request.name:<24}  {len(request.patches)}  {request.title}")


def check(workspace: Workspace, args: argparse.Namespace) -> None:
    """Headers are complete, the series applies exactly, each group alone too, export is stable."""
    problems = workspace.series.problems()
    pristine = workspace.pristine()
    tree = pristine
    for patch in workspace.series.patches:
        after = apply_series(tree, [patch])
        if diff_trees(tree, after, patch.context) != patch.diff:
            problems.append(f"{patch.name}: a fresh export differs; run `patches.py refresh`")
        tree = after
    for group in GROUPS:
        try:
            apply_series(pristine, workspace.series.in_groups([group]), exact=False)
        except QueueError as error:
            problems.append(f"group {group} does not apply alone: {error}")
    if problems:
        raise QueueError("\n".join(problems))
    count = len(workspace.series.patches)
    print(f"{count} patches: headers complete, apply exactly, each group applies alone")


def prove_tests(workspace: Workspace, args: argparse.Namespace) -> None:
    """Run each patch's test with that patch left out: it must fail."""
    series = workspace.series
    chosen = [series[name] for name in args.patch] or [p for p in series.patches if p.diff]
    width = max(len(patch.name) for patch in chosen)
    verdicts = []
    for patch in chosen:
        verdict, detail = prove(workspace, patch)
        verdicts.append(verdict)
        print(f"{patch.name:<{width}}  {verdict}: {detail[:160]}", flush=True)
    if PASSES in verdicts:
        raise QueueError(f"{verdicts.count(PASSES)} tests pass without their patch.")
    print(f"{verdicts.count(FAILS)} of {len(chosen)} tests fail without their patch")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)

    def command(name, function):
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        return sub

    command("status", status)
    command("check", check)
    command("diff", diff)
    sub = command("apply", apply)
    sub.add_argument("--to", type=Path, metavar="PATH", help="a tree that holds megatron/core")
    sub.add_argument("--group", help=f"comma separated, of {','.join(GROUPS)} (default: all)")
    sub = commands.add_parser("try", help=try_out.__doc__, description=try_out.__doc__)
    sub.set_defaults(function=try_out)
    sub.add_argument(
        "what", nargs="*", help=f"a directory, a wheel, or one of {', '.join(RELEASES)}"
    )
    sub.add_argument("--group", help=f"comma separated, of {','.join(GROUPS)} (default: all)")
    sub.add_argument("--no-tests", action="store_true", help="only the table")
    sub.add_argument(
        "--patch",
        action="append",
        default=[],
        metavar="NAME",
        help="run only this patch's test; repeatable; results of the others are kept",
    )
    sub.add_argument(
        "--prove",
        action="store_true",
        help="run the tests before patching too; for a release, write patches/evidence.json",
    )
    sub = command("table", show_table)
    sub.add_argument("--write", action="store_true", help="write patches/README.md")
    sub = command("new", new)
    sub.add_argument("name", help="GROUP/NAME.patch")
    sub.add_argument("-m", "--message", required=True, help="subject in the imperative")
    sub.add_argument("--test", default="TODO", help="the test that fails without the patch")
    sub = command("refresh", refresh)
    sub.add_argument("patch", nargs="?")
    sub.add_argument("files", nargs="*", help="add the edits of these files only")
    sub = command("prove", prove_tests)
    sub.add_argument("patch", nargs="*")
    sub = command("export", mailbox)
    sub.add_argument("what", nargs="?", default=VERSION, help="as of try; default: %(default)s")
    sub.add_argument(
        "--without-training", action="store_true", help="for a repository of megatron/core alone"
    )
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument(
        "--pull-request", metavar="NAME", help="one of patches/pull_requests.toml, with its tests"
    )
    sub.add_argument("--group", help=f"comma separated, of {','.join(GROUPS)} (default: all)")
    sub = command("pull-requests", pull_requests)
    sub.add_argument("--write", action="store_true", help=f"write {UPSTREAMING}")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; 2 for a problem that the user can solve."""
    args = parser().parse_args(argv)
    try:
        args.function(Workspace(ROOT), args)
    except QueueError as error:
        print(f"patches.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None:
            raise
        print(f"patches.py: {error.filename or 'a file'}: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
