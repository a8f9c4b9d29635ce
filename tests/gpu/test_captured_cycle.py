"""A captured cycle follows settings that are tensors; nothing waits for the device."""

import pytest
import torch
from models import EVERYTHING, gradients, masks, parameters, same, values
from torch import nn

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD

SETTINGS = ("lr", "forget_lr", "weight_decay", "slow_lr")


class Run:
    """An optimizer whose settings are tensors on the device, and gradients at fixed places."""

    def __init__(self, kind, **more):
        self.params = {
            n: nn.Parameter(p.detach().cuda()) for n, p in parameters(torch.float32).items()
        }
        self.settings = {n: torch.tensor(0.5, dtype=torch.float64, device="cuda") for n in SETTINGS}
        knobs = {
            **EVERYTHING[kind],
            "retain_steps": 1,
            "max_norm": 2.0,
            **self.settings,
            "capturable": True,
            **more,
        }
        self.optimizer = kind(
            self.params.items(), saliency=SaliencyMask.from_bool(masks()), **knobs
        )
        self.optimizer.init_state()
        for p in self.params.values():
            p.grad = torch.zeros_like(p)

    def set(self, i):
        for name, value in zip(
            SETTINGS, (0.1 / (i + 1), 0.3 - 0.05 * i, 0.01 * i, 1.0 - 0.2 * i), strict=True
        ):
            self.settings[name].fill_(value)
        for name, grad in gradients(1, torch.float32, seed=i)[0].items():
            self.params[name].grad.copy_(grad)

    def cycle(self):
        self.optimizer.forget_step()
        self.optimizer.step()


@pytest.mark.checklist("E3")
@pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])
def test_a_captured_cycle_follows_its_settings(kind):
    eager, captured = Run(kind), Run(kind)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for run in (eager, captured):
        run.set(0)
    with torch.cuda.stream(side):
        captured.cycle()
    torch.cuda.current_stream().wait_stream(side)
    eager.cycle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.cycle()
    for i in range(1, 5):
        for run in (eager, captured):
            run.set(i)
        eager.cycle()
        graph.replay()
        assert same(values(eager.params), values(captured.params)), i
    assert eager.optimizer.skipped_steps == captured.optimizer.skipped_steps == 0


@pytest.mark.checklist("A9")
def test_what_a_replay_could_not_follow_is_refused():
    unannounced, elsewhere = Run(SFRonSGD, capturable=False), Run(SFRonSGD, lr=torch.tensor(0.1))
    for run, match in (
        (unannounced, "capturable: expected True"),
        (elsewhere, "lr: expected a tensor on cuda"),
    ):
        run.optimizer.forget_step()  # forget_lr is a tensor there
        with pytest.raises(RuntimeError, match=match), torch.cuda.graph(torch.cuda.CUDAGraph()):
            run.optimizer.step()


@pytest.mark.checklist("E4")
@pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])
def test_no_step_waits_for_the_device(kind):
    run = Run(kind, clip_retain=True)
    run.set(1)
    run.cycle()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.cycle()
    finally:
        torch.cuda.set_sync_debug_mode("default")
