"""Prompts to text tokens: CLIP-L, CLIP-G and T5, streamed from their files layer by layer."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from other_impls import CLIP, T5, CLIPConfig, T5Config, Tokens, join_text
from sd3.device import device_record, encoder_dtype
from sd3.embed_cache import EmbedCache, describe_files
from sd3.files import ENCODERS, WeightFile
from sd3.find import TOKENIZER_FILES, Fit, find_encoders, find_tokenizer
from sd3.memory import explained
from sd3.mistakes import Mistake, Where, verbatim
from sd3.prompt_tokens import EMPTY, Key, PromptTokens
from sd3.prompts import shortened
from sd3.settings import Setup
from sd3.telling import SILENT, Reporter, Stages
from sd3.tokenizers import open_clip_tokenizer, open_t5_tokenizer
from sd3.unchanged import Unchanged
from sd3.versions import versions
from sd3.weights import ModelTensors, check_part, differently_patched, drop

TEXTS_AT_ONCE = 256  # encoded prompts that are held in memory: 1.3 MB each at SD3's size
CLIP_ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}

Row = tuple[int, ...]  # token ids that an encoder runs on at once
Text = tuple[Tensor, Tensor]  # text tokens (1, L, T5 width) and pooled text (1, CLIP-L + CLIP-G widths)


class TextEncoders(PromptTokens):
    """The text encoders and tokenizers of a model. They are found and checked when this is made, from headers alone;
    weights are read whenever prompts are encoded. The `most` prompts that were used last stay encoded.
    """

    def __init__(
        self,
        setup: Setup,
        model_file: WeightFile,
        folders: Sequence[Path],
        fit: Fit,
        *,
        device: torch.device,
        dtype: torch.dtype,
        runs_on: torch.device,
        threads: int,
        files: Unchanged,
        tell: Reporter = SILENT,
        stages: Stages | None = None,
    ):
        """folders: where to look beside the model's file; fit: the widths that the model needs; device, dtype: of the
        encoded text; runs_on: where the encoders run; files: of the model, those of the encoders are added; stages:
        where times are added.

        Raises Mistake that names the file and what is wrong with it.
        """
        self.fit, self.device, self.dtype, self.runs_on, self.threads = fit, device, dtype, runs_on, threads
        self.unchanged, self.tell, self.stages = files, tell, Stages() if stages is None else stages
        self.most = TEXTS_AT_ONCE
        self._texts: OrderedDict[Key, Text] = OrderedDict()  # last used last
        if setup.no_t5 and setup.t5xxl:
            tell.note("note: `t5xxl` is not used: `no_t5`")
        roles = ENCODERS[:2] if setup.no_t5 else ENCODERS
        self.parts = find_encoders(roles, model_file, folders, {role: getattr(setup, role) for role in ENCODERS}, fit)
        models = {role: open_encoder(role, part) for role, part in self.parts.items()}
        check_widths(models, self.parts, fit)
        self.encoders = {
            role: StreamedEncoder(model, self.parts[role], runs_on, encoder_dtype(dtype), setup.t5_resident)
            for role, model in models.items()
        }
        clips = [models[role].config for role in CLIP_ACTIVATIONS]
        places = list(dict.fromkeys([*folders, *(part.file.path.parent for part in self.parts.values())]))
        self.tokenizer_folders = {"clip": find_tokenizer("clip", places)}
        rows = min(config.vocabulary for config in clips)
        clip_tokenizer, t5_tokenizer = open_clip_tokenizer(self.tokenizer_folders["clip"], rows=rows), None
        if "t5xxl" in models:
            self.tokenizer_folders["t5"] = find_tokenizer("t5", places)
            rows = models["t5xxl"].config.vocabulary
            t5_tokenizer = open_t5_tokenizer(self.tokenizer_folders["t5"], rows=rows)
        super().__init__(clip_tokenizer, t5_tokenizer, min(config.positions for config in clips))
        own = {entry.path for entry in model_file.entries.values()}
        self.separate_files = {role: sorted(paths - own) for role, paths in self.files().items() if paths - own}
        for role, paths in self.separate_files.items():
            for path in paths:
                files.add(Where("", f"{role} {path}"), path)
        self.cache_folder = setup.embed_cache

    def take(self, parts: Mapping[str, ModelTensors]) -> None:
        """Takes other tensors for its encoders, such as patched ones; parts: by role, those of others are left."""
        for role, encoder in self.encoders.items():
            if names := differently_patched(encoder.part, parts[role]):
                drop(encoder.model, names & set(encoder.names))
                self.forget()
            self.parts[role] = encoder.part = parts[role]
        vars(self).pop("embed_cache", None)

    @functools.cached_property
    def embed_cache(self) -> EmbedCache | None:
        """The cache on disk, of these files and these patches; None without one."""
        if not self.cache_folder:
            return None
        dtype, positions, fit = encoder_dtype(self.dtype), self.positions, self.fit
        how = {
            "dtype": str(dtype),
            "device": [self.runs_on.type, device_record(self.runs_on, self.threads)],
            "no_t5": self.t5_tokenizer is None,
            "prefixes": {role: part.prefix for role, part in self.parts.items()},
            "widths": [fit.pooled, fit.context, positions],
            "versions": {n: v for n, v in versions().items() if n in ("torch", "tokenizers")},
        }

        if any(part.patches for part in self.parts.values()):  # else keys are those of earlier versions
            how["patches"] = {role: [p.identity for p in part.patches] for role, part in self.parts.items()}

        def fits(key: Key, context: Tensor, pooled: Tensor) -> bool:
            shapes = (1, self.clip_length(key) + self.t5_length_of(key), fit.context), (1, fit.pooled)
            return (context.shape, pooled.shape) == shapes and {context.dtype, pooled.dtype} == {dtype}

        return EmbedCache(self.cache_folder, self.files(), how, fits)

    def files(self) -> dict[str, set[Path]]:
        """The files that decide how text is encoded, by encoder and tokenizer."""
        files = {role: part.paths() for role, part in self.parts.items()}
        for kind, place in self.tokenizer_folders.items():
            names = {name for names in TOKENIZER_FILES[kind] for name in names}
            files[f"{kind} tokenizer"] = {place / name for name in names if (place / name).is_file()}
        return files

    def record(self) -> dict[str, dict[str, Any]]:
        """Name, bytes and identity (see `describe_files`) of what encodes text and is not in the model's file."""
        return {role: describe_files(paths) for role, paths in self.separate_files.items()}

    @property
    def opened(self) -> int:
        """How often a text encoder was read from disk."""
        return sum(encoder.opened for encoder in self.encoders.values())

    # -- encoded prompts --

    def get_cond(self, prompt: str, length: int | None = None) -> Text:
        """Text tokens (1, L, T5 width) and pooled text (1, CLIP-L + CLIP-G widths) of a prompt, which is read as the
        reference reads it.

        length: T5 tokens to pad to (None: as few as usual).
        """
        return self.get(Key(prompt, length or self.t5_length(prompt)))

    def get(self, key: Key) -> Text:
        """Text tokens (1, L, T5 width) and pooled text (1, CLIP-L + CLIP-G widths) of a prompt."""
        if key not in self._texts:
            self.encode([key])
        self._texts.move_to_end(key)
        return self._texts[key]

    @property
    def count(self) -> int:
        """How many encoded prompts are held."""
        return len(self._texts)

    def forget(self) -> None:
        """Drops all encoded prompts; they are encoded again where they come again."""
        self._texts.clear()

    def add(self, texts: Mapping[Key, Text]) -> None:
        """Takes prompts that others with the same files encoded; all of them are held, see `encode`."""
        self._make_room(texts)
        for key, text in texts.items():
            self._hold(key, text)

    @torch.no_grad()
    def encode(self, wanted: Iterable[Key]) -> None:
        """Encodes every prompt that is not held yet, each once and alone, so that no prompt's tokens depend on its
        neighbours. Each encoder is read, used for all and dropped before the next.

        All wanted ones are held then, others only up to `most` in all: see `in_groups` for many.
        """
        wanted = dict.fromkeys(Key(*key) for key in wanted)
        self._make_room(wanted)
        turn = "`text_encoder_device` cpu, `no_t5` True, or fewer prompts at a time"
        with self.unchanged.watch(), explained("encoding prompts", turn):
            self._encode([key for key in wanted if key not in self._texts])

    def _make_room(self, wanted: Mapping[Key, Any]) -> None:
        """Drops those that were used longest ago, for at most the memory of `most` together with the wanted ones."""
        others = [key for key in self._texts if key not in wanted]
        held = sum(map(self.cost, [*others, *wanted]))
        for key in others:
            if held <= self.most:
                break
            held -= self.cost(key)
            del self._texts[key]

    def _hold(self, key: Key, text: Text) -> None:
        self._texts[key] = tuple(part.to(self.device, self.dtype) for part in text)

    def _encode(self, keys: list[Key]) -> None:
        self._tell_of_cuts(keys)
        if self.embed_cache is not None:
            for key in keys:
                if (text := self.embed_cache.read(key)) is not None:
                    self._hold(key, text)
            keys = [key for key in keys if key not in self._texts]
        if not keys:
            return
        clip = {role: self._clip_states(role, keys) for role in CLIP_ACTIVATIONS}
        t5 = self._t5_states(keys)
        if self.embed_cache is not None:
            self.unchanged.check()  # an entry says which files made it
        for key in keys:
            (hidden_l, pooled_l), (hidden_g, pooled_g) = clip["clip_l"][key], clip["clip_g"][key]
            text = join_text(hidden_l, hidden_g, t5[key]), torch.cat([pooled_l, pooled_g], dim=-1)
            self._keep_on_disk(key, text)
            self._hold(key, text)

    def _clip_states(self, role: str, keys: Sequence[Key]) -> dict[Key, Text]:
        """A CLIP's part of the text tokens (1, L, D) and its pooled text (1, D), the first chunk's, by prompt."""
        tokens = {key: self.clip_tokens(key, role) for key in keys}
        empty = row_of(self.clip_tokens(EMPTY, role)[0])
        wanted = dict.fromkeys(row_of(chunk) for chunks in tokens.values() for chunk in chunks)
        if any(chunk.weighted for chunks in tokens.values() for chunk in chunks):
            wanted[empty] = None
        with self.stages.timed(f"loading and running {role}"):
            states = self._run_clip(role, list(wanted))
        out = {}
        for key, chunks in tokens.items():
            hidden = [weighted(states[row_of(chunk)][0], states.get(empty, (None,))[0], chunk) for chunk in chunks]
            out[key] = torch.cat(hidden, dim=1) if len(hidden) > 1 else hidden[0], states[row_of(chunks[0])][1]
        return out

    def _t5_states(self, keys: Sequence[Key]) -> dict[Key, Tensor]:
        """T5's part of the text tokens (1, L, D) by prompt; zeros without T5."""
        if self.t5_tokenizer is None:
            zeros = functools.partial(torch.zeros, dtype=encoder_dtype(self.dtype), device=self.runs_on)
            return {key: zeros(1, self.t5_length_of(key), self.fit.context) for key in keys}
        tokens = {key: self.t5_tokens(key) for key in keys}
        empty = {key: row_of(self.t5_tokenizer.whole([], key.length)) for key, own in tokens.items() if own.weighted}
        wanted = dict.fromkeys([*map(row_of, tokens.values()), *empty.values()])
        with self.stages.timed("loading and running t5xxl"):
            states = self._run_t5(list(wanted))
        return {key: weighted(states[row_of(own)], states.get(empty.get(key)), own) for key, own in tokens.items()}

    def _keep_on_disk(self, key: Key, text: Text) -> None:
        if self.embed_cache is not None:
            try:
                self.embed_cache.write(key, text)
            except OSError as error:  # the prompt is encoded; it is only not kept
                self.tell.note(f"note: `embed_cache`: {verbatim(str(error.strerror or error))}")

    def _tell_of_cuts(self, keys: Iterable[Key]) -> None:
        """Notes about prompts that are not read to their end."""
        for key in keys:
            t5_prompt = key.prompt if key.t5_prompt is None else key.t5_prompt
            whole = "" if key.dialect else "; `prompt_mode` whole reads all"
            cut = {}
            if any(tokens.cut for tokens in self.clip_tokens(key)):
                reads_on = " (T5 reads on)" if self.t5_tokenizer is not None else ""
                cut[key.prompt] = f"CLIP takes {self.positions} tokens{reads_on}"
            if self.t5_tokenizer is not None and self.t5_tokens(key).cut:
                why = f"T5 takes {key.length} tokens, see `t5_tokens`" if whole == "" else "T5 takes 226 characters"
                cut[t5_prompt] = f"{cut[t5_prompt].removesuffix(reads_on)}, {why}" if t5_prompt in cut else why
            for prompt, why in cut.items():
                self.tell.note(f'note: "{verbatim(shortened(prompt))}" is cut: {why}{whole}')

    def _run_clip(self, role: str, rows: Sequence[Row]) -> dict[Row, Text]:
        """Hidden states and pooled text of a CLIP by token ids, see `CLIP.encode`."""
        encoder = self.encoders[role]
        (places,) = encoder.embed(1, [range(self.positions)])
        words = encoder.embed(0, rows)
        texts = ((own + places).to(encoder.device, encoder.dtype)[None] for own in words)
        ids = [torch.tensor([row], device=encoder.device) for row in rows]
        with self.tell.progress(len(encoder.model.layers), f"encoding {role}", "layer") as update:
            return dict(zip(rows, encoder.run(texts, ids, update=update), strict=True))

    def _run_t5(self, rows: Sequence[Row]) -> dict[Row, Tensor]:
        """T5's hidden states by token ids, see `T5.encode`."""
        encoder = self.encoders["t5xxl"]
        texts = (own.to(encoder.device)[None] for own in encoder.embed(0, rows))
        with self.tell.progress(len(encoder.model.layers), "encoding t5xxl", "layer") as update:
            return dict(zip(rows, encoder.run(texts, update=update), strict=True))


