"""Runs PEFT's own LoRA tests on layers that fastlora has accelerated, and without, and compares.

    python tools/peft_suite.py ~/peft                          # a checkout of PEFT, or its sdist
    python tools/peft_suite.py ~/peft -k merge --jobs 2
    python tools/peft_suite.py ~/peft tests/test_mixed.py tests/test_lora_variants.py
    python tools/peft_suite.py ~/peft --baseline --json plain.json    # without acceleration only
    python tools/peft_suite.py ~/peft --against plain.json            # with it only, and compare

The tests of the checkout, the PEFT that is installed (its version should be the checkout's),
offline: tests that need a model of the Hub fail both times. Besides pytest they import datasets,
attrs and scipy. Of the cases whose parameters name configurations those with a LoraConfig are run.
Exit code 1 where a test fails on accelerated layers only, 2 where none was run or nothing fused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATHS = ("tests/test_custom_models.py", "tests/test_initialization.py")
Result = dict[str, Any]  # what peft_suite_plugin.py keeps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("checkout", type=Path, help="a checkout of PEFT, or its sdist unpacked")
    parser.add_argument("paths", nargs="*", help=f"other tests of it than {' and '.join(PATHS)}")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="pytest's -k")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share a run")
    parser.add_argument("--json", type=Path, help="write what became of every test here")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--baseline", action="store_true", help="run without acceleration only")
    one.add_argument("--against", type=Path, help="the --json of an earlier --baseline")
    options = parser.parse_args()
    options.checkout = options.checkout.resolve()
    options.paths = options.paths or [p for p in PATHS if (options.checkout / p).exists()]
    if not options.paths:
        print(f"peft_suite: checkout: expected {PATHS[0]} in it, got {options.checkout}")
        return 2
    earlier = json.loads(options.against.read_text())["plain"] if options.against else None
    results = {"plain": earlier or run("plain", options)}
    if not options.baseline:
        results["fast"] = run("fast", options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    print(f"\nPEFT {results['plain']['version']}; its tests as of {version(options.checkout)}")
    if options.baseline:
        return report_baseline(results["plain"])
    return report(results["plain"], results["fast"])


def run(kind: str, options: argparse.Namespace) -> Result:
    """Tests in processes of their own, where PEFT is patched before a test is imported."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / f"{number}.json" for number in range(options.jobs)]
        running = [start(kind, options, part, number) for number, part in enumerate(parts)]
        codes = [process.wait() for process in running]
        for part, code in zip(parts, codes, strict=True):
            if not part.exists():
                raise SystemExit(f"peft_suite: pytest stopped with exit code {code}")
        return joined([json.loads(part.read_text()) for part in parts])


def start(
    kind: str, options: argparse.Namespace, result: Path, number: int
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "--no-header"]
    command += ["--disable-warnings", "--continue-on-collection-errors", "-o", "addopts="]
    command += ["-p", "no:cacheprovider", "-p", "peft_suite_plugin", "--import-mode=importlib"]
    command += [f"--rootdir={options.checkout}", f"--suite-result={result}", "-k", options.k]
    command += ["--suite-kind", kind, "--suite-part", str(number), str(options.jobs)]
    path = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return subprocess.Popen(
        [*command, *options.paths], env=os.environ | environment, cwd=options.checkout
    )


def joined(parts: list[Result]) -> Result:
    whole: Result = {"version": parts[0]["version"]}
    for key in ("tests", "errors", "forwards"):
        whole[key] = {node: value for part in parts for node, value in part[key].items()}
    whole["layers"] = dict(sum((Counter(part["layers"]) for part in parts), Counter()))
    return whole


def version(checkout: Path) -> str:
    init = checkout / "src" / "peft" / "__init__.py"
    found = re.search(r'__version__ = "(.*?)"', init.read_text()) if init.exists() else None
    return found.group(1) if found else "unknown"


def report_baseline(plain: Result) -> int:
    print(f"passed / failed / skipped: {count(plain['tests'])}")
    print(f"tests that put LoRA layers into a model: {tests_with(plain, 'layers')}")
    print_reasons("failed", plain, list(plain["errors"]))
    return 0 if plain["tests"] else 2


def report(plain: Result, fast: Result) -> int:
    print(f"{'passed / failed / skipped':40}{'PEFT':>20}{'accelerated':>20}")
    for path in sorted({node.partition("::")[0] for node in plain["tests"] | fast["tests"]}):
        print(f"{path:40}{count(plain['tests'], path):>20}{count(fast['tests'], path):>20}")
    print(f"{'all':40}{count(plain['tests']):>20}{count(fast['tests']):>20}")
    ends = {n: (ended(plain, n), ended(fast, n)) for n in plain["tests"] | fast["tests"]}
    good = [n for n, end in ends.items() if end == ("passed", "passed")]
    both = [n for n, end in ends.items() if end == ("failed", "failed")]
    ours = [n for n, (without, now) in ends.items() if now not in (without, "passed")]
    theirs = [n for n, (without, now) in ends.items() if without != now == "passed"]
    print(f"passed both times {len(good)}, failed both times {len(both)}, ", end="")
    print(f"failed accelerated only {len(ours)}, failed without only {len(theirs)}")
    fused = report_forwards(fast)
    print_reasons("failed both times", fast, both)
    for title, side, nodes in (("accelerated", fast, ours), ("without", plain, theirs)):
        for node in nodes:
            print(f"failed {title} only: {node}\n    {reason(side, node)}")
    if not fused:
        print("peft_suite: no accelerated layer computed anything by itself")
        return 2
    return 1 if ours else 0


def report_forwards(fast: Result) -> int:
    """How often layers were called; returns how many forwards were fastlora's own."""
    total = sum((Counter(counts) for counts in fast["forwards"].values()), Counter())
    fused = fused_in(total)
    tests = sum(fused_in(counts) > 0 for counts in fast["forwards"].values())
    print(f"tests that put LoRA layers into a model: {tests_with(fast, 'layers')}")
    print(f"tests with fused forwards: {tests}")
    print(f"forwards of accelerated layers: {fused} fused", end="")
    print(f", {total['base']} of PEFT's own with adapters merged or disabled", end="")
    print(f", {total['fallbacks']} others of PEFT's own")
    print(f"forwards of LoRA layers that are not accelerated: {total['plain']}")
    print("layers:", ", ".join(f"{n} {kind}" for kind, n in sorted(fast["layers"].items())))
    return fused


def fused_in(counts: dict[str, int]) -> int:
    return counts.get("accelerated", 0) - counts.get("base", 0) - counts.get("fallbacks", 0)


def tests_with(result: Result, what: str) -> int:
    return sum(bool(counts.get(what)) for counts in result["forwards"].values())


def print_reasons(title: str, result: Result, nodes: list[str]) -> None:
    for why, times in Counter(reason(result, node) for node in nodes).most_common():
        print(f"{title}: {times} with {why}")


def reason(result: Result, node: str) -> str:
    return " ".join(result["errors"].get(node, ended(result, node)).split())[:160]


def ended(result: Result, node: str) -> str:
    return result["tests"].get(node, "not run")


def count(tests: dict[str, str], path: str = "") -> str:
    outcomes = Counter(o for node, o in tests.items() if node.startswith(path))
    return f"{outcomes['passed']} / {outcomes['failed']} / {outcomes['skipped']}"


if __name__ == "__main__":
    sys.exit(main())
