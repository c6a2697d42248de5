'use strict';
// What the reader sees. The model runs in a worker; worker.js lists the messages that are exchanged. Whatever
// people, models and files say becomes text nodes, never markup.
const $ = id => document.getElementById(id);
const about = JSON.parse($('about').textContent);
const form = $('form'), story = $('story'), colours = $('colours');
const numbers = ['temperature', 'topP', 'seed', 'length'].map($), sentences = ['first', 'last'].map($);
let worker, ready = false;  // ready: it has loaded the model
let writing = null, wanted = null;  // what the worker is writing, and what it is to write after that
let count, end;  // number of tokens the model has written; the node of the last sentence, if one was given

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
function fail(text) {  // the page cannot be used
  say(text, true);
  form.hidden = $('written').hidden = true;
}

// ---- the fields

function mistake(field) {
  if (field.type !== 'number') return field.value.trim() ? '' : 'Both sentences are needed.';
  const {valueAsNumber: value, min, max, step} = field, whole = step === '1';
  // what is not a number is NaN, which does not fit
  const fits = value >= min && value <= max && (!whole || Number.isInteger(value));
  return fits ? '' : `A ${whole ? 'whole ' : ''}number from ${min} to ${max}.`;
}
function tell(field, text) {
  $(`${field.id}-wrong`).textContent = text;
  field.ariaInvalid = text !== '';
}
function asked() {  // returns the fields as a message for the worker, or undefined if one is wrong
  const middle = $('middle').checked, fields = middle ? [...sentences, ...numbers] : numbers;
  for (const field of fields) tell(field, mistake(field));
  const wrong = fields.find(mistake);
  if (wrong) return void wrong.focus();
  const [first, last] = sentences.map(field => middle ? field.value.trim() : '');
  const settings = Object.fromEntries(numbers.map(field => [field.id, field.valueAsNumber]));
  return {type: 'write', prompt: middle ? '' : $('prompt').value, first, last, ...settings};
}
function write(further) {  // `further` is added to the seed
  const message = asked();
  if (!message) return;
  message.seed = $('seed').value = (message.seed + further) % (Number($('seed').max) + 1);
  stop();  // if a story is being written, the new one begins when it has ended
  wanted = message;
  if (!ready) say('Loading the model … The story will begin as soon as it is ready.');
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

// ---- the story

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
  // if little of the story would be seen, make room for it
  if (innerHeight - story.getBoundingClientRect().top < 320) $('buttons').scrollIntoView();
}
function finish(text, wrong) {
  if (end && !/\s$/.test(story.textContent.slice(0, -end.textContent.length))) end.before(' ');
  writing = null;
  story.ariaBusy = false;
  $('stop').ariaDisabled = true;
  say(text, wrong);
  if (wanted) begin();
}
const pieceOf = new WeakMap();  // {node of a token: the piece that the worker sent}
function append(piece) {
  const [text, p] = piece, kind = text === '' ? 'part' : /^\n+$/.test(text) ? 'break' : '';
  if (p === null) return story.insertBefore(el('b', '', text), end);
  const node = story.insertBefore(el('span', `piece ${kind} ${p < 0.1 ? 'rare' : ''}`, text), end);
  node.style.setProperty('--heat', `${90 * (1 - p)}%`);
  pieceOf.set(node, piece);
  if (colours.checked) makeReachable(node);
  count += 1;
}
function makeReachable(node) {  // Tab reaches one token; from there `go` moves by arrow keys
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

// ---- the tip: what else could have come

const percent = p => `${(100 * p).toFixed(p > 0.095 && p < 0.995 ? 0 : 1)}%`;
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
function stay({target}) {  // Tab comes back to the token that was last in focus
  story.querySelector('[tabindex="0"]').tabIndex = -1;
  target.tabIndex = 0;
}

// ---- the worker's answers

const OVER = {end: () => 'The story is finished.',
  length: () => `Stopped at the length of ${writing.length} tokens.`,
  context: () => `Stopped: the model can see only ${about.blockSize} tokens at once.`,
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
    if (count) $('speed').textContent = `${count} tokens, ${speed} per second`;
  },
  done: ({reason}) => finish(OVER[reason]()),
  error({message}) {
    if (!ready) return fail(message);
    if (!count) story.replaceChildren();  // it holds only what was given
    finish(message, true);
  },
};
function load() {
  if (!$('end')) return fail('This file is incomplete. Download or copy it again.');
  try {
    const program = new Blob([$('worker').textContent], {type: 'text/javascript'});
    const url = URL.createObjectURL(program);
    worker = new Worker(url);
    worker.onmessage = ({data}) => {
      URL.revokeObjectURL(url);  // not earlier: some browsers would not have read it yet
      hear[data.type](data);
    };
  } catch {
    return fail('This browser does not let a page from a file start a worker, which the model needs.');
  }
  worker.onerror = ({message}) =>
    hear.error({message: `The model stopped with an error: ${message || 'it did not start'}`});
  worker.postMessage({type: 'load', about, weights: $('weights').textContent});
  $('weights').textContent = '';  // the worker has them now, and they may be tens of megabytes
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
document.addEventListener('pointerdown', hideTip);  // a finger outside the story hides it, too
document.addEventListener('keydown', ({key}) => {
  if (key !== 'Escape') return;
  hideTip();
  stop();
});
document.addEventListener('DOMContentLoaded', load);  // the weights are at the end of the file
