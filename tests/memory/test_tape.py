"""The tape's peaks against small sums done by hand."""

from posttrain.memory.tape import Storage, Tape


def test_memory_goes_when_its_last_name_goes():
    t = Tape()
    x = t.tensor(10, 4)
    y = t.op(10, 4, x)
    del x
    assert (t.memory.live, t.memory.peak) == (40, 80)
    del y
    assert t.memory.live == 0


def test_what_is_saved_lives_until_the_backward_of_what_saved_it():
    t = Tape()
    x = t.tensor(10, 4, wants_grad=True)
    y = t.op(10, 4, x, saves=(x,))
    leaf, slot = x.slot, y.slot
    del x, y
    assert t.memory.live == 40  # x
    t.backward(slot, Storage(t.memory, 40))
    assert t.memory.peak == 120  # x, the gradients of y and of x
    assert t.memory.live == leaf.size == 40  # the gradient of x, in its slot


def test_without_recording_nothing_is_saved():
    t = Tape(recording=False)
    x = t.tensor(10, 4, wants_grad=True)
    y = t.op(10, 4, x, saves=(x,))
    del x
    assert t.memory.live == y.size


def test_a_gradient_that_an_addition_handed_to_two_is_not_added_to_in_place():
    t = Tape()
    x = t.tensor(10, 4, wants_grad=True)
    y = t.op(10, 4, x)
    between = t.op(10, 4, x)
    z = t.op(10, 4, x, y, shares=True)
    out = t.op(10, 4, z, between, shares=True)
    slot = out.slot
    del y, between, z, out
    t.memory.peak = 0
    t.backward(slot, Storage(t.memory, 40))
    # x; the gradient of out, which is that of z, and so of x and y; what `between` makes of it; and the sum, since y still holds the first
    assert t.memory.peak == 40 + 40 + 40 + 40


def test_a_gradient_that_nobody_else_holds_is_added_to_in_place():
    t = Tape()
    x = t.tensor(10, 4, wants_grad=True)
    y = t.op(10, 4, x)
    z = t.op(10, 4, x, y, shares=True)
    slot = z.slot
    del y, z
    t.memory.peak = 0
    t.backward(slot, Storage(t.memory, 40))
    assert t.memory.peak == 40 + 40 + 40


def test_scratch_counts_in_its_direction_only():
    t = Tape()
    x = t.tensor(10, 4, wants_grad=True)
    y = t.op(10, 4, x, work=1000, back_work=500)
    assert t.memory.peak == 1080
    t.memory.peak = 0
    t.backward(y.slot, Storage(t.memory, 40))
    assert t.memory.peak == 40 + 40 + 40 + 40 + 500


def test_parts_say_what_the_peak_consisted_of():
    t = Tape()
    x = t.tensor(10, 4, label="checkpoints")
    y = t.op(10, 4, x, work=100, label="tiles")
    assert t.memory.peak_parts == {"checkpoints": 40, "activations": 40, "tiles": 100}
    del y


def test_offloaded_tensors_leave_the_device_but_for_the_latest():
    size = 2**21
    t = Tape(offloads=True)
    x = t.tensor(size, 1, wants_grad=True)
    slots = []
    for _ in range(6):
        x = t.op(size, 1, x, saves=(x,))
        slots.append(x.slot)
    assert t.host == 5 * size  # the last one waits, and never leaves
    assert t.memory.live == 3 * size  # the output, the tensor that waits and the one that is leaving
    t.memory.peak = 0
    del x
    t.backward(slots[-1], Storage(t.memory, size))
    assert t.memory.peak == 6 * size  # two gradients, the two that stayed, a tensor that came back and the next one


def test_the_two_uses_of_a_tied_weight_wait_for_each_other():
    t = Tape()
    embedded = t.op(1, 4, weight_grad=1000, after=1000, trains=True, is_tied=True)
    logits = t.op(1, 4, embedded, weight_grad=1000, trains=True, is_tied=True)
    slot = logits.slot
    del embedded, logits
    t.backward(slot, Storage(t.memory, 4))
    assert t.memory.peak == 3000 + 4  # both, their sum, and the gradient between them


def test_small_tensors_are_not_offloaded():
    t = Tape(offloads=True)
    x = t.tensor(1000, 1, wants_grad=True)
    y = t.op(1000, 1, x, saves=(x,))
    del x
    assert t.host == 0
    assert t.memory.live == 2000
    del y
