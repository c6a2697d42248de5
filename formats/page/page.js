'use strict';
// What one sees. The model is in a worker: worker.js says which messages go to and fro. Whatever people,
// models and files say becomes text nodes, never markup.
const $ = id => document.getElementById(id);
const about = JSON.parse($('about').textContent);
const form = $('form'), story = $('story'), colours = $('colours');
const numbers = ['temperature', 'topP', 'seed', 'length'].map($), sentences = ['first', 'last'].map($);
let worker, ready = false;  // it has loaded the model
let writing = null, wanted = null;  // what was asked of it: the story being written, and the one after
let count, end;  // of the story: tokens the model wrote, and the node of the last sentence, if it was given

function el(name, className, text) {
  const node = document.createElement(name);
  node.className = className;
  node.textContent = text;
  return node;
}
function say(text, wrong = false) {
  $('status').textContent = text;
  $('status').classList.toggle('wrong', wrong);
}
function fail(text) {  // nothing can be written here
  say(text, true);
  form.hidden = $('written').hidden = true;
}

// The fields

function mistake(field) {
  if (field.type !== 'number') return field.value.trim() ? '' : 'A middle needs both sentences.';
  const {valueAsNumber: value, min, max, step} = field, whole = step === '1';
  const fits = value >= min && value <= max && (!whole || Number.isInteger(value));  // what is no number: NaN
  return fits ? '' : `A ${whole ? 'whole ' : ''}number from ${min} to ${max}.`;
}
function tell(field, text) {
  $(`${field.id}-wrong`).textContent = text;
  field.ariaInvalid = text !== '';
}
function asked() {  // the fields as the worker wants them, or undefined where one is wrong
  const middle = $('middle').checked, fields = middle ? [...sentences, ...numbers] : numbers;
  for (const field of fields) tell(field, mistake(field));
  const wrong = fields.find(mistake);
  if (wrong) return void wrong.focus();
  const [first, last] = sentences.map(field => middle ? field.value.trim() : '');
  const settings = Object.fromEntries(numbers.map(field => [field.id, field.valueAsNumber]));
  return {type: 'write', prompt: middle ? '' : $('prompt').value, first, last, ...settings};
}
function write(further) {  // with a seed so much further
  const message = asked();
  if (!message) return;
  message.seed = $('seed').value = (message.seed + further) % (Number($('seed').max) + 1);
  stop();  // what is being written: this one begins when that has ended
  wanted = message;
  if (!ready) say('Loading the model … The story begins as soon as it is there.');
  else if (!writing) begin();
}
function stop() {
  wanted = null;
  if (writing) worker.postMessage({type: 'stop'});
}
function choose() {
  $('beginning').hidden = $('middle').checked;
  $('ends').hidden = !$('middle').checked;
}

// The story

function begin() {
  [writing, wanted, count, end] = [wanted, null, 0, null];
  story.replaceChildren();
  hideTip();
  if (writing.last) story.append(end = el('b', 'last', writing.last));
  story.ariaBusy = true;
  $('stop').ariaDisabled = false;
  $('speed').textContent = '';
  say('Writing …');
  worker.postMessage(writing);
  if (innerHeight - story.getBoundingClientRect().top < 320) $('buttons').scrollIntoView();  // room for it
}
function finish(text, wrong) {
  if (end && !/\s$/.test(story.textContent.slice(0, -end.textContent.length))) end.before(' ');
  writing = null;
  story.ariaBusy = false;
  $('stop').ariaDisabled = true;
  say(text, wrong);
  if (wanted) begin();
}
const pieceOf = new WeakMap();  // of a token's node: the token as the worker tells it
function append(piece) {
  const [text, p] = piece, kind = text === '' ? 'part' : /^\n+$/.test(text) ? 'break' : '';
  if (p === null) return story.insertBefore(el('b', '', text), end);
  const node = story.insertBefore(el('span', `piece ${kind} ${p < 0.1 ? 'rare' : ''}`, text), end);
  node.style.setProperty('--heat', `${90 * (1 - p)}%`);
  pieceOf.set(node, piece);
  if (colours.checked) makeReachable(node);
  count += 1;
}
function makeReachable(node) {  // Tab stops at one token, arrow keys go on from there: see `go`
  node.role = 'button';
  node.tabIndex = story.querySelector('[tabindex="0"]') ? -1 : 0;
}
function colour() {
  story.classList.toggle('coloured', colours.checked);
  hideTip();
  for (const node of story.querySelectorAll('.piece'))
    if (colours.checked) makeReachable(node);
    else for (const name of ['role', 'tabindex']) node.removeAttribute(name);
}

