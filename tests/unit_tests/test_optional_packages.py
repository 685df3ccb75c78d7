# Copyright (c) 2026, the megatron-core gptoss authors.

"""Megatron can be imported with optional packages that are broken or of another version."""

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron.core import optional_packages

ROOT = Path(__file__).resolve().parents[2]
ASYNC = "nvidia_resiliency_ext/checkpointing/async_ckpt"
# What Megatron asks for; 0.5.0 has the same modules, 0.4.1 no __init__.py at all.
NVRX = {
    f"{ASYNC}/core.py": "class AsyncCallsQueue: pass\nclass AsyncRequest: pass\n",
    f"{ASYNC}/cached_metadata_filesystem_reader.py": (
        "class CachedMetadataFileSystemReader: pass\n"
    ),
    f"{ASYNC}/filesystem_async.py": (
        "_results_queue = None\nclass FileSystemWriterAsync: pass\n"
        "def get_write_results_queue(mp_mode='spawn'): pass\n"
    ),
    f"{ASYNC}/state_dict_saver.py": (
        "class CheckpointMetadataCache: pass\n"
        "def save_state_dict_async_finalize(*args): pass\n"
        "def save_state_dict_async_plan(*args): pass\n"
    ),
}
INIT = "nvidia_resiliency_ext/__init__.py"


def nvrx(version=None, **files):
    return {**NVRX, INIT: f"__version__ = {version!r}\n" if version else "", **files}


LIBRARY = "raise OSError('libcudart.so.13: cannot open shared object file')\n"
CASES = {
    "nvrx-0.5.0": nvrx("0.5.0"),
    "nvrx-without-init": NVRX,
    "nvrx-broken-submodule": {**nvrx("0.6.0"), f"{ASYNC}/core.py": LIBRARY},
    "nvrx-other-names": {
        **nvrx("0.6.0"),
        "nvidia_resiliency_ext/shared_utils/inject_fault.py": "class Fault: pass\n",
    },
    # Of each package another error; all at once, for an import of Megatron takes seconds.
    "broken": {
        "transformer_engine/__init__.py": LIBRARY,
        "apex/optimizers.py": "import torch\ntorch.no_such_name\n",
        "flash_attn/__init__.py": "",
        "flash_attn/layers/rotary.py": LIBRARY,
        "triton/__init__.py": "raise RuntimeError('0 active drivers')\n",
    },
}

