"""Tasks: batches that are no pairs, draws of a task's own, and every method over another task."""

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, bits, build, data, loader, same
from torch import nn

import sfron_fast as sf
from sfron_fast import methods, tasks
from sfron_fast.runs import run as run_module

FORGET = [{"x": data(8, seed=1)[0], "y": data(8, seed=1)[1]}]
RETAIN = [{"x": x, "y": y} for x, y in loader(16, 4, seed=2)]


class Dicts(sf.Task):
    """The cross-entropy of dicts {"x", "y"}: what ``Classification`` does of pairs."""

    def outputs(self, model, batch):
        return model(batch["x"])

    def losses_of(self, outputs, batch):
        return F.cross_entropy(outputs, batch["y"], reduction="none")

    def logits(self, outputs, batch):
        return outputs

    def targets(self, batch):
        return batch["y"]

    def correct(self, outputs, batch, name):
        return outputs.argmax(1) == batch["y"]


class Noise(sf.Task):
    """Regression under noise of a generator of its own, as of a diffusion model."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = 0

    def prepare(self, batch, device, name="loader"):
        batch = super().prepare(batch, device, name)
        noise = torch.randn(batch["x"].shape, generator=self.generator)
        self.drawn += 1
        return {**batch, "noise": noise.to(device)}

    def losses(self, model, batch):
        return (model(batch["x"] + batch["noise"]) - batch["y"][:, None]).square().mean(1)

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def pairs(batches):
    return [(batch["x"], batch["y"]) for batch in batches]


RECIPE = sf.Recipe.paper(cycles=3, retain_steps=2, forget_weight=0.5)


@pytest.mark.parametrize("estimator", ["sample", "batch", "batch_equal"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_dicts_end_where_pairs_do(estimator):
    """The cross-entropy of pairs has a kernel of its own, hence not the same bits."""
    recipe = RECIPE.replace(estimator=estimator)
    found, expected = build(), build()
    run = sf.unlearn(
        found,
        forget=FORGET,
        retain=RETAIN,
        recipe=recipe,
        task=Dicts(),
        holdout=RETAIN,
        eval_every=1,
    )
    wanted = sf.unlearn(
        expected,
        forget=pairs(FORGET),
        retain=pairs(RETAIN),
        recipe=recipe,
        holdout=pairs(RETAIN),
        eval_every=1,
    )
    assert run.mask == wanted.mask
    assert run.history == wanted.history
    start = bits(build())
    for name, weights in bits(found).items():
        torch.testing.assert_close(weights, bits(expected)[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(weights, start[name])


def test_loss_fn_is_short_for_classification():
    def loss(outputs, targets):
        return 2 * F.cross_entropy(outputs, targets, reduction="none")

    ends = [build(), build()]
    sets = {"forget": pairs(FORGET), "retain": pairs(RETAIN), "recipe": RECIPE}
    sf.unlearn(ends[0], loss_fn=loss, **sets)
    sf.unlearn(ends[1], task=sf.Classification(loss), **sets)
    assert same(*map(bits, ends))


@pytest.mark.parametrize("estimator", ["sample", "batch", "batch_equal"])
def test_a_fisher_of_dicts_has_the_bits_of_pairs(estimator):
    model = build()
    found = sf.estimate_fisher(model, RETAIN, task=Dicts(), estimator=estimator)
    assert same(found, sf.estimate_fisher(model, pairs(RETAIN), estimator=estimator))
    mask = sf.estimate_mask(model, forget=FORGET, retain=RETAIN, task=Dicts(), estimator=estimator)
    expected = sf.estimate_mask(
        model, forget=pairs(FORGET), retain=pairs(RETAIN), estimator=estimator
    )
    assert mask == expected


METHODS = {
    "finetune": lambda m, f, r, s: methods.finetune(m, r, **s),
    "gradient_ascent": lambda m, f, r, s: methods.gradient_ascent(m, f, **s),
    "random_label": lambda m, f, r, s: methods.random_label(m, r, **s),
    "salun": lambda m, f, r, s: methods.salun(m, forget=f, mixed=r, **s),
    "scrub": lambda m, f, r, s: methods.scrub(m, forget=f, retain=r, **s),
    "bad_teacher": lambda m, f, r, s: methods.bad_teacher(m, forgotten(r), build(seed=5), **s),
    "selective_amnesia": lambda m, f, r, s: methods.selective_amnesia(m, forget=f, retain=r, **s),
    "trw": lambda m, f, r, s: methods.trw(
        m, forget=of_one_class(f), retain=r, forgotten=0, rows=torch.eye(CLASSES), **s
    ),
}


def forgotten(batches):
    """The same inputs, every second sample marked as forgotten."""
    dicts = isinstance(batches[0], dict)
    inputs = [batch["x"] if dicts else batch[0] for batch in batches]
    flags = [torch.arange(len(x)) % 2 == 0 for x in inputs]
    both = zip(inputs, flags, strict=True)
    return [{"x": x, "y": flag} if dicts else (x, flag) for x, flag in both]


def of_one_class(batches):
    """The same inputs, all of class 0."""
    if isinstance(batches[0], dict):
        return [{"x": batch["x"], "y": torch.zeros_like(batch["y"])} for batch in batches]
    return [(x, torch.zeros_like(y)) for x, y in batches]


def test_every_method_is_here():
    others = {"Recipe", "class_means", "gradient_saliency", "wrong_labels"}
    # those of language models: tests/frameworks/test_language_methods.py
    others |= {"ceu", "grad_diff", "idk_dpo", "npo", "rmu", "satimp", "simnpo", "undial", "wga"}
    others |= {"kunbr", "Decoder", "fit_decoder", "r2f"}  # test_kunbr.py, test_r2f.py there
    # of generators: tests/methods/test_sugar.py
    others |= {"sugar", "SurrogateLatents", "fit_surrogates", "sampled_fisher"}
    others |= {"lune", "add_lora", "lora_off", "merge_lora"}  # test_lune.py there
    others |= {"siu"}  # test_siu.py there
    # of federated learning: tests/methods/test_certified.py, test_ferrari.py
    others |= {"Certificate", "certified", "ferrari"}
    # of pairs alone, and of models: tests/methods/test_amun.py and test_spectral.py
    others |= {"amun", "Adversarial", "adversarial_examples"}
    others |= {"spectral_norms", "clip_spectral_norms"}
    assert set(METHODS) == set(methods.__all__) - others


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_task(name):
    found, expected = build(), build()
    settings = {"epochs": 2, "lr": 0.05}
    METHODS[name](found, FORGET, RETAIN, {"task": Dicts(), **settings})
    METHODS[name](expected, pairs(FORGET), pairs(RETAIN), settings)
    assert same(bits(found), bits(expected))
    assert not same(bits(found), bits(build()))


def noisy(task, **settings):
    """A run over a task that draws: its weights, its mask and how often it drew."""
    torch.manual_seed(3)
    model = nn.Linear(6, 1)
    forget, retain = ([{**b, "y": b["y"].float()} for b in side] for side in (FORGET, RETAIN))
    result = sf.unlearn(model, forget=forget, retain=retain, recipe=RECIPE, task=task, **settings)
    return bits(model), result.mask, task.drawn


def test_draws_go_on_where_a_run_was_stopped(tmp_path, monkeypatch):
    weights, mask, drawn = noisy(Noise())
    look, steps = len(FORGET) + len(RETAIN), RECIPE.cycles * (1 + RECIPE.retain_steps)
    assert drawn == 4 * look + steps  # counted and looked at before, the Fishers, after
    assert not same(weights, noisy(Noise(seed=1))[0])

    save = run_module.save_whole

    def save_and_die(state, path):
        save(state, path)
        if state["position"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "save_whole", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        noisy(Noise(), checkpoint=tmp_path, checkpoint_every=1)
    monkeypatch.undo()
    other = Noise(seed=7)  # the checkpoint's generator counts
    resumed, again, rest = noisy(other, checkpoint=tmp_path, checkpoint_every=1)
    assert rest == steps - 4 + 2 * look
    assert again == mask
    assert same(resumed, weights)


def test_evaluations_leave_the_draws_alone():
    class Judged(Noise):
        def outputs(self, model, batch):
            return model(batch["x"] + batch["noise"])

        def correct(self, outputs, batch, name):
            return outputs[:, 0] > 0

    ends = [
        noisy(Judged(), eval_every=every, forget_floor=0.0 if every else None)[0]
        for every in (0, 1)
    ]
    assert same(*ends)


def test_units_of_classification():
    task, model = sf.Classification(), build()
    batch = task.prepare(data(5), torch.device("cpu"))
    units = task.units(task.outputs(model, batch), batch)
    assert torch.equal(units.losses, task.losses(model, batch))
    assert units.sample.tolist() == [0, 1, 2, 3, 4]
    assert units.lengths.tolist() == [1] * 5
    assert torch.equal(task.logits(task.outputs(model, batch), batch), model(batch[0]))
    assert torch.equal(task.targets(batch), data(5)[1])


class Parts(Dicts):
    """Calls the model's own modules, not the model."""

    def outputs(self, model, batch):
        assert isinstance(model, nn.Module)
        hidden = model[0](batch["x"])
        return model[2](model[1](hidden))


