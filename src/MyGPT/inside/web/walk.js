// Walk through one forward pass: each step with an explanation, a formula, shapes and the numbers of one token. walk.html has
// the elements. walk_data (inside/walk.py) gives the numbers; the texts are here.

// The steps in the order of the forward pass. `text` and `formula` may depend on the walk `w`; in a formula, _x or _{xy} is an
// index. `tensors` gives each tensor a letter and a name, and `labels` the labels of its numbers.
const STEPS = {
  ids: {
    title: "Token ids",
    text: () => "The tokenizer replaces each piece of the text by its number in the vocabulary. The model sees only these numbers.",
    formula: () => "ids = tokenizer(text)",
    tensors: { ids: ["ids", "the number of each token"] },
  },
  embeddings: {
    title: "Embeddings",
    text: () => "The id selects one row of the token table, and the position selects one row of the position table. Their sum is " +
      "the vector x of the token. All layers read x and add to it; this path is called the residual stream.",
    formula: w => `x = wte[${w.id}] + wpe[${w.token}]`,
    tensors: { wte: ["wte", "token embedding"], wpe: ["wpe", "position embedding"], embeddings: ["x", "their sum"] },
  },
  ln_1: {
    title: "LayerNorm",
    text: w => `Layer ${w.layer} first normalises the vector: after subtracting the mean and dividing by the standard deviation, ` +
      "it multiplies each number by a learned weight w and adds a learned b.",
    formula: () => "a = (x − mean) / √(std² + ε) · w + b",
    tensors: {
      x: ["x", w => w.layer ? `the residual stream after layer ${w.layer - 1}` : "the sum of the embeddings"],
      ln_1: ["a", "after LayerNorm"], mean: ["mean", "of x"], std: ["std", "the standard deviation of x"],
    },
  },
  qkv: {
    title: "Queries, keys and values",
    text: w => `Head ${w.head} computes three short vectors from a. The query says what this token looks for, the key says what ` +
      "it offers to later tokens, and the value is what it passes on. In a model without biases, b is 0.",
    formula: () => "q = a W_q + b_q,  k = a W_k + b_k,  v = a W_v + b_v",
    tensors: { q: ["q", "query"], k: ["k", "key"], v: ["v", "value"] },
  },
  scores: {
    title: "Scores",
    text: () => "The score of an earlier token is the dot product of this token's query and that token's key, divided by √D. " +
      "Later tokens have no score: the causal mask hides them.",
    formula: w => `s_j = q_{${w.token}} · k_j / √${w.config.D},  j ≤ ${w.token}`,
    tensors: { scores: ["s", "one score per visible token"] },
  },
  weights: {
    title: "Attention weights",
    text: () => "Softmax turns the scores into weights, which are positive and sum to 1. These numbers are one row of the " +
      "attention map.",
    formula: () => "p_j = exp(s_j) / Σ_i exp(s_i)",
    tensors: { weights: ["p", "one weight per visible token"] },
  },
  head: {
    title: "Output of the head",
    text: w => w.isOff
      ? `Head ${w.head} of layer ${w.layer} is switched off: zeros replace the weighted sum of the values. Switch the head on to ` +
        "see the sum."
      : "The head adds up the values of all visible tokens, each multiplied by its weight.",
    formula: w => w.isOff ? `z_{${w.head}} = 0` : `z_{${w.head}} = Σ_j p_j v_j`,
    tensors: { head: ["z", w => w.isOff ? "zeros, because the head is off" : "the weighted sum of the values"] },
  },
  attention: {
    title: "Output of attention",
    text: w => `The outputs of all ${w.config.H} heads, side by side, pass through one matrix. The result is added to the residual ` +
      "stream." + (w.nOff ? ` In this layer, ${w.nOff === 1 ? "1 head is switched off and adds" : `${w.nOff} heads are switched off and add`} nothing.` : ""),
    formula: w => w.config.H === 1 ? "x ← x + z_0 W_o + b_o" : `x ← x + [z_0 … z_{${w.config.H - 1}}] W_o + b_o`,
    tensors: { attn: ["attention", "output of attention, all heads"], after_attn: ["x", "the residual stream after attention"] },
  },
  mlp: {
    title: "MLP",
    text: w => `LayerNorm normalises x again. The MLP computes ${w.config.C * 4} neurons, applies GELU, and returns to ${w.config.C} numbers, ` +
      "which are added to the residual stream. It sees this token alone.",
    formula: () => "x ← x + GELU(LayerNorm(x) W_1 + b_1) W_2 + b_2",
    tensors: {
      ln_2: ["LayerNorm(x)", "input of the MLP"], activations: ["neurons", "after GELU"], mlp: ["MLP", "output of the MLP"],
      after_mlp: ["x", w => `the residual stream after layer ${w.layer}`],
    },
  },
  layers: {
    title: "All layers",
    text: w => `The steps from LayerNorm to MLP repeat in each of the ${w.config.L} layers, with other weights. The numbers show how ` +
      "long the vector x of this token is before the first and after each layer.",
    formula: () => "‖x‖ = √(x_1² + … + x_C²)",
    tensors: { norms: ["‖x‖", "the length of the residual stream"] },
  },
  ln_f: {
    title: "Final LayerNorm",
    text: () => "After the last layer, x is normalised once more.",
    formula: () => "y = (x − mean) / √(std² + ε) · w + b",
    tensors: { ln_f: ["y", "the input of the output head"] },
  },
  logits: {
    title: "Logits",
    text: w => `The output head gives each of the ${w.config.V.toLocaleString("en")} tokens of the vocabulary one number, its logit: the ` +
      "dot product of y and the token's row of the output matrix W. The eight largest are shown.",
    formula: () => "logit_i = y · W_i",
    tensors: { logits: ["logits", "the eight largest"] },
  },
  probabilities: {
    title: "Probabilities",
    text: () => "Softmax turns the logits into the probabilities of the next token. Temperature, top-k, top-p and min-p act after " +
      "this step.",
    formula: () => "P_i = exp(logit_i) / Σ_j exp(logit_j)",
    tensors: { probabilities: ["P", "the eight most likely tokens"] },
  },
};

