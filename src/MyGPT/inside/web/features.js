// Draw the features of a sparse autoencoder: a list, the chosen feature with its examples, and a passage token by token.
// features_data (inside/features.py) returns the data. Tokens are numbers of entries in data.labels.

const data = JSON.parse($("data").textContent);
const byId = new Map(data.features.map(feature => [feature.id, feature]));
const { tokens, active } = data.passage;
const label = token => data.labels[token];
// In running text, a space is more readable than the mark of a space.
const running = token => label(token).replaceAll("·", " ");
const whole = n => n.toLocaleString("en");
const firesIn = new Set(active.flat().map(([id]) => id));
const state = { feature: undefined, token: 0, shown: [] };

const ORDERS = {
  rate: (a, b) => b.rate - a.rate,
  rare: (a, b) => a.rate - b.rate,
  max: (a, b) => b.max - a.max,
  share: (a, b) => b.on[0][1] - a.on[0][1],
  id: (a, b) => a.id - b.id,
};

// The text that the search looks through: the tokens of a feature, and the ends of its strongest examples.
const searched = new Map(data.features.map(feature => {
  const near = feature.strongest.map(([tokens, , peak]) => tokens.slice(Math.max(0, peak - 12), peak + 1).map(label).join(""));
  return [feature.id, [...feature.on.map(([token]) => label(token)), ...feature.up.map(label), ...near].join("\n").toLowerCase()];
}));

function matches(feature, query) {
  if (/^#?\d+$/.test(query) && feature.id === Number(query.replace("#", ""))) return true;
  return searched.get(feature.id).includes(query.toLowerCase().replaceAll(" ", "·"));
}

// The end of the strongest example of a feature, as a short description in a list.
function summary(feature) {
  const [tokens, , peak] = feature?.strongest[0] ?? [[], [], 0];
  const before = tokens.slice(0, peak).map(running).join("").replaceAll("\u21b5", " ").slice(-14);
  return element("span", { className: "mono" }, before, element("span", { className: "peak", textContent: tokens.length ? label(tokens[peak]) : "" }));
}

function choose(change) {
  Object.assign(state, change);
  // Some browsers do not let a page that was opened from a file change its address.
  try { history.replaceState(null, "", "#" + new URLSearchParams({ feature: state.feature, token: state.token })); } catch (error) { console.info(error); }
  drawChoice();
}

function drawChoice() {
  drawSelected();
  drawFeature();
  drawPassage();
  drawActive();
}

// The list

function drawList() {
  const query = $("search").value.trim();
  const shown = data.features.filter(feature => matches(feature, query) && (!$("here").checked || firesIn.has(feature.id)));
  shown.sort(ORDERS[$("order").value]);
  state.shown = shown.map(feature => feature.id);
  $("list").replaceChildren(...shown.map(option));
  $("count").textContent = `${whole(shown.length)} of ${whole(data.features.length)} features`;
  drawSelected();
}

function option(feature) {
  const made = element("div", { className: "option", role: "option" },
    element("span", { textContent: `#${feature.id}` }), summary(feature), element("span", { textContent: percent(feature.rate) }));
  made.dataset.feature = feature.id;
  made.onclick = () => choose({ feature: feature.id });
  return made;
}

// Mark the chosen feature in the list. Only one option can be reached with the tab key; the arrow keys move among them.
function drawSelected() {
  const options = [...$("list").children];
  for (const made of options) {
    const isChosen = Number(made.dataset.feature) === state.feature;
    made.setAttribute("aria-selected", isChosen);
    made.tabIndex = isChosen ? 0 : -1;
  }
  if (options.length && !state.shown.includes(state.feature)) options[0].tabIndex = 0;
}

// Return the index that an arrow key moves to in a list of n entries, or undefined for another key.
function moved(key, index, n, page) {
  const steps = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1, PageDown: page, PageUp: -page, Home: -n, End: n };
  return steps[key] === undefined ? undefined : Math.min(Math.max(index + steps[key], 0), n - 1);
}

function moveInList(event) {
  const next = moved(event.key, state.shown.indexOf(state.feature), state.shown.length, 10);
  if (next === undefined || !state.shown.length) return;
  event.preventDefault();
  choose({ feature: state.shown[next] });
  focusIn($("list"), $("list").children[next]);
}

// Focus a child of a box that scrolls, and scroll only this box.
function focusIn(box, child) {
  child.focus({ preventScroll: true });
  const top = child.offsetTop, bottom = top + child.offsetHeight;
  if (top < box.scrollTop) box.scrollTop = top;
  if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
}

// The chosen feature

function drawFeature() {
  const feature = byId.get(state.feature);
  const n = Math.round(feature.rate * data.n_tokens);
  $("feature-title").textContent = `Feature ${feature.id}`;
  $("summary").textContent = `It fires at ${percent(feature.rate)} of the tokens (about ${whole(n)} of ${whole(data.n_tokens)}).`;
  $("on").replaceChildren(...feature.on.map(([token, share]) => chip(token, percent(share))));
  $("up").replaceChildren(...feature.up.map(token => chip(token)));
  $("down").replaceChildren(...feature.down.map(token => chip(token)));
  drawHistogram(feature);
  for (const kind of ["strongest", "random"]) {
    const examples = feature[kind].map(drawExample);
    $(kind).replaceChildren(...(examples.length ? examples : [element("p", { textContent: "There are no others." })]));
  }
}

