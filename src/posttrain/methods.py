"""The training methods, one row each: command, section of the recipe, trainer, and what the command line and the page
ask of it.

Names only, so that `posttrain --help` and reading a recipe import nothing heavy: classes are loaded when they are used.
Another package adds a method by an entry point of the group "posttrain.methods", `NAME = "module:Trainer"`, whose class
carries `method = Method(title=..., config=...)`. NAME is its command and its section of the recipe.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from posttrain.errors import UserError

GROUP = "posttrain.methods"
TRL_NAMES = {"reward": "reward-model"}  # where its command has another name


@dataclass(frozen=True)
class Method:
    """What others ask of a training method."""

    title: str  # in sentences: "is not a setting of GRPO"
    config: Any  # the class of its settings, or "module:Class"
    section: str = ""  # the recipe's section with its settings; of another package's method its name
    trainer: Any = None  # as `config`; of another package's method the class that carries this
    help: str = ""  # of its command
    data: Literal["prompts", "texts", "completions"] = "completions"  # prompts: it samples; texts: as SFT; completions: its trainer has `formats`
    leaves_scorer: bool = False  # its model is no policy, so no later stage starts from it by itself
    compares_groups: bool = False  # completions of a prompt are compared with each other, which `posttrain probe` is about

    @property
    def is_online(self) -> bool:
        """It samples completions and has them scored (rubric, engine); otherwise the data hold what it learns from."""
        return self.data == "prompts"

    @property
    def recorded_as(self) -> str:
        """What the record of its runs calls it: GRPO, SFT, Reward, ..."""
        name = self.config.rpartition(":")[2] if isinstance(self.config, str) else self.config.__name__
        return str(name).removesuffix("Config")

    def config_class(self) -> Any:
        return _load(self.config)

    def trainer_class(self) -> Any:
        return _load(self.trainer)


def _load(where: Any) -> Any:
    if not isinstance(where, str):
        return where
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


_BUILT_IN = {
    "grpo": Method(
        title="GRPO",
        section="train",
        config="posttrain.trainers.grpo:GRPOConfig",
        trainer="posttrain.trainers.grpo:GRPOTrainer",
        help="Train with GRPO. Any setting can follow: --train.learning_rate=1e-6 --model.name=... --data.train=rows.jsonl",
        data="prompts",
        compares_groups=True,
    ),
    "sft": Method(
        data="texts",
        title="SFT",
        section="sft",
        config="posttrain.trainers.sft:SFTConfig",
        trainer="posttrain.trainers.sft:SFTTrainer",
        help="Fine-tune on completions (sections model, data with `completion`, sft). Any setting can follow: --sft.max_steps=100",
    ),
    "dpo": Method(
        title="DPO",
        section="dpo",
        config="posttrain.trainers.dpo:DPOConfig",
        trainer="posttrain.trainers.dpo:DPOTrainer",
        help="Learn from preferred and rejected completions (data with `chosen` and `rejected`). Any setting can follow: --dpo.beta=0.05",
    ),
    "kto": Method(
        title="KTO",
        section="kto",
        config="posttrain.trainers.kto:KTOConfig",
        trainer="posttrain.trainers.kto:KTOTrainer",
        help="Learn from completions that are good or bad (data with `completion` and `label`, or pairs). Any setting can follow: --kto.beta=0.05",
    ),
    "orpo": Method(
        title="ORPO",
        section="orpo",
        config="posttrain.trainers.orpo:ORPOConfig",
        trainer="posttrain.trainers.orpo:ORPOTrainer",
        help="Fine-tune and learn preferences at once, without a reference (data with `chosen` and `rejected`). Any setting can follow: --orpo.beta=0.2",
    ),
    "cpo": Method(
        title="CPO",
        section="cpo",
        config="posttrain.trainers.cpo:CPOConfig",
        trainer="posttrain.trainers.cpo:CPOTrainer",
        help="CPO and SimPO: preferences without a reference (data with `chosen` and `rejected`). Any setting can follow: --cpo.loss_type=simpo",
    ),
    "reward-model": Method(
        leaves_scorer=True,
        title="a reward model",
        section="reward",
        config="posttrain.trainers.reward:RewardConfig",
        trainer="posttrain.trainers.reward:RewardTrainer",
        help="Train a reward model on preferences (data with `chosen` and `rejected`). Any setting can follow: --reward.learning_rate=1e-5",
    ),
    "ppo": Method(
        title="PPO",
        section="ppo",
        config="posttrain.trainers.ppo:PPOConfig",
        trainer="posttrain.trainers.ppo:PPOTrainer",
        help="Train with PPO, values on the policy's backbone. Any setting can follow: --ppo.kl_coef=0.02",
        data="prompts",
    ),
    "rloo": Method(
        title="RLOO",
        section="rloo",
        config="posttrain.trainers.rloo:RLOOConfig",
        trainer="posttrain.trainers.rloo:RLOOTrainer",
        help="Train with RLOO: each completion against the mean of its siblings. Any setting can follow: --rloo.beta=0.01",
        data="prompts",
        compares_groups=True,
    ),
}


# Names that a method of another package cannot have: other commands, and sections of a recipe.
TAKEN = {
    *_BUILT_IN, *(method.section for method in _BUILT_IN.values()), "sample", "eval", "probe", "run", "plan", "doctor", "data", "export", "watch", "report",
    "demo", "model", "rubric", "env", "engine", "stages",
}  # fmt: skip


class Methods(Mapping[str, Method]):
    """By name. Iterating, `sections` and `helps` load no package; looking a method of another package up loads it."""

    def __getitem__(self, name: str) -> Method:
        if name in _BUILT_IN:
            return _BUILT_IN[name]
        return _of_package(self._outside[name])

    def __iter__(self) -> Iterator[str]:
        return iter([*_BUILT_IN, *self._outside])

    def __len__(self) -> int:
        return len(_BUILT_IN) + len(self._outside)

    def sections(self) -> dict[str, str]:
        return {name: _BUILT_IN[name].section if name in _BUILT_IN else name for name in self}

    def outside_sections(self) -> list[str]:
        return list(self._outside)

    def helps(self) -> dict[str, str]:
        return {
            name: _BUILT_IN[name].help if name in _BUILT_IN else f"Train with {name}, of the package {_package(self._outside[name])}."
            for name in self
        }

    @functools.cached_property
    def _outside(self) -> dict[str, EntryPoint]:
        named = {found.name: found for found in entry_points(group=GROUP)}
        for name in named.keys() & TAKEN:
            warnings.warn(
                f"the method '{name}' of the package {_package(named[name])} has the name of a command or a section: it is left out", stacklevel=2
            )
        return {name: found for name, found in named.items() if name not in TAKEN}


def _of_package(found: EntryPoint) -> Method:
    try:
        trainer = found.load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"the method '{found.name}' of the package {_package(found)} cannot be loaded: {error}") from error
    method = getattr(trainer, "method", None)
    if not isinstance(method, Method):
        raise UserError(f"the method '{found.name}' of the package {_package(found)}: {found.value} needs `method = Method(title=..., config=...)`")
    return replace(method, section=found.name, trainer=trainer)


def _package(found: EntryPoint) -> str:
    return found.dist.name if found.dist is not None else found.value.partition(":")[0]


METHODS = Methods()
