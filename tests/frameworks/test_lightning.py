"""Lightning on the CPU: both phases by manual optimisation, the retain phase by automatic too."""

import warnings

import pytest
import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from models import bits, build, loader, random_mask, same
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.utilities import CombinedLoader

from sfron_fast import SFRonAdamW, SFRonSGD, adaptive_cross_entropy
from sfron_fast.integrations import forget_step, unwrap

pytestmark = pytest.mark.checklist("G5")
KINDS = {"sgd": (SFRonSGD, {"momentum": 0.9}), "adamw": (SFRonAdamW, {"eps": 1e-3})}
BOTH = pytest.mark.parametrize("kind", KINDS)


class Unlearner(lightning.LightningModule):
    """One retain step a batch; where a cycle begins, a forget step before it."""

    automatic_optimization = False

    def __init__(self, kind, how="forget_step"):
        super().__init__()
        self.net, self.kind, self.how = build("bn"), kind, how
        self.mask = random_mask(self.net)

    def configure_optimizers(self):
        cls, own = KINDS[self.kind]
        optimizer = cls(
            self.net.named_parameters(),
            lr=0.05,
            weight_decay=0.1,
            saliency=self.mask,
            max_norm=0.3,
            retain_steps=3,
            slow_lr=0.5,
            **own,
        )
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    def training_step(self, batch, index):
        optimizer, scaler = (
            self.optimizers(),
            getattr(self.trainer.precision_plugin, "scaler", None),
        )
        if not optimizer.mid_cycle:
            inputs, targets = batch["forget"]
            optimizer.zero_grad()
            self.manual_backward(-2.0 * adaptive_cross_entropy(self.net(inputs), targets))
            if self.how == "forget_step":
                forget_step(optimizer, scaler)
            else:
                optimizer.forget_step()
                assert optimizer.grad_norm > 0
        inputs, targets = batch["retain"]
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(inputs), targets))
        optimizer.step()
        self.lr_schedulers().step()


def batches():
    retain, forget = loader(16, 4), loader(8, 4, seed=2)
    return CombinedLoader({"retain": retain, "forget": forget}, "max_size_cycle")


def fit(module, folder, data, checkpoint=None, extra=(), **more):
    callbacks = [
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1),
        *extra,
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers and loggers
        trainer = lightning.Trainer(
            **{"max_epochs": 2, **more},
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data, ckpt_path=checkpoint)
    return trainer


def plain(kind):
    """The same loop without Lightning."""
    module = Unlearner(kind)
    [optimizer], [schedule] = module.configure_optimizers()
    for _ in range(2):
        for (xr, yr), (xf, yf) in zip(loader(16, 4), [*loader(8, 4, seed=2)] * 2, strict=True):
            if not optimizer.mid_cycle:
                optimizer.zero_grad()
                (-2.0 * adaptive_cross_entropy(module.net(xf), yf)).backward()
                optimizer.forget_step()
            optimizer.zero_grad()
            F.cross_entropy(module.net(xr), yr).backward()
            optimizer.step()
            schedule.step()
    return module, optimizer


@BOTH
@pytest.mark.parametrize("how", ["forget_step", "wrapper"])
def test_manual_optimisation_gives_the_bits_of_a_plain_loop(kind, how, tmp_path):
    """Also when forget_step is called on Lightning's wrapper itself."""
    module, (other, optimizer) = Unlearner(kind, how), plain(kind)
    trainer = fit(module, tmp_path, batches())
    assert same(bits(module.net), bits(other.net))
    assert (
        trainer.optimizers[0].param_groups[0]["retain_pending"]
        == optimizer.param_groups[0]["retain_pending"]
        == 1
    )
    assert isinstance(unwrap(module.optimizers()), KINDS[kind][0])
    assert trainer.global_step == 8  # Lightning counts retain steps


@BOTH
@pytest.mark.checklist("C5")
@pytest.mark.parametrize("stop", [2, 3])
def test_a_checkpoint_goes_on_with_the_same_bits(kind, stop, tmp_path):
    """Inside a cycle and between two. One batch an epoch: Lightning saves no place in a loader."""
    data = CombinedLoader(
        {"retain": loader(8, 8), "forget": loader(4, 4, seed=2)}, "max_size_cycle"
    )
    whole, resumed = Unlearner(kind), Unlearner(kind)
    fit(whole, tmp_path, data, max_epochs=5)
    start = bits(resumed.net)
    trainer = fit(
        resumed, tmp_path / "again", data, str(tmp_path / f"step={stop}.ckpt"), max_epochs=5
    )
    assert trainer.global_step == 5
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        f"step={i}.ckpt" for i in range(stop + 1, 6)
    ]
    assert same(bits(whole.net), bits(resumed.net))
    assert not same(bits(whole.net), start)
    saved = torch.load(tmp_path / f"step={stop}.ckpt", weights_only=True)["optimizer_states"][0]
    assert saved["param_groups"][0]["retain_pending"] == (1 if stop == 2 else 0)


@BOTH
@pytest.mark.checklist("D5")
def test_one_scaler_for_both_phases(kind, tmp_path):
    """fp16 autocast with torch's GradScaler for the CPU; one step overflows, is skipped and halves
    the scale.
    """
    module, scaler = Unlearner(kind), torch.amp.GradScaler("cpu", init_scale=256.0)
    start, scales = bits(module.net), []

    class Spoiling(lightning.Callback):
        def on_after_backward(self, trainer, module):
            scales.append(scaler.get_scale())
            if len(scales) == 1:  # the first backward: a forget step
                next(module.parameters()).grad.fill_(float("inf"))
                assert module.mask.counts()["0.weight"] > 0

    class Watching(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            scales.append(scaler.get_scale())

    precision = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, tmp_path, batches(), plugins=[precision], extra=[Spoiling(), Watching()])
    assert scales[0] == 256.0
    assert set(scales[1:]) == {128.0}
    assert unwrap(module.optimizers()).skipped_steps == 0  # the scaler never called it
    assert all(torch.isfinite(t).all() for t in bits(module.net).values())
    assert not same(bits(module.net), start)


class Retain(lightning.LightningModule):
    """Automatic optimisation: Lightning runs forward and backward in a closure, inside step."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = build(), kind

    def configure_optimizers(self):
        return self.kind(self.net.named_parameters(), lr=0.1, weight_decay=0.1)

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.checklist("A3")
@pytest.mark.checklist("D1")
@pytest.mark.parametrize(
    ("ours", "theirs"), [(SFRonSGD, torch.optim.SGD), (SFRonAdamW, torch.optim.AdamW)]
)
@pytest.mark.parametrize("more", [{"gradient_clip_val": 0.2}, {"accumulate_grad_batches": 2}])
def test_automatic_optimisation_is_torchs(ours, theirs, more, tmp_path):
    weights = []
    for kind in (ours, theirs):
        module = Retain(kind)
        fit(module, tmp_path / kind.__name__, loader(16, 4), **more)
        weights.append(bits(module.net))
    assert not same(weights[0], bits(build()))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-6, atol=1e-7)
