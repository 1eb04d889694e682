"""Our networks as diffusers' own, with the same weights, for tests that hold the one against the other."""

from __future__ import annotations

import diffusers
from diffusers.loaders import single_file_utils as converters

from ldm.models.presets import SystemConfig
from ldm.pipeline.latent_diffusion import LatentDiffusion


def their_prediction(config: SystemConfig) -> str:
    return {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[config.prediction]


def their_unet(model: LatentDiffusion) -> diffusers.UNet2DConditionModel:
    """With SDXL's sizes in its vector, or unCLIP's embedding, and with the class labels of the upscaler."""
    config, sizes = model.config.unet, model.config.sizes_in_vector
    widths = [config.model_channels * mult for mult in config.channel_mult]
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in config.attention[::-1]),
        block_out_channels=tuple(widths),
        layers_per_block=config.res_blocks,
        cross_attention_dim=config.context_width,
        transformer_layers_per_block=tuple(depth or config.middle_attention for depth in config.attention),
        attention_head_dim=tuple(config.heads_for(width) for width in widths),  # their name for the number of heads
        use_linear_projection=config.linear_projections,
        only_cross_attention=config.cross_only,
        num_class_embeds=config.classes,
        addition_embed_type="text_time" if sizes else None,
        addition_time_embed_dim=256 if sizes else None,
        class_embed_type="projection" if config.vector_width and not sizes else None,
        projection_class_embeddings_input_dim=config.vector_width,
    )
    ours = {f"model.diffusion_model.{name}": tensor for name, tensor in model.unet.state_dict().items()}
    unet.load_state_dict(converters.convert_ldm_unet_checkpoint(ours, dict(unet.config)), strict=True)
    return unet.eval()


def their_autoencoder(model: LatentDiffusion) -> diffusers.AutoencoderKL:
    config = model.config.autoencoder
    levels = len(config.channel_mult)
    autoencoder = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.base_channels * mult for mult in config.channel_mult),
        layers_per_block=config.res_blocks,
        latent_channels=config.latent_channels,
        scaling_factor=config.scale_factor,
    )
    ours = {f"first_stage_model.{name}": tensor for name, tensor in model.autoencoder.state_dict().items()}
    state = converters.convert_ldm_vae_checkpoint(ours, dict(autoencoder.config))
    autoencoder.load_state_dict(state, strict=True)
    return autoencoder.eval()
