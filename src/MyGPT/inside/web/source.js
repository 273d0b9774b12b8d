// The source of all numbers on the live page: a proxy of the worker that runs the model.
//
//   const source = openSource();
//
// starts the worker with the model in the page. Each method returns a promise. Ids are token ids; a text that is longer than
// the model's context is read from its end.
//
//   source.info                      the data of the page, without waiting: {name, description, text, precision, n_parameters,
//                                    weight_bytes, max_inside, config}; config has vocab_size, context_length, emb_dim,
//                                    n_heads, n_layers, activation and layer_norm_eps
//   source.ready                     a promise that is fulfilled when the weights are unpacked
//   source.read(text)                {ids, tokens: [{id, label}]}. Special tokens in the text become single ids.
//   source.decode(ids)               the text of the ids
//   source.logits(ids, {heads_off})  the logits of the next token, one number for each id of the vocabulary
//   source.inside(text, {heads_off}) the dict of page_data (inside/page.py) for the last `max_inside` ids of a string or a list
//                                    of ids, and n_left_out, the number of earlier ids. heads_off is a list of pairs
//                                    [layer, head].
//   source.next(ids, {temperature, top_k, top_p, min_p, heads_off})
//                                    the dict of next_token_data (inside/page.py). temperature defaults to 0, which is greedy.
//   source.walk(ids, {layer, head, token, heads_off})
//                                    the dict of walk_data (inside/walk.py) for the ids that `inside` shows
//   source.generate(ids, {temperature, top_k, top_p, min_p, heads_off, max_tokens, seed, signal}, onToken)
//                                    calls onToken({id, label, text}) for each new token. The result is {finish_reason}: "stop"
//                                    at an end token, "length" after max_tokens (default 100), or "stopped" if the AbortSignal
//                                    `signal` was aborted. seed is a whole number; without it, each call gives another text.
//
// A promise is rejected with an Error whose message is one sentence for the reader. A newer call of read, inside, next or
// walk supersedes an older one of the same method that has no answer yet: the promise of the older call stays pending for
// ever, so its stale answer is never drawn. While the worker computes, later calls wait. Of the waiting calls of a method, it
// computes only the newest.

function openSource() {
  const data = JSON.parse(document.getElementById("live").textContent);
  const code = document.getElementById("worker-code").textContent;
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  return workerSource(new Worker(url), data, takeTensors());
}

// Return the packed weights of the page, and remove their elements, which need a lot of memory.
function takeTensors() {
  return [...document.querySelectorAll("script[data-tensor]")].map(script => {
    const { tensor: name, type, shape } = script.dataset, text = script.textContent;
    script.remove();
    return { name, type, shape: shape.split(" ").map(Number), text };
  });
}

function workerSource(worker, data, tensors) {
  const waiting = new Map(); // the requests that were not sent yet, by the method that a newer request supersedes
  let sent = [], calls = 0;

  // Send all waiting requests together if the worker is idle, so that the page can draw their answers in one frame.
  function send() {
    if (sent.length || !waiting.size) return;
    sent = [...waiting.values()];
    waiting.clear();
    worker.postMessage(sent.map(({ name, args }) => ({ name, args })));
  }

  function call(name, args, key = name) {
    calls++;
    return new Promise((resolve, reject) => {
      for (const request of sent) if (request.key === key) request.isStale = true;
      waiting.set(key, { key, name, args, resolve, reject, isStale: false });
      queueMicrotask(send); // after the other calls of this moment
    });
  }

  worker.onmessage = ({ data: answers }) => {
    const answered = sent;
    sent = [];
    answered.forEach(({ resolve, reject, isStale }, i) => {
      const { value, error } = answers[i];
      if (!isStale) error === undefined ? resolve(value) : reject(new Error(error));
    });
    send();
  };
  worker.onerror = event => {
    event.preventDefault();
    const reason = event.message || "the browser does not start a worker";
    for (const { reject } of sent) reject(new Error(`the page cannot run the model: ${reason}`));
  };

  let generations = 0;
  async function generate(ids, { max_tokens = 100, seed = Math.floor(Math.random() * 2 ** 32), signal, ...sampling }, onToken) {
    const all = [...ids], key = `generate ${++generations}`;
    for (let step = 0; step < max_tokens; step++) {
      if (signal?.aborted) return { finish_reason: "stopped" };
      const { ends, ...token } = await call("sample", [all, { ...sampling, seed, step }], key);
      if (signal?.aborted) return { finish_reason: "stopped" };
      if (ends) return { finish_reason: "stop" };
      all.push(token.id);
      onToken(token);
    }
    return { finish_reason: "length" };
  }

  const { tokenizer, excluded, ends, ...info } = data;
  return {
    info,
    ready: call("start", [data, tensors]),
    read: text => call("read", [text]),
    decode: ids => call("decode", [ids], `decode ${calls}`),
    logits: (ids, options = {}) => call("logits", [ids, options], `logits ${calls}`),
    inside: (text, options = {}) => call("inside", [text, options]),
    next: (ids, options = {}) => call("next", [ids, options]),
    walk: (ids, options) => call("walk", [ids, options]),
    generate,
  };
}
