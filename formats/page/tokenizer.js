'use strict';

// Text to token ids and back: the tokenizers of data/tokenizer.py, with the same ids.
//
// Two things differ. Half a character (a lone surrogate, which a text field can hold) is taken for U+FFFD,
// and not refused. A text above 100,000 characters is encoded whole, where Python cuts it: if it has no space
// between two letters to cut at, the tokens there can be others.

const BYTES_AT = 3; // the id of byte 0 in char and bpe
const SPACE_MARK = '\u2581'; // what sentencepiece takes for a space
const utf8 = new TextEncoder();

// data: what `vocabulary` of formats/html.py gives. encode(text): an array of ids, no special one among them.
// decode(ids): the text; special ids give nothing, invalid UTF-8 gives U+FFFD.
function makeTokenizer(data) {
  const {vocab_size: vocabSize, delimiter, blank, middle, lossless, prefix} = data;
  const {pieceBytes, encode} = {char: charCodec, bpe: bpeCodec, gpt2: gpt2Codec}[data.encoding](data);
  const tokenizer = {
    vocabSize, delimiter, blank, middle, lossless, prefix, pieceBytes,
    encode: (text) => (text ? encode(prefix + text.replace(/[\ud800-\udfff]/gu, '\ufffd')) : []),
    decode(ids) {
      const text = growing(tokenizer);
      return Array.from(ids, text.add).join('') + text.rest();
    },
  };
  return tokenizer;
}

// A text that is written token by token. add(id): what the token adds to it; the bytes of a character that is
// not yet whole wait. rest(): U+FFFD if some still do. With '' for a prefix, it goes on inside a text.
function growing(tokenizer, prefix = tokenizer.prefix) {
  const decoder = new TextDecoder('utf-8', {ignoreBOM: true});
  let expected = prefix;
  function read(bytes, stream) {
    const text = decoder.decode(bytes, {stream});
    const start = text.startsWith(expected) ? expected.length : 0;
    if (text) expected = '';
    return text.slice(start);
  }
  return {add: (id) => read(tokenizer.pieceBytes(id), true), rest: () => read(new Uint8Array(), false)};
}

// The ids after which a model writes the middle between two sentences, as `prompt` of data/infill.py.
function infillPrompt({encode, delimiter, blank, middle}, first, last) {
  return [delimiter, ...encode(first), blank, ...encode(last), middle];
}

// ---- the three encodings. encode: of a text with its prefix

function charCodec({first, pieces}) {
  const chars = [...pieces], ids = new Map(chars.map((char, i) => [char, first + i]));
  const encode = (text) => Array.from(text, (char) => ids.get(char) ?? byteIds(char)).flat();
  return {encode, pieceBytes: llamaBytes(first, chars)};
}

