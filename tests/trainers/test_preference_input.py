"""Bad input to DPO, KTO, ORPO and CPO is a sentence before any training; familiar names are accepted or refused with a reason."""

import pytest
from small import build_model, build_tokenizer
from small_preferences import PAIRS, TRAINERS, start

from posttrain import CPOConfig, DPOConfig, KTOConfig, ORPOConfig
from posttrain.errors import UserError

MESSAGES = [{"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        ("dpo", [], "no rows"),
        ("dpo", [{"prompt": "1=", "completion": "1"}], r"DPO needs rows with the columns \(prompt, chosen, rejected\)"),
        ("dpo", [*PAIRS, {"prompt": "1=", "chosen": MESSAGES, "rejected": "1"}], "row 6: column `chosen` holds messages, `rejected` holds text"),
        ("dpo", [*PAIRS, {"prompt": "1=", "chosen": "1", "rejected": ""}], "row 6: its rejected is empty"),
        ("dpo", [PAIRS[0] | {"id": 1}, PAIRS[1] | {"id": 1}], "row 1 has the id 1, which row 0 has too"),
        ("dpo", [*PAIRS, {"prompt": "1" * 64, "chosen": "1", "rejected": "2"}], "row 6: its prompt has 64 tokens, which leaves no room"),
        ("orpo", [{"chosen": "12"}], "rejected"),
        ("kto", [{"prompt": "1=", "completion": "1", "label": "yes"}], "row 0: its label is 'yes'"),
        ("kto", [{"prompt": "1=", "completion": "1", "label": True}], "only one row"),
        ("kto", [{"prompt": "1=", "completion": "1"}], "label"),
        ("cpo", [{"prompt": MESSAGES[:0], "chosen": MESSAGES, "rejected": MESSAGES}], "its prompt is empty"),
    ],
)
def test_rows_that_cannot_work_are_a_sentence(tmp_path, kind, rows, words):
    with pytest.raises(UserError, match=words):
        start(kind, tmp_path, rows=rows)


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (DPOConfig, {"loss_type": "sigmiod"}, "Did you mean 'sigmoid'"),
        (DPOConfig, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "give one weight a loss"),
        (DPOConfig, {"loss_type": []}, "name one loss"),
        (DPOConfig, {"loss_type": "exo_pair"}, "label_smoothing above 0"),
        (DPOConfig, {"loss_type": "hinge", "label_smoothing": 0.1}, "not read by hinge"),
        (DPOConfig, {"loss_type": "apo_zero", "f_divergence_type": "js_divergence"}, "not read by apo_zero"),
        (DPOConfig, {"f_alpha_divergence_coef": 0.7}, "alpha_divergence"),
        (DPOConfig, {"f_divergence_type": "kl"}, "f_divergence_type 'kl' is unknown"),
        (DPOConfig, {"discopop_tau": 0.1}, "discopop"),
        (DPOConfig, {"loss_type": "robust", "label_smoothing": 0.5}, "less than 0.5"),
        (DPOConfig, {"beta": 0.0}, "above 0"),
        (DPOConfig, {"ld_alpha": 1.5}, "from 0 to 1"),
        (DPOConfig, {"sync_ref_model": True, "precompute_ref_log_probs": True}, "use one of them"),
        (DPOConfig, {"rpo_alpha": 0.5}, "loss_weights"),
        (DPOConfig, {"reference_free": True}, "CPOTrainer"),
        (DPOConfig, {"los_type": "sigmoid"}, "Did you mean 'loss_type'"),
        (KTOConfig, {"loss_type": "bco"}, "kto, apo_zero_unpaired"),
        (KTOConfig, {"desirable_weight": -1.0}, "0 or more"),
        (CPOConfig, {"loss_type": "hinge", "label_smoothing": 0.1}, "not read by hinge"),
        (CPOConfig, {"simpo_gamma": 1.0}, "only by simpo"),
    ],
)
def test_settings_that_cannot_work_are_a_sentence(config, settings, words):
    with pytest.raises(UserError, match=words):
        config(output_dir="x", use_cpu=True, **settings)


def test_a_stale_reference_on_disk_is_refused_and_kept(tmp_path):
    start("dpo", tmp_path, precompute_ref_log_probs=True, max_steps=1).train()
    file = tmp_path / "reference.safetensors"
    whole = file.read_bytes()
    cases = [
        ({"rows": PAIRS[:5]}, "of other data;"),
        ({"model": build_model(build_tokenizer(), seed=1)}, "of other weights;"),
        ({"ld_alpha": 0.5}, "of other settings;"),
    ]
    for changes, words in cases:
        with pytest.raises(UserError, match=words):
            start("dpo", tmp_path, precompute_ref_log_probs=True, max_steps=1, **changes).train()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        start("dpo", tmp_path, precompute_ref_log_probs=True, max_steps=1).train()


