"""The boundary condition of a latent consistency model: at sigma 0 its answer must be the state itself."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.state import spread, vp_scale
from ldm.types import Denoise


def consistency(
    denoise: Denoise, schedule: NoiseSchedule, *, sigma_data: float = 0.5, timestep_scale: float = 10.0
) -> Denoise:
    """f(x, t) = c_skip(t) * x_vp + c_out(t) * denoised (Luo et al. 2023, eq. 9 and appendix; Song et al. 2023, eq. 5).

    With u = timestep_scale * t: c_skip = d^2 / (u^2 + d^2), c_out = u / sqrt(u^2 + d^2), d = sigma_data. Away from
    timestep 0 this is `denoise` to about 1e-5, so it matters only where every digit must agree.
    """

    def boundary_denoise(x: Tensor, sigma: Tensor) -> Tensor:
        u = timestep_scale * schedule.timestep(sigma).double()
        skip = sigma_data**2 / (u**2 + sigma_data**2)
        out = u / (u**2 + sigma_data**2).sqrt()
        return spread(skip * vp_scale(sigma).cpu(), x) * x + spread(out, x) * denoise(x, sigma)

    return boundary_denoise