// sentencepiece's BPE. userDefined: pieces that are neither split nor merged; unused: that are split again.
function bpeCodec({first, pieces, ranks, lossless, unused, userDefined}) {
  const ids = new Map(pieces.map((piece, i) => [piece, first + i]));
  ids.delete(''); // of control pieces
  const halves = new Map(); // of an unused piece: the pair that was last found to make it
  const longestFirst = [...userDefined].sort((a, b) => b.length - a.length);
  const escaped = longestFirst.map((piece) => piece.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&'));
  const symbols = new RegExp([...escaped, '.'].join('|'), 'gsu');
  const fixed = new Set(userDefined), passing = new Set(unused);

  function rank(left, right) {
    const union = left + right, id = ids.get(union);
    if (id === undefined || fixed.has(left) || fixed.has(right)) return undefined;
    if (passing.has(union)) halves.set(union, [left, right]);
    return ranks ? ranks[id - first] : id;
  }

  const unknown = (text) => (lossless ? byteIds(text) : [0]);
  function spell(symbol) {
    if (passing.has(symbol)) return halves.get(symbol)?.flatMap(spell) ?? unknown(symbol);
    return ids.get(symbol) ?? unknown(symbol);
  }

  function encodePart(text) {
    const merged = mergeNeighbours(text.replaceAll(' ', SPACE_MARK).match(symbols) ?? [], rank);
    return merged.flatMap(spell).filter((id, i, all) => id || all[i - 1] !== 0); // a run of unknowns is one
  }

  // The mark itself, in a text, is no space
  const encode = (text) => text.split(SPACE_MARK).flatMap(
    (part, i) => (i ? [...unknown(SPACE_MARK), ...encodePart(part)] : encodePart(part)));
  return {encode, pieceBytes: llamaBytes(first, pieces)};
}

// tiktoken's BPE: OpenAI's pattern finds words, each one merged by itself. letters: how a piece spells
// each byte. The classes of characters come along, as browsers differ in their versions of Unicode.
function gpt2Codec({pieces, letters, classes: {L, N, s}}) {
  const spelled = pieces.split(' '), ids = new Map(spelled.map((piece, i) => [piece, i]));
  const bytes = new Map(Array.from(letters, (letter, byte) => [letter, byte]));
  const words = new RegExp(
    `'(?:[sdmt]|ll|ve|re)| ?[${L}]+| ?[${N}]+| ?[^${s}${L}${N}]+|[${s}]+(?![^${s}])|[${s}]`, 'gu');
  const rank = (left, right) => ids.get(left + right);

  function encodeWord(word) {
    const symbols = Array.from(utf8.encode(word), (byte) => letters[byte]);
    return ids.get(symbols.join('')) ?? mergeNeighbours(symbols, rank).map((symbol) => ids.get(symbol));
  }

  const pieceBytes = (id) => Uint8Array.from(spelled[id] ?? '', (letter) => bytes.get(letter));
  return {encode: (text) => text.match(words).flatMap(encodeWord), pieceBytes};
}

// ---- what they share

const byteIds = (text) => Array.from(utf8.encode(text), (byte) => BYTES_AT + byte);

// The bytes of each id where the pieces begin at `first`, behind three special ids and, it may be, the bytes.
function llamaBytes(first, pieces) {
  return (id) => (BYTES_AT <= id && id < first ? Uint8Array.of(id - BYTES_AT)
    : utf8.encode((pieces[id - first] ?? '').replaceAll(SPACE_MARK, ' ')));
}

// Joins neighbours, the pair of the lowest rank first and of equals the leftmost, until no pair has a rank. A
// heap holds the pairs, rank and place in one number; those that have changed since are passed over.
function mergeNeighbours(symbols, rank) {
  const next = symbols.map((_, i) => i + 1), previous = symbols.map((_, i) => i - 1);
  const ranks = [], heap = [];
  function add(left) {
    ranks[left] = next[left] < symbols.length ? rank(symbols[left], symbols[next[left]]) : undefined;
    if (ranks[left] !== undefined) heapPush(heap, ranks[left] * 2 ** 32 + left);
  }
  symbols.forEach((_, i) => add(i));
  while (heap.length) {
    const key = heapPop(heap), left = key % 2 ** 32, right = next[left];
    if (ranks[left] !== (key - left) / 2 ** 32) continue;
    symbols[left] += symbols[right];
    symbols[right] = '';
    ranks[right] = undefined;
    next[left] = next[right];
    previous[next[right]] = left;
    if (left) add(previous[left]);
    add(left);
  }
  return symbols.filter(Boolean);
}

function heapPush(heap, key) {
  let i = heap.length;
  for (let parent; i && heap[parent = (i - 1) >> 1] > key; i = parent) heap[i] = heap[parent];
  heap[i] = key;
}

function heapPop(heap) {
  const least = heap[0], key = heap.pop();
  let i = 0;
  for (let child; (child = 2 * i + 1) < heap.length; i = child) {
    if (heap[child + 1] < heap[child]) child++;
    if (heap[child] >= key) break;
    heap[i] = heap[child];
  }
  if (heap.length) heap[i] = key;
  return least;
}
