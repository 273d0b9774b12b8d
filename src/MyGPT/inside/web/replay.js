// Replay a training run: draw the losses, texts and heads of the kept model that the slider chooses.
// replay.html has the elements, and replay_data (inside/replay.py) returns the numbers.

const SCORES = ["previous", "word", "induction"];
const SECONDS_PER_MODEL = 0.8;
const svg = (kind, attributes = {}, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};
const within = (value, n) => Math.min(Math.max(value, 0), n - 1);

// Return round numbers between `low` and `high`, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
  const first = Math.ceil(low / step), n = Math.floor(high / step + 1e-9) - first + 1;
  return numbers(n).map(i => Number(((first + i) * step).toPrecision(12)));
}

// Draw the axes of a chart in the svg element `chart`, and return the functions x and y from numbers to positions.
function drawAxes(chart, [x0, x1], [y0, y1]) {
  const box = chart.getBoundingClientRect(), width = box.width || 300, height = box.height || 200;
  const left = 34, right = width - 10, top = 8, bottom = height - 24;
  const x = value => left + (right - left) * (value - x0) / (x1 - x0 || 1);
  const y = value => bottom - (bottom - top) * (value - y0) / (y1 - y0 || 1);
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const text = (label, attributes) => svg("text", attributes, label);
  chart.replaceChildren(
    ...ticks(y0, y1, 5).flatMap(value => [
      svg("path", { class: "grid", d: `M${left} ${y(value)}H${right}` }),
      text(value, { x: left - 6, y: y(value) + 4, "text-anchor": "end" })]),
    ...ticks(x0, x1, width / 90).map(value => text(value, { x: x(value), y: height - 6, "text-anchor": "middle" })));
  return { x, y, top, bottom, x0, x1, left, right };
}

const path = (points, { x, y }) => points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");

