// The model of the page: the forward pass of model.py for one token at a time, sampling, and writing.
//
// Vectors and matrices are in one WebAssembly.Memory, and a pointer is a byte offset into it. Weights are
// int8, activations are rounded to int16 before each matrix product, everything else is float32.
'use strict';

// The functions of kernel.wat in plain JavaScript, for a browser without SIMD. kernel.wat explains them.
function plainKernel(memory) {
  const int8 = new Int8Array(memory.buffer), int16 = new Int16Array(memory.buffer);
  const float = new Float32Array(memory.buffer);
  return {
    product(w, scale, x, xScale, y, rows, columns) {
      for (let row = 0; row < rows; row++, w += columns) {
        let sum = 0;
        for (let i = 0; i < columns; i++) sum += int8[w + i] * int16[x / 2 + i];
        float[y / 4 + row] = sum * Math.fround(float[scale / 4 + row] * xScale);
      }
    },
    round(x, out, count, levels) {
      const at = float.subarray(x / 4, x / 4 + count);
      const factor = Math.min(levels / at.reduce((most, value) => Math.max(most, Math.abs(value)), 0), 1e30);
      int16.set(at.map(value => Math.round(value * factor)), out / 2);
      return 1 / factor;
    },
    gated(gate, up, out, count) {
      for (let i = 0; i < count; i++)
        float[out / 4 + i] = float[gate / 4 + i] / (1 + Math.exp(-float[gate / 4 + i])) * float[up / 4 + i];
    },
    attend(q, key, value, shares, out, count, stride, bytes) {
      const share = float.subarray(shares / 4, shares / 4 + count), n = bytes / 4, step = stride / 4;
      const dot = t => {
        let sum = 0;
        for (let i = 0; i < n; i++) sum += float[q / 4 + i] * float[key / 4 + t * step + i];
        return sum;
      };
      share.forEach((_, t) => share[t] = dot(t));
      const most = Math.max(...share);
      const sum = share.reduce((sum, score, t) => sum + (share[t] = Math.exp(score - most)), 0);
      for (let i = 0; i < n; i++)
        float[out / 4 + i] = share.reduce((mix, part, t) => mix + part * float[value / 4 + t * step + i], 0)
          / sum;
    },
    above(x, count, least) {
      let sum = 0;
      for (let i = 0; i < count; i++) if (float[x / 4 + i] > least) sum += float[x / 4 + i];
      return sum;
    },
    exponentials(x, out, count, most, factor) {
      let sum = 0;
      for (let i = 0; i < count; i++)
        sum += float[out / 4 + i] = Math.exp(Math.max(Math.min(factor * (float[x / 4 + i] - most), 87), -87));
      return sum;
    },
  };
}

// Returns whether this browser can run kernel.wasm.
const hasSimd = wasm => typeof WebAssembly === 'object' && WebAssembly.validate(wasm);

