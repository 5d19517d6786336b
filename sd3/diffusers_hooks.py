"""Residual text streaming on a diffusers pipeline, by hooks on its transformer's blocks.

    from sd3.residual import ResidualConfig
    from sd3.diffusers_hooks import apply_residual

    with apply_residual(pipe, ResidualConfig(1, (2, 3, 4), "each:0.1", mode="anchored")):
        image = pipe("a red circle left of a blue square").images[0]

Works on any transformer whose `transformer_blocks` take `encoder_hidden_states`: SD3 and SD3.5, FLUX, Qwen-Image. The
hooks sit in diffusers' own registry, beside its caching and offloading; on blocks that are compiled already they wrap
the compiled code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from torch import Tensor, nn

from mmditx import ModelCall, ResidualStream
from sd3.mistakes import Mistake
from sd3.readers import read_path
from sd3.residual import ResidualConfig, residual_stream
from sd3.rotations import Rotations, read_rotations

NAME = "residual_text_streaming"
TEXT = "encoder_hidden_states"
# Transformer class -> its `timestep` / sigma. For any other class, a timestep above 1 counts thousandths.
TIMESTEPS = {"SD3Transformer2DModel": 1000.0, "FluxTransformer2DModel": 1.0, "QwenImageTransformer2DModel": 1.0}


def apply_residual(
    pipe: Any, config: ResidualConfig | None, rotations: Rotations | str | Path | None = None
) -> ResidualHandle:
    """Turns residual text streaming on for a pipeline (or a bare transformer) until the handle's `remove()`.

    Layer numbers count `transformer_blocks`. config: None means off, as from `build_residual_config`. rotations: for
    the mode aligned, where `config` names no file. A scheduler that replaces the pipeline's later is followed.
    Without a pipeline there is no scheduler, so start and end cannot be used, and the branch only where the caller sets
    diffusers' `cache_context`. Raises Mistake where the transformer is not of this kind, has other layers or another
    width, or has residual text streaming on already.
    """
    transformer = getattr(pipe, "transformer", None) if not isinstance(pipe, nn.Module) else pipe
    blocks = getattr(transformer, "transformer_blocks", None)
    bare = _unwrapped(transformer)
    name = type(bare if transformer is not None else pipe).__name__
    if not blocks or TEXT not in _parameters(_unwrapped(blocks[0])):
        raise Mistake("", name, f"has no transformer_blocks that take {TEXT}")
    if config is not None and not isinstance(config, ResidualConfig):
        raise Mistake("config", config, "must be a ResidualConfig, as build_residual_config makes one")
    if config is None or not config.active:
        return ResidualHandle([])
    config.check(len(blocks))
    rotations = _rotations_for(config, rotations, getattr(bare, "inner_dim", None))
    if getattr(pipe, "scheduler", None) is None and (config.start, config.end) != (0.0, 1.0):
        raise Mistake("", "", "`start`, `end`: need the pipeline, whose scheduler knows the step")
    shared = _Shared(config, residual_stream(config, rotations), pipe, bare)
    removals: list[Callable[[], None]] = []
    if NAME in HookRegistry.check_if_exists_or_initialize(transformer).hooks:
        raise Mistake("", name, "has residual text streaming on already; remove() that first")
    removals.append(_register(transformer, _CallHook(shared)))
    for i, block in enumerate(blocks):
        if i >= config.origin:  # those before see nothing; a block that a call skips is made up for at the next
            removals.append(_attach(block, _BlockHook(shared, i, _parameters(_unwrapped(block)))))
    return ResidualHandle(removals)


def _rotations_for(
    config: ResidualConfig, rotations: Rotations | str | Path | None, width: int | None
) -> Rotations | None:
    """The rotations that a configuration needs, from a file or as they are, checked; None where there are none."""
    if not config.aligned:
        return None
    if isinstance(rotations, Rotations):
        rotations.check(config, width or rotations.matrices.shape[-1])
        return rotations
    path = config.rotations if rotations is None else read_path("rotations", rotations)
    return None if path is None else read_rotations(path, config, width)


class ResidualHandle:
    """What `apply_residual` returns: `remove()` takes every hook off; as a context manager, at its end."""

    def __init__(self, removals: list[Callable[[], None]]):
        self._removals = removals

    def remove(self) -> None:
        """Restores the transformer; a second call does nothing."""
        while self._removals:
            self._removals.pop()()

    def __enter__(self) -> ResidualHandle:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


class _CallName(StateManager):
    """The name that a pipeline gives a call by `cache_context`: cond, uncond, cond_uncond."""

    def __init__(self) -> None:
        self.name = ""

    def set_context(self, context: Any) -> None:
        self.name = "" if context is None else str(getattr(context, "name", context))

    def reset(self, *_: Any, **__: Any) -> None:
        self.name = ""


class _Shared:
    """What the hooks of one pipeline share: the stream, and how far the running call has come."""

    def __init__(self, config: ResidualConfig, stream: ResidualStream, pipe: Any, transformer: Any):
        self.config = config
        self.stream = stream
        self.pipe = pipe
        self.scale = TIMESTEPS.get(type(transformer).__name__)
        self.arguments = _parameters(transformer)
        self.call = _CallName()
        self.timed = config.schedule != "constant" or bool(stream.rotations is not None and stream.rotations.edges)
        self.active = False  # in the running call
        self.next = 0

    @property
    def scheduler(self) -> Any:
        """The pipeline's current one: `pipe.scheduler = Other.from_config(...)` is usual."""
        return getattr(self.pipe, "scheduler", None)

    @torch.compiler.disable
    def begin(self, args: tuple, kwargs: dict) -> None:
        """Reads a call off the transformer's arguments."""
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        step, steps = self._step()
        sigma = self._sigma(given["timestep"]) if self.timed else 1.0
        first, halves = self._branches(given) if self.config.branch != "both" else ("cond", False)
        rows = given["hidden_states"].shape[0]
        self.active = self.stream.begin(ModelCall.of_rows(step, steps, sigma, rows, first, halves))
        self.next = self.config.origin

    @torch.compiler.disable
    def mix(self, i: int, context: Tensor) -> Tensor:
        """The text tokens that enter block i, mixed for it and for the blocks that were skipped before it."""
        if self.active:
            for layer in range(self.next, i + 1):
                self.stream.keep(layer, context)
                context = self.stream.mix(layer, context)
            self.next = i + 1
        return context

    def _step(self) -> tuple[int, int]:
        """The number of the step, of those that run, and how many run."""
        if self.scheduler is None:
            return 0, 1
        first = getattr(self.scheduler, "begin_index", None) or 0
        step = getattr(self.scheduler, "step_index", None)
        timesteps = getattr(self.scheduler, "timesteps", None)
        steps = 1 if timesteps is None else max(len(timesteps) - first, 1)
        return (0 if step is None else step - first), steps

    def _sigma(self, timestep: Tensor | float) -> float:
        value = float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)
        return value / (self.scale or (1000.0 if value > 1 else 1.0))

    def _branches(self, given: dict) -> tuple[str, bool]:
        """The branch of the first rows, and whether the other branch is the second half of the rows."""
        name = self.call.name
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        if given.get("skip_layers") is not None:
            return "cond", False  # skip-layer guidance is conditional only
        if "uncond" in name and name != "cond_uncond":
            return "uncond", False
        if "cond" in name and name != "cond_uncond":
            return "cond", False
        if guided is None and not name:
            why = "cannot tell the halves of guidance apart: no pipeline that says whether it is guided, and no "
            raise Mistake("branch", self.config.branch, f"{why}cache_context around the call")
        return ("uncond", True) if guided or name else ("cond", False)  # diffusers puts the unconditional half first


