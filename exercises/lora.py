"""Exercise 8: LoRA (Hu et al., 2021). Write `LoRALinear`.

Fine-tuning all weights of a large model needs much memory. LoRA leaves each weight matrix as it is and trains a correction
that is the product of two thin matrices: A (in, rank) and B (rank, out). With 768 inputs, 768 outputs and rank 8, the matrix
has 589,824 weights and the correction only 12,288. A starts random and B starts at zero, so the layer computes the same as
before when training begins. The factor alpha / rank keeps the size of the correction similar for different ranks.

Example: the input is x = [1, 2], rank is 1, alpha is 3, A = [[1], [1]] and B = [[10, 20]].
    x A = [3], and (x A) B = [30, 60]. The factor is 3 / 1, so [90, 180] is added to the output of the frozen layer.

Check your work with `mygpt check lora`. A hint is at the end of this file.
"""

from __future__ import annotations

from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained correction: linear(x) + alpha / rank * x A B.

    The attribute `linear` is the frozen layer. `A` (in_features, rank) and `B` (rank, out_features) are parameters.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        """Store the layer, freeze its weight and bias, and make A (small random numbers) and B (zeros) as nn.Parameter."""
        super().__init__()
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer with its correction, (..., out_features), given x (..., in_features)."""
        raise NotImplementedError

    def merged(self) -> nn.Linear:
        """Return a new nn.Linear that computes the same as this layer without extra operations.

        Its weight is the frozen weight plus the correction. The weight of an nn.Linear has the shape (out_features,
        in_features). The frozen layer itself must not change. It may have no bias.
        """
        raise NotImplementedError


if __name__ == "__main__":
    from MyGPT.cli import main

    raise SystemExit(main(["check", __file__]))

# Hint. linear.requires_grad_(False) freezes a layer. torch.randn(...) * 0.02 is a good start for A. nn.Linear computes
# x @ weight.T, so the correction A @ B must be transposed before it is added to the weight. copy.deepcopy(self.linear) gives
# a new layer with the same bias; change its weight under torch.no_grad().
