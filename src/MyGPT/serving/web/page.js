// The page: its settings, tabs, buttons, the next-token distribution, the tree of branches, chat and comparison.

const models = new Map(); // the description of each model by its name
const stories = new Map(); // the text of each model by its name, with all its branches
const messages = []; // the conversation
let running = null; // what is being generated: an AbortController, with the promise that it has ended
let isEditing = true; // the text is a field, not a row of tokens
let isSeedUsed = false;
let selected = null; // the token whose alternatives are open
let lastChat = null; // the last request of the conversation: its body, its settings, and why the answer ended
let next = null; // the last answer of /page/next, and what was asked
let tab = "write";

const model = () => $("model").value;
const about = name => models.get(name);

function story(name = model()) {
  if (!stories.has(name)) stories.set(name, new Story($("story"), () => name, refresh));
  return stories.get(name);
}

// Settings

const settings = () => ({ ...sampling(), max_tokens: Number($("max_tokens").value), seed: Number($("seed").value) });

function drawSeed() {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  isSeedUsed = false;
}

// A seed that was used makes way for a new one, unless the user keeps it.
function takeSettings() {
  if (isSeedUsed && !$("keep-seed").checked) drawSeed();
  for (const name of ["max_tokens", "seed"])
    if (!$(name).value || !$(name).checkValidity())
      throw new ServerError(`${name === "seed" ? "The seed" : "The number of tokens"} must be a whole number from ${$(name).min} to ${$(name).max}.`);
  isSeedUsed = true;
  return settings();
}

// Errors, and what a screen reader hears

function showError(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof ServerError)) console.error(error);
  $("error").textContent = error instanceof ServerError ? error.message : `The page failed: ${error.message}.`;
}

const attempt = action => action().catch(showError);

// Text is announced in portions: at the end of a sentence or of a long stretch.
const heard = {
  waiting: "",
  add(text) {
    this.waiting += text;
    if (this.waiting.length > 160 || this.waiting.length > 20 && /[.!?\n]\s*$/.test(this.waiting)) this.say("");
  },
  say(text) {
    $("live").textContent = this.waiting + text;
    this.waiting = "";
  },
};

// Running and stopping

// Run `action` with a signal that stops it. Meanwhile the button says Stop.
async function run(button, action) {
  if (running) return stop();
  const label = button.textContent, controller = running = new AbortController();
  $("error").textContent = "";
  button.textContent = "Stop";
  button.classList.add("running");
  refreshButtons();
  controller.ended = action(controller.signal).catch(showError).finally(() => {
    running = null;
    button.textContent = label;
    button.classList.remove("running");
    refresh();
  });
  return controller.ended;
}

async function stop() {
  running?.abort();
  await running?.ended;
}

// Generate a continuation, and say in `place` why it ended.
async function generate(text, start, first, settings, signal, place) {
  const n = text.ids(start).length + (first ? 1 : 0), { context } = about(text.model());
  if (n > context)
    throw new ServerError(`The text has ${n} tokens, but this model reads at most ${context} tokens. Shorten the text.`);
  place.textContent = "Writing …";
  const asked = { ...settings, max_tokens: Math.min(settings.max_tokens, context - n + 1) }; // the last token need not be read
  const finish = await text.write(start, first, asked, signal, piece => heard.add(piece)).catch(error => {
    place.textContent = "";
    throw error;
  });
  text.run.wanted = settings;
  const { nodes, seconds } = text.run, count = nodes.length === 1 ? "1 token" : `${nodes.length} tokens`;
  place.textContent = {
    stop: `The model ended the text after ${count}.`,
    stopped: `Stopped after ${count}.`,
    length: nodes.length < settings.max_tokens
      ? `The text now fills the context of ${context} tokens, so it cannot be continued.`
      : `Wrote ${count} in ${seconds.toFixed(1)} s, with the seed ${settings.seed}.`,
  }[finish] ?? "The server ended the request.";
  heard.say(` ${place.textContent}`);
}

// Write

function setEditing(edit) {
  isEditing = edit;
  if (edit) $("text").value = story().text();
  else story().draw();
  $("text").hidden = !edit;
  $("story").hidden = edit;
  $("text-label").textContent = edit ? "Text to continue" : "Text";
  $("edit").textContent = edit ? "Show tokens" : "Edit text";
}

