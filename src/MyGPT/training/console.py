"""The text that a training run prints: a progress bar on stderr, messages on stdout, warnings on stderr."""

from __future__ import annotations

import math
import sys
from typing import Any, TextIO

from tqdm import tqdm

from MyGPT.messages import printable


class Console:
    """Prints the events of a training run. `progress=True` adds a progress bar. Subclasses may override any method."""

    def __init__(self, progress: bool = True) -> None:
        self._is_shown = progress
        self._bar: tqdm[Any] = tqdm(disable=True)

    def message(self, text: str, file: TextIO | None = None) -> None:
        """Print `text` on a line of its own above the progress bar, to `file` (default: stdout)."""
        tqdm.write(text, file=file)

    def warn(self, text: str) -> None:
        """Print the warning `text` to stderr."""
        self.message(printable(text, keep=""), sys.stderr)

    def start(self, step: int, max_steps: int) -> None:
        """Show the progress bar of a run that has taken `step` of `max_steps` steps."""
        self._bar = tqdm(total=max_steps, initial=step, desc="training", unit="step", disable=not self._is_shown)

    def stepped(self) -> None:
        """Advance the progress bar by one step."""
        self._bar.update()

    def logged(self, loss: float | None, tokens_per_second: float) -> None:
        """Show the smoothed training loss (None before the first finite loss) and the speed beside the progress bar."""
        self._bar.set_postfix_str(f"loss {math.nan if loss is None else loss:.3f}, {tokens_per_second:,.0f} tokens/s")

    def skipped(self, step: int, loss: float, grad_norm: float) -> None:
        """Report that `step` left the weights unchanged because its loss or gradient norm is not finite."""
        self.message(f"step {step}: skipped, because its loss is {loss} and its gradient norm is {grad_norm}")

    def spiked(self, step: int, grad_norm: float, ratio: float) -> None:
        """Report that the gradient norm of `step` is unusually large: `ratio` times its running mean."""
        self.message(f"step {step}: the gradient norm {grad_norm:.3g} is {ratio:.1f} times its running mean")

    def evaluated(self, step: int, loss: float, is_best: bool) -> None:
        """Report the validation loss after `step` steps; is_best is True if it is the lowest so far."""
        self.message(f"step {step}: validation loss {loss:.4f}{' (best)' if is_best else ''}")

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
        self._bar.close()


class SilentConsole(Console):
    """A console that prints nothing."""

    def __init__(self) -> None:
        super().__init__(progress=False)

    def message(self, text: str, file: TextIO | None = None) -> None:
        """Discard `text`."""
