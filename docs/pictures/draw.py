"""Draw the pictures of the README and the documentation: `python docs/pictures/draw.py [--only NAME]`.

architecture.svg, and flowchart.png in the root directory, show architecture.dot and need Graphviz. The other pictures show
one real run of configs/quickstart.yaml; the script trains the model first if the run does not exist. `learn` draws the
pictures of the directory learn/, which lessons.py describes. explain.png and serve.png are screenshots of the pages of
`mygpt explain` and `mygpt serve`, and need Chromium. serve.png also needs chromedriver and selenium, and shows a second
model, whose tokens are words and parts of words.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import lessons
import torch
from matplotlib.figure import Figure

from MyGPT import GPTModel, SamplingConfig, load_tokenizer
from MyGPT.inside.plots import COLOURS, save_figure, smooth
from MyGPT.sampling import filter_logits
from MyGPT.training.metrics import read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPE = ROOT / "configs/quickstart.yaml"
BROWSER = "chromium"
EXPLAINED = "Alice was"
WRITTEN = "Alice was beginning to get very tired of"
SERVED_RECIPE = (
    "--tokenizer bpe --tokenizer_size 1024 --context_length 128 --batch_size 8 --emb_dim 160 --max_steps 1600".split()
)
PAGE_SIZE = (1100, 1224)
"""Width and height of the screenshot in pixels: the tokens, the attention maps and the logit lens."""


def mygpt(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "MyGPT", *arguments], check=True)


def train(run: Path, *options: str) -> None:
    if not (run / "model").is_dir():
        mygpt("train", "--config", str(RECIPE), *options, "--out", str(run))


def draw_architecture(_: Path) -> None:
    source = HERE / "architecture.dot"
    subprocess.run(["dot", "-Tsvg", source, "-o", HERE / "architecture.svg"], check=True)
    subprocess.run(["dot", "-Tpng", "-Gdpi=110", source, "-o", ROOT / "flowchart.png"], check=True)


def draw_training(run: Path) -> None:
    """Draw the losses of the run, with the texts that the model wrote at some of its steps beside the curves."""
    train(run)
    records = read_metrics(run)
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    validation = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    pieces = re.split(r"--- step (\d+) ---\n", (run / "samples.txt").read_text(encoding="utf-8"))
    samples = dict(zip(map(int, pieces[1::2]), pieces[2::2], strict=True))

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes, texts = figure.subplots(1, 2, width_ratios=(1, 1))
    steps, values = zip(*losses, strict=True)
    axes.plot(steps, smooth(values), color=COLOURS[5], linewidth=1, label="training loss")
    axes.plot(validation.keys(), validation.values(), "o-", color=COLOURS[0], label="validation loss")
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    texts.set_axis_off()
    for i, (step, sample) in enumerate(samples.items()):
        top = 1.02 - i / len(samples)
        title = f"step {step}: the model writes" if i == 0 else f"step {step}"
        texts.text(0, top, title, color=COLOURS[0], weight="bold", fontsize=10, va="top")
        wrapped = textwrap.fill(" ".join(sample.split()), 52)
        texts.text(0, top - 0.07, wrapped, family="monospace", fontsize=9, va="top", parse_math=False)
    save_figure(figure, HERE / "training.svg")


def draw_sampling(run: Path) -> None:
    """Draw the probabilities of the character after "Alice was " for some temperatures, top-k and top-p."""
    train(run)
    model, tokenizer = GPTModel.from_pretrained(run), load_tokenizer(run / "model")
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("Alice was ")]))[:, -1]
    panels = {
        "temperature 1": SamplingConfig(1.0),
        "temperature 0.5": SamplingConfig(0.5),
        "top_k 3": SamplingConfig(1.0, top_k=3),
        "top_p 0.8": SamplingConfig(1.0, top_p=0.8),
    }
    likeliest = logits[0].topk(16).indices.tolist()
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    all_axes: Any = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, config), colour in zip(all_axes, panels.items(), COLOURS, strict=False):
        axes.bar(range(len(likeliest)), filter_logits(logits, config)[0].softmax(-1)[likeliest], color=colour)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(likeliest)), [tokenizer.decode([id_]) for id_ in likeliest], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("probability")
    figure.supxlabel("the next character after “Alice was ”", fontsize=10)
    save_figure(figure, HERE / "sampling.svg")


def draw_explain(run: Path) -> None:
    """Take a screenshot of the page that `mygpt explain` writes."""
    train(run)
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "explain.html"
        mygpt("explain", "--model", str(run), "--out", str(page), EXPLAINED)
        options = "--headless --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=5000".split()
        options += ["--window-size={},{}".format(*PAGE_SIZE), f"--screenshot={HERE / 'explain.png'}"]
        subprocess.run([BROWSER, *options, page.as_uri()], check=True)


def draw_serve(run: Path) -> None:
    """Take a screenshot of the page of `mygpt serve`: a text with two branches, and the alternatives to one of its tokens."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    run = run.with_name(run.name + "-bpe")
    train(run, *SERVED_RECIPE, "--eval_every", "1600")  # one evaluation, so that the model is that of the last step
    command = [sys.executable, "-m", "MyGPT", "serve", "--model", f"wonderland={run}", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which(BROWSER) or BROWSER
    for argument in "--headless=new --no-sandbox --disable-gpu --hide-scrollbars".split():
        options.add_argument(argument)
    try:
        assert server.stdout is not None
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        with webdriver.Chrome(options=options, service=service) as browser:
            size = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(address)

            def do(script: str) -> None:
                browser.execute_script(script)
                is_idle = "return models.size > 0 && !running && !isAsking"
                WebDriverWait(browser, 60).until(lambda _: browser.execute_script(is_idle))

            def choose(token: int, alternative: int) -> None:
                do(f"story().host.children[{token}].click()")
                do(f"$('popover-list').children[{alternative}].firstChild.click()")

            settings = "[['max_tokens', 40], ['seed', 42], ['temperature', 0.8], ['top_k', 40], ['top_p', 1]]"
            do(f"for (const [id, value] of {settings}) "
               "{ $(id).value = value; $(id).dispatchEvent(new Event('input')); } $('keep-seed').checked = true")  # fmt: skip
            do(f"$('text').value = {WRITTEN!r}; $('go').click()")
            choose(14, 1)
            choose(30, 1)
            do("story().host.children[40].click()")
            time.sleep(0.5)  # bars move to their new lengths
            browser.save_screenshot(str(HERE / "serve.png"))
    finally:
        server.terminate()
        server.wait()


def draw_learn(run: Path) -> None:
    """Draw the pictures of docs/learn.md."""
    train(run)
    for path, svg in lessons.drawn(run):
        path.write_text(svg, encoding="utf-8")


PICTURES = {
    "architecture": draw_architecture,
    "training": draw_training,
    "sampling": draw_sampling,
    "explain": draw_explain,
    "serve": draw_serve,
    "learn": draw_learn,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PICTURES, help="the picture to draw; all pictures without this option")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/pictures", help="run directory; created if missing")
    options = parser.parse_args()
    for name in [options.only] if options.only else PICTURES:
        PICTURES[name](options.run)
        print(f"drew {name}")


if __name__ == "__main__":
    main()