def row_of(tokens: Tokens) -> Row:
    """Token ids as a key of what an encoder makes of them."""
    return tuple(tokens.ids)


def weighted(states: Tensor, empty: Tensor | None, tokens: Tokens) -> Tensor:
    """states (1, L, D) with each token's weight w: e + w (z - e), where e is the state of the empty prompt at the same
    position (ComfyUI, comfy/sd1_clip.py); a token of weight 1 stays as it is.
    """
    if empty is None or not tokens.weighted:
        return states
    w = torch.tensor(tokens.weights, device=states.device)[None, :, None]
    z, e = states.float(), empty.float()
    return torch.where(w == 1, states, (e + w * (z - e)).to(states.dtype))


Batch = TypeVar("Batch")


def in_groups(
    batches: Iterable[Batch],
    texts: Callable[[Batch], Iterable[Key]],
    most: int,
    cost: Callable[[Key], int] = lambda key: 1,
) -> Iterator[list[Batch]]:
    """Batches in order, in groups of as many as have at most `most` different texts, but at least one batch; cost: for
    how many a text counts.
    """
    group: list[Batch] = []
    of_group: set[Key] = set()
    for batch in batches:
        own = set(texts(batch))
        if group and sum(map(cost, of_group | own)) > most:
            yield group
            group, of_group = [], set()
        group.append(batch)
        of_group |= own
    if group:
        yield group


