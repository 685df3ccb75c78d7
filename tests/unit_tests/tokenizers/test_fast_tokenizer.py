# Copyright (c) 2026, the megatron-core gptoss authors.

"""--tokenizer-type HuggingFaceTokenizer without transformers."""

import subprocess
import sys
import textwrap

import pytest

from megatron.core.tokenizers.text.libraries.fast_tokenizer import FastTokenizer
from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
from megatron.gpt_oss.data.byte_tokenizer import write_byte_tokenizer

TEXT = 'héllo wörld\n\tx = "日本" 🙂 <|endoftext|> end'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return str(folder)


@pytest.mark.parametrize("include_special_tokens", [True, False])
def test_agrees_with_transformers(folder, include_special_tokens):
    """Same ids, text and special ids as the wrapper of AutoTokenizer gives."""
    kwargs = dict(
        include_special_tokens=include_special_tokens, additional_special_tokens=["<x>", "<y>"]
    )
    ours, theirs = FastTokenizer(folder, **kwargs), HuggingFaceTokenizer(folder, **kwargs)
    ids = theirs.text_to_ids(TEXT + "<y>")
    assert ours.text_to_ids(TEXT + "<y>") == ids
    assert ids[-1] == 258
    for remove in (True, False, None):
        assert ours.ids_to_text(ids, remove) == theirs.ids_to_text(ids, remove)
    for name in ("vocab_size", "eod", "eos_id", "pad_id", "bos_id", "unk_id", "vocab"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.additional_special_tokens_ids == theirs.additional_special_tokens_ids == [257, 258]
    assert ours.ids_to_tokens(ids) == theirs.ids_to_tokens(ids)
    assert ours.tokens_to_ids(ours.text_to_tokens(TEXT)) == theirs.text_to_ids(TEXT)


def test_build_tokenizer_without_transformers(folder):
    """Upstream's NameError of AutoTokenizer made 'Unable to instantiate' of every directory."""
    script = textwrap.dedent(f"""
        import argparse, sys
        sys.modules['transformers'] = None  # what a machine without the package looks like
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
        from megatron.training.arguments import add_megatron_arguments
        args = add_megatron_arguments(argparse.ArgumentParser()).parse_args(
            ['--tokenizer-type', 'HuggingFaceTokenizer', '--tokenizer-model', {folder!r}]
        )
        args.rank = 0
        tokenizer = build_tokenizer(args)
        ids = tokenizer.tokenize('aé')
        assert ids == [97, 0xc3, 0xa9], ids
        assert tokenizer.detokenize(ids) == 'aé'
        assert tokenizer.eod == 256 and tokenizer.vocab_size == 257 and tokenizer.pad == 256
        assert args.padded_vocab_size == 384
        assert 'transformers' not in [m for m in sys.modules if sys.modules[m] is not None]
        """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json"):
        FastTokenizer(str(tmp_path))
