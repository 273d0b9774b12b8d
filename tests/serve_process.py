"""A process of `mygpt serve`, for tests of signals and of documentation, and for the soak."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from prometheus_client.metrics_core import Sample
from prometheus_client.parser import text_string_to_metric_families

from conftest import lively_model
from MyGPT import CharTokenizer, GPTConfig

CONTEXT = 2048
SOURCE = Path(__file__).parents[1] / "src"


def save_tiny_model(directory: Path) -> Path:
    """Save a tiny model with a long context and no end-of-text token, and return its directory."""
    tokenizer = CharTokenizer.from_text("abcdefghijklmnopqrstuvwxyz ,.\n")
    sizes = {"context_length": CONTEXT, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0}
    lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes)).save_pretrained(directory)
    tokenizer.save(directory)
    return directory


class ServeProcess:
    """A running server. `url` is its address, and `log` the file with its stderr."""

    def __init__(self, model: Path, log: Path, *options: str, **environment: str) -> None:
        command = [
            sys.executable,
            "-m",
            "MyGPT",
            "serve",
            "--model",
            str(model),
            "--port",
            "0",
            "--device",
            "cpu",
            *options,
        ]
        paths = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
        variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables)
        assert self.process.stdout is not None
        self.announcement = ""
        while "  API " not in self.announcement:
            line = self.process.stdout.readline()
            assert line, log.read_text()
            self.announcement += line
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.announcement)
        assert found is not None
        self.url, self.port = found[0], int(found[1])

    @classmethod
    def of_command(cls, words: list[str], log: Path) -> ServeProcess:
        """Run a command of the documentation, given as words such as ["serve", "--model", "runs/book"], on a free port."""
        assert words[:2] == ["serve", "--model"], words
        return cls(Path(words[2]), log, *words[3:])

    def samples(self) -> list[Sample]:
        """Return the numbers of /metrics with their labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            families = text_string_to_metric_families(response.read().decode())
        return [sample for family in families for sample in family.samples]

    def metrics(self) -> dict[str, float]:
        """Return the value of each metric, summed over its labels."""
        values: dict[str, float] = {}
        for sample in self.samples():
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    def wait_until_idle(self, seconds: float = 30) -> dict[str, float]:
        """Wait until no text is generated or waits, and return the metrics then."""
        end = time.monotonic() + seconds
        while (values := self.metrics())["mygpt_requests_running"] or values["mygpt_queue_length"]:
            assert time.monotonic() < end, values
            time.sleep(0.01)
        return values

    def wait_until_draining(self) -> None:
        """Wait until the server has noticed the first SIGTERM."""
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/ready", timeout=30).close()
            except urllib.error.HTTPError as error:
                error.close()
                assert error.code == 503
                return

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def __enter__(self) -> ServeProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