# -- what is in a file --


def open_encoder(role: str, part: ModelTensors) -> CLIP | T5:
    """The model of a part's sizes, on the meta device; raises Mistake where the part holds no such encoder."""
    if role == "t5xxl":
        config = part.config(T5Config.from_shapes, "a T5 encoder")
        return check_part(part, lambda: T5(config))
    activation, projection = CLIP_ACTIVATIONS[role], role == "clip_g"
    clip = part.config(lambda s: CLIPConfig.from_shapes(s, activation, projection), "a CLIP text encoder")
    return check_part(part, lambda: CLIP(clip))


def check_widths(models: Mapping[str, CLIP | T5], parts: Mapping[str, ModelTensors], fit: Fit) -> None:
    """Raises Mistake where encoders do not have the widths that the model needs."""
    widths = {role: model.config.width for role, model in models.items()}
    if widths["clip_l"] + widths["clip_g"] != fit.pooled:
        where, other = (parts[role].file.where for role in ("clip_l", "clip_g"))
        have = f"{widths['clip_l']} + {widths['clip_g']}"
        why = f"have widths {have}, the model needs {fit.pooled}: wrong text encoders"
        raise Mistake(where.field, f"{where.value} and {other.value}", why)
    if widths.get("t5xxl", fit.context) != fit.context:
        why = f"has width {widths['t5xxl']}, the model needs {fit.context}: not this model's T5"
        raise Mistake(*parts["t5xxl"].file.where, why)


