"""Flow schedules, noise, latent format, guidance and samplers: text tokens and seeds -> latents."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dit_embedder import ControlNet, spread
from mmditx import TIMESTEPS, ContextHook, MMDiT, ModelCall, Reuse, Stream, Streams, TokenKinds, run_blocks

LATENT_SHIFT = 0.0609
LATENT_SCALE = 1.5305
# denoise(x, sigma) -> denoised image, both (B, C, h, w); a sampler may call it any number of times, at any sigma
Denoise = Callable[[Tensor, float], Tensor]
# noise(sigma, following) -> fresh standard normal noise shaped as x, for the step from sigma to following
Noise = Callable[[float, float], Tensor]
# on_step(step, x, sigma, denoised): x (B, C, h, w) at sigma, and its denoised image; returning False stops the run
OnStep = Callable[[int, Tensor, float, Tensor], "bool | None"]


def latent_in(latent: Tensor) -> Tensor:
    """VAE latent -> latent in the model space of the MMDiT."""
    return (latent - LATENT_SHIFT) * LATENT_SCALE


def latent_out(latent: Tensor) -> Tensor:
    """Latent in model space -> VAE latent."""
    return latent / LATENT_SCALE + LATENT_SHIFT


def flow_sigma(t: Tensor | float, shift: float) -> Tensor | float:
    """Shifted flow time: sigma(t) = shift t / (1 + (shift - 1) t), t in [0, 1]."""
    return shift * t / (1 + (shift - 1) * t)


# ---- schedules: a function `sigmas_NAME` each -----------------------------------------------------


def sigmas_normal(steps: int, shift: float) -> Tensor:
    """The `steps` + 1 sigmas of a run, float32 on the CPU, from sigma(1) down to 0.

    Timesteps are evenly spaced between the shifted ends and then shifted again, as in the public reference.
    """
    first, last = (TIMESTEPS * flow_sigma(t, shift) for t in (1.0, 1.0 / TIMESTEPS))
    sigmas = flow_sigma(torch.linspace(first, last, steps) / TIMESTEPS, shift)
    return torch.cat([sigmas, torch.zeros(1)])


def sigmas_simple(steps: int, shift: float) -> Tensor:
    """Every (1000 / steps)-th of the model's 1000 levels, from the highest, shifted once, as ComfyUI's schedule of this
    name; shapes as `sigmas_normal`.
    """
    levels = flow_sigma(torch.arange(1, TIMESTEPS + 1) / TIMESTEPS, shift)
    places = [TIMESTEPS - 1 - i * TIMESTEPS // steps for i in range(steps)]
    return torch.cat([levels[places], torch.zeros(1)])


def sigmas_beta(steps: int, shift: float) -> Tensor:
    """Levels that are dense at both ends: those of the model's 1000, shifted once, at the quantiles of Beta(0.6, 0.6)
    (Lee et al. 2024, arXiv 2407.12173), as ComfyUI's schedule of this name; shapes as `sigmas_normal`.
    """
    levels = flow_sigma(torch.arange(1, TIMESTEPS + 1) / TIMESTEPS, shift)
    places = [round(beta_quantile(1 - i / steps, 0.6, 0.6) * (TIMESTEPS - 1)) for i in range(steps)]
    return torch.cat([levels[places], torch.zeros(1)])


def beta_probability(x: float, a: float, b: float) -> float:
    """Cumulative distribution function of Beta(a, b) at x in [0, 1]: the regularised incomplete beta function, by its
    power series (Abramowitz and Stegun, 26.5.4), which converges fast for x below 0.5.
    """
    if x > 0.5:
        return 1 - beta_probability(1 - x, b, a)
    total, factor, n = 0.0, 1.0, 0
    while abs(factor) > 1e-17:
        total += factor / (a + n)
        n += 1
        factor *= (n - b) / n * x
    return x**a * total * math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))


def beta_quantile(p: float, a: float, b: float) -> float:
    """The x in [0, 1] with `beta_probability` p, by Newton's method, with bisection if a step leaves the bracket."""
    scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    low, high, x = 0.0, 1.0, 0.5
    while low < x < high:
        error = beta_probability(x, a, b) - p
        low, high = (low, x) if error > 0 else (x, high)
        step = x - error / (scale * x ** (a - 1) * (1 - x) ** (b - 1))
        following = step if low < step < high else (low + high) / 2
        if abs(following - x) <= 1e-15:
            return following
        x = following
    return x


