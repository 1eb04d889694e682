"""Guidance against its formulas, and when it costs what."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPAGPipeline, UNet2DConditionModel
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance, Projection, Told, always, guided, guided_prediction, rescaled
from ldm.diffusion.prediction import to_denoised
from ldm.diffusion.schedule import scaled_linear
from ldm.diffusion.sigmas import end_above_zero, leading
from ldm.diffusion.state import finish_state, start_state
from ldm.layers.attention import AttentionBlock
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.samplers.ddim import ddim
from ldm.types import Conditioning, PredictionType

SCHEDULE = scaled_linear()
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([2.0, 2.0])
COND = Conditioning(vector=torch.tensor([[1.0], [2.0]]))
UNCOND = Conditioning(vector=torch.tensor([[-0.5], [-0.5]]))


class Network:
    """Depends on the condition in a way that is no mere offset; counts its calls and rows."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        self.rows.append(len(x))
        return torch.tanh(x * cond.vector[:, :, None, None]) + 0.1 * cond.vector[:, :, None, None]


class TwoHeaded(Network):
    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        return torch.cat([super().__call__(x, timestep, cond), 0 * x + cond.vector[:, :, None, None]], dim=1)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_is_its_formula_in_one_batch(scale):
    network = Network()
    denoiser = Denoiser(network, SCHEDULE, "eps")
    with_cond, without = (denoiser(X, SIGMA, c).denoised for c in (COND, UNCOND))
    network.rows.clear()
    denoised = guided(denoiser, always(COND, UNCOND), Guidance(scale))(X, SIGMA)
    assert torch.allclose(denoised, without + scale * (with_cond - without), atol=1e-5)
    assert network.rows == [4]


def test_scale_one_never_looks_at_the_other_condition():
    network = Network()
    denoiser = Denoiser(network, SCHEDULE, "eps")
    denoised = guided(denoiser, always(COND), Guidance())(X, SIGMA)
    assert torch.equal(denoised, denoiser(X, SIGMA, COND).denoised)
    assert network.rows == [2, 2]


def test_scale_needs_an_unconditional():
    with pytest.raises(ValueError, match="needs an unconditional"):
        guided(Denoiser(Network(), SCHEDULE, "eps"), always(COND), Guidance(2.0))


def test_an_interval_saves_the_second_half_outside():
    network = Network()
    denoiser = Denoiser(network, SCHEDULE, "eps")
    limited = guided(denoiser, always(COND, UNCOND), Guidance(5.0, interval=(1.0, 4.0)))
    everywhere = guided(denoiser, always(COND, UNCOND), Guidance(5.0))
    for level, guides in ((0.5, False), (1.0, True), (2.0, True), (4.0, True), (4.5, False)):
        sigma = torch.full((2,), level)
        expected = everywhere(X, sigma) if guides else denoiser(X, sigma, COND).denoised
        network.rows.clear()
        assert torch.allclose(limited(X, sigma), expected, atol=1e-6)
        assert network.rows == [4 if guides else 2]


def test_an_interval_may_hold_part_of_a_batch():
    denoiser = Denoiser(Network(), SCHEDULE, "eps")
    sigma = torch.tensor([0.5, 2.0])
    limited = Guidance(5.0, rescale=0.7, interval=(1.0, 4.0))
    denoised = guided(denoiser, always(COND, UNCOND), limited)(X, sigma)
    everywhere = guided(denoiser, always(COND, UNCOND), Guidance(5.0, rescale=0.7))(X, sigma)
    assert torch.allclose(denoised[0], denoiser(X, sigma, COND).denoised[0], atol=1e-5)
    assert torch.allclose(denoised[1], everywhere[1], atol=1e-5)


