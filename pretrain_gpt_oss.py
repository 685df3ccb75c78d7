# Copyright (c) 2026, the megatron-core gptoss authors.
"""Pre-train gpt-oss on Megatron-Core.

    torchrun --nproc-per-node 8 pretrain_gpt_oss.py --preset 20b --load-hf /models/gpt-oss-20b \\
        --data-path /data/corpus --run-dir runs/20b --expert-model-parallel-size 8 ...

Megatron-LM's flags override the preset; --help lists ours and those that most runs need.
"""

import sys

from megatron.gpt_oss.arguments import help as flag_help
from megatron.gpt_oss.errors import UsageError, run_main
from megatron.gpt_oss.import_warnings import silence_import_notices
from megatron.gpt_oss.training.signals import end_with_launcher


def main() -> None:
    """Import, which takes seconds, and train."""
    if flag_help.asked_for(sys.argv[1:]):  # without those seconds
        return flag_help.show_help()
    if not __debug__:
        raise UsageError(
            "python -O (or PYTHONOPTIMIZE) removes Megatron's checks of its arguments. Run without it."
        )
    end_with_launcher()  # before the imports: it may be killed while they last
    silence_import_notices()
    from megatron.gpt_oss.training.pretrain import main as train

    train()


if __name__ == "__main__":
    run_main(main)