class _CallHook(ModelHook):
    """On the transformer: a call begins."""

    _is_stateful = True  # so that diffusers passes it the name of the call

    def __init__(self, shared: _Shared):
        super().__init__()
        self.shared = shared
        self.call = shared.call

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        self.shared.begin(args, kwargs)
        return args, kwargs

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.call.reset()
        return module


class _BlockHook(ModelHook):
    """On a block: its text tokens pass through the stream first."""

    def __init__(self, shared: _Shared, i: int, arguments: list[str]):
        super().__init__()
        self.shared = shared
        self.i = i
        self.place = arguments.index(TEXT)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if TEXT in kwargs:
            if kwargs[TEXT] is not None:
                kwargs = kwargs | {TEXT: self.shared.mix(self.i, kwargs[TEXT])}
        elif self.place < len(args) and args[self.place] is not None:
            args = (*args[: self.place], self.shared.mix(self.i, args[self.place]), *args[self.place + 1 :])
        return args, kwargs


def _unwrapped(module: Any) -> Any:
    """A module without torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def _parameters(module: nn.Module) -> list[str]:
    """The parameters of the class's forward, in order, without self."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _attach(block: nn.Module, hook: ModelHook) -> Callable[[], None]:
    """Puts a hook on a block; returns what takes it off."""
    compiled = getattr(block, "_compiled_call_impl", None)
    if compiled is None:
        return _register(block, hook)

    def call(*args: Any, **kwargs: Any) -> Any:  # outside the compiled code, which may be one graph
        args, kwargs = hook.pre_forward(block, *args, **kwargs)
        return compiled(*args, **kwargs)

    block._compiled_call_impl = call

    def remove() -> None:
        block._compiled_call_impl = compiled

    return remove


def _register(module: nn.Module, hook: ModelHook) -> Callable[[], None]:
    """Puts a hook into a module's registry; returns what takes it out, and the registry too where it is then empty."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    own_forward = module.__dict__.get("forward")
    registry.register_hook(hook, NAME)
    _forget_children(registry)

    def remove() -> None:
        index = registry._hook_order.index(NAME)
        # A later hook that replaces the forward keeps the one below it apart; the registry would drop its own.
        later = registry._fn_refs[index + 1] if index + 1 < len(registry._fn_refs) else None
        replaced = later.forward if later is not None and later.original_forward is not None else None
        registry.remove_hook(NAME, recurse=False)
        if replaced is not None:
            later.original_forward, later.forward = later.forward, replaced
        _forget_children(registry)
        if not registry.hooks:
            del module._diffusers_hook
            if own_forward is None:
                module.__dict__.pop("forward", None)

    return remove


def _forget_children(registry: HookRegistry) -> None:
    forget = getattr(registry, "invalidate_child_registries_cache", None)
    if forget is not None:
        forget()