// Read the text of the field as tokens.
async function commit(signal) {
  if (!isEditing) return;
  if (!$("text").value) throw new ServerError("Write the beginning of a text first.");
  await story().read($("text").value, signal);
  setEditing(false);
}

const write = () => run($("go"), async signal => {
  await commit(signal);
  await generate(story(), story().leaf, null, takeSettings(), signal, $("status"));
});

const another = () => run($("go"), async signal => {
  const { start, first } = story().run;
  drawSeed();
  await generate(story(), start, first, takeSettings(), signal, $("status"));
});

// Continue a text after an alternative to one of its tokens.
async function choose(text, parent, token) {
  await stop();
  if (text !== story()) {
    const place = $(text.host.id.replace("story", "status"));
    return run($("compare"), signal => generate(text, parent, token, takeSettings(), signal, place));
  }
  return run($("go"), async signal => {
    if (isEditing) {
      await commit(signal);
      parent = text.leaf;
    }
    await generate(text, parent, token, takeSettings(), signal, $("status"));
  });
}

const toggleEditing = () => attempt(async () => {
  if (isEditing) await commit();
  else setEditing(true);
  refresh();
  (isEditing ? $("text") : $("story").querySelector("[tabindex='0']"))?.focus();
});

function travel(direction) {
  if (isEditing) setEditing(false);
  story()[direction]();
  if (story().leaf === story().root) setEditing(true);
  $("status").textContent = direction === "undo" ? "Undone." : "Redone.";
  heard.say($("status").textContent);
}

// Branches

// Return the stretches of tokens between branchings, each with its level in the tree.
function segments(text) {
  const found = [];
  const addBelow = (node, level) => node.children.forEach(child => add(child, node.children.length > 1 ? level + 1 : level));
  const add = (first, level) => {
    const nodes = [first];
    let last = first;
    while (last !== text.leaf && last.children.length === 1 && !last.children[0].starts) nodes.push(last = last.children[0]);
    found.push({ nodes, last, level });
    addBelow(last, level);
  };
  addBelow(text.root, text.root.children.length > 1 ? 0 : 1);
  return found;
}

function drawBranches() {
  const text = story(), path = new Set(text.path()), found = segments(text), isTree = found.length > 1;
  $("branches").hidden = !isTree;
  $("branches-hint").hidden = isTree;
  refill($("branches"), ...(isTree ? found : []).map(({ nodes, last, level }) => {
    const isOnPath = path.has(last), isEnd = last === text.leaf;
    const words = nodes.map(node => node.text).join("").replace(/\s+/g, " ").trim() || nodes.map(node => node.label).join("");
    const row = element("div", { className: "branch", tabIndex: isEnd ? 0 : -1 },
      element("span", { className: "dot", textContent: isEnd ? "◉" : isOnPath ? "●" : "○" }),
      element("span", { className: "words", textContent: words }),
      element("small", { textContent: nodes.length }));
    row.classList.toggle("on-path", isOnPath);
    row.style.setProperty("--level", level - 1);
    row.setAttribute("role", "treeitem");
    row.setAttribute("aria-level", level);
    row.setAttribute("aria-selected", isEnd);
    row.setAttribute("aria-label", `${words}, ${nodes.length} tokens${isOnPath ? ", in the text" : ""}`);
    row.onclick = () => attempt(async () => {
      await stop();
      if (isEditing) setEditing(false);
      text.go(last);
    });
    return row;
  }));
  if (isTree && !$("branches").querySelector("[tabindex='0']")) $("branches").firstElementChild.tabIndex = 0;
}

$("branches").onkeydown = event => {
  const rows = [...$("branches").children], at = rows.indexOf(event.target);
  const level = row => Number(row.getAttribute("aria-level"));
  const above = rows.slice(0, at).findLastIndex(row => level(row) < level(rows[at]));
  const to = {
    ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1, ArrowLeft: above, ArrowRight: at + 1,
  }[event.key];
  if (event.key === "Enter" && !event.ctrlKey || event.key === " ") rows[at].click();
  else if (to === undefined) return;
  else if (rows[to]) {
    rows[at].tabIndex = -1;
    rows[to].tabIndex = 0;
    rows[to].focus();
  }
  event.preventDefault();
};

