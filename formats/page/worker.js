// Runs the model in a worker, so that the page never freezes.
//
// Messages from the page:
//   {type: 'load', about, weights}  once, first
//   {type: 'write', prompt, first, last, temperature, topP, seed, length}  first and last: sentences to write
//     between; else they are '', and the story continues the prompt
//   {type: 'stop'}
// Answers:
//   {type: 'ready', simd}  the model is loaded
//   {type: 'pieces', pieces, perSecond}  more of the story. A piece is [text, p, others]: its probability and
//     [text, p] of the most likely others; p is null if it was given and not written by the model
//   {type: 'done', reason}  end (the story is over), length, context (it is full) or stopped
//   {type: 'error', message}
'use strict';

let about, tokenizer, model, stopped;
const decoder = new TextDecoder();
const bytesOf = base64 => Uint8Array.fromBase64?.(base64) ??
  Uint8Array.from(atob(base64), letter => letter.charCodeAt(0));
// While `write` waits for nextTurn(), the event loop delivers messages such as `stop`. A message to ourselves
// arrives at once; browsers delay repeated timers.
const turn = new MessageChannel();
const nextTurn = () => new Promise(resolve => {
  turn.port1.onmessage = resolve;
  turn.port2.postMessage(0);
});

async function load(message) {
  about = message.about;
  let weights;
  try {  // 'deflate' is zlib's format, which has a checksum
    const packed = new Blob([bytesOf(message.weights)]).stream();
    weights = await new Response(packed.pipeThrough(new DecompressionStream('deflate'))).arrayBuffer();
  } catch {
    throw Error('This file is damaged: the model in it has changed. Download or copy it again.');
  }
  tokenizer = makeTokenizer(about.tokenizer);
  model = makeModel(about.config, about.tensors, new Uint8Array(weights), bytesOf(KERNEL));
  postMessage({type: 'ready', simd: model.simd});
}

async function write({prompt, first, last, temperature, topP, seed, length}) {
  const middle = Boolean(first && last), {delimiter, blank, middle: ending} = tokenizer;
  const head = [delimiter, ...tokenizer.encode(middle ? first : prompt)];
  const ids = middle ? infillPrompt(tokenizer, first, last) : head, room = about.blockSize - ids.length + 1;
  if (room < 1)
    throw Error(`That is ${ids.length} tokens, but the model reads at most ${about.blockSize}. Shorten it.`);
  const text = growing(tokenizer), alone = id => decoder.decode(tokenizer.pieceBytes(id));
  const most = middle ? Math.min(length, room) : length, begun = performance.now();
  let pieces = head.map(id => [text.add(id), null, []]), shown = begun, written = 0, reason = '';
  const settings = {suppress: [blank, ending], temperature, topP, seed, length: most};
  const show = () => {
    const seconds = (performance.now() - begun) / 1000;
    postMessage({type: 'pieces', pieces, perSecond: written / seconds});
    pieces = [];
  };
  for (const drawn of model.write(ids, settings)) {
    if (drawn?.id === delimiter) {
      reason = 'end';
      break;
    }
    if (drawn) {
      written++;
      pieces.push([text.add(drawn.id), drawn.p, drawn.others.map(([id, p]) => [alone(id), p])]);
    }
    if (performance.now() - shown > 30) {
      show();
      await nextTurn();
      shown = performance.now();
      if (stopped) {
        reason = 'stopped';
        break;
      }
    }
  }
  if (text.rest()) pieces.push(['\ufffd', null, []]);  // a character that was not completed
  show();
  postMessage({type: 'done', reason: reason || (most < length ? 'context' : 'length')});
}

onmessage = async ({data}) => {
  if (data.type === 'stop') return stopped = true;
  stopped = false;
  try {
    await {load, write}[data.type](data);
  } catch (error) {
    postMessage({type: 'error', message: error.message});
  }
};
