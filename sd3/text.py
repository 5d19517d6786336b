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

TEXTS_AT_ONCE = 256  # maximum encoded prompts in memory: 1.3 MB each at SD3's size
CLIP_ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}

Row = tuple[int, ...]  # token ids of one sequence, the input of an encoder
Text = tuple[Tensor, Tensor]  # text tokens (1, L, T5 width) and pooled text (1, CLIP-L + CLIP-G widths)


class TextEncoders(PromptTokens):
    """The text encoders and tokenizers of a model. The constructor finds and checks them from headers alone; weights
    are read whenever prompts are encoded. Keeps the text tokens of the `most` most recently used prompts.
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
        """folders: where to look besides the model's file; fit: the widths that the model needs; device, dtype: of the
        encoded text; runs_on: device of the encoders; files: files of the model, to which those of the encoders are
        added; stages: collects times.

        Raises Mistake with the file and the reason.
        """
        self.fit, self.device, self.dtype, self.runs_on, self.threads = fit, device, dtype, runs_on, threads
        self.unchanged, self.tell, self.stages = files, tell, Stages() if stages is None else stages
        self.most = TEXTS_AT_ONCE
        self._texts: OrderedDict[Key, Text] = OrderedDict()  # most recently used last
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
        in_model = {entry.path for entry in model_file.entries.values()}
        separate = {role: sorted(paths - in_model) for role, paths in self.files().items()}
        self.separate_files = {role: paths for role, paths in separate.items() if paths}
        for role, paths in self.separate_files.items():
            for path in paths:
                files.add(Where("", f"{role} {path}"), path)
        self.cache_folder = setup.embed_cache

    def repatch(self, parts: Mapping[str, ModelTensors]) -> None:
        """Replaces the encoders' tensors, for example with patched ones. parts: by role; other roles are ignored."""
        for role, encoder in self.encoders.items():
            if names := differently_patched(encoder.part, parts[role]):
                drop(encoder.model, names & set(encoder.names))
                self.forget()
            self.parts[role] = encoder.part = parts[role]
        vars(self).pop("embed_cache", None)

    @functools.cached_property
    def embed_cache(self) -> EmbedCache | None:
        """The cache on disk for these files and patches; None if there is no cache folder."""
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

        if any(part.patches for part in self.parts.values()):  # else earlier versions' keys stay valid
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
        """Name, bytes and identity (see `describe_files`) of text encoders and tokenizers outside the model's file."""
        return {role: describe_files(paths) for role, paths in self.separate_files.items()}

    @property
    def opened(self) -> int:
        """Number of times that a text encoder was read from disk."""
        return sum(encoder.opened for encoder in self.encoders.values())

    # -- encoded prompts --

    def get_cond(self, prompt: str, length: int | None = None) -> Text:
        """Text tokens (1, L, T5 width) and pooled text (1, CLIP-L + CLIP-G widths) of a prompt, read as in the public
        reference.

        length: number of T5 tokens to pad to (None: the usual minimum).
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
        """Number of encoded prompts in memory."""
        return len(self._texts)

    def forget(self) -> None:
        """Drops all encoded prompts from memory; they are encoded again when needed."""
        self._texts.clear()

    def add(self, texts: Mapping[Key, Text]) -> None:
        """Adds prompts that another process encoded with the same files. Keeps all of them, see `encode`."""
        self._make_room(texts)
        for key, text in texts.items():
            self._hold(key, text)

    @torch.no_grad()
    def encode(self, wanted: Iterable[Key]) -> None:
        """Encodes all wanted prompts that are not in memory. Each is encoded once and not in a batch, so that its
        tokens do not depend on other prompts. Each encoder is read, run on all prompts and dropped before the next.

        Afterwards all wanted prompts are in memory, and others only up to a total of `most`; for many prompts, see
        `in_groups`.
        """
        wanted = dict.fromkeys(Key(*key) for key in wanted)
        self._make_room(wanted)
        turn = "`text_encoder_device` cpu, `no_t5` True, or fewer prompts at a time"
        with self.unchanged.watch(), explained("encoding prompts", turn):
            self._encode([key for key in wanted if key not in self._texts])

    def _make_room(self, wanted: Mapping[Key, Any]) -> None:
        """Drops the least recently used prompts until they and the wanted ones take at most the memory of `most`."""
        others = [key for key in self._texts if key not in wanted]
        total = sum(map(self.cost, [*others, *wanted]))
        for key in others:
            if total <= self.most:
                break
            total -= self.cost(key)
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
            self.unchanged.check()  # a cache entry names the files that made it
        for key in keys:
            (hidden_l, pooled_l), (hidden_g, pooled_g) = clip["clip_l"][key], clip["clip_g"][key]
            text = join_text(hidden_l, hidden_g, t5[key]), torch.cat([pooled_l, pooled_g], dim=-1)
            self._keep_on_disk(key, text)
            self._hold(key, text)

    def _clip_states(self, role: str, keys: Sequence[Key]) -> dict[Key, Text]:
        """Text tokens (1, L, D) from a CLIP encoder and pooled text (1, D) of the first chunk, by prompt."""
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
        """Text tokens (1, L, D) from T5, by prompt; zeros in a run without T5."""
        if self.t5_tokenizer is None:
            zeros = functools.partial(torch.zeros, dtype=encoder_dtype(self.dtype), device=self.runs_on)
            return {key: zeros(1, self.t5_length_of(key), self.fit.context) for key in keys}
        tokens = {key: self.t5_tokens(key) for key in keys}
        empty = {key: row_of(self.t5_tokenizer.whole([], key.length)) for key, row in tokens.items() if row.weighted}
        wanted = dict.fromkeys([*map(row_of, tokens.values()), *empty.values()])
        with self.stages.timed("loading and running t5xxl"):
            states = self._run_t5(list(wanted))
        return {key: weighted(states[row_of(row)], states.get(empty.get(key)), row) for key, row in tokens.items()}

    def _keep_on_disk(self, key: Key, text: Text) -> None:
        if self.embed_cache is not None:
            try:
                self.embed_cache.write(key, text)
            except OSError as error:  # the prompt is encoded, but not cached
                self.tell.note(f"note: `embed_cache`: {verbatim(str(error.strerror or error))}")

    def _tell_of_cuts(self, keys: Iterable[Key]) -> None:
        """Prints a note for each prompt that an encoder does not read to its end."""
        for key in keys:
            t5_prompt = key.prompt if key.t5_prompt is None else key.t5_prompt
            whole = "" if key.dialect else "; `prompt_mode` whole reads all"
            cut = {}
            if any(tokens.cut for tokens in self.clip_tokens(key)):
                reads_on = " (T5 reads on)" if self.t5_tokenizer is not None else ""
                cut[key.prompt] = f"CLIP takes {self.positions} tokens{reads_on}"
            if self.t5_tokenizer is not None and self.t5_tokens(key).cut:
                why = (
                    f"T5 takes {key.length} tokens, see `t5_tokens`"
                    if whole == ""
                    else "T5 takes the first 226 characters"
                )
                cut[t5_prompt] = f"{cut[t5_prompt].removesuffix(reads_on)}, {why}" if t5_prompt in cut else why
            for prompt, why in cut.items():
                self.tell.note(f'note: "{verbatim(shortened(prompt))}" is cut: {why}{whole}')

    def _run_clip(self, role: str, rows: Sequence[Row]) -> dict[Row, Text]:
        """Hidden states and pooled text from a CLIP encoder, by token ids; see `CLIP.encode`."""
        encoder = self.encoders[role]
        (places,) = encoder.embed(1, [range(self.positions)])
        words = encoder.embed(0, rows)
        texts = ((row + places).to(encoder.device, encoder.dtype)[None] for row in words)
        ids = [torch.tensor([row], device=encoder.device) for row in rows]
        with self.tell.progress(len(encoder.model.layers), f"encoding {role}", "layer") as update:
            return dict(zip(rows, encoder.run(texts, ids, update=update), strict=True))

    def _run_t5(self, rows: Sequence[Row]) -> dict[Row, Tensor]:
        """Hidden states from T5, by token ids; see `T5.encode`."""
        encoder = self.encoders["t5xxl"]
        texts = (row.to(encoder.device)[None] for row in encoder.embed(0, rows))
        with self.tell.progress(len(encoder.model.layers), "encoding t5xxl", "layer") as update:
            return dict(zip(rows, encoder.run(texts, update=update), strict=True))


def row_of(tokens: Tokens) -> Row:
    """The token ids as a tuple, a key for the output of an encoder."""
    return tuple(tokens.ids)


def weighted(states: Tensor, empty: Tensor | None, tokens: Tokens) -> Tensor:
    """Applies each token's weight w to states z (1, L, D): e + w (z - e), where e is the state of the empty prompt at
    the same position (ComfyUI, comfy/sd1_clip.py). Tokens of weight 1 do not change.
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
    """Groups consecutive batches so that each group has at most `most` distinct texts, but at least one batch. cost:
    for how many texts a text counts.
    """
    group: list[Batch] = []
    of_group: set[Key] = set()
    for batch in batches:
        of_batch = set(texts(batch))
        if group and sum(map(cost, of_group | of_batch)) > most:
            yield group
            group, of_group = [], set()
        group.append(batch)
        of_group |= of_batch
    if group:
        yield group


