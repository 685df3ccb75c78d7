# Copyright (c) 2026, the megatron-core gptoss authors.

"""Invalid files of other programs: one sentence that names file and field, or a skipped line.

`test_readers.py` mutates the same files at random.
"""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.gpt_oss import cli, errors
from megatron.gpt_oss.checkpoint.hf.auxiliary_files import check_tokenizer
from megatron.gpt_oss.data.tokenize.documents import BadDocument, read_records, text_of
from megatron.gpt_oss.training.metrics.jsonl import drop_from, read_metrics
from megatron.gpt_oss.training.metrics.report import write_report
from tests.harness.reader_cases import READERS, good_files, read_damaged

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return good_files(tmp_path_factory.mktemp("good"))


class Command:
    """Pickled, it is a call of os.system."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def _config(**fields):
    return lambda good: json.dumps(json.loads(good) | fields).encode()


def _rope(**fields):
    def change(good):
        config = json.loads(good)
        config["rope_scaling"] = config["rope_scaling"] | fields
        return json.dumps(config).encode()

    return change


def _header(change=None, length=None):
    """A safetensors file with another header (a dict that `change` alters, or bytes)."""

    def damage(good):
        size = int.from_bytes(good[:8], "little")
        header = json.loads(good[8 : 8 + size])
        text = change(header) if change else header
        text = text if isinstance(text, bytes) else json.dumps(text or header).encode()
        return (length or len(text)).to_bytes(8, "little") + text + good[8 + size :]

    return damage


def _tensor(**fields):
    return _header(lambda header: header["a"].update(fields))


def _twice(header):
    text = json.dumps(header)
    return (text[:-1] + ', "a": ' + json.dumps(header["a"]) + "}").encode()


def _map(value):
    return lambda good: json.dumps({"weight_map": value}).encode()


def _line(record):
    return lambda good: good + (record if isinstance(record, bytes) else record.encode()) + b"\n"


def _metadata(change):
    def damage(good):
        metadata = pickle.loads(good)
        change(metadata)
        return pickle.dumps(metadata)

    return damage


def _entry(at, form, value):
    return lambda good: good[:at] + struct.pack(form, value) + good[at + struct.calcsize(form) :]


# (reader, content or what makes it from the good one, words of the sentence)
BAD = {
    'metadata-empty': ('metadata', b'', '.metadata: it does not begin'),
    'metadata-half': ('metadata', lambda good: good[: len(good) // 2], '.metadata: it'),
    'metadata-text': ('metadata', b'<html>not found</html>', '.metadata: it'),
    'metadata-outside': (
        'metadata',
        _metadata(lambda m: vars(next(iter(m.storage_data.values()))).update(relative_path='../x')),
        "relative_path = '../x', which is not in the directory",
    ),
    'metadata-negative': (
        'metadata',
        _metadata(lambda m: vars(next(iter(m.storage_data.values()))).update(offset=-4)),
        'offset -4',
    ),
    'metadata-of-a-longer-file': (
        'metadata',
        _metadata(lambda m: vars(next(iter(m.storage_data.values()))).update(length=2**40)),
        'bytes, expected',
    ),
    'common-text': ('common', b'hello', 'common.pt cannot be read'),
    'common-cut': ('common', lambda good: good[:-30], 'common.pt cannot be read'),
    'tracker-word': ('tracker', b'newest', "holds b'newest'; expected the number"),
    'tracker-binary': ('tracker', b'\xff\xfe\x00', 'expected the number of an iteration'),
    'tracker-empty': ('tracker', b'', 'expected the number of an iteration'),
    'tracker-negative': ('tracker', b'-3', 'expected the number of an iteration'),
    'tracker-huge': ('tracker', b'9' * 5000, 'expected the number of an iteration'),
    'tracker-path': ('tracker', b'../../x', 'expected the number of an iteration'),
    'safetensors-empty': ('safetensors', b'', '(0 bytes) is damaged or truncated'),
    'safetensors-huge-header': ('safetensors', _header(length=2**63), 'header should have 9223372'),
    'safetensors-deep': ('safetensors', _header(lambda h: DEEP.encode()), 'nested too deeply'),
    'safetensors-array': ('safetensors', _header(lambda h: b'[1]'), 'it is not a JSON object but [1]'),
    'safetensors-binary': ('safetensors', _header(lambda h: b'\xff\x00'), 'not UTF-8 at byte 0'),
    'safetensors-overlap': (
        'safetensors',
        _header(lambda h: h['b'].update(data_offsets=[h['a']['data_offsets'][0] + 4 + i for i in (0, 4)])),
        "'b' begins at byte",
    ),
    'safetensors-negative': ('safetensors', _tensor(data_offsets=[-8, 16]), "'a' has data_offsets"),
    'safetensors-backwards': ('safetensors', _tensor(data_offsets=[24, 0]), 'the second is smaller'),
    'safetensors-float': ('safetensors', _tensor(data_offsets=[0.0, 24.0]), "'a' has data_offsets"),
    'safetensors-three': ('safetensors', _tensor(data_offsets=[0, 8, 24]), "'a' has data_offsets"),
    'safetensors-shape': ('safetensors', _tensor(shape=[-2, -3]), "'a' has shape = [-2, -3]"),
    'safetensors-shape-float': ('safetensors', _tensor(shape=[2.0, 3]), "'a' has shape"),
    'safetensors-shape-word': ('safetensors', _tensor(shape='2x3'), "'a' has shape = '2x3'"),
    'safetensors-bool': ('safetensors', _tensor(shape=[True, 6]), "'a' has shape"),
    'safetensors-dtype': ('safetensors', _tensor(dtype='Q8'), "'a' has dtype = 'Q8'"),
    'safetensors-dtype-list': ('safetensors', _tensor(dtype=['F32']), "'a' has dtype = ['F32']"),
    'safetensors-entry': ('safetensors', _header(lambda h: h | {'a': 7}), "'a' is 7, not an obj"),
    'safetensors-twice': ('safetensors', _header(_twice), "'a' is duplicated"),
    'safetensors-cut': ('safetensors', lambda good: good[:-5], 'bytes from its header'),
    'weight-map-parent': ('weight_map', _map({'a': '../b.safetensors'}), "in '../b.safetensors'"),
    'weight-map-absolute': ('weight_map', _map({'a': '/etc/passwd'}), "in '/etc/passwd', which"),
    'weight-map-nul': ('weight_map', _map({'a': 'b\0.safetensors'}), 'not the name of a file'),
    'weight-map-number': ('weight_map', _map({'a': 3}), "places 'a' in 3"),
    'weight-map-list': ('weight_map', _map(['a']), "weight_map = ['a'], not an object"),
    'weight-map-other-file': ('weight_map', _map({'a': 'config.json'}), 'not a *.safetensors'),
    'weight-map-missing': ('weight_map', b'{}', 'weight_map = None'),
    'weight-map-deep': ('weight_map', DEEP.encode(), 'nested too deeply'),
    'config-deep': ('config', DEEP.encode(), 'config.json is not valid JSON (nested too deeply)'),
    'config-binary': ('config', b'\x80abc' * 999, 'not valid JSON (not UTF-8 at byte 0)'),
    'config-array': ('config', b'[1, 2]', 'config.json is not a JSON object but [1, 2]'),
    'config-digits': ('config', b'{"a": ' + b'9' * 9999 + b'}', 'config.json is not valid JSON'),
    'config-layers': ('config', _config(num_hidden_layers=10**9), 'num_hidden_layers = 1000000000'),
    'config-layers-float': ('config', _config(num_hidden_layers=4.0), 'num_hidden_layers = 4.0'),
    'config-experts': ('config', _config(num_local_experts=10**12), 'num_local_experts = 10000'),
    'config-window': ('config', _config(sliding_window=0), 'sliding_window = 0'),
    'config-window-huge': ('config', _config(sliding_window=2**31), 'sliding_window = 2147483648'),
    'config-top-k': ('config', _config(num_experts_per_tok=99), 'num_experts_per_tok = 99'),
    'config-theta': ('config', _config(rope_theta=-1.0), 'rope_theta = -1.0'),
    'config-theta-huge': ('config', _config(rope_theta=1e300), 'rope_theta = 1e+300'),
    'config-eps': ('config', _config(rms_norm_eps=5.0), 'rms_norm_eps = 5.0'),
    'config-kinds': ('config', _config(layer_types=[['a'], {}]), 'layer_types = '),
    'config-factor': ('config', _rope(factor=-2.0), 'rope_scaling has factor = -2.0'),
    'config-factor-huge': ('config', _rope(factor=1e30), 'rope_scaling has factor = 1e+30'),
    'config-factor-word': ('config', _rope(factor='8'), "rope_scaling has factor = '8'"),
    'config-beta': ('config', _rope(beta_fast=1e300), 'rope_scaling has beta_fast = 1e+300'),
    'config-type': ('config', _config(model_type=['x'] * 10**5), "describes a model of type '['x'"),
    'tokenizer-text': ('tokenizer', b'hello', 'tokenizer.json is not a tokenizer'),
    'tokenizer-binary': ('tokenizer', b'\xff' * 9999, 'tokenizer.json is not a tokenizer'),
    'tokenizer-deep': ('tokenizer', DEEP.encode(), 'tokenizer.json is not a tokenizer'),
    'tokenizer-config-deep': ('tokenizer_config', DEEP.encode(), 'nested too deeply'),
    'tokenizer-config-array': ('tokenizer_config', b'[]', 'is not a JSON object but []'),
    'index-magic': ('index', b'x' * 99, "data.idx begins with b'xxxxxxxxx'"),
    'index-count': ('index', _entry(18, '<Q', 2**63), 'sequences it must have'),
    'index-type': ('index', _entry(17, '<B', 77), 'type 77'),
    'index-negative': ('index', _entry(34, '<i', -5), 'data.idx'),
    'index-huge': ('index', _entry(34, '<i', 2**31 - 1), 'data.idx'),
    'metrics-binary': ('metrics', _line(b'\xff\xfe' * 999), 'line 5: not JSON (not UTF-8 at'),
    'metrics-deep': ('metrics', _line(DEEP), 'metrics.jsonl, line 5: not JSON (nested too deeply)'),
    'metrics-array': ('metrics', _line('[1]'), 'line 5: not a record but [1]'),
    'metrics-step': ('metrics', _line('{"step": "<b>", "loss": 1}'), "line 5: step is '<b>'"),
    'metrics-no-step': ('metrics', _line('{"loss": 1}'), 'line 5: it has loss but no step'),
    'metrics-loss': ('metrics', _line('{"step": 3, "loss": "4"}'), "line 5: loss is '4', not a num"),
    'metrics-list': ('metrics', _line('{"step": 3, "experts": [1]}'), 'line 5: experts is [1]'),
    'metrics-norms': ('metrics', _line('{"step": 3, "norms": {"a": 1}}'), 'line 5: norms is'),
    'metrics-sample': ('metrics', _line('{"step": 3, "sample": {}}'), 'line 5: sample is {}'),
    'blend-binary': ('blend', b'\xff\xfe\xfd', 'blend.yaml is not YAML'),
    'blend-date': ('blend', b'corpora: 2001-99-99', 'blend.yaml is not YAML'),
    # PyYAML takes a time that grows with the square of the depth.
    'blend-deep': ('blend', b'[' * 600, 'blend.yaml is not YAML: nested too deeply'),
    'blend-nul': ('blend', b'corpora: {a: {path: "b\\0c"}}', "path is 'b\\x00c'"),
    'blend-list': ('blend', b'corpora: {a: {path: data, validation: [1]}}', 'validation is [1]'),
    'blend-key': ('blend', b'corpora: {? [1, 2] : {path: data}}', 'blend.yaml'),
    'blend-aliases': (
        'blend',
        b'corpora: {a: {path: data, upsample: &a [1, 1]}, b: {path: data, weight: [*a, *a]}}',
        'blend.yaml, corpus a: upsample is [1, 1]',
    ),
    'recipe-binary': ('recipe', b'\xff\xfe', 'not a text file'),
    'journal-text': ('journal', b'hello', 'journal.json is not valid JSON'),
    'journal-state': ('journal', b'{"task": {}, "state": []}', 'has state = []'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_sentence(folder, name):
    reader, content, words = BAD[name]
    reader = READERS[reader]
    good = (folder / reader.path).read_bytes()
    found = read_damaged(reader, folder, content(good) if callable(content) else content)
    assert found is not None and words in found, found


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_no_pipe_is_waited_for(tmp_path, make):
    make(tmp_path / "tokenizer.json")
    with pytest.raises(errors.CheckpointError, match="tokenizer.json is not a file"):
        check_tokenizer(tmp_path)
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(errors.UsageError, match="metrics.jsonl is not a file"):
        read_metrics(tmp_path / "metrics.jsonl")


def _copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy", symlinks=True))


@pytest.mark.parametrize("place", [".metadata", "common.pt", "shard"])
@pytest.mark.parametrize("command", ["verify", "to-hf"])
def test_no_code_of_a_checkpoint_runs(folder, tmp_path, command, place, capsys):
    """A pickled os.system is rejected with one sentence."""
    import torch

    ran, copy = tmp_path / "ran", _copy(folder, tmp_path)
    release = copy / "ckpt" / "release"
    (release / "manifest.json").unlink()  # whoever altered the files would write a fitting one
    if place == ".metadata":
        metadata = pickle.loads((release / place).read_bytes())
        metadata.planner_data = Command(ran)
        (release / place).write_bytes(pickle.dumps(metadata))
    elif place == "common.pt":
        torch.save({"args": Command(ran)}, release / place)
    else:
        torch.save({"args": Command(ran)}, release / "evil")
        evil = (release / "evil").read_bytes()
        metadata = pickle.loads((release / ".metadata").read_bytes())
        index = next(i for i in metadata.storage_data if i.fqn.startswith("common_state"))
        place = metadata.storage_data[index]
        place.relative_path, place.offset, place.length = "evil", 0, len(evil)
        (release / ".metadata").write_bytes(pickle.dumps(metadata))
    argv = ["verify", "--hf", str(copy / "hf"), "--load", str(release), "--logits", "no"]
    if command == "to-hf":
        argv = ["convert", "to-hf", "--load", str(release), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and not ran.exists()
    assert printed.count("\n") == 1 and "posix.system" in printed, printed


def _documents(path):
    good, bad = [], []
    for record in read_records(path, "text"):
        try:
            good.append(text_of(record, "text"))
        except BadDocument as error:
            bad.append(str(error))
    return good, bad


def test_bad_lines_are_left_out(tmp_path):
    """A bad line is no bad file, and its message does not hold the line."""
    lines = [
        b'{"text": "a"}',
        DEEP.encode(),
        b'{"text": "' + b"\xff" * 999 + b'"}',
        b'{"text": "b"}',
    ]
    (tmp_path / "A.JSONL").write_bytes(b"\n".join(lines))
    good, bad = _documents(tmp_path / "A.JSONL")
    assert good == ["a", "b"] and "nested too deeply" in bad[0] and "not UTF-8 at byte" in bad[1]
    assert all(len(message) < 200 for message in bad)
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, ' + DEEP.encode())
    good, bad = _documents(tmp_path / "a.json")
    assert good == ["a"] and len(bad) == 1
    (tmp_path / "b.JSON").write_bytes(DEEP.encode())
    assert _documents(tmp_path / "b.JSON")[0] == []


def test_parquet_that_is_not_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    values = pyarrow.array([b"a", b"\xff\xfe", b"b"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "X.Parquet")
    assert _documents(tmp_path / "X.Parquet") == (["a", "b"], ["not UTF-8"])


def test_names_that_are_not_utf8(tmp_path, capsys):
    folder = os.fsencode(tmp_path) + b"/in"
    os.mkdir(folder)
    for name in (b"\xff.jsonl", b"good.JSONL", b"\xfe.txt"):
        with open(folder + b"/" + name, "wb") as stream:
            stream.write(b'{"text": "abc"}\n{"text": 3}\n' if name != b"\xfe.txt" else b"\xff")
    out = tmp_path / "out" / "x"
    cli.main(["tokenize", str(tmp_path / "in"), "--output", str(out), "--bad-lines", "skip"])
    printed = capsys.readouterr()
    assert "2 documents" in printed.out and "\\xff.jsonl, line 2: 'text' is not a" in printed.err
    assert "xfe.txt: not UTF-8" in (tmp_path / "out" / "x.skipped.txt").read_text()


def test_nothing_of_a_run_is_markup(tmp_path):
    """Whatever text stands in metrics and arguments; a cut run.json costs its table alone."""
    run = tmp_path / "<b>run"
    run.mkdir()
    evil = '<script>alert(1)</script>\ud800\x00"&'
    load = {"max_expert_share": [0.3], "load_cv": [None], evil: [1]}
    records = [
        {"step": 1, "loss": 1e308, "tokens": None, evil: evil},
        {"step": 2, "loss": -1e308, "grad_norm": 5e-324, "experts": load},
        {"step": 3, "loss": None, "experts": {"max_expert_share": []}, "grad_norm": 0.0},
        {"step": 3, "set": evil, "valid_loss": 2.5, "norms": {"grad_norm": {evil: 1.0}}},
        {"step": 3, "sample": {"text": evil}, "norms": {}},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "run.json").write_text(json.dumps({"arguments": {evil: [evil]}}))
    page = write_report(run).read_text()
    assert "<script" not in page and "<b>" not in page and page.count("&lt;script") >= 4
    (run / "run.json").write_text('{"a": ')
    assert "run.json is not valid JSON" in write_report(run).read_text()


def test_a_bad_line_does_not_keep_a_run_from_being_resumed(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n\xff\xfe\n[]\n{"step": 2, "loss": 1}\n{"st')
    drop_from(path, 2)
    assert read_metrics(path) == [{"step": 1, "loss": 2}]
    assert "line 2: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize('name, word', [('NODES', 'a[$(touch {})]'), ('GPUS', 'b[$(touch {})]+1'),
                                        ('NODES', '0'), ('NODES', '08'), ('GPUS', '2 x')])  # fmt: skip
def test_launch_evaluates_nothing(tmp_path, name, word):
    environment = {"PATH": os.environ["PATH"], "GPUS": "8", "DRY": "1"}
    environment[name] = word.format(tmp_path / "ran")
    script = Path(__file__).parents[3] / "examples" / "gpt_oss" / "launch.sh"
    done = subprocess.run(
        [script, "20b-32k-8gpus"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and not (tmp_path / "ran").exists()
    assert done.stderr.startswith(f"error: {name}=") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [errors.UsageError, errors.CheckpointError, errors.RunError])
def test_a_name_that_hides_the_sentence(error):
    """Regression: a damaged data file named a path of 5,000 characters; messages truncate it."""
    long, path = "[" * 5000, "/data/" + "a" * 300
    text = str(error(f"{path}: no file {long}.idx. Make it."))
    assert text.startswith(f"{path}: no file [[[") and text.endswith("[[.idx. Make it.")
    assert len(text) < 700


def test_ctrl_c_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(errors, "SECONDS_FOR_RANK_0", 0)
    # A shell's background job ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            errors.run_main(lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "error: interrupted (SIGINT)\n"


def test_an_interrupt_that_python_drops(capsys, monkeypatch):
    """Python ignores exceptions in a finalizer and in the hooks of os.fork; the command still ends."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def main():
        Finalized()
        time.sleep(30)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            errors.run_main(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "error: interrupted (SIGINT)\n"


@pytest.mark.parametrize(
    "flags", ["--preset-layers 1000000000", "--preset none --num-layers 999999"]
)
def test_a_depth_that_no_model_has(flags):
    from megatron.gpt_oss.arguments.parse import read

    with pytest.raises(errors.UsageError, match="is invalid. Give"):
        read(f"--preset tiny --mock-data {flags}".split())