// Makes the model: {forward, write, simd}.
//
// config: the values of GPTConfig, by its names. tensors: [name, shape] of each weight, in the order in which
// they are in `bytes`: a matrix as int8 numbers and then a bfloat16 scale for each row, anything else as
// float32. wasm: the bytes of kernel.wasm.
function makeModel(config, tensors, bytes, wasm) {
  const {n_embd: width, n_head: heads, n_kv_head: kvHeads, n_layer: layers, block_size: context} = config;
  const headWidth = width / heads, up = (n, unit) => Math.ceil(n / unit) * unit;
  const headBytes = 4 * up(headWidth, 4), kvBytes = kvHeads * headBytes;
  let end = 0, from = 0;
  const room = size => (end = up(end, 16) + size) - size;
  const matrices = {}, vectors = {};
  for (const [name, shape] of tensors) {
    if (shape.length === 1) {
      vectors[name] = new Float32Array(bytes.slice(from, from += 4 * shape[0]).buffer);
    } else {
      const [rows, columns] = shape, size = {rows: up(rows, 4), columns: up(columns, 8)};
      matrices[name] = {...size, shape, from, w: room(size.rows * size.columns), scale: room(4 * size.rows)};
      from += rows * columns + 2 * rows;
    }
  }
  if (from !== bytes.length) throw Error(`The model has ${bytes.length} bytes instead of ${from}.`);
  const widest = Math.max(...Object.values(matrices).map(matrix => Math.max(matrix.columns, matrix.rows)));
  const keys = Array.from({length: layers}, () => room(context * kvBytes));
  const values = keys.map(() => room(context * kvBytes));
  const [x, normed, attended, gate, hidden] =
    [width, width, width, widest, widest].map(n => room(4 * up(n, 8)));
  const [rounded, y, queries, shares, chances] =
    [2 * widest, 4 * widest, heads * headBytes, 4 * context + 16, 4 * widest].map(room);
  const memory = new WebAssembly.Memory({initial: Math.ceil(end / 65536) + 1});
  const kernel = hasSimd(wasm) ? new WebAssembly.Instance(new WebAssembly.Module(wasm),
    {page: {memory}}).exports : plainKernel(memory);
  const int8 = new Int8Array(memory.buffer), int16 = new Int16Array(memory.buffer);
  const float = new Float32Array(memory.buffer);
  const floats = (at, length) => float.subarray(at / 4, at / 4 + length);

  for (const {shape: [rows, columns], ...matrix} of Object.values(matrices)) {
    for (let row = 0; row < rows; row++)
      int8.set(bytes.subarray(matrix.from + row * columns, matrix.from + (row + 1) * columns),
        matrix.w + row * matrix.columns);
    const scales = matrix.from + rows * columns, bits = new Uint32Array(memory.buffer, matrix.scale, rows);
    for (let row = 0; row < rows; row++)
      bits[row] = bytes[scales + 2 * row] << 16 | bytes[scales + 2 * row + 1] << 24;
  }
  const head = matrices['lm_head.weight'] ?? matrices['embedding.weight'];
  const logits = floats(y, head.shape[0]), stream = floats(x, width);

  function addRow({w, scale, columns}, row, x) {
    for (let i = 0; i < x.length; i++) x[i] += int8[w + row * columns + i] * float[scale / 4 + row];
  }
  // Rounds the n numbers at x to integers for the products that follow, as finely as their 32-bit sums allow.
  // Returns the scale.
  const round = (x, n) => kernel.round(x, rounded, up(n, 8), Math.min(2 ** 31 / (127 * n), 2 ** 15) - 1);
  // Multiplies a matrix with the vector that `round` rounded last. Returns the result, which is at `out`.
  function product({w, scale, rows, columns, shape}, xScale, out = y, bias) {
    kernel.product(w, scale, rounded, xScale, out, rows, columns);
    const result = floats(out, shape[0]);
    if (bias) for (let i = 0; i < result.length; i++) result[i] += bias[i];
    return result;
  }
  const part = name => ({  // the weights of a linear layer or a norm
    matrix: matrices[`${name}.weight`], weight: vectors[`${name}.weight`], bias: vectors[`${name}.bias`]});
  const blocks = keys.map((_, layer) => {
    const names = ['attn_norm', 'attn.q', 'attn.k', 'attn.v', 'attn.q_norm', 'attn.k_norm', 'attn.proj',
      'mlp_norm', 'mlp.gate', 'mlp.up', 'mlp.proj'];
    return Object.fromEntries(names.map(name => [name, part(`blocks.${layer}.${name}`)]));
  });
  const lastNorm = part('norm'), linear = ({matrix, bias}, xScale, out) => product(matrix, xScale, out, bias);

  function norm({weight, bias}, x, out = x) {
    const n = x.length;
    let mean = 0, squares = 0;
    if (config.norm === 'layer') {
      for (let i = 0; i < n; i++) mean += x[i];
      mean /= n;
    }
    for (let i = 0; i < n; i++) squares += (x[i] - mean) ** 2;
    const factor = 1 / Math.sqrt(squares / n + config.norm_eps);
    for (let i = 0; i < n; i++) out[i] = (x[i] - mean) * factor * weight[i] + (bias ? bias[i] : 0);
  }
  const angles = (n, base, t) => Array.from({length: n / 2}, (_, i) => t * base ** (-2 * i / n));
  const rotation = Array.from({length: config.position === 'rope' ? context : 0}, (_, t) => {
    const angle = angles(headWidth, config.rope_theta, t);
    return [Float32Array.from(angle, Math.cos), Float32Array.from(angle, Math.sin)];
  });
  // Copies the heads in x to `to`, where each begins headBytes after the one before. On the way they are
  // normalised (qk_norm) and rotated (rope) for position t if the model does so, and multiplied by `factor`.
  function place(x, to, t, ownNorm, factor = 1) {
    for (let from = 0, at = to / 4; from < x.length; from += headWidth, at += headBytes / 4) {
      for (let i = 0; i < headWidth; i++) float[at + i] = x[from + i];
      if (ownNorm && config.qk_norm) norm(ownNorm, float.subarray(at, at + headWidth));
      if (ownNorm && config.position === 'rope') {
        const [cos, sin] = rotation[t], half = headWidth / 2;
        for (let i = 0; i < half; i++) {
          const a = float[at + i], b = float[at + half + i];
          float[at + i] = a * cos[i] - b * sin[i];
          float[at + half + i] = b * cos[i] + a * sin[i];
        }
      }
      for (let i = 0; i < headWidth; i++) float[at + i] *= factor;
    }
  }
  function attend(layer, count) {
    for (let head = 0; head < heads; head++) {
      const kv = Math.floor(head / (heads / kvHeads)) * headBytes;
      kernel.attend(queries + head * headBytes, keys[layer] + kv, values[layer] + kv, shares,
        attended + 4 * head * headWidth, count, kvBytes, headBytes);
    }
  }
  const activations = {
    gelu: x => x / (1 + Math.exp(-2 * Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
    relu: x => Math.max(x, 0), relu2: x => Math.max(x, 0) ** 2,
  };
  const activation = activations[config.mlp];
  function add(more) {
    for (let i = 0; i < width; i++) stream[i] += more[i];
  }
  function normalised(norms) {  // normalises and rounds the residual stream; returns the scale
    norm(norms, stream, floats(normed, width));
    return round(normed, width);
  }

  // Reads token `id` at position t, after those at 0 to t - 1. Returns the logits of the next token if they
  // are wanted; the array is overwritten by the next call.
  function forward(id, t, wanted = true) {
    stream.fill(0);
    addRow(matrices['embedding.weight'], id, stream);
    if (config.position === 'learned') {
      addRow(matrices['position.weight'], t, stream);
    } else if (config.position === 'sinusoidal') {
      const angle = angles(width, 10000, t);
      for (let i = 0; i < width; i++)
        stream[i] = stream[i] * Math.sqrt(width) + (i % 2 ? Math.cos : Math.sin)(angle[i >> 1]);
    }
    for (let layer = 0; layer < layers; layer++) {
      const block = blocks[layer];
      let scale = normalised(block.attn_norm);
      place(linear(block['attn.q'], scale), queries, t, block['attn.q_norm'], 1 / Math.sqrt(headWidth));
      place(linear(block['attn.k'], scale), keys[layer] + t * kvBytes, t, block['attn.k_norm']);
      place(linear(block['attn.v'], scale), values[layer] + t * kvBytes, t);
      attend(layer, t + 1);
      add(linear(block['attn.proj'], round(attended, width)));
      scale = normalised(block.mlp_norm);
      const inner = linear(block['mlp.up'], scale);
      if (config.mlp === 'swiglu') {
        linear(block['mlp.gate'], scale, gate);
        kernel.gated(gate, y, hidden, up(inner.length, 4));
      } else {
        for (let i = 0; i < inner.length; i++) float[hidden / 4 + i] = activation(inner[i]);
      }
      add(linear(block['mlp.proj'], round(hidden, inner.length)));
    }
    return wanted ? product(head, normalised(lastNorm)) : null;
  }

  // Samples a token from the logits. Returns {id, p, others}: its probability at temperature 1, and [id, p]
  // of the four most likely others. Temperature 0 is greedy. topP keeps the smallest set of most likely
  // tokens whose probability reaches it (Holtzman et al. 2019): a token outside the set is sampled again.
  function draw(suppress, temperature, topP, random) {
    const best = [], n = logits.length, count = up(n, 4), p = floats(chances, n);
    for (const id of suppress) logits[id] = -Infinity;
    floats(y, count).fill(-Infinity, n);
    for (let id = 0, fifth = -Infinity; id < n; id++) {
      if (!(logits[id] > fifth)) continue;
      let i = Math.min(best.length, 4);
      for (; i > 0 && logits[id] > logits[best[i - 1]]; i--) best[i] = best[i - 1];
      best[i] = id;
      if (best.length === 5) fifth = logits[best[4]];
    }
    const most = logits[best[0]];
    if (!Number.isFinite(most)) throw Error('The predictions are not numbers: the weights are broken.');
    let id = best[0];
    if (temperature > 0) {
      const sum = kernel.exponentials(y, chances, count, most, 1 / temperature);
      for (let likelier = Infinity; likelier >= topP * sum;) {
        let left = random() * sum, i = 0;
        while (i < n - 1 && (left -= p[i]) >= 0) i++;
        id = i;
        likelier = topP < 1 ? kernel.above(chances, count, p[id]) : 0;
      }
    }
    const all = kernel.exponentials(y, chances, count, most, 1), share = id => [id, p[id] / all];
    return {id, p: p[id] / all, others: best.filter(other => other !== id).slice(0, 4).map(share)};
  }

  // Continues a prompt (ids) by at most `length` tokens. Yields what `draw` returns, and null after each
  // token that the model has read. When the context is full, its last half is read again, as in
  // core/generate.py.
  function* write(prompt, {suppress, temperature, topP, seed, length}) {
    const random = generator(seed), all = [...prompt];
    let read = 0, t = 0;  // tokens of `all` that the model has read, and how many of them are in its context
    for (let written = 0; written < length; written++) {
      if (t + all.length - read > context) {
        read = all.length - Math.max(Math.floor(context / 2), 1);
        t = 0;
      }
      for (; read < all.length; read++, t++) {
        forward(all[read], t, read === all.length - 1);
        yield null;
      }
      const drawn = draw(suppress, temperature, topP, random);
      all.push(drawn.id);
      yield drawn;
    }
  }
  return {forward, write, simd: hasSimd(wasm)};
}

// Returns a generator of random numbers from 0 to below 1: splitmix32.
function generator(seed) {
  let state = (seed ^ Math.floor(seed / 2 ** 32)) | 0;
  return () => {
    state = state + 0x9e3779b9 | 0;
    let z = state ^ state >>> 16;
    z = Math.imul(z, 0x21f0aaad);
    z = Math.imul(z ^ z >>> 15, 0x735a2d97);
    return ((z ^ z >>> 15) >>> 0) / 2 ** 32;
  };
}
