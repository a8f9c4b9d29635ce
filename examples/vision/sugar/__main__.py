"""SUGAR: a generator diverts identities to surrogates of their own, many at once or one by one.

    python -m examples.vision.sugar [--seed N] [--out DIR] [--data FILE]

A VAE learns scikit-learn's digits; every image is an identity, its latent the mean of its
posterior. Some are forgotten, held-out images are what is to be retained. Likeness is the cosine by
a network that tells images apart, another one than the method uses. All arms differ from SUGAR in
what their name says and in nothing else.
"""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfron_fast as sf
from examples.systems.claims import Claim, at_most, record, write
from examples.systems.images import options
from sfron_fast import methods

from .figure import draw
from .generator import LATENT, read, train_identity, train_vae

OUT = Path("benchmarks/results/systems/sugar")
TITLE = "SUGAR: identities diverted to surrogates of their own"
COUNTS, MANY, REQUESTS = (1, 10, 20), 10, 10
OTHERS = 512  # latents of the prior: no image is needed to forget one
DISTANCE = LATENT**0.5  # where the prior's latents lie
AT_MEAN = 0.1  # the distance at which mean extrapolation retains most, of those tried
SURROGATE = {"feature_weight": 0.25, "epochs": 300}
UNLEARN = {"reach": 1.0, "feature_weight": 0.1, "lr": 5e-4, "epochs": 300}
PENALTY, REPLAY = 640.0, 5.0
RATIO = 1 / 3
MATCHED = 0.1  # ten strangers' mean likeness has a standard error of .06
EXTRAPOLATED, OFF = "mean extrapolation", "elastic weights off"

Facts = dict[str, Any]


class Setting:
    """One seed's generator, what it is asked, and who judges it."""

    def __init__(self, seed: int, data: Path | None) -> None:
        self.seed = seed
        images, held_out = read(data)
        vae = train_vae(images, seed)
        self.generator, self.pixels = vae.generator, images.shape[1]
        self.features = train_identity(vae, images, 1000 + seed)
        self.judge = train_identity(vae, images, 2000 + seed)
        draw = torch.Generator().manual_seed(seed)
        self.others = torch.randn(OTHERS, LATENT, generator=draw)
        self.shared: dict[str, Any] = {
            "others": self.others,
            "features": self.features,
            "seed": seed,
        }
        with torch.no_grad():
            known, retain = vae.posterior(images)[0], vae.posterior(held_out)[0]
            self.identities = known[torch.randperm(len(known), generator=draw)]
            forgotten = self.identities[: max(COUNTS)]
            # whoever is within reach of an identity is asked to go along with it
            self.retain = retain[torch.cdist(retain, forgotten).min(1).values > UNLEARN["reach"]]
            self.before = self.generator(self.identities)
            self.kept = self.generator(self.retain)
            self.enrolled = self.judge(self.before)

    def surrogates(self, model: nn.Module, identities: Tensor) -> methods.SurrogateLatents:
        """Learnt for these identities."""
        settings = {**self.shared, "distance": DISTANCE, **SURROGATE}
        return methods.fit_surrogates(model, identities=identities, **settings)

    def through_the_mean(self, distance: float = DISTANCE) -> methods.SurrogateLatents:
        """The control."""
        return methods.SurrogateLatents(self.others.mean(0), distance)

    def even(self, model: nn.Module) -> sf.Fisher:
        """A Fisher that is the same for all weights, with the sum of the sampled one."""
        found = methods.sampled_fisher(model, self.others, seed=self.seed)
        mean = sum(float(f.sum()) for f in found.values()) / sum(f.numel() for f in found.values())
        return sf.Fisher({name: torch.full_like(f, mean) for name, f in found.items()})

    def request(
        self, model: nn.Module, identities: Tensor, surrogates: Any, **settings: Any
    ) -> nn.Module:
        """In place."""
        given = {**self.shared, "penalty": PENALTY, **UNLEARN, **settings}
        return methods.sugar(model, identities=identities, surrogates=surrogates, **given)

    @torch.no_grad()
    def measured(self, model: nn.Module, count: int) -> dict[str, float]:
        """Of the first ``count`` identities, and of those that are retained."""
        seen = self.judge(model(self.identities[:count]))
        named = (seen @ self.enrolled.T).argmax(1) == torch.arange(count)
        drawn = model(self.retain)
        return {
            "likeness": float((seen * self.enrolled[:count]).sum(1).mean()),
            "recognised": float(named.float().mean()),
            "retain error": float(F.mse_loss(drawn, self.kept)),
            "retain likeness": float((self.judge(drawn) * self.judge(self.kept)).sum(1).mean()),
        }


