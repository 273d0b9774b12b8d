"""The shared parts of all benchmarks: options, child processes, rounds, and the format of results (see README.md).

This module needs only the standard library, because a script also runs in the environments of other programs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import inspect
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
RESULTS = Path(__file__).parent / "results"
"""The published results, from which tables.py makes the tables of the documentation."""
INSTRUCTIONS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Flags of x86 and ARM CPUs that decide how fast matrix products and generation are."""
PACKAGES = ("mygpt", "torch")
"""Packages whose versions are always stored, if they are installed."""
UNRECORDED = ("--out", "--minutes", "--directory", "--show", "--append")
"""Options that do not change what is measured."""


@dataclass
class Row:
    """All values of one measure of one program, in the order of the rounds."""

    name: str
    measure: str
    unit: str
    values: list[float]
    about: dict[str, Any] = field(default_factory=dict)
    """Other facts, such as a prediction or the reason why a measurement was stopped."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def lowest(self) -> float:
        return min(self.values)

    @property
    def highest(self) -> float:
        return max(self.values)


@dataclass
class Ratio:
    """The value of one program divided by that of another, round by round, and the target that was set for the median."""

    name: str
    other: str
    measure: str
    values: list[float]
    target: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)


class Results:
    """The rows of one script, with everything that is needed to repeat the measurement."""

    def __init__(self, name: str, settings: dict[str, Any] | None = None, packages: Iterable[str] = ()) -> None:
        """Begin empty results, which `save` writes to NAME.json.

        Args:
            name: the name of the file, without .json
            settings: what was measured: sizes, numbers of tokens, facts about the machine that the script measured
            packages: packages besides PACKAGES whose installed versions are stored
        """
        self.name, self.settings = name, dict(settings or {})
        self.command, self.date = command(), datetime.date.today().isoformat()
        self.machine, self.versions = machine(), versions([*PACKAGES, *packages])
        self.seconds: float | None = None
        self.rows: list[Row] = []
        self._targets: list[tuple[str, str, str, float | None]] = []

    def add(self, name: str, measure: str, unit: str, *values: float, **about: Any) -> Row:
        """Append values to the row of this name and measure, and return the row."""
        row = self.get(name, measure)
        if row is None:
            row = Row(name, measure, unit, [])
            self.rows.append(row)
        if row.unit != unit:
            raise ValueError(f"the {measure} of {name} is in {row.unit}, so a value in {unit} cannot be added")
        row.values += values
        row.about |= about
        return row

    def get(self, name: str, measure: str) -> Row | None:
        return next((row for row in self.rows if (row.name, row.measure) == (name, measure)), None)

    def row(self, name: str, measure: str) -> Row:
        """Return the row of this name and measure. Raises KeyError if it was not measured."""
        row = self.get(name, measure)
        if row is None:
            raise KeyError(f"the results {self.name} have no {measure} of {name}")
        return row

    def of(self, measure: str) -> dict[str, Row]:
        """Return the rows of a measure by the names of the programs."""
        return {row.name: row for row in self.rows if row.measure == measure}

    def of_unit(self, unit: str) -> list[Row]:
        """Return the rows in this unit."""
        return [row for row in self.rows if row.unit == unit]

    @property
    def names(self) -> list[str]:
        """The names of the programs, in the order in which they were measured."""
        return list(dict.fromkeys(row.name for row in self.rows))

    def ratio(self, name: str, other: str, measure: str, target: float | None = None) -> Ratio | None:
        """Return the ratio of two programs in each round, or None if one of them was not measured."""
        rows = self.get(name, measure), self.get(other, measure)
        if rows[0] is None or rows[1] is None:
            return None
        pairs = zip(rows[0].values, rows[1].values, strict=False)  # a program that was stopped has fewer rounds
        return Ratio(name, other, measure, [one / two for one, two in pairs], target)

    def compare(self, name: str, other: str, measure: str, target: float | None = None) -> None:
        """Store the ratio of two programs, and the target that was set for its median, in the file."""
        self._targets.append((name, other, measure, target))

    @property
    def ratios(self) -> list[Ratio]:
        found = (self.ratio(*asked) for asked in self._targets)
        return [ratio for ratio in found if ratio is not None and ratio.values]

    def save(self, directory: Path | None) -> None:
        """Write DIRECTORY/NAME.json. Without a directory, write nothing."""
        if directory is None:
            return
        from MyGPT.files import atomic_write

        self.seconds = time.monotonic() - BEGAN
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(directory / f"{self.name}.json") as file:
            file.write(self.text())

    def text(self) -> str:
        """Return the content of the file, with one line for each row."""
        head = {
            "format": FORMAT, "name": self.name, "command": self.command, "date": self.date,
            "seconds": None if self.seconds is None else round(self.seconds, 1), "machine": self.machine,
            "versions": self.versions, "settings": rounded(self.settings),
        }  # fmt: skip
        rows = [{**rounded(asdict(row)), "median": rounded(row.median)} for row in self.rows if row.values]
        rows = [{key: value for key, value in row.items() if key != "about" or value} for row in rows]
        ratios = [{**rounded(asdict(ratio)), "median": rounded(ratio.median)} for ratio in self.ratios]
        lines = {"rows": rows, "ratios": ratios}
        parts = [json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")]
        for key, values in lines.items():
            listed = ",\n".join(f"  {json.dumps(value, ensure_ascii=False)}" for value in values)
            parts.append(f' "{key}": [\n{listed}\n ]' if values else f' "{key}": []')
        return ",\n".join(parts) + "\n}\n"

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read results. Raises ValueError if the file has another format or its medians do not fit its values."""
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} does not have format {FORMAT} of the results; repeat its measurement")
        results = cls.__new__(cls)
        for key in ("name", "settings", "command", "date", "machine", "versions", "seconds"):
            setattr(results, key, content[key])
        results.rows, results._targets = [], []
        for row in content["rows"]:
            median = row.pop("median")
            results.rows.append(Row(**row))
            if not math.isclose(results.rows[-1].median, median, rel_tol=1e-6):
                raise ValueError(f"{path}: the median of {row['measure']} of {row['name']} does not fit its values")
        for ratio in content["ratios"]:
            results.compare(ratio["name"], ratio["other"], ratio["measure"], ratio["target"])
        return results


