"""Flow schedule, noise, latent format, guidance and samplers: from text tokens and a seed to a latent."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dit_embedder import ControlNet, spread
from mmditx import TIMESTEPS, ContextHook, MMDiT, ModelCall, Reuse, Stream, Streams, Text, run_blocks

LATENT_SHIFT = 0.0609
LATENT_SCALE = 1.5305
# (x, sigma (B,)) -> denoised, both (B, C, h, w)
DenoiseFn = Callable[..., Tensor]


def latent_in(latent: Tensor) -> Tensor:
    """VAE latent -> the space the MMDiT works in."""
    return (latent - LATENT_SHIFT) * LATENT_SCALE


def latent_out(latent: Tensor) -> Tensor:
    """The MMDiT's space -> VAE latent."""
    return latent / LATENT_SCALE + LATENT_SHIFT


def flow_sigma(t: Tensor | float, shift: float) -> Tensor | float:
    """Shifted flow time: sigma(t) = shift t / (1 + (shift - 1) t), t in [0, 1]."""
    return shift * t / (1 + (shift - 1) * t)


def flow_schedule(steps: int, shift: float) -> Tensor:
    """The `steps` + 1 sigmas of a run, float32 on the CPU, from sigma(1) down to 0.

    Timesteps are spaced evenly between the shifted ends and shifted once more, as in the public reference.
    """
    first, last = (TIMESTEPS * flow_sigma(t, shift) for t in (1.0, 1.0 / TIMESTEPS))
    sigmas = flow_sigma(torch.linspace(first, last, steps) / TIMESTEPS, shift)
    return torch.cat([sigmas, torch.zeros(1)])


def img2img_sigmas(sigmas: Tensor, steps: int, denoise: float) -> Tensor:
    """The part of a schedule of `steps` that an image-to-image run of strength `denoise` in [0, 1] executes."""
    return sigmas[int(steps * (1 - denoise)) :]


def seeded_noise(seed: int, shape: Sequence[int], stream: str = "") -> Tensor:
    """Standard normal float32 on the CPU, so that a seed means the same on every device.

    `stream` names an independent series of the same seed; the start noise is the one without a name.
    """
    if stream:
        seed = int.from_bytes(hashlib.sha256(f"{stream}:{seed}".encode()).digest()[:7], "big")
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def start_noise(seeds: Sequence[int], shape: Sequence[int], stream: str = "") -> Tensor:
    """One (1, C, h, w) draw per seed, stacked: (len(seeds), C, h, w)."""
    return torch.cat([seeded_noise(seed, (1, *shape[1:]), stream) for seed in seeds])


@dataclass(frozen=True)
class Conditioning:
    """Encoded text of a batch: tokens (B, T, X) and pooled (B, Y)."""

    context: Tensor
    pooled: Tensor


def stack_halves(first: Conditioning, second: Conditioning) -> Conditioning:
    """Both halves of guidance in one batch. Raises ValueError where their token counts differ."""
    if first.context.shape[1] != second.context.shape[1]:
        raise ValueError(
            f"prompt and negative prompt have {first.context.shape[1]} and {second.context.shape[1]} text tokens; "
            "encode both at the longer length"
        )
    return Conditioning(torch.cat([first.context, second.context]), torch.cat([first.pooled, second.pooled]))


