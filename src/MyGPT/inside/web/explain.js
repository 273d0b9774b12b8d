// The page of `mygpt explain`: how a model reads one text. The page contains all numbers.

const data = JSON.parse($("data").textContent);
$("model").textContent = data.description;

function drawPrediction(t) {
  const { top, rest, actual } = data.next[t];
  $("question").replaceChildren("The probability of each token to follow ", quoted(data.tokens[t].label), ". ");
  if (actual) $("question").append("The text continues with ", quoted(actual[0]), `, which has rank ${actual[2]}.`);
  else $("question").append("The text ends here.");
  const shown = [...top];
  if (actual && !top.some(([, , id]) => id === actual[3])) shown.push([actual[0], actual[1], actual[3]]);
  shown.push(["all others", Math.max(0, rest - (shown.length > top.length ? actual[1] : 0)), null]);
  const largest = Math.max(...shown.map(([, p]) => p));
  drawRows($("bars"), shown.map(([label, p, id]) =>
    [[id, label], { p: p / largest, note: percent(p), chosen: actual !== null && id === actual[3] }]));
}

function onChoose() {
  const { layer, head, token } = inside;
  drawPrediction(token);
  // Some browsers do not let a page that was opened from a file change its address.
  try { history.replaceState(null, "", "#" + new URLSearchParams({ layer, head, token })); } catch { /* the page works without */ }
}

const inside = new Inside({ start: Object.fromEntries(new URLSearchParams(location.hash.slice(1))), onChoose });
inside.show(data);
drawPrediction(inside.token);
