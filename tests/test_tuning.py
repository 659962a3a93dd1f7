"""`fastlora.tune`: what it measures counts afterwards, here and in later processes."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import fastlora
from fastlora import ops, tuning
from fastlora.ops import _routes, _tuned


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The tuning file, and a process that has not read it."""
    path = tmp_path / "cache" / "tune.json"
    monkeypatch.setenv("FASTLORA_TUNE_FILE", str(path))
    _tuned.forget()
    ops.lora_linear.clear()
    yield path
    monkeypatch.undo()
    _tuned.forget()
    ops.lora_linear.clear()


@pytest.fixture
def fastest(monkeypatch):
    """Instead of a clock: the route of this name is the fastest."""

    def declare(route):
        def measured(plans, args):
            return {name: 1e-6 if name == route else 1e-3 for name in plans}

        monkeypatch.setattr(tuning, "_measured", measured)

    return declare


def model_and_input(dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Dropout(dropout), nn.GELU(), nn.Linear(40, 8))
    fastlora.inject(model, fastlora.LoRA(rank=4), seed=0)
    with torch.no_grad():
        for p in fastlora.parameters(model):
            p.normal_()
    return model, torch.randn(6, 24)


def routes_taken(monkeypatch, model, x):
    """The CPU routes that a forward pass runs, by what each alone calls."""
    taken = []
    originals = {name: getattr(_routes, name) for name in ("_around", "_few", "_products")}
    for name, original in originals.items():
        monkeypatch.setattr(
            _routes, name, lambda *a, n=name, f=original, **k: (taken.append(n), f(*a, **k))[1]
        )
    ops.lora_linear.clear()
    with torch.no_grad():
        model(x)
        model(x)
    ops.lora_linear.clear()
    for name, original in originals.items():
        monkeypatch.setattr(_routes, name, original)
    return taken


def test_the_table_changes_the_route(table, fastest, monkeypatch):
    model, x = model_and_input()
    assert routes_taken(monkeypatch, model, x) == []  # the loop, by a native plan
    for route, function in (("around", "_around"), ("products", "_few"), ("loop", None)):
        fastest(route)
        report = fastlora.tune(model, x)
        assert [row.chosen for row in report.rows] == [route] * 2
        expected = [function] * 4 if function else []
        assert routes_taken(monkeypatch, model, x) == expected


def test_plans_that_were_made_before_are_dropped(table, fastest, monkeypatch):
    model, x = model_and_input()
    with torch.no_grad():
        model(x)
    assert ops.lora_linear.plan_count() == 2
    fastest("around")
    fastlora.tune(model, x)
    assert ops.lora_linear.plan_count() == 0


def test_a_second_process_uses_it(table, fastest):
    model, x = model_and_input()
    fastest("products")
    report = fastlora.tune(model, x)
    assert report.file == str(table) and not report.problem
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()})"
        + """
import torch, fastlora
from fastlora.ops import _routes, _tuned
assert _tuned._table is None  # an import reads nothing
from tests.test_tuning import model_and_input
model, x = model_and_input()
names = []
original = _routes.routes
def routes(*args):
    found = original(*args)
    names.append(_tuned.lookup(*args))
    return found
_routes.routes = routes
with torch.no_grad(): model(x)
print(names)
"""
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "['products', 'products']"


def test_what_the_clock_says(table):
    """Unpatched: every route of every call has a time, and the choice is one of them."""
    model, x = model_and_input()
    report = fastlora.tune(model, x)
    assert [row.call for row in report.rows] == [
        "6x24x40, rank 4, float32, bias",
        "6x40x8, rank 4, float32, bias",
    ]
    for row in report.rows:
        assert set(row.measured) == set(row.predicted) == {"loop", "around", "products"}
        assert min(row.measured.values()) > 0 and row.chosen in row.measured
        best = min(row.measured.values())
        assert row.measured[row.chosen] <= max(best, row.measured[row.expected])
    text = str(report)
    assert "6x24x40, rank 4, float32, bias" in text and f"saved in {table}" in text
    assert "2 threads" in text or f"{torch.get_num_threads()} threads" in text


def test_a_little_less_time_changes_nothing(table, monkeypatch):
    model, x = model_and_input()
    times = {"loop": 1.0, "around": 0.99, "products": 2.0}
    monkeypatch.setattr(tuning, "_measured", lambda plans, args: times)
    assert {row.chosen for row in fastlora.tune(model, x).rows} == {"loop"}


def test_the_model_is_as_before(table):
    model, x = model_and_input(dropout=0.5)
    model[0].train()
    model[3].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    x.requires_grad_()
    fastlora.tune(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [p._version for p in model.parameters()] == versions
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert x.grad is None and all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled() and _routes._watchers == []


def test_entries_are_merged(table, fastest):
    fastest("around")
    model, x = model_and_input()
    fastlora.tune(model, x)
    _tuned.forget()
    content = json.loads(table.read_text())
    content["devices"]["another machine"] = {"a call": "a route"}
    table.write_text(json.dumps(content))
    fastest("products")
    fastlora.tune(model, torch.cat([x, x]))
    devices = json.loads(table.read_text())["devices"]
    assert devices.pop("another machine") == {"a call": "a route"}
    (calls,) = devices.values()
    assert sorted(calls.values()) == ["around", "around", "products", "products"]
    assert [p.name for p in table.parent.iterdir()] == ["tune.json"]


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"devices": {}}', '{"format": "fastlora routes", "devices": 3}', "\x00"]
)
def test_a_foreign_file_is_named_kept_and_fails_nothing(table, fastest, text):
    table.parent.mkdir()
    table.write_text(text)
    model, x = model_and_input()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="tune.json is ignored"):
        model(x)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        ops.lora_linear.clear()
        model(x)  # once is enough
    fastest("products")
    report = fastlora.tune(model, x)
    assert report.file == "" and str(table) in report.problem
    assert "for this process only" in str(report) and table.read_text() == text
    assert _routes.chosen(*arguments(model, x))[0] == "products"