# -- encoders in files --


def open_encoder(role: str, part: ModelTensors) -> CLIP | T5:
    """An encoder with the sizes of a part's tensors, on the meta device. Raises Mistake if they are no such encoder."""
    if role == "t5xxl":
        config = part.config(T5Config.from_shapes, "a T5 encoder")
        return check_part(part, lambda: T5(config))
    activation, projection = CLIP_ACTIVATIONS[role], role == "clip_g"
    clip = part.config(lambda s: CLIPConfig.from_shapes(s, activation, projection), "a CLIP text encoder")
    return check_part(part, lambda: CLIP(clip))


def check_widths(models: Mapping[str, CLIP | T5], parts: Mapping[str, ModelTensors], fit: Fit) -> None:
    """Raises Mistake if encoders do not have the widths that the model needs."""
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
    """A text encoder with one layer in memory at a time: its parameters are on the meta device, and those of a layer
    are read before it runs and dropped after it. resident: keep them in memory instead.
    """

    def __init__(
        self, model: CLIP | T5, part: ModelTensors, device: torch.device, dtype: torch.dtype, resident: bool = False
    ):
        """model: on the meta device; device, dtype: of the computation."""
        self.model, self.part = model, part
        self.device, self.dtype, self.resident = device, dtype, resident
        self.names = list(model.state_dict())
        self.opened = 0  # number of times it was read from disk

    def run(self, *texts: Any, update: Callable[[int], Any] = lambda layers: None) -> list[Any]:
        """Runs the model's `encode` on texts that `embed` embedded. update: called after every layer."""
        stays = False
        try:
            out = self.model.encode(*texts, self._layers(update))
            stays = self.resident
            return out
        finally:
            if not stays:  # after an error, this also drops a partly loaded layer
                self.model.to("meta")

    def embed(self, number: int, ids: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Looks up each list of ids in one of the model's tables; yields (L, D), float32 on the CPU. The table is
        memory-mapped, so only these rows are read; one at a time, as torch cannot gather float8.
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
        """Reads the parameters that are not in memory; returns whether there were any."""
        missing = [name for name in names if self.model.get_parameter(name).is_meta]
        self.part.load_into(self.model, self.device, self.dtype, names=missing)
        return bool(missing)