flow_schedule = sigmas_normal  # the name that scripts use


def schedule(name: str, steps: int, shift: float) -> Tensor:
    """The sigmas of `sigmas_NAME` without repeated ones: the number of steps is one less than their number."""
    return globals()[f"sigmas_{name}"](steps, shift).unique_consecutive()


def img2img_sigmas(sigmas: Tensor, denoise: float) -> Tensor:
    """The part of a schedule that an image-to-image run of strength `denoise` in [0, 1] executes."""
    return sigmas[int((len(sigmas) - 1) * (1 - denoise)) :]


def place_in(levels: Sequence[float], sigma: float) -> float:
    """Position of sigma in a decreasing schedule: i at levels[i], fractional between two levels, 0 above the first."""
    i = min(bisect.bisect_left(levels, -sigma, key=lambda level: -level), len(levels) - 1)
    if i == 0 or levels[i] == sigma:
        return i
    above, below = levels[i - 1], levels[i]
    return i - 1 + (above - sigma) / (above - below)


# ---- noise ---------------------------------------------------------------------------------------


def seeded_generator(seed: int, stream: str = "") -> torch.Generator:
    """A generator on the CPU, so that a seed gives the same noise on every device.

    stream: name of an independent series of the same seed; the start noise has none.
    """
    if stream:
        seed = int.from_bytes(hashlib.sha256(f"{stream}:{seed}".encode()).digest()[:7], "big")
    return torch.Generator("cpu").manual_seed(seed)


def seeded_noise(seed: int, shape: Sequence[int], stream: str = "") -> Tensor:
    """Standard normal noise, float32 on the CPU: the first draw of a `seeded_generator`."""
    return torch.randn(tuple(shape), generator=seeded_generator(seed, stream), dtype=torch.float32)


def start_noise(seeds: Sequence[int], shape: Sequence[int], stream: str = "") -> Tensor:
    """One draw (1, C, h, w) per seed, concatenated: (len(seeds), C, h, w)."""
    return torch.cat([seeded_noise(seed, (1, *shape[1:]), stream) for seed in seeds])


def step_noise(seeds: Sequence[int], like: Tensor) -> Noise:
    """The noise that samplers add in a step, shaped as `like` (len(seeds), C, h, w) and on its device. Each row is
    drawn from its own seed's generator, so that an image does not depend on its batch.
    """
    generators = [seeded_generator(seed, "step noise") for seed in seeds]

    def noise(sigma: float, following: float) -> Tensor:
        rows = [torch.randn((1, *like.shape[1:]), generator=g, dtype=torch.float32) for g in generators]
        return torch.cat(rows).to(like.device)

    return noise


@dataclass(frozen=True)
class Conditioning:
    """Encoded text of a batch: tokens (B, T, X), pooled (B, Y), and the kinds of the tokens, None if unknown."""

    context: Tensor
    pooled: Tensor
    kinds: TokenKinds | None = None

    def row(self, i: int) -> Conditioning:
        """Row i; a tensor with a single row is shared by all."""
        row = slice(i, i + 1) if self.context.shape[0] > 1 else slice(0, 1)
        return Conditioning(self.context[row], self.pooled[row], self.kinds and self.kinds.rows(row))


