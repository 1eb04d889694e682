"""How much each noise level counts in training."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.prediction import PredictionType


def min_snr_weight(sigma: Tensor, prediction: PredictionType, gamma: float = 5.0) -> Tensor:
    """Weight of the squared error at each sigma, (B,): that of x0 prediction clipped at `gamma`.

    Hang et al. 2023, section 3.4: min(SNR, gamma) on the error of x0, restated for what the network predicts, since
    the error of x0 is sigma^2 times that of eps and 1 / (SNR + 1) times that of v.
    """
    snr = sigma**-2
    clipped = snr.clamp(max=gamma)
    match prediction:
        case "x0":
            return clipped
        case "eps":
            return clipped / snr
        case "v":
            return clipped / (snr + 1)