def test_a_reference_computed_ahead_cannot_judge_new_rows(tmp_path):
    trainer = start("dpo", tmp_path, precompute_ref_log_probs=True, max_steps=1)
    trainer.train()
    with pytest.raises(UserError, match="only the eval_dataset that was given"):
        trainer.evaluate(PAIRS[:2])


def test_references_that_cannot_work_are_a_sentence(tmp_path):
    from peft import LoraConfig

    model = build_model(build_tokenizer())
    with pytest.raises(UserError, match="the very model that is trained"):
        start("dpo", tmp_path, model=model, trainer={"ref_model": model})
    with pytest.raises(UserError, match="cannot move"):
        start("kto", tmp_path, sync_ref_model=True, trainer={"peft_config": LoraConfig(r=2, target_modules="all-linear")})
    with pytest.raises(UserError, match="share one tokenizer"):
        start("dpo", tmp_path, trainer={"ref_model": build_model(build_tokenizer(), vocab_size=5)})


@pytest.mark.parametrize("name", ["data_collator", "compute_metrics"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_arguments_that_have_no_place_here_are_refused(tmp_path, kind, name):
    with pytest.raises(UserError, match=name):
        start(kind, tmp_path, trainer={name: lambda rows: rows})


# Every own field of the configs that users bring along, at the value that is its default there.
COMMON = {
    "learning_rate": 1e-6, "model_init_kwargs": None, "trust_remote_code": False, "router_aux_loss_coef": None, "disable_dropout": True,
    "dataset_num_proc": None, "max_length": 1024, "pad_to_multiple_of": "auto", "activation_offloading": False, "beta": 0.1,
}  # fmt: skip
REFERENCE = {
    "precompute_ref_log_probs": False, "precompute_ref_batch_size": None, "sync_ref_model": False, "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
}  # fmt: skip
EXPERIMENTAL = {"max_completion_length": None, "padding_value": None, "generate_during_eval": False, "is_encoder_decoder": None}
BROUGHT_ALONG = {
    DPOConfig: COMMON | REFERENCE | {
        "truncation_mode": "keep_start", "padding_free": False, "loss_type": ["sigmoid"], "loss_weights": None, "ld_alpha": None,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "label_smoothing": 0.0, "use_weighting": False, "discopop_tau": 0.05,
        "pad_token": None,
    },
    KTOConfig: COMMON | REFERENCE | {"loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0},
    ORPOConfig: COMMON | EXPERIMENTAL,
    CPOConfig: COMMON | EXPERIMENTAL | {"label_smoothing": 0.0, "loss_type": "sigmoid", "cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("config", BROUGHT_ALONG, ids=lambda config: config.__name__)
def test_every_known_name_is_accepted_at_its_default(config):
    held = config(output_dir="x", use_cpu=True, **BROUGHT_ALONG[config])
    plain = config(output_dir="x", use_cpu=True)
    chosen_here = {"activation_offloading": "auto"}  # where memory is short; off when it is spelled out
    assert held.activation_offloading is False
    own = {name: value for name, value in (BROUGHT_ALONG[config] | chosen_here).items() if name in held.__dataclass_fields__}
    assert {name: getattr(plain, name) for name in own} == own, "our defaults are those that users know"


@pytest.mark.parametrize("name", sorted(DPOConfig.refused))
def test_a_refused_name_says_why(name):
    harmless = DPOConfig.refused[name][0]
    with pytest.raises(UserError, match=name) as caught:
        DPOConfig(output_dir="x", use_cpu=True, **{name: not harmless if isinstance(harmless, bool) else "something else"})
    assert len(str(caught.value)) > len(name) + 20


def test_what_has_nothing_to_set_is_accepted_with_a_line(caplog):
    config = DPOConfig(output_dir="x", use_cpu=True, padding_free=True, pad_token="<pad>", precompute_ref_batch_size=4, dataset_num_proc=2)
    assert config.precompute_ref_batch_size == 4
    assert "padding_free=True, pad_token='<pad>': nothing to set here, since streams have no padding" in caplog.messages
    assert len(caplog.messages) == 3


def test_alphapo_is_simpo_without_the_nll():
    config = CPOConfig(output_dir="x", use_cpu=True, loss_type="alphapo", alpha=0.25)
    assert (config.loss_type, config.cpo_alpha) == ("simpo", 0.0)
