"""Exercise 2: windows. Cut a text of token ids into training examples. Write `make_windows`.

A language model learns to predict the next token. A training example is a window: `length` ids as the input, and the ids one
position later as the targets. The target at each position is the token that follows in the text. One window of 1,024 tokens
therefore gives 1,024 predictions to learn from, all computed in one forward pass.

Example: ids = [10, 11, 12, 13, 14, 15, 16], length = 3 and stride = 2 give two windows:
    inputs  [[10, 11, 12], [12, 13, 14]]
    targets [[11, 12, 13], [13, 14, 15]]
A third window would start at id 14. Its targets would need an id after 16, which does not exist.

Check your work with `mygpt check windows`. A hint is at the end of this file.
"""

from __future__ import annotations

from torch import Tensor


def make_windows(ids: Tensor, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and the targets of all W complete windows, each (W, length) int64.

    Windows start at the positions 0, stride, 2 * stride and so on. Do not change `ids`.

    Args:
        ids: the token ids of a text, (N,) int64.
        length: number of ids per window.
        stride: distance between the starts of two windows. If it is less than the length, windows overlap.

    Raises:
        ValueError: there are too few ids for one window, that is, fewer than length + 1.
    """
    raise NotImplementedError


if __name__ == "__main__":
    from MyGPT.cli import main

    raise SystemExit(main(["check", __file__]))

# Hint. A window that starts at s needs the ids s to s + length, which are length + 1 ids. So the last possible start is
# len(ids) - length - 1, and range(...) must include it. torch.stack makes one tensor from a list of equally long tensors.
