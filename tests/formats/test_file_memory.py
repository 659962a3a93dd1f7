"""The memory that reading and writing take, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.formats.samples import F32, raw

SIZE = 10**10
WHOLE = {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}
CLAIMS = {  # files of 1 KB that say they have 10 GB
    "one tensor": {"a": WHOLE},
    "another dtype": {"a": {**WHOLE, "dtype": "F16", "shape": [SIZE // 2]}, "b": F32},
    "eight": {str(i): {**WHOLE, "data_offsets": [i * SIZE, (i + 1) * SIZE]} for i in range(8)},
    "one is empty": {"a": {**WHOLE, "shape": [SIZE, 0], "data_offsets": [0, 0]}, "b": WHOLE},
}
LENGTH = 10**7
LENGTHY = {  # headers of 10 MB; as Python's objects some would be 250 MB
    "nested": '{"a":' + "[" * LENGTH,
    "lists": '{"a":{"shape":[' + "[]," * (LENGTH // 3),
    "objects": '{"__metadata__":{"a":' + "{}," * (LENGTH // 3),
    "shape": '{"a":{"shape":[' + "1," * (LENGTH // 2),
    "spaces": "{" + " " * LENGTH,
    "spaces in a shape": '{"a":{"shape":[' + " " * LENGTH,
    "spaces after a number": '{"a":{"shape":[1' + " " * LENGTH,
    "key": '{"' + "a" * LENGTH,
}

# Run in a process of its own, whose memory is that of these lines: MiB beyond what it had before.
MEASURE = """
import json, pathlib, resource, sys, torch
from fastlora.formats import files

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024

growths = {}

def measure(name, call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what there is now
    before = status("VmRSS")
    result = call()  # kept until the peak is known
    growths[name] = status("VmHWM") - before

def outline(path):
    with files.SafetensorsFile(path) as file:
        return file.outline()

def refused(path):
    try:
        files.read(path)
    except files.FormatError:
        return
    sys.exit(f"{path} was read")

folder = pathlib.Path(sys.argv[1])
path = folder / "a"
files.write(path, {"x": torch.ones(3)}, {})
files.read(path)
whole = {str(i): torch.ones(8, 2**19, dtype=torch.half) for i in range(12)}
measure("write", lambda: files.write(path, whole, {}))
strided = {k: t.t() for k, t in whole.items()}
files.write(path, strided, {})  # threads begin, code is read
measure("write strided", lambda: files.write(path, strided, {}))
measure("read", lambda: files.read(path))
measure("outline", lambda: outline(path))
del whole, strided

limit = int(status("VmSize") * 2**20) + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.empty(10**10, dtype=torch.uint8)
    sys.exit("the limit does not limit")
except RuntimeError:
    pass
for path in (folder / "refused").iterdir():
    measure(path.name, lambda: refused(path))
print(json.dumps(growths))
"""


@pytest.fixture(scope="module")
def growths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The memory that each thing takes, MiB."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("measures memory as Linux does")
    folder = tmp_path_factory.mktemp("memory")
    (folder / "refused").mkdir()
    for name, content in (CLAIMS | LENGTHY).items():
        raw(folder / "refused" / name, content, b"\0" * 1000)
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_of_reading_and_writing(growths: dict[str, float]) -> None:
    mib = 12 * 8
    assert growths["write"] < 4 and growths["outline"] < 4
    assert growths["write strided"] < 2 * 8 + 4  # copies of one tensor at a time
    assert growths["read"] < mib + 8


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_take_no_memory(growths: dict[str, float], name: str) -> None:
    """Nothing of the claimed size is asked for: the process may have 256 MiB more."""
    assert growths[name] < 4


@pytest.mark.parametrize("name", LENGTHY)
def test_headers_that_say_little_at_length(growths: dict[str, float], name: str) -> None:
    """The bytes, the text and at most two copies of a part."""
    assert growths[name] < 4 * LENGTH / 2**20 + 4
