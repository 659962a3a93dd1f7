"""Runs the benchmarks and prints the comparison: `python -m bench [pytest arguments]`.

Every group is one job by several contenders, timed in one run. What counts are the ratios:
`fastlora` against each named peer, and against the floor where the group has one.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        status = pytest.main(
            [str(HERE), "-q", "--benchmark-quiet", f"--benchmark-json={path}", *arguments]
        )
        if path.exists() and path.stat().st_size:
            print(table(json.loads(path.read_text())))
    return int(status)


def table(report: dict[str, Any]) -> str:
    """Fastest time of every contender of every group, and its ratio to fastlora's."""
    groups: dict[str, dict[str, Any]] = {}
    for item in report["benchmarks"]:
        contender = item["params"]["contender"]
        groups.setdefault(item["group"], {})[contender] = item
    lines = [f"{'':<52}{'fastest':>12}{'median':>12}   fastlora / it"]
    for group, items in groups.items():
        lines.append(group)
        ours = items.get("fastlora")
        for contender, item in items.items():
            stats = item["stats"]
            ratio = f"{ours['stats']['min'] / stats['min']:.2f}" if ours else ""
            times = f"{duration(stats['min']):>12}{duration(stats['median']):>12}"
            lines.append(
                f"    {contender:<48}{times}   {ratio if item is not ours else ''}".rstrip()
            )
    lines += means(groups)
    return "\n".join(lines)


def means(groups: dict[str, dict[str, Any]]) -> list[str]:
    """Geometric means over the model's layers, weighted by how often each is called."""
    weighted: dict[str, list[tuple[float, float]]] = {}
    for items in groups.values():
        for contender, item in items.items():
            count = item["extra_info"].get("count")
            if count and contender != "fastlora" and "fastlora" in items:
                ratio = items["fastlora"]["stats"]["min"] / item["stats"]["min"]
                weighted.setdefault(contender, []).append((count, math.log(ratio)))
    if not weighted:
        return []
    lines = ["lora_linear, geometric mean over the layers of SD 1.5, weighted by count"]
    for contender, pairs in weighted.items():
        total = sum(count for count, _ in pairs)
        mean = math.exp(sum(count * log for count, log in pairs) / total)
        lines.append(f"    {contender:<72}   {mean:.3f}")
    return lines


def duration(seconds: float) -> str:
    unit, scale = ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:.2f} {unit}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
