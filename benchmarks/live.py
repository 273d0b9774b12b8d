"""Measure how fast the page of `mygpt explain --live` answers in headless Chromium.

Usage: python benchmarks/live.py [--precision fp16] [--tokens 100] [--rounds 5] [--out DIR]

Two models with random weights are packed into pages:

- typing: the model of the quick start (0.8 million parameters). A text of 64 characters is typed, and two times of each
  character are measured. "computed": the worker answers with tokens, attention, logit lens and next-token distribution.
  "drawn": from the input event of the text field until the browser has drawn all views. The window has 1280 x 800 pixels. This
  time includes the worker, scripts, styles, layout and paint of every frame up to the one that shows the last view. The frame
  rate is unlimited, so that no time is spent waiting for the next frame of the screen. The threads that turn the painted
  frame into pixels are not measured.
- generation: a model of 11 million parameters with 6 layers of width 384. Greedy tokens per second after a prompt of 16 tokens.

It needs Chromium, chromedriver and the package selenium.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from measurements import Results, parse, rounds
from tables import show

from MyGPT import CharTokenizer, GPTConfig, GPTModel
from MyGPT.inside.live import LivePage

CHARACTERS = [chr(32 + i) for i in range(65)]
TEXT = ("THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG, AND " * 2)[:64]
QUICK_START = GPTConfig(vocab_size=65, context_length=64, emb_dim=128, n_heads=4, n_layers=4, drop_rate=0.0)
LARGER = GPTConfig(vocab_size=1024, context_length=256, emb_dim=384, n_heads=6, n_layers=6, drop_rate=0.0)
TYPE = """
const [text, done] = arguments, times = [];
(async () => {
  await source.ready;
  for (let n = 1; n <= text.length; n++) {
    const start = performance.now();
    const { ids } = await source.read(text.slice(0, n));
    await source.inside(ids);
    await source.next(ids, { temperature: 1, top_p: 0.9 });
    times.push(performance.now() - start);
  }
  done(times);
})();
"""
DRAW = """
const [text, done] = arguments, times = [], painted = new MessageChannel();
let missing = new Set(), finish;
const watch = (owner, name) => {
  const draw = owner[name];
  owner[name] = function (...values) {
    draw.apply(this, values);
    // A message that is sent while a frame begins arrives after its layout and paint.
    if (missing.delete(draw) && !missing.size) requestAnimationFrame(() => painted.port2.postMessage(null));
  };
  return draw;
};
(async () => {
  await started;
  await look.read(ids);
  const views = [watch(Inside.prototype, "draw"), watch(Walk.prototype, "draw"), watch(window, "drawDistribution")];
  painted.port1.onmessage = () => finish();
  $("text").value = "";
  for (const character of text) {
    await new Promise(resolve => setTimeout(resolve, 30));
    missing = new Set(views);
    const drawn = new Promise(resolve => { finish = resolve; }), start = performance.now();
    $("text").value += character;
    $("text").dispatchEvent(new InputEvent("input"));
    await drawn;
    times.push(performance.now() - start);
  }
  done(times);
})();
"""
GENERATE = """
const [prompt, n, done] = arguments;
(async () => {
  await source.ready;
  await source.logits(prompt);
  const start = performance.now();
  let count = 0;
  await source.generate(prompt, { max_tokens: n }, () => count++);
  done(count / (performance.now() - start) * 1000);
})();
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp16", "int8"), default="fp16")
    parser.add_argument("--tokens", type=int, default=100)
    options = parse(parser, rounds=5)
    torch.manual_seed(1)
    tokenizer = CharTokenizer(CHARACTERS)
    models = {"typing": GPTModel(QUICK_START), "generation": GPTModel(LARGER)}
    settings = {f"parameters, {name}": model.num_parameters() for name, model in models.items()}
    settings |= {"precision": options.precision, "tokens": options.tokens, "characters": len(TEXT)}
    with tempfile.TemporaryDirectory() as directory:
        pages = {}
        for name, model in models.items():
            page = LivePage(model, tokenizer, "", name, options.precision)
            pages[name] = Path(directory, f"{name}.html")
            with open(pages[name], "w", encoding="utf-8", newline="\n") as file:
                file.writelines(page.pieces())
            settings[f"bytes, {name}"] = page.n_bytes
        browser = start_browser()
        try:
            settings["browser"] = browser.capabilities["browserVersion"]
            results = Results("live", settings, ["selenium"])
            measure(browser, pages, options, results)
        finally:
            browser.quit()
    results.save(options.out)
    show(results)


def measure(browser: Any, pages: dict[str, Path], options: argparse.Namespace, results: Results) -> None:
    """Add the times and speeds of all rounds to the results. Each round opens the pages anew."""
    prompt = [i % LARGER.vocab_size for i in range(16)]
    for turn in rounds(options, warm_up=True):
        browser.get(pages["typing"].as_uri())
        computed = sorted(browser.execute_async_script(TYPE, TEXT))
        browser.get(pages["typing"].as_uri())
        drawn = sorted(browser.execute_async_script(DRAW, TEXT))
        browser.get(pages["generation"].as_uri())
        speed = browser.execute_async_script(GENERATE, prompt, options.tokens)
        if turn:
            for measure, times in {"computed": computed, "drawn": drawn}.items():
                results.add("typing", f"{measure}, median character", "ms", times[len(times) // 2])
                results.add("typing", f"{measure}, 95th percentile", "ms", times[len(times) * 95 // 100])
            results.add("generation", "speed", "tokens/s", speed)


def start_browser() -> Any:
    """Return a headless Chromium that selenium controls."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    for argument in ("--disable-frame-rate-limit", "--disable-gpu-vsync"):  # see "drawn" above
        options.add_argument(argument)
    browser = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    )
    browser.set_script_timeout(300)
    window = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    return browser


if __name__ == "__main__":
    main()
