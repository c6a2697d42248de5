"""Find the tokenizer at a path, and read those that others made as one of our three.

A vocabulary is a list of pieces, one per id: (text, score, kind). A space in the text is ' ' (GPT-2 has its
own spelling). The pair of pieces whose union has the highest score is merged first. The kinds are those of
sentencepiece and GGUF, see data/sentencepiece_file.py.
"""

import hashlib
import json
import math
import os
import re
import struct
import tempfile
import zipfile
from pathlib import Path

from configurator import UserError, user_errors
from data.files import check_stored, refuse_stand_in
from data.hf_tokenizer import (
    GPT2_HELP,
    check_model_type,
    describe_vocabulary,
    gpt2_of_merges,
    gpt2_of_tokenizer_json,
    gpt2_of_vocabulary,
    is_byte_level,
    is_merges,
    llama_pieces,
)
from data.sentencepiece_file import BYTE, CONTROL, NORMAL, UNKNOWN, check_encoding, sentencepiece_model
from data.text_encoding import find_undecodable, read_start
from data.tokenizer import (
    FILE_NAMES,
    MAX_IDS,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    load_tokenizer,
    read_file,
    tokenizer_from_state,
)

FIRST = [('<unk>', 0.0, UNKNOWN), ('<s>', 0.0, CONTROL), ('</s>', 0.0, CONTROL),
         *((f'<0x{byte:02X}>', 0.0, BYTE) for byte in range(256))]  # ids 0 to 258 of char and bpe
INFILLING = [('<blank>', 0.0, CONTROL), ('<middle>', 0.0, CONTROL)]  # the two last ids

# What a folder may hold, in order of preference
FILES = ('tokenizer.bin', 'tokenizer.model', 'tokenizer.tiktoken', 'tokenizer.json', 'vocab.json',
         'encoder.json', 'merges.txt', 'vocab.bpe')
CHECKPOINTS = 'best.pt', 'ckpt.pt'
TEXT_CHUNK = 2**24  # characters
URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'  # where tiktoken downloads it


def open_tokenizer(path):
    """Return the tokenizer at `path`, without importing torch where that is possible.

    path: a prepared folder, a run's folder or checkpoint (.pt), a Hugging Face folder or cache, a folder that
    export.py wrote, llama2.c's model (.bin, with its tokenizer in the same folder), a tokenizer file or a
    folder with one, or a .txt, which stands for its characters.
    Raises UserError if it is none of these, or is damaged.
    """
    path = in_cache(Path(path))
    if (path / 'meta.json').is_file():
        return load_tokenizer(path)
    if path.suffix == '.pt':
        return read_checkpoint_tokenizer(path)
    if any((path / name).is_file() for name in CHECKPOINTS):
        return read_run_tokenizer(path)
    if is_llama2c_model(path):
        refuse_stand_in(path)  # the readers of the other files do that
        tokenizer = read_tokenizer(path.parent)
        if tokenizer is None:
            raise UserError(f'{path.parent} has no tokenizer.bin and no tokenizer.model: put its own there')
        return tokenizer
    tokenizer = read_tokenizer(path)
    if tokenizer is None:
        raise UserError(f'{path} is not a tokenizer: name a checkpoint (.pt or its folder), a prepared '
                        'folder, tokenizer.model, .json or .bin, vocab.json, their folder, or a .txt for its '
                        'characters')
    return tokenizer


# runs ---------------------------------------------------------------------------

def read_run_tokenizer(folder):
    """Return the tokenizer of a run's folder: its own file, or of older runs what the checkpoint holds."""
    files = [folder / name for name in FILE_NAMES if (folder / name).is_file()]
    if len(files) == 1:
        return read_tokenizer(files[0])
    checkpoints = [folder / name for name in CHECKPOINTS if (folder / name).is_file()]
    return read_checkpoint_tokenizer(checkpoints[0])