// The letters of a tensor's shape.
const SHAPES = {
  ids: "T", wte: "T × C", wpe: "T × C", embeddings: "T × C", x: "T × C", ln_1: "T × C", mean: "", std: "", q: "T × D", k: "T × D",
  v: "T × D", scores: "T × T", weights: "T × T", head: "T × D", attn: "T × C", after_attn: "T × C", ln_2: "T × C",
  activations: "T × 4C", mlp: "T × C", after_mlp: "T × C", norms: "L + 1", ln_f: "T × C", logits: "V", probabilities: "V",
};

class Walk {
  // `onStep` is called after each step. `step` is the number of the first one.
  constructor({ step = 0, onStep = () => {} } = {}) {
    this.names = Object.keys(STEPS);
    this.step = /^\d+$/.test(step) ? Math.min(Number(step), this.names.length - 1) : 0;
    this.onStep = onStep;
    this.walk = null;
    $("walk-steps").replaceChildren(...this.names.map((name, i) => {
      const button = element("button", { type: "button", textContent: STEPS[name].title });
      button.onclick = () => this.go(i);
      return element("li", {}, button);
    }));
    $("walk-back").onclick = () => this.go(this.step - 1);
    $("walk-next").onclick = () => this.go(this.step + 1);
    $("walk").onkeydown = event => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.go(this.step + step);
      if (event.target.closest(".steps")) $("walk-steps").children[this.step].firstElementChild.focus();
    };
  }

  // Draw the steps of `walk` (walk_data in inside/walk.py). `tokens` are those of the text.
  show(walk, tokens, headsOff = []) {
    const inLayer = headsOff.filter(([layer]) => layer === walk.layer);
    const numbersOf = Object.fromEntries(walk.steps.map(({ name, tensors }) => [name, tensors]));
    this.walk = {
      ...walk, tokens, numbersOf, off: headsOff, id: tokens[walk.token].id, label: tokens[walk.token].label,
      nOff: inLayer.length, isOff: inLayer.some(([, head]) => head === walk.head),
    };
    this.draw();
  }

  go(step) {
    if (step < 0 || step >= this.names.length) return;
    this.step = step;
    if (this.walk) this.draw();
    this.onStep();
  }

  draw() {
    const { walk, step } = this, name = this.names[step], { title, text, formula, tensors } = STEPS[name];
    $("walk-hint").replaceChildren("Follow token ", quoted(walk.label), ` (token ${walk.token}) through layer ${walk.layer}, ` +
      `head ${walk.head}${walk.isOff ? ", which is switched off" : ""}. Choose another token, layer or head above. The arrow keys change the step.`);
    [...$("walk-steps").children].forEach(({ firstElementChild: button }, i) => {
      button.classList.toggle("past", i < step);
      if (i === step) button.setAttribute("aria-current", "step");
      else button.removeAttribute("aria-current");
    });
    $("walk-back").setAttribute("aria-disabled", step === 0);
    $("walk-next").setAttribute("aria-disabled", step === this.names.length - 1);
    $("walk-count").textContent = `Step ${step + 1} of ${this.names.length}`;
    $("walk-name").textContent = title;
    $("walk-text").textContent = text(walk);
    $("walk-formula").replaceChildren(...withIndices(formula(walk)));
    const shown = walk.numbersOf[name], span = (className = "") => element("span", { className });
    const makeTensor = () => element("div", { className: "tensor" },
      element("div", { className: "tensor-head" }, span("letter"), span(), element("small")), element("div", { className: "cells" }));
    fill($("walk-tensors"), shown.length, makeTensor, (node, i) => this.drawTensor(node, shown[i], tensors[shown[i].name]));
  }

  // Draw one tensor: its letter, its name, its shape and coloured cells with numbers.
  drawTensor(node, { name, shape, row, top }, [letter, description]) {
    const { walk } = this, text = typeof description === "function" ? description(walk) : description;
    const sizes = shape.length ? `${SHAPES[name]} = ${shape.join(" × ")}` : "one number";
    const isRow = shape.length === 2, [head, cells] = node.children;
    [letter, text, isRow ? `row ${walk.token} of ${sizes}` : sizes].forEach((part, i) => setText(head.children[i], part));
    const values = top ? top.map(([, value]) => value) : row;
    const labels = top ? top.map(([label]) => label) : this.labels(name, row.length);
    const largest = Math.max(...values.map(Math.abs));
    const hidden = top || labels ? 0 : (shape.at(-1) ?? 1) - row.length;
    const makeCell = () => element("span", {}, element("small"), element("span"));
    fill(cells, values.length + (hidden > 0), makeCell, (cell, i) => i < values.length
      ? drawNumber(cell, values[i], largest, labels?.[i], name === "ids")
      : drawCell(cell, "more", "", `and ${hidden.toLocaleString("en")} more`));
  }

  // Return the labels of the numbers of a tensor, or null if they are the numbers of a vector.
  labels(name, n) {
    if (name === "norms") return ["embeddings", ...numbers(n - 1).map(layer => `layer ${layer}`)];
    return ["ids", "scores", "weights"].includes(name) ? this.walk.tokens.slice(0, n).map(({ label }) => label) : null;
  }
}