def stack_halves(first: Conditioning, second: Conditioning) -> Conditioning:
    """The text of both halves of guidance as one batch. Raises ValueError if their token counts differ."""
    if first.context.shape[1] != second.context.shape[1]:
        raise ValueError(
            f"prompt and negative prompt have {first.context.shape[1]} and {second.context.shape[1]} text tokens; "
            "encode both at the longer length"
        )
    context, pooled = torch.cat([first.context, second.context]), torch.cat([first.pooled, second.pooled])
    return Conditioning(context, pooled, stack_kinds([first.kinds, second.kinds]))


def stack_kinds(kinds: Sequence[TokenKinds | None]) -> TokenKinds | None:
    """The kinds of the tokens of several texts, as one batch; None if those of any text are unknown."""
    if any(one is None or one.words is None for one in kinds):
        return None
    words, weights = torch.cat([one.words for one in kinds]), None
    if any(one.weights is not None for one in kinds):
        ones = (torch.ones(one.words.shape) if one.weights is None else one.weights for one in kinds)
        weights = torch.cat(list(ones))
    return TokenKinds(kinds[0].clip, words, weights)


# ---- guidance: a class each -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One evaluation of the model: text, blocks that are skipped, and whether the ControlNet runs."""

    text: str = "cond"  # or uncond
    skip_layers: tuple[int, ...] = ()
    control: bool = True


COND, UNCOND = Pass(), Pass("uncond")


class Place(NamedTuple):
    """The place of a model call in a run. step: from 0, of `steps` that run; fractional between two levels of the
    schedule; planned: steps of the whole schedule, of which an image-to-image run executes the last ones.
    """

    step: float
    steps: int
    planned: int
    sigma: float


class Guidance(Protocol):
    """A guidance method. Several are applied in turn, each to the result of the one before."""

    def passes(self, at: Place) -> tuple[Pass, ...]:
        """The passes that this method needs besides the conditional one, which always runs."""

    def combine(self, at: Place, x: Tensor, denoised: Mapping[Pass, Tensor], guided: Tensor) -> Tensor:
        """Returns the guided image. denoised: x - sigma v by pass; guided: the result of the methods before, at first
        that of the conditional pass; all (B, C, h, w) float32.
        """


def guided_interval(start: float, end: float, steps: int) -> range:
    """The steps between two fractions of a run of N steps: int(start N) <= step < int(end N), as in diffusers'
    guiders.
    """
    return range(int(start * steps), int(end * steps))


class ClassifierFreeGuidance:
    """uncond + scale (cond - uncond), Ho and Salimans 2022, arXiv 2207.12598. Skips the unconditional pass if scale is
    1, and outside an interval of steps (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    """

    def __init__(self, scale: float, start: float = 0.0, end: float = 1.0):
        """start, end: the interval of steps, see `guided_interval`."""
        self.scale, self.start, self.end = scale, start, end

    def passes(self, at: Place) -> tuple[Pass, ...]:
        inside = guided_interval(self.start, self.end, at.steps)
        return (UNCOND,) if self.scale != 1 and inside.start <= at.step < inside.stop else ()

    def combine(self, at: Place, x: Tensor, denoised: Mapping[Pass, Tensor], guided: Tensor) -> Tensor:
        if not self.passes(at):
            return guided
        return denoised[UNCOND] + self.scale * (denoised[COND] - denoised[UNCOND])


class SkipLayers(Protocol):
    """Settings of skip-layer guidance: scale, blocks that it skips, and the steps in which it acts."""

    scale: float
    layers: Sequence[int]

    def acts(self, step: float, steps: int) -> bool:
        """Whether skip-layer guidance acts in `step` (from 0) of a schedule of `steps` steps."""


