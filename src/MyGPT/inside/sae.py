"""A sparse autoencoder: it explains the activations of one layer as sums of a few features out of many.

A model has more concepts than a layer has neurons, so it stores each concept as a direction and lets the directions overlap
(superposition; Elhage et al., 2022). A sparse autoencoder looks for these directions. It writes each activation x (C,) as

    x ≈ center + f_1 direction_1 + … + f_F direction_F,   where at most k of the F strengths f are above zero.

The k largest values of a linear function of x are the strengths (Makhzani & Frey, 2013; Gao et al., 2024). The alternative is
an L1 penalty (Bricken et al., 2023), which also shrinks the strengths and must be tuned for each layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT.config import check_seed, require_positive
from MyGPT.progress import progress_bar
from MyGPT.sampling import require_finite


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder with n_features features for activations of `width` numbers, k of which describe an activation."""

    def __init__(self, width: int, n_features: int, k: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        require_positive(width=width, n_features=n_features, k=k)
        if k > n_features:
            raise ValueError(f"k must be at most n_features, got k={k} and n_features={n_features}")
        self.k = k
        directions = F.normalize(torch.randn(n_features, width, generator=generator), dim=1)
        # A feature that starts with the same direction in encoder and decoder rarely dies (Gao et al., 2024).
        self.encoder = nn.Parameter(directions.clone())  # (F, C)
        self.directions = nn.Parameter(directions)  # the decoder (F, C); each direction has length 1
        self.center = nn.Parameter(torch.zeros(width))

    def encode(self, x: Tensor) -> Tensor:
        """Return the strength of each feature, (..., F), in activations x (..., C). At most k strengths are above zero."""
        strengths = F.relu((x - self.center) @ self.encoder.T)
        largest, features = strengths.topk(self.k)
        return torch.zeros_like(strengths).scatter(-1, features, largest)

    def decode(self, strengths: Tensor) -> Tensor:
        """Return the activations, (..., C), that features with these strengths (..., F) describe."""
        return self.center + strengths @ self.directions

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of the activations x (..., C)."""
        return self.decode(self.encode(x))


def train_autoencoder(
    activations: Tensor,
    n_features: int,
    k: int,
    *,
    steps: int = 1000,
    batch_size: int = 1024,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = False,
) -> SparseAutoencoder:
    """Return a sparse autoencoder that is trained to reconstruct activations (N, C). The same seed gives the same result.

    Each step draws batch_size of the N activations and reduces the squared error of their reconstruction with Adam. The
    learning rate falls linearly to zero. In the first half, features that no activation used recently are replaced.
    """
    require_positive(steps=steps, batch_size=batch_size)
    check_seed(seed)
    if activations.dim() != 2 or not len(activations):
        raise ValueError(f"activations must have the shape (N, C), got {tuple(activations.shape)}")
    x, generator = activations.detach().float().cpu(), torch.Generator().manual_seed(seed)
    require_finite("an activation", x)
    autoencoder = SparseAutoencoder(x.shape[1], n_features, k, generator)
    # Activations of length 1 on average let the same learning rate fit every layer.
    scale = (x - x.mean(0)).pow(2).sum(1).mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    autoencoder.center.data = x.mean(0) / scale
    optimizer = torch.optim.Adam(autoencoder.parameters(), betas=(0.9, 0.99), fused=True)
    dead = torch.ones(n_features, dtype=torch.bool)
    for step in progress_bar(progress, iterable=range(steps), unit="step"):
        batch = x[torch.randint(len(x), (batch_size,), generator=generator)] / scale
        strengths = autoencoder.encode(batch)
        errors = batch - autoencoder.decode(strengths)
        optimizer.zero_grad()
        errors.pow(2).sum(1).mean().backward()
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.step()
        dead &= ~(strengths > 0).any(0)
        if (step + 1) % max(1, steps // 20) == 0 and 2 * step < steps:
            _replace(autoencoder, dead, errors.detach(), generator)
            dead.fill_(True)
        with torch.no_grad():
            autoencoder.directions.div_(autoencoder.directions.norm(dim=1, keepdim=True))
    with torch.no_grad():
        autoencoder.center.mul_(scale)  # Strengths and reconstructions are proportional to the activations.
    return autoencoder


@torch.no_grad()
def _replace(autoencoder: SparseAutoencoder, dead: Tensor, errors: Tensor, generator: torch.Generator) -> None:
    """Give dead features the directions of errors (B, C), drawn by their squared lengths (as in Bricken et al., 2023)."""
    if dead.any() and errors.any():
        drawn = torch.multinomial(errors.pow(2).sum(1), int(dead.sum()), replacement=True, generator=generator)
        autoencoder.encoder[dead] = autoencoder.directions[dead] = F.normalize(errors[drawn], dim=1)
