// Draw how a model reads a text. inside.html has the elements, and page_data (inside/page.py) returns the numbers.
// The pages of `mygpt explain` and `mygpt serve` share this file.

let redrawInside = () => {};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redrawInside());

// Draw `data`. `start` may name a layer, a head and a token; those that do not exist are ignored.
// Every choice of the user calls `onChoose` with the chosen layer, head, token and depth.
function showInside(data, start = {}, onChoose = () => {}) {
  const T = data.tokens.length;
  // Attention weights as bytes, 255 for 1, in the order layer, head, row, column.
  const weights = Uint8Array.from(atob(data.attention), c => c.charCodeAt(0));
  const weight = (layer, head, row, column) => weights[((layer * data.heads + head) * T + row) * T + column] / 255;
  const label = t => data.tokens[t].label;
  const state = { layer: 0, head: 0, token: T - 1, depth: data.layers };

  function choose(change) {
    Object.assign(state, change);
    onChoose(state);
    draw();
  }

  function draw() {
    drawTokens();
    drawAttention();
    drawLens();
    drawNext();
  }

  function tokenButton(t, note, strength = 0) {
    const button = element("button", { type: "button", className: t === state.token ? "chosen" : "" },
      quoted(label(t)), element("small", { textContent: note }));
    button.style.background = strength ? paleHeat(strength) : "";
    button.onclick = () => choose({ token: t });
    return button;
  }

  function drawTokens() {
    refill($("tokens"), ...data.tokens.map((token, t) => tokenButton(t, token.id)));
  }

  function drawAttention() {
    const { layer, head, token } = state;
    $("layer").value = layer;
    $("head").value = head;
    for (const button of $("heads").querySelectorAll("button"))
      button.classList.toggle("chosen", button.dataset.place === `${layer}.${head}`);
    const rows = data.tokens.map((_, row) => {
      const cells = data.tokens.map((_, column) => {
        const cell = element("td");
        if (column <= row) {
          const p = weight(layer, head, row, column);
          cell.style.background = heat(p);
          cell.title = `${label(row)} attends to ${label(column)}: ${percent(p)}`;
          cell.onclick = () => choose({ token: row });
        }
        return cell;
      });
      const name = element("th", { className: "row mono", scope: "row", textContent: label(row) });
      return element("tr", { className: row === token ? "chosen" : "" }, name, ...cells);
    });
    const names = data.tokens.map((_, t) => element("th", { className: "column mono", scope: "col", textContent: label(t) }));
    $("map").style.setProperty("--cell", T > 40 ? "12px" : T > 20 ? "18px" : "26px");
    $("map").replaceChildren(element("tr", {}, element("td"), ...names), ...rows);
    $("reading").replaceChildren(`In layer ${layer}, head ${head}, `, quoted(label(token)), ` (token ${token}) attends to:`);
    const taken = numbers(token + 1).map(t => {
      const p = weight(layer, head, token, t);
      return tokenButton(t, percent(p), p);
    });
    refill($("taken"), ...taken);
  }

  function drawLens() {
    const rows = data.lens.map((cells, depth) => {
      const name = depth === 0 ? "embeddings" : `layer ${depth - 1}`;
      const drawn = cells.map((top, t) => {
        const [text, p] = top[0];
        const cell = element("td", { title: `${text} ${percent(p)}` }, quoted(text));
        cell.style.background = paleHeat(p);
        const isChosen = t === state.token && depth === state.depth;
        cell.classList.toggle("chosen", isChosen);
        cell.tabIndex = isChosen ? 0 : -1;
        cell.onclick = () => chooseCell({ token: t, depth });
        return cell;
      });
      return element("tr", {}, element("th", { className: "row", scope: "row", textContent: name }), ...drawn);
    }).reverse();
    const names = data.tokens.map((_, t) => element("th", { scope: "col" }, quoted(label(t))));
    const last = element("tr", {}, element("th", { className: "row", textContent: "after token" }), ...names);
    $("lens").replaceChildren(...rows, last);
    const box = $("lens").parentElement, chosen = $("lens").querySelector(".chosen");
    const left = chosen.offsetLeft - box.querySelector("th").offsetWidth, right = chosen.offsetLeft + chosen.offsetWidth;
    if (left < box.scrollLeft || right > box.scrollLeft + box.clientWidth) box.scrollLeft = left;
    const runners = data.lens[state.depth][state.token].flatMap(([text, p]) => [" ", quoted(text), ` ${percent(p)},`]);
    runners.push(runners.pop().replace(/,$/, "."));
    const where = state.depth === 0 ? "After the embeddings" : `After layer ${state.depth - 1}`;
    $("runners").replaceChildren(`${where}, the most likely tokens to follow `, quoted(label(state.token)), " are", ...runners);
  }

  function drawNext() {
    const { top, rest, actual } = data.next[state.token];
    $("question").replaceChildren("The probability of each token to follow ", quoted(label(state.token)), ". ");
    if (actual) $("question").append("The text continues with ", quoted(actual[0]), `, which has rank ${actual[2]}.`);
    else $("question").append("The text ends here.");
    const shown = [...top];
    if (actual && !top.some(([, , id]) => id === actual[3])) shown.push([actual[0], actual[1], actual[3]]);
    shown.push(["all others", Math.max(0, rest - (shown.length > top.length ? actual[1] : 0))]);
    const largest = Math.max(...shown.map(([, p]) => p));
    $("bars").replaceChildren(...shown.flatMap(([text, p, id]) => {
      const bar = element("span");
      bar.style.width = `${80 * p / largest}%`;
      const kind = actual && id === actual[3] ? " actual" : "";
      const name = element("span", { className: (id === undefined ? "name" : "name mono") + kind, textContent: text });
      return [name, element("span", { className: "bar" }, bar, element("span", { textContent: percent(p) }))];
    }));
  }

  function thumbnail(layer, head) {
    const canvas = element("canvas", { width: T, height: T });
    const context = canvas.getContext("2d");
    const [r, g, b] = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim().split(" ");
    const image = context.createImageData(T, T);
    for (let i = 0; i < T * T; i++)
      image.data.set([r, g, b, weights[(layer * data.heads + head) * T * T + i]], 4 * i);
    context.putImageData(image, 0, 0);
    const button = element("button", { type: "button", title: `layer ${layer}, head ${head}` }, canvas);
    button.setAttribute("aria-label", `layer ${layer}, head ${head}`);
    button.dataset.place = `${layer}.${head}`;
    button.onclick = () => choose({ layer, head });
    return button;
  }

  function drawThumbnails() {
    const edge = text => element("span", { className: "edge", textContent: text });
    $("heads").style.gridTemplateColumns = `repeat(${data.heads + 1}, max-content)`;
    $("heads").replaceChildren(edge("layer"), ...numbers(data.heads).map(edge),
      ...numbers(data.layers).flatMap(layer => [edge(layer), ...numbers(data.heads).map(head => thumbnail(layer, head))]));
  }

  // The arrow keys move the choice among the cells of the predictions.
  function moveInLens(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const within = (value, n) => Math.min(Math.max(value, 0), n - 1);
    chooseCell({ token: within(state.token + step[0], T), depth: within(state.depth + step[1], data.layers + 1) });
  }

  function chooseCell(change) {
    choose(change);
    $("lens").querySelector(".chosen").focus({ preventScroll: true });
  }

  for (const [name, n] of [["layer", data.layers], ["head", data.heads]]) {
    $(name).replaceChildren(...numbers(n).map(i => element("option", { value: i, textContent: i })));
    $(name).onchange = event => choose({ [name]: Number(event.target.value) });
  }
  for (const [name, n] of [["layer", data.layers], ["head", data.heads], ["token", T]]) {
    const value = Number(start[name] ?? NaN);
    if (Number.isInteger(value) && value >= 0 && value < n) state[name] = value;
  }
  $("lens").onkeydown = moveInLens;
  redrawInside = () => { drawThumbnails(); draw(); };
  redrawInside();
}
