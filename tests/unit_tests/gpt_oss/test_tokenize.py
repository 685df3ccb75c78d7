# Copyright (c) 2026, the megatron-core gptoss authors.

"""Text to indexed dataset, read back through Megatron's own IndexedDataset."""

import json
import os

import numpy
import pytest

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.gpt_oss.data import tokenize
from megatron.gpt_oss.data.byte_tokenizer import build_byte_tokenizer, write_byte_tokenizer
from megatron.gpt_oss.data.tokenize import find_files, tokenize_files
from megatron.gpt_oss.data.tokenizer_files import TextTokenizer, load_text_tokenizer
from megatron.gpt_oss.errors import UsageError

END = 256


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer')
    write_byte_tokenizer(folder)
    return load_text_tokenizer(folder)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / 'corpus'
    (folder / 'sub').mkdir(parents=True)
    texts = {
        'b.txt': 'zweite, größer\n',
        'a.txt': 'first <|endoftext|> still first',
        'sub/c.py': 'x = "日本"\r\n',
        'sub/d.md': '\ufeff# with a byte order mark',
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    (folder / 'bad.txt').write_bytes(b'caf\xe9')
    (folder / 'empty.txt').write_bytes(b' \n')
    (folder / 'binary.bin').write_bytes(bytes(range(256)))
    lines = [json.dumps({'text': 'one\u2028line', 'id': 1}), '', json.dumps({'text': 'two'})]
    (folder / 'z.jsonl').write_text('\n'.join(lines) + '\n')
    return folder


def _documents(prefix):
    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_documents_and_summary(corpus, tokenizer, tmp_path):
    summary = tokenize_files([corpus], tmp_path / 'out' / 'data', tokenizer)
    expected = [
        'first <|endoftext|> still first',
        'zweite, größer\n',
        'x = "日本"\r\n',
        '# with a byte order mark',
        'one\u2028line',
        'two',
    ]
    expected = [[*text.encode(), END] for text in expected]
    assert _documents(tmp_path / 'out' / 'data') == expected
    assert summary.documents == 6 and summary.files == 5
    assert summary.tokens == sum(map(len, expected))
    skipped = [(path.name, reason) for path, reason in summary.skipped]
    assert skipped == [('bad.txt', 'not UTF-8'), ('empty.txt', 'empty')]
    assert '6 documents' in str(summary) and '2 files skipped' in str(summary)
    assert sorted(os.listdir(tmp_path / 'out')) == ['data.bin', 'data.idx']
    assert IndexedDataset(str(tmp_path / 'out' / 'data')).index.dtype == numpy.uint16


def test_batches_keep_the_order(corpus, tokenizer, tmp_path, monkeypatch):
    tokenize_files([corpus], tmp_path / 'one', tokenizer)
    monkeypatch.setattr(tokenize, 'BATCH_CHARS', 1)
    tokenize_files([corpus], tmp_path / 'many', tokenizer)
    assert _documents(tmp_path / 'one') == _documents(tmp_path / 'many')


def test_inputs(corpus):
    names = lambda *args: [str(p.relative_to(corpus)) for p in find_files(*args)]
    assert names([f'{corpus}/**/*.py', corpus / 'b.txt'], ['*.txt']) == ['b.txt', 'sub/c.py']
    assert names([corpus], ['*.md', 'c.*']) == ['sub/c.py', 'sub/d.md']
    assert names([corpus], ['*.txt', '*.py'], ['*/sub/*', '*/b*']) == ['a.txt', 'empty.txt']
    assert names([corpus / 'b.txt', corpus / 'b.txt'], []) == ['b.txt']
    with pytest.raises(UsageError, match=r'nothing\.txt: no file'):
        find_files([corpus / 'nothing.txt'], ['*.txt'])
    with pytest.raises(UsageError, match=r'\*\.rs.*--pattern'):
        find_files([corpus], ['*.rs'])


def test_existing_dataset_stays(corpus, tokenizer, tmp_path):
    tokenize_files([corpus / 'a.txt'], tmp_path / 'data', tokenizer)
    with pytest.raises(UsageError, match='data.bin exists.*--overwrite'):
        tokenize_files([corpus / 'b.txt'], tmp_path / 'data', tokenizer)
    assert len(_documents(tmp_path / 'data')[0]) == 32
    tokenize_files([corpus / 'b.txt'], tmp_path / 'data', tokenizer, overwrite=True)
    assert len(_documents(tmp_path / 'data')[0]) == 18


def test_nothing_stays_of_a_failure(corpus, tokenizer, tmp_path):
    out = tmp_path / 'out'
    for bad, line in (
        ('{"text": "x"}\n{"txet": 1}\n', 2),
        ('{"text": 5}', 1),
        ('[1]', 1),
        ('{', 1),
    ):
        (corpus / 'bad.jsonl').write_text(bad)
        with pytest.raises(UsageError, match=f'bad.jsonl, line {line}: '):
            tokenize_files([corpus], out / 'data', tokenizer)
        assert os.listdir(out) == []
    with pytest.raises(UsageError, match='None of the 1 files'):
        tokenize_files([corpus / 'bad.txt'], out / 'data', tokenizer)
    assert os.listdir(out) == []


def test_other_field_and_end_token(corpus, tmp_path):
    (corpus / 'other.jsonl').write_text('{"body": "hi"}')
    folder = tmp_path / 'tokenizer'
    write_byte_tokenizer(folder)
    tokenizer = load_text_tokenizer(folder, end_token='a')
    tokenize_files([corpus / 'other.jsonl'], tmp_path / 'data', tokenizer, json_key='body')
    assert _documents(tmp_path / 'data') == [[104, 105, 97]]


def test_large_vocabulary_is_int32(corpus, tmp_path):
    tokenizer = build_byte_tokenizer()
    tokenizer.add_tokens([f'token{i}' for i in range(70_000)])
    text = TextTokenizer(tokenizer, 'token69999', tokenizer.token_to_id('token69999'))
    (corpus / 'a.txt').write_text('atoken12b')
    tokenize_files([corpus / 'a.txt'], tmp_path / 'data', text)
    assert IndexedDataset(str(tmp_path / 'data')).index.dtype == numpy.int32
    assert _documents(tmp_path / 'data') == [[97, 257 + 12, 98, 257 + 69_999]]


def test_bad_tokenizers(tmp_path):
    with pytest.raises(UsageError, match='No tokenizer at'):
        load_text_tokenizer(tmp_path)
    write_byte_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="no token '<|nope|>'"):
        load_text_tokenizer(tmp_path, '<|nope|>')
    (tmp_path / 'tokenizer_config.json').unlink()
    with pytest.raises(UsageError, match='names no eos_token.*--end-token'):
        load_text_tokenizer(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(UsageError, match='is not a tokenizer'):
        load_text_tokenizer(tmp_path, 'a')
