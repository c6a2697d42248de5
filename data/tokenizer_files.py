"""Read tokenizers that others made, or that this project wrote anywhere, as one of our three.

A vocabulary is a list of pieces, one per id: (text, score, kind). A space in the text is ' ' (GPT-2 has its
own spelling). The pair of pieces whose union has the highest score is merged first. The kind is one of the
numbers below, which are those of sentencepiece and GGUF.
"""

import base64
import hashlib
import json
import os
import reprlib
import struct
import tempfile
import zipfile
from pathlib import Path

from configurator import UserError, user_errors
from data.tokenizer import (
    FILE_NAMES,
    GPT2_SHA256,
    SPACE_MARK,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    load_tokenizer,
    tokenizer_from_state,
)

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
FIRST = [('<unk>', 0.0, UNKNOWN), ('<s>', 0.0, CONTROL), ('</s>', 0.0, CONTROL),
         *((f'<0x{byte:02X}>', 0.0, BYTE) for byte in range(256))]  # ids 0 to 258 of char and bpe
INFILLING = [('<blank>', 0.0, CONTROL), ('<middle>', 0.0, CONTROL)]  # the two last ids

# How GPT-2's files spell a byte, in order of the ids: visible Latin-1 as itself, the others as U+0100 and on
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
GPT2_BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(0x100 + i): byte for i, byte in enumerate(HIDDEN)}

# What a folder may hold, in order of preference
FILES = ('tokenizer.bin', 'tokenizer.model', 'tokenizer.tiktoken', 'tokenizer.json', 'vocab.json',
         'encoder.json', 'merges.txt', 'vocab.bpe')
CHECKPOINTS = 'best.pt', 'ckpt.pt'
URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'  # where tiktoken downloads it
GPT2_HELP = ('where there is internet, hf download gpt2 vocab.json --local-dir gpt2; bring this folder over, '
             'then type --tokenizer gpt2')


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
    import torch  # here, because it takes seconds, and few tokenizers need it

    with user_errors(path, 'is not a checkpoint of this project, and was not run'):
        with zipfile.ZipFile(path) as archive:
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

    A .txt gives a tokenizer of its characters. Raises UserError if the file is damaged.
    """
    if path.is_dir():
        files = [path / name for name in FILES if (path / name).is_file()]
        if not files:
            return None
        path = files[0]
    readers = {'.bin': from_bin, '.model': BPETokenizer, '.tiktoken': GPT2Tokenizer, '.json': from_json,
               '.txt': from_text, '.bpe': from_gpt2}
    if path.suffix not in readers or not path.is_file():
        return None
    reader = readers[path.suffix]
    if path.name == 'merges.txt':
        reader = from_gpt2
    with user_errors(path):
        return reader(path.read_bytes())


def from_text(data):
    """Return the tokenizer of the characters in a text, UTF-8."""
    return CharTokenizer.train([data.decode()])


def from_json(data):
    """Return the tokenizer of a .json file: ours, Hugging Face's tokenizer.json, or GPT-2's vocabulary."""
    content = json.loads(data)
    if isinstance(content, list):
        return CharTokenizer(data)
    if not isinstance(content, dict):
        raise ValueError('neither a list of characters nor a vocabulary')
    model = content.get('model')
    if isinstance(model, dict) and '<|endoftext|>' not in vocabulary_of(model):
        return from_merges(vocabulary_of(model), model.get('merges'))
    return from_gpt2(data)


def vocabulary_of(table):
    """Return a tokenizer.json's {piece: id}. Raises ValueError if it is something else."""
    vocab = table.get('vocab')
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError('its vocabulary is not an object of pieces and ids')
    return vocab