@pytest.mark.parametrize("amount", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_rescale_equals_diffusers_on_the_network_output(prediction: PredictionType, amount: float):
    denoiser = Denoiser(Network(), SCHEDULE, prediction)
    with_cond, without = (denoiser.output(X, SIGMA, c)[0] for c in (COND, UNCOND))
    output = rescale_noise_cfg(without + 6 * (with_cond - without), with_cond, guidance_rescale=amount)
    expected = to_denoised(prediction, output, X, SIGMA)
    denoised = guided(denoiser, always(COND, UNCOND), Guidance(6.0, rescale=amount))(X, SIGMA)
    assert torch.allclose(denoised, expected, atol=1e-4)


def test_a_full_rescale_has_the_contrast_of_the_conditional_output():
    output, output_cond = 5 * X + 1, 0.5 * X
    full = rescaled(output, output_cond, 1.0)
    assert torch.allclose(full.flatten(1).std(dim=1), output_cond.flatten(1).std(dim=1))
    assert torch.equal(rescaled(output, output_cond, 0.0), output)


def test_the_learned_variance_is_that_of_the_condition():
    denoiser = Denoiser(TwoHeaded(), SCHEDULE, "eps")
    guided_one = guided_prediction(denoiser, always(COND, UNCOND), Guidance(4.0))(X, SIGMA)
    alone = denoiser(X, SIGMA, COND)
    assert guided_one.variance is not None and alone.variance is not None
    assert torch.equal(guided_one.variance, alone.variance)


OTHER = Conditioning(vector=torch.tensor([[0.3], [-2.0]]))


@pytest.mark.parametrize("scale", [1.0, 0.0, 4.0])
def test_parts_joined_by_and_are_their_formula_in_one_batch(scale):
    """Liu et al. 2022, eq. 11, times a scale; a negative weight leans away from its part."""
    network = Network()
    denoiser = Denoiser(network, SCHEDULE, "eps")
    one, other, without = (denoiser(X, SIGMA, c).denoised for c in (COND, OTHER, UNCOND))
    network.rows.clear()
    told = [(torch.inf, Told(((COND, 1.3), (OTHER, -0.4)), UNCOND))]
    denoised = guided(denoiser, told, Guidance(scale))(X, SIGMA)
    expected = without + scale * (1.3 * (one - without) - 0.4 * (other - without))
    assert torch.allclose(denoised, expected, atol=1e-5)
    assert network.rows == [6]


def test_one_part_is_plain_guidance_bit_for_bit():
    denoiser = Denoiser(Network(), SCHEDULE, "eps")
    pair = denoiser(torch.cat([X, X]), torch.cat([SIGMA, SIGMA]), Conditioning.stack([COND, UNCOND]))
    with_cond, without = pair.denoised.chunk(2)
    one = guided(denoiser, [(torch.inf, Told(((COND, 1.0),), UNCOND))], Guidance(4.0, perturbed=0.0))(X, SIGMA)
    assert torch.equal(one, without + torch.tensor(4.0) * (with_cond - without))


def test_a_weight_alone_leans_as_a_scale_does():
    denoiser = Denoiser(Network(), SCHEDULE, "eps")
    weighted = guided(denoiser, [(torch.inf, Told(((COND, 2.5),), UNCOND))], Guidance(2.0))(X, SIGMA)
    assert torch.allclose(weighted, guided(denoiser, always(COND, UNCOND), Guidance(5.0))(X, SIGMA), atol=1e-5)


def test_outside_of_the_interval_the_parts_are_still_weighed():
    denoiser = Denoiser(Network(), SCHEDULE, "eps")
    told = [(torch.inf, Told(((COND, 0.5), (OTHER, 0.5)), UNCOND))]
    outside = guided(denoiser, told, Guidance(7.0, perturbed=2.0, interval=(5.0, 9.0)))(X, SIGMA)
    assert torch.equal(outside, guided(denoiser, told, Guidance())(X, SIGMA))


@pytest.mark.parametrize(
    "told",
    [Told(((COND, 1.0), (OTHER, 1.0))), Told(((COND, 0.7),))],
    ids=["several parts", "a weight"],
)
def test_weighed_parts_need_an_unconditional(told):
    with pytest.raises(ValueError, match="weigh them against"):
        guided(Denoiser(Network(), SCHEDULE, "eps"), [(torch.inf, told)], Guidance())


class Reader(Network):
    """Looks at text of any number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []

    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.cross is not None
        self.tokens.append(cond.cross.shape[1])
        return super().__call__(x, timestep, Conditioning(vector=cond.cross.square().sum(dim=1)))


def test_texts_of_other_lengths_have_a_batch_of_their_own():
    network = Reader()
    denoiser = Denoiser(network, SCHEDULE, "eps")
    short, long, other = (
        Conditioning(cross=torch.linspace(-1, end, 2 * n).reshape(2, n, 1)) for n, end in ((3, 0.4), (6, 0.2), (3, 1.0))
    )
    a, b, without = (denoiser(X, SIGMA, c).denoised for c in (short, long, other))
    network.rows.clear()
    network.tokens.clear()
    told = [(torch.inf, Told(((short, 0.8), (long, 0.6)), other))]
    expected = without + 3 * (0.8 * (a - without) + 0.6 * (b - without))
    assert torch.allclose(guided(denoiser, told, Guidance(3.0))(X, SIGMA), expected, atol=1e-5)
    assert (network.rows, network.tokens) == ([4, 2], [3, 6])


def test_what_is_told_changes_from_level_to_level():
    denoiser = Denoiser(Network(), SCHEDULE, "eps")
    told = [*always(COND, UNCOND), (3.0, Told(((OTHER, 1.0),), UNCOND)), (1.0, Told(((COND, 1.0),), OTHER))]
    denoise = guided(denoiser, told, Guidance(4.0))
    for level, expected in (
        (3.5, (COND, UNCOND)),
        (3.0, (OTHER, UNCOND)),
        (1.5, (OTHER, UNCOND)),
        (1.0, (COND, OTHER)),
    ):
        sigma = torch.full((2,), level)
        assert torch.equal(denoise(X, sigma), guided(denoiser, always(*expected), Guidance(4.0))(X, sigma))


@pytest.mark.parametrize("starts", [[], [4.0], [torch.inf, 2.0, 3.0]])
def test_what_is_told_must_begin_at_the_top_and_fall(starts):
    with pytest.raises(ValueError, match="begin at sigma inf"):
        guided(Denoiser(Network(), SCHEDULE, "eps"), [(start, Told(((COND, 1.0),))) for start in starts], Guidance())


@pytest.mark.parametrize(
    "projection", [Projection(), Projection(0.3, 0.0, 0.0), Projection(1.0, 2.0, 0.5), Projection(0.0, 0.5, -0.5)]
)
def test_projection_equals_diffusers_over_several_steps(projection):
    """Theirs in its original form, in which the paper's w - 1 is the scale."""
    denoiser = Denoiser(Network(), SCHEDULE, "eps")
    denoise = guided(denoiser, always(COND, UNCOND), Guidance(6.0, apg=projection))
    buffer = MomentumBuffer(projection.momentum)
    for level in (8.0, 3.0, 1.0):
        sigma = torch.full((2,), level)
        with_cond, without = (denoiser(X * level, sigma, c).denoised for c in (COND, UNCOND))
        expected = normalized_guidance(with_cond, without, 5.0, buffer, projection.parallel, projection.norm, True)
        assert torch.allclose(denoise(X * level, sigma), expected, atol=1e-4)


def test_a_projection_that_keeps_everything_is_plain_guidance():
    denoiser = Denoiser(Network(), SCHEDULE, "v")
    kept = guided(denoiser, always(COND, UNCOND), Guidance(6.0, apg=Projection(1.0, 0.0, 0.0)))
    plain = guided(denoiser, always(COND, UNCOND), Guidance(6.0))
    for _ in range(2):
        assert torch.allclose(kept(X, SIGMA), plain(X, SIGMA), atol=1e-4)


def test_the_memory_of_a_projection_is_that_of_one_run():
    denoiser = Denoiser(Network(), SCHEDULE, "v")
    first, second = (guided(denoiser, always(COND, UNCOND), Guidance(6.0, apg=Projection())) for _ in range(2))
    begun = first(X, SIGMA)
    assert not torch.equal(first(X, SIGMA), begun)
    assert torch.equal(second(X, SIGMA), begun)


WIDTHS = (32, 64)
TINY = UNetConfig(
    model_channels=32, channel_mult=(1, 2), res_blocks=1, attention=(1, 0), context_width=16, heads=2,
    cross_only=(False, False), middle_attention=1,
)  # fmt: skip
THEIRS = {
    "block_out_channels": WIDTHS,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "sample_size": 8,
}


def fill(module: nn.Module) -> None:
    """Weights at which self-attention matters: with large logits its map is far from even."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = 3 if "attn1" in name else 1
            weight = noise * gain * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2 * noise
            parameter.copy_(weight + (parameter.ndim == 1 and name.endswith("weight")))


@pytest.fixture(scope="module")
def unet() -> UNet:
    unet = UNet(TINY).eval()
    fill(unet)
    return unet


def texts(rows: int = 1, tokens: int = 5) -> tuple[Conditioning, Conditioning]:
    generator = torch.Generator().manual_seed(3)
    cross = torch.randn(2, 1, tokens, 16, generator=generator).repeat(1, rows, 1, 1)
    return Conditioning(cross=cross[0]), Conditioning(cross=cross[1])


@pytest.mark.parametrize(("scale", "perturbed", "rescale"), [(5.0, 3.0, 0.0), (1.0, 3.0, 0.0), (5.0, 2.0, 0.7)])
@torch.inference_mode()
def test_perturbed_attention_equals_the_diffusers_pipeline(unet, scale, perturbed, rescale):
    """Four steps of DDIM, on random weights."""
    theirs = UNet2DConditionModel(**THEIRS).eval().double()
    checkpoint = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.state_dict().items()}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(checkpoint, THEIRS | {"class_embed_type": None}))
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        set_alpha_to_one=False, clip_sample=False,
    )  # fmt: skip
    pipeline = StableDiffusionPAGPipeline(
        None, None, None, theirs, scheduler, None, None, requires_safety_checker=False, pag_applied_layers="mid"
    )
    pipeline.set_progress_bar_config(disable=True)
    cond, uncond = (c.to(dtype=torch.float64) for c in texts())
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)).double()
    reference = pipeline(
        prompt_embeds=cond.cross, negative_prompt_embeds=uncond.cross, latents=noise, num_inference_steps=4,
        guidance_scale=scale, pag_scale=perturbed, guidance_rescale=rescale, output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    sigmas = end_above_zero(leading(SCHEDULE, 4), SCHEDULE)
    denoiser = Denoiser(copy.deepcopy(unet).double(), SCHEDULE, "eps", nearest_timestep=True)
    plain, leant = (
        guided(denoiser, always(cond, uncond), Guidance(scale, rescale, perturbed=amount))
        for amount in (0.0, perturbed)
    )
    x = start_state(noise, float(sigmas[0]))
    ours, without = (
        finish_state([*ddim(denoise, x, sigmas, lambda *_: x)][-1].x, float(sigmas[-1])) for denoise in (leant, plain)
    )
    assert torch.allclose(ours, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    assert float((ours - without).abs().max()) > 0.05 * float(reference.abs().max())


@torch.inference_mode()
def test_only_the_rows_named_are_perturbed(unet):
    cond = texts(rows=3)[0]
    x, timestep = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(6)), torch.full((3,), 500.0)
    plain = unet(x, timestep, cond)
    some = unet(x, timestep, cond.with_(perturbed=torch.tensor([False, True, False])))
    assert torch.equal(some[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(some[1], plain[1], atol=1e-2)
    assert torch.equal(unet(x, timestep, cond.with_(perturbed=torch.zeros(3, dtype=torch.bool))), plain)


@torch.inference_mode()
def test_control_networks_are_not_perturbed():
    """They are given the same conditioning as the U-Net, through `Controlled`."""
    control = ControlNet(ControlNetConfig(TINY, hint_widths=(8, 16)))
    fill(control)
    x, timestep, picture = torch.ones(2, 4, 8, 8), torch.full((2,), 500.0), torch.ones(1, 3, 16, 16)
    cond = texts(rows=2)[0]
    told = cond.with_(perturbed=torch.tensor([True, False]))
    for ours, plain in zip(control(x, timestep, told, picture), control(x, timestep, cond, picture), strict=True):
        assert float(plain.abs().max()) > 0
        assert torch.equal(ours, plain)


@torch.inference_mode()
def test_attention_without_text_is_perturbed_to_its_values():
    block = AttentionBlock(64, heads=2)
    fill(block)
    x = torch.randn(2, 64, 3, 4, generator=torch.Generator().manual_seed(8))
    values = block.qkv(block.norm(x.flatten(2))).view(2, 2, 3, 32, 12)[:, :, 2].reshape(2, 64, 12)
    expected = x + block.proj_out(values).view_as(x)
    perturbed = block(x, torch.tensor([True, False]))
    assert torch.allclose(perturbed[0], expected[0], atol=1e-5)
    assert torch.equal(perturbed[1], block(x)[1])
    assert not torch.allclose(perturbed[0], block(x)[0], atol=1e-2)


@torch.inference_mode()
def test_perturbed_parts_count_by_their_weights_and_share_the_batch(unet):
    rows: list[int] = []

    def counted(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        rows.append(len(x))
        return unet(x, timestep, cond)

    denoiser = Denoiser(counted, SCHEDULE, "eps")
    (one, uncond), other = texts(rows=2), Conditioning(cross=torch.linspace(-1, 1, 160).reshape(2, 5, 16))
    x, yes = 2 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7)), torch.ones(2, dtype=torch.bool)
    a, b, without = (denoiser(x, SIGMA, c).denoised for c in (one, other, uncond))
    perturbed_a, perturbed_b = (denoiser(x, SIGMA, c.with_(perturbed=yes)).denoised for c in (one, other))
    rows.clear()
    told = [(torch.inf, Told(((one, 0.7), (other, 0.5)), uncond))]
    denoised = guided(denoiser, told, Guidance(4.0, perturbed=2.0))(x, SIGMA)
    expected = without + 4 * (0.7 * (a - without) + 0.5 * (b - without))
    expected = expected + 2 * (0.7 * (a - perturbed_a) + 0.5 * (b - perturbed_b))
    assert torch.allclose(denoised, expected, atol=1e-4 * float(expected.abs().max()))
    assert rows == [10]