// The tip

const percent = p => `${(100 * p).toFixed(p > 0.095 && p < 0.995 ? 0 : 1)} %`;
const visible = text => text.replaceAll('\n', '↵').replaceAll(' ', '␣') || '(part of a character)';
function showTip({target}) {
  if (!colours.checked || !pieceOf.has(target)) return;
  const [text, p, others] = pieceOf.get(target), tip = $('tip'), box = target.getClientRects()[0];
  const lines = [[text, p], ...others].map(([text, p]) => `${visible(text)}: ${percent(p)}`);
  tip.textContent = lines.join('\nor ');
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = box.bottom + 4, above = box.top - tip.offsetHeight - 4;
  tip.style.left = `${scrollX + Math.max(8, left)}px`;
  tip.style.top = `${scrollY + (below + tip.offsetHeight < innerHeight ? below : above)}px`;
}
function hideTip() {
  $('tip').textContent = '';
}
function go({key, target}) {
  const next = {ArrowRight: target.nextSibling, ArrowLeft: target.previousSibling}[key];
  if (pieceOf.has(next)) next.focus();
}
function stay({target}) {  // Tab comes back to where one was
  story.querySelector('[tabindex="0"]').tabIndex = -1;
  target.tabIndex = 0;
}

// What the worker says

const OVER = {end: () => 'The story is over.', length: () => `Cut at the length of ${writing.length} tokens.`,
  context: () => `Cut: the model sees ${about.blockSize} tokens at once, and these are full.`,
  stopped: () => 'Stopped.'};
const hear = {
  ready({simd}) {
    ready = true;
    $('slow').hidden = simd;
    say('Ready to write.');
    if (wanted) begin();
  },
  pieces({pieces, perSecond}) {
    pieces.forEach(append);
    const speed = perSecond.toFixed(perSecond < 10 ? 1 : 0);
    if (count) $('speed').textContent = `${count} tokens, ${speed} a second`;
  },
  done: ({reason}) => finish(OVER[reason]()),
  error({message}) {
    if (!ready) return fail(message);
    if (!count) story.replaceChildren();  // nothing but what was given
    finish(message, true);
  },
};
function load() {
  if (!$('end')) return fail('This file is not whole: its download or copying broke off. Get it once more.');
  try {
    const program = new Blob([$('worker').textContent], {type: 'text/javascript'});
    const url = URL.createObjectURL(program);
    worker = new Worker(url);
    worker.onmessage = ({data}) => {
      URL.revokeObjectURL(url);  // not before it has begun: not every browser has read it by then
      hear[data.type](data);
    };
  } catch {
    return fail('This browser lets no page from a file start a worker, in which the model would run.');
  }
  worker.onerror = ({message}) =>
    hear.error({message: `The model's program failed: ${message || 'it did not start'}`});
  worker.postMessage({type: 'load', about, weights: $('weights').textContent});
  $('weights').textContent = '';  // tens of megabytes, which the worker has now
}

$('title').textContent = document.title = about.title;
$('prompt').value = about.prompt;
$('seed').value = about.seed;
$('ways').hidden = !about.infill;
for (const [label, fact] of about.facts) {
  const both = el('div', '', fact);
  both.prepend(el('small', '', label));
  $('facts').append(both);
}
form.onsubmit = event => {
  event.preventDefault();
  write(0);
};
form.oninput = ({target}) => $(`${target.id}-wrong`) && tell(target, '');
form.onkeydown = event => {
  if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  form.requestSubmit();
};
$('ways').onchange = choose;
$('again').onclick = () => write(1);
$('stop').onclick = stop;
colours.onchange = colour;
story.onkeydown = go;
story.addEventListener('focusin', stay);
for (const type of ['pointerover', 'focusin', 'click']) story.addEventListener(type, showTip);
for (const type of ['pointerout', 'focusout']) story.addEventListener(type, hideTip);
document.addEventListener('pointerdown', hideTip);  // a finger beside the story, too
document.addEventListener('keydown', ({key}) => {
  if (key !== 'Escape') return;
  hideTip();
  stop();
});
document.addEventListener('DOMContentLoaded', load);  // the weights come last
