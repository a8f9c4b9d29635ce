"""The tables, verdicts and pictures of ``compare``'s results; run it from the project's root:

    python -m examples.diffusion.compare_report [--results FOLDER] [--out FOLDER]

Writes ``README.md``, ``trade.png`` and, where ``--out`` has the images, ``grid.png``. What was
found in words is ``notes.md`` beside the JSON.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.systems.markdown import table

from .compare import RESULTS, STOPS, tried
from .compare_arms import ARMS, ATTACKED, CONTROLS, METHODS, PARTS
from .compare_figures import pictured, trade
from .compare_gates import EVERY, MET, Found, having, lost, mean, score, signs, values, verdict
from .compare_settings import GRIDS, said, settings
from .digits import CHOSEN

HEAD = """# A diffusion model of digits forgets one of them: the comparison

Made by `python -m examples.diffusion.compare_report` from the JSON that `compare` wrote beside it.

A class-conditional DDPM of scikit-learn's digits (a residual MLP of 368k weights, 4000 steps of
Adam) forgets class {classes}, of base models {seeds}: {pairs} pairs. Every method has
48 backward passes of 64 images where its name says no other.

FA: percent of the forgotten class's images that an independent judge takes for it; RA: the same of
the other nine classes; FD: Frechet distance of the others' features (the judge's 32) from held-out
images; real: percent of the others that lie among real ones; saturated: percent of pixels at +-1;
w: guidance, (1 + w) conditional - w unconditional predictions. 46 images a class, 20 steps of DDIM,
the same noise for every model. One image is 2.2 points of FA. Seconds are CPU seconds of one
thread, of a machine that did other work besides, with the masks and profiles an arm asked for.
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where compare.py wrote")
    parser.add_argument("--out", type=Path, default=Path("build/diffusion"), help="its --out")
    return parser.parse_args(arguments)


def figures(pairs: Sequence[Found], arms: Sequence[str]) -> str:
    """Means; of FA the worst too."""
    lines = []
    for arm in arms:
        there = having(pairs, arm)
        if not there:
            continue
        both = [[mean(values(there, arm, key, w)) for w in "10"] for key in ("fa", "ra", "fd")]
        (fa, fa0), (ra, ra0), (fd, fd0) = both
        real, saturated = (mean(values(there, arm, key)) for key in ("real", "saturated"))
        seconds = mean(pair["rows"][arm]["seconds"] for pair in there)
        name = arm if len(there) == len(pairs) else f"{arm} ({len(there)} pairs)"
        lines.append(
            [
                name,
                f"{fa:.1f} ({max(values(there, arm, 'fa')):.0f})",
                f"{fa0:.1f} ({max(values(there, arm, 'fa', '0')):.0f})",
                *(f"{ra:.1f} {ra0:.1f} {fd:.2f} {fd0:.2f}".split()),
                *(f"{real:.0f} {saturated:.0f} {seconds:.2f}".split()),
            ]
        )
    return table(
        [
            "",
            *("FA, w 1 (worst)", "FA, w 0 (worst)", "RA, w 1", "RA, w 0", "FD, w 1", "FD, w 0"),
            *("real", "saturated", "s"),
        ],
        lines,
    )


def by_class(pairs: Sequence[Found], arms: Sequence[str]) -> str:
    """FA at guidance 1 of every pair, and the lowest RA at both guidances."""
    classes = sorted({pair["class"] for pair in pairs})
    lines = []
    for arm in arms:
        there = having(pairs, arm)
        cells = [
            " ".join(f"{x:.0f}" for x in values([p for p in there if p["class"] == c], arm, "fa"))
            for c in classes
        ]
        if there:
            worst = (f"{min(values(there, arm, 'ra', w)):.1f}" for w in "10")
            lines.append([arm, *cells, *worst])
    return table(["", *map(str, classes), "lowest RA, w 1", "lowest RA, w 0"], lines)


def gates(pairs: Sequence[Found]) -> str:
    """A line for each."""
    lines = []
    for heading, every in EVERY.items():
        for gate in every:
            ruling, found = verdict(gate, pairs)
            shown = ruling if ruling == MET else f"**{ruling}**"
            lines.append([heading, gate.name, found, shown])
    return table(["", "gate", "found", ""], lines)


def parts(pairs: Sequence[Found]) -> str:
    """Each against the whole, paired."""
    lines = []
    for arm in PARTS:
        whole = "SFR-on" if arm.startswith("SFR-on") else "SFR-on, ascent"
        there = having(pairs, arm, whole)
        if not there:
            continue
        points = [[lost(pair["rows"][name]) for pair in there] for name in (whole, arm)]
        cells = [f"{mean(points[0]):.1f} / {mean(points[1]):.1f}"]
        for ours, theirs in (
            points,
            *([values(there, name, key) for name in (whole, arm)] for key in ("fa", "fd")),
        ):
            found = signs(ours, theirs)
            cells.append(f"{found.lower} {found.higher} {found.alike}, {found.p:.2g}")
        lines.append([arm, whole, *cells])
    return table(
        ["", "whole", "points lost, whole / without", "points: signs, p", "FA", "FD"], lines
    )