def test_a_fisher_of_samples_sees_whatever_the_task_calls():
    model = build()
    found = sf.estimate_fisher(model, RETAIN, task=Parts(), estimator="sample")
    expected = sf.estimate_fisher(model, RETAIN, task=Dicts(), estimator="sample")
    assert same(found, expected)
    assert all(bool(values.any()) for values in found.values())


class Counting(Noise):
    """Its state is a live tensor, which evaluations must not move."""

    def __init__(self):
        super().__init__()
        self.n = torch.zeros(())

    def prepare(self, batch, device, name="loader"):
        self.n += 1
        return super().prepare(batch, device, name)

    def correct(self, outputs, batch, name):
        return outputs[:, 0] > 0

    def outputs(self, model, batch):
        return model(batch["x"] + batch["noise"])

    def state_dict(self):
        return {**super().state_dict(), "n": self.n}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.n.copy_(state["n"])


def test_a_live_state_is_put_back_after_evaluations():
    counts = []
    for every in (0, 1):
        task = Counting()
        noisy(task, eval_every=every, forget_floor=0.0 if every else None)
        counts.append(task.n.item())
    assert counts[0] == counts[1] > 0


def test_another_task_does_not_take_over_a_checkpoint(tmp_path, monkeypatch):
    save = run_module.save_whole

    def save_and_die(state, path):
        save(state, path)
        raise KeyboardInterrupt

    class Stateless(Noise):
        __qualname__ = "Noise"

        def load_state_dict(self, state):
            raise KeyError("other")

    class Other(Noise):
        pass

    monkeypatch.setattr(run_module, "save_whole", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        noisy(Noise(), checkpoint=tmp_path, checkpoint_every=1)
    monkeypatch.undo()
    for task, found in ((Other(), "Other"), (Stateless(), "which raised KeyError")):
        torch.manual_seed(3)
        model = nn.Linear(6, 1)
        before = bits(model)
        sets = ([{**b, "y": b["y"].float()} for b in side] for side in (FORGET, RETAIN))
        forget, retain = sets
        with pytest.raises(ValueError, match=f"task: expected .*found .*{found}"):
            sf.unlearn(
                model, forget=forget, retain=retain, recipe=RECIPE, task=task, checkpoint=tmp_path
            )
        assert same(bits(model), before)


class Scores(Dicts):
    def correct(self, outputs, batch, name):
        return outputs.argmax(1)


class Whole(Dicts):
    def losses(self, model, batch):
        return torch.ones(len(batch["y"]), dtype=torch.int64)


@pytest.mark.parametrize(
    ("expected", "call"),
    [
        (
            r"task: expected bool \[units\] of correct\(\), found torch.int64 \[8\]",
            lambda m: sf.unlearn(
                m, forget=FORGET, retain=RETAIN, task=Scores(), eval_every=1, forget_floor=0.0
            ),
        ),
        (
            "task: expected losses of a floating dtype, found torch.int64",
            lambda m: sf.estimate_fisher(m, RETAIN, task=Whole()),
        ),
        (
            "task: expected a batch whose first tensor is .*found one number",
            lambda m: sf.estimate_fisher(m, [{"x": torch.ones(())}], task=Dicts()),
        ),
        (
            r"mixed: expected bool targets \[4\], found \[1\]",
            lambda m: methods.bad_teacher(
                m, [{"x": RETAIN[0]["x"], "y": torch.tensor([True])}], build(), task=Dicts()
            ),
        ),
        (
            "forget: expected batches with a tensor in them",
            lambda m: sf.estimate_mask(m, forget=["text"], retain=RETAIN, task=Dicts()),
        ),
    ],
)
def test_what_a_task_gives_is_looked_at(expected, call):
    model = build()
    before = bits(model)
    with pytest.raises(ValueError, match=expected):
        call(model)
    assert same(bits(model), before)


def test_what_a_task_lacks_is_refused_before_the_first_batch():
    """Not after ascent, nor after two Fisher passes."""

    class Unread:
        def __iter__(self):
            raise AssertionError("read")

    class Plain(sf.Task):
        def losses(self, model, batch):
            return model(batch["x"]).square().mean(1)

        def logits(self, outputs, batch):
            return outputs

    sets = {"forget": Unread(), "retain": Unread()}
    calls = [
        (r"losses\(\) or losses_of\(\)", lambda: methods.scrub(build(), task=Plain(), **sets)),
        (
            r"logits\(\)",
            lambda: methods.selective_amnesia(build(), task=Lacking(), **sets),
        ),
        (r"targets\(\)", lambda: methods.bad_teacher(build(), Unread(), build(), task=Plain())),
        (
            r"correct\(\)",
            lambda: sf.unlearn(build(), task=Plain(), eval_every=1, forget_floor=0.0, **sets),
        ),
    ]
    for lacking, call in calls:
        with pytest.raises(ValueError, match=f"task: expected a task with {lacking}"):
            call()


def test_weights_that_are_lost_are_told_of():
    def spoiled(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none") * float("nan")

    task = sf.Classification(spoiled)
    with pytest.warns(RuntimeWarning, match="the loss was not finite in epoch 1"):
        methods.finetune(build(), pairs(RETAIN), epochs=1, task=task)


class Lacking(sf.Task):
    def outputs(self, model, batch):
        return model(batch["x"])

    def losses(self, model, batch):
        return (model(batch["x"]) ** 2).mean(1)


@pytest.mark.parametrize(
    ("name", "what"),
    [("scrub", "losses_of"), ("bad_teacher", "targets"), ("selective_amnesia", "logits")],
)
def test_what_a_task_lacks_is_named(name, what):
    model = build()
    before = bits(model)
    with pytest.raises(
        ValueError, match=rf"task: expected a task with .*{what}\(\).*found Lacking"
    ):
        METHODS[name](model, FORGET, RETAIN, {"task": Lacking()})
    assert same(bits(model), before)


def test_what_is_no_task_is_refused():
    model = build()
    before = bits(model)
    sets = {"forget": FORGET, "retain": RETAIN}
    calls = {
        "a Task, for example": lambda: methods.finetune(model, RETAIN, task="language"),
        "one of task and loss_fn": lambda: sf.estimate_fisher(
            model, RETAIN, F.cross_entropy, task=Dicts()
        ),
        r"per-sample losses \[": lambda: sf.unlearn(model, task=Summed(), **sets),
        r"a task with correct\(\)": lambda: sf.unlearn(
            model, task=Lacking(), eval_every=1, holdout=RETAIN, over_forgetting="stop", **sets
        ),
    }
    for expected, call in calls.items():
        with pytest.raises(ValueError, match=f"task: expected {expected}.*found"):
            call()
    with pytest.raises(ValueError, match="forget: expected batches with a tensor in them, found"):
        sf.unlearn(model, forget=["text"], retain=RETAIN, task=Dicts(), mask=everything(model))
    assert same(bits(model), before)


class Summed(Lacking):
    def losses(self, model, batch):
        return super().losses(model, batch).sum()


def everything(model):
    return sf.SaliencyMask.from_bool({n: torch.ones(p.shape) for n, p in model.named_parameters()})


def test_a_task_has_defaults_for_tensors_alone():
    """A language model's batch may be one tensor of ids."""
    task = tasks.Task()
    batch = task.prepare(torch.ones(3, 2), torch.device("meta"))
    assert batch.device.type == "meta"
    assert task.samples(batch) == 3
    assert task.outputs(lambda x: x.sum(1), torch.ones(3, 2)).tolist() == [2.0, 2.0, 2.0]
    assert task.state_dict() == {}