# torch takes seconds to import: it is imported once, and each case in a copy of that process.
SCRIPT = r"""
import importlib, json, os, sys, traceback, warnings
import torch, torch.distributed.checkpoint
modules = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    print(folder, end=' ', flush=True)
    child = os.fork()
    if not child:
        sys.path.insert(0, folder)
        loaded = {name.partition('.')[0] for name in sys.modules} & set(os.listdir(folder))
        for name in [name for name in sys.modules if name.partition('.')[0] in loaded]:
            del sys.modules[name]
        said = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            try:
                for module in modules:
                    importlib.import_module(module)
                nvrx = importlib.import_module('megatron.core.dist_checkpointing.strategies.nvrx')
                said['nvrx'] = nvrx.has_nvrx_async_support()
            except ModuleNotFoundError as error:
                if error.name != 'megatron.core.dist_checkpointing.strategies.nvrx':
                    said['error'] = traceback.format_exc()
            except BaseException:
                said['error'] = traceback.format_exc()
        said['warned'] = [str(w.message) for w in caught if 'cannot be imported' in str(w.message)]
        print(json.dumps(said), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """{case: output of the import of Megatron}."""
    modules = ["megatron.core", "megatron.core.dist_checkpointing.strategies.torch"]
    modules += ["megatron.core.optimizer", "megatron.core.models.gpt"]
    builders = ROOT / "megatron/training/argument_utils.py"  # our loop needs those of 0.19
    if builders.is_file() and "def gpt_config_from_args" in builders.read_text():
        modules += ["megatron.gpt_oss.training.pretrain"]
    folders = {
        str(write(tmp_path_factory.mktemp("packages"), files)): name
        for name, files in CASES.items()
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(modules), *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    said = [line.split(" ", 1) for line in result.stdout.splitlines() if line.startswith("/")]
    return {folders[folder]: json.loads(text) for folder, text in said}


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("nvrx")])
def test_nvidia_resiliency_ext(case, imported):
    """Before 0.6, or without __version__, it ended the import of megatron.core."""
    said = imported[case]
    assert "error" not in said, said["error"]
    usable = case == "nvrx-other-names"
    assert said.get("nvrx", usable) is usable


def test_run_with_old_nvidia_resiliency_ext(tmp_path):
    """A run starts, and its asynchronous checkpoint is written by our own thread."""
    from tests.harness import runs
    from tests.harness.ranks import free_port

    packages = write(tmp_path / "packages", CASES["nvrx-0.5.0"])
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    flags = "--train-iters 2 --save-interval 2 --async-save"
    words = runs.command(runs.write_inputs(inputs), tmp_path / "run", flags)
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    result = subprocess.run(
        [sys.executable, "pretrain_gpt_oss.py", *words],
        cwd=ROOT,
        env={
            **os.environ,
            **ranks,
            "MASTER_PORT": str(free_port()),
            "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/checkpoints/iter_0000002").is_dir(), result.stdout


def test_broken_packages(imported):
    """Whatever but ImportError a package raised ended the import of megatron.core."""
    said = imported["broken"]
    assert "error" not in said, said["error"]
    text = "is installed but cannot be imported, so Megatron does not use it ("
    assert all(text in warning for warning in said["warned"])
    packages = {warning.split()[0].partition(".")[0] for warning in said["warned"]}
    assert packages == {"transformer_engine", "apex", "flash_attn", "triton"}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A directory on the path, whose packages are optional ones."""
    own = [f for f in sys.meta_path if not isinstance(f, optional_packages._OptionalPackages)]
    monkeypatch.setattr(sys, "meta_path", own)  # a finder that has seen nothing fail
    for _ in range(2):
        optional_packages.treat_broken_packages_as_missing()
    assert (
        len([f for f in sys.meta_path if isinstance(f, optional_packages._OptionalPackages)]) == 1
    )
    monkeypatch.setattr(optional_packages, "OPTIONAL", frozenset({"invented"}))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("invented", "required")]:
        del sys.modules[name]


def test_said_once(packages):
    """One attempt and one warning, which names the package and the exception."""
    text = "import sys\nsys.tries = getattr(sys, 'tries', 0) + 1\nraise KeyError('HOME')\n"
    write(packages, {"invented/__init__.py": text})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with pytest.raises(ImportError, match=r"KeyError: 'HOME'") as raised:
                importlib.import_module("invented")
            assert raised.value.name == "invented"
    assert len(caught) == 1 and sys.tries == 1
    del sys.tries


def test_own_handling(packages):
    """A package still handles what its own modules raise."""
    init = "try:\n    import invented.part\nexcept OSError as error:\n    handled = str(error)\n"
    write(packages, {"invented/__init__.py": init, "invented/part.py": "raise OSError('no part')"})
    assert importlib.import_module("invented").handled == "no part"


def test_others_keep_their_errors(packages):
    """A requirement that is broken says so itself; an import error stays what it was."""
    write(packages, {"required.py": "raise OSError('no library')", "invented.py": "import nowhere"})
    with pytest.raises(OSError, match="no library"):
        importlib.import_module("required")
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        importlib.import_module("invented")


def test_list_is_complete():
    """Each package that upstream's files try is in the list, or named here as required."""
    import ast

    required = {"torch", "numpy", "packaging", "einops", "yaml", "transformers", "tokenizers"}
    required |= {"pyarrow", "safetensors", "tqdm", "megatron", "typing_extensions", "setuptools"}
    required |= {"jinja2"}  # of torch
    tried = set()
    for path in (ROOT / "megatron").rglob("*.py"):
        text = path.read_text()
        if not re.search(r"^\s+(from|import) |try: *(from|import) ", text, re.MULTILINE):
            continue  # imports at the top alone; parsing takes seconds
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Try):
                for inner in [n for statement in node.body for n in ast.walk(statement)]:
                    if isinstance(inner, ast.ImportFrom) and not inner.level:
                        tried.add(inner.module.partition(".")[0])
                    elif isinstance(inner, ast.Import):
                        tried |= {alias.name.partition(".")[0] for alias in inner.names}
    missing = tried - optional_packages.OPTIONAL - required - sys.stdlib_module_names
    assert not missing
