"""Small things that tests and the programs they start share: a character tokenizer, a tiny model, a reward with signal."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def build_tokenizer():
    vocabulary = {token: index for index, token in enumerate(["<end>", *"0123456789+="])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


def build_model(tokenizer, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    return Qwen3ForCausalLM(Qwen3Config(**sizes | changes))


def build_float64_model(tokenizer, seed=0):
    """GPT-2, since nothing inside it rounds to float32; no dropout, so that old log-probs are those of the update."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 0, "bos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).double()


def many_ones(completions, **kwargs):
    """Some signal from the first step on: the share of the digit 1, and a little for length so that few rewards are equal."""
    return [text.count("1") / 4 + len(text) / 100 for text in completions]


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
