// The worker's answers: the same JSON that Python's page_data, next_token_data and walk_data return, and sampled tokens.

const N_LENS = 5; // most likely tokens after each layer
const N_NEXT = 12; // most likely tokens in the prediction of the whole model
const N_SHOWN = 20; // most likely tokens in a distribution
const N_WALK = 8; // numbers of each tensor in a walk

class Answers {
  // `data` is what inside/live.py wrote into the page, and `tensors` are the packed weights.
  constructor(data, tensors) {
    this.data = data;
    this.model = new Model(data.config, tensors);
    this.tokenizer = makeTokenizer(data.tokenizer);
    this.readings = new Map(); // the last readings, by the heads that are switched off
    this.tops = new WeakMap(); // for each computed token, its most likely successors
  }

  label(id) {
    return this.tokenizer.label(id);
  }

  // Return a reading of the ids. Readings for two choices of heads are kept: usually none and the last one.
  reading(ids, headsOff = []) {
    const { context_length: T, vocab_size: V } = this.data.config;
    if (!ids.length) throw new Error("the text is empty; it must have at least one token");
    const wrong = ids.find(id => !Number.isInteger(id) || id < 0 || id >= V);
    if (wrong !== undefined) throw new Error(`token id ${wrong} is outside the model's vocabulary of ${V} tokens`);
    const { n_layers: L, n_heads: H } = this.data.config;
    for (const [layer, head] of headsOff) {
      checkNumber("layer", layer, L);
      checkNumber("head", head, H);
    }
    const key = JSON.stringify(headsOff), reading = this.readings.get(key) ?? new Reading(this.model, headsOff);
    this.readings.delete(key);
    this.readings.set(key, reading);
    if (this.readings.size > 2) this.readings.delete(this.readings.keys().next().value);
    reading.read(ids.slice(-T));
    return reading;
  }

  // Return the ids that fit on the page, which are the last ones of a long text.
  shown(ids) {
    return ids.slice(-Math.min(SHOWN, this.data.config.context_length));
  }

  // ---- read, decode and logits ----

  read(text) {
    const ids = this.tokenizer.encode(text);
    return { ids, tokens: ids.map(id => ({ id, label: this.label(id) })) };
  }

  decode(ids) {
    return this.tokenizer.decode(ids);
  }

  // Return the logits of the token that follows the ids, (V,).
  logits(ids, { heads_off: headsOff } = {}) {
    return Array.from(this.lastLogits(ids, headsOff));
  }

  // ---- inside: page_data in inside/page.py ----

  // `text` is a string or a list of ids.
  inside(text, { heads_off: headsOff = [] } = {}) {
    const ids = typeof text === "string" ? this.tokenizer.encode(text) : text;
    const shown = this.shown(ids), reading = this.reading(shown, headsOff);
    const { n_layers: L, n_heads: H } = this.data.config;
    const tokens = shown.map(id => ({ id, label: this.label(id) }));
    const tops = shown.map((_, t) => this.topsOf(reading, t));
    return {
      description: this.data.description,
      layers: L,
      heads: H,
      tokens,
      attention: attentionBase64(reading, L, H, shown.length),
      lens: Array.from({ length: L + 1 }, (_, depth) => tops.map(({ lens }) => lens[depth])),
      next: tops.map(({ next, all }, t) => ({ ...next, actual: t + 1 < shown.length ? actual(all, tokens[t + 1]) : null })),
      n_left_out: ids.length - shown.length,
    };
  }

  // Return the most likely successors of token t after each layer, and all probabilities after the last layer.
  topsOf(reading, t) {
    const key = reading.residuals[t];
    if (!this.tops.has(key)) {
      const V = this.data.config.vocab_size, logits = reading.lens(t);
      const depths = Array.from({ length: logits.length / V }, (_, depth) => probabilities(logits.subarray(depth * V, (depth + 1) * V)));
      const all = depths[depths.length - 1], top = this.mostLikely(all, N_NEXT);
      const rest = rounded(Math.max(0, 1 - top.reduce((sum, [, p]) => sum + p, 0)));
      const lens = depths.map(values => this.mostLikely(values, N_LENS).map(([label, p]) => [label, p]));
      this.tops.set(key, { lens, next: { top, rest }, all });
    }
    return this.tops.get(key);
  }

  mostLikely(values, k) {
    return topIndices(values, k).map(id => [this.label(id), rounded(values[id]), id]);
  }

  // ---- next and generate: next_token_data in inside/page.py ----

  lastLogits(ids, headsOff) {
    return this.reading(ids, headsOff).logits(Math.min(ids.length, this.data.config.context_length) - 1);
  }

  // Return the logits after the last id. Ids without a token are never generated, unless they end a text.
  nextLogits(ids, headsOff) {
    const logits = this.lastLogits(ids, headsOff);
    for (const [first, last] of this.data.excluded) logits.fill(-Infinity, first, last + 1);
    return logits;
  }

  next(ids, { heads_off: headsOff, ...sampling } = {}) {
    const logits = this.nextLogits(ids, headsOff), ofModel = probabilities(logits);
    const filtered = filterLogits(logits, sampling), sampled = probabilities(filtered);
    const isKept = i => filtered[i] > -Infinity;
    const isBetter = (i, j) => ofModel[i] > ofModel[j] || (ofModel[i] === ofModel[j] && isKept(i) && !isKept(j));
    const order = topIndices(ofModel, N_SHOWN, isBetter), shown = new Set(order);
    let kept = 0, nHidden = 0, hidden = 0, removed = 0;
    for (let i = 0; i < logits.length; i++) {
      if (!isKept(i)) removed += ofModel[i];
      else if (++kept && !shown.has(i)) {
        nHidden++;
        hidden += sampled[i];
      }
    }
    const tokens = order.map(i => [i, this.label(i), ofModel[i], sampled[i], isKept(i)]);
    return { tokens, n_kept: kept, n_hidden: nHidden, hidden, removed, vocab_size: logits.length };
  }