function showReplay(data) {
  const { models, layers, heads, tokens } = data, T = tokens.length, size = T * (T + 1) / 2;
  // Attention weights as bytes, 255 for 1, in the order model, layer, head, row, column; rows end at the diagonal.
  const weights = Uint8Array.from(atob(data.attention), c => c.charCodeAt(0));
  const weight = (model, head, row, column) => weights[(model * layers * heads + head) * size + row * (row + 1) / 2 + column];
  const nameOf = head => `layer ${Math.floor(head / heads)}, head ${head % heads}`;
  const state = { model: models.length - 1, head: bestHead(), token: T - 1 };
  const markers = [];  // one function per chart, which moves its marker to the chosen step
  let timer = null;

  // Return the head with the highest score of all. Heads are numbered across the layers.
  function bestHead() {
    const highest = numbers(layers * heads).map(head => Math.max(...SCORES.flatMap(name => models.map(it => it.scores[name][head]))));
    return highest.indexOf(Math.max(...highest));
  }

  function choose(change) {
    const headChanges = "head" in change && change.head !== state.head;
    Object.assign(state, change);
    if (headChanges) drawCharts();
    draw();
    const { model, head } = state;
    const address = { step: models[model].step, layer: Math.floor(head / heads), head: head % heads };
    // Some browsers do not let a page that was opened from a file change its address.
    try { history.replaceState(null, "", "#" + new URLSearchParams(address)); } catch (error) { console.info(error); }
  }

  // Losses and scores

  function addMarker(chart, axes) {
    const marker = svg("path", { class: "marker" });
    chart.append(marker);
    markers.push(() => marker.setAttribute("d", `M${axes.x(models[state.model].step)} ${axes.top}V${axes.bottom}`));
    chart.onclick = event => {
      const rect = chart.getBoundingClientRect();
      const step = axes.x0 + (event.clientX - rect.left - axes.left) / (axes.right - axes.left) * (axes.x1 - axes.x0);
      const distances = models.map(it => Math.abs(it.step - step));
      const head = event.target.dataset.head;
      choose({ model: distances.indexOf(Math.min(...distances)), ...(head === undefined ? {} : { head: Number(head) }) });
    };
  }

  const lastStep = Math.max(models.at(-1).step, ...[...data.train, ...data.val].map(([step]) => step));

  function drawLosses() {
    const chart = $("loss"), losses = [...data.train, ...data.val].map(([, loss]) => loss);
    const axes = drawAxes(chart, [0, lastStep], losses.length ? [Math.min(...losses), Math.max(...losses)] : [0, 1]);
    chart.append(
      svg("path", { class: "train", d: path(data.train, axes) }), svg("path", { class: "val", d: path(data.val, axes) }),
      ...data.val.map(([step, loss]) => svg("circle", { class: "val", cx: axes.x(step), cy: axes.y(loss), r: 3 })),
      ...models.map(it => svg("path", { class: "kept", d: `M${axes.x(it.step)} ${axes.bottom}v-8` })));
    addMarker(chart, axes);
  }

  function drawScores(name) {
    const axes = drawAxes($(name), [0, lastStep], [0, 1]);
    const points = head => path(models.map(it => [it.step, it.scores[name][head]]), axes);
    const line = (head, kind) => svg("path", { class: kind, d: points(head), "data-head": head }, svg("title", {}, nameOf(head)));
    const others = numbers(layers * heads).filter(head => head !== state.head);
    $(name).append(
      svg("path", { class: "uniform", d: `M${axes.left} ${axes.y(data.uniform[name])}H${axes.right}` }),
      ...others.map(head => line(head, "line")), line(state.head, "chosen"),
      ...others.map(head => line(head, "wide")));
    addMarker($(name), axes);
  }

  function drawCharts() {
    markers.length = 0;
    drawLosses();
    SCORES.forEach(drawScores);
    for (const move of markers) move();
  }

  // Return the last of the [step, loss] pairs up to `step` as a text.
  function lossAt(pairs, step) {
    const found = pairs.findLast(pair => pair[0] <= step);
    return found ? `${found[1].toFixed(3)} (step ${found[0]})` : "not measured yet";
  }

  function drawNumbers() {
    const { step, scores } = models[state.model], head = state.head;
    $("losses").textContent = `Training loss ${lossAt(data.train, step)}, validation loss ${lossAt(data.val, step)}.`;
    const [previous, word, induction] = SCORES.map(name => scores[name][head].toFixed(2));
    $("scores").textContent =
      `At step ${step}, ${nameOf(head)} scores ${previous} for the previous token, ${word} for the same word, and ${induction} for induction.`;
    $("layer").value = Math.floor(head / heads);
    $("head").value = head % heads;
  }

  function drawText() {
    const { written, sample } = models[state.model];
    // The run samples as this page does, so its text usually is the same one, only longer.
    const isSame = sample !== "" && sample.startsWith(written);
    $("written").textContent = isSame ? sample : written;
    $("sampled").hidden = sample === "" || isSame;
    $("sample").textContent = sample;
  }

  // Attention

  // Draw the map of a head, one pixel per weight. The square root makes small weights visible.
  function paint(canvas, head) {
    const [r, g, b] = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim().split(" ");
    const context = canvas.getContext("2d"), image = context.createImageData(T, T);
    for (let row = 0; row < T; row++)
      for (let column = 0; column <= row; column++)
        image.data.set([r, g, b, 255 * Math.sqrt(weight(state.model, head, row, column) / 255)], 4 * (row * T + column));
    context.putImageData(image, 0, 0);
  }

  function makeThumbnails() {
    const edge = text => element("span", { className: "edge", textContent: text });
    const thumbnail = head => {
      const button = element("button", { type: "button", title: nameOf(head) }, element("canvas", { width: T, height: T }));
      button.setAttribute("aria-label", nameOf(head));
      button.dataset.head = head;
      button.onclick = () => choose({ head });
      return button;
    };
    $("heads").style.gridTemplateColumns = `repeat(${heads + 1}, max-content)`;
    $("heads").style.setProperty("--side", heads <= 4 ? "64px" : heads <= 8 ? "48px" : "32px");
    $("heads").replaceChildren(edge("layer"), ...numbers(heads).map(edge),
      ...numbers(layers).flatMap(layer => [edge(layer), ...numbers(heads).map(head => thumbnail(layer * heads + head))]));
  }

  const short = label => [...label].length > 6 ? [...label].slice(0, 5).join("") + "…" : label;

  // Draw the map of the chosen head with the tokens beside it. Labels of one letter stand upright above the map.
  function drawMap() {
    const cell = T > 40 ? 10 : T > 20 ? 16 : 24, longest = Math.max(...tokens.map(label => short(label).length));
    const space = 8 + longest * Math.min(cell, 13) * .7, scale = devicePixelRatio || 1;
    const canvas = $("map"), side = space + cell * T, small = element("canvas", { width: T, height: T });
    canvas.width = canvas.height = (side + 2) * scale;
    canvas.style.width = canvas.style.height = `${side + 2}px`;
    paint(small, state.head);
    const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    context.scale(scale, scale);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, space, space, cell * T, cell * T);
    context.font = `${Math.min(cell + 1, 13)}px ui-monospace, "DejaVu Sans Mono", monospace`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const colour = t => style.getPropertyValue(t === state.token ? "--mark" : "--soft");
    tokens.forEach((label, t) => {
      context.fillStyle = colour(t);
      context.fillText(short(label), space - 4, space + cell * (t + .5));
    });
    context.textAlign = longest > 1 ? "left" : "center";
    tokens.forEach((label, t) => {
      context.save();
      context.fillStyle = colour(-1);
      context.translate(space + cell * (t + .5), space - (longest > 1 ? 4 : 8));
      if (longest > 1) context.rotate(-Math.PI / 2);
      context.fillText(short(label), 0, 0);
      context.restore();
    });
    context.strokeStyle = style.getPropertyValue("--mark");
    context.strokeRect(space + .5, space + cell * state.token + .5, cell * (state.token + 1), cell);
    canvas.onclick = event => {
      const row = Math.floor((event.clientY - canvas.getBoundingClientRect().top - space) / cell);
      choose({ token: within(row, T) });
    };
  }

  function drawAttention() {
    for (const button of $("heads").querySelectorAll("button")) {
      const head = Number(button.dataset.head);
      button.classList.toggle("chosen", head === state.head);
      button.setAttribute("aria-pressed", head === state.head);
      paint(button.firstChild, head);
    }
    drawMap();
    const { model, head, token } = state;
    $("reading").replaceChildren(`At step ${models[model].step}, in ${nameOf(head)}, `, quoted(tokens[token]), ` (token ${token}) attends to:`);
    refill($("tokens"), ...tokens.map((label, t) => {
      const p = t <= token ? weight(model, head, token, t) / 255 : null;
      const button = element("button", { type: "button", className: t === token ? "chosen" : "" },
        quoted(label), element("small", { textContent: p === null ? " " : percent(p) }));
      button.style.background = p ? paleHeat(p) : "";
      button.onclick = () => choose({ token: t });
      return button;
    }));
  }

  function draw() {
    const { step } = models[state.model];
    $("slider").value = state.model;
    $("slider").setAttribute("aria-valuetext", `step ${step}`);
    $("step").textContent = `step ${step} of ${lastStep}`;
    for (const move of markers) move();
    drawNumbers();
    drawText();
    drawAttention();
  }

  // Playing

  function stop() {
    clearInterval(timer);
    timer = null;
    $("play").textContent = "Play";
    $("play").classList.remove("running");
  }

  function play() {
    if (state.model === models.length - 1) choose({ model: 0 });
    $("play").textContent = "Pause";
    $("play").classList.add("running");
    timer = setInterval(() => {
      choose({ model: within(state.model + 1, models.length) });
      if (state.model === models.length - 1) stop();
    }, 1000 * SECONDS_PER_MODEL);
  }

  function move(model) {
    stop();
    choose({ model: within(model, models.length) });
  }

  $("play").onclick = () => timer === null ? play() : stop();
  $("slider").max = models.length - 1;
  $("slider").oninput = event => move(Number(event.target.value));
  // The slider and the lists have arrow keys of their own.
  document.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey || event.target.matches("select, input")) return;
    event.preventDefault();
    move(state.model + step);
  });

  $("description").textContent = data.description;
  $("prompt").textContent = data.prompt;
  $("notes").replaceChildren(...data.notes.map(note => element("p", { textContent: note })));
  $("findings").replaceChildren(...data.findings.map(finding => element("li", { textContent: finding })));
  for (const [name, n] of [["layer", layers], ["head", heads]]) {
    $(name).replaceChildren(...numbers(n).map(i => element("option", { value: i, textContent: i })));
    $(name).onchange = () => choose({ head: Number($("layer").value) * heads + Number($("head").value) });
  }
  const start = Object.fromEntries([...new URLSearchParams(location.hash.slice(1))].map(([name, value]) => [name, Number(value)]));
  const chosen = models.findIndex(it => it.step === start.step);
  if (chosen >= 0) state.model = chosen;
  if (numbers(layers).includes(start.layer) && numbers(heads).includes(start.head)) state.head = start.layer * heads + start.head;
  makeThumbnails();
  const redraw = () => { drawCharts(); draw(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("resize", redraw);
  redraw();
}
