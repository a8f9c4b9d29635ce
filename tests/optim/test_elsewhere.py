"""``slow_device``: slow weights in another memory than the parameters, which ``lanes`` pretends."""

import copy
import pickle
import re
from contextlib import contextmanager

import lanes
import pytest
import torch
from judging import assert_same_bits
from test_compact import BOTH, KINDS, assert_same_run, make, net, train
from torch import nn

from sfron_fast import SFRonAdamW
from sfron_fast.optim import elsewhere
from sfron_fast.optim.footprint import footprint

WAYS = {
    "plain": {},
    "24, codes": {"weight_bits": 24, "state_dtype": torch.int8},
    "32": {"weight_bits": 32},
}
EACH_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
AWAY = {"slow_device": "cpu"}


@pytest.fixture
def away(monkeypatch):
    lanes.pretend(monkeypatch.setattr)
    monkeypatch.setattr(elsewhere, "PART", 3000)  # bytes: several parameters, and one


def settled(pair):
    elsewhere.settle(pair[1])
    return pair


@BOTH
@EACH_WAY
@pytest.mark.parametrize("inside", [False, True], ids=["step", "in backward"])
@pytest.mark.usefixtures("away")
def test_a_run_has_the_same_bits(kind, way, inside):
    """Masks, clip, decay; a layer without gradients in some first and last steps of a cycle."""
    pairs = []
    for place in ({}, AWAY):
        model = net()
        pairs.append((model, make(kind, model, **way, **place)))
        for stop in range(13):
            train(*pairs[-1], stop, stop + 1, inside)
    assert_same_run(settled(pairs[0]), settled(pairs[1]))
    (lane,) = pairs[1][1]._lanes.values()
    assert not pairs[0][1]._lanes
    assert len(lane.rooms) == 2
    assert not lane.busy
    optimizer = pairs[1][1]
    assert [room.numel() for room in lane.rooms] == elsewhere.room_sizes(optimizer)
    assert lane.rooms[0].numel() <= 96 * 96 * 4
    assert lane.rooms[1].numel() == 3000


@BOTH
@EACH_WAY
@pytest.mark.parametrize("how", ["portable", "compact", "pickle", "copy"])
@pytest.mark.parametrize("back", [False, True], ids=["to the host", "to the device"])
@pytest.mark.usefixtures("away")
def test_a_run_goes_on_with_slow_weights_in_another_place(kind, way, how, back):
    """Stopped inside a cycle, when a copy to the host may still be under way."""
    model = net()
    optimizer = make(kind, model, **way, **(AWAY if back else {}))
    straight = copy.deepcopy((model, optimizer))
    train(*straight, 0, 13)
    train(model, optimizer, 0, 4)
    if how in ("pickle", "copy"):
        pair = (model, optimizer)
        again = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    else:
        state = optimizer.state_dict() if how == "portable" else optimizer.compact_state_dict()
        other = copy.deepcopy(model)
        again = other, make(kind, other, **way, **({} if back else AWAY))
        again[1].load_state_dict(copy.deepcopy(state))
        assert again[1].param_groups[0]["slow_device"] == (None if back else "cpu")
    train(*again, 4, 13)
    assert_same_run(settled(again), settled(straight))


@BOTH
@pytest.mark.usefixtures("away")
def test_skipped_steps_and_closures(kind):
    def run(**place):
        model = net()
        optimizer = make(kind, model, clip_retain=True, **place)
        for i in range(7):
            gradient = torch.full((), float("inf") if i in (3, 5) else 0.1 * (i + 1))

            def closure(gradient=gradient):
                for p in model.parameters():
                    p.grad = gradient.to(p.dtype).expand(p.shape).clone()

            (optimizer.step if optimizer.mid_cycle else optimizer.forget_step)(closure)
        assert optimizer.skipped_steps == 2
        return settled((model, optimizer))

    assert_same_run(run(), run(**AWAY))


@BOTH
@pytest.mark.usefixtures("away")
def test_channels_last_and_fp16(kind):
    def run(**place):
        torch.manual_seed(0)
        weights = [torch.randn(8, 32, 3, 3).to(memory_format=torch.channels_last), torch.randn(7)]
        params = [nn.Parameter(w.half()) for w in weights]
        optimizer = kind(params, lr=1e-2, slow_lr=0.3, **KINDS[kind], **place)
        for step in (optimizer.forget_step, optimizer.step) * 2:
            for p in params:
                p.grad = torch.randn(p.shape).half()
            step()
        return [p.detach() for p in params]

    for ours, theirs in zip(run(), run(**AWAY), strict=True):
        assert_same_bits(ours, theirs)