class StreamedEncoder:
    """A text encoder of which one layer at a time is in memory: its parameters are on the meta device, those of a
    layer are read when its turn comes and dropped after it. resident: they stay instead.
    """

    def __init__(
        self, model: CLIP | T5, part: ModelTensors, device: torch.device, dtype: torch.dtype, resident: bool = False
    ):
        """model: on the meta device; device, dtype: where and in what it runs."""
        self.model, self.part = model, part
        self.device, self.dtype, self.resident = device, dtype, resident
        self.names = list(model.state_dict())
        self.opened = 0  # how often it was read from disk

    def run(self, *texts: Any, update: Callable[[int], Any] = lambda layers: None) -> list[Any]:
        """What the model's `encode` gives for texts, embedded by `embed`. update: called after every layer."""
        stays = False
        try:
            out = self.model.encode(*texts, self._layers(update))
            stays = self.resident
            return out
        finally:
            if not stays:  # nor does half of a layer, after an error
                self.model.to("meta")

    def embed(self, number: int, ids: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Rows (L, D), float32 on the CPU, of one of the model's tables for each list of ids. The table is mapped: only
        these rows of it are read, one by one as float8 has no gather.
        """
        ((_, table),) = self.part.read([self.model.TABLES[number]], "cpu", None)
        for row in ids:
            yield torch.stack([table[i] for i in row]).float()

    def _layers(self, update: Callable[[int], Any]) -> Iterator[nn.Module]:
        stem, loaded = self.model.LAYERS, (self.model.LAYERS, *self.model.TABLES)
        self.opened += self._load([n for n in self.names if not n.startswith(loaded)])  # norms and projections
        for number, layer in enumerate(self.model.layers):
            self._load([n for n in self.names if n.startswith(f"{stem}{number}.")])
            yield layer
            if not self.resident:
                layer.to("meta")
            update(1)

    def _load(self, names: list[str]) -> bool:
        """Reads those parameters that are not in memory; returns whether there are any."""
        missing = [name for name in names if self.model.get_parameter(name).is_meta]
        self.part.load_into(self.model, self.device, self.dtype, names=missing)
        return bool(missing)
