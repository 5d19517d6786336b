"""Residual text streaming on a diffusers pipeline, by hooks on its transformer's blocks.

    from sd3.residual import ResidualConfig
    from sd3.diffusers_hooks import apply_residual

    with apply_residual(pipe, ResidualConfig(1, (2, 3, 4), "each:0.1", mode="anchored")):
        image = pipe("a red circle left of a blue square").images[0]

Works on any transformer whose `transformer_blocks` take `encoder_hidden_states`: SD3 and SD3.5, FLUX, Qwen-Image. The
hooks are in diffusers' own registry, so its caching and offloading still work; on blocks that are already compiled they
wrap the compiled code.
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

from mmditx import ModelCall, ResidualStream, TokenKinds
from sd3.mistakes import Mistake
from sd3.readers import read_path
from sd3.residual import ResidualConfig, residual_stream
from sd3.rotations import Rotations, read_rotations
from sd3.spans import STREAM
from sd3_impls import stack_kinds

NAME = "residual_text_streaming"
TEXT = "encoder_hidden_states"
# Transformer class -> its `timestep` / sigma. For any other class, a timestep above 1 counts thousandths.
TIMESTEPS = {"SD3Transformer2DModel": 1000.0, "FluxTransformer2DModel": 1.0, "QwenImageTransformer2DModel": 1.0}


def apply_residual(
    pipe: Any,
    config: ResidualConfig | None,
    rotations: Rotations | str | Path | None = None,
    kinds: TokenKinds | None = None,
) -> ResidualHandle:
    """Turns residual text streaming on for a pipeline (or a bare transformer) until the handle's `remove()`.

    Layer numbers count `transformer_blocks`. config: None means off, as from `build_residual_config`. rotations: for
    the mode aligned, where `config` names no file. The pipeline's scheduler may be replaced later.
    A bare transformer has no scheduler, so start and end cannot be used, and branch only if the caller sets diffusers'
    `cache_context`. kinds: what the text tokens are, see `token_kinds`; `config.tokens` other than all needs it.

    Raises Mistake if the transformer has no such blocks, if layers or rotations do not fit it, or if residual text
    streaming is already on.
    """
    transformer = getattr(pipe, "transformer", None) if not isinstance(pipe, nn.Module) else pipe
    blocks = getattr(transformer, "transformer_blocks", None)
    bare = _unwrapped(transformer)
    name = type(bare if transformer is not None else pipe).__name__
    if not blocks or TEXT not in _parameters(_unwrapped(blocks[0])):
        raise Mistake("", name, f"has no transformer_blocks that take {TEXT}")
    if config is not None and not isinstance(config, ResidualConfig):
        raise Mistake("config", config, "must be a ResidualConfig; build_residual_config makes one")
    if config is None or not config.active:
        return ResidualHandle([])
    config.check(len(blocks))
    rotations = _rotations_for(config, rotations, getattr(bare, "inner_dim", None))
    if getattr(pipe, "scheduler", None) is None and (config.start, config.end) != (0.0, 1.0):
        raise Mistake("", "", "`start` and `end` need a pipeline, whose scheduler knows the step")
    if kinds is None and config.tokens != "all":
        raise Mistake("tokens", config.tokens, "needs `kinds`: token_kinds(pipe, prompt, negative_prompt) tells them")
    shared = _Shared(config, residual_stream(config, rotations), pipe, bare, kinds)
    removals: list[Callable[[], None]] = []
    if NAME in HookRegistry.check_if_exists_or_initialize(transformer).hooks:
        raise Mistake("", name, "already has residual text streaming; call remove() first")
    removals.append(_register(transformer, _CallHook(shared)))
    for i, block in enumerate(blocks):
        if i >= config.origin:  # blocks before the origin need no hook; `mix` catches up on skipped blocks
            removals.append(_attach(block, _BlockHook(shared, i, _parameters(_unwrapped(block)))))
    return ResidualHandle(removals)


def _rotations_for(
    config: ResidualConfig, rotations: Rotations | str | Path | None, width: int | None
) -> Rotations | None:
    """The rotations that a configuration needs, read and checked; None if the mode needs none."""
    if not config.aligned:
        return None
    if isinstance(rotations, Rotations):
        rotations.check(config, width or rotations.matrices.shape[-1])
        return rotations
    path = config.rotations if rotations is None else read_path("rotations", rotations)
    return None if path is None else read_rotations(path, config, width)


def token_kinds(pipe: Any, prompt: str, negative_prompt: str = "", max_sequence_length: int = 256) -> TokenKinds:
    """What the text tokens of a StableDiffusion3Pipeline's call are, for `apply_residual`: a row for the negative
    prompt and a row for the prompt.

    max_sequence_length: as in the pipeline's call. Start and end tokens count as words; without T5 its zeros are
    padding. The pipeline reads brackets and `{stream=W}` as text, so these are refused; raises Mistake.
    """
    for field, text in (("negative_prompt", negative_prompt), ("prompt", prompt)):
        if not isinstance(text, str):
            raise Mistake(field, text, "must be one text; make `kinds` for each call of the pipeline")
        if STREAM in text:
            raise Mistake(field, text, f"diffusers reads {STREAM}W}} as text; set the weights of `kinds` instead")
    clip = pipe.tokenizer.model_max_length
    rows = []
    for text in (negative_prompt, prompt):
        words = len(pipe.tokenizer(text, truncation=True, max_length=clip).input_ids)
        pieces = 0
        if getattr(pipe, "text_encoder_3", None) is not None:
            pieces = len(pipe.tokenizer_3(text, truncation=True, max_length=max_sequence_length).input_ids)
        rows.append(torch.cat([torch.arange(clip) < words, torch.arange(max_sequence_length) < pieces]))
    return TokenKinds(clip, torch.stack(rows))


class ResidualHandle:
    """Removes the hooks of `apply_residual`: by `remove()`, or at the end of a `with` block."""

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
    """The name of the current call, which pipelines set by `cache_context`: cond, uncond or cond_uncond."""

    def __init__(self) -> None:
        self.name = ""

    def set_context(self, context: Any) -> None:
        self.name = "" if context is None else str(getattr(context, "name", context))

    def reset(self, *_: Any, **__: Any) -> None:
        self.name = ""


class _Shared:
    """State shared by the hooks of a pipeline: the stream, and the next block of the current call."""

    def __init__(
        self, config: ResidualConfig, stream: ResidualStream, pipe: Any, transformer: Any, kinds: TokenKinds | None
    ):
        self.config, self.kinds = config, kinds
        self.stacked: dict[tuple, TokenKinds | None] = {}  # by rows and branches of a call
        self.stream = stream
        self.pipe = pipe
        self.scale = TIMESTEPS.get(type(transformer).__name__)
        self.arguments = _parameters(transformer)
        self.call = _CallName()
        self.timed = config.schedule != "constant" or bool(stream.rotations is not None and stream.rotations.edges)
        self.active = False  # in the current call
        self.next = 0

    @property
    def scheduler(self) -> Any:
        """The pipeline's current scheduler; users often replace it: `pipe.scheduler = Other.from_config(...)`."""
        return getattr(self.pipe, "scheduler", None)

    @torch.compiler.disable
    def begin(self, args: tuple, kwargs: dict) -> None:
        """Begins a call of the transformer with these arguments."""
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        step, steps = self._step()
        sigma = self._sigma(given["timestep"]) if self.timed else 1.0
        first, halves = self._branches(given) if self.config.branch != "both" else ("cond", False)
        rows = given["hidden_states"].shape[0]
        call = ModelCall.of_rows(step, steps, sigma, rows, first, halves, kinds=self._kinds(rows, given))
        self.active = self.stream.begin(call)
        self.next = self.config.origin

    @torch.compiler.disable
    def mix(self, i: int, context: Tensor) -> Tensor:
        """The text tokens that enter block i, after the mixing due there and at blocks skipped since the last one."""
        if self.active:
            for layer in range(self.next, i + 1):
                self.stream.keep(layer, context)
                context = self.stream.mix(layer, context)
            self.next = i + 1
        return context

    def _kinds(self, rows: int, given: dict) -> TokenKinds | None:
        """The kinds of the tokens of a call's rows: those of the negative prompt, then the prompt's, each for
        half of the rows; for a call with one half of guidance, that half's.
        """
        kinds = self.kinds
        if kinds is None or kinds.words is None or kinds.words.shape[0] == 1:
            return kinds
        first, halves = self._branches(given)
        key = rows, first, halves
        if key not in self.stacked:  # the same object in every call, by which the stream knows it
            places = [i for i in (0, 1) for _ in range(rows // 2)] if halves else [int(first != "uncond")] * rows
            self.stacked[key] = stack_kinds([kinds.rows(slice(i, i + 1)) for i in places])
        return self.stacked[key]

    def _step(self) -> tuple[int, int]:
        """The index of the current step among those that run, and their number."""
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
        """The branch of the first rows, and whether the second half of the batch is the other branch."""
        name = self.call.name
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        if given.get("skip_layers") is not None:
            return "cond", False  # the pass of skip-layer guidance is conditional
        if "uncond" in name and name != "cond_uncond":
            return "uncond", False
        if "cond" in name and name != "cond_uncond":
            return "cond", False
        if guided is None and not name:
            why = "cannot tell conditional from unconditional rows: there is no pipeline to ask, and no "
            raise Mistake("branch", self.config.branch, f"{why}cache_context around the call")
        return ("uncond", True) if guided or name else ("cond", False)  # diffusers puts the unconditional half first


class _CallHook(ModelHook):
    """Hook on the transformer: begins a call."""

    _is_stateful = True  # then diffusers tells it the name of the call

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
    """Hook on a block: passes its text tokens through the stream."""

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
    """Adds a hook to a block; returns the function that removes it."""
    compiled = getattr(block, "_compiled_call_impl", None)
    if compiled is None:
        return _register(block, hook)

    def call(
        *args: Any, **kwargs: Any
    ) -> Any:  # outside the compiled code: it may have been compiled as a single graph
        args, kwargs = hook.pre_forward(block, *args, **kwargs)
        return compiled(*args, **kwargs)

    block._compiled_call_impl = call

    def remove() -> None:
        block._compiled_call_impl = compiled

    return remove


def _register(module: nn.Module, hook: ModelHook) -> Callable[[], None]:
    """Adds a hook to a module's registry; returns a function that removes it, and the registry once it is empty."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    own_forward = module.__dict__.get("forward")
    registry.register_hook(hook, NAME)
    _forget_children(registry)

    def remove() -> None:
        index = registry._hook_order.index(NAME)
        # A later hook that replaces forward stores the one below it elsewhere; the registry would lose that one.
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