def attack(pairs: Sequence[Found]) -> str:
    """FA by steps, RA before and after; of each, the mean and the worst."""
    lines = []
    for arm in ATTACKED:
        there = having(pairs, arm)
        if not there:
            continue
        rows = [pair["rows"][arm] for pair in there]
        cells = [f"{mean(row['1']['ra'] for row in rows):.1f}"]
        for found in (
            [row["1"] for row in rows],
            *([r["attack"][str(n)] for r in rows] for n in STOPS),
        ):
            each = [at["fa"] for at in found]
            cells.append(f"{mean(each):.1f} ({max(each):.0f})")
        cells.append(f"{mean(row['attack'][str(STOPS[-1])]['ra'] for row in rows):.1f}")
        lines.append([arm, *cells])
    header = ["", "RA before", "FA before (worst)", *(f"{n} steps" for n in STOPS), "RA after"]
    return table(header, lines)


def masks(pairs: Sequence[Found]) -> str:
    """What they cost and share."""
    lines = []
    for pair in pairs:
        if "masks" in pair:
            of, retrained = pair["masks"], pair["rows"].get("Retrain", {}).get("seconds")
            share = f"1/{retrained / of['seconds']:.0f}" if retrained else "-"
            cells = [f"{of['density']:.3f}", f"{of['overlap']:.3f}", f"{of['seconds']:.2f}", share]
            lines.append([f"{pair['seed']}, {pair['class']}", *cells])
    header = ["base model, class", "selected", "overlap", "s of both Fishers", "of Retrain's"]
    return table(header, lines)


def choice(folder: Path) -> str:
    """What was tried on the other classes; the lowest score was to be taken."""
    found = [folder / "choice" / f"class{label}.json" for label in CHOSEN]
    every = [json.loads(path.read_text())["rows"] for path in found if path.exists()]
    lines = []
    for name in GRIDS:
        scores = {
            said(of): mean(score(rows[row], rows["base"]) for rows in every)
            for _, row, of in tried([name])
            if every and all(row in rows for rows in every)
        }
        if scores:
            cells = (f"{of}: {points:.2f}" for of, points in scores.items())
            best = min(scores, key=lambda of: scores[of])
            lines.append([name, "; ".join(cells), best, said(settings(name))])
    return table(["", "learning rate and what else differs: score", "lowest", "used"], lines)


def page(pairs: Sequence[Found], folder: Path, pictures: Mapping[str, bool]) -> str:
    classes = sorted({pair["class"] for pair in pairs})
    seeds = sorted({pair["seed"] for pair in pairs})
    named = (" ".join(map(str, numbers)) for numbers in (classes, seeds))
    head = dict(zip(("classes", "seeds"), named, strict=True))
    notes = folder / "notes.md"
    parts_of = {
        "Gates": gates(pairs),
        "Methods": "Means over the pairs.\n\n" + figures(pairs, ("base", "Retrain", *METHODS)),
        "Controls that must fail": figures(pairs, tuple(CONTROLS)),
        "Parts": "Points lost: FA and 100 - RA, mean over both guidances. Signs: on how many pairs"
        " the whole is lower, is higher, both are alike; p of a two-sided sign test. Every form of"
        " the ascent chose its learning rate as the whole did.\n\n"
        + figures(pairs, ("SFR-on, ascent", "SFR-on", *PARTS))
        + "\n\n"
        + parts(pairs),
        "Relearning": "Adam 1e-3 on images of the other classes alone, begun anew at each stop.\n\n"
        + attack(pairs),
        "By class": "FA at w 1, a number for each base model.\n\n"
        + by_class(pairs, ("base", "Retrain", *ARMS)),
        "Masks": "Eight draws a sample, gamma 1.\n\n" + masks(pairs),
        "Settings": f"Learning rates tried on classes {' '.join(map(str, CHOSEN))} of a base model"
        " of their own, the score's mean over these classes: points lost, and one for each .1 of"
        " FD above the base's. All else is as the recipes have it.\n\n" + choice(folder),
    }
    blocks = [
        HEAD.format(pairs=len(pairs), **head),
        notes.read_text().strip() if notes.exists() else "",
        *(f"## {heading}\n\n{text}" for heading, text in parts_of.items()),
    ]
    shown = [f"![{name}]({name}.png)" for name, there in pictures.items() if there]
    return "\n\n".join(part.strip() for part in (*blocks, *shown) if part.strip()) + "\n"


def report(folder: Path, out: Path) -> str:
    """Write the page and the pictures.

    Raises:
        ValueError: there are no results.
    """
    paths = sorted(folder.glob("seed*_class*.json"))
    if not paths:
        raise ValueError(f"--results: expected seed*_class*.json, found none in {folder}")
    pairs = [json.loads(path.read_text()) for path in paths]
    trade(pairs, folder / "trade.png")
    pictured(out / "strips", folder / "grid.png")
    pictures = {name: (folder / f"{name}.png").exists() for name in ("trade", "grid")}
    text = page(pairs, folder, pictures)
    (folder / "README.md").write_text(text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    print(report(given.results, given.out))


if __name__ == "__main__":
    main()
