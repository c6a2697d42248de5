"""sentencepiece's .model files: write one, and read what decides how the library encodes a text.

A file is a protocol buffer (sentencepiece_model.proto): a sequence of fields, each a tag and a value. The tag
is 8 * the field's number + its type: 0 is a varint, 1 is eight bytes, 2 is a length and so many bytes (a text
or a nested message), 5 is four bytes. So tag 0x0a is field 1, bytes; tag 0x15 is field 2, a float32.

    model       1 piece, 2 trainer_spec, 3 normalizer_spec, 5 denormalizer_spec
    piece       1 its text, 2 its score, 3 its kind
"""

import struct

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # the kinds of pieces
SPACE_MARK = '\u2581'  # how sentencepiece writes a space

MODEL_TYPES = {1: 'unigram', 2: 'bpe', 3: 'word', 4: 'char'}
BPE = 2
MAX_FIELDS = 100_000  # more than a model of 65,536 pieces has


def sentencepiece_model(pieces):
    """Return the bytes of a sentencepiece BPE model with these pieces: (text, score, kind)."""
    fields = []
    for text, score, kind in pieces:
        text = text.replace(' ', SPACE_MARK).encode()
        piece = b'\x0a' + write_varint(len(text)) + text
        piece += b'\x15' + struct.pack('<f', score)
        piece += b'\x18' + write_varint(kind)
        fields.append(b'\x0a' + write_varint(len(piece)) + piece)
    # trainer_spec: model_type (3) is BPE, vocab_size (4), byte_fallback (35)
    has_bytes = len(pieces) > 3 and pieces[3][2] == BYTE
    trainer = b'\x18\x02' + b'\x20' + write_varint(len(pieces)) + b'\x98\x02' + write_varint(int(has_bytes))
    fields.append(b'\x12' + write_varint(len(trainer)) + trainer)
    # normalizer_spec: name (1), add_dummy_prefix (3) is on, remove_extra_whitespaces (4) is off
    normalizer = b'\x0a\x08identity' + b'\x18\x01' + b'\x20\x00'
    fields.append(b'\x1a' + write_varint(len(normalizer)) + normalizer)
    return b''.join(fields)


def check_encoding(data):
    """Raise ValueError, naming the field, if the library gives other ids for a model than BPETokenizer does.

    remove_extra_whitespaces may be on: BPETokenizer keeps all spaces, so the ids of a text with spaces at its
    ends or several in a row differ, and those of all other texts are equal.
    """
    trainer, normalizer, denormalizer = {}, {}, {}
    specs = {2: trainer, 3: normalizer, 5: denormalizer}
    for number, value in read_fields(data):
        if number in specs and isinstance(value, bytes):
            specs[number].update(read_fields(value))
        elif number == 1 and isinstance(value, bytes):
            piece = dict(read_fields(value, at_most=10))
            if piece.get(3) == USER_DEFINED:
                text = entry(piece, 1, b'').decode()
                raise ValueError(f'it has user_defined_symbols, such as {text!r}: train it without')

    model_type = entry(trainer, 3, 1)
    if model_type != BPE:
        name = MODEL_TYPES.get(model_type, model_type)
        raise ValueError(f'its model_type is {name}: train it with --model_type=bpe')
    if entry(trainer, 24, 0):
        raise ValueError('its treat_whitespace_as_suffix is true: train it without')
    if entry(normalizer, 2, b'') or entry(denormalizer, 2, b''):  # precompiled_charsmap
        name = entry(normalizer, 1, b'').decode()
        raise ValueError(f'it changes the text (normalization_rule_name {name!r}): '
                         'train it with --normalization_rule_name=identity')
    if not entry(normalizer, 3, 1):
        raise ValueError('its add_dummy_prefix is false: train it with --add_dummy_prefix=true')
    if not entry(normalizer, 5, 1):
        raise ValueError('its escape_whitespaces is false; only true can be read')


def entry(message, number, default):
    """Return the value of a field, or `default` if it is absent or, for the library, of another type."""
    value = message.get(number, default)
    return value if type(value) is type(default) else default


def count_pieces(data):
    """Return the number of pieces in a model. Raises ValueError if it is not a model of sentencepiece."""
    return sum(number == 1 for number, _ in read_fields(data))


def read_fields(data, at_most=MAX_FIELDS):
    """Yield (number, value) of each field of a protocol buffer: an int if it is a varint, else bytes.

    Raises ValueError if `data` is not a protocol buffer, or has more than `at_most` fields.
    """
    position = 0
    n_fields = 0
    while position < len(data):
        n_fields += 1
        if n_fields > at_most:
            raise ValueError(f'it has more than {at_most:,} ids or entries')
        tag, position = read_varint(data, position)
        number, wire_type = divmod(tag, 8)
        if wire_type == 0:
            value, position = read_varint(data, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = read_varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f'it is not a model of sentencepiece (byte {position:,})')
        if position + size > len(data):
            raise ValueError(f'it breaks off at byte {len(data):,}')
        yield number, data[position:position + size]
        position += size


def read_varint(data, position):
    """Return the varint at a position and the position after it. Raises ValueError if it is incomplete."""
    number = 0
    for shift in range(0, 70, 7):  # at most ten bytes
        if position >= len(data):
            raise ValueError(f'it breaks off at byte {len(data):,}')
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise ValueError(f'it is not a model of sentencepiece (byte {position:,})')


def write_varint(number):
    """Return a protocol buffer's varint: 7 bits per byte, the lowest first; bit 8 says that more follow.

    Example: 300 is 0b10_0101100, so its bytes are 0b1_0101100, 0b0_0000010.
    """
    out = b''
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])