@BOTH
@pytest.mark.usefixtures("away")
def test_a_refused_forget_step_leaves_slow_weights_alone(kind):
    """Also where an op alone would have looked: a single parameter."""
    param = nn.Parameter(torch.ones(3))
    optimizer = kind([param], slow_lr=0.5, **AWAY)
    param.grad = torch.ones(3)
    for step in (optimizer.forget_step, optimizer.step):
        step()
    elsewhere.settle(optimizer)
    before = copy.deepcopy(optimizer.state[param])
    param.grad.data = torch.ones(3, dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError), match="grads"):
        optimizer.forget_step()
    elsewhere.settle(optimizer)
    for key, value in before.items():
        assert_same_bits(optimizer.state[param][key], value, key)
    assert not optimizer.mid_cycle


@BOTH
def test_on_the_cpu_they_are_there_already(kind):
    pairs = []
    for place in ({}, AWAY):
        model = net()
        pairs.append((model, make(kind, model, **place)))
        train(*pairs[-1], 0, 6)
    assert_same_run(*pairs)
    assert not pairs[1][1]._lanes


@pytest.mark.usefixtures("away")
def test_a_compiled_step_has_the_same_bits():
    def run(**place):
        model = net()
        optimizer = make(SFRonAdamW, model, **place)
        step = torch.compile(optimizer.step, backend="eager")
        for i in range(6):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.1 * (i + 1))
            (step if optimizer.mid_cycle else optimizer.forget_step)()
        return settled((model, optimizer))

    assert_same_run(run(), run(**AWAY))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slow_device": "cuda"}, "slow_device: expected None or 'cpu', found 'cuda'"),
        ({"slow_device": torch.device("cpu")}, "slow_device: expected None or 'cpu'"),
    ],
)
def test_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SFRonAdamW([nn.Parameter(torch.ones(4))], **settings)


@pytest.mark.usefixtures("away")
def test_not_in_a_graph(monkeypatch):
    from sfron_fast.optim import scalars

    model = net()
    optimizer = make(SFRonAdamW, model, capturable=True, **AWAY)
    train(model, optimizer, 0, 3)
    before = copy.deepcopy(settled((model, optimizer)))
    monkeypatch.setattr(scalars, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="slow_device: expected None in every group"):
        optimizer.forget_step()
    assert_same_run(settled((model, optimizer)), before)


@pytest.mark.usefixtures("away")
def test_state_in_the_wrong_place_is_refused_before_anything_moves():
    model = net()
    optimizer = make(SFRonAdamW, model, **AWAY)
    train(model, optimizer, 0, 3)
    weight = model.first.weight
    optimizer.state[weight]["slow"] = optimizer.state[weight]["slow"].to("meta")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"slow\[0\]: expected device cpu"):
        optimizer.forget_step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(p.detach(), old)


def test_footprint_of_what_is_away():
    """A large parameter, with its corrections, and a part, in place of all of them."""
    params = [
        nn.Parameter(torch.empty(n, dtype=torch.bfloat16, device="meta")) for n in (5, 1 << 27)
    ]
    optimizers = [SFRonAdamW(params, slow_lr=0.5, weight_bits=24, **p) for p in ({}, AWAY)]
    here, there = map(footprint, optimizers)
    assert here["slow weights"] == 3 * (5 + (1 << 27))
    assert there["slow weights"] == 3 * (1 << 27) + elsewhere.PART
    assert {**here, "slow weights": 0} == {**there, "slow weights": 0}
    few = SFRonAdamW(params[:1], slow_lr=0.5, **AWAY)
    assert footprint(few)["slow weights"] == 2 * elsewhere.ALIGNED


class Log:
    """Streams and events of torch.cuda, by what is asked of them."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.log.append(f"{self.name} records")
        return f"event {len(self.log)}"

    def synchronize(self):
        self.log.append(f"host waits for {self.name}")


def test_what_waits_for_what_on_cuda(monkeypatch):
    """A room is written after the last step that read it, and read after it was written."""
    log = []
    main, side = Log("main", log), Log("side", log)

    @contextmanager
    def on(stream):
        log.append(f"on {stream.name}")
        yield

    class Noted(torch.Tensor):
        def copy_(self, source, non_blocking=False):
            log.append(f"copy {non_blocking}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    lane = elsewhere.CudaLane(torch.device("cpu"))
    lane.make_rooms([1024, 512])
    assert log == ["side waits for main"]
    lane.rooms = [room.as_subclass(Noted) for room in lane.rooms]
    copied = ["on side", "copy True", "main waits for side"]
    for wait, event in (([], 5), ([], 9), (["side waits for event 5"], None)):
        start = len(log)
        (there,) = lane.bring([torch.zeros(4)])
        assert log[start:] == [*wait, *copied]
        assert there.shape == (4,)
        lane.done()
        assert log[-1] == "main records"
        assert event is None or lane.left[(lane.turn + 1) % 2] == f"event {event}"
    lane.settle()
    assert log[-1] == "host waits for side"
