"""Where GPT-2's vocabulary comes from: files, tiktoken's cache, the network."""

import base64
import hashlib
import json
import os
import tempfile
from pathlib import Path

from data.tokenizer import GPT2_SHA256, GPT2Tokenizer
from errors import UserError
from formats.pieces import GPT2_BYTES

URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'  # where tiktoken has it from
HELP = ("type --tokenizer FOLDER, a folder with GPT-2's vocab.json and merges.txt (from "
        'huggingface.co/openai-community/gpt2) or encoder.json and vocab.bpe, from a machine with internet')


def load(offline=False):
    """From tiktoken's cache, else downloaded into it; `offline` opens no socket. UserError on failure."""
    import requests
    import tiktoken
    temporary = os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    cache = os.environ.get('TIKTOKEN_CACHE_DIR', os.environ.get('DATA_GYM_CACHE_DIR', temporary))
    files = [Path(cache, hashlib.sha1(f'{URL}{name}'.encode()).hexdigest())
             for name in ('encoder.json', 'vocab.bpe')]
    try:
        if not offline:
            if not all(file.is_file() for file in files):
                requests.head(URL, timeout=5)  # tiktoken waits for the network without limit
            tiktoken.get_encoding('gpt2')
        return from_files(*files)
    except (OSError, ValueError) as error:  # absent; no connection, no room in the cache, another hash
        how = '' if offline else f' and cannot be downloaded ({type(error).__name__})'
        raise UserError(f"GPT-2's vocabulary is not in {cache} (tiktoken's){how}: {HELP}") from None


def from_folder(path):
    """From a folder with Hugging Face's or OpenAI's files; None if it has none. UserError if not GPT-2's."""
    for vocab, merges in ('vocab.json', 'merges.txt'), ('encoder.json', 'vocab.bpe'):
        if (path / vocab).is_file() and (path / merges).is_file():
            return from_files(path / vocab, path / merges)
    return None


def from_files(vocab, merges):
    """From vocab.json or encoder.json, and merges.txt or vocab.bpe (paths). UserError if not GPT-2's:
    Hugging Face's files and OpenAI's differ, but not in what they spell."""
    for path in vocab, merges:
        content = path.read_bytes()
        try:
            tokens = [bytes([GPT2_BYTES[char] for char in token]) for token in spelled(content.decode())]
        except Exception:  # what is no such file fails in many ways
            tokens = []
        data = b''.join(base64.b64encode(token) + b' %d\n' % rank for rank, token in enumerate(tokens))
        if hashlib.sha256(data).hexdigest() != GPT2_SHA256:
            raise UserError(f"{path} is not GPT-2's (its vocabulary has another sha256): {HELP}")
    return GPT2Tokenizer(data)


def spelled(text):
    """GPT-2's tokens in its spelling, in order of the ids, out of either kind of file."""
    if text.startswith('{'):
        ids = json.loads(text)
        return sorted(ids.keys() - {'<|endoftext|>'}, key=ids.get)
    merges = [line.replace(' ', '') for line in text.splitlines() if not line.startswith('#version')]
    return [*GPT2_BYTES, *merges]  # the bytes come first, then what each line merges