class SkipLayerGuidance:
    """Adds scale (cond - cond without some blocks), as the public reference does for SD3.5 Medium. None: off."""

    def __init__(self, config: SkipLayers | None):
        self.config = config
        self.without = Pass(skip_layers=tuple(config.layers), control=False) if config else COND

    def passes(self, at: Place) -> tuple[Pass, ...]:
        acts = self.config is not None and self.config.acts(at.step, at.planned)
        return (self.without,) if acts else ()

    def combine(self, at: Place, x: Tensor, denoised: Mapping[Pass, Tensor], guided: Tensor) -> Tensor:
        if not self.passes(at):
            return guided
        return guided + self.config.scale * (denoised[COND] - denoised[self.without])


class GuidanceRescale:
    """Rescales each image's guided velocity v towards the standard deviation of the conditional one:
    share std(cond) / std(v) v + (1 - share) v, Lin et al. 2023, arXiv 2305.08891, section 3.4. A share of 0 is off.
    """

    def __init__(self, share: float):
        self.share = share

    def passes(self, at: Place) -> tuple[Pass, ...]:
        return ()

    def combine(self, at: Place, x: Tensor, denoised: Mapping[Pass, Tensor], guided: Tensor) -> Tensor:
        if self.share == 0 or guided is denoised[COND]:
            return guided
        v_cond, v = x - denoised[COND], x - guided  # both velocities times sigma
        ratio = v_cond.flatten(1).std(1) / v.flatten(1).std(1)
        factor = self.share * ratio + 1 - self.share
        return x - factor.view(-1, *[1] * (x.ndim - 1)) * v


# ---- the denoiser that samplers call -------------------------------------------------------------


class StopSampling(Exception):
    """Raised if `on_step` returns False."""


