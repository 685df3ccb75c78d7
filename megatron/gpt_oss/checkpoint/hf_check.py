# Copyright (c) 2026, the megatron-core gptoss authors.

"""Whether the tensors of a Hugging Face folder are those that its config.json describes.

Only headers are read: a folder of 65 GB is checked in a moment, before the first byte is written.
"""

from megatron.gpt_oss.checkpoint.hf_reader import MXFP4_SUFFIXES, HFReader
from megatron.gpt_oss.checkpoint.mapping import hf_names, hf_shape, is_expert_matrix
from megatron.gpt_oss.checkpoint.mxfp4 import BLOCK
from megatron.gpt_oss.errors import CheckpointError
from megatron.gpt_oss.presets import Preset

_FLOATS = ("BF16", "F32")


def check_tensors(reader: HFReader, preset: Preset) -> None:
    """Refuse a folder that lacks a tensor, has one too many, or one of another dtype or shape.

    Raises:
        CheckpointError: names file, tensor, what was found and what was expected.
    """
    reader.check_files()
    expected = _expected_tensors(reader, preset)
    for name, (dtypes, shape) in expected.items():
        entry = reader.entry(name)
        if entry.shape != shape:
            raise CheckpointError(
                f"{reader.stored_in(name)}: '{name}' has shape {entry.shape}, expected {shape} by "
                "config.json of the same folder. The two belong to different models."
            )
        if entry.dtype not in dtypes:
            raise CheckpointError(
                f"{reader.stored_in(name)}: '{name}' has dtype {entry.dtype}, expected "
                f"{' or '.join(dtypes)}. Only BF16, F32 and MXFP4 checkpoints are read."
            )
    for file, entries in reader.files().items():
        unknown = sorted(set(entries) - set(expected))
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise CheckpointError(
                f"{reader.folder / file} holds '{unknown[0]}'{more}, which gpt-oss does not have; "
                f"expected the {len(expected)} tensors of {preset.num_layers} layers. Is it of "
                "another model, or a quantisation that is not MXFP4?"
            )


def _expected_tensors(reader: HFReader, preset: Preset) -> dict[str, tuple]:
    """Allowed dtypes and shape of every tensor that should be stored, by name."""
    expected: dict[str, tuple] = {}
    for name in hf_names(preset):
        shape = hf_shape(name, preset)
        if is_expert_matrix(name) and reader.is_mxfp4(name):
            experts, fan_in, fan_out = shape
            if fan_in % BLOCK:
                raise CheckpointError(
                    f"{reader.folder} has '{name}' in MXFP4, whose blocks are of {BLOCK}, and "
                    f"config.json says {fan_in} inputs. The two belong to different models."
                )
            groups = (experts, fan_out, fan_in // BLOCK)
            expected[name + MXFP4_SUFFIXES[0]] = (("U8",), (*groups, BLOCK // 2))
            expected[name + MXFP4_SUFFIXES[1]] = (("U8",), groups)
        else:
            expected[name] = (_FLOATS, shape)
    return expected
