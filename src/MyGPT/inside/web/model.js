// The forward pass of GPT-2, in the order of MyGPT's model.py, with a KV cache and without any library.
//
// T tokens, C embedding width, H heads, D = C / H, L layers, V vocabulary size. Activations are Float64Arrays that hold
// one row per token. Weights are Float32Arrays that hold one row per output, as in torch's nn.Linear.

// ---- Weights ----

// Return a Map from the names of the tensors to { values, rows, columns }. Each tensor of the page is an object
// { name, type, shape, text } with the bytes in base64. An int8 matrix has a tensor NAME.scale with one scale per row.
function unpackWeights(tensors) {
  const unpacked = new Map();
  for (const { name, type, shape, text } of tensors) {
    const columns = shape[shape.length - 1];
    unpacked.set(name, { values: toFloat32(bytesOf(text), type), rows: shape.length > 1 ? shape[0] : 1, columns });
  }
  for (const [name, { values: scales }] of unpacked) {
    if (!name.endsWith(".scale")) continue;
    const { values, columns } = unpacked.get(name.slice(0, -".scale".length));
    for (let i = 0; i < values.length; i++) values[i] *= scales[Math.floor(i / columns)];
  }
  return unpacked;
}

// Decode base64. The text is cut into pieces, so that no long string of bytes is needed at once.
function bytesOf(base64) {
  const padding = base64.endsWith("==") ? 2 : base64.endsWith("=") ? 1 : 0;
  const bytes = new Uint8Array(base64.length / 4 * 3 - padding);
  const step = 1 << 18;
  for (let start = 0, i = 0; start < base64.length; start += step) {
    const piece = atob(base64.slice(start, start + step));
    for (let j = 0; j < piece.length; j++) bytes[i++] = piece.charCodeAt(j);
  }
  return bytes;
}

// Return the numbers that the bytes of a tensor stand for. The bytes are little-endian, as in every browser.
function toFloat32(bytes, type) {
  if (type === "float32") return new Float32Array(bytes.buffer);
  if (type === "int8") return new Float32Array(new Int8Array(bytes.buffer));
  const table = halfFloats(), halves = new Uint16Array(bytes.buffer), values = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) values[i] = table[halves[i]]; // ten times as fast as Float32Array.from
  return values;
}

// Return the values of all 65,536 float16 numbers: 1 bit for the sign, 5 for the exponent and 10 for the fraction.
let halfFloatTable = null;
function halfFloats() {
  if (halfFloatTable) return halfFloatTable;
  halfFloatTable = Float32Array.from({ length: 65536 }, (_, bits) => {
    const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = (bits & 1023) / 1024;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent === 0 ? fraction * 2 ** -14 : (1 + fraction) * 2 ** (exponent - 15));
  });
  return halfFloatTable;
}

// ---- The parts of a layer ----

// Return x Wᵀ + b for n rows of x. Two rows of x and four rows of W are multiplied at a time, because each number that is
// loaded then takes part in several products, and the sums do not wait for each other.
function linear(x, n, { values: W, rows, columns }, bias = null) {
  const y = new Float64Array(n * rows);
  let row = 0;
  for (; row + 1 < n; row += 2) multiplyTwo(x, row * columns, W, rows, columns, y, row * rows);
  if (row < n) multiplyOne(x, row * columns, W, rows, columns, y, row * rows);
  if (bias) {
    for (let start = 0; start < y.length; start += rows)
      for (let i = 0; i < rows; i++) y[start + i] += bias.values[i];
  }
  return y;
}

