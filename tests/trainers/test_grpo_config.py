import pytest

from posttrain import GRPOConfig
from posttrain.errors import UserError

# Every own field of the GRPOConfig that users bring along, at the value that is its default there.
BROUGHT_ALONG = {
    "model_init_kwargs": None, "trust_remote_code": False, "disable_dropout": False, "cast_lm_head_to_fp32": False, "learning_rate": 1e-6,
    "remove_unused_columns": False, "num_generations": 8, "num_generations_eval": None, "max_completion_length": 512, "ds3_gather_for_generation": True,
    "shuffle_dataset": True, "pad_to_multiple_of": None, "generation_batch_size": None, "steps_per_generation": None, "temperature": 1.0, "top_p": 1.0,
    "top_k": 0, "min_p": None, "generation_kwargs": None, "chat_template_kwargs": None, "repetition_penalty": 1.0, "cache_implementation": None,
    "use_vllm": False, "vllm_mode": "colocate", "vllm_model_impl": "vllm", "vllm_enable_sleep_mode": False, "vllm_structured_outputs_regex": None,
    "vllm_server_base_url": None, "vllm_server_host": "0.0.0.0", "vllm_server_port": 8000, "vllm_server_timeout": 240.0, "vllm_group_port": 51216,
    "vllm_gpu_memory_utilization": 0.3, "vllm_max_model_length": None, "vllm_tensor_parallel_size": 1, "use_transformers_continuous_batching": False,
    "transformers_continuous_batching_config": None, "beta": 0.0, "num_iterations": 1, "epsilon": 0.2, "delta": None, "epsilon_high": None,
    "sapo_temperature_neg": 1.05, "sapo_temperature_pos": 1.0, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
    "importance_sampling_level": "token", "reward_weights": None, "multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group",
    "loss_type": "dapo", "mask_truncated_completions": False, "sync_ref_model": False, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512,
    "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "use_adaptive_entropy": False, "entropy_coef_min": 0.0, "entropy_coef_max": 1.0,
    "entropy_coef_delta": 0.005, "entropy_target": 0.2, "max_tool_calling_iterations": None, "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 3.0, "vllm_importance_sampling_clip_min": None,
    "off_policy_mask_threshold": None, "use_bias_correction_kl": True, "log_completions": False, "log_multimodal": True, "num_completions_to_print": None,
    "log_unique_prompts": False, "log_completions_hub_repo": None, "use_transformers_paged": False, "vllm_importance_sampling_cap": None,
}  # fmt: skip


@pytest.mark.parametrize("name", BROUGHT_ALONG)
def test_every_known_name_is_accepted_at_its_default(name):
    GRPOConfig(output_dir="x", use_cpu=True, **{name: BROUGHT_ALONG[name]})


@pytest.mark.parametrize("name", sorted(GRPOConfig.refused))
def test_a_refused_name_says_why(name):
    harmless = GRPOConfig.refused[name][0]
    with pytest.raises(UserError, match=name) as caught:
        GRPOConfig(output_dir="x", use_cpu=True, **{name: not harmless if isinstance(harmless, bool) else "something else"})
    assert len(str(caught.value)) > len(name) + 20


@pytest.mark.parametrize("name", sorted(GRPOConfig.unused))
def test_a_name_that_has_nothing_to_set_is_accepted_with_a_line(name, caplog):
    usual, instead = GRPOConfig.unused[name]
    value = not usual if isinstance(usual, bool) else "something else"
    assert getattr(GRPOConfig(output_dir="x", use_cpu=True, **{name: value}), name) == value
    assert caplog.messages == [f"{name}={value!r}: nothing to set here, since {instead}"]
    caplog.clear()
    GRPOConfig(output_dir="x", use_cpu=True, **{name: usual})
    assert not caplog.messages


def test_settings_with_the_same_reason_share_a_line(caplog):
    config = GRPOConfig(output_dir="x", use_cpu=True, use_vllm=True, vllm_mode="server", use_liger_kernel=True, torch_compile=True)
    assert (config.use_vllm, config.use_liger_kernel, config.torch_compile) == (True, False, False)
    assert len(caplog.messages) == 3
    assert "use_vllm=True, vllm_mode='server'" in "\n".join(caplog.messages)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_liger_kernel": True}, "fused"),
        ({"train_sampling_strategy": "group_by_length"}, "no grouping"),
        ({"dataloader_drop_last": True}, "kept"),
    ],
)
def test_fields_that_nothing_reads_are_accepted_with_a_line(settings, words, caplog):
    GRPOConfig(output_dir="x", use_cpu=True, **settings)
    assert len(caplog.messages) == 1
    assert words in caplog.messages[0]


