"""Tokenizers that others made, read as ours: GPT-2's, sentencepiece's, Hugging Face's and llama2.c's files.

A vocabulary is a list of pieces, one for each id: (text, score, kind). In the text a space is ' ', but GPT-2
has its own spelling; the pair whose union scores highest is merged first; the kind is a number below, as in
sentencepiece and in GGUF.
"""

import base64
import hashlib
import json
import os
import struct
import tempfile
from pathlib import Path

from configurator import UserError, user_errors
from data.tokenizer import GPT2_SHA256, SPACE_MARK, BPETokenizer, CharTokenizer, GPT2Tokenizer

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
FIRST = [('<unk>', 0.0, UNKNOWN), ('<s>', 0.0, CONTROL), ('</s>', 0.0, CONTROL),
         *((f'<0x{byte:02X}>', 0.0, BYTE) for byte in range(256))]
INFILLING = [('<blank>', 0.0, CONTROL), ('<middle>', 0.0, CONTROL)]

# How GPT-2's files spell a byte, in order of the ids: visible Latin-1 as itself, the others by U+0100 and on.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
GPT2_BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(0x100 + i): byte for i, byte in enumerate(HIDDEN)}
FILES = ('tokenizer.bin', 'tokenizer.model', 'tokenizer.tiktoken', 'tokenizer.json', 'vocab.json',
         'encoder.json', 'merges.txt', 'vocab.bpe')
URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'  # where tiktoken has it from
HELP = ('where there is internet, hf download gpt2 vocab.json --local-dir gpt2; bring this folder over, then '
        'type --tokenizer gpt2')


def read_tokenizer(path):
    """The tokenizer in a file, or in the first of FILES that a folder has; None if there is none. A .txt has
    that of its characters."""
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).is_file()), path)
    if path.suffix not in ('.bin', '.model', '.tiktoken', '.json', '.txt', '.bpe') or not path.is_file():
        return None
    with user_errors(path):
        data = path.read_bytes()
        if path.suffix == '.bin':
            return from_bin(data)
        if path.suffix == '.model':
            return BPETokenizer(data)
        if path.suffix == '.tiktoken':
            return GPT2Tokenizer(data)
        if path.suffix == '.txt' and path.name != 'merges.txt':
            return CharTokenizer.train([path.read_text(encoding='utf-8')])
        content = json.loads(data) if path.suffix == '.json' else {}
        if isinstance(content, list):  # ours
            return CharTokenizer(data)
        model = content.get('model')
        if isinstance(model, dict) and '<|endoftext|>' not in model['vocab']:
            return from_merges(model['vocab'], model['merges'])
        return from_file(path)


def load_gpt2(offline=False):
    """From a cache, else downloaded into tiktoken's; `offline` opens no socket. UserError on failure."""
    import requests
    import tiktoken
    temporary = os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    cache = os.environ.get('TIKTOKEN_CACHE_DIR', os.environ.get('DATA_GYM_CACHE_DIR', temporary))
    own = Path(cache, hashlib.sha1(f'{URL}encoder.json'.encode()).hexdigest())
    # not asked of its library, which would decide now whether it is offline
    home = os.environ.get('HF_HOME', os.environ.get('XDG_CACHE_HOME', '~/.cache') + '/huggingface')
    hub = Path(os.environ.get('HF_HUB_CACHE', f'{home}/hub')).expanduser()
    files = own, *(in_cache(hub) / name for name in ('vocab.json', 'tokenizer.json'))
    try:
        if not offline and not any(file.is_file() for file in files):
            requests.head(URL, timeout=5)  # tiktoken waits for the network without limit
            tiktoken.get_encoding('gpt2')
        return from_file(next((file for file in files if file.is_file()), own))
    except (OSError, ValueError) as error:  # absent; no connection, no room in the cache, another hash
        how = '' if offline else f' and cannot be downloaded ({type(error).__name__})'
        raise UserError(f"GPT-2's vocabulary is not in {cache} (tiktoken's) or {hub}{how}: {HELP}") from None


def in_cache(path):
    """The fullest snapshot that Hugging Face's cache has of a model, if `path` is the model's folder there
    (models--gpt2 is one), or a folder with GPT-2's in it or one below; else `path` itself."""
    gpt2 = 'models--gpt2', 'models--openai-community--gpt2'
    models = path, *(model for name in gpt2 for place in (name, f'*/{name}') for model in path.glob(place))
    snapshots = [snapshot for model in models for snapshot in model.glob('snapshots/*/')]
    return max(snapshots, key=lambda snapshot: len([*snapshot.iterdir()]), default=path)


