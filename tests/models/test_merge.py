"""Adapters in and out: whatever the adapter, the merged, exported and reloaded model says what was trained; what cannot be loaded again is refused."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import build_model, build_tokenizer
from transformers import AutoModelForCausalLM

from posttrain import SFTConfig, SFTTrainer, load_policy
from posttrain.errors import TrainingError, UserError
from posttrain.export import export_model
from posttrain.models.adapters import add_lora
from posttrain.models.merge import load_merged, load_trainable, merge_adapters

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
ROWS = [{"prompt": f"{a}+1=", "completion": str(a)} for a in range(8)]


@torch.no_grad()
def say(model, ids=IDS):
    return model.eval()(input_ids=ids).logits.float().log_softmax(-1)


def save_base(folder, **changes):
    tokenizer = build_tokenizer()
    build_model(tokenizer, **changes).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return str(folder / "base")


def train(model, folder, **lora):
    args = SFTConfig(output_dir=str(folder / "run"), use_cpu=True, save_strategy="no", learning_rate=3e-2, max_steps=3, per_device_train_batch_size=4)
    peft_config = LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | lora)
    trainer = SFTTrainer(model, args, train_dataset=ROWS, peft_config=peft_config)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return say(trainer.model)


@pytest.mark.parametrize(
    ("tied", "lora", "stays_tied"),
    [
        (True, {"target_modules": ["q_proj", "embed_tokens"]}, False),
        (False, {"target_modules": ["q_proj", "embed_tokens"]}, False),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        (False, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, False),
        (True, {"target_modules": ["q_proj"], "use_dora": True}, True),
        (False, {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}}, False),
    ],
    ids=["embedding, tied", "embedding", "whole embedding, tied", "whole head, tied", "tokens", "dora, tied", "rslora"],
)
def test_merged_and_exported_say_what_was_trained(tmp_path, tied, lora, stays_tied):
    trained = train(save_base(tmp_path, tie_word_embeddings=tied), tmp_path, **lora)
    adapter, out = str(tmp_path / "adapter"), tmp_path / "out"
    assert torch.allclose(say(load_merged(adapter)), trained, atol=1e-4)
    export_model(adapter, out, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(say(plain), trained, atol=1e-4)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == stays_tied


def test_new_tokens_and_resized_embeddings_come_back_with_their_adapters(tmp_path):
    base, tokenizer = save_base(tmp_path), build_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    for resized in (len(tokenizer), 10):  # more rows, and fewer
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(resized)
        adapted = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
        )
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(len(name))
                parameter.data.normal_(0, 0.2)
        ids = torch.tensor([[1, 2, min(resized, 9) - 1]])
        trained = say(adapted, ids)
        adapted.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
        for loaded in (load_trainable(str(tmp_path / "adapter")), load_merged(str(tmp_path / "adapter"))):
            assert loaded.get_input_embeddings().weight.shape[0] == resized
            assert torch.allclose(say(loaded, ids), trained, atol=1e-5)
    assert load_policy(str(tmp_path / "adapter")).model.get_input_embeddings().weight.shape[0] == 10


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", "orthogonal", True])
def test_an_initialisation_that_changes_the_base_is_made_again(tmp_path, init):
    trained = train(save_base(tmp_path), tmp_path, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    for loaded in (load_policy(str(tmp_path / "adapter")).model, load_merged(str(tmp_path / "adapter"))):
        assert torch.allclose(say(loaded), trained, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "eva"])
def test_an_initialisation_that_nobody_can_make_again_is_refused(tmp_path, init):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.init_lora_weights = init
    with pytest.raises(UserError, match=f"init_lora_weights='{init}'"):
        add_lora(build_model(build_tokenizer()), config)
    if init == "eva":
        return  # weights like others, once they are there
    adapted = get_peft_model(build_model(build_tokenizer()), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].init_lora_weights = init
    with pytest.raises(UserError, match=f"init_lora_weights='{init}'"):
        SFTTrainer(adapted, SFTConfig(output_dir=str(tmp_path), use_cpu=True), train_dataset=ROWS, processing_class=build_tokenizer())
    save_base(tmp_path)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    for load in (load_policy, load_merged):
        with pytest.raises(UserError, match=f"init_lora_weights='{init}'"):
            load(str(tmp_path / "adapter"))


def test_a_merge_in_16_bits_is_summed_in_float32_and_rounded_once(tmp_path):
    """Against W + s B A in float64. Summed in bfloat16, small products would vanish one by one."""
    base = build_model(build_tokenizer()).to(torch.bfloat16)
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().double()
    adapted = add_lora(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    module = adapted.base_model.model.model.layers[0].self_attn.q_proj
    torch.manual_seed(0)
    module.lora_B["default"].weight.data.normal_(0, 0.002)
    exact = weight + 2 * module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
    merged = merge_adapters(adapted).model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.float32
    assert torch.allclose(merged.double(), exact, atol=1e-7, rtol=1e-6)
    assert torch.equal(merged.to(torch.bfloat16), exact.to(torch.bfloat16))


def test_a_merge_that_says_something_else_is_an_error(tmp_path, monkeypatch):
    adapted = add_lora(build_model(build_tokenizer()), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    whole = adapted.merge_and_unload

    def wrong(**kwargs):
        merged = whole(**kwargs)
        merged.lm_head.weight.data *= 20
        return merged

    monkeypatch.setattr(adapted, "merge_and_unload", wrong, raising=False)
    with pytest.raises(TrainingError, match="merged model says something else"):
        merge_adapters(adapted)


def test_files_of_adapters_that_are_damaged_or_belong_elsewhere_are_a_sentence(tmp_path):
    train(save_base(tmp_path), tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read"):
        load_policy(str(tmp_path / "adapter"))
    file.write_bytes(whole)
    build_model(build_tokenizer(), hidden_size=16).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="do not go onto"):
        load_policy(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json is damaged"):
        load_policy(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"target_modules": ["q_proj", "vproj"]}, "target_modules: the model has no module 'vproj'. Did you mean 'v_proj'?"),
        ({"target_modules": "q_proj"}, r"is text, so it must match a module's whole path; give a list: \[q_proj\]"),
        ({"target_modules": ".*attention"}, "matches no module of the model"),
        ({"target_modules": "*"}, "is not a regular expression"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_token"]}, "modules_to_save: the model has no module 'embed_token'. Did you mean 'embed_tokens'?"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["kproj"]}, "exclude_modules: the model has no module 'kproj'. Did you mean 'k_proj'?"),
        ({"target_modules": ["self_attn"]}, "peft_config does not go onto this model: Target module"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "peft_config does not go onto this model"),
    ],
)  # fmt: skip
def test_layers_that_the_model_does_not_have_are_named_with_the_nearest(lora, sentence):
    with pytest.raises(UserError, match=sentence):
        add_lora(build_model(build_tokenizer()), LoraConfig(r=2, task_type="CAUSAL_LM", **lora))


def test_the_command_line_says_it_in_a_sentence(tmp_path):
    from typer.testing import CliRunner

    from posttrain.cli.main import app

    base = save_base(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "r.yaml").write_text(f"model: {{name: {base}, lora: {{r: 2}}}}\ndata: {{train: rows.jsonl}}\nsft: {{max_steps: 1, use_cpu: true}}\n")
    for override, sentence in (
        ("--model.lora.target_modules=[qproj]", "has no module 'qproj'. Did you mean 'q_proj'?"),
        ("--model.lora.target_modules=[embed_tokens,qproj]", "has no module 'qproj'"),
        ("--model.lora.target_modules=q_proj", "give a list: [q_proj]"),
        ("--model.lora.r=0", "`r` should be a positive integer"),
    ):
        result = CliRunner().invoke(app, ["sft", str(tmp_path / "r.yaml"), f"--sft.output_dir={tmp_path}/run", override])
        assert (result.exit_code, type(result.exception)) == (2, SystemExit), result.output
        assert sentence in " ".join(result.output.split()), result.output


def test_attention_that_names_code_on_the_hub_is_never_fetched(tmp_path, caplog):
    from posttrain.models.load import load_model

    caplog.set_level(logging.WARNING)
    base = save_base(tmp_path)
    expected = say(load_model(base))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | {key: "kernels-community/flash-attn"}))
        assert torch.equal(say(load_model(base)), expected)
    assert "names the attention kernel 'kernels-community/flash-attn'" in caplog.text
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    for keywords in ({"attn_implementation": "org/kernel"}, {"use_kernels": True}):
        with pytest.raises(UserError, match=next(iter(keywords))):
            load_model(base, **keywords)
    assert torch.equal(say(load_model(base, attn_implementation="flash_attention_2")), expected)
