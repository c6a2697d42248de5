'use strict';

// The tokenizers of data/tokenizer.py, with the same ids.
//
// There are two differences. A lone surrogate (half a character, which a text field can hold) becomes U+FFFD;
// Python refuses it. A text of more than 100,000 characters is encoded as a whole; Python cuts it into parts,
// so its tokens can differ at a cut that is not at a space between two letters.

const BYTES_AT = 3; // the id of byte 0 in char and bpe
const SPACE_MARK = '\u2581'; // what sentencepiece takes for a space
const utf8 = new TextEncoder();

// Makes a tokenizer from what `page_vocabulary` in formats/page/vocabulary.py returns.
//
// encode(text) returns an array of ids; no text can spell a special one. decode(ids) returns the text:
// special ids become nothing, invalid UTF-8 becomes U+FFFD. pieceBytes(id) returns the bytes of an id.
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

// Decodes token by token. add(id) returns the text that the token adds; bytes of a character that is not yet
// complete wait for the next token. rest() returns U+FFFD if some are still waiting. prefix: what the
// tokenizer put before the text, which is removed again; '' inside a text.
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

// Returns the ids after which a model writes the middle between two sentences, as data/infill.py does.
function infillPrompt({encode, delimiter, blank, middle}, first, last) {
  return [delimiter, ...encode(first), blank, ...encode(last), middle];
}

// ---- the three encodings: each returns {encode, pieceBytes}, where encode gets the text with its prefix

function charCodec({first, pieces}) {
  const chars = [...pieces], ids = new Map(chars.map((char, i) => [char, first + i]));
  const encode = (text) => Array.from(text, (char) => ids.get(char) ?? byteIds(char)).flat();
  return {encode, pieceBytes: llamaBytes(first, chars)};
}

// sentencepiece's BPE. userDefined: pieces that are neither split nor merged. unused: pieces that are split
// again after merging.
function bpeCodec({first, pieces, ranks, lossless, unused, userDefined}) {
  const ids = new Map(pieces.map((piece, i) => [piece, first + i]));
  ids.delete(''); // stands for control pieces, which no text can spell
  const halves = new Map(); // for each unused piece, the pair that was last merged to make it
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
    // several unknowns in a row become one
    return merged.flatMap(spell).filter((id, i, all) => id || all[i - 1] !== 0);
  }

  // U+2581 in the text itself does not stand for a space
  const encode = (text) => text.split(SPACE_MARK).flatMap(
    (part, i) => (i ? [...unknown(SPACE_MARK), ...encodePart(part)] : encodePart(part)));
  return {encode, pieceBytes: llamaBytes(first, pieces)};
}

// tiktoken's BPE: a pattern of OpenAI's splits the text into words, and merges stay within a word. letters:
// the character that stands for each byte in a piece. classes: the letters, numbers and spaces of the
// pattern, spelled out because browsers differ in their versions of Unicode.
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

// ---- shared by the encodings

const byteIds = (text) => Array.from(utf8.encode(text), (byte) => BYTES_AT + byte);

// Returns pieceBytes for ids as in llama2.c: three special ids, the 256 bytes (unless `first` is 3), and the
// pieces from id `first` on.
function llamaBytes(first, pieces) {
  return (id) => (BYTES_AT <= id && id < first ? Uint8Array.of(id - BYTES_AT)
    : utf8.encode((pieces[id - first] ?? '').replaceAll(SPACE_MARK, ' ')));
}

// Merges neighbours until no pair has a rank: the pair of the lowest rank first, of equals the leftmost. A
// heap holds the pairs as numbers, rank * 2 ** 32 + place; pairs that have changed since are skipped.
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
