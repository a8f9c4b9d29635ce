"""unlearn() on several ranks: the run of one process on the same global batches."""

import importlib
import importlib.util
import os
import shutil
import signal
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks, outcomes
from sharded import mask_of, whole
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import sfron_fast as sf
from sfron_fast.data.kept_out import keep_out
from sfron_fast.distributed.loader import SharedLoader
from sfron_fast.distributed.ranks import Ranks, check_offload
from sfron_fast.runs.defaults import default_recipe

unlearning = importlib.import_module("sfron_fast.runs.unlearn")  # the name is a function's
CLASSES = 5
CUT = 3  # samples of a batch that are rank 0's; rank 1 has the others, perhaps none


def net(normed=False):
    torch.manual_seed(3)
    norm = [nn.BatchNorm1d(7)] if normed else []
    return nn.Sequential(nn.Linear(6, 7), *norm, nn.Tanh(), nn.Linear(7, CLASSES))


def batches(count, sizes, seed):
    """Batches whose sizes take turns; a share of rank 1 is odd, and sometimes empty."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(sizes[i % len(sizes)], 6, generator=generator),
            torch.randint(CLASSES, (sizes[i % len(sizes)],), generator=generator),
        )
        for i in range(count)
    ]


def mine(global_batches):
    """This rank's parts: a short last batch is all rank 0's, and rank 1's list ends before it."""
    rank = dist.get_rank()
    parts = [(x[:CUT], y[:CUT]) if rank == 0 else (x[CUT:], y[CUT:]) for x, y in global_batches]
    return parts[:-1] if rank and not len(parts[-1][1]) else parts


FORGET = batches(3, (7, 3, 2), 1)
RETAIN = batches(22, (8, 5, 3), 2)
HOLDOUT = batches(3, (6, 5, 3), 3)
ONE = {"forget": FORGET[:1], "retain": RETAIN[:1] * 2, "holdout": HOLDOUT}  # batch a pass
SETS = {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT}


def mine_of(sets):
    return {name: mine(data) for name, data in sets.items()}


def ours():
    return mine_of(SETS)