def rounded(value: Any) -> Any:
    """Return the value with its floats rounded to nine digits, which no clock exceeds."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def machine() -> dict[str, Any]:
    """Return what decides the speed of this machine."""
    about = cpu_facts()
    name = about.get("model name") or about.get("Hardware") or platform.processor() or platform.machine()
    if "cpu family" in about:
        name += f", family {about['cpu family']}, model {about['model']}"
    flags = (about.get("flags") or about.get("Features") or "").split()
    found: dict[str, Any] = {"cpu": name, "instructions": " ".join(flag for flag in INSTRUCTIONS if flag in flags)}
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(AttributeError, ValueError, OSError):
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)
    found |= {"os": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    if "torch" in sys.modules:
        found["threads"] = sys.modules["torch"].get_num_threads()
    return found


def cpu_facts() -> dict[str, str]:
    """Return the facts that Linux reports about the first CPU, or an empty dict on another system."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def command(arguments: list[str] | None = None) -> str:
    """Return the command that was given, with the names of options instead of paths, which differ between machines."""
    script, *given = sys.argv if arguments is None else arguments
    words, option = ["python", f"benchmarks/{Path(script).name}"], ""
    for word in given:
        if word.startswith("--"):
            option, _, value = word.partition("=")
            given_value = [value] if value else []
        else:
            given_value = [word]
        if option in UNRECORDED:
            continue
        if word.startswith("--"):
            words.append(option)
        words += [option[2:].upper() or Path(part).name if os.sep in part else quoted(part) for part in given_value]
    return " ".join(words)


def quoted(word: str) -> str:
    return f'"{word}"' if " " in word or "'" in word else word


BEGAN = time.monotonic()


def parse(
    parser: argparse.ArgumentParser, *functions: Callable[..., Any], rounds: int | None = None
) -> argparse.Namespace:
    """Add the options that all scripts share, and parse the command line.

    In a child process (see `in_a_process`), call the function that the parent wants, print its result and exit.

    Args:
        functions: the functions that child processes may call
        rounds: the default of --rounds; without it the script has no rounds
    """
    if sys.argv[1:2] == ["--child"]:
        name, arguments = json.loads(sys.argv[2])
        print(json.dumps({function.__name__: function for function in functions}[name](**arguments)))
        raise SystemExit(0)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="how often each program is measured")
    parser.add_argument(
        "--minutes", type=float, default=math.inf,
        help="begin no round that would probably end after so many minutes; the first round is always measured",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="the directory for the results, as JSON")
    return parser.parse_args()


def rounds(options: argparse.Namespace, warm_up: bool = False, share: float = 1.0) -> Iterator[int]:
    """Yield the number of each round, beginning with 1, or with 0 for a round that only warms up.

    Stop early if the next round would probably exceed the given share of --minutes.
    """
    began = start = time.monotonic()
    for turn in range(0 if warm_up else 1, options.rounds + 1):
        now = time.monotonic()
        if turn > 1 and 2 * now - start - began > 60 * share * options.minutes:
            print(f"{turn - 1} of {options.rounds} rounds were measured in the given time", file=sys.stderr)
            return
        start = now
        yield turn


def in_a_process(function: Callable[..., Any], python: str = sys.executable, **arguments: Any) -> Any:
    """Call a function of a script in a new process, and return its result, which must be JSON.

    The function's script passes the function to `parse`. Raises SystemExit with the error output if the process fails.
    """
    called = [python, inspect.getfile(function), "--child", json.dumps([function.__name__, arguments])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(called, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{function.__name__} of {arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: Iterable[float], digits: int = 0, scale: float = 1.0) -> str:
    """Return "median (lowest to highest)", or the only value."""
    scaled = [scale * value for value in values]
    middle, *ends = (f"{f(scaled):,.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({' to '.join(ends)})" if len(scaled) > 1 else middle


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    head = list(head)
    return "".join(f"| {' | '.join(row)} |\n".replace("  ", " ") for row in (head, ["---"] * len(head), *rows))


def run_limited(
    command: list[str], seconds: float, read: Callable[[str], None], environment: dict[str, str]
) -> tuple[int, bool]:
    """Run a command for at most so many seconds, and pass each line of its output to `read`.

    At the end or at the limit, the processes that it has started are killed too.

    Returns: the exit status, and whether the command was stopped at the limit.
    """
    is_stopped = threading.Event()
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, lambda: (is_stopped.set(), kill()))
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                read(line)
            return process.wait(), is_stopped.is_set()
        finally:
            timer.cancel()
            kill()
