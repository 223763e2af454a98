"""What a trainer would see of the data: rows as tokens, each read or trained, and what share of them is trained. No
model is loaded.

The rows of a recipe are prepared as the trainer prepares them, and all of them are counted; a few are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

from posttrain.cli.build import fill, make_tokenizer
from posttrain.cli.recipe import ModelSection, Recipe
from posttrain.cli.values import read_settings
from posttrain.data.chat import encode_example, encode_preference, encode_task
from posttrain.data.convert import maybe_extract_prompt
from posttrain.data.examples import ExampleMaker
from posttrain.data.formats import PREFERENCE, FormatCheck, template_keywords
from posttrain.data.mixture import load_data
from posttrain.data.replies import check_spoken_by_the_assistant, without_repetition
from posttrain.errors import NothingToLearn, UserError
from posttrain.methods import METHODS, Method


@dataclass
class PreviewPiece:
    """A run of tokens of a row with its name: prompt, completion, chosen, rejected."""

    name: str
    ids: list[int]
    trained: list[bool]
    is_cut: bool = False  # it was longer than max_length allows


@dataclass
class Preview:
    """Counts over all rows, and the first rows themselves."""

    kind: Method
    tokenizer: Any
    stop_ids: tuple[int, ...]
    shown: list[list[PreviewPiece]] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    ended: int = 0  # runs of trained tokens that hold a stop token
    runs: int = 0  # pieces with trained tokens
    cut: int = 0
    useless: list[str] = field(default_factory=list)  # why, of each row that can teach nothing and is left out
    longest: int = 0  # tokens of a row's longest reading: its prompt with one completion

    def add(self, pieces: list[PreviewPiece]) -> None:
        self.rows += 1
        read = sum(len(piece.ids) for piece in pieces if not any(piece.trained))
        for piece in pieces:
            self.tokens += len(piece.ids)
            self.trained += sum(piece.trained)
            self.longest = max(self.longest, len(piece.ids) + (read if any(piece.trained) else 0))
            if any(piece.trained):
                self.runs += 1
                self.cut += piece.is_cut
                self.ended += any(trained and id in self.stop_ids for id, trained in zip(piece.ids, piece.trained, strict=True))


def preview(recipe: Recipe, kind: Method, count: int, before: Sequence[Mapping[str, Any]] = ()) -> Preview:
    """Raises UserError for whatever is wrong with the data, a row without a trained token included.

    before: the settings of the stages that the model will have gone through; they may have set its chat template.
    """
    settings = read_settings(kind.section, getattr(recipe, kind.section), kind.config_class(), kind.title)
    if recipe.data.train is None:
        raise UserError("the recipe does not say data.train; give it there or as --data.train=...")
    raw = load_data(recipe.data.train, streaming=recipe.data.streaming)
    tokenizer = make_tokenizer(recipe.model, raw)
    for earlier in (*before, settings):
        with_template(tokenizer, earlier)
    context = context_of(recipe.model)
    if context is not None and "max_length" in {field.name for field in fields(kind.config_class())}:
        settings["max_length"] = min(settings.get("max_length") or context, context)
    found = Preview(kind, tokenizer, stop_ids_of(recipe.model.name, tokenizer))
    encode = _encoder(kind, found, settings)
    for row in fill(raw, recipe.data, tokenizer):
        try:
            pieces = encode(row)
        except NothingToLearn as error:
            found.useless.append(str(error))
            continue
        found.add(pieces)
        if len(found.shown) < count:
            found.shown.append(pieces)
    if not found.rows:
        raise UserError(f"no row can teach anything; the first: {found.useless[0]}" if found.useless else "the data have no rows")
    return found


def kind_of_recipe(recipe: Recipe, wanted: str | None) -> Method:
    """The trainer whose data are asked for: the one named, or the only one that the recipe has settings for; with a
    rubric alone GRPO."""
    if wanted is not None:
        if wanted not in METHODS:
            raise UserError(f"--kind {wanted} is not known; use one of {', '.join(METHODS)}")
        return METHODS[wanted]
    names = [name for name, section in METHODS.sections().items() if getattr(recipe, section)]
    if len(names) == 1:
        return METHODS[names[0]]
    if not names:
        return METHODS["grpo" if recipe.rubric else "sft"]
    raise UserError(f"the recipe has settings for several trainers ({', '.join(names)}); say which data to show: --kind {names[0]}")


def with_template(tokenizer: Any, settings: Mapping[str, Any]) -> None:
    """The chat template and end token that the settings ask for, as the trainer sets them."""
    from posttrain.models.templates import set_chat_template, set_eos_token

    if settings.get("chat_template_path"):
        set_chat_template(tokenizer, settings["chat_template_path"], settings.get("reply_opening"))
    if settings.get("eos_token"):
        set_eos_token(tokenizer, settings["eos_token"])


def stop_ids_of(model: str | None, tokenizer: Any) -> tuple[int, ...]:
    """As `models.load.stop_token_ids`, from the files beside the weights."""
    from transformers import GenerationConfig

    ids = [tokenizer.eos_token_id]
    if model is not None:
        try:
            listed = GenerationConfig.from_pretrained(_weights_of(model)).eos_token_id
        except OSError:  # the model has none
            listed = None
        ids = [*(listed if isinstance(listed, list) else [listed]), *ids]
    return tuple(dict.fromkeys(id for id in ids if id is not None))


def context_of(section: ModelSection) -> int | None:
    """As `models.load.context_length`, from the config alone."""
    if section.name is None:
        return (section.from_scratch or {}).get("max_position_embeddings")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(_weights_of(section.name))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config of the model '{section.name}': {str(error).strip().splitlines()[0]}") from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _weights_of(name: str) -> str:
    """Adapters have neither config nor generation config: those of the model that they belong to."""
    from posttrain.models.adapter_files import base_of, is_adapter

    return base_of(name) if is_adapter(name) else name


Encoder = Callable[[dict[str, Any]], list[PreviewPiece]]


def _encoder(kind: Method, found: Preview, settings: dict[str, Any]) -> Encoder:
    if kind.is_online:
        return _prompt_encoder(found, settings)
    if kind.data == "texts":
        return _example_encoder(found, kind.config_class()(**{**settings, "report_to": "none"}).examples)
    return _completions_encoder(kind, found, settings)


def _example_encoder(found: Preview, options: Any) -> Encoder:
    make = ExampleMaker(found.tokenizer, options, found.stop_ids)

    def encode(row: dict[str, Any]) -> list[PreviewPiece]:
        example = make(row)
        is_full = options.max_length is not None and len(example.ids) == options.max_length
        return [PreviewPiece("row", list(example.ids), list(map(bool, example.trained)), is_full and not make.ends(example))]

    return encode


def _completions_encoder(kind: Method, found: Preview, settings: dict[str, Any]) -> Encoder:
    trainer, limit = kind.trainer_class(), settings.get("max_length", getattr(kind.config_class(), "max_length", None))
    check = FormatCheck(trainer.formats, kind.title)

    def encode(row: dict[str, Any]) -> list[PreviewPiece]:
        number, row = check.seen, without_repetition(row)
        is_pair = "chosen" in check(row).texts
        row = maybe_extract_prompt(row)
        check_spoken_by_the_assistant(row, f"row {number}")
        options = {"stop_ids": found.stop_ids, **template_keywords(row)}
        if is_pair:
            prompt, *completions = encode_preference(found.tokenizer, row["prompt"], row["chosen"], row["rejected"], **options)
            names = PREFERENCE.replies
        else:
            prompt, completion = encode_example(found.tokenizer, row["prompt"], row["completion"], **options)
            completions, names = [completion], ("good completion" if row["label"] else "bad completion",)
        room = None if limit is None else limit - len(prompt)
        if room is not None and room < 1:
            raise UserError(f"row {number}: its prompt has {len(prompt)} tokens, which leaves no room for a completion within max_length={limit}")
        pieces = [PreviewPiece("prompt", prompt, [False] * len(prompt))]
        for name, ids in zip(names, completions, strict=True):
            pieces.append(PreviewPiece(name, ids[:room], [True] * len(ids[:room]), room is not None and len(ids) > room))
        return pieces

    return encode


def _prompt_encoder(found: Preview, settings: dict[str, Any]) -> Encoder:
    from posttrain.data.prompts import to_tasks

    def encode(row: dict[str, Any]) -> list[PreviewPiece]:
        task = replace(to_tasks([row])[0], id=found.rows)
        ids = encode_task(found.tokenizer, task, settings.get("chat_template_kwargs"))
        return [PreviewPiece("prompt", ids, [False] * len(ids))]

    return encode


def report(found: Preview) -> list[str]:
    """The counts, a sentence each."""
    lines = [f"{found.rows:,} rows, {found.tokens:,} tokens; the longest row has {found.longest:,}"]
    if found.kind.is_online:
        return [*lines, "prompts are only read; what the model samples after them is trained, up to and with its stop token"]
    lines.append(f"{found.trained / found.tokens:.1%} of the tokens are trained")
    without = found.runs - found.ended
    lines.append(
        "a stop token is trained in every completion"
        if not without
        else f"a stop token is trained in {found.ended / found.runs:.1%} of the completions; {without:,} do not teach where to stop"
    )
    if found.useless:
        lines.append(f"{len(found.useless):,} further rows can teach nothing and are left out; the first: {found.useless[0]}")
    if found.cut:
        lines.append(f"{found.cut:,} completions are cut at max_length")
    return lines


def stretches(piece: PreviewPiece, tokenizer: Any, stop_ids: Iterable[int]) -> list[tuple[str, str]]:
    """(text, "read" | "trained" | "stop") of runs of tokens. A character that several tokens share goes with the last
    of them."""
    stops = set(stop_ids)
    styles = ["stop" if trained and id in stops else "trained" if trained else "read" for id, trained in zip(piece.ids, piece.trained, strict=True)]
    found, at = [], 0
    for style, members in groupby(styles):
        length = len(list(members))
        found.append((str(tokenizer.decode(piece.ids[at : at + length])), style))
        at += length
    return found
