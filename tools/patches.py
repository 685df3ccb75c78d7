#!/usr/bin/env python3
# Copyright (c) 2026, the megatron-core gptoss authors.
"""The patch queue: megatron/ is upstream's pinned wheel plus patches/, in the order of patches/series.

status                       is the materialised tree clean, what was edited, who owns a file
apply                        bring megatron/ up to date with patches/ (keeps edits)
apply --to PATH [--group G]  patch a Megatron-LM checkout or an unpacked container tree
new GROUP/NAME -m SUBJECT    start a patch
refresh PATCH [FILE ...]     fold edits of megatron/ into a patch
refresh                      rewrite line numbers and index lines after a merge
export --out DIR             a `git am` series, our new modules included
check                        what CI asks of the series
"""

import argparse
import sys
from pathlib import Path

from patch_queue.errors import QueueError
from patch_queue.export import export
from patch_queue.fold import new_patch, refresh
from patch_queue.materialise import Workspace
from patch_queue.prove import FAILS, PASSES, prove
from patch_queue.series import GROUPS
from patch_queue.target import apply_to
from patch_queue.tree import apply_series, diff_trees

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
        print("edited, in no patch yet (fold in with `refresh PATCH`):")
        for path in edits:
            gone = "" if (workspace.root / path).exists() else "  (deleted)"
            print(f"  {path}{gone}  owners: {', '.join(workspace.series.owners(path)) or 'none'}")
    paths = sorted({path for patch in workspace.series.patches for path in patch.paths})
    width = max(map(len, paths), default=0)
    print("patched files and their patches:")
    for path in paths:
        print(f"  {path:<{width}}  {' '.join(workspace.series.owners(path))}")


def apply(workspace: Workspace, args: argparse.Namespace) -> None:
    """Materialise, or patch somebody else's tree."""
    if args.to is None:
        if args.group:
            raise QueueError("--group goes with --to; megatron/ here always holds every group.")
        changed = workspace.materialise()
        print("megatron/ brought up to date" if changed else "megatron/ is up to date")
        return
    groups = args.group.split(",") if args.group else list(GROUPS)
    applied, present = apply_to(ROOT, workspace.series, args.to, groups)
    for name in present:
        print(f"already there  {name}")
    for name in applied:
        print(f"applied        {name}")


def new(workspace: Workspace, args: argparse.Namespace) -> None:
    """Start a patch."""
    patch = new_patch(workspace, args.name, args.message, args.test)
    print(
        f"patches/{patch.name}: edit megatron/, then `python tools/patches.py refresh {patch.name}`"
    )


def fold(workspace: Workspace, args: argparse.Namespace) -> None:
    """Fold edits into a patch, or write the series afresh."""
    written = refresh(workspace, args.patch, args.files)
    print("\n".join(f"wrote patches/{name}" for name in written) or "nothing to write")


def diff(workspace: Workspace, args: argparse.Namespace) -> None:
    """Show the edits that are in no patch."""
    expected, edits = workspace.expected(), workspace.edits()
    old = {path: expected[path] for path in edits if path in expected}
    print(diff_trees(old, workspace.read(edits)), end="")


def mailbox(workspace: Workspace, args: argparse.Namespace) -> None:
    """Write a `git am` series."""
    groups = args.group.split(",") if args.group else list(GROUPS)
    for path in export(ROOT, workspace.series, args.out, groups):
        print(path)


def check(workspace: Workspace, args: argparse.Namespace) -> None:
    """Headers complete, whole series applies exactly, each group stands alone, export is stable."""
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
            problems.append(f"group {group} does not stand alone: {error}")
    if problems:
        raise QueueError("\n".join(problems))
    count = len(workspace.series.patches)
    print(f"{count} patches: headers complete, apply exactly, each group stands alone")


def prove_tests(workspace: Workspace, args: argparse.Namespace) -> None:
    """Run each patch's test with that patch left out: it must fail."""
    series = workspace.series
    chosen = [series[name] for name in args.patch] or series.patches
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
    sub = command("new", new)
    sub.add_argument("name", help="GROUP/NAME.patch")
    sub.add_argument("-m", "--message", required=True, help="subject in the imperative")
    sub.add_argument("--test", default="TODO", help="the test that fails without the patch")
    sub = command("refresh", fold)
    sub.add_argument("patch", nargs="?")
    sub.add_argument("files", nargs="*", help="fold only these files' edits")
    sub = command("prove", prove_tests)
    sub.add_argument("patch", nargs="*")
    sub = command("export", mailbox)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--group", help=f"comma separated, of {','.join(GROUPS)} (default: all)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; 2 for a problem that the user can solve."""
    args = parser().parse_args(argv)
    try:
        args.function(Workspace(ROOT), args)
    except QueueError as error:
        print(f"patches.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
