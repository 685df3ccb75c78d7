# Copyright (c) 2026, the megatron-core gptoss authors.
"""The patch queue: upstream's wheel + patches/ = the materialised megatron/ tree.

``upstream`` finds the pinned wheel, ``series`` reads the patches, ``tree`` applies and diffs file
trees in memory, ``materialise`` writes them to disk, ``fold`` turns edits back into a patch,
``target`` patches somebody else's tree and ``export`` writes a mailbox series.
"""