// Draw a cell with a number: blue for positive and orange for negative ones, the stronger the larger.
function drawNumber(cell, value, largest, label, isPlain) {
  const strength = isPlain || !largest ? 0 : Math.abs(value) / largest, colour = value < 0 ? "--cold" : "--heat";
  drawCell(cell, "cell", label, isPlain ? value : shortNumber(value), String(value),
    strength ? `rgb(var(${colour}) / calc(var(--pale) * .6 * ${strength.toFixed(3)}))` : "");
}

function drawCell(cell, className, label = "", text, title = "", backgroundColor = "") {
  setLabel(cell.firstElementChild, label);
  setText(cell.lastElementChild, text);
  change(cell, { className, title });
  change(cell.style, { backgroundColor });
}

// Return a number with three significant digits, such as 0.0123, −1.23 or 1.2e−7.
function shortNumber(value) {
  const size = Math.abs(value);
  const text = value === 0 ? "0" : size < 1e-4 || size >= 1e5 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  return text.replaceAll("-", "−");
}

// Return the parts of a formula, with _x and _{xy} as indices.
function withIndices(text) {
  return text.split(/(_\{[^}]*\}|_.)/).map(part =>
    part.startsWith("_") ? element("sub", { textContent: part.replace(/^_\{?|\}$/g, "") }) : part);
}
