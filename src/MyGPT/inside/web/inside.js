// Draw how a model reads a text: its tokens, the attention maps and the prediction after each layer. inside.html has the
// elements, and page_data (inside/page.py) describes the numbers. All pages that explain a text share this file.

// The small map of a head in pixels of its canvas, which are half the size of a pixel in inside.css: the map, the border of its
// button, the gap between buttons, and the distance from one map to the next.
const SIDE = 64, EDGE = 2, GAP = 6, PITCH = SIDE + 2 * EDGE + GAP;

class Inside {
  // `start` may name a layer, a head and a token to begin with. Those that do not exist are ignored.
  // `onChoose` is called after each choice. With `onSwitch`, heads can be switched off; it is called after each change.
  constructor({ start = {}, onChoose = () => {}, onSwitch = null } = {}) {
    Object.assign(this, { start, onChoose, onSwitch, data: null, allOn: null });
    Object.assign(this, { layer: 0, head: 0, headsOff: [] });
    this.chosenToken = null; // null means the last token, also when the text grows
    this.chosenDepth = null; // null means the last layer
    this.map = this.makeMap();
    $("map").replaceChildren(element("span"), element("span", { className: "columns mono" }), element("span", { className: "rows mono" }),
      this.map, element("span", { className: "lines" }), element("span", { className: "mark" }));
    this.pointed = [0, 0]; // the row and the column below the pointer
    $("layer").onchange = $("head").onchange = ({ target }) => this.choose({ [target.id]: Number(target.value) });
    $("switch").hidden = !onSwitch;
    $("switch").onclick = () => this.switchHead(this.layer, this.head);
    $("heads").onkeydown = event => this.moveInHeads(event);
    $("lens").replaceChildren(element("tbody"), element("tfoot", {}, element("tr")));
    $("lens").onkeydown = event => this.moveInLens(event);
    $("lens").onclick = event => {
      const cell = event.target.closest("td");
      if (cell) this.chooseCell({ token: cell.cellIndex - 1, depth: this.data.layers - cell.parentElement.rowIndex });
    };
    this.readColour();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.readColour();
      if (this.data) this.draw();
    });
  }

  // Read the colour of the attention weights as a pixel without opacity. Its lowest byte is red, as on all usual computers.
  readColour() {
    const [red, green, blue] = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim().split(" ");
    this.colour = red | green << 8 | blue << 16;
  }

  get T() { return this.data.tokens.length; }
  get token() { return Math.min(this.chosenToken ?? Infinity, this.T - 1); }
  get depth() { return Math.min(this.chosenDepth ?? Infinity, this.data.layers); }
  label(t) { return this.data.tokens[t].label; }
  weight(layer, head, row, column) { return this.weights[((layer * this.data.heads + head) * this.T + row) * this.T + column] / 255; }

  show(data) {
    this.take(data);
    this.draw();
  }

  // Take new numbers, without drawing them yet. The choice of the reader stays as far as it exists.
  take(data) {
    const isOther = this.data?.layers !== data.layers || this.data?.heads !== data.heads;
    this.data = data;
    // Attention weights as bytes, 255 for 1, in the order layer, head, row, column.
    const text = atob(data.attention);
    this.weights = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) this.weights[i] = text.charCodeAt(i);
    if (!this.headsOff.length) this.allOn = data;
    if (isOther) this.prepare();
  }

  // Make what depends only on the numbers of layers and heads.
  prepare() {
    const { layers, heads } = this.data;
    const valid = (value, n) => value !== null && value !== undefined && /^\d+$/.test(value) && Number(value) < n;
    for (const [name, n] of [["layer", layers], ["head", heads]]) {
      if (valid(this.start[name], n)) this[name] = Number(this.start[name]);
      if (this[name] >= n) this[name] = 0;
      $(name).replaceChildren(...numbers(n).map(i => element("option", { value: i, textContent: i })));
    }
    if (valid(this.start.token, this.T)) this.chosenToken = Number(this.start.token);
    this.headsOff = this.headsOff.filter(([layer, head]) => layer < layers && head < heads);
    this.start = {};
    const edge = text => element("span", { className: "edge", textContent: text });
    $("heads").style.gridTemplateColumns = `repeat(${heads + 1}, max-content)`;
    $("heads").replaceChildren(element("canvas"), edge("layer"), ...numbers(heads).map(edge),
      ...numbers(layers).flatMap(layer => [edge(layer), ...numbers(heads).map(head => this.headButton(layer, head))]));
  }

  choose({ layer = this.layer, head = this.head, token = this.token, depth = this.depth }) {
    Object.assign(this, { layer, head });
    this.chosenToken = token === this.T - 1 ? null : token;
    this.chosenDepth = depth === this.data.layers ? null : depth;
    this.draw();
    this.onChoose();
  }

  // Heads that are switched off

  isOff(layer, head) { return this.headsOff.some(([l, h]) => l === layer && h === head); }

  switchHead(layer, head) {
    this.setHeadsOff(this.isOff(layer, head)
      ? this.headsOff.filter(([l, h]) => l !== layer || h !== head)
      : [...this.headsOff, [layer, head]].sort((one, other) => one[0] - other[0] || one[1] - other[1]));
  }

  setHeadsOff(heads) {
    this.headsOff = heads;
    this.drawSwitches();
    this.onSwitch();
  }

  // Say what the heads that are off change. `allOn` has the numbers of the same text with all heads on.
  compare(allOn) {
    this.allOn = allOn;
    this.drawEffect();
  }

  // Return true if the numbers with all heads on are those of the same text.
  get isCompared() {
    const ids = data => data.tokens.map(({ id }) => id).join();
    return Boolean(this.allOn) && ids(this.allOn) === ids(this.data);
  }

  drawSwitches() {
    const { layer, head } = this, isOn = !this.isOff(layer, head);
    $("switch").setAttribute("aria-checked", isOn);
    $("switch").setAttribute("aria-label", `Layer ${layer}, head ${head}`);
    $("switch").lastElementChild.textContent = isOn ? "head on" : "head off";
    for (const button of $("heads").querySelectorAll("button")) {
      const [l, h] = button.dataset.place.split(".").map(Number), isChosen = l === layer && h === head;
      const isOff = this.isOff(l, h), title = `layer ${l}, head ${h}${isOff ? ", switched off" : ""}`;
      const className = [isChosen && "chosen", isOff && "off"].filter(Boolean).join(" ");
      change(button, { className, tabIndex: isChosen ? 0 : -1, title, ariaLabel: title });
    }
    const chip = ([l, h]) => {
      const button = element("button", { type: "button", textContent: `layer ${l}, head ${h} ×` });
      button.setAttribute("aria-label", `Switch layer ${l}, head ${h} on`);
      button.onclick = () => this.switchHead(l, h);
      return button;
    };
    const all = element("button", { type: "button", id: "all-on", textContent: "Switch all on" });
    all.onclick = () => this.setHeadsOff([]);
    const hadFocus = $("off").contains(document.activeElement);
    refill($("off"), ...(this.headsOff.length ? ["Switched off:", ...this.headsOff.map(chip), all] : []));
    $("off").hidden = $("effect").hidden = !this.headsOff.length;
    if (hadFocus && !this.headsOff.length) $("switch").focus();
  }

  drawEffect() {
    if (!this.headsOff.length || !this.isCompared) return;
    const best = data => data.next[this.token].top[0], [now, p] = best(this.data), [before, q] = best(this.allOn);
    const count = this.headsOff.length === 1 ? "this head" : `these ${this.headsOff.length} heads`;
    $("effect").replaceChildren(`Without ${count}, the most likely token to follow `, quoted(this.label(this.token)), " is ",
      quoted(now), ` (${percent(p)}). With all heads on, it is `, quoted(before), ` (${percent(q)}).`);
  }

  // Drawing

  draw() {
    this.drawTokens();
    this.drawSwitches();
    this.drawEffect();
    this.drawAttention();
    this.drawLens();
    this.scrollToChosen();
  }

  // Scroll the map and the lens as far as needed to show the choice. This comes last, because the browser computes the layout
  // again when a size is read after a change.
  scrollToChosen() {
    const map = $("map"), box = map.parentElement, { cell } = this, later = (this.T - 1 - this.token) * cell;
    // The cell of the map in which the token attends to itself.
    const right = map.offsetWidth - later, bottom = map.offsetHeight - later;
    if (right > box.scrollLeft + box.clientWidth || right - cell < box.scrollLeft) box.scrollLeft = right - box.clientWidth;
    if (bottom > box.scrollTop + box.clientHeight || bottom - cell < box.scrollTop) box.scrollTop = bottom - box.clientHeight;
    const lens = $("lens").parentElement, chosen = lens.querySelector(".chosen");
    const start = chosen.offsetLeft - lens.querySelector("th").offsetWidth, end = chosen.offsetLeft + chosen.offsetWidth;
    if (start < lens.scrollLeft || end > lens.scrollLeft + lens.clientWidth) lens.scrollLeft = start;
  }

  // Fill `parent` with buttons for the first n tokens. Each has a note and, if the note is a weight, a colour.
  drawButtons(parent, n, note, strength = () => 0) {
    const make = t => {
      const button = element("button", { type: "button" }, quoted(""), element("small"));
      button.onclick = () => this.choose({ token: t });
      return button;
    };
    fill(parent, n, make, (button, t) => {
      setText(button.firstElementChild, this.label(t));
      setText(button.lastElementChild, note(t));
      change(button, { className: t === this.token ? "chosen" : "" });
      setHeat(button, strength(t));
    });
  }

  drawTokens() {
    this.drawButtons($("tokens"), this.T, t => this.data.tokens[t].id);
  }

  drawAttention() {
    const { layer, head, token } = this;
    $("layer").value = layer;
    $("head").value = head;
    this.paintHeads();
    this.paintMap();
    this.drawMap();
    $("reading").replaceChildren(`In layer ${layer}, head ${head}, `, quoted(this.label(token)), ` (token ${token}) attends to:`);
    const weight = t => this.weight(layer, head, token, t);
    this.drawButtons($("taken"), token + 1, t => percent(weight(t)), weight);
  }

  // Draw the attention weights of the chosen head, one pixel for each pair of tokens.
  paintMap() {
    const { T } = this, first = (this.layer * this.data.heads + this.head) * T * T;
    paint(this.map, T, T, pixels => {
      for (let i = 0; i < T * T; i++) pixels[i] = this.colour | this.weights[first + i] << 24;
    });
  }

  // Draw the small maps of all heads below their buttons. They share one canvas, because the browser needs much longer for many.
  paintHeads() {
    const { T, data: { layers, heads } } = this, width = heads * PITCH - GAP, cell = numbers(SIDE).map(i => Math.floor(i * T / SIDE));
    paint($("heads").firstElementChild, width, layers * PITCH - GAP, pixels => {
      for (let layer = 0; layer < layers; layer++) for (let head = 0; head < heads; head++) {
        const strength = this.isOff(layer, head) ? 0.3 : 1, map = (layer * heads + head) * T * T;
        for (let y = 0; y < SIDE; y++) {
          const to = (layer * PITCH + EDGE + y) * width + head * PITCH + EDGE, row = map + cell[y] * T;
          for (let x = 0; x < SIDE; x++) pixels[to + x] = this.colour | this.weights[row + cell[x]] * strength << 24;
        }
      }
    });
  }

  makeMap() {
    const canvas = element("canvas"), at = event => [event.offsetY, event.offsetX].map(offset =>
      Math.min(Math.max(Math.floor(offset / canvas.clientWidth * this.T), 0), this.T - 1));
    canvas.setAttribute("role", "img");
    canvas.onclick = event => this.choose({ token: at(event)[0] });
    canvas.onpointermove = event => {
      this.pointed = at(event);
      this.drawPointed();
    };
    return canvas;
  }

  // Say in a tooltip what the cell below the pointer shows.
  drawPointed() {
    const [row, column] = this.pointed.map(t => Math.min(t, this.T - 1)), { layer, head } = this;
    this.map.title = column > row ? `${this.label(row)} cannot attend to a later token`
      : `${this.label(row)} attends to ${this.label(column)}: ${percent(this.weight(layer, head, row, column))}`;
  }

  drawMap() {
    const { T, layer, head, token } = this, map = $("map");
    this.map.setAttribute("aria-label", `Attention weights of layer ${layer}, head ${head}`);
    this.drawPointed();
    const makeLabel = () => element("span"), [, columns, rows, , , mark] = map.children;
    fill(columns, T, makeLabel, (span, t) => setText(span, this.label(t)));
    fill(rows, T, makeLabel, (span, t) => {
      setText(span, this.label(t));
      change(span, { className: t === token ? "chosen" : "" });
    });
    this.cell = Math.min(Math.max(Math.floor((innerWidth < 640 ? 290 : 400) / T), 11), 26);
    map.style.setProperty("--cell", `${this.cell}px`);
    this.map.style.width = this.map.style.height = `${T * this.cell}px`;
    mark.style.marginTop = `${token * this.cell}px`;
  }

  headButton(layer, head) {
    const button = element("button", { type: "button" });
    button.dataset.place = `${layer}.${head}`;
    button.onclick = () => this.choose({ layer, head });
    return button;
  }

  // The arrow keys move the choice among the heads.
  moveInHeads(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const within = (value, n) => Math.min(Math.max(value, 0), n - 1);
    this.choose({ layer: within(this.layer + step[0], this.data.layers), head: within(this.head + step[1], this.data.heads) });
    $("heads").querySelector(".chosen").focus();
  }

  drawLens() {
    const { layers, lens } = this.data, [rows, names] = $("lens").children;
    const makeCell = column => column ? element("td", {}, quoted("")) : element("th", { className: "row", scope: "row" });
    fill(rows, layers + 1, () => element("tr"), (row, i) => {
      const depth = layers - i, name = depth === 0 ? "embeddings" : `layer ${depth - 1}`;
      fill(row, this.T + 1, makeCell, (cell, column) => {
        if (!column) return setText(cell, name);
        const [text, p] = lens[depth][column - 1][0], isChosen = column - 1 === this.token && depth === this.depth;
        setLabel(cell.firstElementChild, text);
        change(cell, { title: `${text} ${percent(p)}`, className: isChosen ? "chosen" : "", tabIndex: isChosen ? 0 : -1 });
        setHeat(cell, p);
      });
    });
    const makeName = column => element("th", { className: column ? "" : "row", scope: "col" }, ...(column ? [quoted("")] : ["after token"]));
    fill(names.firstElementChild, this.T + 1, makeName, (cell, column) => column && setLabel(cell.firstElementChild, this.label(column - 1)));
    const runners = this.data.lens[this.depth][this.token].flatMap(([text, p]) => [" ", quoted(text), ` ${percent(p)},`]);
    runners.push(runners.pop().replace(/,$/, "."));
    const where = this.depth === 0 ? "After the embeddings" : `After layer ${this.depth - 1}`;
    $("runners").replaceChildren(`${where}, the most likely tokens to follow `, quoted(this.label(this.token)), " are", ...runners);
  }

  // The arrow keys move the choice among the cells of the predictions.
  moveInLens(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const within = (value, n) => Math.min(Math.max(value, 0), n - 1);
    this.chooseCell({ token: within(this.token + step[0], this.T), depth: within(this.depth + step[1], this.data.layers + 1) });
  }

  chooseCell(change) {
    this.choose(change);
    $("lens").querySelector(".chosen").focus({ preventScroll: true });
  }
}

// Set the size of a canvas and its pixels: `fill` receives them as numbers in the form of Inside.colour.
function paint(canvas, width, height, fill) {
  change(canvas, { width, height });
  const image = new ImageData(width, height);
  fill(new Uint32Array(image.data.buffer));
  canvas.getContext("2d").putImageData(image, 0, 0);
}
