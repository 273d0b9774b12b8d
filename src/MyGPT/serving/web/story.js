// A text as a path in a tree of tokens. Every continuation and every chosen alternative adds to the tree, nothing is lost.
// A node is one token: its id, its text, its label, its log-probability and the most likely tokens at its place (top).

const PROBABILITIES = [
  { least: 0.5, name: "at least 50 %" },
  { least: 0.2, name: "20 to 50 %" },
  { least: 0.05, name: "5 to 20 %" },
  { least: 0.01, name: "1 to 5 %" },
  { least: 0, name: "below 1 %" },
];

// Return the class of a log-probability: p0 for likely tokens up to p4 for unlikely ones.
function probabilityClass(logprob) {
  if (logprob === null || logprob === undefined) return "unknown";
  return "p" + PROBABILITIES.findIndex(({ least }) => Math.exp(logprob) >= least);
}

class Story {
  // `host` is the element that shows the tokens. `model` returns the name of the model. `onChange` is called after each change.
  constructor(host, model, onChange = () => {}) {
    Object.assign(this, { host, model, onChange });
    this.root = { id: null, text: "", parent: null, children: [], starts: false };
    this.leaf = this.root;
    this.past = [];
    this.future = [];
    this.run = null; // the last request: its start, its settings and its new tokens
    host.addEventListener("keydown", event => this.onKey(event));
  }

  path(leaf = this.leaf) {
    const nodes = [];
    for (let node = leaf; node.parent; node = node.parent) nodes.push(node);
    return nodes.reverse();
  }

  ids(leaf = this.leaf) { return this.path(leaf).map(node => node.id); }
  text(leaf = this.leaf) { return this.path(leaf).map(node => node.text).join(""); }

  // Return the child of `parent` with the id of `token`. It is added if there is none.
  child(parent, token, source) {
    let node = parent.children.find(({ id }) => id === token.id);
    if (!node) parent.children.push(node = { ...token, source, parent, children: [], starts: false });
    if (node.logprob === null || node.logprob === undefined) Object.assign(node, { logprob: token.logprob, top: token.top });
    return node;
  }

  // Move to another node of the tree. `undo` moves back.
  go(leaf) {
    if (leaf === this.leaf) return;
    this.past.push(this.leaf);
    this.future = [];
    this.show(leaf);
  }

  undo() { this.travel(this.past, this.future); }
  redo() { this.travel(this.future, this.past); }

  travel(from, to) {
    if (!from.length) return;
    to.push(this.leaf);
    this.show(from.pop());
  }

  show(leaf) {
    this.leaf = leaf;
    this.draw();
    this.onChange();
  }

  // Replace the text by another one, which shares the beginning of the tree as far as the tokens are the same.
  async read(text, signal) {
    if (text === this.text()) return;
    const { tokens } = await fetchJson("/page/read", { model: this.model(), text }, signal);
    let node = this.root;
    for (const token of tokens) {
      const old = node.children.length;
      node = this.child(node, token, "written");
      if (old && node.parent.children.length > old) node.starts = true;
    }
    this.go(node);
  }

  // Continue from the node `start`, after the alternative `first` if there is one. Return why the text ended.
  // `onText` receives the new text as it comes.
  async write(start, first, settings, signal, onText = () => {}) {
    const ids = this.ids(start);
    if (first) ids.push(first.id);
    const body = { model: this.model(), ids, ...settings };
    const old = this.leaf, run = { start, first, settings, nodes: [], began: performance.now() };
    let node = start, finish = null;
    try {
      for await (const event of events("/page/generate", body, signal)) {
        if ("prompt" in event) {
          run.prompt = event.prompt;
          this.run = run;
          if (first) {
            node = this.child(start, { ...first, text: event.last_text }, "chosen");
            node.starts = true;
          }
          this.leaf = node;
          this.draw();
        } else if ("id" in event) {
          node = this.child(node, event, "generated");
          if (!run.nodes.length && !first) node.starts = true;
          run.nodes.push(node);
          this.leaf = node;
          this.append(node);
          onText(event.text);
        } else {
          finish = event.finish_reason;
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      finish = "stopped";
    } finally {
      run.seconds = (performance.now() - run.began) / 1000;
      run.finish = finish;
      if (this.leaf !== old) {
        this.past.push(old);
        this.future = [];
      }
      this.onChange();
    }
    return finish;
  }

  // Drawing

  element(node) {
    const p = node.logprob === null || node.logprob === undefined ? "unknown" : percent(Math.exp(node.logprob));
    const made = element("span", {
      className: `token ${node.source} ${probabilityClass(node.logprob)}`, textContent: node.text, tabIndex: -1,
    });
    made.dataset.label = node.label;
    made.classList.toggle("breaks", /^\s*\n/.test(node.text)); // a line break alone would be too small to be chosen
    made.setAttribute("role", "button");
    made.setAttribute("aria-haspopup", "dialog");
    made.setAttribute("aria-label", `${node.label}, ${p === "unknown" ? "first token" : p}`);
    made.node = node;
    made.onclick = () => alternatives.open(this, made, true);
    made.onpointerenter = event => event.pointerType === "mouse" && alternatives.preview(this, made);
    made.onpointerleave = () => alternatives.leave();
    made.onfocus = () => {
      this.setTabStop(made);
      if (!alternatives.isReturning) alternatives.open(this, made, false);
    };
    made.onblur = () => alternatives.leave();
    return made;
  }

  draw() {
    alternatives.close();
    this.host.replaceChildren(...this.path().map(node => this.element(node)));
    this.setTabStop(this.host.lastElementChild);
  }

  append(node) {
    const made = this.element(node);
    this.host.append(made);
    this.setTabStop(made);
    const below = made.getBoundingClientRect().bottom - innerHeight + 80;
    if (below > 0 && below < 200) scrollBy(0, below);
  }

  // The whole text is one stop of the Tab key. The arrow keys move among the tokens.
  setTabStop(made) {
    if (!made) return;
    if (this.stop) this.stop.tabIndex = -1;
    this.stop = made;
    made.tabIndex = 0;
  }

  onKey(event) {
    const tokens = [...this.host.children], at = tokens.indexOf(event.target);
    if (at < 0) return;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (tokens[to]) tokens[to].focus();
    else if (event.key === "Enter" && !event.ctrlKey && !event.metaKey || event.key === " ") alternatives.open(this, event.target, true);
    else if (event.key === "Escape") alternatives.close();
    else if (to === undefined) return;
    event.preventDefault();
  }
}

const isNarrow = () => matchMedia("(max-width: 40rem)").matches;

// The box with the alternatives to a token. It appears on hover and focus, and stays open after a click, a tap or Enter.
const alternatives = {
  isPinned: false,
  isReturning: false,
  token: null,
  timer: 0,
  onPin: () => {},
  onChoose: () => {},

  preview(story, token) {
    if (this.isPinned) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.open(story, token, false), 80);
  },

  leave() {
    if (this.isPinned) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.close(), 200);
  },

