"""Compare the losses of two environments: how far they differ, relative, from the same weights and images.

    python tests/equal_losses.py ONE.json OTHER.json

Both files come from one machine, since the processor decides the last bits; pytest writes them:

    SEEN_LOSSES=ONE.json python -m pytest tests/golden/test_golden.py -k "losses or checkpoint"

Prints a row for each plugin and layout. Status 1 if a loss in fp32 differs by more than 1e-6.
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

from golden.goldens import from_hex, is_16_bit

LIMIT = 1e-6


def losses(value, name: str = "") -> list[float]:
    """The losses in what a case saw, in order."""
    if isinstance(value, dict):
        return [loss for key, part in value.items() for loss in losses(part, key)]
    if isinstance(value, list):
        return [loss for part in value for loss in losses(part, name)]
    return [value] if isinstance(value, float) and ("loss" in name or name == "exported") else []


def difference(one, other) -> float:
    """The largest relative difference of the losses of a case; infinite if one is not a number."""
    pairs = zip(losses(from_hex(one)), losses(from_hex(other)), strict=True)
    return max((abs(a - b) / abs(b) if a == a and b == b else math.inf for a, b in pairs), default=0.0)


def row_of(part: str, case: str) -> str:
    """What a case is counted with: `parallel_cases.py, 2` and `train tp2, clipped` -> `tp2, 2 processes`"""
    file, _, processes = part.partition(", ")
    if processes:
        layout = case.partition(" ")[2].partition(",")[0]
        return f"{layout}, {processes} process{'es' * (processes != '1')}"
    return case.partition(",")[0] if file == "tensor_parallel_cases.py" else f"whole runs: {file}"


def main() -> int:
    one, other = (json.loads(Path(path).read_text()) for path in sys.argv[1:])
    rows, missing = defaultdict(list), one.keys() ^ other.keys()
    for part in one.keys() & other.keys():
        for case in one[part].keys() & other[part].keys():
            precision = "16 bit" if is_16_bit(case) else "fp32"
            rows[row_of(part, case), precision].append(difference(one[part][case], other[part][case]))
    print("| plugin, layout | precision | cases | largest difference |\n|---|---|---|---|")
    for (name, precision), found in sorted(rows.items()):
        print(f"| {name} | {precision} | {len(found)} | {max(found):.1e} |")
    worst = max((max(found) for (_, precision), found in rows.items() if precision == "fp32"), default=1.0)
    print(f"fp32: largest relative difference {worst:.1e}, limit {LIMIT:.0e}")
    if missing:
        print("equal_losses: only one file has", *sorted(missing), file=sys.stderr)
    return int(worst > LIMIT or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