def from_merges(vocab, merges):
    """Return the tokenizer of a Hugging Face tokenizer.json.

    vocab: {piece: id}. merges: the pairs ('a b' or ['a', 'b']), those that are merged first come first.
    """
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError('its ids are not the numbers from 0 on')
    if not isinstance(merges, list):
        raise ValueError('it has no list of merges')
    scores = {}
    for rank, pair in enumerate(merges):
        parts = pair.split(' ') if isinstance(pair, str) else pair
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f'{reprlib.repr(pair)} is not a pair of pieces')
        scores.setdefault(''.join(parts), -float(rank))
    pieces = []
    for text in sorted(vocab, key=vocab.get):
        pieces.append((text.replace(SPACE_MARK, ' '), scores.get(text, -1e9), NORMAL))
    return tokenizer_of(pieces)


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
        text = data[offset - length:offset].decode()
        if text not in ('\0<blank>', '\0<middle>'):  # as export.py writes them
            pieces.append((text, score, NORMAL))
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
        raise ValueError('its ids 3 to 258 are not the bytes')
    others = pieces[len(FIRST):]
    if all(len(text) == 1 for text, _, _ in others):  # nothing to merge
        characters = [text for text, _, _ in others]
        return CharTokenizer(json.dumps(characters, ensure_ascii=False).encode())
    return BPETokenizer(sentencepiece_model(FIRST + others))


# GPT-2's vocabulary -------------------------------------------------------------

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
        return from_gpt2(data)


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


def from_gpt2(data):
    """Return GPT-2's tokenizer from its vocab.json, encoder.json, merges.txt, vocab.bpe or tokenizer.json.

    Each of them holds the whole vocabulary. Raises ValueError if it is another one.
    """
    lines = []
    for rank, token in enumerate(gpt2_tokens(data.decode())):
        if not set(token) <= GPT2_BYTES.keys():
            raise ValueError(f'{reprlib.repr(token)} is not a token of GPT-2: {GPT2_HELP}')
        token_bytes = bytes(GPT2_BYTES[char] for char in token)
        lines.append(base64.b64encode(token_bytes) + b' %d\n' % rank)
    content = b''.join(lines)
    if hashlib.sha256(content).hexdigest() != GPT2_SHA256:
        raise ValueError(f"it is not GPT-2's (its vocabulary has another sha256): {GPT2_HELP}")
    return GPT2Tokenizer(content)


def gpt2_tokens(text):
    """Return GPT-2's tokens in the spelling of its files, in order of the ids."""
    if text.startswith('{'):
        ids = json.loads(text)
        if isinstance(ids.get('model'), dict):
            ids = vocabulary_of(ids['model'])
        else:
            ids = vocabulary_of({'vocab': ids})
        return sorted(ids.keys() - {'<|endoftext|>'}, key=ids.get)
    # the bytes come first, then what each line merges
    merged = [line.replace(' ', '') for line in text.splitlines() if not line.startswith('#version')]
    return [*GPT2_BYTES, *merged]


# sentencepiece's format ---------------------------------------------------------

def sentencepiece_model(pieces):
    """Return the bytes of a sentencepiece BPE model with these pieces.

    The file is a protocol buffer (sentencepiece_model.proto): a sequence of fields, each a tag and a value.
    The tag is 8 * the field's number + its type: 0 is a varint, 2 is a length and so many bytes (a text or a
    nested message), 5 is four bytes. So tag 0x0a is field 1, bytes; tag 0x15 is field 2, a float32.
    """
    model = b''
    for text, score, kind in pieces:  # field 1, pieces: piece (1), score (2), type (3)
        text = text.replace(' ', SPACE_MARK).encode()
        piece = b'\x0a' + write_varint(len(text)) + text
        piece += b'\x15' + struct.pack('<f', score)
        piece += b'\x18' + write_varint(kind)
        model += b'\x0a' + write_varint(len(piece)) + piece
    # field 2, trainer_spec: model_type (3) is BPE, vocab_size (4), byte_fallback (35)
    has_bytes = len(pieces) > 3 and pieces[3][2] == BYTE
    trainer = b'\x18\x02' + b'\x20' + write_varint(len(pieces)) + b'\x98\x02' + write_varint(int(has_bytes))
    model += b'\x12' + write_varint(len(trainer)) + trainer
    # field 3, normalizer_spec: name (1), add_dummy_prefix (3) is on, remove_extra_whitespaces (4) is off
    normalizer = b'\x0a\x08identity' + b'\x18\x01' + b'\x20\x00'
    return model + b'\x1a' + write_varint(len(normalizer)) + normalizer


def write_varint(number):
    """Return a protocol buffer's varint: 7 bits per byte, the lowest first; bit 8 says that more follow.

    Example: 300 is 0b10_0101100, so its bytes are 0b1_0101100, 0b0_0000010.
    """
    out = b''
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])
