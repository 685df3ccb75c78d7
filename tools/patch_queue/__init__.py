# Copyright (c) 2026, the megatron-core gptoss authors.
"""The patch queue: upstream's wheel + patches/ = the materialised megatron/ tree.

``upstream`` finds the wheels, ``series`` reads the patches, ``tree`` applies and diffs file trees in
memory, ``materialise`` writes them to disk, ``fold`` turns edits back into a patch. For other
people's trees, ``versions`` tells what a tree is, ``plan`` chooses patches and variants, ``target``
writes them, ``export`` makes a mailbox series, ``evidence`` runs the patches' tests on it and
``table`` keeps patches/README.md.
"""
