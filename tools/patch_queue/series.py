# Copyright (c) 2026, the megatron-core gptoss authors.
"""patches/: the series file and each patch's header and diff."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import QueueError

GROUPS = ("fixes", "features", "perf", "device", "hooks", "sink", "experts")
# Names of 0.19.2+gptoss before this version, accepted for one version: `--group cpu`, and patches
# by their former name or with their former group.
FORMER_GROUPS = {"cpu": ("device", "hooks")}
FORMER_NAMES = {
    "async_checkpoint_in_a_thread": "async_checkpoint_thread",
    "dataset_cache_of_other_data": "dataset_cache_key",
    "gradient_norm_waits_once": "gradient_norm_single_sync",
    "hybrid_optimizer_casts_on_host": "hybrid_optimizer_pinned_copies",
    "hybrid_optimizer_released": "hybrid_optimizer_memory_leak",
    "hybrid_optimizer_state_on_its_side": "hybrid_optimizer_state_device",
    "load_whole_checkpoint": "load_complete_checkpoint",
    "nvrx_of_another_version": "nvrx_old_version",
    "resume_this_schedule": "resume_schedule",
}
REQUIRED_FIELDS = ("Description", "Origin", "Forwarded", "Last-Update", "Test")
_DIFF = re.compile(r"^diff --git a/(\S+) b/(\S+)$", re.M)
_INDEX = re.compile(r"^index ([0-9a-f]{40})\.\.([0-9a-f]{40})", re.M)


@dataclass(frozen=True)
class Patch:
    """One patch file: a DEP-3 header, a ``---`` line, and a git diff with full index lines."""

    name: str  # "fixes/rope_thd_mscale.patch"
    header: str
    diff: str
    paths: tuple[str, ...] = field(default=())
    results: dict[str, str] = field(default_factory=dict, compare=False)  # path -> blob id after
    variant: str = ""  # "0.17": the form of this patch for trees of 0.17 and older

    @classmethod
    def parse(cls, name: str, text: str) -> "Patch":
        """Split a patch file. Raises QueueError where it is not one."""
        header, separator, diff = text.partition("\n---\n")
        if not separator:
            raise QueueError(f"patches/{name} has no '---' line between its header and its diff.")
        paths, results = [], {}
        starts = [match.start() for match in _DIFF.finditer(diff)] + [len(diff)]
        for begin, end in zip(starts, starts[1:]):
            chunk = diff[begin:end]
            path = _DIFF.match(chunk).group(2)
            index = _INDEX.search(chunk)
            if index is None:
                raise QueueError(
                    f"patches/{name}: no full index line for {path}. "
                    "Run `python tools/patches.py refresh` to write it."
                )
            paths.append(path)
            results[path] = index.group(2)
        return cls(name, header.strip("\n"), diff, tuple(paths), results)

    def restricted(self, keep: Callable[[str], bool]) -> "Patch":
        """The patch with only the files for whose path ``keep`` is true."""
        starts = [match.start() for match in _DIFF.finditer(self.diff)] + [len(self.diff)]
        pairs = zip(self.paths, zip(starts, starts[1:]))
        chunks = {path: self.diff[begin:end] for path, (begin, end) in pairs if keep(path)}
        results = {path: self.results[path] for path in chunks}
        return replace(self, diff="".join(chunks.values()), paths=tuple(chunks), results=results)

    def only(self, path: str) -> "Patch":
        """The patch with one file."""
        return self.restricted(lambda name: name == path)

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    @property
    def base(self) -> str:
        """The name without group and suffix."""
        return self.name.split("/")[1].removesuffix(".patch")

    @property
    def text(self) -> str:
        return f"{self.header}\n---\n{self.diff}"

    @property
    def fields(self) -> dict[str, str]:
        """The header's fields; continuation lines are joined with newlines."""
        found: dict[str, str] = {}
        key = ""
        for line in self.header.splitlines():
            if line.startswith(" ") and key:
                found[key] += "\n" + line[1:]
            elif ":" in line:
                key, _, value = line.partition(":")
                found[key] = value.strip()
        return found

    @property
    def subject(self) -> str:
        return self.fields.get("Description", "").splitlines()[0]

    @property
    def context(self) -> int:
        """Lines of context around a hunk. A patch whose neighbour in another group changes a line
        close by takes fewer than three, so that either group applies without the other."""
        return int(self.fields.get("Context", 3))

    @property
    def requires(self) -> list[str]:
        """Our own modules that the hunks import, as paths from the repository's root."""
        return self.fields.get("Requires", "").split()


