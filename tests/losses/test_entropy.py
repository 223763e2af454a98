import numpy as np
import pytest
import torch

from posttrain.losses.entropy import EntropyController, entropy_bonus, entropy_threshold, high_entropy_mask


@pytest.mark.parametrize("share", [1.0, 0.8, 0.5, 0.2, 0.01])
@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_the_threshold_is_the_quantile_from_above(share, n):
    values = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    assert entropy_threshold(values, share).item() == pytest.approx(np.quantile(values.numpy(), 1 - share), rel=1e-12)


def test_the_mask_keeps_the_high_entropy_trained_tokens_only():
    entropy = torch.tensor([[0.1, 9.0, 0.5], [0.9, 0.3, 9.0]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    threshold = entropy_threshold(entropy[mask.bool()], 0.5)
    assert high_entropy_mask(entropy, mask, threshold).tolist() == [[False, False, True], [True, False, False]]
    assert torch.equal(high_entropy_mask(entropy, mask, entropy_threshold(entropy[mask.bool()], 1.0)), mask.bool())


def test_no_trained_token_means_an_empty_mask():
    entropy, mask = torch.ones(2, 2), torch.zeros(2, 2)
    assert not high_entropy_mask(entropy, mask, entropy_threshold(entropy[mask.bool()], 0.5)).any()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_fraction_outside_zero_to_one_is_refused(share):
    with pytest.raises(ValueError, match="fraction of tokens"):
        entropy_threshold(torch.ones(3), share)


def test_the_bonus_is_minus_the_mean_entropy_for_every_split():
    torch.manual_seed(0)
    entropy = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(6, 4) < 0.6
    tokens = int(mask.sum())
    expected = -0.3 * sum(entropy[i, t].item() for i in range(6) for t in range(4) if mask[i, t]) / tokens
    parts = [entropy_bonus(entropy[i : i + 2], mask[i : i + 2], coef=0.3, num_tokens=tokens) for i in (0, 2, 4)]
    total = sum(parts)
    assert total.item() == pytest.approx(expected, rel=1e-12)
    total.backward()
    torch.testing.assert_close(entropy.grad, -0.3 / tokens * mask.double())


def test_a_fixed_coefficient_stays():
    controller = EntropyController(coef=0.01)
    for entropy in (0.0, 5.0):
        controller.update(entropy)
        assert controller.current == 0.01


def test_an_adaptive_coefficient_rises_below_the_target_and_falls_above_it():
    controller = EntropyController(adaptive=True, delta=0.1, target=0.5, minimum=0.0, maximum=0.25)
    history = []
    for entropy in (0.4, 0.5, 0.3, 0.6, 0.9, 0.9, 0.9, 0.2):
        controller.update(entropy)
        history.append((round(controller.coef, 6), round(controller.current, 6)))
    assert history == [(0.1, 0.1), (0.2, 0.2), (0.25, 0.25), (0.15, 0), (0.05, 0), (0, 0), (0, 0), (0.1, 0.1)]


def test_an_adaptive_bonus_waits_for_the_first_measurement():
    assert EntropyController(coef=0.3, adaptive=True).current == 0


def test_a_restored_controller_goes_on_as_the_first_would():
    first = EntropyController(adaptive=True)
    for entropy in (0.1, 0.1, 0.4):
        first.update(entropy)
    second = EntropyController(adaptive=True)
    second.load_state_dict(first.state_dict())
    for entropy in (0.1, 0.7, 0.2):
        first.update(entropy)
        second.update(entropy)
        assert (first.coef, first.current) == (second.coef, second.current)
