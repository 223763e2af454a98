import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain.memory.simulate.live import LiveStorages

MB = 2**20


def test_bytes_come_and_go_with_storages():
    with LiveStorages() as live:
        a = torch.zeros(MB // 4)
        b = a + 1
        assert live.device_bytes == 2 * MB
        del a
        assert live.device_bytes == MB
        del b
        assert live.device_bytes == 0
    assert live.peak == 2 * MB


def test_views_and_changes_in_place_cost_nothing():
    with LiveStorages() as live:
        a = torch.zeros(4, MB // 16)
        a.view(-1)[5:].add_(1)
        b = a.t()
        del a
        assert live.device_bytes == MB  # the view keeps it
        del b
    assert live.peak == MB


def test_what_autograd_keeps_is_counted_until_backward_is_through():
    x = torch.zeros(MB // 4, requires_grad=True)
    with LiveStorages() as live:
        y = x.exp()  # kept for the backward
        z = y.sum()
        del y
        assert live.device_bytes == MB + z.nbytes
        z.backward()
        del z
        assert live.device_bytes == x.grad.nbytes


def test_the_peak_is_told_by_label():
    with LiveStorages() as live:
        weights = torch.zeros(MB // 4)
        live.label([weights], "weights")
        torch.zeros(MB // 2)
        torch.zeros(MB // 8)
    assert live.peak == 3 * MB
    assert live.peak_parts == {"rest": 2 * MB, "weights": MB}
    with LiveStorages() as again:
        again.label([weights], "weights")
        again.restart_peaks()
        torch.zeros(MB // 4)
    assert again.peak_parts == {"rest": MB, "weights": MB}


def test_fake_tensors_have_bytes_and_the_host_is_counted_apart():
    with FakeTensorMode(), LiveStorages(host="meta") as live:
        a = torch.empty(1024, MB)  # 4 GiB that nobody has
        b = a.to("meta")
        assert live.device_bytes == live.host_bytes == 4 * 1024 * MB
        del a
        assert live.device_bytes == 0
        del b
    assert live.host_peak == live.peak == 4 * 1024 * MB
    assert live.host_bytes == 0


def test_a_real_step_and_a_fake_one_hold_the_same_bytes():
    def step():
        torch.manual_seed(0)
        with LiveStorages() as live:
            net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
            net(torch.ones(100, 64)).square().sum().backward()
            return live.peak, live.device_bytes

    real = step()
    with FakeTensorMode():
        assert step() == real
