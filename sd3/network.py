"""The network: the MMDiT and, where one is given, a ControlNet."""

from __future__ import annotations

import torch
from torch import nn

from dit_embedder import ControlNet, ControlNetConfig
from mmditx import MMDiT, MMDiTConfig
from sd3.device import choose_dtype
from sd3.files import WeightFile
from sd3.layers import can_pack, replace_linears
from sd3.loading import Loader
from sd3.mistakes import Mistake
from sd3.offload import Offload
from sd3.settings import Setup
from sd3.weights import ModelTensors, check_part, find_controlnet, find_mmdit, on_meta, read_control_kind


class Network:
    """An MMDiT and its ControlNet: headers are checked when it is made, weights are loaded on first use and stay."""

    def __init__(self, setup: Setup, file: WeightFile, device: torch.device, loader: Loader):
        """file: with the MMDiT. Raises Mistake for a file that is no model of this kind."""
        self.setup, self.device, self.loader = setup, device, loader
        self.part = find_mmdit(file)
        self.config: MMDiTConfig = self.part.config(MMDiTConfig.from_shapes, "an SD3 or SD3.5 model")
        check_part(self.part, lambda: MMDiT(self.config))
        self.dtype = choose_dtype(setup.dtype, device, self.part.dtype_name())
        path = setup.controlnet_ckpt
        self.control = ControlPart(path, self.config, loader) if path else None
        self._mmdit: MMDiT | None = None
        self._controlnet: ControlNet | None = None

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
        """Whether a ControlNet of the 8B kind is given: its usual settings then hold."""
        return self.control is not None and self.control.chained

    @property
    def loaded(self) -> bool:
        """Whether the MMDiT's weights are in memory."""
        return self._mmdit is not None

    def _load_mmdit(self) -> MMDiT:
        model = on_meta(lambda: MMDiT(self.config))
        if self.setup.weights != "full":
            replace_linears(model.joint_blocks, self.setup.weights)
        elif not self.setup.offload:
            model.join_modulations(self.device, self.dtype)
            if can_pack(self.device, self.dtype):
                replace_linears(model.joint_blocks, "packed")
        if self.setup.offload:
            self.loader.load(self.part, model, "MMDiT", torch.device("cpu"), self.dtype)
            model.offload = Offload(model.joint_blocks, self.device)
            for module in model.children():
                if module is not model.joint_blocks:
                    module.to(self.device)
            model.pos_embed = nn.Parameter(model.pos_embed.to(self.device), requires_grad=False)
        else:
            self.loader.load(self.part, model, "MMDiT", self.device, self.dtype)
        if self.setup.compile:
            model.compile_blocks()
        return model


class ControlPart:
    """A ControlNet's part of a file, checked against the MMDiT that it is for. chained: the 8B kind."""

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
