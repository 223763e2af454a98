"""Plans against posttrain's own step on tensors that hold nothing. benchmarks/plan_accuracy.py has many more of these."""

import pytest
from transformers import AutoConfig

from posttrain.memory import TrainingJob, plan, shape_of
from posttrain.memory.known import KNOWN
from posttrain.memory.simulate import simulate_step

WITHIN = 0.10
LORA = {"lora_r": 32, "dtype": "bfloat16"}
QLORA = LORA | {"adapter_dtype": "bfloat16", "load_in_4bit": True}
FUSED = {"attention": "fused"}
CASES = {
    "llama full": ("llama-3.2-1b", FUSED | {"optim": "adamw_8bit"}),
    "qwen2 lora": ("qwen2.5-1.5b", LORA),
    "qwen3 qlora": ("qwen3-4b", QLORA | FUSED),
    "phi qlora, all switches": ("phi-4", QLORA | FUSED | {"tile_rows": 512, "activation_offloading": True}),
    "gemma lora": ("gemma-3-1b", LORA | FUSED),
    "llama lora without checkpoints": ("llama-3.1-8b", LORA | FUSED | {"gradient_checkpointing": False}),
    "llama full on a cpu": ("llama-3.2-1b", {"device": "cpu", "bf16": False, "optim": "adamw_8bit"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_within_a_tenth_of_the_simulated_step(case):
    name, settings = CASES[case]
    config = {**KNOWN[name], "num_hidden_layers": 7 if name.startswith("gemma") else 4}
    job = TrainingJob(shape_of(config, name), 256, 3000, generations=1, rollout_size=2, **{"gradient_checkpointing": True} | settings)
    simulated = simulate_step(AutoConfig.for_model(config.pop("model_type"), **config), job)
    found = plan(job)
    assert found.train_peak - found.training["holes"] - found.training["context"] == pytest.approx(simulated.device, rel=WITHIN)
    assert found.above == pytest.approx(simulated.above, rel=WITHIN)
    assert found.host["checkpoints_host"] == pytest.approx(simulated.host, rel=WITHIN)