def read_checkpoint_tokenizer(path):
    """Return the tokenizer in a checkpoint of train.py."""
    if not path.is_file():
        raise UserError(f'no checkpoint {path}: train first, or name another tokenizer')
    refuse_stand_in(path)
    import torch  # here, because it takes seconds, and few tokenizers need it

    with user_errors(path, 'is not a checkpoint of this project, and was not run'):
        with zipfile.ZipFile(path) as archive:
            check_stored(archive)
            for name in archive.namelist():
                if name.endswith('data.pkl'):
                    archive.read(name)  # compares its checksum, which torch.load does not
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        if not isinstance(checkpoint, dict) or 'tokenizer' not in checkpoint:
            raise ValueError('it has no tokenizer')
    return tokenizer_from_state(checkpoint['tokenizer'], path)


# files --------------------------------------------------------------------------

def read_tokenizer(path):
    """Return the tokenizer in a file, or in the first of FILES that a folder has; None if there is none.

    The content decides what a file is: a .txt may be GPT-2's merges, and else stands for its characters.
    Raises UserError if the file is damaged, or a tokenizer of a kind that this project does not read.
    """
    if path.is_dir():
        path = find_tokenizer_file(path)
        if path is None:
            return None
    readers = {'.bin': from_bin, '.model': from_model, '.tiktoken': GPT2Tokenizer, '.json': from_json,
               '.bpe': from_merges}
    if path.suffix not in (*readers, '.txt') or not path.is_file():
        return None
    with user_errors(path, 'is damaged or not a tokenizer that this project reads'):
        if path.suffix == '.txt':
            return read_text(path)
        return readers[path.suffix](read_file(path))


def find_tokenizer_file(folder):
    """Return the file with the tokenizer of a folder, the first of FILES that it has; None if it has none."""
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    return None


def read_text(path):
    """Return the tokenizer of a .txt, UTF-8: of its merges, if it is a list of them, or of its characters.

    Raises ValueError if it is empty or a vocabulary of another kind, UserError if it is no text in UTF-8.
    """
    refuse_stand_in(path)
    read_start(path)  # raises UserError if it is no text
    try:
        with open(path, encoding='utf-8', newline='') as file:
            start = file.read(TEXT_CHUNK)
            content = start.removeprefix('\ufeff')  # the mark of UTF-8 is no part of a list
            if not content:
                raise ValueError('it is empty')
            if '\0' in content:
                raise ValueError('it has a byte 0, so it is no text in UTF-8')
            if is_merges(content):
                return gpt2_of_merges(content)
            what = describe_vocabulary(content)
            if what:
                raise ValueError(f'it looks like {what}')
            return CharTokenizer.train(chunks(start, file))
    except UnicodeDecodeError as error:
        raise UserError(find_undecodable(path, 'utf-8', 'utf-8') + ': convert it with iconv -t utf-8 -f '
                        'and its encoding, such as cp1252') from error


def chunks(start, file):
    """Yield the text of a file, whose beginning has been read, in parts that fit into memory."""
    chunk = start
    while chunk:
        yield chunk
        chunk = file.read(TEXT_CHUNK)


def from_merges(data):
    """Return GPT-2's tokenizer from its vocab.bpe."""
    return gpt2_of_merges(data.decode())


def from_model(data):
    """Return the tokenizer of a .model: sentencepiece's, or GPT-2's in tiktoken's form."""
    if re.match(rb'[A-Za-z0-9+/=]+ \d+\n', data):
        return GPT2Tokenizer(data)
    check_encoding(data)
    return BPETokenizer(data)


def from_json(data):
    """Return the tokenizer of a .json file: ours, Hugging Face's tokenizer.json, or GPT-2's vocabulary."""
    content = json.loads(data)
    if isinstance(content, list):
        return CharTokenizer(data)
    if not isinstance(content, dict):
        raise ValueError('neither a list of characters nor a vocabulary')
    if not isinstance(content.get('model'), dict):
        return gpt2_of_vocabulary(content)
    check_model_type(content['model'])
    if is_byte_level(content):
        return gpt2_of_tokenizer_json(content)
    return tokenizer_of(llama_pieces(content))