// Multiply one row of x, which starts at index p, by all rows of W. The results are stored in y from index `to`.
function multiplyOne(x, p, W, rows, columns, y, to) {
  let r = 0;
  for (; r + 3 < rows; r += 4) {
    const a = r * columns, b = a + columns, c = b + columns, d = c + columns;
    let sumA = 0, sumB = 0, sumC = 0, sumD = 0;
    for (let i = 0; i < columns; i++) {
      const v = x[p + i];
      sumA += v * W[a + i];
      sumB += v * W[b + i];
      sumC += v * W[c + i];
      sumD += v * W[d + i];
    }
    y[to + r] = sumA;
    y[to + r + 1] = sumB;
    y[to + r + 2] = sumC;
    y[to + r + 3] = sumD;
  }
  for (; r < rows; r++) y[to + r] = dot(x, p, W, r * columns, columns);
}

// Multiply two adjacent rows of x in the same way.
function multiplyTwo(x, p, W, rows, columns, y, to) {
  const q = p + columns, next = to + rows;
  let r = 0;
  for (; r + 3 < rows; r += 4) {
    const a = r * columns, b = a + columns, c = b + columns, d = c + columns;
    let sumA = 0, sumB = 0, sumC = 0, sumD = 0, nextA = 0, nextB = 0, nextC = 0, nextD = 0;
    for (let i = 0; i < columns; i++) {
      const v = x[p + i], u = x[q + i], wA = W[a + i], wB = W[b + i], wC = W[c + i], wD = W[d + i];
      sumA += v * wA;
      sumB += v * wB;
      sumC += v * wC;
      sumD += v * wD;
      nextA += u * wA;
      nextB += u * wB;
      nextC += u * wC;
      nextD += u * wD;
    }
    y[to + r] = sumA;
    y[to + r + 1] = sumB;
    y[to + r + 2] = sumC;
    y[to + r + 3] = sumD;
    y[next + r] = nextA;
    y[next + r + 1] = nextB;
    y[next + r + 2] = nextC;
    y[next + r + 3] = nextD;
  }
  for (; r < rows; r++) {
    y[to + r] = dot(x, p, W, r * columns, columns);
    y[next + r] = dot(x, q, W, r * columns, columns);
  }
}

function dot(x, p, y, q, n) {
  let sum = 0;
  for (let i = 0; i < n; i++) sum += x[p + i] * y[q + i];
  return sum;
}

// Return the mean and the variance of one row of C numbers.
function moments(x, start, C) {
  let mean = 0, variance = 0;
  for (let i = 0; i < C; i++) mean += x[start + i] / C;
  for (let i = 0; i < C; i++) variance += (x[start + i] - mean) ** 2 / C;
  return { mean, variance };
}

function layerNorm(x, n, weight, bias, eps) {
  const C = weight.columns, y = new Float64Array(n * C);
  for (let start = 0; start < n * C; start += C) {
    const { mean, variance } = moments(x, start, C), deviation = Math.sqrt(variance + eps);
    for (let i = 0; i < C; i++) y[start + i] = (x[start + i] - mean) / deviation * weight.values[i] + bias.values[i];
  }
  return y;
}

// The two forms of GELU: x Φ(x), where Φ is the distribution function of the normal distribution, and GPT-2's
// approximation with tanh.
const GELUS = {
  gelu: x => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  gelu_new: x => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x))),
};

// The error function, with an error below 1.5e-7 (Abramowitz and Stegun, 1964, formula 7.1.26).
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}

// Replace the numbers x[start], …, x[end - 1] by their softmax.
function softmax(x, start = 0, end = x.length) {
  let largest = -Infinity, sum = 0;
  for (let i = start; i < end; i++) largest = Math.max(largest, x[i]);
  for (let i = start; i < end; i++) sum += x[i] = Math.exp(x[i] - largest);
  for (let i = start; i < end; i++) x[i] /= sum;
  return x;
}

function add(x, y) {
  return x.map((value, i) => value + y[i]);
}

// ---- The model ----

