"""The terms of a plan: against real tensors where they are few, and by what must not change them."""

import pytest
import torch
from small import build_model, build_tokenizer

from posttrain.errors import UserError
from posttrain.memory import TrainingJob, find_shape, plan, shape_of
from posttrain.memory.estimate import CPU_HOLES, capacity
from posttrain.memory.job import OPTIMIZERS
from posttrain.rollout.local.cache import Slab
from posttrain.rollout.local.engine import LocalEngine
from posttrain.sizes import nf4_bytes
from posttrain.types import Request, Sampling

SHAPE = find_shape("qwen3-0.6b")
FRUGAL = {"lora_r": 16, "load_in_4bit": True, "dtype": "bfloat16", "adapter_dtype": "bfloat16", "gradient_checkpointing": True}


def small_shape(**changes):
    model = build_model(build_tokenizer(), **changes)
    return model, shape_of(model.config.to_dict(), "small")


@pytest.mark.parametrize("settings", [{}, FRUGAL, FRUGAL | {"activation_offloading": True, "tile_rows": 512}, {"lora_r": 8, "device": "cpu"}])
def test_the_terms_of_a_phase_add_up_to_its_peak(settings):
    found = plan(TrainingJob(SHAPE, 100, 2000, **settings))
    answer = found.as_json()
    assert sum(answer["training"].values()) == answer["train_peak"]
    assert sum(answer["rollout"].values()) == answer["rollout_peak"]
    assert answer["peak"] == max(answer["train_peak"], answer["rollout_peak"])
    assert all(isinstance(size, int) and size >= 0 for phase in ("training", "rollout", "host") for size in answer[phase].values())


def test_names_of_terms_do_not_depend_on_the_settings():
    one, other = (plan(TrainingJob(SHAPE, 100, 2000, **settings)).as_json() for settings in ({}, FRUGAL))
    assert [list(one[phase]) for phase in ("training", "rollout", "host")] == [list(other[phase]) for phase in ("training", "rollout", "host")]


@pytest.mark.parametrize("size", [(64, 64), (896, 4864), (100, 33)])
def test_four_bit_weights_have_the_bytes_of_bitsandbytes(size):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(size), quant_type="nf4", compress_statistics=True)
    kept = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert nf4_bytes(size[0] * size[1]) == sum(tensor.nbytes for tensor in kept)


def test_weights_gradients_and_optimizer_have_the_bytes_of_a_real_step():
    model, shape = small_shape()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    job = TrainingJob(shape, 2, 2, generations=2, bf16=False, device="cpu")
    found = plan(job).training
    parameters = list(model.parameters())
    assert found["weights"] == sum(parameter.nbytes for parameter in parameters)
    assert job.gradient_bytes == sum(parameter.grad.nbytes for parameter in parameters)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert found["optimizer"] == sum(moment.nbytes for moment in moments)


def test_8_bit_optimizers_keep_the_state_of_embeddings_in_32_bits():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, shape = small_shape(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=2048)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(model.get_input_embeddings(), "weight", {"optim_bits": 32})  # as transformers' Trainer does
    manager.register_parameters(model.parameters())
    optimizer.check_overrides()
    held = 0
    for place, parameter in enumerate(optimizer.param_groups[0]["params"]):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, place)
        held += sum(optimizer.state[parameter][name].nbytes for name in ("state1", "state2"))
    manager.initialize()  # it is the process's, and would remember parameters by addresses that others get
    found = plan(TrainingJob(shape, 2, 2, generations=2, optim="adamw_8bit", bf16=False, device="cpu")).training
    assert found["optimizer"] == pytest.approx(held, rel=0.01)


def test_torch_keeps_the_optimizer_in_the_dtype_of_the_weights():
    weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], fused=False)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    (state,) = optimizer.state.values()
    assert state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes == OPTIMIZERS["adamw_torch"][1] * 64


