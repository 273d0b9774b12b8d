// From logits to the next token: temperature, top-k, top-p and min-p, in the order and with the ties of Python's sampling.py.
//
// A filter sets the logits of the tokens that it excludes to minus infinity. Like Python, the filters compute in float32.

const f32 = Math.fround;

// Return the probabilities of logits, rounded to float32.
function probabilities(logits) {
  return Float32Array.from(softmax(Float64Array.from(logits)));
}

// Return the logits after the temperature and the filters. An option that is missing or null changes nothing.
function filterLogits(logits, { temperature = 0, top_k = null, top_p = null, min_p = null }) {
  if (temperature === 0) { // greedy: of equal logits, the first one is taken
    const best = argmax(logits);
    return Float32Array.from(logits, (_, i) => i === best ? 0 : -Infinity);
  }
  // Outside this range the quotient would overflow. 1e-30 already means greedy, and 1e30 equal probabilities.
  const divisor = Math.min(Math.max(temperature, 1e-30), 1e30);
  let kept = Float32Array.from(logits, value => value / divisor);
  if (top_k !== null) kept = keepTopK(kept, top_k);
  if (top_p !== null && top_p < 1) kept = keepTopP(kept, top_p);
  if (min_p) kept = keepMinP(kept, min_p);
  return kept;
}

// Keep the k largest logits, and all that are equal to the k-th largest.
function keepTopK(logits, k) {
  const ascending = Float32Array.from(logits).sort();
  const smallest = ascending[Math.max(0, ascending.length - k)];
  return logits.map(value => value < smallest ? -Infinity : value);
}

// Keep the smallest set of the most likely tokens with a total probability of at least p.
function keepTopP(logits, p) {
  const ascending = Float32Array.from(logits).sort(), limit = f32(1 - p), V = logits.length;
  let outside = 0, sum = 0;
  for (const probability of probabilities(ascending)) {
    sum += probability;
    if (f32(sum) > limit || outside === V - 1) break;
    outside++; // this token and those before it have a total of at most 1 - p
  }
  const smallest = ascending[outside];
  // Of the tokens whose logits equal the smallest that is kept, the first ones may be outside too.
  let tied = outside - logits.reduce((n, value) => n + (value < smallest), 0);
  return logits.map(value => value < smallest || (value === smallest && tied-- > 0) ? -Infinity : value);
}

// Keep the tokens with at least p times the probability of the most likely token.
function keepMinP(logits, p) {
  const all = probabilities(logits), limit = f32(f32(p) * all[argmax(all)]);
  return logits.map((value, i) => all[i] < limit ? -Infinity : value);
}

function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

// Return the indices of the k largest values in descending order. Of equal values, those with a smaller index come first.
function topIndices(values, k, isBetter = (i, j) => values[i] > values[j]) {
  const best = [];
  for (let i = 0; i < values.length; i++) {
    if (best.length === k && !isBetter(i, best[k - 1])) continue;
    let place = best.length;
    while (place > 0 && isBetter(i, best[place - 1])) place--;
    best.splice(place, 0, i);
    if (best.length > k) best.pop();
  }
  return best;
}

// Draw a token: the first one at which the sum of the probabilities exceeds a random number.
function drawToken(filtered, seed, step) {
  const all = softmax(Float64Array.from(filtered));
  let rest = randomNumber(seed, step);
  for (let i = 0; i < all.length; i++) {
    rest -= all[i];
    if (rest < 0) return i;
  }
  return argmax(all);
}

// Return number `step` of the sequence of random numbers from 0 to 1 that belongs to a seed: the generator Mulberry32.
// It is not PyTorch's, so a seed gives other texts than in Python.
function randomNumber(seed, step) {
  let z = seed + Math.imul(step + 1, 0x6D2B79F5) | 0;
  z = Math.imul(z ^ z >>> 15, z | 1);
  z ^= z + Math.imul(z ^ z >>> 7, z | 61);
  return ((z ^ z >>> 14) >>> 0) / 2 ** 32;
}