// Next token

let isAsking = false, isStale = false, typingTimer = 0;

function question() {
  if (tab === "inside") return { ids: look.chosenIds, heads_off: look.headsOff };
  if (selected) return { ids: story().ids(selected.parent) };
  return isEditing ? { text: $("text").value.slice(0, $("text").selectionEnd) } : { ids: story().ids() };
}

// Ask for the distribution at the cursor. While an answer is awaited, later questions wait and only the last one is asked.
async function refreshNext() {
  if (!["write", "inside"].includes(tab) || running || !models.size) return;
  if (isAsking) {
    isStale = true;
    return;
  }
  isAsking = true;
  do {
    isStale = false;
    const asked = question();
    if (asked.ids ? asked.ids.length : asked.text) {
      try {
        const askedTab = tab, answer = await fetchJson("/page/next", { model: model(), ...asked, ...sampling() });
        next = { ...answer, asked, model: model() };
        if (tab === askedTab) drawNext();
      } catch (error) {
        next = null;
        $("next").replaceChildren();
        $("next-rest").textContent = "";
        $("next-hint").textContent = error.message;
      }
    } else {
      next = null;
      $("next").replaceChildren();
      $("next-rest").textContent = "";
      $("next-hint").textContent = "Write a text to see which tokens can follow.";
    }
  } while (isStale);
  isAsking = false;
  showMeter();
  showRequest();
}

function drawNext() {
  if (tab === "inside") {
    const { length: n } = next.asked.ids;
    return drawDistribution(next, ["After ", quoted(look.data.tokens[n - 1].label), ` (token ${n - 1}), `], look.ids[n]);
  }
  const place = selected ? ["In place of ", quoted(selected.label), ", "] : [isEditing ? "At the cursor, " : "After the text, "];
  drawDistribution(next, place, selected?.id, (token, p) => {
    const text = story(), parent = selected ? selected.parent : text.leaf;
    const top = next.tokens.slice(0, 10).map(([id, label, before]) => [id, label, Math.log(before)]);
    choose(text, parent, { ...token, logprob: Math.log(p), top });
  });
}

// Return the number of tokens of the text, or null while it is not known.
function countTokens() {
  if (!isEditing) return story().ids().length;
  return next?.asked.text === $("text").value && next.model === model() ? next.n_tokens : null;
}

function showMeter() {
  const { context } = about(model()), n = countTokens();
  const over = n > context && isEditing ? " The model cannot read so many: shorten the text." : "";
  $("meter").textContent = (n ? `${n} tokens of at most ${context}.` : `At most ${context} tokens.`) + over;
}

// The request as a curl command and as a Python program

// Return the path and the body of the request that wrote what is on the screen, or else of the next one.
function currentRequest() {
  return tab === "chat" ? chatRequest() : textRequest();
}

function textRequest() {
  const text = story(), { run } = text, path = "completions";
  if (run?.nodes.length && !isEditing && text.leaf === run.nodes.at(-1)) {
    // Whoever stopped the request has the text of a shorter one.
    const max_tokens = run.finish === "stopped" ? run.nodes.length : run.settings.max_tokens;
    if (running || isSame(run.wanted, settings()))
      return { path, body: { model: model(), prompt: run.prompt, ...run.settings, max_tokens }, wrote: `the last ${run.nodes.length} tokens` };
  }
  const isKnown = next && !isEditing && next.model === model() && isSame(next.asked.ids, text.ids());
  const prompt = isEditing ? $("text").value : isKnown ? next.prompt : text.text();
  const body = { model: model(), prompt, ...settings() }, n = countTokens(), { context } = about(model());
  if (n) body.max_tokens = Math.min(body.max_tokens, context - n + 1);
  return { path, body, isEmpty: !prompt.length, isTooLong: n > context };
}

function chatRequest() {
  const { max_tokens, ...rest } = settings(), asked = $("message").value, path = "chat/completions";
  if (lastChat && !asked && (running || isSame(lastChat.settings, settings())))
    return { path, body: lastChat.body, wrote: lastChat.finish === "stopped" ? "" : "the last answer" };
  const all = asked ? [...messages, { role: "user", content: asked }] : messages;
  return { path, body: { model: model(), messages: all, max_completion_tokens: max_tokens, ...rest }, isEmpty: !asked };
}

