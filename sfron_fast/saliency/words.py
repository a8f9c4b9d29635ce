"""What a mask says of itself."""

from typing import Any


def line(mask: Any) -> str:
    """``1,234 of 5,678 weights (21.7 %) in 4 tensors``"""
    counts = mask.counts()
    selected, size = sum(counts.values()), sum(map(mask.size, counts))
    share = 100 * selected / max(size, 1)
    return f"{selected:,} of {size:,} weights ({share:.1f} %) in {len(counts)} tensors"


def table(mask: Any) -> str:
    """Selected weights and density per parameter, totals last."""
    counts = mask.counts()
    width = max([len(n) for n in counts] + [5])
    lines = [(n, mask.size(n), count) for n, count in counts.items()]
    lines.append(("total", sum(map(mask.size, counts)), sum(counts.values())))
    rows = [f"{'':{width}}  {'weights':>12}  {'selected':>12}  {'density':>8}"]
    for name, size, count in lines:
        share = 100 * count / max(size, 1)
        rows.append(f"{name:{width}}  {size:12,}  {count:12,}  {share:7.2f}%")
    return "\n".join(rows)
