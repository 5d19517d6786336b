"""The network: the MMDiT and an optional ControlNet."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sd3_impls
from dit_embedder import ControlNet, ControlNetConfig
from mmditx import ContextHook, MMDiT, MMDiTConfig, ResidualStream, Stream
from sd3.device import choose_dtype
from sd3.files import WeightFile
from sd3.layers import can_pack, replace_linears
from sd3.loading import Loader
from sd3.methods import make_guidance
from sd3.mistakes import Mistake
from sd3.offload import Offload
from sd3.residual import ResidualConfig, residual_stream
from sd3.rotations import Rotations, read_rotations
from sd3.settings import Settings, Setup
from sd3.text import Text
from sd3.unchanged import stamp
from sd3.weights import (
    ModelTensors,
    check_part,
    differently_patched,
    drop,
    find_controlnet,
    find_mmdit,
    on_meta,
    read_control_kind,
)
from sd3_impls import Conditioning


class Network:
    """An MMDiT and its ControlNet. The constructor checks headers; weights are loaded on first use and stay loaded."""

    def __init__(self, setup: Setup, file: WeightFile, device: torch.device, loader: Loader):
        """file: contains the MMDiT. Raises Mistake if it is not a model of this kind."""
        self.setup, self.device, self.loader = setup, device, loader
        self.part = find_mmdit(file)
        self.config: MMDiTConfig = self.part.config(MMDiTConfig.from_shapes, "an SD3 or SD3.5 model")
        model = check_part(self.part, lambda: MMDiT(self.config))
        self.parameters = sum(p.numel() for p in model.parameters())
        self.dtype = choose_dtype(setup.dtype, device, self.part.dtype_name())
        path = setup.controlnet_ckpt
        self.control = ControlPart(path, self.config, loader) if path else None
        self._mmdit: MMDiT | None = None
        self._controlnet: ControlNet | None = None
        self._rotations: tuple[tuple, Rotations] | None = None  # the last ones used, with their key

    @property
    def mmdit(self) -> MMDiT:
        """The MMDiT, with its weights."""
        if self._mmdit is None:
            self._mmdit = self._load_mmdit()
        return self._mmdit

    @property
    def controlnet(self) -> ControlNet | None:
        """The ControlNet, with its weights."""
        if self._controlnet is None and self.control is not None:
            self._controlnet = self.loader.load(
                self.control.part, on_meta(self.control.make), "ControlNet", self.device, self.dtype
            )
        return self._controlnet

    @property
    def large_controlnet(self) -> bool:
        """Whether there is a ControlNet of the 8B kind, whose usual settings then apply."""
        return self.control is not None and self.control.chained

    @property
    def loaded(self) -> bool:
        """Whether the MMDiT's weights are in memory."""
        return self._mmdit is not None

    # -- checks --

    def check_layers(self, s: Settings) -> None:
        """Raises Mistake if skip-layer guidance names a block that this model does not have."""
        if s.skip_layer and max(s.skip_layer.layers) >= self.config.depth:
            why = f"skips layers {s.skip_layer.layers}, but this model has {self.config.depth}"
            raise Mistake("skip_layer_cfg", "", why)

    def residual_stream(self, config: ResidualConfig) -> ResidualStream | None:
        """The stream of a configuration, checked against this model; None if it is off. Raises Mistake."""
        config.check(self.config.depth)
        return residual_stream(config, self._rotations_for(config))

    def _rotations_for(self, config: ResidualConfig) -> Rotations | None:
        """The rotations that a configuration needs, read and checked once; None if it needs none."""
        if not config.aligned:
            return None
        config.check_rotations()
        key = (config.rotations, config.origin, config.targets, stamp(config.rotations))
        if self._rotations is None or self._rotations[0] != key:
            self._rotations = (key, read_rotations(config.rotations, config, self.config.width))
        return self._rotations[1]

    @torch.no_grad()
    def sample(
        self,
        s: Settings,
        start: Tensor,
        seeds: Sequence[int],
        cond: Conditioning | Text,
        uncond: Conditioning | Text | None = None,
        control: Tensor | None = None,
        denoise: float = 1.0,
        streams: Sequence[Stream | ContextHook] = (),
        on_step: sd3_impls.OnStep | None = None,
    ) -> Tensor:
        """Latents (B, 16, h, w) in VAE space, float32, sampled as settings say; their prompt, seed, size and images
        are ignored. With a step cache, rows run one at a time.

        start: (B, 16, h, w) in model space, zeros for text to image; seeds: one per row; cond and uncond: text tokens
        (1 or B, T, X) and pooled text (1 or B, Y), uncond None where no pass needs it; control: latents of the control
        image in model space; denoise: the part of the schedule that runs; streams: see the text tokens entering every
        block, after residual streaming. Raises StopSampling where on_step returns False.
        """
        if s.cache and len(seeds) > 1:
            rows = []
            for i, seed in enumerate(seeds):
                own = (row_of(part, i) for part in (cond, uncond, control))
                rows.append(self.sample(s, row_of(start, i), [seed], *own, denoise, streams, on_step))
            return torch.cat(rows)
        self.check_layers(s)
        if s.residual.active and s.residual.tokens != "all" and getattr(cond, "kinds", None) is None:
            why = "needs a prompt, not its encoded tokens: what they are is not known"
            raise Mistake("residual_tokens", s.residual.tokens, why)
        stream = self.residual_stream(s.residual)
        schedule = sd3_impls.schedule(s.scheduler, s.steps, s.shift)
        denoiser = sd3_impls.Denoiser(
            self.mmdit,
            self._conditioning(cond, len(seeds)),
            None if uncond is None else self._conditioning(uncond, len(seeds)),
            sd3_impls.img2img_sigmas(schedule, denoise),
            make_guidance(s),
            self.controlnet if control is not None else None,
            control,
            s.controlnet_strength,
            streams=[stream, *streams],
            cache=s.cache,
            on_step=on_step,
            planned=len(schedule) - 1,
        )
        start = start.to(self.device)
        return sd3_impls.latent_out(sd3_impls.guided_sampling(denoiser, s.sampler, start, seeds))

    def _conditioning(self, text: Conditioning | Text, rows: int) -> Conditioning:
        text = text if isinstance(text, Conditioning) else Conditioning(*text)
        context, pooled = (t.to(self.device, self.dtype) for t in (text.context, text.pooled))
        kinds = text.kinds
        if kinds is not None and context.shape[0] < rows:
            kinds = sd3_impls.stack_kinds([kinds] * rows)
        return Conditioning(context.expand(rows, -1, -1), pooled.expand(rows, -1), kinds)

    # -- loading --

    def repatch(self, part: ModelTensors) -> None:
        """Replaces the MMDiT's tensors by those with other patches. Where weights are in memory, those that the old or
        the new patches change are read from the file again, and no others.
        """
        names = differently_patched(self.part, part) & on_meta(lambda: MMDiT(self.config)).state_dict().keys()
        before, self.part = self.part, part
        if self._mmdit is not None and names:
            try:
                drop(self._mmdit, names)
                self._fill(self._mmdit, names)
            except BaseException:
                self.part, self._mmdit = before, None  # half of it is filled: all is read again when it is needed
                raise

    def _load_mmdit(self) -> MMDiT:
        model = on_meta(lambda: MMDiT(self.config))
        if self.setup.weights != "full":
            replace_linears(model.joint_blocks, self.setup.weights)
        elif not self.setup.offload and can_pack(self.device, self.dtype):
            replace_linears(model.joint_blocks, "packed")
        self._fill(model)
        if self.setup.compile:
            model.compile_blocks()
        return model

    def _fill(self, model: MMDiT, names: Collection[str] | None = None) -> None:
        """Gives the MMDiT its weights, or those of some names."""
        device = torch.device("cpu") if self.setup.offload else self.device
        self.loader.load(self.part, model, "MMDiT", device, self.dtype, names)
        if self.setup.offload:
            model.offload = Offload(model.joint_blocks, self.device)
            for module in model.children():
                if module is not model.joint_blocks:
                    module.to(self.device)
            model.pos_embed = nn.Parameter(model.pos_embed.to(self.device), requires_grad=False)


def row_of(part: Any, i: int) -> Any:
    """Row i of a tensor, or of each tensor of a tuple; a single row is used for every i."""
    if isinstance(part, Conditioning):
        return part.row(i)
    if isinstance(part, tuple):
        return tuple(row_of(one, i) for one in part)
    return part if part is None or part.shape[0] == 1 else part[i : i + 1]


class ControlPart:
    """The tensors of a ControlNet, checked against its MMDiT. chained: the 8B kind."""

    def __init__(self, path: str, base: MMDiTConfig, loader: Loader):
        self.part: ModelTensors = find_controlnet(loader.open("controlnet_ckpt", path))
        self.config: ControlNetConfig = self.part.config(ControlNetConfig.from_shapes, "an SD3 ControlNet")
        try:
            self.config.check_base(base)
        except ValueError as error:
            raise Mistake("controlnet_ckpt", path, str(error)) from None
        self.chained = self.config.chained(base)
        check_part(self.part, self.make, some_may_be_empty=True)
        self.kind = read_control_kind(self.part)

    def make(self) -> ControlNet:
        """The module, without its weights."""
        return ControlNet(self.config, self.chained)