class Absolute(sf.Task):
    """A loss of its own, which the kernels do not know."""

    def losses_of(self, outputs, batch):
        return (outputs - F.one_hot(batch[1], CLASSES)).abs().mean(1)

    def outputs(self, model, batch):
        return model(batch[0])

    def samples(self, batch):
        return len(batch[1])


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model, **options):
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def offloaded(model):
    return fsdp(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


PAPER = sf.Recipe.paper(cycles=4, retain_steps=3, lr=0.05, forget_lr=0.3)
OFFICIAL = sf.Recipe.official(
    cycles=4, retain_steps=3, lr=0.05, slow_lr=0.7, forget_weight=2.0, threshold=0.5
)
ADAM = PAPER.replace(optimizer="adamw", moments="separate", max_norm=0.5, forget_lr=0.02, lr=0.01)
RUNS = {
    "paper": {"recipe": PAPER, "eval_every": 2},
    "official": {"recipe": OFFICIAL, "eval_every": 2},
    "ceiling": {"recipe": PAPER.replace(ceiling=1.02, cycles=8, forget_lr=1.0)},
    "budget": {"recipe": ADAM, "retain_budget": 0.5},
    "task": {"recipe": PAPER, "task": Absolute()},
}


WRAPS = {
    "paper": (ddp, fsdp, offloaded),
    "official": (ddp,),
    "ceiling": (fsdp,),
    "budget": (ddp,),
    "task": (fsdp,),
}


def run(model, data, **settings):
    """Only the first run estimates its mask: Fishers on ranks have tests of their own."""
    if settings["recipe"] is not PAPER or "task" in settings:
        settings.setdefault("mask", mask_of(getattr(model, "module", model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sf.unlearn(model, **data, **settings)


def weights(model):
    bare = getattr(model, "module", model)
    return {n: whole(t).clone() for n, t in bare.state_dict().items()}


def close(found, expected, scale=1.0):
    """Within some hundred roundings of fp32: sums over ranks have another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5 * scale, atol=2e-6 * scale)


def same_runs():
    for name, settings in RUNS.items():
        alone, start = net(), weights(net())
        expected = run(alone, SETS, **settings)
        assert any(not torch.equal(start[n], w) for n, w in weights(alone).items())
        for wrap in WRAPS[name]:
            model = wrap(net())
            found = run(model, ours(), **settings)
            close(weights(model), weights(alone))
            assert found.history == expected.history, (name, wrap)
            assert found.skipped_steps == expected.skipped_steps
            assert found.forgotten_steps == expected.forgotten_steps
            assert found.mask == expected.mask
            if name == "ceiling":
                assert expected.forgotten_steps > 0
            if name == "budget":
                assert found.budget_spent == pytest.approx(expected.budget_spent, rel=1e-3)


def without_a_recipe():
    """The same budget, end and figures on every number of ranks; also without a holdout set."""
    few = default_recipe(sf.Classification()).replace(cycles=4)
    sets = {name: SETS[name] for name in ("forget", "retain")}
    with mock.patch.object(unlearning, "default_recipe", return_value=few):
        for given in (sets, SETS):
            alone = net(normed=True)
            expected = run(alone, given, recipe=None)
            for wrap in (ddp, fsdp):
                model = wrap(net(normed=True))
                found = run(model, mine_of(given), recipe=None)
                close(weights(model), weights(alone))
                assert found.budget_spent == pytest.approx(expected.budget_spent, rel=1e-3)
                for name, value in expected.after.items():
                    assert found.after[name] == pytest.approx(value, rel=1e-3), name
                assert found.before == pytest.approx(expected.before, rel=1e-3)


def zero(model):
    """DeepSpeed is not there: what it is known by."""
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    engine.module = model
    return engine


def marked(model):
    next(model.parameters()).ds_id = 0
    return model


def refused_wrappers():
    flat = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    for model in (flat, zero(net()), marked(net())):
        before = weights(model)
        with pytest.raises(ValueError, match=r"model: expected .* found .*fsdp_version: 2"):
            sf.unlearn(model, forget=FORGET, retain=RETAIN, recipe=PAPER)
        assert all(torch.equal(before[n], w) for n, w in weights(model).items())
    devices = torch.device("cpu"), torch.device("cuda")
    check_offload(*devices, dist.group.WORLD)  # gloo takes both
    with (
        mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"),
        pytest.raises(ValueError, match=r"offloaded to the cpu, found cuda:nccl; .*cpu:gloo"),
    ):
        check_offload(*devices, dist.group.WORLD)
    with pytest.raises(ValueError, match="group: expected None"):
        sf.unlearn(net(), forget=FORGET, retain=RETAIN, group=dist.group.WORLD)


class Stop(Exception):
    pass


def stopping(cycle, _):
    if cycle == STOPPED:
        raise Stop


STOPPED = 2
CHECKPOINTED = {"recipe": ADAM, "retain_budget": 0.5, "checkpoint_every": 3, "eval_every": 2}


def stopped_and_resumed(folder):
    """Stopped in cycle 2 of 4, saved two steps before: in mid-cycle."""
    for wrap, data, settings in (
        (fsdp, mine_of(ONE), CHECKPOINTED),
        (ddp, ours(), {**CHECKPOINTED, "recipe": OFFICIAL}),
    ):
        name, normed = f"{folder}/{wrap.__name__}", wrap is ddp
        expected, model = wrap(net(normed)), wrap(net(normed))
        history = run(expected, data, **settings).history
        settings = {**settings, "checkpoint": name}
        with pytest.raises(Stop):
            run(wrap(net(normed)), data, on_cycle=stopping, **settings)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.copytree(name, f"{name}-stopped")
            assert [path.name for path in Path(name).glob("step-*")] == ["step-6"]
        dist.barrier()
        found = run(model, data, **settings)
        for key, weight in weights(expected).items():
            assert torch.equal(weight, weights(model)[key]), (name, key)
        assert found.history == history


def went_on_from_one(folder):
    """What one process has saved."""
    alone, model = net(), fsdp(net())
    run(alone, ONE, **CHECKPOINTED)
    dist.barrier()
    with pytest.warns(RuntimeWarning, match="resumed on 2") if not dist.get_rank() else Quiet():
        settings = {**CHECKPOINTED, "mask": mask_of(net()), "checkpoint": folder}
        sf.unlearn(model, **mine_of(ONE), **settings)
    close(weights(model), weights(alone))


class Quiet(warnings.catch_warnings):
    """Any warning is an error."""

    def __init__(self):
        super().__init__(action="error", category=RuntimeWarning)


def wrong_on_one_rank():
    """A bad label, a batch that is no pair, and weights that are not finite, on rank 1 alone."""
    here = dist.get_rank() == 1
    told = "targets: expected classes" if here else r"rank 1: targets: expected classes"
    bad = ours()
    if here:
        bad["retain"] = [(x, y + CLASSES) for x, y in bad["retain"]]
    odd = ours()
    if here:
        odd["forget"] = [x for x, _ in odd["forget"]]
    for wrap in (ddp, fsdp):
        for data, message in ((bad, told), (odd, "forget: expected batches")):
            model = wrap(net())
            with pytest.raises(ValueError, match=message):
                run(model, data, recipe=PAPER.replace(threshold=None))


def kept_out_of_shares():
    """What the ranks keep is what one process keeps, and nobody trains on it."""
    numbers = TensorDataset(torch.arange(60), torch.arange(60))
    loader = DataLoader(numbers, 4, sampler=DistributedSampler(numbers, drop_last=True))
    rest, kept = keep_out(loader, "retain")
    found = [torch.cat([x for x, _ in part]).tolist() for part in (rest, kept)]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    seen, held = ([n for part in parts for n in part] for parts in zip(*everyone, strict=True))
    alone = keep_out(DataLoader(numbers, 4), "retain")[1]
    assert sorted(held) == torch.cat([x for x, _ in alone]).tolist()
    assert sorted(seen + held) == list(range(60))
    # a run tells the sampler its passes: each has another order
    shared = SharedLoader(loader, "retain", Ranks(fsdp(net()), dist.group.WORLD))
    task, device = sf.Classification(F.mse_loss), torch.device("cpu")
    passes = [[shared.batch(task, device)[0].tolist() for _ in range(8)] for _ in range(2)]
    assert passes[0] != passes[1]


def low_precision():
    """The look for updates that round to nothing reads shards."""
    data = {n: [(x.bfloat16(), y) for x, y in sets] for n, sets in ours().items()}
    model = fsdp(net().bfloat16())
    warned = pytest.warns(RuntimeWarning, match="updates round to nothing")
    with warned if dist.get_rank() == 0 else Quiet():
        sf.unlearn(model, **data, recipe=PAPER.replace(lr=1e-6, forget_lr=1e-6, threshold=None))


def language():
    """GPT-2 with a row without a label, left padding, a ceiling, and unequal parts."""
    if importlib.util.find_spec("transformers") is None:
        return
    transformers = importlib.import_module("transformers")
    sizes = {"vocab_size": 32, "n_positions": 9, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(
        **sizes,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )

    def gpt():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(
            config
        ).double()  # key biases have no gradient but noise

    def shards(model):
        for block in model.transformer.h:
            fully_shard(block)
        return fully_shard(model)

    def sets(part):
        generator = torch.Generator().manual_seed(4)
        tokens = torch.randint(32, (6, 5, 9), generator=generator)
        masks = torch.ones_like(tokens)
        masks[:, 1, :3] = 0
        labels = tokens.clone()
        labels[:, 0] = -100  # nothing to learn here
        labels[:, :, :4] = -100
        batches = [
            {"input_ids": t[part], "attention_mask": m[part], "labels": y[part]}
            for t, m, y in zip(tokens, masks, labels, strict=True)
        ]
        return {"forget": batches[:2], "retain": batches[2:], "holdout": batches[:1]}

    settings = {
        "task": sf.Language(),
        "recipe": sf.Recipe.language(cycles=3, retain_steps=2, threshold=1.0, ceiling=1.5),
        "eval_every": 1,
    }
    alone, part = gpt(), slice(0, 2) if dist.get_rank() == 0 else slice(2, 5)
    expected = run(alone, sets(slice(None)), **settings)
    model = shards(gpt())
    found = run(model, sets(part), **settings)
    assert found.history == expected.history
    close(weights(model), weights(alone))


def everything(folder):
    kept_out_of_shares()
    low_precision()
    language()
    refused_wrappers()
    same_runs()
    without_a_recipe()
    wrong_on_one_rank()
    stopped_and_resumed(folder)
    went_on_from_one(f"{folder}/alone")


def test_several_ranks_give_the_run_of_one_process(tmp_path):
    """And one goes on where the other has stopped: with one batch a pass, new passes change
    nothing.
    """
    settings = {**CHECKPOINTED, "checkpoint": tmp_path / "alone"}
    with pytest.raises(Stop):
        run(net(), ONE, on_cycle=stopping, **settings)
    on_ranks(2, everything, str(tmp_path))
    expected = net()
    history = run(expected, ONE, **CHECKPOINTED).history
    for name in ("fsdp", "fsdp-stopped"):  # the finished run, and the one that was stopped
        model, settings["checkpoint"] = net(), tmp_path / name
        with pytest.warns(RuntimeWarning, match=r"resumed on 1 rank\(s\), where it had 2"):
            found = sf.unlearn(model, **ONE, **settings)
        close(weights(model), weights(expected))
        assert found.history == history


def dying(cycle, _):
    if cycle == STOPPED and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def killed():
    run(fsdp(net()), ours(), recipe=ADAM, on_cycle=dying)


def test_a_killed_rank_ends_the_run():
    ends = outcomes(2, killed)
    assert ends[1].exitcode == -signal.SIGKILL
    assert ends[0].exitcode == 1, "rank 0 waited for a dead rank"
    assert "Error" in ends[0].error
