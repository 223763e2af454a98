"""What the tests of DPO, KTO, ORPO and CPO share: pairs of small numbers, and one way to start each trainer."""

from small import build_float64_model, build_model, build_tokenizer

from posttrain import CPOConfig, CPOTrainer, DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, ORPOConfig, ORPOTrainer

TRAINERS = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig), "orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig)}

# Prompts and completions of many lengths, one prompt twice.
PAIRS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "3+4"},
    {"prompt": "12+30=", "chosen": "42", "rejected": "4"},
    {"prompt": "7=", "chosen": "7+0+0", "rejected": "1"},
    {"prompt": "1+1=", "chosen": "02", "rejected": "11"},
    {"prompt": "9+9+9=", "chosen": "27", "rejected": "999"},
    {"prompt": "5=", "chosen": "5", "rejected": "4+2"},
]


def start(kind, output_dir, *, model=None, rows=PAIRS, float64=False, trainer=None, **settings):
    """A trainer of that kind on a tiny model."""
    tokenizer = build_tokenizer()
    if model is None:
        model = build_float64_model(tokenizer) if float64 else build_model(tokenizer)
    base = {
        "output_dir": str(output_dir), "per_device_train_batch_size": 6, "max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "save_strategy": "no", "use_cpu": True, "seed": 3, "max_length": 64,
    }  # fmt: skip
    trainer_class, config = TRAINERS[kind]
    return trainer_class(model, args=config(**base | settings), train_dataset=rows, processing_class=tokenizer, **(trainer or {}))