def arguments(model, x):
    """Of the first layer's call."""
    seen = []
    with _routes.watched(lambda *args: seen.append(args)), torch.no_grad():
        ops.lora_linear.clear()
        model(x)
    return seen[0]


def test_a_warning_never_fails_a_forward_pass(table):
    table.parent.mkdir()
    table.write_text("{")
    model, x = model_and_input()
    with warnings.catch_warnings(record=True), torch.no_grad():
        warnings.simplefilter("error")
        model(x)


def test_entries_that_do_not_apply_are_ignored(table, fastest):
    model, x = model_and_input()
    args = arguments(model, x)
    expected = _routes.chosen(*args)[0]
    device, call = _tuned.device_key(x), _tuned.call_key(*args)
    table.parent.mkdir()
    for entry in ("warp drive", "appended", 7):
        content = {"format": _tuned.FORMAT, "devices": {device: {call: entry}, "b": [1]}}
        table.write_text(json.dumps(content))
        _tuned.forget()
        assert _routes.chosen(*args)[0] == expected
    table.write_text(json.dumps({"format": _tuned.FORMAT, "devices": {device: {call: "around"}}}))
    _tuned.forget()
    assert _routes.chosen(*args)[0] == "around" != expected


def test_another_number_of_threads_is_another_device(table, fastest):
    model, x = model_and_input()
    fastest("around")
    fastlora.tune(model, x)
    args = arguments(model, x)
    assert _routes.chosen(*args)[0] == "around"
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert _routes.chosen(*args)[0] != "around"


def test_a_folder_that_cannot_be_written(table, fastest, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTLORA_TUNE_FILE", str(tmp_path / "file" / "tune.json"))
    _tuned.forget()
    model, x = model_and_input()
    fastest("around")
    with pytest.warns(RuntimeWarning, match="is ignored"):
        report = fastlora.tune(model, x)
    assert report.file == "" and "tune.json" in report.problem and report.problem in str(report)
    assert _routes.chosen(*arguments(model, x))[0] == "around"


def test_a_write_that_fails_leaves_the_old_file(table, fastest, monkeypatch):
    model, x = model_and_input()
    fastest("around")
    fastlora.tune(model, x)
    before = table.read_text()

    def refused(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refused)
    fastest("products")
    report = fastlora.tune(model, x)
    assert "read-only" in report.problem and table.read_text() == before
    assert [p.name for p in table.parent.iterdir()] == ["tune.json"]
    assert _routes.chosen(*arguments(model, x))[0] == "products"


def test_no_file_at_all(table, fastest, monkeypatch):
    monkeypatch.setenv("FASTLORA_TUNE_FILE", "")
    model, x = model_and_input()
    fastest("around")
    report = fastlora.tune(model, x)
    assert report.file == "" and report.problem == "FASTLORA_TUNE_FILE is empty"
    assert not table.exists() and _routes.chosen(*arguments(model, x))[0] == "around"


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTLORA_TUNE_FILE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _tuned.file() == tmp_path / "fastlora" / "tune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _tuned.file() == tmp_path / ".cache" / "fastlora" / "tune.json"


def test_calls_are_told_apart(table):
    model, x = model_and_input()
    args = list(arguments(model, x))
    keys = {_tuned.call_key(*args)}
    for i, change in (
        (0, lambda t: t[:3]),
        (0, lambda t: torch.cat([t, t], 1)[:, :24]),
        (1, lambda t: t.t().contiguous().t()),
        (2, lambda t: None),
        (3, lambda t: t.double()),
        (5, lambda t: t.expand(6, -1)),
        (6, lambda t: torch.ones(40)),
    ):
        changed = list(args)
        changed[i] = change(changed[i])
        keys.add(_tuned.call_key(*changed))
    assert len(keys) == 8


def test_bad_requests(table):
    with pytest.raises(fastlora.AdapterError, match="tune: the model has no adapters"):
        fastlora.tune(nn.Linear(3, 3), torch.zeros(1, 3))
    model, x = model_and_input()
    model.train()
    with pytest.raises(fastlora.AdapterError, match="tune: the model fails on these inputs: "):
        fastlora.tune(model, x[:, :5])
    assert model.training and not table.exists() and _routes._watchers == []
    with pytest.raises(fastlora.AdapterError, match="TypeError"):
        fastlora.tune(model)


def test_nothing_to_tune(table):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    fastlora.inject(model, fastlora.LoRA(rank=2), seed=0)
    report = fastlora.tune(model, torch.zeros(1, 3, 8, 8))
    assert report.rows == () and "nothing to tune" in str(report) and not table.exists()


def test_emulated_calls_are_not_timed(table):
    model, x = model_and_input()
    with fastlora.emulated():
        assert fastlora.tune(model, x).rows == ()


def test_results_stay_right(table, fastest):
    model, x = model_and_input()
    for route in ("loop", "around", "products"):
        fastest(route)
        fastlora.tune(model, x)
        assert fastlora.verify(model, x)