  // Sample the token after the ids. `step` is the number of tokens of this text that were sampled before it.
  sample(ids, { heads_off: headsOff, seed = 0, step = 0, ...sampling } = {}) {
    const id = drawToken(filterLogits(this.nextLogits(ids, headsOff), sampling), seed, step);
    if (this.data.ends.includes(id)) return { id, ends: true };
    return { id, label: this.label(id), text: this.tokenizer.textAfter(ids, id), ends: false };
  }

  // ---- walk: walk_data in inside/walk.py ----

  walk(ids, { layer: l, head: h, token: t, heads_off: headsOff = [] }) {
    const shown = this.shown(ids), reading = this.reading(shown, headsOff), model = this.model;
    const { n_layers: L, n_heads: H, emb_dim: C, vocab_size: V } = this.data.config;
    checkNumber("layer", l, L);
    checkNumber("head", h, H);
    checkNumber("token", t, shown.length);
    const T = shown.length, D = C / H, id = shown[t];
    const x = reading.residual(t, l).slice();
    const seen = model.layer(l, x, 1, t, reading.caches[l], reading.headsOff[l]);
    const last = reading.residual(t, L), logits = reading.logits(t);
    const { mean, variance } = moments(x, 0, C);
    const part = (array, start, n) => array.subarray(start, start + n);
    const q = part(seen.qkv, h * D, D), { keys } = reading.caches[l];
    const scores = Array.from({ length: t + 1 }, (_, s) => dot(q, 0, keys, s * C + h * D, D) / Math.sqrt(D));
    const norms = Array.from({ length: L + 1 }, (_, depth) => Math.sqrt(reading.residual(t, depth).reduce((sum, v) => sum + v * v, 0)));
    const tensor = (name, shape, row, n = N_WALK) => ({ name, shape, row: Array.from(row).slice(0, n).map(significant) });
    const top = (name, values) => ({
      name, shape: [V], top: topIndices(values, N_WALK).map(i => [this.label(i), significant(values[i]), i]),
    });
    const wte = part(model.wte.values, id * C, C), wpe = part(model.wpe.values, t * C, C);
    const steps = {
      ids: [tensor("ids", [T], shown, T)],
      embeddings: [tensor("wte", [T, C], wte), tensor("wpe", [T, C], wpe), tensor("embeddings", [T, C], reading.residual(t, 0))],
      ln_1: [
        tensor("x", [T, C], x), tensor("ln_1", [T, C], seen.normed1),
        tensor("mean", [], [mean]), tensor("std", [], [Math.sqrt(variance)]),
      ],
      qkv: ["q", "k", "v"].map((name, i) => tensor(name, [T, D], part(seen.qkv, i * C + h * D, D))),
      scores: [tensor("scores", [T, T], scores, T)],
      weights: [tensor("weights", [T, T], part(seen.weights[0], h * (t + 1), t + 1), T)],
      head: [tensor("head", [T, D], part(seen.heads, h * D, D))],
      attention: [tensor("attn", [T, C], seen.attention), tensor("after_attn", [T, C], seen.afterAttention)],
      mlp: [
        tensor("ln_2", [T, C], seen.normed2), tensor("activations", [T, 4 * C], seen.neurons),
        tensor("mlp", [T, C], seen.mlp), tensor("after_mlp", [T, C], seen.output),
      ],
      layers: [tensor("norms", [L + 1], norms, L + 1)],
      ln_f: [tensor("ln_f", [T, C], model.finalNorm(last, 1))],
      logits: [top("logits", logits)],
      probabilities: [top("probabilities", probabilities(logits))],
    };
    return {
      token: t, layer: l, head: h, config: { C, H, D, L, V, T },
      steps: Object.entries(steps).map(([name, tensors]) => ({ name, tensors })),
    };
  }
}

function checkNumber(name, value, count) {
  if (Number.isInteger(value) && value >= 0 && value < count) return;
  throw new Error(`${name} must be a whole number from 0 to ${count - 1}, got ${value}`);
}

const rounded = p => Math.round(p * 1e5) / 1e5;
const significant = x => Number(x.toPrecision(6));

// Return [label, probability, rank, id] of the token with which the text continues.
function actual(all, { id, label }) {
  const rank = 1 + all.reduce((n, p) => n + (p > all[id]), 0);
  return [label, rounded(all[id]), rank, id];
}

// Return the attention weights of T tokens as bytes in base64, in the order layer, head, row, column.
function attentionBase64(reading, L, H, T) {
  const bytes = new Uint8Array(L * H * T * T);
  for (let t = 0; t < T; t++) {
    for (let l = 0; l < L; l++) {
      const weights = reading.attentionBytes[t][l];
      for (let h = 0; h < H; h++) bytes.set(weights.subarray(h * (t + 1), (h + 1) * (t + 1)), ((l * H + h) * T + t) * T);
    }
  }
  let text = "";
  // apply is ten times as fast as the spread syntax.
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode.apply(null, bytes.subarray(i, i + 8192));
  return btoa(text);
}