class Model {
  // `config` has the names of Python's GPTConfig. `tensors` are those of unpackWeights.
  constructor(config, tensors) {
    const weights = unpackWeights(tensors);
    this.config = config;
    this.wte = weights.get("wte.weight");
    this.wpe = weights.get("wpe.weight");
    this.lnF = [weights.get("ln_f.weight"), weights.get("ln_f.bias")];
    this.head = weights.get("lm_head.weight") ?? this.wte; // a tied head shares the token embedding
    this.layers = Array.from({ length: config.n_layers }, (_, l) => {
      const pair = name => [weights.get(`h.${l}.${name}.weight`), weights.get(`h.${l}.${name}.bias`) ?? null];
      return {
        ln1: pair("ln_1"), qkv: pair("attn.c_attn"), attnProj: pair("attn.c_proj"),
        ln2: pair("ln_2"), fc: pair("mlp.c_fc"), mlpProj: pair("mlp.c_proj"),
      };
    });
  }

  // Return the sum of the token and position embeddings of ids at the positions start, start + 1, and so on.
  embed(ids, start) {
    const C = this.config.emb_dim, x = new Float64Array(ids.length * C);
    ids.forEach((id, t) => {
      for (let i = 0; i < C; i++) x[t * C + i] = this.wte.values[id * C + i] + this.wpe.values[(start + t) * C + i];
    });
    return x;
  }

  // Compute layer l for n tokens at the positions start, start + 1, and so on, and return all intermediate values.
  // `x` is the residual stream before the layer. `cache` holds the keys and values of the earlier tokens and receives
  // those of the new ones. `headsOff` has the numbers of the heads that add nothing.
  layer(l, x, n, start, cache, headsOff = []) {
    const { ln1, qkv: toQkv, attnProj, ln2, fc, mlpProj } = this.layers[l];
    const { emb_dim: C, layer_norm_eps: eps, activation } = this.config;
    const normed1 = layerNorm(x, n, ...ln1, eps);
    const qkv = linear(normed1, n, ...toQkv); // one row holds the query, the key and the value of all heads
    cache.store(qkv, n, start);
    const { weights, heads } = this.attention(qkv, n, start, cache, headsOff);
    const attention = linear(heads, n, ...attnProj);
    const afterAttention = add(x, attention);
    const normed2 = layerNorm(afterAttention, n, ...ln2, eps);
    const neurons = linear(normed2, n, ...fc).map(GELUS[activation]);
    const mlp = linear(neurons, n, ...mlpProj);
    const output = add(afterAttention, mlp);
    return { normed1, qkv, weights, heads, attention, afterAttention, normed2, neurons, mlp, output };
  }

  // Return the attention weights and the outputs of the heads for n queries. weights[t] has the weights of query t:
  // first those of head 0 over the tokens 0, …, start + t, then those of head 1, and so on.
  attention(qkv, n, start, { keys, values }, headsOff) {
    const { emb_dim: C, n_heads: H } = this.config, D = C / H, scale = 1 / Math.sqrt(D);
    const heads = new Float64Array(n * C), weights = [];
    for (let t = 0; t < n; t++) {
      const S = start + t + 1, w = new Float64Array(H * S);
      for (let h = 0; h < H; h++) {
        for (let s = 0; s < S; s++) w[h * S + s] = scale * dot(qkv, t * 3 * C + h * D, keys, s * C + h * D, D);
        softmax(w, h * S, (h + 1) * S);
        if (headsOff.includes(h)) continue;
        for (let s = 0; s < S; s++) {
          const weight = w[h * S + s], from = s * C + h * D, to = t * C + h * D;
          for (let i = 0; i < D; i++) heads[to + i] += weight * values[from + i];
        }
      }
      weights.push(w);
    }
    return { weights, heads };
  }

  // Return the logits of n rows of the residual stream. After the last layer, these are the model's own logits. After an
  // earlier layer, they are what the logit lens shows.
  logits(x, n) {
    const logits = linear(this.finalNorm(x, n), n, this.head);
    const wrong = logits.findIndex(value => !Number.isFinite(value));
    if (wrong >= 0) {
      const value = String(logits[wrong]).toLowerCase().replace("infinity", "inf");
      throw new Error(`a logit of the model is ${value}: the weights are damaged, or the training of the model diverged`);
    }
    return logits;
  }

