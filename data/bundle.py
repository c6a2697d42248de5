"""One file with all that prepare.py needs where there is no internet.

It is a tar: first sha256.json, {name: hash} of the others; then stories/..., gpt2/tokenizer.tiktoken, and the
repository's requirements*.txt, of which `pip download -r requirements.txt -d wheels` makes a folder to bring.
"""

import hashlib
import io
import json
import os
import shlex
import shutil
import tarfile
import tempfile
from pathlib import Path

from data.vocabularies import load_gpt2
from errors import SettingError, UserError, reading

MANIFEST, MANIFEST_BYTES = 'sha256.json', 10_000_000  # its name, and the most that is read of it


def write_bundle(path, load, offline=False):
    """Writes the tar `path`, whole or not at all, and returns what to say of it.

    load(cache) is `load_stories` of the source: what a bundle gives is what that does. GPT-2's vocabulary is
    from its caches if `offline`. Raises UserError where something cannot be had or written.
    """
    if not path.endswith('.tar'):
        raise SettingError(f'bundle is {path}: type a name that ends in .tar')
    requirements = Path(__file__).resolve().parent.parent.glob('requirements*.txt')
    temporary, path = Path(f'{path}.tmp'), Path(path)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        load_gpt2(offline).save(folder)
        files = {f'gpt2/{file.name}': file for file in Path(folder).iterdir()}
        files |= {file.name: file for file in sorted(requirements)}
        loaded, _ = load(folder)
        try:
            for split, stories in loaded.items():
                files[f'stories/{split}.parquet'] = file = Path(folder, f'{split}.parquet')
                stories.to_parquet(file)
            hashes = {name: sha256(file) for name, file in files.items()}
            with tarfile.open(temporary, 'w') as tar:
                manifest = json.dumps(hashes, indent=1).encode()
                about = tarfile.TarInfo(MANIFEST)
                about.size = len(manifest)
                tar.addfile(about, io.BytesIO(manifest))
                for name, file in files.items():
                    tar.add(file, name)
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f'cannot write {path} ({error.strerror or error}): name another place') from None
        finally:
            temporary.unlink(missing_ok=True)
    n, size = sum(map(len, loaded.values())), path.stat().st_size / 1e6
    return (f'{path}: {size:,.1f} MB, {n:,} stories and what goes with them; where there is no internet: '
            f'prepare.py --source {shlex.quote(str(path))} --offline')


def sha256(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def unpack(path, folder):
    """Unpacks the bundle `path` into `folder`; returns the path of its stories. Raises UserError where it is
    none, damaged or cut, or where a name in it leaves the folder: what is in `folder` then is of no use."""
    path = Path(path)
    with reading(path, 'is damaged or cut'), tarfile.open(path) as tar:
        first = tar.next()
        if first is None or first.name != MANIFEST:
            raise UserError(f'{path} is no bundle: write one with prepare.py --bundle')
        hashes = json.loads(tar.extractfile(first).read(MANIFEST_BYTES))
        for member in tar:
            name = member.name
            if not member.isreg() or name.startswith('/') or {'..', ':', '\\'} & {*name.split('/'), *name}:
                raise UserError(f'{path} has {name!r}, which is no file in a folder: nothing of it is used')
            if name == MANIFEST:
                continue
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with reading(path, f'is damaged or cut in {name}'), open(target, 'wb') as file:
                shutil.copyfileobj(tar.extractfile(member), file)
            if hashes.pop(name, '') != sha256(target):
                raise UserError(f'{path} is damaged: {name} does not have the sha256 that it should')
    if hashes:
        raise UserError(f'{path} is cut: {min(hashes)} is missing')
    return str(Path(folder, 'stories'))
