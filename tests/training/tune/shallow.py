"""Systems that are run hundreds of times in a test."""

from __future__ import annotations

from dataclasses import replace

from ldm.models.presets import SystemConfig, tiny


def shallow(config: SystemConfig) -> SystemConfig:
    """A tiny system whose U-Net has two levels of one residual block each: a quarter of the work."""
    config = tiny(config)
    unet = replace(config.unet, channel_mult=(1, 2), attention=(1, 1), cross_only=(False, False), res_blocks=1)
    return replace(config, unet=unet)