def from_file(path):
    """GPT-2's from a vocab.json, encoder.json, merges.txt, vocab.bpe or tokenizer.json: each has all of it.
    UserError if it is another."""
    text = path.read_bytes()
    try:
        tokens = [bytes([GPT2_BYTES[char] for char in token]) for token in spelled(text.decode())]
    except Exception:  # what is no such file fails in many ways
        tokens = []
    data = b''.join(base64.b64encode(token) + b' %d\n' % rank for rank, token in enumerate(tokens))
    if hashlib.sha256(data).hexdigest() != GPT2_SHA256:
        raise UserError(f"{path} is not GPT-2's (its vocabulary has another sha256): {HELP}")
    return GPT2Tokenizer(data)


def spelled(text):
    """GPT-2's tokens in its spelling, in order of the ids, out of any of the files."""
    if text.startswith('{'):
        ids = json.loads(text)
        ids = ids['model']['vocab'] if isinstance(ids.get('model'), dict) else ids
        return sorted(ids.keys() - {'<|endoftext|>'}, key=ids.get)
    merges = [line.replace(' ', '') for line in text.splitlines() if not line.startswith('#version')]
    return [*GPT2_BYTES, *merges]  # the bytes come first, then what each line merges


def from_bin(data):
    """The tokenizer of llama2.c's tokenizer.bin: a length, then each piece's score, length and bytes."""
    offset, pieces = 4, []
    while offset < len(data):
        score, length = struct.unpack('<fi', data[offset:offset + 8].ljust(8, b'\0'))
        offset += 8 + length
        if length < 1 or offset > len(data):
            raise ValueError(f'it breaks off at byte {offset:,}')
        pieces.append((data[offset - length:offset].decode(), score, NORMAL))
    return tokenizer_of([piece for piece in pieces if piece[0] not in ('\0<blank>', '\0<middle>')])


def from_merges(vocab, merges):
    """The tokenizer of a tokenizer.json: {text: id} and the pairs, those to be merged first before."""
    merged = [''.join(pair.split(' ') if isinstance(pair, str) else pair) for pair in merges]
    scores = {text: -float(rank) for rank, text in reversed([*enumerate(merged)])}
    texts = {i: text for text, i in vocab.items()}
    return tokenizer_of([(texts[i].replace(SPACE_MARK, ' '), scores.get(texts[i], -1e9), NORMAL)
                         for i in range(len(texts))])


def tokenizer_of(pieces):
    """The tokenizer with these pieces, the infilling ones not among them. ValueError if it cannot be ours."""
    texts, byte_texts = [text.strip('\0\n') for text, _, _ in pieces], [text for text, _, _ in FIRST[3:]]
    if texts[:3] == ['<unk>', '<s>', '</s>'] and not {*texts} & {*byte_texts}:
        return BPETokenizer(sentencepiece_model(FIRST[:3] + pieces[3:]))
    if texts[3:len(FIRST)] != byte_texts:
        raise ValueError('its ids 3 to 258 are not the bytes')
    own = pieces[len(FIRST):]
    if all(len(text) == 1 for text, _, _ in own):  # nothing to merge
        return CharTokenizer(json.dumps([text for text, _, _ in own], ensure_ascii=False).encode())
    return BPETokenizer(sentencepiece_model(FIRST + own))


def sentencepiece_model(pieces):
    """The bytes of a sentencepiece BPE model with these pieces, a protocol buffer: tags and values."""
    model = b''
    for text, score, kind in pieces:  # pieces (1): piece (1), score (2), type (3)
        text = text.replace(' ', SPACE_MARK).encode()
        piece = b'\x0a' + varint(len(text)) + text + struct.pack('<cfcB', b'\x15', score, b'\x18', kind)
        model += b'\x0a' + varint(len(piece)) + piece
    # trainer_spec (2): model_type (3) BPE, vocab_size (4), byte_fallback (35)
    trainer = b'\x18\x02\x20' + varint(len(pieces)) + b'\x98\x02' + bytes([pieces[3][2] == BYTE])
    # normalizer_spec (3): name (1), add_dummy_prefix (3), and remove_extra_whitespaces (4) off
    return model + b'\x12' + varint(len(trainer)) + trainer + b'\x1a\x0e\x0a\x08identity\x18\x01\x20\x00'


def varint(n):
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)