  open(story, token, isPinned) {
    if (this.isPinned && !isPinned) return;
    clearTimeout(this.timer);
    this.token?.classList.remove("open");
    Object.assign(this, { story, token, isPinned });
    token.classList.add("open");
    const { label, logprob, top, id } = token.node;
    $("popover-title").replaceChildren(quoted(label));
    const known = logprob !== null && logprob !== undefined;
    const rank = top?.findIndex(([other]) => other === id) ?? -1;
    $("popover-hint").textContent = !known
      ? "The model gives no probability to the first token, or to the tokens of a text beyond its context."
      : `${percent(Math.exp(logprob))}, ${rank >= 0 ? `rank ${rank + 1}` : `not among the first ${top.length}`}. ` +
        "Choose another token to start a branch.";
    const largest = top?.length ? Math.exp(top[0][2]) : 1;
    drawRows($("popover-list"), (top ?? []).map(entry => [entry, {
      p: Math.exp(entry[2]) / largest, note: percent(Math.exp(entry[2])), chosen: entry[0] === id,
      onChoose: ({ id, label }) => {
        const { node } = this.token;
        this.close();
        const [, , logprob] = node.top.find(([other]) => other === id);
        this.onChoose(story, node.parent, { id, label, logprob, top: node.top });
      },
    }]));
    $("popover-close").hidden = !isPinned;
    $("popover").hidden = false;
    this.place();
    if (isPinned) {
      const covered = token.getBoundingClientRect().bottom + 8 - $("popover").getBoundingClientRect().top;
      if (isNarrow() && covered > 0) scrollBy(0, covered);
      ($("popover-list").querySelector("button") ?? $("popover-close")).focus();
      this.onPin(story, token.node);
    }
  },

  // Place the box below the token, or above it if there is more room. On a narrow screen it is at the lower edge.
  place() {
    if (isNarrow()) return;
    const box = $("popover"), at = this.token.getClientRects()[0];
    const edge = Math.min(innerWidth - 8, this.story.host.getBoundingClientRect().right + 16);
    const left = Math.max(8, Math.min(at.left, edge - box.offsetWidth));
    const fitsBelow = at.bottom + box.offsetHeight + 8 < innerHeight || at.top < box.offsetHeight + 8;
    box.style.left = `${left}px`;
    box.style.top = `${fitsBelow ? at.bottom + 6 : at.top - box.offsetHeight - 6}px`;
  },

  close() {
    clearTimeout(this.timer);
    if ($("popover").hidden) return;
    const hadFocus = $("popover").contains(document.activeElement), { token, isPinned } = this;
    $("popover").hidden = true;
    token.classList.remove("open");
    this.isPinned = false;
    if (isPinned) this.onPin(null, null);
    if (hadFocus && token.isConnected) {
      this.isReturning = true; // the focus must not open the box again
      token.focus();
      this.isReturning = false;
    }
  },

  start() {
    const box = $("popover");
    box.onpointerenter = () => clearTimeout(this.timer);
    box.onpointerleave = () => this.leave();
    box.onkeydown = event => {
      if (event.key === "Escape") this.close();
      const buttons = [...box.querySelectorAll("button:not([hidden])")], at = buttons.indexOf(document.activeElement);
      const to = { ArrowDown: at + 1, ArrowUp: at - 1 }[event.key];
      if (to === undefined && event.key !== "Escape") return;
      buttons[to]?.focus();
      event.preventDefault();
    };
    $("popover-close").onclick = () => this.close();
    document.addEventListener("pointerdown", event => {
      if (this.isPinned && !box.contains(event.target) && event.target !== this.token) this.close();
    });
    addEventListener("resize", () => box.hidden || this.place());
    addEventListener("scroll", () => box.hidden || this.place(), { passive: true });
  },
};
