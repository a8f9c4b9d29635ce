"""Metrics of several methods and seeds as a plain table, Markdown with figures, and JSON."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import require
from ..files import write_whole
from .meanings import EXPLAINED, GUARANTEE, NO_REFERENCE, REFERENCE
from .metrics import COMPARED, METRICS
from .provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST = ("Original", "Retrain")  # the rows every table starts with; gaps are to the second
UNITS = {"RTE": "s"} | dict.fromkeys((*COMPARED, "MIA_m", "Avg.D"), "%")
WIDTH = 120  # characters per line of the plain table


class Report:
    """Metrics by setting, method and seed.

    `settings`: {name: one line about data, model and forget set}; `add` then refuses other names.
    Without it any name is taken. `notes`: lines for the end of the Markdown (choice of the
    reference, hyper-parameters). The mean is over seeds; the standard deviation is the sample one
    (ddof = 1), and 0.0 for a single seed.
    """

    def __init__(
        self, settings: Mapping[str, str] | None = None, *, notes: Sequence[str] = ()
    ) -> None:
        named = settings is None or isinstance(settings, Mapping)
        wanted = "{name: one line about it}"
        require(named, "settings", wanted, type(settings).__name__)
        self.settings = dict(settings or {})
        self.notes = list(notes)
        self._runs: dict[str, dict[str, dict[int, dict[str, float]]]] = {}

    def add(self, setting: str, method: str, seed: int, metrics: Mapping[str, float]) -> None:
        """Record one run. "Original" and "Retrain" are the methods the others are compared with.

        Raises ValueError, recording nothing, for a value that is not a finite number, a run given
        twice, a setting the report does not know, or metrics other than those of the method's
        earlier seeds.
        """
        known = not self.settings or setting in self.settings
        require(
            known,
            "setting",
            f"one of {list(self.settings)}",
            repr(setting),
            "describe it in Report(...)",
        )
        where = f"{setting} / {method} / seed {seed}"
        require(isinstance(seed, Integral), "seed", "an integer", repr(seed))
        named = isinstance(metrics, Mapping) or metrics is None
        require(named, "metrics", "{name: number}", type(metrics).__name__, where)
        require(bool(metrics), "metrics", "at least one metric", "none", where)
        for name, value in metrics.items():
            good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            require(good, f"metrics[{name!r}]", "a finite number", repr(value), f"in {where}")
        seeds = self._runs.get(setting, {}).get(method, {})
        require(seed not in seeds, "seed", "one not yet added", seed, f"in {where}")
        for earlier in seeds.values():
            require(
                earlier.keys() == metrics.keys(),
                "metrics",
                str(list(earlier)),
                list(metrics),
                f"in {where}",
            )
        record = {name: float(value) for name, value in metrics.items()}
        self._runs.setdefault(setting, {}).setdefault(method, {})[int(seed)] = record

    def table(self) -> str:
        """Aligned text: mean ± std; for FA, RA, TA and MIA the signed gap to Retrain in
        parentheses.
        """
        blocks = []
        for setting in self._runs:
            header, *rows = self._cells(setting)
            widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
            lines = [self._heading(setting)]
            for columns in _chunks(widths):
                lines.append("")
                for row in (header, *rows):
                    cells = (
                        row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i])
                        for i in columns
                    )
                    lines.append("  ".join(cells).rstrip())
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks) + "\n"

    def markdown(self, figures: Iterable[str] = ()) -> str:
        """The tables, the `figures` (PNG names without the suffix), and what the numbers do not
        say.
        """
        return self._markdown(figures, provenance(self._seeds()))

    def to_dict(self) -> dict[str, Any]:
        """Means and deviations, every run, and where they come from, as JSON types.

        {"settings": {setting: {method: {metric: {"mean", "std"}}}}, "descriptions": {setting:
        text},
        "runs": [{"setting", "method", "seed", "metrics"}], "provenance": {...}, "notes": [...]}
        """
        return {
            "settings": {s: {m: self._summary(s, m) for m in self._methods(s)} for s in self._runs},
            "descriptions": self.settings,
            "runs": [
                {"setting": setting, "method": method, "seed": seed, "metrics": metrics}
                for setting, methods in self._runs.items()
                for method, seeds in methods.items()
                for seed, metrics in seeds.items()
            ],
            "provenance": provenance(self._seeds()),
            "notes": [*self.notes, *self._caveats()],
        }

    def save(
        self, folder: str | os.PathLike[str], figures: Mapping[str, Figure] | None = None
    ) -> Path:
        """Write report.md, report.json and ``name``.png for each figure; return the folder, made if
        missing.

        A file appears whole or not at all. Raises ValueError for a figure name that is not a plain
        file name, a file in the folder's place, and a report without a run.
        """
        figures = figures or {}
        for name in figures:
            plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None
            require(plain, "figures", "names of letters, digits, . _ -", repr(name))
        require(bool(self._runs), "report", "at least one run", "none", "add(...) one first")
        path = Path(folder)
        there = not path.exists() or path.is_dir()
        require(there, "folder", "a folder, or nothing there yet", f"a file at {path}")
        path.mkdir(parents=True, exist_ok=True)
        content = self.to_dict()
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        for name, figure in figures.items():
            write_whole(path / f"{name}.png", partial(figure.savefig, format="png", dpi=150))
        write_whole(path / "report.json", lambda to: to.write_text(text, encoding="utf-8"))
        page = self._markdown(figures, content["provenance"])
        write_whole(path / "report.md", lambda to: to.write_text(page, encoding="utf-8"))
        return path

    def _methods(self, setting: str) -> list[str]:
        methods = self._runs[setting]
        return [m for m in FIRST if m in methods] + [m for m in methods if m not in FIRST]

    def _metrics(self, setting: str) -> list[str]:
        given = {
            name: None
            for runs in self._runs[setting].values()
            for run in runs.values()
            for name in run
        }
        return [m for m in METRICS if m in given] + [m for m in given if m not in METRICS]

    def _summary(self, setting: str, method: str) -> dict[str, dict[str, float]]:
        runs = list(self._runs[setting][method].values())
        columns = {
            name: [run[name] for run in runs] for name in self._metrics(setting) if name in runs[0]
        }
        return {
            name: {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
            for name, values in columns.items()
        }

    def _cells(self, setting: str) -> list[list[str]]:
        """The header and one row per method, as text."""
        names = self._metrics(setting)
        target = self._summary(setting, FIRST[1]) if FIRST[1] in self._runs[setting] else {}
        rows = [
            ["method", *(f"{name} [{UNITS[name]}]" if name in UNITS else name for name in names)]
        ]
        for method in self._methods(setting):
            summary, several = self._summary(setting, method), len(self._runs[setting][method]) > 1
            row = [method]
            for name in names:
                if name not in summary:
                    row.append("–")  # noqa: RUF001
                    continue
                mean, std = summary[name]["mean"], summary[name]["std"]
                digits = 2 if name in UNITS else 4
                text = f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if several else "")
                if name in COMPARED and name in target and method != FIRST[1]:
                    text += f" ({mean - target[name]['mean']:+.{digits}f})"
                row.append(text)
            rows.append(row)
        return rows

    def _heading(self, setting: str) -> str:
        return f"{setting}: {self.settings[setting]}" if self.settings.get(setting) else setting

    def _markdown(self, figures: Iterable[str], provenance: Mapping[str, Any]) -> str:
        lines = ["# Unlearning report", ""]
        for setting in self._runs:
            header, *rows = (
                [cell.replace("|", "\\|") for cell in row] for row in self._cells(setting)
            )
            lines += [f"## {setting}", ""]
            lines += [self.settings[setting], ""] if self.settings.get(setting) else []
            lines += [
                _row(header),
                _row([":--", *["--:"] * (len(header) - 1)]),
                *map(_row, rows),
                "",
            ]
        for name in figures:
            lines += [f"![{name}]({name}.png)", ""]
        lines += ["## What these numbers are", ""]
        lines += [f"- {note}" for note in (*self.notes, *self._caveats())]
        versions = ", ".join(
            f"{name} {version}" for name, version in provenance["versions"].items()
        )
        machine = (
            f"{provenance['platform']}, {provenance['device']}, {provenance['threads']} threads"
        )
        return "\n".join([*lines, f"- Made {provenance['date']} on {machine}; {versions}.", ""])

    def _caveats(self) -> list[str]:
        methods = [runs for setting in self._runs.values() for runs in setting.values()]
        given = {name for runs in methods for run in runs.values() for name in run}
        alone = [setting for setting, runs in self._runs.items() if FIRST[1] not in runs]
        reference = REFERENCE + (f" There is none for {', '.join(alone)}." if alone else "")
        single = (
            "Values without ± are from one seed. "
            if any(len(runs) == 1 for runs in methods)
            else ""
        )
        seeds = (
            f"Seeds: {', '.join(map(str, self._seeds()))}. {single}± is the sample standard"
            " deviation."
        )
        explained = [text for name, text in EXPLAINED.items() if name in given]
        return [
            NO_REFERENCE if len(alone) == len(self._runs) else reference,
            *explained,
            seeds,
            GUARANTEE,
        ]

    def _seeds(self) -> list[int]:
        return sorted(
            {
                seed
                for methods in self._runs.values()
                for seeds in methods.values()
                for seed in seeds
            }
        )


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _chunks(widths: Sequence[int]) -> list[list[int]]:
    """Columns per block of the plain table, at most WIDTH wide; each block repeats column 0."""
    blocks, used = [[0]], widths[0]
    for i in range(1, len(widths)):
        if used + 2 + widths[i] > WIDTH and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(i)
        used += 2 + widths[i]
    return blocks