def from_bin(data):
    """Return the tokenizer of llama2.c's tokenizer.bin.

    The file is the length of the longest piece (int32), and for each piece its score (float32), its length
    (int32) and its bytes.
    """
    offset = 4
    pieces = []
    while offset < len(data):
        header = data[offset:offset + 8].ljust(8, b'\0')  # a length of 0 is an error
        score, length = struct.unpack('<fi', header)
        offset += 8 + length
        if length < 1 or offset > len(data):
            raise ValueError(f'it breaks off at byte {offset:,}')
        if not math.isfinite(score):
            raise ValueError(f'the score of its piece {len(pieces):,} is {score}')
        text = data[offset - length:offset].decode()
        if text not in ('\0<blank>', '\0<middle>'):  # as export.py writes them
            pieces.append((text, score, NORMAL))
        if len(pieces) > MAX_IDS:
            raise ValueError(f'it has more than {MAX_IDS:,} ids')
    return tokenizer_of(pieces)


def is_llama2c_model(path):
    """Return whether `path` is llama2.c's model rather than its tokenizer.bin, which begins with '<unk>'."""
    if path.suffix != '.bin' or not path.is_file():
        return False
    with open(path, 'rb') as file:
        return b'<unk>' not in file.read(32)


def tokenizer_of(pieces):
    """Return the tokenizer with these pieces, <blank> and <middle> left out.

    Raises ValueError if they are not in the order of our tokenizers.
    """
    texts = [text.strip('\0\n') for text, _, _ in pieces]
    byte_texts = [text for text, _, kind in FIRST if kind == BYTE]
    begins_like_llama = texts[:3] == ['<unk>', '<s>', '</s>']
    if begins_like_llama and not set(texts) & set(byte_texts):
        return BPETokenizer(sentencepiece_model(FIRST[:3] + pieces[3:]))
    if texts[3:len(FIRST)] != byte_texts:
        raise ValueError('its ids are not unk 0, bos 1, eos 2, and the bytes 3 to 258 or none')
    others = pieces[len(FIRST):]
    if all(len(text) == 1 for text, _, _ in others):  # nothing to merge
        characters = [text for text, _, _ in others]
        return CharTokenizer(json.dumps(characters, ensure_ascii=False).encode())
    return BPETokenizer(sentencepiece_model(FIRST + others))


# GPT-2's vocabulary in the caches ----------------------------------------------

def load_gpt2(offline=False):
    """Return GPT-2's tokenizer from a cache of tiktoken or Hugging Face, or download it into tiktoken's.

    offline: do not download. Raises UserError on failure.
    """
    import requests
    import tiktoken

    temporary = os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    cache = os.environ.get('TIKTOKEN_CACHE_DIR', os.environ.get('DATA_GYM_CACHE_DIR', temporary))
    downloaded = Path(cache, hashlib.sha1(f'{URL}encoder.json'.encode()).hexdigest())
    # huggingface_hub would say where its cache is, but importing it settles whether it is offline
    home = os.environ.get('HF_HOME', os.environ.get('XDG_CACHE_HOME', '~/.cache') + '/huggingface')
    hub = Path(os.environ.get('HF_HUB_CACHE', f'{home}/hub')).expanduser()
    snapshot = in_cache(hub)
    candidates = [downloaded, snapshot / 'vocab.json', snapshot / 'tokenizer.json']
    try:
        files = [file for file in candidates if file.is_file()]
        if not files and not offline:
            requests.head(URL, timeout=5)  # tiktoken has no timeout
            tiktoken.get_encoding('gpt2')
        file = files[0] if files else downloaded
        data = file.read_bytes()
    except (OSError, ValueError) as error:  # no file; no connection, no room in the cache, another hash
        how = '' if offline else f' and cannot be downloaded ({type(error).__name__})'
        raise UserError(f"GPT-2's vocabulary is not in {cache} (tiktoken's) or {hub}{how}: "
                        + GPT2_HELP) from error
    with user_errors(file):
        return from_json(data)


def in_cache(path):
    """Return the fullest snapshot of a model in Hugging Face's cache, or `path` itself if it is not a cache.

    path: the model's folder in the cache (such as models--gpt2), or a folder that has GPT-2's in it or one
    level below.
    """
    models = [path]
    for name in 'models--gpt2', 'models--openai-community--gpt2':
        models += [*path.glob(name), *path.glob(f'*/{name}')]
    snapshots = []
    for model in models:
        snapshots += model.glob('snapshots/*/')
    return max(snapshots, key=lambda snapshot: len(os.listdir(snapshot)), default=path)
