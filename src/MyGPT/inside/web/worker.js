// The worker of the live page. It owns the model and answers one request after another (see source.js).

let answers = null;

self.onmessage = ({ data: { number, name, args } }) => {
  try {
    if (name === "start") answers = new Answers(...args);
    const value = name === "start" ? null : answers[name](...args);
    self.postMessage({ number, value });
  } catch (error) {
    self.postMessage({ number, error: error.message });
  }
};