  finalNorm(x, n) {
    return layerNorm(x, n, ...this.lnF, this.config.layer_norm_eps);
  }
}

// The keys and values of one layer for the tokens so far, (T, C) each. The arrays grow by doubling.
class LayerCache {
  constructor(C) {
    this.C = C;
    this.keys = this.values = new Float32Array(0);
  }

  // Store the keys and values of n tokens. `qkv` holds rows of queries, keys and values.
  store(qkv, n, start) {
    const C = this.C, end = (start + n) * C;
    if (end > this.keys.length) {
      const grown = old => {
        const array = new Float32Array(Math.max(end, 2 * old.length));
        array.set(old);
        return array;
      };
      this.keys = grown(this.keys);
      this.values = grown(this.values);
    }
    for (let t = 0; t < n; t++) {
      const row = t * 3 * C;
      this.keys.set(qkv.subarray(row + C, row + 2 * C), (start + t) * C);
      this.values.set(qkv.subarray(row + 2 * C, row + 3 * C), (start + t) * C);
    }
  }
}

// ---- A text that the model reads ----

const CHUNK = 32; // new tokens that are computed at a time, which limits the memory for intermediate values
const SHOWN = 128; // tokens whose attention weights are kept; MAX_TOKENS in page.py

// What the model computed for a text so far. `read` computes only the tokens that differ from the last text.
class Reading {
  // `headsOff` is a list of pairs [layer, head]. These heads add nothing to the residual stream.
  constructor(model, headsOff = []) {
    const { n_layers: L, emb_dim: C } = model.config;
    this.model = model;
    this.headsOff = Array.from({ length: L }, (_, l) => headsOff.filter(([layer]) => layer === l).map(([, head]) => head));
    this.ids = [];
    this.caches = Array.from({ length: L }, () => new LayerCache(C));
    this.residuals = []; // for each token, the residual stream after the embeddings and after each layer, (L + 1, C)
    this.attentionBytes = []; // for each token and layer, the weights of all heads over the tokens so far; 255 stands for 1
  }

  // Compute everything for the token ids of a text. If the text is a beginning of the last one, nothing is computed.
  read(ids) {
    let known = 0;
    while (known < ids.length && ids[known] === this.ids[known]) known++;
    if (known === ids.length) return;
    for (const list of [this.ids, this.residuals, this.attentionBytes]) list.length = known;
    for (let start = known; start < ids.length; start += CHUNK) this.compute(ids.slice(start, start + CHUNK), start);
  }

  compute(ids, start) {
    const { n_layers: L, emb_dim: C } = this.model.config, n = ids.length;
    const residuals = ids.map(() => new Float64Array((L + 1) * C)), bytes = ids.map(() => []);
    const keep = (x, depth) => residuals.forEach((rows, t) => rows.set(x.subarray(t * C, (t + 1) * C), depth * C));
    let x = this.model.embed(ids, start);
    keep(x, 0);
    for (let l = 0; l < L; l++) {
      const { output, weights } = this.model.layer(l, x, n, start, this.caches[l], this.headsOff[l]);
      x = output;
      keep(x, l + 1);
      weights.forEach((w, t) => {
        if (start + t < SHOWN) bytes[t].push(Uint8Array.from(w, p => Math.round(255 * p)));
      });
    }
    this.ids.push(...ids);
    this.residuals.push(...residuals);
    this.attentionBytes.push(...bytes);
  }

  // Return the residual stream of token t after `depth` layers, (C,).
  residual(t, depth) {
    const C = this.model.config.emb_dim;
    return this.residuals[t].subarray(depth * C, (depth + 1) * C);
  }

  // Return the logits of the token that follows token t, (V,).
  logits(t) {
    return this.model.logits(this.residual(t, this.model.config.n_layers), 1);
  }

  // Return the logits after the embeddings and after each layer, (L + 1, V).
  lens(t) {
    return this.model.logits(this.residuals[t], this.model.config.n_layers + 1);
  }
}
