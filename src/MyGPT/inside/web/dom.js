// Small helpers of all pages: elements, colours and numbers.

const $ = id => document.getElementById(id);
function element(kind, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(kind), attributes);
  made.append(...children);
  return made;
}
// The colour of a weight or a probability. Below a text it is paler, so that the text stays readable.
const paleHeat = p => `rgb(var(--heat) / calc(var(--pale) * ${p}))`;
const heat = p => `rgb(var(--heat) / ${p})`;
const percent = p => p < 0.001 ? "< 0.1 %" : (100 * p).toFixed(p < 0.1 ? 1 : 0) + " %";
const quoted = text => element("span", { className: "mono", textContent: text });
const numbers = n => [...Array(n).keys()];

// Replace the children of an element. The new child at the same place takes over the keyboard focus of an old one.
function refill(parent, ...children) {
  const place = [...parent.children].findIndex(child => child.contains(document.activeElement));
  parent.replaceChildren(...children);
  if (place < 0) return;
  const child = parent.children[Math.min(place, parent.children.length - 1)];
  (child?.matches("button, [tabindex]") ? child : child?.querySelector("button"))?.focus({ preventScroll: true });
}

// Give an element n children. Children that exist stay, so that the page does not flicker and the keyboard focus is kept:
// `make(i)` returns a new child, and `update(child, i)` changes it.
function fill(parent, n, make, update) {
  while (parent.children.length > n) parent.lastElementChild.remove();
  while (parent.children.length < n) parent.append(make(parent.children.length));
  let i = 0;
  for (let child = parent.firstElementChild; child; child = child.nextElementSibling) update(child, i++);
}

// Change properties of a node. Writing a value costs the browser time even if it is the old one, so equal values are not written.
function change(node, properties) {
  for (const name in properties) if (node[name] !== properties[name]) node[name] = properties[name];
}

// Write the text of a node that contains nothing else. An old text node is changed, which is faster than a new one.
function setText(node, text) {
  if (node.firstChild) change(node.firstChild, { data: String(text) });
  else node.textContent = text;
}

// Write the label of a token. Only a long one can be cut off, because the browser needs more time for labels that can.
function setLabel(node, label) {
  setText(node, label);
  change(node, { className: label.length > 7 ? "mono long" : "mono" });
}

// Colour a node that shows a weight or a probability.
function setHeat(node, p) {
  if (node.heat !== p) node.style.backgroundColor = p ? paleHeat(p) : "";
  node.heat = p;
}
