"""The text that a training run prints: a progress bar on stderr, messages on stdout, warnings on stderr."""

from __future__ import annotations

import math
import sys
from typing import Any, TextIO

from tqdm import tqdm


class Console:
    """Prints the events of a training run, with or without a progress bar. Override any method to report elsewhere."""

    def __init__(self, progress: bool = True) -> None:
        self._is_shown = progress
        self._bar: tqdm[Any] = tqdm(disable=True)

    def message(self, text: str, file: TextIO | None = None) -> None:
        """Print a line to stdout or to `file`, above the progress bar."""
        tqdm.write(text, file=file)

    def warn(self, text: str) -> None:
        """Print a line about a problem to stderr."""
        self.message(text, sys.stderr)

    def start(self, step: int, max_steps: int) -> None:
        """Show the progress bar of a run that has taken `step` of `max_steps` steps."""
        self._bar = tqdm(total=max_steps, initial=step, desc="training", unit="step", disable=not self._is_shown)

    def stepped(self) -> None:
        """Advance the progress bar by one step."""
        self._bar.update()

    def logged(self, loss: float | None, tokens_per_second: float) -> None:
        """Show the smoothed training loss and the speed beside the progress bar."""
        self._bar.set_postfix_str(f"loss {math.nan if loss is None else loss:.3f}, {tokens_per_second:,.0f} tokens/s")

    def skipped(self, step: int, loss: float, grad_norm: float) -> None:
        """Report a step without an update."""
        self.message(f"step {step}: skipped, because its loss is {loss} and its gradient norm is {grad_norm}")

    def spiked(self, step: int, grad_norm: float, ratio: float) -> None:
        """Report a gradient norm that is `ratio` times the running mean."""
        self.message(f"step {step}: the gradient norm {grad_norm:.3g} is {ratio:.1f} times its running mean")

    def evaluated(self, step: int, loss: float, is_best: bool) -> None:
        """Report a validation loss."""
        self.message(f"step {step}: validation loss {loss:.4f}{' (best)' if is_best else ''}")

    def sampled(self, step: int, text: str) -> None:
        """Show a live sample."""
        self.message(f"--- sample at step {step} ---\n{text}\n---")

    def stopped_early(self, step: int, n_evaluations: int) -> None:
        """Report that training ends because the validation loss no longer improves."""
        self.message(f"step {step}: stopped early after {n_evaluations} evaluations without a new best loss")

    def checkpointed(self, n_checkpoints: int, seconds: float, share: float) -> None:
        """Report how long training waited for its checkpoints, in seconds and as a share of its time."""
        self.message(f"{n_checkpoints} checkpoints; training waited {seconds:.2f} s for them, {share:.1%} of its time")

    def close(self) -> None:
        """Remove the progress bar's display. Messages can still be printed afterwards."""
        self._bar.close()


class SilentConsole(Console):
    """A console that prints nothing."""

    def __init__(self) -> None:
        super().__init__(progress=False)

    def message(self, text: str, file: TextIO | None = None) -> None:
        """Discard a line."""
