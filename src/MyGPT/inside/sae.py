"""A sparse autoencoder: it explains the activations of one layer as sums of a few features out of many.

A model has more concepts than a layer has neurons, so it stores each concept as a direction and lets the directions overlap
(superposition; Elhage et al., 2022). A sparse autoencoder looks for these directions. It writes each activation x (C,) as

    x ≈ center + f_1 direction_1 + … + f_F direction_F,   where at most k of the F strengths f are above zero,

and the strengths f are a linear function of x whose k largest values are kept (Makhzani & Frey, 2013; Gao et al., 2024).
The alternative is an L1 penalty on the strengths (Bricken et al., 2023; Cunningham et al., 2023). The penalty also shrinks
the strengths, and its coefficient must be tuned for each layer; k is the number of features that a reader has to look at.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT.config import check_seed, require_positive
from MyGPT.evaluation.perplexity import strided_loss
from MyGPT.files import atomic_write
from MyGPT.generation import evaluation_mode
from MyGPT.inside.tracing import edit
from MyGPT.model import GPTModel
from MyGPT.notebooks import Described
from MyGPT.progress import progress_bar
from MyGPT.sampling import require_finite

N_RESAMPLINGS = 10
"""The number of times that training replaces dead features, all in the first half of the steps."""


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder with n_features features for activations of `width` numbers, k of which describe an activation."""

    def __init__(self, width: int, n_features: int, k: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        require_positive(width=width, n_features=n_features, k=k)
        if k > n_features:
            raise ValueError(f"k must be at most n_features, got k={k} and n_features={n_features}")
        self.k = k
        # A feature that starts with the same direction in encoder and decoder rarely dies (Gao et al., 2024).
        directions = F.normalize(torch.randn(n_features, width, generator=generator), dim=1)
        self.encoder = nn.Parameter(directions.clone())  # (F, C)
        self.threshold = nn.Parameter(torch.zeros(n_features))
        self.directions = nn.Parameter(directions)  # (F, C), each of length 1
        self.center = nn.Parameter(torch.zeros(width))

    def encode(self, x: Tensor) -> Tensor:
        """Return the strength of each feature, (..., F), in activations x (..., C). At most k strengths are above zero."""
        strengths = F.relu((x - self.center) @ self.encoder.T - self.threshold)
        weakest = strengths.topk(self.k, sorted=False).values.amin(-1, keepdim=True)
        return strengths.where(strengths >= weakest, 0.0)

    def decode(self, strengths: Tensor) -> Tensor:
        """Return the activations, (..., C), that features with these strengths (..., F) describe."""
        return self.center + strengths @ self.directions

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of the activations x (..., C)."""
        return self.decode(self.encode(x))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the autoencoder to a safetensors file."""
        from safetensors.torch import save

        with atomic_write(path, "wb") as file:
            file.write(save(self.state_dict(), metadata={"k": str(self.k)}))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> SparseAutoencoder:
        """Read an autoencoder that `save` wrote. Another file raises ValueError."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(Path(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                n_features, width = tensors["encoder"].shape
                autoencoder = SparseAutoencoder(width, n_features, int((file.metadata() or {})["k"]))
            autoencoder.load_state_dict(tensors)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} does not contain a sparse autoencoder: {error}") from None
        return autoencoder


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
    learning rate falls linearly to zero. A dead feature, which no recent activation has used, gets a new direction: the error
    of an activation that is reconstructed badly (a simple form of the resampling of Bricken et al., 2023).
    """
    require_positive(steps=steps, batch_size=batch_size)
    check_seed(seed)
    if activations.dim() != 2 or not len(activations):
        raise ValueError(f"activations must have the shape (N, C), got {tuple(activations.shape)}")
    generator = torch.Generator().manual_seed(seed)
    x = activations.detach().float().cpu()
    require_finite("an activation", x)
    mean = x.mean(0)
    # Activations of length 1 on average let the same learning rate fit every layer.
    scale = (x - mean).pow(2).sum(1).mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    autoencoder = SparseAutoencoder(x.shape[1], n_features, k, generator)
    with torch.no_grad():
        autoencoder.center.copy_(mean / scale)
    optimizer = torch.optim.Adam(autoencoder.parameters(), learning_rate, betas=(0.9, 0.99), fused=True)
    has_fired = torch.zeros(n_features, dtype=torch.bool)
    with progress_bar(progress, total=steps, unit="step") as bar:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            batch = x[torch.randint(len(x), (batch_size,), generator=generator)] / scale
            strengths = autoencoder.encode(batch)
            errors = batch - autoencoder.decode(strengths)
            optimizer.zero_grad()
            errors.pow(2).sum(1).mean().backward()
            optimizer.step()
            has_fired |= (strengths > 0).any(0)
            with torch.no_grad():
                autoencoder.directions.copy_(F.normalize(autoencoder.directions, dim=1))
            if (step + 1) % max(1, steps // (2 * N_RESAMPLINGS)) == 0 and 2 * step < steps:
                _replace(autoencoder, optimizer, (~has_fired).nonzero()[:, 0], errors.detach(), generator)
                has_fired.zero_()
            bar.update()
    with torch.no_grad():  # Strengths, reconstruction, center and threshold are proportional to the activations.
        autoencoder.center.mul_(scale)
        autoencoder.threshold.mul_(scale)
    return autoencoder


@torch.no_grad()
def _replace(
    autoencoder: SparseAutoencoder,
    optimizer: torch.optim.Optimizer,
    dead: Tensor,
    errors: Tensor,
    generator: torch.Generator,
) -> None:
    """Give the features with the numbers `dead` new directions: those of errors (B, C), drawn by their squared lengths."""
    sizes = errors.pow(2).sum(1)
    if not len(dead) or not sizes.sum() > 0:
        return
    drawn = torch.multinomial(sizes, len(dead), replacement=True, generator=generator)
    directions = F.normalize(errors[drawn], dim=1)
    for parameter, value in (
        (autoencoder.encoder, directions),
        (autoencoder.directions, directions),
        (autoencoder.threshold, torch.zeros(len(dead))),
    ):
        parameter[dead] = value
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][moment][dead] = 0.0


@torch.no_grad()
def collect_activations(
    model: GPTModel, ids: Tensor, place: str, batch_size: int = 32, progress: bool = False
) -> Tensor:
    """Return the activation of each token of a text, (N, C) float32 on the CPU.

    The model reads the text in windows: token i is in window i // context_length, together with the tokens before it in this
    window.

    Args:
        model: the model to run. It runs in evaluation mode.
        ids: token ids of the text, (N,) int64.
        place: the name of an activation with one vector per token, such as "h.3", which `edit` accepts.
        batch_size: windows per forward pass.
        progress: show a progress bar.
    """
    length, pieces = model.config.context_length, list[Tensor]()
    whole = ids[: len(ids) // length * length].view(-1, length)
    windows = [batch for batch in (*whole.split(batch_size), ids[None, whole.numel() :]) if batch.numel()]

    def record(activation: Tensor) -> Tensor:
        if activation.dim() != 3:
            raise ValueError(f"the activation {place} has no vector per token, its shape is {tuple(activation.shape)}")
        pieces.append(activation.flatten(0, 1).float().cpu())
        return activation

    bar = progress_bar(progress, total=len(ids), unit="token")
    with evaluation_mode(model), edit(model, {place: record}), bar:
        for batch in windows:
            model(batch.to(model.transformer.wte.weight.device), last_only=True)
            bar.update(batch.numel())
    return torch.cat(pieces)


@dataclass(frozen=True)
class AutoencoderQuality(Described):
    """The quality of a sparse autoencoder on the activations of a text, and the number of features that it uses."""

    variance_explained: float
    """The fraction of the variance of the activations that the reconstruction explains: 1 is perfect, 0 is the mean."""
    n_active: float
    """The mean number of features per token with a strength above zero (L0)."""
    n_dead: int
    """The number of features that fire at no token of the text."""
    loss: float
    """The loss of the language model, in nats per token."""
    reconstructed_loss: float
    """The loss when the reconstruction replaces the activation of every token."""
    mean_loss: float
    """The loss when the mean over all tokens replaces the activation of every token."""

    @property
    def loss_recovered(self) -> float:
        """The fraction of the loss between `mean_loss` (0) and `loss` (1) that the reconstruction recovers."""
        return (self.mean_loss - self.reconstructed_loss) / (self.mean_loss - self.loss)

    def summary(self) -> dict[str, object]:
        """Return all measures by name."""
        return {**vars(self), "loss_recovered": self.loss_recovered}


@torch.no_grad()
def measure_autoencoder(model: GPTModel, ids: Tensor, place: str, autoencoder: SparseAutoencoder) -> AutoencoderQuality:
    """Measure an autoencoder for the activation `place` on a text, which should not be the text of its training.

    `ids` are the token ids of the text, (N,) int64. The model reads the text four times: to collect the activations, and for
    each of the three losses.
    """
    x = collect_activations(model, ids, place)
    mean, device = x.mean(0), model.transformer.wte.weight.device
    n_active, has_fired, error = 0, torch.zeros(len(autoencoder.threshold), dtype=torch.bool), 0.0
    for batch in x.split(4096):
        strengths = autoencoder.encode(batch)
        n_active += int((strengths > 0).sum())
        has_fired |= (strengths > 0).any(0)
        error += float((batch - autoencoder.decode(strengths)).pow(2).sum())
    with edit(model, {place: lambda activation: autoencoder(activation.float().cpu()).to(device, activation.dtype)}):
        reconstructed = strided_loss(model, ids).loss
    with edit(model, {place: lambda activation: mean.to(device, activation.dtype).expand_as(activation)}):
        of_mean = strided_loss(model, ids).loss
    explained = 1 - error / float((x - mean).pow(2).sum())
    n_dead = int((~has_fired).sum())
    return AutoencoderQuality(
        explained, n_active / len(x), n_dead, strided_loss(model, ids).loss, reconstructed, of_mean
    )
