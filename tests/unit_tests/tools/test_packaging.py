# Copyright (c) 2026, the megatron-core gptoss authors.
"""pip and build of the distribution: a copy of the checkout, a new environment, no torch."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LOOK = """
import importlib.metadata, importlib.util, pathlib, sys
found = [d for d in importlib.metadata.distributions() if d.metadata["Name"] == "megatron-core"]
print(len(found), found[0].version)
spec = importlib.util.find_spec("megatron")
core = pathlib.Path(list(spec.submodule_search_locations)[0]) / "core"
print(core.parent)
print("typing_extensions" in (core.parent / "training/models/gpt.py").read_text())
print(len(list((core / "datasets").glob("helpers_cpp*.so"))))
"""


def run(*command, cwd):
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def look(python, cwd):
    return run(python, "-c", LOOK, cwd=cwd).splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a clone has, plus the upstream wheel that this checkout downloaded already."""
    copy = tmp_path_factory.mktemp("checkout")
    names = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    if (ROOT / ".upstream").is_dir():
        shutil.copytree(ROOT / ".upstream", copy / ".upstream")
    return copy


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A fresh environment that holds a stand-in for an installed upstream wheel."""
    folder = tmp_path_factory.mktemp("env")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder / "venv"), cwd=folder)
    python = str(folder / "venv" / "bin" / "python")
    wheel = folder / "megatron_core-0.19.2-py3-none-any.whl"
    info = "megatron_core-0.19.2.dist-info"
    files = {
        "megatron/core/old.py": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.19.2\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    install(python, str(wheel), cwd=folder)
    return python


def install(python, *words, cwd):
    """By the pip of the tests, and without compiling every file, which takes longer than the rest."""
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "-q", "--no-deps", "--no-compile", *words, cwd=cwd)


@pytest.fixture(scope="module")
def dist(checkout, python, tmp_path_factory):
    """The directory of a wheel and an sdist; the wheel is installed."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "-o", str(folder), str(checkout), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    install(python, str(wheel), cwd=folder)
    return folder


def test_wheel(dist, python, tmp_path):
    """A built wheel replaces upstream's distribution."""
    assert next(dist.glob("*.whl")).name.startswith("megatron_core-0.19.2+gptoss.")
    count, place, patched, helpers = look(python, tmp_path)
    assert count.startswith("1 0.19.2+gptoss.") and patched == "True" and helpers == "1"
    assert "site-packages" in place and not (Path(place) / "core" / "old.py").exists()


def test_sdist(dist, tmp_path):
    """The sdist is complete: no download is needed."""
    (sdist,) = dist.glob("*.tar.gz")
    run(sys.executable, "-m", "tarfile", "-e", str(sdist), str(tmp_path / "source"), cwd=tmp_path)
    (source,) = (tmp_path / "source").iterdir()
    assert (source / "megatron" / ".manifest.json").is_file()
    assert not (source / ".upstream").exists()


@pytest.mark.slow  # `make test` installs the checkout this way itself
def test_editable_after_wheel(dist, checkout, python, tmp_path):
    """An editable install replaces the wheel."""
    install(python, "-e", ".", cwd=checkout)
    count, place, patched, helpers = look(python, tmp_path)
    assert count.startswith("1 0.19.2+gptoss.") and patched == "True" and helpers == "1"
    assert place == str(checkout / "megatron")
