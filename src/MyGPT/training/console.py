"""The text that a training run prints: messages on stdout; warnings and the progress on stderr.

In a terminal or a notebook, the progress is a bar. In a file or a pipe, it is one line for each entry of metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from MyGPT.messages import error_message, printable
from MyGPT.progress import bar_class, is_notebook


class Console:
    """Prints the events of a training run. `progress=True` adds the progress. Subclasses may override any method.

    Output that cannot be written never raises an exception, because that would end the run between two of its files.
    """

    reader_has_ended = False
    """True after a message could not be written because the program that reads the output, such as `head`, has ended."""

    def __init__(self, progress: bool = True) -> None:
        self._is_shown, self._prints_lines = progress, False
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._first_step = self._max_steps = 0
        self._began = time.monotonic()
        self._has_reported = False

    def message(self, text: str, file: TextIO | None = None) -> None:
        """Print `text` on a line of its own above the progress bar, to `file` (default: stdout)."""
        stream = sys.stdout if file is None else file

        def write() -> None:
            tqdm.write(text, file=stream)
            stream.flush()

        if stream is not None:  # The stream is None if it was closed before the process started.
            self._attempt(write)

    def warn(self, text: str) -> None:
        """Print the warning `text` to stderr."""
        self.message(printable(text, keep=""), sys.stderr)

    def start(self, step: int, max_steps: int) -> None:
        """Show the progress of a run that has taken `step` of `max_steps` steps."""
        self._first_step, self._max_steps, self._began = step, max_steps, time.monotonic()
        is_terminal = sys.stderr is not None and (sys.stderr.isatty() or is_notebook())
        self._prints_lines = self._is_shown and not is_terminal
        is_hidden = not self._is_shown or not is_terminal
        self._bar = bar_class()(total=max_steps, initial=step, desc="training", unit="step", disable=is_hidden)

    def stepped(self) -> None:
        """Advance the progress bar by one step."""
        self._attempt(self._bar.update)

    def logged(self, loss: float | None, tokens_per_second: float) -> None:
        """Show the smoothed training loss (None before the first finite loss) and the speed beside the progress bar."""
        text = f"loss {math.nan if loss is None else loss:.3f}, {tokens_per_second:,.0f} tokens/s"
        self._attempt(lambda: self._bar.set_postfix_str(text))

    def progressed(self, step: int, loss: float | None, learning_rate: float, tokens_per_second: float) -> None:
        """Print a line with the progress after `step` steps if there is no progress bar, because stderr is no terminal."""
        if not self._prints_lines:
            return
        seconds = (time.monotonic() - self._began) / max(1, step - self._first_step) * (self._max_steps - step)
        self.warn(
            f"step {step}/{self._max_steps}: loss {math.nan if loss is None else loss:.3f}, "
            f"learning rate {learning_rate:.3g}, {tokens_per_second:,.0f} tokens/s, "
            f"{datetime.timedelta(seconds=round(seconds))} left"
        )

    def skipped(self, step: int, loss: float, grad_norm: float) -> None:
        """Report that `step` left the weights unchanged because its loss or gradient norm is not finite."""
        self.message(f"step {step}: skipped, because its loss is {loss} and its gradient norm is {grad_norm}")

    def spiked(self, step: int, grad_norm: float, ratio: float) -> None:
        """Report that the gradient norm of `step` is unusually large: `ratio` times its running mean."""
        self.message(f"step {step}: the gradient norm {grad_norm:.3g} is {ratio:.1f} times its running mean")

    def evaluated(self, step: int, loss: float, is_best: bool) -> None:
        """Report the validation loss after `step` steps; is_best is True if it is the lowest so far."""
        self.message(f"step {step}: validation loss {loss:.4f}{' (best)' if is_best else ''}")

    def scored(self, step: int, scores: Mapping[str, float]) -> None:
        """Report the values that were measured beside the validation loss after `step` steps, such as an accuracy."""
        # The part after a slash is the name of a source of the data.
        values = (f"{name if '/' in name else name.replace('_', ' ')} {value:.4f}" for name, value in scores.items())
        self.message(f"step {step}: validation {', '.join(values)}")

    def sampled(self, step: int, text: str) -> None:
        """Show `text`, which the model generated after `step` steps."""
        self.message(f"--- sample at step {step} ---\n{text}\n---")

    def stopped_early(self, step: int, n_evaluations: int) -> None:
        """Report that training ends because the last n_evaluations evaluations did not lower the validation loss."""
        self.message(f"step {step}: stopped early after {n_evaluations} evaluations without a new best loss")

    def checkpointed(self, n_checkpoints: int, seconds: float, share: float) -> None:
        """Report how long training waited for n_checkpoints checkpoints, in seconds and as a share of the time."""
        self.message(f"{n_checkpoints} checkpoints; training waited {seconds:.2f} s for them, {share:.1%} of its time")

    def close(self) -> None:
        """Remove the progress bar's display. Messages can still be printed afterwards."""
        self._attempt(self._bar.close)

    def _attempt(self, write: Callable[[], object]) -> None:
        """Call `write`. Remember that the reader of the output has ended, and report another failure once."""
        try:
            write()
        except BrokenPipeError:
            self.reader_has_ended = True
        except OSError as error:  # The output goes to a full disk, or its terminal is gone.
            if not self._has_reported:
                self._has_reported = True
                with contextlib.suppress(OSError):
                    print(
                        f"some of the output could not be printed: {error_message(error)}", file=sys.stderr, flush=True
                    )


class SilentConsole(Console):
    """A console that prints nothing."""

    def __init__(self) -> None:
        super().__init__(progress=False)

    def message(self, text: str, file: TextIO | None = None) -> None:
        """Discard `text`."""