const isSame = (one, other) => JSON.stringify(one) === JSON.stringify(other);

function curlCommand(path, body) {
  const lines = [`curl ${location.origin}/v1/${path}`, `-H 'Content-Type: application/json'`];
  if (apiKey()) lines.push(`-H "Authorization: Bearer $MYGPT_API_KEY"`);
  const fields = Object.entries(body).map(([name, value]) => `    ${JSON.stringify(name)}: ${JSON.stringify(value)}`);
  lines.push(`-d '{\n${fields.join(",\n").replaceAll("'", "'\\''")}\n  }'`);
  return lines.join(" \\\n  ");
}

// JSON's strings, numbers and lists of them are also Python's.
function pythonProgram(path, body) {
  const { top_k, min_p, ...known } = body, extra = JSON.stringify({ top_k, min_p }).replaceAll(/([:,])/g, "$1 ");
  const options = Object.entries(known).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  if (extra !== "{}") options.push(`    extra_body=${extra},`);
  const key = apiKey() ? `os.environ["MYGPT_API_KEY"]` : `"none"`, isChat = path.startsWith("chat");
  return [
    ...(apiKey() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=${key})`,
    `completion = client.${isChat ? "chat.completions" : "completions"}.create(`,
    ...options,
    ")",
    `print(completion.choices[0].${isChat ? "message.content" : "text"})`,
  ].join("\n");
}

function showRequest() {
  const { path, body, wrote, isEmpty, isTooLong } = currentRequest();
  const seed = isSeedUsed && !$("keep-seed").checked ? ", with a new seed" : "";
  $("request").hidden = isEmpty || isTooLong;
  $("request-hint").textContent = isEmpty
    ? `Write a ${tab === "chat" ? "message" : "text"} to see the request as a curl command and as a Python program.`
    : isTooLong ? "The text is longer than the context of the model, so no request can continue it."
    : wrote ? `This request wrote ${wrote}. It gives the same text again.`
    : wrote === "" ? "This request began the last answer, which was stopped."
    : `The next ${tab === "chat" ? "answer" : "continuation"} uses this request${seed}.`;
  $("curl").textContent = curlCommand(path, body);
  $("python").textContent = pythonProgram(path, body);
}

async function copy(button) {
  const source = $(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    heard.say("Copied.");
    const [text] = button.childNodes, label = text.data;
    text.data = "Copied";
    setTimeout(() => text.data = label, 1500);
  } catch { // the clipboard is only for secure addresses
    getSelection().selectAllChildren(source);
    heard.say("Selected. Copy the selection with the keyboard.");
  }
}

// Chat

function drawMessages() {
  $("messages").replaceChildren(...messages.map(({ role, content }) => element("div", { className: `message ${role}` },
    element("h3", { textContent: role === "user" ? "You" : model() }), element("p", { textContent: content }))));
  $("messages").scrollTop = $("messages").scrollHeight;
}

const send = () => run($("send"), async signal => {
  const asked = $("message").value;
  if (!asked.trim()) throw new ServerError("Write a message first.");
  messages.push({ role: "user", content: asked });
  const answer = { role: "assistant", content: "" };
  const used = takeSettings(), { max_tokens, ...rest } = used;
  const body = { model: model(), messages: [...messages], max_completion_tokens: max_tokens, ...rest };
  lastChat = { body, settings: used };
  messages.push(answer);
  $("message").value = "";
  $("chat-status").textContent = "Writing …";
  drawMessages();
  let finish = "stopped";
  try {
    for await (const { choices } of events("/v1/chat/completions", { ...body, stream: true }, signal)) {
      const piece = choices[0]?.delta?.content ?? "";
      finish = choices[0]?.finish_reason ?? "stopped";
      answer.content += piece;
      $("messages").lastElementChild.lastElementChild.append(piece);
      $("messages").scrollTop = $("messages").scrollHeight;
      heard.add(piece);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      messages.splice(-2);
      lastChat = null;
      $("message").value = asked;
      $("chat-status").textContent = "";
      if (error.code === "context_length_exceeded") {
        const { context } = about(model());
        throw new ServerError(`The conversation is longer than the context of ${context} tokens. Ask for fewer tokens, undo, or start over.`);
      }
      throw error;
    }
  } finally {
    drawMessages();
  }
  lastChat.finish = finish;
  $("chat-status").textContent = {
    stop: "", length: `The answer reached the limit of ${max_tokens} tokens.`, stopped: "Stopped.",
  }[finish] ?? "";
  heard.say(` ${$("chat-status").textContent}`);
});

function chatBack(n) {
  messages.splice(-n);
  lastChat = null;
  drawMessages();
  $("chat-status").textContent = "";
  refresh();
}

// Compare

const pair = ["a", "b"].map(letter => new Story($(`story-${letter}`), () => $(`model-${letter}`).value));

const compare = () => run($("compare"), async signal => {
  const text = $("compare-text").value;
  if (!text) throw new ServerError("Write the beginning of a text first.");
  const same = takeSettings();
  await Promise.all(pair.map(async (one, i) => {
    const place = $(`status-${"ab"[i]}`);
    place.textContent = "";
    try {
      await one.read(text, signal);
      await generate(one, one.leaf, null, same, signal, place);
    } catch (error) {
      if (error.name !== "AbortError") place.textContent = error.message;
    }
  }));
});

// Look inside

const asFields = text => typeof text === "string" ? { text } : { ids: text };
const serverSource = {
  inside: (text, options) => fetchJson("/page/inside", { model: model(), ...asFields(text), ...options }),
  walk: (ids, options) => fetchJson("/page/walk", { model: model(), ids, ...options }),
};

const look = new Look(serverSource, {
  onData({ tokens: { length: n }, n_left_out }) {
    const last = n_left_out ? `the last ${n} tokens (${n_left_out} earlier ones are left out)` : `${n} tokens`;
    $("inside-hint").textContent = `How ${model()} reads ${last} of the text on the tab Write. Layers, heads and tokens are numbered from 0.`;
    $("inside").hidden = false;
  },
  onChange: () => refreshNext(),
  onError(error) {
    $("inside-hint").textContent = "";
    showError(error);
  },
});

async function lookInside() {
  const text = isEditing ? $("text").value : story().ids();
  $("inside").hidden = true;
  look.ids = []; // until the answer comes, the next token of the old text is not asked for
  $("inside-hint").textContent = text.length ? "The model reads the text …"
    : "Write a text first. This tab then shows how the model reads it.";
  if (text.length) await look.read(text);
}

// Everything

const setEnabled = (button, isEnabled) => button.setAttribute("aria-disabled", !isEnabled);

function refreshButtons() {
  const text = story();
  setEnabled($("undo"), !running && text.past.length);
  setEnabled($("redo"), !running && text.future.length);
  setEnabled($("another"), !running && text.run);
  setEnabled($("edit"), !running);
  setEnabled($("chat-undo"), !running && messages.length);
  setEnabled($("chat-clear"), !running && messages.length);
  for (const id of ["model", "model-a", "model-b"]) $(id).disabled = Boolean(running);
}

function refresh() {
  refreshButtons();
  drawBranches();
  showMeter();
  showRequest();
  refreshNext();
}

function chooseTab(name) {
  tab = name;
  for (const button of document.querySelectorAll("[role=tab]")) {
    const isChosen = button.id === `tab-${name}`;
    button.setAttribute("aria-selected", isChosen);
    button.tabIndex = isChosen ? 0 : -1;
    $(button.getAttribute("aria-controls")).hidden = !isChosen;
  }
  $("main").dataset.tab = name;
  alternatives.close();
  if (name === "compare" && !$("compare-text").value) $("compare-text").value = isEditing ? $("text").value : story().text();
  $("error").textContent = "";
  refresh();
  if (name === "inside") attempt(lookInside);
}

$("tabs").onkeydown = event => {
  const tabs = [...$("tabs").children], at = tabs.indexOf(event.target), n = tabs.length;
  const to = { ArrowRight: (at + 1) % n, ArrowLeft: (at + n - 1) % n, Home: 0, End: n - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  tabs[to].focus();
  tabs[to].click();
};

// The text stays when another model reads it.
let lastModel = null;
function changeModel() {
  const text = isEditing ? $("text").value : story(lastModel).text();
  lastModel = model();
  const { layers, heads, parameters, context, vocab_size, has_template } = about(model());
  $("about").textContent = `${parameters.toLocaleString("en")} parameters, ${layers} layers of ${heads} heads, ` +
    `context ${context.toLocaleString("en")}, vocabulary ${vocab_size.toLocaleString("en")}`;
  $("chat-hint").textContent = has_template
    ? "Messages are written in the model's own template."
    : "This model has no chat template, so it cannot hold a conversation. Tune one with mygpt finetune.";
  $("main").classList.toggle("without-template", !has_template);
  setEditing(true);
  $("text").value = text;
  next = selected = null;
  look.inside.headsOff = [];
  messages.length = 0;
  lastChat = null;
  drawMessages();
  $("status").textContent = "";
  refresh();
  if (tab === "inside") attempt(lookInside);
}

function onShortcut(event) {
  const command = event.ctrlKey || event.metaKey;
  if (event.key === "Escape" && running && $("popover").hidden) stop();
  else if (command && event.key === "Enter") ({ write, chat: send, compare })[tab]?.();
  else if (command && tab === "write" && !/^(TEXTAREA|INPUT)$/.test(event.target.tagName) && /^[zy]$/i.test(event.key))
    $(event.key.toLowerCase() === "z" && !event.shiftKey ? "undo" : "redo").click();
  else return;
  event.preventDefault();
}

async function start() {
  $("legend").replaceChildren(...PROBABILITIES.map(({ name }, i) =>
    element("li", {}, element("span", { className: `token p${i}`, textContent: name }))));
  for (const id of Object.keys(SLIDERS)) $(id).oninput = () => { showSettings(); showRequest(); refreshNext(); };
  for (const id of ["max_tokens", "keep-seed", "message"]) $(id).oninput = showRequest;
  $("seed").oninput = () => { isSeedUsed = false; showRequest(); };
  $("draw-seed").onclick = () => { drawSeed(); showRequest(); };
  // A disabled button would lose the keyboard focus, so the buttons stay enabled and their clicks are ignored.
  document.addEventListener("click", event => {
    if (event.target.closest("[aria-disabled=true]")) event.stopImmediatePropagation();
  }, true);
  const clicks = {
    go: write, another, undo: () => travel("undo"), redo: () => travel("redo"), edit: toggleEditing, send, compare,
    "chat-undo": () => chatBack(2), "chat-clear": () => chatBack(messages.length),
  };
  for (const [id, action] of Object.entries(clicks)) $(id).onclick = action;
  for (const button of document.querySelectorAll("[role=tab]")) button.onclick = () => chooseTab(button.id.slice(4));
  for (const button of document.querySelectorAll("[data-copy]")) button.onclick = () => copy(button);
  for (const kind of ["input", "keyup", "click"]) $("text").addEventListener(kind, () => {
    clearTimeout(typingTimer);
    typingTimer = setTimeout(refreshNext, 200);
    showRequest();
  });
  addEventListener("keydown", onShortcut);
  alternatives.onChoose = choose;
  alternatives.onPin = (text, node) => {
    selected = text === story() ? node : null;
    refreshNext();
  };
  alternatives.start();
  drawSeed();
  showSettings();
  const { models: found } = await fetchJson("/page/models");
  for (const one of found) models.set(one.name, one);
  for (const id of ["model", "model-a", "model-b"])
    $(id).replaceChildren(...found.map(({ name }) => element("option", { value: name, textContent: name })));
  $("model-b").selectedIndex = Math.min(1, found.length - 1);
  $("compare-hint").textContent = found.length > 1
    ? "Both models use the same settings and the same seed."
    : "The server has one model. To compare two, start it with several: mygpt serve --model one --model two.";
  $("model").onchange = changeModel;
  for (const [i, id] of ["model-a", "model-b"].entries()) $(id).onchange = () => {
    pair[i].root.children = [];
    pair[i].leaf = pair[i].root;
    pair[i].draw();
  };
  lastModel = model();
  changeModel();
  $("text").focus();
}

attempt(start);
