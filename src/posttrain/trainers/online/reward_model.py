"""A trained reward model as a reward function: it stands among other rewards, in a rubric, for any online trainer.

The score of a completion is that of its last token, as the model was trained. Completions of one prompt share its
computation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.data.chat import encode_example, encode_prompt
from posttrain.data.formats import template_keywords
from posttrain.data.stream import PackItem, pack, split
from posttrain.errors import UserError
from posttrain.models.heads import has_score, load_reward_model, make_scores, reward_model
from posttrain.models.load import context_length, load_tokenizer
from posttrain.rewards.loading import names_model

MAX_TOKENS = 8192  # of one forward


class ModelReward:
    """`ModelReward("runs/reward/model")` (a model or adapters), or a classifier with one label and its tokenizer; a
    language model is refused.

    Where its tokenizer reads the sampled tokens as the very text that was sampled, they are scored as they are;
    otherwise the text is encoded anew.
    """

    def __init__(self, model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **loading: Any) -> None:
        self.__name__ = Path(model).name if isinstance(model, str) else "reward_model"
        name = model if isinstance(model, str) else model.config._name_or_path
        if tokenizer is None and not name:
            raise UserError("the reward model was built from a config, so no tokenizer is known for it; give one (reward_processing_classes)")
        if not isinstance(model, str) and not type(model).__name__.endswith("ForSequenceClassification"):
            raise UserError(f"a {type(model).__name__} has no trained score; train it with RewardTrainer, and give what that saved")
        if isinstance(model, str) and not has_score(model, trust_remote_code=loading.get("trust_remote_code", False)):
            raise UserError(
                f"'{model}' is a language model without a trained score; train it with `posttrain reward-model`, and give what that saved"
            )
        self.model = load_reward_model(model, **loading) if isinstance(model, str) else reward_model(model)
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(name, trust_remote_code=loading.get("trust_remote_code", False))
        self.model.eval().requires_grad_(False)
        self._scores = make_scores(self.model)

    def to(self, device: torch.device) -> None:
        self.model.to(device)  # type: ignore[arg-type]

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        tools: list[Any] | None = None,
        chat_template_kwargs: list[Any] | None = None,
    ) -> list[float]:
        """One score a completion; `tools` and `chat_template_kwargs` of the rows go to its chat template, as in its
        training.

        Raises UserError for a completion that does not fit the model's context.
        """
        nothing = [None] * len(prompts)
        rows = [{"tools": t, "chat_template_kwargs": k} for t, k in zip(tools or nothing, chat_template_kwargs or nothing, strict=True)]
        keywords = map(template_keywords, rows)
        items = [self._item(*row, number) for number, row in enumerate(zip(prompts, completions, completion_ids, keywords, strict=True))]
        scores: dict[int, float] = {}
        with torch.no_grad():
            for part in split(_grouped(items), MAX_TOKENS):
                stream = pack(part).to(self.model.device)
                scores.update(zip(stream.row_ids.tolist(), self._scores(self.model, stream).last.tolist(), strict=True))
        return [scores[number] for number in range(len(items))]

    def _item(self, prompt: Any, completion: Any, ids: list[int], keywords: dict[str, Any], number: int) -> PackItem:
        text = completion if isinstance(completion, str) else str(completion[-1]["content"])
        if text in (self.tokenizer.decode(ids, skip_special_tokens=skips) for skips in (True, False)):
            prompt_ids = encode_prompt(self.tokenizer, prompt, **keywords)
        else:
            prompt_ids, ids = encode_example(self.tokenizer, prompt, completion, **keywords)
        limit = context_length(self.model)
        if limit is not None and len(prompt_ids) + len(ids) > limit:
            raise UserError(f"a completion of {len(ids)} tokens after a prompt of {len(prompt_ids)} is beyond the reward model's context of {limit}")
        return PackItem(prompt_ids, [ids], row_ids=[number])


def _grouped(items: list[PackItem]) -> list[PackItem]:
    """Neighbours with the same prompt as one item."""
    grouped: list[PackItem] = []
    for item in items:
        assert item.row_ids is not None
        if grouped and grouped[-1].prompt_ids == item.prompt_ids:
            last = grouped[-1]
            grouped[-1] = PackItem(last.prompt_ids, [*last.completions, *item.completions], row_ids=[*(last.row_ids or ()), *item.row_ids])
        else:
            grouped.append(item)
    return grouped


def with_reward_models(functions: list[Any], tokenizers: Any, own: PreTrainedTokenizerBase | None) -> list[Any]:
    """Reward functions, in which models, and directories and hub names of models, became `ModelReward`s.

    tokenizers: one for each function (None: the model's own, or for a model that came from a config the policy's,
    `own`).
    """
    listed = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers] * len(functions)
    if len(listed) != len(functions):
        raise UserError(f"there are {len(listed)} reward_processing_classes for {len(functions)} reward functions; give one (or None) for each")
    made = []
    for function, tokenizer in zip(functions, listed, strict=True):
        if isinstance(function, PreTrainedModel):
            named = bool(function.config._name_or_path)
            function = ModelReward(function, tokenizer if tokenizer is not None or named else own)
        elif names_model(function):
            function = ModelReward(function, tokenizer)
        made.append(function)
    return made
