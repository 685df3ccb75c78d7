# Copyright (c) 2026, the megatron-core gptoss authors.

"""compile_helpers() of an installed package, which has the extension and no Makefile."""

import numpy

from megatron.core.datasets import utils


def test_prebuilt_extension_is_not_compiled(monkeypatch):
    """Upstream ran make, which fails where there is no Makefile, and ended the process."""

    def run(command, *args, **kwargs):
        raise AssertionError(f"started {command}")

    monkeypatch.setattr("subprocess.run", run)
    utils.compile_helpers()

    # The extension is there and right: sequences of 4 tokens (and 1 more to predict) cut from
    # documents of 3, 6 and 2 tokens, as (document, offset) of each sequence's start.
    from megatron.core.datasets import helpers

    sample_index = helpers.build_sample_idx(
        numpy.array([3, 6, 2], dtype=numpy.int32),
        numpy.array([0, 1, 2], dtype=numpy.int32),
        sequence_length=4,
        num_epochs=1,
        tokens_per_epoch=11,
    )
    assert sample_index.tolist() == [[0, 0], [1, 1], [1, 5]]
