// The page of `mygpt explain --live`: a text field, and everything below it follows the text.
//
// source.js runs the model in a worker, look.js draws the views, next.js the sliders and the list of next tokens. The state of
// the page is kept in the address, so that a reload or a bookmark shows the same.

const MAX_NEW_TOKENS = 200; // tokens that one click on Generate writes at most
const source = openSource(), { info } = source;
const state = new URLSearchParams(location.hash.slice(1));

let ids = []; // the token ids of the text
let version = 0; // counts the changes of the text, so that late answers are dropped
let generated = 0; // the version that Generate wrote, whose status stays
let running = null; // while the model writes: the AbortController that stops it

const showError = error => { $("error").textContent = sentence(error.message); };
const sentence = text => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

const look = new Look(source, {
  start: { ...Object.fromEntries(state) },
  onData({ tokens: { length: n }, n_left_out }) {
    $("inside").hidden = false;
    if (version !== generated) $("status").textContent = n_left_out
      ? `The page shows the last ${n} tokens; ${n_left_out} earlier ones are left out.`
      : `${n} ${n === 1 ? "token" : "tokens"} of at most ${info.max_inside}.`;
  },
  onChange() {
    refreshNext();
    keepState();
  },
  onError: showError,
});

// The text

// Read the text of the field. Until the answer comes, the page shows the last one. A text that the tokenizer cannot read
// stays in the field, and the model cannot continue it.
async function readText() {
  const now = ++version, text = $("text").value;
  if (text) look.read(text); // at the same time, so that the worker answers both at once
  try {
    const answer = await source.read(text);
    if (now === version) takeIds(answer.ids);
  } catch (error) {
    if (now !== version) return;
    showError(error);
    $("error").textContent += " The page below still shows the last text that the model could read.";
    $("go").setAttribute("aria-disabled", true);
  }
}

function takeIds(newIds) {
  ids = newIds;
  $("go").setAttribute("aria-disabled", false);
  $("error").textContent = "";
  if (!ids.length) $("status").textContent = "Write a text: the page shows how the model reads it.";
}

// Put a token after the chosen token of the text, in place of the rest.
async function append(token) {
  await stop();
  const now = ++version, all = [...shownIds(), token.id];
  const text = await source.decode(all);
  if (now !== version) return;
  $("text").value = text;
  look.inside.chosenToken = null;
  takeIds(all);
  look.read(all);
}

// Return the ids up to the chosen token, with those that are too early to be shown.
const shownIds = () => ids.slice(0, ids.length - look.ids.length + look.inside.token + 1);

// The next token

async function refreshNext() {
  const asked = look.chosenIds, headsOff = look.headsOff;
  if (!asked.length) return;
  const { token } = look.inside;
  try {
    const answer = await source.next(asked, { ...sampling(), heads_off: headsOff });
    const isLast = token === look.ids.length - 1;
    const place = isLast ? "After the text, " : ["After ", quoted(look.data.tokens[token].label), ` (token ${token}), `];
    drawDistribution(answer, [place].flat(), look.ids[token + 1], append);
  } catch (error) {
    showError(error);
  }
}

// Writing

async function generate() {
  if ($("go").getAttribute("aria-disabled") === "true") return;
  const controller = running = new AbortController(), start = [...ids], now = generated = ++version;
  $("go").textContent = "Stop";
  $("go").classList.add("running");
  $("error").textContent = "";
  look.inside.chosenToken = null;
  let n = 0;
  const report = ending => { $("status").textContent = `${n} new ${n === 1 ? "token" : "tokens"}${ending}`; };
  controller.ended = (async () => {
    try {
      const options = { ...sampling(), heads_off: look.headsOff, max_tokens: MAX_NEW_TOKENS, signal: controller.signal };
      const { finish_reason } = await source.generate(start, options, ({ id, text }) => {
        if (now !== version) return;
        n++;
        ids = [...ids, id];
        $("text").value += text;
        $("text").scrollTop = $("text").scrollHeight;
        report(" …");
        look.read(ids);
      });
      report({ stop: "; the model ended the text.", stopped: "; stopped." }[finish_reason] ?? ".");
    } catch (error) {
      showError(error);
    } finally {
      running = null;
      $("go").textContent = "Generate";
      $("go").classList.remove("running");
    }
  })();
  return controller.ended;
}

async function stop() {
  running?.abort();
  await running?.ended;
}

// The address

let keepTimer = 0;
function keepState() {
  clearTimeout(keepTimer);
  keepTimer = setTimeout(() => {
    const { layer, head, chosenToken, headsOff } = look.inside;
    const kept = { text: $("text").value, layer, head, step: look.walk.step, ...sampling() };
    if (chosenToken !== null) kept.token = chosenToken;
    if (headsOff.length) kept.off = headsOff.map(pair => pair.join(".")).join(" ");
    // Some browsers do not let a page that was opened from a file change its address.
    try { history.replaceState(null, "", `#${new URLSearchParams(kept)}`); } catch { /* the page works without */ }
  }, 300);
}

function takeState() {
  for (const name of Object.keys(SLIDERS)) if (state.has("text")) $(name).value = state.get(name) ?? SLIDERS[name][0];
  const pairs = (state.get("off") ?? "").split(" ").filter(pair => /^\d+\.\d+$/.test(pair)).map(pair => pair.split(".").map(Number));
  look.inside.headsOff = pairs.filter(([layer, head]) => layer < info.config.n_layers && head < info.config.n_heads);
  $("text").value = state.get("text") ?? info.text;
}

async function start() {
  $("model").textContent = info.description;
  $("facts").textContent = `It works without a network and stores the weights in ${info.precision === "fp16" ? "float16" : "int8"}.`;
  $("status").textContent = "The model is being unpacked …";
  for (const name of Object.keys(SLIDERS)) $(name).oninput = () => { showSettings(); refreshNext(); keepState(); };
  $("text").oninput = async () => { await stop(); readText(); };
  $("go").onclick = () => running ? stop() : generate();
  $("clear").onclick = async () => {
    await stop();
    $("text").value = "";
    $("text").focus();
    readText();
  };
  // A link within the page must not replace the state in the address.
  for (const link of document.querySelectorAll("a[href^='#']")) link.onclick = event => {
    event.preventDefault();
    $(link.hash.slice(1)).scrollIntoView();
  };
  addEventListener("keydown", event => {
    if (event.key === "Escape") stop();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("go").click();
    else return;
    event.preventDefault();
  });
  takeState();
  showSettings();
  await source.ready;
  await readText();
  $("text").focus({ preventScroll: true });
}

const started = start().catch(showError); // fulfilled when the first text is drawn
