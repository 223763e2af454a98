import pytest
import torch
from safetensors.torch import load_file, save_file
from small import build_model, build_tokenizer

from posttrain.errors import UserError
from posttrain.models.load import is_quantised, load_model
from posttrain.models.quantise import in_4bit, names_to_keep, worst_in_4bit

pytest.importorskip("bitsandbytes")
LINEARS = 14
Q_PROJ = 64 * 64
FURTHER = 2 - 0.5 - 1 / 64  # bytes of a weight


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model with one linear that 4 bits hurt: a few huge weights leave the others of their blocks no levels."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    hurt = weights["model.layers.1.self_attn.q_proj.weight"]
    hurt.view(-1)[::64] = 1.0
    hurt.view(-1)[1::2] += 0.06
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_the_linear_that_loses_most_is_kept_first(directory):
    assert worst_in_4bit(directory, int(Q_PROJ * FURTHER)) == ["model.layers.1.self_attn.q_proj"]


def test_the_budget_is_kept_to(directory):
    assert worst_in_4bit(directory, 100) == []
    assert len(worst_in_4bit(directory, 10**9)) == LINEARS
    kept = worst_in_4bit(directory, 20_000)
    sizes = {key.removesuffix(".weight"): value.numel() for key, value in load_file(directory / "model.safetensors").items()}
    assert 0 < sum(sizes[name] for name in kept) * FURTHER <= 20_000


def test_what_is_kept_is_not_quantised_and_nothing_else(directory):
    model = load_model(str(directory), **in_4bit(str(directory), has_adapters=True, keep_in_16bit=int(Q_PROJ * FURTHER)))
    packed = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    assert "model.layers.1.self_attn.q_proj.weight" not in packed
    assert len(packed) == LINEARS - 1
    assert model.lm_head.weight.is_floating_point()
    assert is_quantised(model)
    assert not is_quantised(load_model(str(directory)))


def test_packed_weights_are_the_same_after_an_evaluation_and_after_they_were_saved(directory):
    model = load_model(str(directory), **in_4bit(str(directory), has_adapters=True)).train()
    ids = torch.tensor([[1, 2, 3, 4]])

    def says():
        with torch.enable_grad():
            return model.train()(ids).logits.detach()

    before, packed = says(), {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, before)
    assert torch.equal(says(), before)
    model.state_dict()
    assert torch.equal(says(), before)
    assert all(torch.equal(parameter, packed[name]) for name, parameter in model.named_parameters())


def test_names_are_taken_as_they_are(directory):
    assert names_to_keep(str(directory), ["a", "b"]) == ["a", "b"]
    assert names_to_keep(str(directory), None) == names_to_keep(str(directory), 0) == []


def test_what_cannot_be_judged_is_a_sentence(directory, tmp_path):
    with pytest.raises(UserError, match="there are no safetensors"):
        worst_in_4bit(tmp_path, 10)
    load_model(str(directory), **in_4bit(str(directory), has_adapters=True)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="quantised already"):
        worst_in_4bit(tmp_path, 10)
    with pytest.raises(UserError, match="in bytes"):
        names_to_keep(str(directory), -1)
