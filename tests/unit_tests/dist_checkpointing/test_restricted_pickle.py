# Copyright (c) 2026, the megatron-core gptoss authors.

"""No reader of a checkpoint runs code from its pickles."""

import io
import os
import pickle
import pickletools
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron.core import dist_checkpointing  # what restricts PyTorch's readers


class Command:
    """Pickled, it is a call of os.system."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def saved(tmp_path):
    state = {"weight": torch.ones(2, 3), "object": 3}
    with pytest.warns(UserWarning):
        dcp.save(state, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    return tmp_path / "ckpt"


def test_no_code_of_a_checkpoint_runs(saved, tmp_path):
    """Code in `.metadata` and in an object is rejected; valid files are read as before."""
    state = {"weight": torch.zeros(2, 3), "object": None}
    dcp.load(state, checkpoint_id=saved, no_dist=True)
    assert state["weight"].eq(1).all() and state["object"] == 3
    ran = tmp_path / "ran"
    with pytest.warns(UserWarning):
        dcp.save({"object": Command(ran)}, checkpoint_id=tmp_path / "bad", no_dist=True)
    with pytest.raises(CheckpointException, match="posix.system"):  # no Exception
        dcp.load({"object": None}, checkpoint_id=tmp_path / "bad", no_dist=True)
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.planner_data = Command(ran)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(Exception, match="posix.system"):
        dcp.FileSystemReader(saved).read_metadata()
    assert not ran.exists()


def test_param_groups_of_an_optimizer_on_the_host(tmp_path, monkeypatch):
    """HybridDeviceOptimizer keeps its optimizers' classes there, of a package that may be absent."""
    fused = type("FusedAdam", (torch.optim.AdamW,), {})
    fused.__module__ = "transformer_engine.pytorch.optimizers.fused_adam"
    names = fused.__module__.split(".")
    for end in range(1, len(names) + 1):
        package = ModuleType(".".join(names[:end]))
        monkeypatch.setitem(sys.modules, package.__name__, package)
    package.FusedAdam = fused
    group = {"cpu_optimizer_cls": torch.optim.AdamW, "gpu_optimizer_cls": fused, "lr": 0.5}
    with pytest.warns(UserWarning):
        dcp.save({"groups": [group]}, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    monkeypatch.undo()
    state = {"groups": [dict.fromkeys(group)]}
    dcp.load(state, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    assert state["groups"][0]["lr"] == 0.5
    assert state["groups"][0]["gpu_optimizer_cls"] is torch.optim.AdamW


def test_bombs_and_altered_classes(saved):
    restricted_pickle = dist_checkpointing.restricted_pickle
    good = (saved / ".metadata").read_bytes()
    assert restricted_pickle.metadata_of(good, "x").storage_data
    name = b"torch.distributed.checkpoint.metadata\nMetadata\n"
    tuple_of_two = b"N}\x8c\x01xK\x01s\x86"
    bad = {
        "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "length": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".",
        "protocol 0": b"(dp0\n.",
        "class": b"\x80\x04c" + name + tuple_of_two + b"b.",
        "dotted": b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata"
        b"\x8c\x17Metadata.__init__.__new\x93.",
        "extension": b"\x80\x04\x82\x01.",
        "end": good[:-1],
        "more": good + b"x.",
        "none": b"",
    }
    for kind, data in bad.items():
        with pytest.raises(restricted_pickle.RestrictedPickleError):
            print(kind, restricted_pickle.metadata_of(data, "x"))
    assert not hasattr(dcp.metadata.Metadata, "x")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m.storage_data.update({k: 3 for k in m.storage_data}), "offset"),
        (
            lambda m: [setattr(p, "relative_path", "../x") for p in m.storage_data.values()],
            "'../x'",
        ),
        (
            lambda m: [setattr(p, "relative_path", "/etc/x") for p in m.storage_data.values()],
            "/etc",
        ),
        (lambda m: [setattr(p, "offset", -1) for p in m.storage_data.values()], "offset -1"),
        (lambda m: [setattr(p, "length", 2.0) for p in m.storage_data.values()], "length 2.0"),
        (lambda m: setattr(m, "state_dict_metadata", []), "no checkpoint metadata"),
        (lambda m: setattr(m.state_dict_metadata["weight"], "size", (2, -3)), "size = (2, -3)"),
        (lambda m: setattr(m.state_dict_metadata["weight"], "size", (1, 3)), "a chunk of sizes"),
        (lambda m: setattr(m.state_dict_metadata["weight"], "chunks", None), "no list of chunks"),
        (lambda m: m.state_dict_metadata.update({3: None}), "key 3"),
        (lambda m: m.state_dict_metadata.update(weight="x"), "is a str"),
        (lambda m: setattr(m, "storage_data", 7), "not a dict"),
    ],
)
def test_fields_of_metadata(saved, change, words):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    change(metadata)
    data = pickle.dumps(metadata)
    with pytest.raises(dist_checkpointing.restricted_pickle.RestrictedPickleError) as error:
        dist_checkpointing.restricted_pickle.metadata_of(data, "/ckpt/.metadata")
    assert str(error.value).startswith("/ckpt/.metadata: ") and words in str(error.value)


def of_megatron_015(saved, mcore_data):
    """`.metadata` as Megatron-Core 0.15 wrote it, classes of its own around PyTorch's fields."""
    from megatron.core.dist_checkpointing.strategies import torch as strategy

    metadata = pickle.loads((saved / ".metadata").read_bytes())
    own, plan = strategy.MCoreMetadata.__new__(strategy.MCoreMetadata), strategy.MCoreSavePlan
    vars(own).update(vars(metadata), mcore_data=mcore_data, all_local_plans=[plan.__new__(plan)])
    return pickle.dumps(own)


def test_metadata_of_megatron_015(saved):
    """Refused at first: 0.19 keeps the names of its classes to read them."""
    shapes = {"weight": {"nd_reformulated_orig_global_shape": (2, 3)}, "object": {}}
    (saved / ".metadata").write_bytes(of_megatron_015(saved, shapes))
    state = {"weight": torch.zeros(2, 3), "object": None}
    dcp.load(state, checkpoint_id=saved, no_dist=True)
    assert state["weight"].eq(1).all() and state["object"] == 3


@pytest.mark.parametrize("shapes", [7, {"weight": 3}, {"weight": {"shape": (-1, 3)}}])
def test_damaged_metadata_of_megatron_015(saved, shapes):
    with pytest.raises(
        dist_checkpointing.restricted_pickle.RestrictedPickleError, match="mcore_data"
    ):
        dist_checkpointing.restricted_pickle.metadata_of(of_megatron_015(saved, shapes), "x")


def test_every_opcode_is_known():
    """A new pickle protocol would otherwise be parsed wrongly."""
    sizes = dist_checkpointing.restricted_pickle._ARGUMENT_SIZES
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        value = {"a": [1, 2.5, "x" * 300, b"y" * 300, (), (1,), None, True, 10**30], "b": {3}}
        data = pickle.dumps([value, value], protocol)
        ops = {op.code for op, _, _ in pickletools.genops(data)}
        assert all(sizes[ord(code)] is not None for code in ops)
        dist_checkpointing.restricted_pickle._check_opcodes(data, False)
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    stream.seek(0)
    assert dist_checkpointing.restricted_pickle.load_saved(stream, "x")["a"].eq(1).all()
