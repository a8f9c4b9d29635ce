"""One table of all published systems."""

from paths import ROOT

from examples.systems.claims import at_least, at_most, record, write
from examples.systems.overview import SYSTEMS, overview


def test_a_row_has_what_every_seed_found(tmp_path):
    met, missed = at_least("p", 0.5, 0.25), at_most("q", 0.75, 0.5)
    for seed in (1, 0):
        write(tmp_path / "one", record(seed, [met, missed], [met], {}, 1.0), "One: a claim")
        write(tmp_path / "two" / "mnist", record(seed, [met], [missed], {}, 1.0), "Two")
    lines = overview(tmp_path).splitlines()
    p, q = "• p: 0.5 / 0.5 (>= 0.25)", "• q: **0.75** / **0.75** (<= 0.5)"
    assert lines[-2:] == [
        f"| [One](one/README.md) | FAIL / FAIL | {p}<br>{q} | {p} |",
        f"| [Two, mnist](two/mnist/README.md) | NOT SHOWN / NOT SHOWN | {p} | {q} |",
    ]


def test_the_committed_page_is_of_the_committed_results():
    systems = ROOT / SYSTEMS
    assert (systems / "README.md").read_text() == overview(systems)