def _variant_order(path: Path) -> tuple[int, ...]:
    return tuple(map(int, path.parents[1].name.split(".")))


class Series:
    """The patches in order, and their variants for older trees.

    ``upstream`` is the comment on top of the series file: what upstream's newest commit has.

    ``variants/0.17/GROUP/NAME.patch`` holds those files of GROUP/NAME that look different in 0.17
    and older: the same change in other surroundings. Files that it does not name are as in the
    variant of a newer version, and at last as in the patch; ``Without:`` in its header names files
    that these versions do not have.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "series"
        lines = self.path.read_text(encoding="utf-8").splitlines()
        names = [line for line in lines if line and not line.startswith("#")]
        self.upstream = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        self.upstream = self.upstream.removeprefix("Upstream: ")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise QueueError(f"patches/series names files that do not exist: {', '.join(missing)}")
        self.patches = [
            Patch.parse(name, (folder / name).read_text(encoding="utf-8")) for name in names
        ]
        self.variants: dict[str, list[Patch]] = {}  # name -> oldest first
        for path in sorted(folder.glob("variants/*/*/*.patch"), key=_variant_order):
            name = path.relative_to(path.parents[1]).as_posix()
            patch = Patch.parse(name, path.read_text(encoding="utf-8"))
            self.variants.setdefault(name, []).append(replace(patch, variant=path.parents[1].name))

    def __getitem__(self, name: str) -> Patch:
        return self.patches[self.index(name)]

    def index(self, name: str) -> int:
        """Position of a patch: GROUP/NAME or NAME, with or without .patch, or a former name."""
        group, _, base = name.removesuffix(".patch").rpartition("/")
        base = FORMER_NAMES.get(base, base)
        found = [
            position
            for position, patch in enumerate(self.patches)
            if patch.base == base and group in ("", patch.group, "cpu", "fixes")
        ]
        if len(found) != 1:
            known = "\n  ".join(patch.name for patch in self.patches)
            raise QueueError(f"No patch is called '{name}'. The series holds:\n  {known}")
        return found[0]

    def in_groups(self, groups: list[str]) -> list[Patch]:
        """The patches of some groups, in order. Raises QueueError for an unknown group."""
        unknown = [group for group in groups if group not in (*GROUPS, *FORMER_GROUPS)]
        if unknown:
            raise QueueError(f"Unknown group {unknown[0]!r}; the groups are {', '.join(GROUPS)}.")
        current = {new for group in groups for new in FORMER_GROUPS.get(group, (group,))}
        return [patch for patch in self.patches if patch.group in current]

    def owners(self, path: str) -> list[str]:
        """Names of the patches that touch a file."""
        return [patch.name for patch in self.patches if path in patch.paths]

    def write(self, patch: Patch) -> None:
        """Write a patch file atomically."""
        target = self.folder / patch.name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        temporary.write_text(patch.text, encoding="utf-8")
        temporary.replace(target)

    def problems(self) -> list[str]:
        """Files that are not in the series, unknown groups, incomplete headers."""
        listed = {patch.name for patch in self.patches}
        found = [
            f"{path.relative_to(self.folder)} is not in patches/series"
            for path in sorted(self.folder.glob("*/*.patch"))
            if str(path.relative_to(self.folder)) not in listed
        ]
        found += [
            f"variants/{variant.variant}/{name} is a variant of no patch of the series"
            for name, variants in self.variants.items()
            for variant in variants
            if name not in listed
        ]
        return found + [text for patch in self.patches for text in self._problems_of(patch)]

    def _problems_of(self, patch: Patch) -> list[str]:
        """Problems of one patch's group and header."""
        root = self.folder.parent
        found = []
        if patch.group not in GROUPS:
            found.append(f"group is not one of {', '.join(GROUPS)}")
        absent = [name for name in REQUIRED_FIELDS if not patch.fields.get(name)]
        if absent:
            found.append(f"header lacks {', '.join(absent)}")
        if "TODO" in patch.header:
            found.append("header still contains TODO")
        found += [
            f"requires {module}, which does not exist"
            for module in patch.requires
            if not (root / module).exists()
        ]
        found += [
            f"its test {test} does not exist"
            for test in re.findall(r"tests/\S+?\.py", patch.fields.get("Test", ""))
            if not (root / test).is_file()
        ]
        return [f"{patch.name}: {text}" for text in found]
