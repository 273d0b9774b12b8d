// Requests to the server: JSON, streams of events, errors as sentences, and the API key.

class ServerError extends Error {
  constructor(message, code = null) {
    super(message);
    this.code = code;
  }
}

const KEY = "MyGPT API key";
const apiKey = () => sessionStorage.getItem(KEY) ?? "";

function sentence(text) {
  const trimmed = text.trim();
  const capital = trimmed.charAt(0).toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(capital) ? capital : capital + ".";
}

// Send a request. The body, if there is one, is sent as JSON. Return the response, or throw a ServerError.
async function call(path, body, signal) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(path, options).catch(error => {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Check that it is still running.");
  });
  if (response.status === 401) {
    await askForKey();
    return call(path, body, signal);
  }
  if (!response.ok) throw await serverError(response);
  return response;
}

async function serverError(response) {
  const text = await response.text();
  try {
    const { message, code } = JSON.parse(text).error;
    return new ServerError(sentence(message), code);
  } catch {
    return new ServerError(`The server answered with status ${response.status}.`);
  }
}

const fetchJson = async (path, body, signal) => (await call(path, body, signal)).json();

// Yield the events of a stream as objects, up to [DONE]. An event that reports an error throws a ServerError.
async function* events(path, body, signal) {
  const reader = (await call(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(error => {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection to the server was lost.");
    });
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter(line => line.startsWith("data:")).map(line => line.slice(5).trimStart());
      if (!data.length) continue;
      if (data[0] === "[DONE]") return;
      const event = JSON.parse(data.join("\n"));
      if (event.error) throw new ServerError(sentence(event.error.message));
      yield event;
    }
  }
}

let askingForKey = null;

// Show the dialog that asks for the key. Several requests may wait for the same answer.
function askForKey() {
  askingForKey ??= new Promise(resolve => {
    const tried = apiKey();
    $("key-hint").textContent = tried
      ? "The server did not accept this key. Enter another one."
      : "This server needs a key. The key stays in this tab and is forgotten when you close the tab.";
    $("key").value = "";
    $("key-form").onsubmit = event => {
      event.preventDefault();
      sessionStorage.setItem(KEY, $("key").value.trim());
      $("key-dialog").close();
      askingForKey = null;
      resolve();
    };
    $("key-dialog").oncancel = event => event.preventDefault();
    $("key-dialog").showModal();
  });
  return askingForKey;
}