def at_once(setting: Setting) -> tuple[Facts, dict[str, nn.Module]]:
    """Facts by number of identities and arm, and the models of ``MANY``."""
    facts: Facts = {}
    models: dict[str, nn.Module] = {}
    for count in COUNTS:
        identities = setting.identities[:count]
        own = setting.surrogates(setting.generator, identities)
        mean = setting.through_the_mean()
        arms: dict[str, tuple[Any, dict[str, float]]] = {
            "SUGAR": (own, {}),
            EXTRAPOLATED: (mean, {}),
        }
        if count == MANY:
            replay = {"penalty": 0.0, "replay": REPLAY}
            arms[OFF] = own, {"penalty": 0.0}
            arms["replay"] = own, replay
            arms[f"{EXTRAPOLATED}, replay"] = mean, replay
            arms[f"{EXTRAPOLATED}, at the mean"] = setting.through_the_mean(AT_MEAN), {}
        facts[str(count)] = {}
        for name, (surrogates, settings) in arms.items():
            model = copy.deepcopy(setting.generator)
            setting.request(model, identities, surrogates, **settings)
            facts[str(count)][name] = setting.measured(model, count)
            if count == MANY:
                models[name] = model
            show(f"{count} at once, {name}", facts[str(count)][name])
    return facts, models


def one_by_one(setting: Setting) -> Facts:
    """By arm, after each of ten requests."""
    mean = setting.through_the_mean()
    arms: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
        "SUGAR": lambda model: {},
        OFF: lambda model: {"penalty": 0.0},
        "even pull": lambda model: {"fisher": setting.even(model)},
        "replay": lambda model: {"penalty": 0.0, "replay": REPLAY},
        EXTRAPOLATED: lambda model: {},
    }
    facts: Facts = {}
    for name, settings in arms.items():
        model, rows = copy.deepcopy(setting.generator), []
        for number in range(REQUESTS):
            identity = setting.identities[number : number + 1]
            to = mean if name == EXTRAPOLATED else setting.surrogates(model, identity)
            setting.request(model, identity, to, **settings(model))
            rows.append(setting.measured(model, number + 1))
        facts[name] = rows
        show(f"after {REQUESTS} requests, {name}", rows[-1])
    return facts


def show(title: str, row: dict[str, float]) -> None:
    print(title, {key: round(value, 3) for key, value in row.items()}, flush=True)


@torch.no_grad()
def pictures(setting: Setting, models: dict[str, nn.Module], count: int = 10) -> Facts:
    """Images as bytes in hexadecimal, one string a row of ``count``: forgotten, then retained."""

    def row(model: nn.Module, latents: Tensor) -> str:
        grey = ((model(latents[:count]) + 1.0) * 127.5).round().clamp(0, 255)
        return bytes(grey.byte().flatten().tolist()).hex()

    shown = {"before": setting.generator, "SUGAR": models["SUGAR"]}
    shown[EXTRAPOLATED] = models[EXTRAPOLATED]
    return {
        name: {
            "forgotten": row(model, setting.identities),
            "retained": row(model, setting.retain),
        }
        for name, model in shown.items()
    }


def judged(facts: Facts) -> tuple[list[Claim], list[Claim]]:
    """Claims and controls from what was measured."""
    error, likeness = "retain error", "likeness"
    claims: list[Claim] = []
    controls: list[Claim] = []
    for count in (count for count in COUNTS if count >= MANY):
        rows = facts["at once"][str(count)]
        ours, theirs = rows["SUGAR"], rows[EXTRAPOLATED]
        title = f"{count} at once"
        less = ours[likeness] - theirs[likeness]
        claims += [
            at_most(f"{title}: {error} by {EXTRAPOLATED}'s", ours[error] / theirs[error], RATIO),
            at_most(f"{title}: {likeness}, minus that of {EXTRAPOLATED}", less, MATCHED),
        ]
        controls.append(worse(f"{title}: {EXTRAPOLATED}", theirs[error] / ours[error]))
    ours, off = (facts["one by one"][name][-1] for name in ("SUGAR", OFF))
    title, less = f"{REQUESTS} requests", ours[likeness] - off[likeness]
    claims.append(at_most(f"{title}: {likeness}, minus that with {OFF}", less, MATCHED))
    controls.append(worse(f"{title}: {OFF}", off[error] / ours[error]))
    return claims, controls


def worse(text: str, ratio: float) -> Claim:
    """A control that must retain less."""
    return Claim(f"{text}, retain error by SUGAR's", ratio, "> 1", ratio > 1.0)


def run(seed: int, data: Path | None = None) -> dict[str, Any]:
    """One seed: the generator, the two networks, who is forgotten, and all draws."""
    start = time.process_time()
    setting = Setting(seed, data)
    together, models = at_once(setting)
    facts = {
        "data": "scikit-learn's digits" if data is None else data.name,
        "retained": len(setting.retain),
        "likeness of strangers": strangers(setting),
        "at once": together,
        "one by one": one_by_one(setting),
        "pictures": pictures(setting, models),
    }
    claims, controls = judged(facts)
    return record(seed, claims, controls, facts, time.process_time() - start)


def strangers(setting: Setting) -> dict[str, float]:
    """Likeness of pairs of different identities."""
    alike = setting.enrolled @ setting.enrolled.T
    pairs = alike[~torch.eye(len(alike), dtype=torch.bool)]
    return {"mean": float(pairs.mean()), "deviation": float(pairs.std())}


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, OUT).parse_args(arguments)
    found = write(chosen.out, run(chosen.seed, chosen.data), TITLE)
    draw(found, chosen.out / "sugar.png")


if __name__ == "__main__":
    main()
