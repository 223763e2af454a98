"""Command lines as TRL's users write them: `posttrain grpo --config flat.yaml --model_name_or_path ... --dataset_name
...`, without a recipe."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from posttrain.cli.options import SETTINGS, sentences
from posttrain.methods import METHODS, TRL_NAMES

_FLAT = ("--config", "--model_name_or_path", "--dataset_name")  # no recipe's setting is called so

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def is_flat(words: Sequence[str]) -> bool:
    return bool(words) and words[0] in {*METHODS, *TRL_NAMES} and any(word.partition("=")[0] in _FLAT for word in words[1:])


@app.command(context_settings={**SETTINGS, "help_option_names": []})
def train(ctx: typer.Context) -> None:
    with sentences():
        from posttrain.compat.trl import scripts

        method, *words = ctx.args
        scripts.train(method, words)
