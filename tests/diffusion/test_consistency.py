"""The boundary condition of consistency models against diffusers' scalings."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from ldm.diffusion.consistency import consistency
from ldm.diffusion.schedule import scaled_linear


def diffusers_scheduler(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(**config)


SCHEDULE = scaled_linear()


def test_scalings_equal_diffusers():
    scheduler = diffusers_scheduler("LCMScheduler")
    timesteps = torch.tensor([0, 1, 19, 999])
    sigma = SCHEDULE.sigma(timesteps).float()
    x, answer = torch.full((4, 1), 3.0), torch.full((4, 1), -2.0)
    ours = consistency(lambda x, sigma: answer, SCHEDULE)(x, sigma)
    for i, timestep in enumerate(timesteps.tolist()):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        preserving = 3.0 / (1 + float(sigma[i]) ** 2) ** 0.5
        assert torch.allclose(ours[i], torch.tensor([skip * preserving - 2.0 * out]).float(), atol=1e-6)
