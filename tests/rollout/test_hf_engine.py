import pytest
import torch

from posttrain.rollout.hf import HFEngine
from posttrain.rollout.local.engine import LocalEngine
from posttrain.types import StopReason


class Numbers:
    """A tokenizer whose tokens read as numbers: token 12 is '<12>'."""

    def decode(self, token_ids, skip_special_tokens=False):
        return "".join(f"<{token}>" for token in token_ids)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_oracle_and_the_local_engine_agree_when_greedy(family, tiny, prompts, complete, requests_for):
    model = tiny(family)
    requests = requests_for(prompts, temperature=0.0)
    slow, _ = complete(HFEngine(), model, requests)
    fast, _ = complete(LocalEngine(), model, requests)
    for i in slow:
        assert slow[i].token_ids == fast[i].token_ids
        assert torch.allclose(torch.tensor(slow[i].logps), torch.tensor(fast[i].logps), atol=1e-4)
        assert (slow[i].stop, slow[i].policy_version) == (fast[i].stop, 7)


def test_the_oracle_stops_each_row_by_itself(tiny, prompts, complete, requests_for):
    model = tiny()
    free, _ = complete(HFEngine(), model, requests_for(prompts, temperature=0.0))
    stop = free[1].token_ids[4]
    done, _ = complete(HFEngine(), model, requests_for(prompts, temperature=0.0, stop_token_ids=(stop,)))
    for i in free:
        expected = free[i].token_ids
        cut = expected.index(stop) + 1 if stop in expected else len(expected)
        assert done[i].token_ids == expected[:cut]
        assert done[i].stop is (StopReason.STOP if stop in expected else StopReason.LENGTH)


def test_the_oracle_reports_both_log_probs_and_leaves_the_model_as_it_was(tiny, prompts, complete, requests_for):
    model = tiny()
    defaults = model.generation_config
    done, _ = complete(HFEngine(), model, requests_for(prompts, temperature=0.8, top_k=5))
    for completion in done.values():
        assert all(sampled >= full - 1e-6 for full, sampled in zip(completion.logps, completion.sampled_logps, strict=True))
        assert len(completion.token_ids) == len(completion.logps) == 12
    assert model.training
    assert model.generation_config is defaults


def test_a_stop_string_ends_the_local_engines_rows(tiny, prompts, complete, requests_for):
    model = tiny()
    free, _ = complete(LocalEngine(), model, requests_for(prompts, temperature=0.0))
    a, b = free[2].token_ids[3:5]
    done, _ = complete(LocalEngine(Numbers()), model, requests_for(prompts, temperature=0.0, stop_strings=(f"{a}><{b}",)))
    assert done[2].token_ids == free[2].token_ids[:5]
    assert done[2].stop is StopReason.STOP
