// The next token: the sliders of the sampling options, and lists of tokens with their probabilities. The pages of
// `mygpt explain`, `mygpt explain --live` and `mygpt serve` share this file; sampling.html and next.html have the elements.

const SLIDERS = { temperature: [], top_k: [0], top_p: [1], min_p: [0] }; // with the value that turns a filter off
const N_ROWS = 12; // rows in the list of next tokens

// Return the options of the sliders. Filters that are off are left out.
function sampling() {
  const options = {};
  for (const [name, off] of Object.entries(SLIDERS)) {
    const value = Number($(name).value);
    if (!off.includes(value)) options[name] = value;
  }
  return options;
}

// Show the value of each slider beside it.
function showSettings() {
  for (const [name, off] of Object.entries(SLIDERS)) {
    const slider = $(name), value = Number(slider.value);
    const text = off.includes(value) ? "off" : name === "temperature" && value === 0 ? "0, greedy" : String(value);
    slider.nextElementSibling.textContent = text;
    slider.setAttribute("aria-valuetext", text);
  }
}

// Fill a list with rows of tokens. A row is a pair of a token [id, label] and options: a note such as the probability, and
// lengths of bars from 0 to 1, `p` and `before`. Without `onChoose`, the row is not a button.
function drawRows(list, rows) {
  fill(list, rows.length, () => element("li"), (item, i) => drawRow(item, ...rows[i]));
}

function drawRow(item, [id, label], { p, before = null, note, heard = note, chosen = false, removed = false, onChoose = null }) {
  const kind = onChoose ? "button" : "div", span = className => element("span", { className });
  if (item.firstElementChild?.localName !== kind) {
    const bar = element("span", { className: "bar" }, span("before"), span("now"));
    item.replaceChildren(element(kind, onChoose ? { type: "button" } : {}, quoted(""), bar, span("note")));
  }
  const row = item.firstElementChild, [name, { children: [outline, full] }, noted] = row.children;
  setText(name, label);
  setText(noted, note);
  change(outline, { hidden: before === null });
  outline.style.width = `${100 * before}%`;
  full.style.width = `${100 * p}%`;
  change(row, {
    className: ["alternative", chosen && "chosen", removed && "removed"].filter(Boolean).join(" "),
    ariaLabel: onChoose && `${label}: ${heard}${chosen ? ", in the text" : ""}`,
    onclick: onChoose && (() => onChoose({ id, label })),
  });
}

// Draw the probabilities of the next token before and after the sampling options (next_token_data in inside/page.py).
// `place` begins a sentence, and `chosenId` is the token that follows in the text, if any.
function drawDistribution({ tokens, n_kept, removed, vocab_size }, place, chosenId, onChoose = null) {
  const shown = tokens.slice(0, N_ROWS), largest = Math.max(...shown.map(([, , before, now]) => Math.max(before, now)));
  const count = n_kept === 1 ? "1 token" : `${n_kept.toLocaleString("en")} tokens`;
  $("next-hint").replaceChildren(...place, `the settings keep ${count} of ${vocab_size.toLocaleString("en")}.`);
  drawRows($("next"), shown.map(([id, label, before, now, isKept]) => [[id, label], {
    p: now / largest, before: before / largest, note: isKept ? percent(now) : "removed", removed: !isKept,
    chosen: chosenId === id, heard: `${isKept ? percent(now) : "removed"}, model ${percent(before)}`,
    onChoose: onChoose && (token => onChoose(token, before)),
  }]));
  const more = n_kept - shown.filter(([, , , , isKept]) => isKept).length;
  const rest = 1 - shown.reduce((sum, [, , , now]) => sum + now, 0);
  $("next-rest").textContent = [
    "Full bars show the probabilities after the settings, outlines those of the model.",
    more > 0 ? `${more.toLocaleString("en")} more kept tokens: ${percent(Math.max(0, rest))}.` : "",
    n_kept < vocab_size ? `Before the settings, the removed tokens had ${percent(removed)}.` : "",
  ].join(" ");
}