class SkipLayers(Protocol):
    """Skip-layer guidance: `scale` (cond - cond without `layers`) is added in the steps in which it acts."""

    scale: float
    layers: Sequence[int]

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in `step` (from 0) of a schedule of `steps`."""


class Denoiser:
    """denoised(x, sigma) by the MMDiT under classifier-free guidance, skip-layer guidance and a ControlNet.

    One per run of a sampler: it counts its calls, which decide when skip-layer guidance acts.
    """

    def __init__(
        self,
        model: MMDiT,
        cond: Conditioning,
        neg_cond: Conditioning | None,
        cfg: float,
        steps: int = 0,
        skip_layer: SkipLayers | None = None,
        controlnet: ControlNet | None = None,
        control: Tensor | None = None,
        control_strength: float = 1.0,
        hooks: Sequence[Stream | ContextHook | None] = (),
        steps_run: int | None = None,
        cache: float = 0.0,
    ):
        """steps: the full number, for skip-layer guidance; control: latent of the control image in model space;
        neg_cond: None when cfg is 1 (the unconditional half is skipped); hooks: streams (see `mmditx.Stream`) or
        functions (i, context) -> what enters block i; steps_run: how many steps run (None: `steps`); cache: threshold
        of `mmditx.Reuse`, 0 for none.
        """
        self.model = model
        both = cond if neg_cond is None else stack_halves(cond, neg_cond)
        self.cond, self.text = (model.embed_text(text.pooled, text.context) for text in (cond, both))
        self.cfg = cfg
        self.guided = neg_cond is not None
        self.steps = steps
        self.skip_layer = skip_layer
        self.controlnet = controlnet
        self.control = control
        self.control_strength = control_strength
        self.streams = Streams(hooks)
        self.steps_run = steps_run or steps or 1
        self.step = 0
        self.cache = cache
        self.reuse: dict[tuple, Reuse] = {}  # by kind of call

    def velocity(self, x: Tensor, sigma: float, text: Text, control: bool, skip: Sequence[int]) -> Tensor:
        """The network's velocity, float32; x (B, C, h, w) float32, one sigma for all rows."""
        x = x.to(self.model.x_embedder.proj.weight.dtype)
        t = torch.full((x.shape[0],), TIMESTEPS * sigma, dtype=torch.float32, device=x.device)
        controls = None
        if control and self.controlnet is not None and self.control is not None:
            latent = self.control.to(x)
            if latent.shape[0] > 1:
                latent = latent.repeat(x.shape[0] // latent.shape[0], 1, 1, 1)
            states = self.controlnet(self.model, x, t, text.y, latent, self.control_strength)
            controls = spread(states, self.model.config.depth)
        halves = self.guided and text is self.text
        rows = x.shape[0]
        call = ModelCall.of_rows(self.step, self.steps_run, sigma, rows, "cond", halves, text=text, skip_layers=skip)
        stream = self.streams if self.streams.begin(call) else None
        run = self.reuse.setdefault((control, tuple(skip)), Reuse(self.cache)).run if self.cache else run_blocks
        return self.model.velocity(x, t, text, controls, skip, stream, run).float()

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """denoised = x - sigma v, guided; x (B, C, h, w) float32, sigma a number or (B,) of one value."""
        sigma = sigma if isinstance(sigma, float) else float(sigma.reshape(-1)[0])
        if self.guided:
            v_cond, v_neg = self.velocity(torch.cat([x, x]), sigma, self.text, True, ()).chunk(2)
            cond, uncond = x - sigma * v_cond, x - sigma * v_neg
            denoised = uncond + self.cfg * (cond - uncond)
        else:
            denoised = cond = x - sigma * self.velocity(x, sigma, self.cond, True, ())
        slg = self.skip_layer
        if slg is not None and slg.acts(self.step, self.steps):
            without = x - sigma * self.velocity(x, sigma, self.cond, False, slg.layers)
            denoised = denoised + slg.scale * (cond - without)
        self.step += 1
        return denoised


def _call(model: DenoiseFn, x: Tensor, sigma: float, extra_args: dict | None) -> Tensor:
    if isinstance(model, Denoiser):  # takes a number: nothing waits for the device
        return model(x, sigma)
    return model(x, torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device), **(extra_args or {}))


@torch.no_grad()
def sample_euler(
    model: DenoiseFn, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback: Callable | None = None
) -> Tensor:
    """Euler steps along the probability flow (Karras et al. 2022, algorithm 2 without noise).

    x: (B, C, h, w) at sigmas[0]; sigmas: (n + 1,), falling; model(x, sigma (B,), **extra_args) -> denoised;
    callback(step) after each step. Returns x at the last sigma.
    """
    levels = sigmas.tolist()
    for i, (sigma, following) in enumerate(itertools.pairwise(levels)):
        denoised = _call(model, x, sigma, extra_args)
        x = x + (x - denoised) * ((following - sigma) / sigma)
        if callback is not None:
            callback(i)
    return x


@torch.no_grad()
def sample_dpmpp_2m(
    model: DenoiseFn, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback: Callable | None = None
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, arXiv 2211.01095, with lambda = -ln sigma; arguments as `sample_euler`."""
    levels = sigmas.double()
    lambdas = -levels.log()
    previous, h_previous = None, None
    for i in range(len(levels) - 1):
        sigma, following = levels[i].item(), levels[i + 1].item()
        denoised = _call(model, x, sigma, extra_args)
        h = (lambdas[i + 1] - lambdas[i]).item()
        target = denoised
        if previous is not None and following > 0:
            weight = h / (2 * h_previous)  # 1 / (2 r), r = previous h / h
            target = (1 + weight) * denoised - weight * previous
        x = (following / sigma) * x - torch.expm1(torch.tensor(-h, dtype=torch.float64)).item() * target
        if h:  # 0 where two neighbouring sigmas are one number in float32: nothing moved
            previous, h_previous = denoised, h
        if callback is not None:
            callback(i)
    return x


SAMPLERS = {"euler": sample_euler, "dpmpp_2m": sample_dpmpp_2m}


def guided_sampling(
    denoiser: Denoiser,
    sampler: str,
    latent: Tensor,
    seeds: Sequence[int],
    sigmas: Tensor,
    callback: Callable | None = None,
) -> Tensor:
    """Runs a sampler from `latent` (B, C, h, w, model space; zeros for text to image) and the seeds' noise.

    Start: x = sigma_0 noise + (1 - sigma_0) latent. Returns the latent in model space, float32.
    """
    latent = latent.float()
    first = sigmas[0].item()
    noise = start_noise(seeds, latent.shape).to(latent.device)
    x = first * noise + (1 - first) * latent
    return SAMPLERS[sampler](denoiser, x, sigmas, callback=callback)
