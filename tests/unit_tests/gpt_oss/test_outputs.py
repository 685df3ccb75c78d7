# Copyright (c) 2026, the megatron-core gptoss authors.

"""Outputs of commands: files of other programs are never changed, and errors are one sentence."""

import errno
import json
import os
import shutil
import subprocess

import pytest
import torch

from megatron.gpt_oss import cli, outputs
from megatron.gpt_oss.checkpoint import resumable_output
from megatron.gpt_oss.errors import as_os_sentence, run_main

PAGE = '<!doctype html><html lang="en"><head><title>mine</title></head></html>'


def tree(folder):
    """Every path below a directory with its content, or where a link leads."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(parent, name)
            link = os.path.islink(path)
            content = os.readlink(path) if link else os.path.isdir(path) or open(path, "rb").read()
            found[os.path.relpath(path, folder)] = content
    return found


def refused(capsys, *argv):
    """Run a command that must fail; returns its error message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in argv])
    printed = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(printed) == 1, printed
    assert printed[0].startswith("error: ")
    return printed[0]


def gptoss(*argv):
    cli.main([str(word) for word in argv])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus, a run, a Hugging Face directory and a checkpoint of it, as the commands make them."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.json").write_text('[{"text": "hello"}, {"text": "world"}]')
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (folder / "run" / "run.json").write_text('{"arguments": {"preset": "tiny"}}')
    gptoss("tokenize", folder / "text.json", "--output", folder / "data")
    gptoss("init-tiny", folder / "hf")
    gptoss("convert", "to-megatron", "--hf", folder / "hf", "--out", folder / "m")
    gptoss("convert", "to-hf", "--load", folder / "m", "--out", folder / "back")
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of `made`, as the working directory: paths of the tests are relative."""
    copy = shutil.copytree(made, tmp_path / "work", copy_function=shutil.copy2)
    monkeypatch.chdir(copy)
    return copy


def _write(path, content="mine"):
    def prepare(folder):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)

    return prepare


def _link(path, to):
    def prepare(folder):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(to)

    return prepare


def _all(*steps):
    return lambda folder: [step(folder) for step in steps]


def _make(path):
    return lambda folder: (folder / path).mkdir(parents=True)


def _flip(path):
    """Another content of the same size."""

    def prepare(folder):
        content = bytearray((folder / path).read_bytes())
        content[-1] ^= 1
        (folder / path).write_bytes(content)

    return prepare


def _move(path, to):
    return lambda folder: (folder / path).rename(folder / to)


def _forget(path):
    return lambda folder: (folder / path).unlink()


TOKENIZE = "tokenize text.json --output"
TO_HF = "convert to-hf --load m --out"
JOURNAL = '{"task": {}}\n'
FOREIGN = {
    # name: (what is there, command, words of the sentence)
    "corpus-is-summary": (
        lambda f: None,
        "tokenize text.json --output text",
        "is an input and would be",
    ),
    "input-by-link": (_link("x.json", "text.json"), "tokenize x.json --output text", "an input"),
    "input-by-hard-link": (
        lambda f: os.link("text.json", "x.json"),
        "tokenize x.json --output text --overwrite",
        "an input",
    ),
    "summary-in-inputs": (_write("t/a.txt"), "tokenize t data.json --output data", "an input"),
    **{
        f"tokenize{end}{flag}": (_write(f"x{end}"), f"{TOKENIZE} x {flag}", f"x{end} exists, but")
        for end in (".bin", ".idx", ".json", ".png", ".skipped.txt")
        for flag in ("", "--overwrite")
    },
    "tokenize-again": (lambda f: None, f"{TOKENIZE} data", "data.bin exists"),
    "tokenize-changed-bin": (_flip("data.bin"), f"{TOKENIZE} data --overwrite", "data.bin exists"),
    "tokenize-changed-idx": (_flip("data.idx"), f"{TOKENIZE} data --overwrite", "data.idx exists"),
    "tokenize-no-record": (_forget("data.json"), f"{TOKENIZE} data --overwrite", "data.bin"),
    "tokenize-record-of-others": (
        _write("data.json", '{"datasets": {}, "made_by": "else"}'),
        f"{TOKENIZE} data --overwrite",
        "data.bin exists",
    ),
    "tokenize-directory": (_make("x.json"), f"{TOKENIZE} x", "x.json is a directory"),
    "tokenize-into-directory": (_make("d"), f"{TOKENIZE} d/", "names a directory"),
    "tokenize-here": (lambda f: None, f"{TOKENIZE} .", "names a directory"),
    "tokenize-under-file": (lambda f: None, f"{TOKENIZE} text.json/x", "a file, not a directory"),
    "tokenize-partial-link": (
        _all(_write("d/keep"), _link(".x.partial", "d")),
        f"{TOKENIZE} x",
        ".x.partial is a symbolic link",
    ),
    "tokenize-partial-file": (_write(".x.partial"), f"{TOKENIZE} x", ".x.partial is a file"),
    "tokenize-partial-foreign": (_write(".x.partial/a"), f"{TOKENIZE} x", ".x.partial/a is not"),
    "tokenize-partial-more": (
        _all(_write(".x.partial/lock", ""), _write(".x.partial/notes.txt")),
        f"{TOKENIZE} x --overwrite",
        "notes.txt is not a file of an unfinished dataset",
    ),
    "tokenize-partial-link-within": (
        _all(_write(".x.partial/lock", ""), _link(".x.partial/.bin", "../text.json")),
        f"{TOKENIZE} x",
        ".x.partial/.bin is not",
    ),
    "tokenize-lock-link": (
        _all(_make(".x.partial"), _link(".x.partial/lock", "../text.json")),
        f"{TOKENIZE} x",
        ".x.partial/lock is not",
    ),
    "init-foreign": (_write("x/config.json"), "init-tiny x", "x exists and is not empty"),
    "init-more": (
        _write("hf/sub/note"),
        "init-tiny hf",
        "sub/note was not written by gptoss init-tiny",
    ),
    "init-changed": (
        _flip("hf/model.safetensors"),
        "init-tiny hf",
        "model.safetensors was not written by",
    ),
    "init-changed-config": (
        _flip("hf/config.json"),
        "init-tiny hf",
        "config.json was not written by",
    ),
    "init-link": (
        _all(_move("hf/config.json", "c.json"), _link("hf/config.json", "../c.json")),
        "init-tiny hf",
        "config.json was not written by",
    ),
    "init-file": (lambda f: None, "init-tiny text.json", "text.json exists and is a file"),
    "init-over-export": (lambda f: None, "init-tiny back", "gptoss init-tiny did not create it"),
    "init-loop": (_all(_link("a", "b"), _link("b", "a")), "init-tiny a", "form a loop"),
    "to-megatron-not-empty": (
        lambda f: None,
        "convert to-megatron --hf hf --out back",
        "back exists and is not empty",
    ),
    "to-megatron-input": (lambda f: None, "convert to-megatron --hf hf --out hf", "an input"),
    "to-hf-input": (lambda f: None, f"{TO_HF} m --overwrite", "an input"),
    "to-hf-above-input": (
        _all(_make("x"), _move("m", "x/m")),
        "convert to-hf --load x/m --out x --overwrite",
        "did not create it",
    ),
    "to-hf-input-in-export": (
        _move("m", "back/m"),
        "convert to-hf --load back/m --out back --overwrite",
        "back exists and is not empty",
    ),
    "to-hf-like": (lambda f: None, f"{TO_HF} back --like back --overwrite", "an input"),
    "to-hf-without-flag": (lambda f: None, f"{TO_HF} back", "or give --overwrite"),
    "to-hf-foreign": (
        _write("back/notes.txt"),
        f"{TO_HF} back --overwrite",
        "notes.txt was not written by",
    ),
    "to-hf-changed": (
        _flip("back/model.safetensors"),
        f"{TO_HF} back --overwrite",
        "changed since",
    ),
    "to-hf-other-model": (lambda f: None, f"{TO_HF} hf --overwrite", "did not create it"),
    "to-hf-partial-link": (
        _all(_write("d/keep"), _link(".x.partial", "d")),
        f"{TO_HF} x",
        ".x.partial is a symbolic link",
    ),
    "to-hf-partial-foreign": (
        _write(".x.partial/keep"),
        f"{TO_HF} x",
        "keep is not a file of an unfinished conversion",
    ),
    "to-hf-partial-more": (
        _all(_write(".x.partial/conversion.jsonl", JOURNAL), _write(".x.partial/keep")),
        f"{TO_HF} x",
        "keep is not a file of an unfinished conversion",
    ),
    "to-hf-journal-link": (
        _all(_make(".x.partial"), _link(".x.partial/conversion.jsonl", "../text.json")),
        f"{TO_HF} x",
        "conversion.jsonl is not",
    ),
    "to-hf-partial-link-within": (
        _all(
            _write(".x.partial/conversion.jsonl", JOURNAL),
            _link(".x.partial/config.json", "../text.json"),
        ),
        f"{TO_HF} x",
        "config.json is not",
    ),
    "to-hf-inside-link": (
        _all(_make("x"), _write("d/keep"), _link("x/.gptoss.partial", "../d")),
        f"{TO_HF} x",
        ".gptoss.partial is a symbolic link",
    ),
    "plot-input": (lambda f: None, "plot run/metrics.jsonl run/metrics.jsonl", "an input"),
    "plot-foreign": (_write("x.png"), "plot run/metrics.jsonl x.png", "did not create it"),
    "plot-other-command": (lambda f: None, "plot run/metrics.jsonl data.png", "did not create it"),
    "plot-directory": (lambda f: None, "plot run/metrics.jsonl run", "is a directory"),
    "plot-not-png": (lambda f: None, "plot run/metrics.jsonl x.jpg", "ends in .jpg"),
    "plot-link": (
        _link("x.png", "text.json"),
        "plot run/metrics.jsonl x.png",
        "x.png exists, but gptoss plot did not create it",
    ),
    "report-input": (lambda f: None, "report run --out run/run.json", "an input"),
    "report-foreign": (_write("run/report.html", PAGE), "report run", "did not create it"),
    "report-directory": (lambda f: None, "report run --out hf", "is a directory"),
    "report-empty-name": (lambda f: None, ["report", "run", "--out", ""], "is a directory"),
    "doctor-foreign": (lambda f: None, "doctor --no-measure --json text.json", "did not create it"),
    "doctor-directory": (lambda f: None, "doctor --no-measure --json hf", "is a directory"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_others_made_stays(case, work, capsys):
    prepare, command, words = FOREIGN[case]
    prepare(work)
    before = tree(work)
    error = refused(capsys, *(command.split() if isinstance(command, str) else command))
    assert words in error, error
    assert tree(work) == before


COMMANDS = {
    "tokenize": f"{TOKENIZE} new",
    "tokenize-again": f"{TOKENIZE} data --overwrite",
    "init-tiny": "init-tiny new",
    "init-tiny-again": "init-tiny hf",
    "to-hf-again": f"{TO_HF} back --overwrite",
    "plot": "plot run/metrics.jsonl new/x.png",
    "report": "report run",
}
REFUSALS = {
    "ENOSPC": "o space left on the disk",
    "EDQUOT": "disk quota|No space left",
    "EROFS": "file system is read-only",
    "EACCES": "permission denied",
    "EIO": "input/output error",
    "EFBIG": "larger than the file system",
    "ESTALE": "network file system",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_sentence(command, name, work, capsys, monkeypatch):
    """The first bytes that are brought to disk are refused: path and cause, and all is as it was."""
    before = tree(work)

    def refuse(handle):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(os, "fsync", refuse)
    error = refused(capsys, *COMMANDS[command].split())
    assert any(words in error for words in REFUSALS[name].split("|")), error
    where = COMMANDS[command].split()[{"plot": 2}.get(command.split("-")[0], 1)]
    assert any(part in error for part in ("new", "data", "hf", "back", "run", where)), error
    monkeypatch.undo()
    assert tree(work) == before


@pytest.mark.parametrize("command", ["init-tiny new", f"{TO_HF} new"])
@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV])
def test_a_directory_that_cannot_be_renamed(command, code, work, monkeypatch):
    """It is made in place of that, and the files moved there."""

    def rename(source, target):
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    monkeypatch.setattr(os, "rename", rename)
    gptoss(*command.split())
    monkeypatch.undo()
    reference = "hf" if "tiny" in command else "back"
    assert tree("new") == tree(reference)
    assert not os.path.exists(".new.partial")


@pytest.mark.parametrize("stop", range(6))
def test_killed_while_files_get_their_names(stop, work, monkeypatch, capsys):
    """The next start moves the remaining files, and writes none a second time."""
    os.mkdir("out")
    moved, move_file = [], resumable_output.move_file

    def move_or_die(source, target):
        if len(moved) == stop:
            raise KeyboardInterrupt
        moved.append(target)
        move_file(source, target)

    monkeypatch.setattr(resumable_output, "move_file", move_or_die)
    with pytest.raises(SystemExit):  # as Ctrl-C ends a command
        gptoss(*f"{TO_HF} out".split())
    assert os.path.exists("out/.gptoss.partial/.gptoss.json")
    monkeypatch.setattr(resumable_output, "move_file", move_file)
    monkeypatch.setattr("megatron.gpt_oss.checkpoint.export_hf.write_weights", None)
    gptoss(*f"{TO_HF} out".split())
    assert tree("out") == tree("back")


def test_what_is_done_is_kept_from_a_late_guest(work, monkeypatch, capsys):
    """A file that another program writes into the directory during the work is kept."""
    os.mkdir("out")
    write_config = "megatron.gpt_oss.checkpoint.export_hf.write_config"
    from megatron.gpt_oss.checkpoint.hf.writer import write_config as original

    def write_and_visit(*args):
        original(*args)
        _write("out/mine")(work)

    monkeypatch.setattr(write_config, write_and_visit)
    error = refused(capsys, *f"{TO_HF} out".split())
    assert "out exists and is not empty" in error and "the same command resumes" in error
    assert open("out/mine").read() == "mine"
    os.unlink("out/mine")
    monkeypatch.setattr("megatron.gpt_oss.checkpoint.export_hf.write_weights", None)
    gptoss(*f"{TO_HF} out".split())
    assert tree("out") == tree("back")


@pytest.fixture
def mounted(work):
    """mount(options) -> an empty file system in 'mnt'."""

    def mount(options):
        os.makedirs("mnt", exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", options, "none", str(work / "mnt")]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("mount is not permitted")

    if shutil.which("mount") is None:
        pytest.skip("no mount")
    yield mount
    subprocess.run(["umount", str(work / "mnt")], capture_output=True)


@pytest.mark.parametrize("command, again", [("init-tiny", ""), (TO_HF, "--overwrite")])
def test_a_mount_point(command, again, mounted):
    mounted("size=100m")
    os.mkdir("mnt/lost+found")  # as in a file system of ext4
    for flags in ("", again):
        gptoss(*f"{command} mnt {flags}".split())
        os.rmdir("mnt/lost+found")
        assert tree("mnt") == tree("hf" if "tiny" in command else "back")
        os.mkdir("mnt/lost+found")


@pytest.mark.parametrize(
    "command",
    [
        f"{TOKENIZE} mnt/x",
        "init-tiny mnt",
        "init-tiny mnt/x",
        f"{TO_HF} mnt",
        f"{TO_HF} mnt/x",
        "plot run/metrics.jsonl mnt/x.png",
        "report run --out mnt/x.html",
        "doctor --no-measure --json mnt/x.json",
    ],
)
@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_a_disk_that_takes_nothing(command, kind, mounted, capsys):
    mounted("ro" if kind == "read-only" else "size=16k")
    if kind == "full":
        # Under a name that file systems of ext have, which is nobody's file.
        with open("mnt/lost+found", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
    before = tree("mnt")
    error = refused(capsys, *command.split())
    assert "mnt" in error
    words = ("read-only",) if kind == "read-only" else ("no space left", "GB are free")
    assert any(word in error for word in words), error
    assert tree("mnt") == before


def test_links_are_followed(work):
    """A link stays a link, and its target is what the command writes."""
    os.makedirs("disk/empty")
    for name in ("x.png", "x.html", "x.json", "x.bin"):
        os.symlink(f"disk/{name}", name)
    os.symlink("disk/empty", "out")
    for _ in range(2):
        gptoss("plot", "run/metrics.jsonl", "x.png")
        gptoss("report", "run", "--out", "x.html")
        gptoss("init-tiny", "out")
        gptoss(*f"{TOKENIZE} x --overwrite".split()) if not os.path.exists("disk/x.png") else None
    os.unlink("x.png")
    gptoss(*f"{TOKENIZE} x".split())
    assert all(os.path.islink(name) for name in ("x.html", "x.json", "x.bin", "out"))
    assert tree("disk/empty") == tree("hf")
    gptoss("verify-data", "x")


def test_a_stream_is_written_to(work, capfd):
    gptoss("report", "run", "--out", "/dev/stdout")
    assert "gptoss report" in capfd.readouterr().out
    gptoss("plot", "run/metrics.jsonl", "/dev/null")
    assert not os.path.isfile("/dev/null")


def test_mode_of_a_file_stays(work):
    gptoss("report", "run")
    os.chmod("run/report.html", 0o640)
    gptoss("report", "run")
    assert os.stat("run/report.html").st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "x", "/a/b"), "/a/b: no space left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "A file: no space"),
        (Exception("Read-only file system (os error 30)"), "A file: the file system is read-only"),
        (RuntimeError("[Errno 13] Permission denied: 'x'"), "permission denied"),
        (OSError(errno.EBADF, "a defect of ours"), None),
        (KeyError("[Errno 13]"), None),
    ],
)
def test_errors_of_the_operating_system(error, words):
    sentence = as_os_sentence(error)
    assert (sentence is None) if words is None else (words in sentence and "\n" not in sentence)


@pytest.mark.parametrize("defect", [KeyError("defect"), RuntimeError("CUDA error")])
def test_a_defect_during_a_refusal_is_not_hidden(defect):
    try:
        try:
            open("/no/such/file")
        except OSError:
            raise defect
    except type(defect) as error:
        assert as_os_sentence(error) is None


def test_a_refusal_under_torch_save(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(Exception) as error, open("/dev/full", "wb") as file:
        torch.save(torch.zeros(10**6), file)
    assert "no space left" in as_os_sentence(error.value)


def test_nobody_reads_the_output(capsys):
    def main():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 1 and capsys.readouterr().err == ""


def test_a_large_file_that_is_newer_than_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "_MAX_HASHED_SIZE", 3)
    (tmp_path / "a").write_text("1234")
    outputs.write_record(tmp_path, "gptoss test")
    record = outputs.record_of(tmp_path, "gptoss test")
    assert outputs.foreign_file(tmp_path, [record]) is None
    assert outputs.record_of(tmp_path, "gptoss other") == {}
    os.utime(tmp_path / "a", ns=(0, record["written"] + 1))
    assert outputs.foreign_file(tmp_path, [record]) == "a"
    text = json.loads((tmp_path / outputs.RECORD).read_text())
    assert text["files"] == {"a": {"size": 4}}