function chip(token, note = "") {
  const made = element("span", {}, quoted(label(token)));
  if (note) made.append(element("small", { textContent: note }));
  return made;
}

function drawHistogram({ histogram, max }) {
  const largest = Math.max(...histogram);
  $("histogram").replaceChildren(...histogram.map(count => {
    const bar = element("span", { title: `${whole(count)} tokens` });
    bar.style.height = `${100 * count / largest}%`;
    return bar;
  }));
  const half = histogram.slice(histogram.length / 2).reduce((sum, count) => sum + count, 0);
  const all = histogram.reduce((sum, count) => sum + count, 0);
  $("histogram").setAttribute("aria-label", `Histogram of the strengths: ${percent(half / all)} are above half of the largest, ${max}.`);
  $("strong").textContent = `strength ${max}`;
}

function drawExample([tokens, strengths, peak]) {
  return element("p", { className: "example" }, ...tokens.map((token, i) => {
    const made = element("span", { textContent: running(token), className: i === peak ? "peak" : i > peak ? "later" : "" });
    if (strengths[i]) made.style.background = paleHeat(strengths[i] / 100);
    return made;
  }));
}

// The passage

function makePassage() {
  $("passage").replaceChildren(...tokens.map((token, t) => {
    const text = running(token);
    const made = element("span", { textContent: text + (text.endsWith("↵") ? "\n" : ""), role: "option" });
    made.onclick = () => { choose({ token: t }); made.focus({ preventScroll: true }); };
    return made;
  }));
}

function drawPassage() {
  const { max } = byId.get(state.feature);
  let n = 0;
  [...$("passage").children].forEach((made, t) => {
    const strength = active[t].find(([id]) => id === state.feature)?.[1] ?? 0;
    n += strength > 0;
    made.style.background = strength ? paleHeat(Math.min(1, strength / max)) : "";
    made.title = strength ? `feature ${state.feature} fires with strength ${strength}` : "";
    made.setAttribute("aria-selected", t === state.token);
    made.tabIndex = t === state.token ? 0 : -1;
  });
  $("passage-note").textContent = `Choose a token to see its features. The colour shows where feature ${state.feature} fires: at ${n} of ${tokens.length} tokens. `
    + `The model reads ${data.context} tokens at a time, so it knows nothing before the start of such a window.`;
}

function drawActive() {
  const strongest = active[state.token];
  $("active-title").replaceChildren(strongest.length ? "Features that fire at " : "No feature fires at ", quoted(label(tokens[state.token])), ` (token ${state.token}), with their strengths:`);
  refill($("active"), ...strongest.map(([id, strength]) => {
    const feature = byId.get(id);
    const made = element("button", { type: "button" }, element("span", { textContent: `#${id}` }),
      summary(feature), element("span", { textContent: strength.toPrecision(3) }));
    made.setAttribute("aria-pressed", id === state.feature);
    if (feature) made.style.background = paleHeat(Math.min(1, strength / feature.max));
    made.onclick = () => choose({ feature: id });
    made.disabled = !feature;
    return made;
  }));
}

function moveInPassage(event) {
  const next = moved(event.key, state.token, tokens.length, 50);
  if (next === undefined) return;
  event.preventDefault();
  choose({ token: next });
  $("passage").children[next].focus();
}

// The numbers at the top

function drawQuality() {
  const { quality } = data, n_dead = data.n_features - data.features.length;
  const decimals = (x, n) => x.toFixed(n);
  const rows = [
    ["Variance explained", percent(quality.variance_explained), "of the activations. 100 % would be no error."],
    ["Features per token", decimals(quality.n_active, 1), `on average, at most ${data.k} of ${whole(data.n_features)}`],
    ["Dead features", whole(n_dead), "fire nowhere in this text. They are not listed."],
    ["Loss recovered", percent(quality.loss_recovered), `loss ${decimals(quality.loss, 3)}, with the reconstruction ${decimals(quality.reconstructed_loss, 3)}, with the mean activation ${decimals(quality.mean_loss, 3)}`],
  ];
  $("quality").replaceChildren(...rows.map(([name, value, note]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }, element("small", { textContent: note })))));
  const part = data.n_tokens < data.n_all ? `the first ${whole(data.n_tokens)} of ${whole(data.n_all)} tokens of a text` : `a text of ${whole(data.n_tokens)} tokens`;
  $("about").textContent = `A sparse autoencoder describes the residual stream after layer ${data.layer} (layers are numbered from 0). It was trained on `
    + `nine tenths of ${part}, and the numbers below were measured on the last tenth. · stands for a space and ↵ for a line break.`;
}

drawQuality();
makePassage();
const start = new URLSearchParams(location.hash.slice(1));
const wanted = byId.get(Number(start.get("feature") ?? NaN));
if (tokens[Number(start.get("token"))] !== undefined) state.token = Number(start.get("token"));
$("search").oninput = $("here").onchange = $("order").onchange = drawList;
$("list").onkeydown = moveInList;
$("passage").onkeydown = moveInPassage;
drawList();
state.feature = wanted ? wanted.id : state.shown[0];
drawChoice();