class Denoiser:
    """A function (x, sigma) -> denoised image for one run of a sampler: the MMDiT with guidance and ControlNet."""

    def __init__(
        self,
        model: MMDiT,
        cond: Conditioning,
        neg_cond: Conditioning | None,
        sigmas: Tensor,
        guidance: Sequence[Guidance] = (),
        controlnet: ControlNet | None = None,
        control: Tensor | None = None,
        control_strength: float = 1.0,
        streams: Sequence[Stream | ContextHook | None] = (),
        cache: float = 0.0,
        on_step: OnStep | None = None,
        planned: int | None = None,
    ):
        """neg_cond: None if no guidance method needs it; sigmas: the schedule of the run, in which the step of a call
        is found from its sigma; control: latent of the control image in model space; streams: see `mmditx.Stream`, or
        functions (i, context) -> text tokens that enter block i; cache: threshold of `mmditx.Reuse`, 0 for no cache;
        on_step: see `OnStep`; planned: see `Place`, None for the number of steps that run.
        """
        self.model = model
        texts = {"cond": cond}
        if neg_cond is not None:
            texts |= {"uncond": neg_cond, "both": stack_halves(cond, neg_cond)}
        self.texts = {name: model.embed_text(text.pooled, text.context) for name, text in texts.items()}
        self.kinds = {name: text.kinds for name, text in texts.items()}
        self.sigmas, self.levels = sigmas, sigmas.tolist()
        self.guidance = guidance
        self.controlnet = controlnet
        self.control = control
        self.control_strength = control_strength
        self.streams = Streams(streams)
        self.steps_run = max(len(self.levels) - 1, 1)
        self.planned = planned or self.steps_run
        self.step: float = 0  # step of the current call
        self.cache = cache
        self.reuse: dict[tuple, Reuse] = {}  # step caches by kind of call
        self.on_step = on_step
        self._last: tuple[int, Tensor, float, Tensor] | None = None  # call at a level that is not reported yet
        self._reported = math.inf  # the last reported level

    def velocity(self, x: Tensor, sigma: float, text: str, control: bool, skip: Sequence[int]) -> Tensor:
        """The velocity (B, C, h, w) that the model predicts, float32. x: (B, C, h, w) float32, with one sigma for all
        rows; text: `cond`, `uncond`, or `both`: the rows of cond, then those of uncond.
        """
        x = x.to(self.model.x_embedder.proj.weight.dtype)
        t = torch.full((x.shape[0],), TIMESTEPS * sigma, dtype=torch.float32, device=x.device)
        controls = None
        if control and self.controlnet is not None and self.control is not None:
            latent = self.control.to(x)
            if latent.shape[0] > 1:
                latent = latent.repeat(x.shape[0] // latent.shape[0], 1, 1, 1)
            states = self.controlnet(self.model, x, t, self.texts[text].y, latent, self.control_strength)
            controls = spread(states, self.model.config.depth)
        first, embedded = "uncond" if text == "uncond" else "cond", self.texts[text]
        halves, others = text == "both", {"text": embedded, "skip_layers": skip, "kinds": self.kinds[text]}
        call = ModelCall.of_rows(self.step, self.steps_run, sigma, x.shape[0], first, halves, **others)
        stream = self.streams if self.streams.begin(call) else None
        run = run_blocks
        if self.cache:
            run = self.reuse.setdefault((text, control, tuple(skip)), Reuse(self.cache)).run
        return self.model.velocity(x, t, embedded, controls, skip, stream, run).float()

    def run_passes(self, x: Tensor, sigma: float, passes: Collection[Pass]) -> dict[Pass, Tensor]:
        """denoised = x - sigma v by pass. The conditional and the unconditional pass run as one batch. Raises
        ValueError if an unconditional pass has no text.
        """
        if "uncond" not in self.texts and any(one.text == "uncond" for one in passes):
            raise ValueError("guidance needs neg_cond, the text of the unconditional pass")
        denoised: dict[Pass, Tensor] = {}
        if UNCOND in passes:
            halves = self.velocity(torch.cat([x, x]), sigma, "both", True, ()).chunk(2)
            denoised = {one: x - sigma * v for one, v in zip((COND, UNCOND), halves, strict=True)}
        for one in passes:
            if one not in denoised:
                denoised[one] = x - sigma * self.velocity(x, sigma, one.text, one.control, one.skip_layers)
        return denoised

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The guided denoised image. x: (B, C, h, w) float32; sigma: a number, or (B,) with equal values."""
        sigma = sigma if isinstance(sigma, float) else float(sigma.reshape(-1)[0])
        self._report(sigma)
        self.step = place_in(self.levels, sigma)
        at = Place(self.step, self.steps_run, self.planned, sigma)
        passes = dict.fromkeys([COND, *(one for method in self.guidance for one in method.passes(at))])
        denoised = self.run_passes(x, sigma, passes)
        guided = denoised[COND]
        for method in self.guidance:
            guided = method.combine(at, x, denoised, guided)
        if self.on_step is not None and isinstance(self.step, int) and sigma < self._reported:
            self._last = self.step, x, sigma, guided
        return guided

    def _report(self, sigma: float) -> None:
        """Reports the last call at a level to `on_step` as soon as a call at a lower sigma follows: samplers may call
        several times at one level, and between levels. Raises StopSampling.
        """
        if self._last is not None and self._last[2] > sigma:
            state, self._last, self._reported = self._last, None, self._last[2]
            if self.on_step(*state) is False:
                raise StopSampling

    def finish(self) -> None:
        """Reports the last step after the sampler has returned; there is nothing left to stop."""
        with contextlib.suppress(StopSampling):
            self._report(0.0)


# ---- samplers: a function `sample_NAME` each ------------------------------------------------------


def _denoise(model: Callable[..., Tensor], extra_args: dict | None) -> Denoise:
    """Adapts a script's model, called with x, sigma (B,) and extra_args as in the public reference, to `Denoise`. A
    `Denoiser` takes sigma as a number, which avoids a device synchronisation.
    """
    if isinstance(model, Denoiser):
        return model
    return lambda x, sigma: model(x, x.new_full((x.shape[0],), sigma), **(extra_args or {}))


@torch.no_grad()
def sample_euler(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    *,
    extra_args: dict | None = None,
) -> Tensor:
    """Euler steps along the probability flow (Karras et al. 2022, arXiv 2206.00364, algorithm 2 without noise).

    x: (B, C, h, w) at sigmas[0]; sigmas: (n + 1,), decreasing; model(x, sigma (B,), **extra_args) -> denoised; noise
    is not used. Returns x at the last sigma.
    """
    denoise = _denoise(model, extra_args)
    for sigma, following in itertools.pairwise(sigmas.tolist()):
        denoised = denoise(x, sigma)
        x = x + (x - denoised) * ((following - sigma) / sigma)
    return x


@torch.no_grad()
def sample_dpmpp_2m(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    *,
    extra_args: dict | None = None,
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, arXiv 2211.01095, with lambda = -ln sigma; arguments and result as
    `sample_euler`.
    """
    denoise = _denoise(model, extra_args)
    levels = sigmas.double()
    lambdas = -levels.log()
    previous, h_previous = None, None
    for i in range(len(levels) - 1):
        sigma, following = levels[i].item(), levels[i + 1].item()
        denoised = denoise(x, sigma)
        h = (lambdas[i + 1] - lambdas[i]).item()
        target = denoised
        if previous is not None and following > 0:
            weight = h / (2 * h_previous)  # 1 / (2 r), r = previous h / h
            target = (1 + weight) * denoised - weight * previous
        x = (following / sigma) * x - torch.expm1(torch.tensor(-h, dtype=torch.float64)).item() * target
        if h:  # 0 if a script repeats a sigma: then x did not change
            previous, h_previous = denoised, h
    return x


@torch.no_grad()
def sample_heun(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """Heun's second-order steps (Karras et al. 2022, arXiv 2206.00364, algorithm 2 without noise): two calls per
    step, one in the last. x: (B, C, h, w) at sigmas[0]; sigmas: (n + 1,), decreasing. Returns x at the last sigma.
    """
    for sigma, following in itertools.pairwise(sigmas.tolist()):
        slope = (x - denoise(x, sigma)) / sigma
        end = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (end - denoise(end, following)) / following) / 2
            end = x + (following - sigma) * slope
        x = end
    return x


@torch.no_grad()
def sample_euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 1.0) -> Tensor:
    """Euler steps to below the next level, then fresh noise back up to it, in the form for rectified flow, which also
    shrinks the signal (the RF rule of ComfyUI and diffusers). eta: how far below, 0 for plain Euler; x, sigmas and
    result as `sample_heun`.
    """
    for sigma, following in itertools.pairwise(sigmas.tolist()):
        denoised = denoise(x, sigma)
        if following == 0:
            return denoised
        down = following * (1 + (following / sigma - 1) * eta)
        x = (down / sigma) * x + (1 - down / sigma) * denoised
        shrink = (1 - following) / (1 - down) if down < 1 else 1.0  # sigma repeated at 1
        x = shrink * x + math.sqrt(max(following**2 - (down * shrink) ** 2, 0.0)) * noise(sigma, following)
    return x


def find_sampler(name: str) -> Callable[..., Tensor]:
    """The function `sample_NAME`."""
    return globals()[f"sample_{name}"]


def guided_sampling(denoiser: Denoiser, sampler: str, latent: Tensor, seeds: Sequence[int]) -> Tensor:
    """Runs a sampler over the denoiser's schedule, from latent (B, C, h, w) in model space (zeros for text to image)
    and the noise of the seeds.

    Starts at x = sigma_0 noise + (1 - sigma_0) latent. Returns the latent in model space, float32. Raises StopSampling
    if `on_step` returns False.
    """
    latent = latent.float()
    first = denoiser.levels[0]
    noise = start_noise(seeds, latent.shape).to(latent.device)
    x = first * noise + (1 - first) * latent
    x = find_sampler(sampler)(denoiser, x, denoiser.sigmas, step_noise(seeds, latent))
    denoiser.finish()
    return x
