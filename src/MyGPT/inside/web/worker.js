// The worker of the live page. It owns the model, and answers a list of requests with the list of their answers (see source.js).

let answers = null;

self.onmessage = ({ data: requests }) => self.postMessage(requests.map(answer));

function answer({ name, args }) {
  try {
    if (name === "start") answers = new Answers(...args);
    return { value: name === "start" ? null : answers[name](...args) };
  } catch (error) {
    return { error: error.message };
  }
}
