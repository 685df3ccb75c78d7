# Copyright (c) 2026, the megatron-core gptoss authors.

"""All that knows the gpt-oss model family: presets, layer specs, checkpoints, data, commands.

Importing the package imports nothing else: the submodules are light or heavy as their work is.
"""
