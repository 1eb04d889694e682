"""The noised CLIP image embedding that Stable Diffusion 2.1 unCLIP is told (Ramesh et al. 2022; Rombach, 2023).

It was trained on embeddings with noise of every level, so that at a high level it keeps the gist of a picture only.
Shapes: B batch, P width of the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.layers.embeddings import sinusoidal_embedding


class NoiseAugmentor(nn.Module):
    """An embedding brought to mean 0 and variance 1, noised, brought back, and the noise level beside it.

    Tensor names: data_mean, data_std, both (1, P); without `statistics` it has none, and they are taken as 0 and 1.
    """

    data_mean: Tensor | None
    data_std: Tensor | None

    def __init__(self, width: int, statistics: bool) -> None:
        super().__init__()
        self.register_buffer("data_mean", torch.zeros(1, width) if statistics else None)
        self.register_buffer("data_std", torch.ones(1, width) if statistics else None)

    def forward(self, embedding: Tensor, noise: Tensor, level: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """embedding, noise (B, P); level (B,) with the weights of signal and noise there, alpha and sigma (B,).

        -> (B, 2 P): the noised embedding, then the level in sinusoidal features.
        """
        alpha, sigma = alpha.to(embedding)[:, None], sigma.to(embedding)[:, None]
        if self.data_mean is None or self.data_std is None:
            noised = alpha * embedding + sigma * noise
        else:
            unit = (embedding - self.data_mean) / self.data_std
            noised = (alpha * unit + sigma * noise) * self.data_std + self.data_mean
        features = sinusoidal_embedding(level, embedding.shape[1])
        return torch.cat([noised, features.to(noised)], dim=1)