def test_keywords_of_generate_that_ask_for_what_is_done_anyway_are_taken():
    config = GRPOConfig(output_dir="x", use_cpu=True, generation_kwargs={"do_sample": True, "top_k": 50, "length_penalty": -0.1})
    assert config.sampling(()).top_k == 50
    with pytest.raises(UserError, match="do_sample=False is not built"):
        GRPOConfig(output_dir="x", use_cpu=True, generation_kwargs={"do_sample": False})


def test_cispo_without_a_cap_of_its_own_takes_epsilon(caplog):
    GRPOConfig(output_dir="x", use_cpu=True, loss_type="cispo")
    assert "weights are capped at epsilon=0.2" in caplog.text


def test_defaults_are_those_users_know():
    config = GRPOConfig(output_dir="x", use_cpu=True)
    own = {name: value for name, value in BROUGHT_ALONG.items() if name in config.__dataclass_fields__}
    resolved = {"steps_per_generation": 1, "generation_batch_size": 8}
    assert {name: getattr(config, name) for name in own} == own | resolved


def test_an_unknown_setting_names_the_nearest_one():
    with pytest.raises(UserError, match="Did you mean 'num_generations'"):
        GRPOConfig(output_dir="x", num_generation=4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_generations": 1}, "2 or more"),
        ({"loss_type": "gspo", "importance_sampling_level": "token"}, "gspo"),
        ({"loss_type": "grop"}, "Did you mean 'grpo'"),
        ({"scale_rewards": "groups"}, "scale_rewards"),
        ({"num_generations": 3}, "do not divide"),
        ({"generation_batch_size": 16, "steps_per_generation": 3}, "two names"),
        ({"temperature": 0.0}, "greedy"),
        ({"sync_ref_model": True}, "beta"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter"),
        ({"num_iterations": 0}, "num_iterations=0: set it to 1"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps=0"),
        ({"generation_batch_size": 0}, "generation_batch_size=0"),
        ({"max_tool_calling_iterations": -1}, "max_tool_calling_iterations=-1"),
        ({"beta": -0.1}, "away from its reference"),
        ({"kl_estimator": "k1_in_reward", "multi_objective_aggregation": "normalize_then_sum"}, "its own deviation"),
        ({"neftune_noise_alpha": 5.0}, "no effect: only SFT"),
        ({"label_smoothing_factor": 0.1}, "no effect: only SFT"),
        ({"train_sampling_strategy": "sequential"}, "shuffle_dataset"),
        ({"generation_kwargs": {"temprature": 1}}, "Did you mean 'temperature'"),
        ({"generation_kwargs": {"temperature": 0}}, "greedy"),
        ({"generation_kwargs": {"max_new_tokens": 0}}, "1 or more"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile"),
    ],
)
def test_conflicts_are_refused_in_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        GRPOConfig(output_dir="x", use_cpu=True, **settings)


def test_stop_tokens_of_ones_own_stand_beside_the_models():
    config = GRPOConfig(output_dir="x", use_cpu=True, generation_kwargs={"stop_token_ids": [7, 2]})
    assert config.sampling((2, 3)).stop_token_ids == (2, 3, 7)


def test_gspo_is_the_sequence_level():
    assert GRPOConfig(output_dir="x", loss_type="gspo", use_cpu=True).importance_sampling_level == "sequence"


def test_true_and_false_scale_rewards_mean_group_and_none():
    assert GRPOConfig(output_dir="x", scale_rewards=True, use_cpu=True).scale_rewards == "group"
    assert GRPOConfig(output_dir="x", scale_rewards=False, use_cpu=True).scale_rewards == "none"


def test_batch_counts_completions():
    config = GRPOConfig(output_dir="x", use_cpu=True, per_device_train_batch_size=8, gradient_accumulation_steps=4, num_generations=16)
    assert (config.steps_per_generation, config.generation_batch_size, config.prompts_per_generation) == (4, 32, 2)
    assert config.on_policy
    assert not GRPOConfig(output_dir="x", use_cpu=True, steps_per_generation=2).on_policy
