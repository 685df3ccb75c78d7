# Copyright (c) 2026, the megatron-core gptoss authors.
"""The patch queue: upstream's wheel + patches/ = the materialised megatron/ tree.

``upstream`` finds the wheels, ``series`` reads the patches, ``tree`` applies and diffs file trees in
memory, ``materialise`` writes them to disk, ``refresh`` turns edits back into a patch. For other
source trees, ``versions`` detects the version, ``resolve`` chooses patches and variants,
``foreign_tree`` writes them, ``static_check`` looks for undefined names, ``export`` writes a mailbox
series, ``pull_requests`` and ``extract_tests`` the series of one pull request. ``evidence`` runs the
patches' tests, ``leave_one_out`` without one patch, and ``table`` writes patches/README.md.
"""
