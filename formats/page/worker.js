// What runs beside the page, so that it never freezes: takes its messages, answers with pieces of a story.
'use strict';

let about, tokenizer, model, stopped;
const decoder = new TextDecoder();
const bytesOf = base64 => Uint8Array.fromBase64?.(base64) ??
  Uint8Array.from(atob(base64), letter => letter.charCodeAt(0));
const turn = new MessageChannel();  // in a turn of the event loop, messages such as `stop` come in
const nextTurn = () => new Promise(resolve => {
  turn.port1.onmessage = resolve;
  turn.port2.postMessage(0);
});

async function load(message) {
  about = message.about;
  let weights;
  try {  // zlib's form, which has a sum to check by
    const packed = new Blob([bytesOf(message.weights)]).stream();
    weights = await new Response(packed.pipeThrough(new DecompressionStream('deflate'))).arrayBuffer();
  } catch {
    throw Error('This file is damaged: its model is not the one that was written. Get it once more.');
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
    throw Error(`That is ${ids.length} tokens; the model reads no more than ${about.blockSize}. Shorten it.`);
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
  if (text.rest()) pieces.push(['\ufffd', null, []]);  // a character that was not finished
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