@pytest.mark.parametrize(("prompts", "completions", "new_tokens"), [(1, 3, 5), (2, 4, 70), (3, 2, 135)])
def test_the_cache_of_a_rollout_has_the_bytes_of_the_real_one(prompts, completions, new_tokens):
    model, shape = small_shape(max_position_embeddings=512)
    lengths = 9
    engine = LocalEngine()
    most = 0
    with engine.serving(model, 0):
        for number in range(prompts * completions):
            prompt = (1 + number // completions,) * lengths
            engine.submit(Request(number, prompt, Sampling(max_new_tokens=new_tokens), key=(number,)))
        while engine._rollout.scheduler.rows or engine._rollout.scheduler.waiting:
            engine.step()
            most = max(most, engine._rollout.cache.nbytes)
    job = TrainingJob(shape, lengths, new_tokens, generations=completions, rollout_size=prompts * completions, bf16=False, device="cpu")
    found = plan(job).rollout
    assert found["kv_prompts"] + found["kv_completions"] == most


@pytest.mark.parametrize("needed", [1, 2, 3, 63, 64, 65, 1000, 20480])
def test_room_in_the_cache_is_made_as_slabs_make_it(needed):
    slab = Slab()
    slab.reserve(needed, needed)
    assert (capacity(needed, 1), capacity(needed, 64)) == (slab.rows, slab.tokens)


def test_gradients_are_all_there_where_an_update_has_several_micro_batches():
    job = TrainingJob(SHAPE, 100, 900, generations=8, max_tokens_per_micro_batch=1000)
    assert job.micro_batches == 8
    assert plan(job).training["gradients"] == job.gradient_bytes == SHAPE.parameters * 4
    alone = job.but(generations=1, gradient_checkpointing=True)
    assert alone.micro_batches == 1
    assert plan(alone).training["gradients"] < job.gradient_bytes


def test_training_does_not_depend_on_the_number_of_completions():
    peaks = {plan(TrainingJob(SHAPE, 100, 8000, generations=generations, **FRUGAL)).train_peak for generations in (2, 8, 64)}
    assert len(peaks) == 1


def test_a_word_more_costs_its_embedding_and_no_logits():
    small, large = (shape_of({**_config(), "vocab_size": vocab}, "x") for vocab in (100_000, 200_000))
    job = TrainingJob(small, 100, 8000, **FRUGAL)
    assert plan(job.but(shape=large)).train_peak - plan(job).train_peak == 100_000 * small.hidden * 2  # tied


def test_offloading_moves_checkpoints_to_the_host():
    job = TrainingJob(SHAPE, 480, 20000, **FRUGAL)
    there, away = plan(job), plan(job.but(activation_offloading=True))
    checkpoint = 20480 * SHAPE.hidden * 2
    assert there.training["checkpoints"] >= SHAPE.layers * checkpoint
    assert away.training["checkpoints"] <= 3 * checkpoint
    assert away.host["checkpoints_host"] >= SHAPE.layers * checkpoint
    assert there.host["checkpoints_host"] == 0


def test_on_a_cpu_there_is_no_other_memory_to_offload_to():
    job = TrainingJob(SHAPE, 480, 2000, device="cpu", **FRUGAL)
    assert plan(job).as_json() == plan(job.but(activation_offloading=True)).as_json()


def test_checkpointing_keeps_one_tensor_a_layer():
    job = TrainingJob(SHAPE, 480, 8000, gradient_checkpointing=True, lora_r=16, dtype="bfloat16")
    assert plan(job).training["checkpoints"] == (SHAPE.layers) * 8480 * SHAPE.hidden * 2


def test_paged_optimizers_live_on_the_host():
    job = TrainingJob(SHAPE, 100, 1000)
    paged = plan(job.but(optim="paged_adamw_32bit"))
    assert paged.training["optimizer"] == 0
    assert paged.host["optimizer_host"] == plan(job).training["optimizer"]


def test_a_plain_optimizer_step_on_a_gpu_has_a_copy_of_all_weights():
    job = TrainingJob(SHAPE, 16, 16, generations=1, gradient_checkpointing=True, optim="adamw_torch")
    found = plan(job).training
    assert found["optimizer_step"] == found["gradients"] == SHAPE.parameters * 4
    assert plan(job.but(optim="adamw_torch_fused")).training["optimizer_step"] == 0


def test_a_frozen_copy_beside_adapters_is_not_needed():
    assert plan(TrainingJob(SHAPE, 100, 1000, has_reference=True)).training["reference"] == SHAPE.parameters * 4
    assert plan(TrainingJob(SHAPE, 100, 1000, has_reference=True, lora_r=8)).training["reference"] == 0


def test_what_is_not_sampled_has_no_rollout():
    assert plan(TrainingJob(SHAPE, 100, 1000, is_online=False)).rollout_peak == 0


def test_rows_share_a_micro_batch_up_to_its_budget():
    job = TrainingJob(SHAPE, 100, 900, generations=8, max_tokens_per_micro_batch=4096)
    assert job.streams == (100 + 4 * 900, 4 * 900)
    assert job.but(max_tokens_per_micro_batch=500).streams == (1000, 900)
    assert job.but(max_tokens_per_micro_batch=500, keeps_groups=True).streams == (100 + 8 * 900, 8 * 900)
    assert job.but(prompt_length=10, completion_length=90, rollout_size=64, max_tokens_per_micro_batch=3000).streams == (4 * 730, 4 * 720)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"load_in_4bit": True}, "lora-r"),
        ({"optim": "adamw_torhc"}, "Did you mean 'adamw_torch'"),
        ({"dtype": "int8"}, "float32, bfloat16"),
        ({"completion_length": 0}, "use 1 or more"),
    ],
)
def test_a_job_that_cannot_be_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        TrainingJob(**{"shape": SHAPE, "prompt_length": 1, "completion_length": 1} | changes)


def _config():
    from posttrain.memory.known import KNOWN

    return KNOWN["qwen3-0.6b"]


def test_a_cpu_keeps_holes_and_a_gpu_does_not():
    on_gpu, on_cpu = (plan(TrainingJob(SHAPE, 100, 1000, lora_r=8, bf16=False, device=device)) for device in ("cuda", "cpu"))
    assert on_gpu.training["holes"] == 0
    assert on_cpu.training["holes"] == int(CPU_HOLES * on_cpu.above)
    assert on_cpu.train_peak == sum(on_cpu.training.values())
