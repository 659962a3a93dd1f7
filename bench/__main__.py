"""Runs the benchmarks and prints the comparison: `python -m bench [pytest arguments]`.

Every group is one job by several contenders, timed in one run. What counts are the ratios; at the
end stands every target beside what was measured. `--models`, `--ranks`, `-k fold` pick some.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from bench.report import tables, text

HERE = Path(__file__).parent
# A peer may warn: this is no test of it.
ARGUMENTS = [str(HERE), "-q", "--benchmark-quiet", "-W", "default", "--disable-warnings"]


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        kept = [a.partition("=")[2] for a in arguments if a.startswith("--benchmark-json=")]
        path = Path(kept[-1] if kept else Path(folder) / "benchmarks.json")
        status = pytest.main([*ARGUMENTS, *arguments, f"--benchmark-json={path}"])
        if path.exists() and path.stat().st_size:
            print(text(tables(json.loads(path.read_text()))))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
