"""Settings of every trainer that learns from its own completions: how many, how they are drawn, how they are scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from transformers import SchedulerType

from posttrain.errors import UserError, did_you_mean
from posttrain.rewards.failures import ON_ERROR, FailurePolicy
from posttrain.rollout.engines import check_engine
from posttrain.rollout.stopping import check_sampling
from posttrain.trainers.core.config import AUTOMATIC, SWITCHED_OFF, BaseConfig, setting, settings
from posttrain.trainers.core.unused import EVERYWHERE, ONLINE, Table
from posttrain.types import Sampling

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "stop_strings", "stop_token_ids")
# Further keywords of `generate`, at values that ask for what is done anyway. None: any value, since only beams would
# read it.
_ORDINARY: dict[str, tuple[Any, ...] | None] = {
    "do_sample": (True,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "use_cache": (True, False),
    "length_penalty": None,
    "early_stopping": None,
}


@settings
@dataclass
class OnlineConfig(BaseConfig):
    """Batches count completions, as in TRL: per_device_train_batch_size completions per micro-step and device."""

    refused: ClassVar[dict[str, tuple[Any, str]]] = {
        "vllm_structured_outputs_regex": (None, "completions are not held to a regular expression here; use the reward `regex`"),
        "repetition_penalty": (
            1.0,
            "a penalised sampler draws from another distribution than the one that is trained; use a repetition reward instead",
        ),
        "router_aux_loss_coef": (0.0, "the load-balancing loss of mixture-of-experts models is not added in online training yet; set it to 0.0"),
        "log_completions_hub_repo": (None, "completions are kept in the run directory; upload that instead"),
    }

    unused: ClassVar[Table] = EVERYWHERE | ONLINE

    lowest: ClassVar[dict[str, float]] = BaseConfig.lowest | {
        "generation_batch_size": 1,
        "steps_per_generation": 1,
        "num_iterations": 1,
        "num_generations_eval": 1,
        "max_prompt_length": 1,
        "max_turns": 1,
        "max_turn_tokens": 1,
        "max_concurrent_completions": 1,
        "max_resampling_rounds": 0,
        "ref_model_mixup_alpha": 0,
        "ref_model_sync_steps": 1,
    }
    fewest_generations: ClassVar[int] = 2
    why_so_many: ClassVar[str] = "GRPO compares the completions of a group with each other"

    num_generations: int = setting(8, "G, the completions drawn for each prompt. At least 2: a group is compared with itself.")
    num_generations_eval: int | None = setting(None, "G in evaluation. Default: num_generations.")
    max_completion_length: int = setting(
        512, "Tokens a completion may have, answers of an environment included; longer ones are cut and count as truncated."
    )
    max_prompt_length: int | None = setting(
        None, "Keep only so many tokens at the end of each prompt, before it goes to the model. Rewards read all of it. Default: nothing is cut."
    )
    generation_batch_size: int | None = setting(
        None, "Completions per rollout over all devices. Default: per_device_train_batch_size * devices * steps_per_generation."
    )
    steps_per_generation: int | None = setting(
        None, "Micro-steps that one rollout feeds. Default: gradient_accumulation_steps, i.e. one optimizer step."
    )
    num_iterations: int = setting(1, "mu, how often a rollout is trained on.")
    shuffle_dataset: bool = setting(True, "A new order of the prompts each epoch, drawn from (seed, epoch).")
    temperature: float = setting(1.0, "Divides the logits in sampling and in training.")
    top_p: float = setting(1.0, "Nucleus sampling; 1.0 is off.")
    top_k: int | None = setting(0, "Keep the k likeliest tokens; 0 is off.")
    min_p: float | None = setting(None, "Keep tokens with at least this share of the likeliest one's probability.")
    generation_kwargs: dict[str, Any] | None = setting(
        None, f"Overrides for sampling: {', '.join(_SAMPLING_KEYS)}. Stop tokens are added to the model's own."
    )
    chat_template_kwargs: dict[str, Any] | None = setting(None, "Keywords for the chat template, e.g. {'enable_thinking': False}.")
    skip_special_tokens: bool = setting(
        True, "Leave special tokens out of the text that rewards and environments read; False shows them, the stop token included."
    )
    max_turns: int | None = setting(None, "With an environment: how often the policy may speak in an episode. Default: as often as fits.")
    max_turn_tokens: int | None = setting(None, "With an environment: tokens of one turn. Default: what is left of max_completion_length.")
    max_tool_calling_iterations: int | None = setting(None, "Turns that may call tools: max_turns - 1 under TRL's name. Set one of the two.")
    engine: str = setting(
        "local", "'local' decodes with the training module itself; 'hf' calls transformers' generate (slow, for models that 'local' refuses)."
    )
    max_concurrent_completions: int | str = setting(
        "auto", "Rows the local engine decodes at once; more wait in line. 'auto': 256, or as many as there is memory for."
    )
    zero_signal_groups: str = setting(
        "keep",
        "Groups whose rewards are all equal. 'keep': they stay in the denominators (and cost no forward where their gradient is exactly 0); "
        "'drop': they leave the denominators too; 'resample': new prompts are drawn until the batch is full of groups with signal (dynamic sampling).",
    )
    max_resampling_rounds: int = setting(8, "With zero_signal_groups='resample': give up after this many rounds and train on what there is.")
    reward_weights: list[float] | None = setting(None, "One weight per reward function. Default: all 1.0.")
    reward_timeout: float | None = setting(
        None,
        "Seconds that one call of a reward may take, where the reward does not say. Default: any. A limit also lets rewards run during generation.",
    )
    reward_on_error: str = setting(
        "stop", "What a reward does that breaks, where it does not say: 'stop' the run, or 'drop' the completion from its group, counted in the log."
    )
    reward_retries: int = setting(0, "Further attempts at a reward that broke, before that.")
    env_on_error: str = setting("stop", "An environment that breaks: 'stop' the run, or 'drop' the completion from its group, counted in the log.")
    sync_ref_model: bool = setting(False, "Move the frozen reference towards the policy every ref_model_sync_steps.")
    ref_model_mixup_alpha: float = setting(0.6, "Share of the policy in the synced reference.")
    ref_model_sync_steps: int = setting(512, "Optimizer steps between two syncs of the reference.")
    log_completions: bool = setting(False, "Print a few completions at each log (they are always in the record).")
    num_completions_to_print: int | None = setting(None, "How many of them. Default: all of one group.")
    log_unique_prompts: bool = setting(False, "Print at most one completion per prompt.")

    @classmethod
    def in_own_words(cls, given: dict[str, Any]) -> dict[str, Any]:
        """vllm_sampling_params (an object with vLLM's names) says how completions are drawn, where the settings do
        not."""
        params = given.get("vllm_sampling_params")
        if params is None:
            return given
        read = {name: getattr(params, name, None) for name in ("top_p", "top_k", "min_p")}
        drawn = {name: max(value, 0) for name, value in read.items() if value is not None}  # top_k -1 is off
        if stop := getattr(params, "stop", None):
            drawn["generation_kwargs"] = {"stop_strings": [stop] if isinstance(stop, str) else list(stop)} | (given.get("generation_kwargs") or {})
        return drawn | given | {name: drawn[name] for name in drawn if name == "generation_kwargs"}

    def __post_init__(self) -> None:
        self._resolve_best()
        super().__post_init__()
        if self.num_generations < self.fewest_generations:
            raise UserError(f"num_generations={self.num_generations}: {self.why_so_many}; set it to {self.fewest_generations} or more")
        self._check_sampling()
        self._resolve_turns()
        if self.max_concurrent_completions != AUTOMATIC and not isinstance(self.max_concurrent_completions, int):
            raise UserError(f"max_concurrent_completions={self.max_concurrent_completions!r}: use a number, 1 or more, or 'auto'")
        check_engine(self.engine)
        if self.zero_signal_groups not in ("keep", "drop", "resample"):
            raise UserError(f"zero_signal_groups={self.zero_signal_groups!r}: use 'keep', 'drop' or 'resample'")
        _ = self.reward_policy  # which checks its values
        if self.env_on_error not in ON_ERROR:
            raise UserError(f"env_on_error={self.env_on_error!r}: use 'stop' or 'drop'.{did_you_mean(str(self.env_on_error), ON_ERROR)}")
        self._resolve_batch()

    def _resolve_best(self) -> None:
        """The best model is the one with the highest reward; an evaluation here has no loss, which transformers would
        ask for."""
        by_plateau = self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
        if self.metric_for_best_model in ("loss", "eval_loss"):
            raise UserError(
                f"metric_for_best_model={self.metric_for_best_model!r}: an evaluation of completions has no loss; use 'reward', or leave it out"
            )
        if (self.load_best_model_at_end or by_plateau) and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"
        if by_plateau and "mode" not in (self.lr_scheduler_kwargs or {}):
            raise UserError(
                "lr_scheduler_type='reduce_lr_on_plateau' waits for a value to fall, and a reward rises: give lr_scheduler_kwargs={'mode': 'max'}"
            )

    def _check_sampling(self) -> None:
        """What is drawn in the end: generation_kwargs may say it too."""
        for key, value in (self.generation_kwargs or {}).items():
            if key in _ORDINARY and value not in (_ORDINARY[key] or (value,)):
                raise UserError(f"generation_kwargs: {key}={value!r} is not built; completions are drawn, one by one, from the policy itself")
            if key not in _SAMPLING_KEYS and key not in _ORDINARY:
                raise UserError(f"generation_kwargs: {key} is not supported.{did_you_mean(key, _SAMPLING_KEYS)} Known: {', '.join(_SAMPLING_KEYS)}.")
        sampling = self.sampling(())
        if sampling.max_new_tokens < 1:
            raise UserError(f"max_completion_length={sampling.max_new_tokens}: set it to 1 or more")
        if sampling.temperature <= 0:
            raise UserError(
                f"temperature={sampling.temperature}: greedy completions of a prompt are all equal, so nothing can be compared; set it above 0"
            )
        check_sampling(replace(sampling, stop_strings=()), None)  # those need the tokenizer, and are checked with it

    def _resolve_turns(self) -> None:
        if self.max_tool_calling_iterations is not None:
            if self.max_turns not in (None, self.max_tool_calling_iterations + 1):
                raise UserError("max_turns and max_tool_calling_iterations (which is one less) are two names for one thing; set only one of them")
            self.max_turns = self.max_tool_calling_iterations + 1
            if self.max_turns < 1:
                raise UserError(f"max_tool_calling_iterations={self.max_tool_calling_iterations}: set it to 0 or more")

    def _resolve_batch(self) -> None:
        """Fill steps_per_generation and generation_batch_size from each other, as TRL does."""
        per_micro_step = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            if self.generation_batch_size != per_micro_step * self.steps_per_generation:
                raise UserError("generation_batch_size and steps_per_generation are two names for one thing; set only one of them")
        elif self.generation_batch_size is not None:
            if self.generation_batch_size % per_micro_step:
                raise UserError(
                    f"generation_batch_size={self.generation_batch_size} must be a multiple of "
                    f"per_device_train_batch_size x devices = {self.per_device_train_batch_size} x {self.world_size}"
                )
            self.steps_per_generation = self.generation_batch_size // per_micro_step
        else:
            self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
            self.generation_batch_size = per_micro_step * self.steps_per_generation
        if self.generation_batch_size % self.num_generations:
            raise UserError(
                f"{self.generation_batch_size} completions per rollout (per_device_train_batch_size {self.per_device_train_batch_size} x devices {self.world_size} x "
                f"steps_per_generation {self.steps_per_generation}) do not divide into groups of num_generations={self.num_generations}; "
                f"set per_device_train_batch_size={self.num_generations}, say"
            )

    @property
    def reward_policy(self) -> FailurePolicy:
        """What counts for rewards that do not say what is to happen when they break. Raises UserError."""
        return FailurePolicy(self.reward_timeout, self.reward_on_error, self.reward_retries)

    @property
    def most_completions(self) -> int:
        """`max_concurrent_completions`, or what it is where memory is not short."""
        return int(SWITCHED_OFF["max_concurrent_completions"] if self.max_concurrent_completions == AUTOMATIC else self.max_concurrent_completions)

    @property
    def knows_gradient(self) -> bool:
        return not self.fp16 and self.on_policy

    @property
    def prompts_per_generation(self) -> int:
        """Groups in one rollout, over all devices."""
        return self.generation_batch_size // self.num_generations  # type: ignore[operator]

    @property
    def updates_per_rollout(self) -> float:
        """Optimizer steps that one rollout feeds; above 1 the later ones are off-policy."""
        return self.steps_per_generation * self.num_iterations / self.gradient_accumulation_steps  # type: ignore[operator]

    @property
    def on_policy(self) -> bool:
        """Whether every rollout feeds exactly one update: then the old log-probs are the new ones and the ratio is
        exactly 1."""
        return self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) == 0  # type: ignore[operator]

    def sampling(self, stop_token_ids: tuple[int, ...]) -> Sampling:
        """How completions are drawn; generation_kwargs win over the settings, and their stop tokens are added to the
        model's."""
        over = dict(self.generation_kwargs or {})
        return Sampling(
            max_new_tokens=over.get("max_new_tokens", self.max_completion_length),
            temperature=over.get("temperature", self.temperature),
            top_k=over.get("top_k", self.top_k) or 0,
            top_p=over.get("top_p", self.top_p),
            min_p=over.get("min_p", self.min_p),
            stop_token_ids=tuple(dict.fromkeys((*stop_token_ids, *over.get("stop_token_ids", ())))),
            stop_strings=tuple(over.get("stop_strings", ())),
        )
