"""The bundle for a machine without internet: what is in it, everything done with it alone, and damage."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
from pyarrow import parquet

from data import bundle
from data.stories import load_stories
from data.tokenizer import load_tokenizer
from data.vocabularies import URL
from errors import UserError
from tests.hub import Hub
from tests.test_formats import gpt2_file
from tests.test_prepare import NO_CONNECTION, PREPARE, TRAIN, VAL, read, write, write_all
from tests.tiny import ROOT, SETTINGS


@pytest.fixture
def script(tmp_path):
    """script(words, **environment) is one as a user types it, its caches in tmp_path: its stdout."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith('HF_')}
    inherited |= {'HF_HOME': str(tmp_path / 'home'), 'TIKTOKEN_CACHE_DIR': str(tmp_path / 'tiktoken'),
                  'no_proxy': '*', 'OMP_NUM_THREADS': '1'}

    def run(*words, **environment):
        done = subprocess.run([sys.executable, ROOT / words[0], *map(str, words[1:])], cwd=tmp_path,
                              capture_output=True, text=True, env=inherited | environment)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return run


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A bundle of a folder of stories."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'tiktoken'))
    keep_gpt2(tmp_path / 'tiktoken')
    folder = write_all(tmp_path / 'mine', {'train.txt': TRAIN, 'valid.jsonl': VAL})
    bundle.write_bundle(f'{tmp_path}/b.tar', partial(load_stories, str(folder), sample=None), offline=True)
    return tmp_path / 'b.tar'


def keep_gpt2(cache):
    """GPT-2's vocabulary where tiktoken keeps its downloads."""
    cache.mkdir()
    shutil.copy(gpt2_file('encoder.json'), cache / hashlib.sha1(f'{URL}encoder.json'.encode()).hexdigest())


def test_all_is_done_with_the_bundle_alone(tmp_path, script):
    """Packed from the hub; then every connection ends the script that asks for it."""
    files = {'train-0.parquet': TRAIN, 'validation-0.parquet': VAL, 'test-0.parquet': ['not read']}
    served = {name: (write_all(tmp_path / 'hub', files) / name).read_bytes() for name in files}
    keep_gpt2(tmp_path / 'tiktoken')
    with Hub('someone/tales', served) as hub:
        said = script(PREPARE, '--source', 'tales', '--bundle', 'b.tar', HF_ENDPOINT=hub.endpoint)
    assert f'{len(TRAIN) + len(VAL)} stories' in said and 'prepare.py --source b.tar --offline' in said
    for cache in 'home', 'tiktoken':
        shutil.rmtree(tmp_path / cache)
    (tmp_path / 'sitecustomize.py').write_text(NO_CONNECTION)  # which Python imports first
    alone, again = {'PYTHONPATH': str(tmp_path)}, ('--source=b.tar', '--offline')
    for encoding in 'gpt2', 'char':
        script(PREPARE, *again, f'--encoding_type={encoding}', '--out_dir=data', **alone)
        assert load_tokenizer(tmp_path / 'data').encoding == encoding
        assert read(tmp_path / 'data') == {'train': TRAIN, 'val': VAL}
    script('train.py', *SETTINGS, '--max_iters=2', '--dataset=data', '--out_dir=out', **alone)
    assert script('sample.py', '--out_dir=out', '--max_new_tokens=5', '--num_samples=1', **alone)
    assert 'wrote' in script('export.py', '--out_dir=out', '--format=hf', '--path=hf', **alone)


def test_what_is_in_it(packed, tmp_path):
    with tarfile.open(packed) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}
    hashes = json.loads(found.pop('sha256.json'))
    assert hashes == {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}
    own = {path.name: path.read_bytes() for path in ROOT.glob('requirements*.txt')}
    assert len(own) == 3 and own.items() <= found.items()
    stories = {f'stories/{name}.parquet': texts for name, texts in (('train', TRAIN), ('validation', VAL))}
    assert {*found} - {*own} == {*stories, 'gpt2/tokenizer.tiktoken'}
    for name, texts in stories.items():
        assert parquet.read_table(io.BytesIO(found[name])).to_pydict() == {'text': texts}
    assert bundle.unpack(packed, tmp_path / 'there') == f'{tmp_path}/there/stories'
    assert {name: (tmp_path / 'there' / name).read_bytes() for name in found} == found


def changed(path, change):
    """The bundle again, `change` made to its list of (TarInfo, content)."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    change(members)
    with tarfile.open(path, 'w') as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))


def named(name, kind=tarfile.REGTYPE):
    def change(members):
        about = tarfile.TarInfo(name)
        about.type, about.linkname = kind, '/etc/passwd'
        members.append((about, b''))
    return lambda path: changed(path, change)


def edited(members):
    i = [about.name for about, _ in members].index('stories/train.parquet')
    members[i] = members[i][0], b'!' + members[i][1][1:]


@pytest.mark.parametrize('harm, message', [
    (lambda path: path.write_bytes(path.read_bytes()[:60_000]), 'or cut in gpt2/tokenizer.tiktoken'),
    (lambda path: changed(path, edited), r'damaged: stories/train\.parquet does not have the sha256'),
    (lambda path: changed(path, lambda members: members.pop()), 'is cut: stories/validation.* is missing'),
    (lambda path: changed(path, lambda members: members.pop(0)), 'is no bundle'),
    (lambda path: path.write_bytes(b'no tar' * 1000), 'is damaged or cut: '),
    (lambda path: path.unlink(), 'No such file'),
    (named('../out.txt'), r"has '\.\./out\.txt', which is no file in a folder"),
    (named('/tmp/out.txt'), 'which is no file in a folder'),
    (named('a\\..\\b'), 'which is no file in a folder'),
    (named('stories/link', tarfile.SYMTYPE), 'which is no file in a folder'),
    (named('stories/more.txt'), r'damaged: stories/more\.txt does not have')])
def test_what_is_refused(packed, tmp_path, harm, message):
    harm(packed)
    with pytest.raises(UserError, match=message):
        bundle.unpack(packed, tmp_path / 'a' / 'b')
    assert {path.name for path in tmp_path.iterdir()} <= {'a', 'b.tar', 'mine', 'tiktoken'}
    assert not Path('/tmp/out.txt').exists() and not (tmp_path / 'a' / 'out.txt').exists()


def test_a_full_disk_leaves_no_half_of_it(packed, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(tarfile.TarFile, 'addfile', full)
    before = packed.read_bytes()
    with pytest.raises(UserError, match='No space left on device'):
        bundle.write_bundle(str(packed), partial(load_stories, f'{packed.parent}/mine', sample=None), True)
    assert packed.read_bytes() == before and not packed.with_name('b.tar.tmp').exists()


def test_what_a_bundle_gives_is_what_its_source_does(tmp_path, script):
    """Also of a lone document, and of one column of a table."""
    keep_gpt2(tmp_path / 'tiktoken')
    (tmp_path / 'doc.txt').write_text('A word. ' * 100)
    write(tmp_path / 'table.csv', TRAIN, 'tale')
    for source, *more in ('doc.txt',), ('table.csv', '--text_column=tale'), ('sample',):
        script(PREPARE, '--source', source, *more, '--bundle=b.tar', '--offline')
        found = []
        for again in [source, *more], ['b.tar']:
            script(PREPARE, '--source', *again, '--offline', '--encoding_type=char', '--out_dir=data')
            found.append(read(tmp_path / 'data'))
        assert found[0] == found[1]
