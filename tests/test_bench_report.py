"""What the benchmarks' report makes of made-up measurements."""

from typing import Any

import pytest

from bench import report, targets
from bench.shapes import MODELS, counts, geometric_mean, weights

OTHER_JOBS = ("fold", "step", "spectral", "load", "extract", "inspect", "pipeline", "swap")


def item(group: str, contender: str, seconds: float = 1e-3, **extra: Any) -> dict[str, Any]:
    return {
        "group": group,
        "params": {"contender": contender},
        "stats": {"min": seconds, "median": seconds, "iqr": 0.0, "rounds": 3},
        "extra_info": {"device": "cpu", **extra},
    }


def layer(shape: tuple[int, ...], contender: str, ratio: float, rank: int = 16, **extra: Any):
    """A measured layer; its floor takes a millisecond."""
    known: dict[Any, dict[str, int]] = counts(MODELS)
    dtype = extra.pop("dtype", "float32")
    group = f"lora_linear {'x'.join(map(str, shape))} r={rank} {dtype}"
    info = {"layer": list(shape), "rank": rank, "dtype": dtype, "counts": known[shape]}
    spread = {"over_floor": ratio, "low": ratio - 0.01, "high": ratio + 0.03, "fastest": ratio}
    return item(group, contender, ratio * 1e-3, **{**info, **spread, **extra})


def whole(models: tuple[str, ...], contender: str, ratio: float, **extra: Any) -> list[Any]:
    return [layer(shape, contender, ratio, **extra) for shape in counts(models)]


def by_measure(items: list[Any], **machine: Any) -> dict[str, targets.Row]:
    found = targets.rows({"benchmarks": items, "machine_info": machine})
    assert len(found) == 35
    return {row.measure: row for row in found}


def test_geometric_means_by_hand():
    assert geometric_mean([(1, 2.0), (1, 8.0)]) == pytest.approx(4.0)
    assert geometric_mean([(3, 2.0), (1, 32.0)]) == pytest.approx(4.0)  # (8 * 32) ** (1 / 4)


def test_means_weigh_a_layer_by_its_calls_in_every_model():
    shared = (2, 1280, 1280)  # 13 calls in SD 1.5, 9 in SDXL
    alone = (8192, 320, 320)  # 30 calls in SD 1.5
    value, missing = targets.mean({shared: 2.0, alone: 1.0}, MODELS[:1])
    assert value == pytest.approx(2 ** (13 / 43)) and missing == 17
    value, missing = targets.mean({shared: 2.0, alone: 1.0}, MODELS)
    assert value == pytest.approx(2 ** (22 / 52)) and missing == 44
    assert targets.mean({}, MODELS) == (None, 46)


def test_shapes_of_whole_models():
    assert sum(sum(c.values()) for c in counts(MODELS).values()) == 184 + 743 + 504
    numbers = sum(out * features for out, features in weights(MODELS[0], convolutions=True))
    assert numbers == pytest.approx(859_520_964, rel=0.002)  # all but biases and norms


@pytest.mark.parametrize(("ratio", "met"), [(1.069, True), (1.071, False)])
def test_the_target_of_the_cpu(ratio, met):
    items = whole(MODELS[:1], "fastlora", ratio) + whole(MODELS[:1], "addmm", 1.08)
    row = by_measure(items)["forward r=16, fp32, CPU, SD 1.5, over F.linear"]
    assert row.met is met and row.measured == f"{ratio:.3f}x" and "addmm_ 1.080x" in row.note


def test_a_part_of_the_layers_meets_no_target():
    items = whole(MODELS[:1], "fastlora", 1.0)[1:]
    row = by_measure(items)["forward r=16, fp32, CPU, SD 1.5, over F.linear"]
    assert row.met is None and row.measured == "1.000x" and "1 layers missing" in row.note


def test_without_a_gpu_its_rows_say_so():
    found = by_measure(whole(MODELS[:1], "fastlora", 1.0))
    assert sum(row.measured == "needs a GPU" for row in found.values()) == 22
    assert all(row.met is None for row in found.values() if row.measured == "needs a GPU")


def test_rows_of_a_gpu():
    on_gpu: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
    items = whole(MODELS, "fastlora", 1.09, eager=20.0, captured=5.0, **on_gpu)
    items += whole(MODELS, "fastlora", 1.21, rank=64, **on_gpu)
    items += whole(MODELS, "peft", 2.0, eager=60.0, captured=9.0, **on_gpu)
    items += whole(MODELS, "peft + compile", 1.2, eager=30.0, captured=5.1, **on_gpu)
    group = "lora_linear call 16x64x64 r=16 bfloat16"
    items += [item(group, "appended", host=4.9, device="cuda")]
    items += [item(group, "extended", host=8.1, device="cuda")]
    gemm = {"gemm": [4096] * 3, "dtype": "bfloat16", "device": "cuda", "operations": 1}
    items += [item("gemm 4096x4096x4096 bfloat16", "fastlora", over_floor=1.6, **gemm)]
    fold = {"fold": "SD 1.5", "device": "cuda"}
    items += [item("fold", "fastlora", 2e-3, bytes=4_000_000_000, captured=1200.0, **fold)]
    items += [item("fold", "peft", 90e-3, **fold)]
    items += [item("set_scale", "fastlora", strengths=True, host=49.0, device="cuda")]
    machine = {"gpu": "NVIDIA H200", "capability": 90, "ceilings": {"bytes": 4e12}}
    found = by_measure(items, **machine)
    shown = {
        m.split(",")[0]: (r.measured, r.met)
        for m, r in found.items()
        if not any(
            job in m
            for job in (
                "fold",
                "step",
                "spectral",
                "load",
                "extract",
                "inspect",
                "pipeline",
                "swap",
            )
        )
    }
    assert shown == {
        "forward r=16": ("needs a run without a GPU", None),  # the CPU's; the GPU's below
        "forward r=64": ("1.210x", False),
        "forward r=128 (8 stacked)": ("not run", None),
        "layer r=16 against PEFT": ("3.00x", True),
        "layer r=16 against PEFT + torch.compile": ("1.02x", False),
        "eager call": ("8.1 µs", False),
        "main loop alone": ("62 %", True),
        "new strengths of 3 adapters": ("49.0 µs", True),
    }
    row = found["forward r=16, bf16, CUDA graph, over F.linear"]
    assert (row.measured, row.met, row.note) == ("1.090x", True, "roofline 1.048")
    assert found["eager call, F2 (appended), host time"].met
    row = found["fold of SD 1.5, bf16, over copy bandwidth"]  # 1.2 ms over 4 GB at 4 TB/s
    assert (row.measured, row.met, row.note) == ("1.20x", True, "1.00 ms")
    row = found["fold of SD 1.5, bf16, against PEFT's merge"]
    assert (row.measured, row.met) == ("45x", False)
    # an A100 is asked for more of its library's rate, a GPU that nobody spoke of for nothing
    measure = "main loop alone, 4096^3 bf16, of cuBLAS's rate"
    assert by_measure(items, gpu="NVIDIA A100", capability=80)[measure].met is False
    assert by_measure(items, gpu="another", capability=86)[measure].met is None


def test_whole_pipelines_and_swaps():
    def contender(name: str, size: str, device: str, median: float, **info: Any) -> Any:
        return item(f"pipeline {size}, rank 16", name, median, device=device, **info)

    small = [contender("fastlora", "small", "cpu", 1.0, over_peft=0.8)]
    row = by_measure(small)["small pipeline with a LoRA, CPU, accelerated over PEFT"]
    assert (row.measured, row.met) == ("0.80x", True)
    times = {
        "floor + compile": 1.0,
        "fastlora + compile": 1.04,
        "peft + compile": 1.08,
        "peft": 3.0,
    }
    items = [contender(name, "SDXL", "cuda", t) for name, t in times.items()]
    items.append(item("swap SDXL rank 16", "fastlora", 6e-3, device="cuda"))
    found = by_measure(items, gpu="H200")
    shown = {m: (r.measured, r.met) for m, r in found.items() if "SDXL" in m and "load" not in m}
    del shown["new strengths of 3 adapters, SDXL-shaped"]
    assert shown == {
        "SDXL pipeline, r=16, over no adapter, both compiled": ("1.04x", True),
        "SDXL pipeline, r=16, against PEFT eager": ("2.88x", True),
        "SDXL pipeline, r=16, against PEFT, both compiled": ("1.04x", False),
        "swap SDXL r=16, same ranks": ("6.0 ms", False),
    }


def test_layers_as_a_table():
    """A layer a line, every contender beside the floor, means where a model is complete."""
    items = [layer(s, c, r) for s in counts(MODELS[:1])
             for c, r in (("floor", 1.0), ("fastlora", 1.05), ("addmm", 1.1))]  # fmt: skip
    shown = report.text(report.tables({"benchmarks": items}))
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "8192x320x320 30 1.00 ms 1.05 ±0.02 1.10 ±0.02" in lines
    assert "mean, SD 1.5 1.050 1.100" in lines
    assert not any("something else was running" in line for line in lines)
    assert max(map(len, shown.splitlines())) <= 160
    items[0]["stats"]["median"] *= 1.5
    assert "On 1 of 19 layers" in report.text(report.tables({"benchmarks": items}))


def test_a_busy_machine_is_named():
    items = whole(MODELS[:1], "fastlora", 1.09)
    for load, busy in ((0.4, False), (1.6, True)):
        machine = {"load": load, "cores": 2}
        shown = report.text([report.targets({"benchmarks": items, "machine_info": machine})])
        assert ("was busy" in shown) is busy and "MISSED" in shown
        assert ("MISSED (busy)" in shown) is busy


def test_where_peers_win():
    items = [layer(s, "fastlora", 1.2) for s in counts(MODELS[:1])]
    items += [layer(s, "addmm", 1.1 if s[0] == 2 else 1.3) for s in counts(MODELS[:1])]
    items += [item("spectral_weight", "fastlora", 3e-3), item("spectral_weight", "addmm", 2e-3)]
    items += [item("spectral_weight", "floor", 1e-3)]  # no contest
    lines = report.peers_that_win(items).lines
    assert [line[:3] for line in lines] == [
        ["lora_linear r=16", "addmm", "1.09x"],
        ["spectral_weight", "addmm", "1.50x"],
    ]
    assert lines[0][3].startswith("on 4 of 19 layers")


def test_other_jobs_by_the_best_clock_of_both():
    items = [
        item("step", "fastlora", 1.0, eager=8.0, captured=3.0, bytes=8_000_000, device="cuda"),
        item("step", "addmm", 1.0, eager=20.0, captured=6.0, device="cuda"),
        item("step", "diffusers", 1.0, eager=160.0, captured=None, why="waits", device="cuda"),
    ]
    machine = {"gpu": "some", "ceilings": {"bytes": 4e12}}
    table = report.others(items, machine)
    assert [line[5] for line in table.lines] == ["", "", "0.50", "0.05"]
    assert [line[6] for line in table.lines] == ["", "at least 2.00 µs", "", "; waits"]
    assert "| addmm | 6.00 µs | 20.0 µs |" in report.markdown([table])


def test_calls_are_counted():
    """A round of many calls is shown as one of them."""
    lines = report.others([item("tiny", "fastlora", 1e-3, calls=200)], {}).lines
    assert lines[1][1] == "5.00 µs"


def test_spectral_weights():
    group = "spectral_weights SD 1.5: 282 layers bfloat16"
    on_gpu: dict[str, Any] = {"device": "cuda", "operations": 2_000_000_000_000}
    items = [
        item(group, "fastlora", eager=5000.0, captured=4000.0, **on_gpu),
        item(group, "addmm", eager=10000.0, captured=3500.0, **on_gpu),
        item(group, "u @ diag(s) @ vh", eager=14000.0, captured=9000.0, **on_gpu),
    ]
    found = by_measure(items, gpu="H200", ceilings={"bfloat16": 800e12})
    start = "spectral weights of SD 1.5, bf16, "
    share = found[start + "of the matrix rate"]  # 2.5 ms of 4
    assert (share.measured, share.target, share.met) == ("62 %", ">= 60 %", True)
    assert share.note == "2.50 ms"
    shown = {
        m.removeprefix(start + "against "): (r.measured, r.met)
        for m, r in found.items()
        if m.startswith(start + "against")
    }
    assert shown == {
        "addmm, both eager": ("2.00x", True),
        "addmm, both captured": ("0.88x", False),
        "u @ diag(s) @ vh, both eager": ("2.80x", False),
    }
    single = "spectral weight, fp32, CPU, over torch's addmm"
    assert found[single].measured == "needs a run without a GPU"
    items = []
    for size, ours in (("320x320", 1.0), ("640x2560", 1.21)):
        group = f"spectral_weight {size} float32"
        items += [item(group, "fastlora", over_floor=ours), item(group, "addmm", over_floor=1.0)]
    row = by_measure(items)[single]  # the square root of 1.21
    assert (row.measured, row.met) == ("1.10x", False)
    assert row.note == "at most 1.21x, of 2 sizes"


def test_sampler_steps():
    def both(group: str, ours: float, **others: float) -> list[Any]:
        found = [item(f"sampler_step {group}", "fastlora", ours)]
        return found + [item(f"sampler_step {group}", n, s) for n, s in others.items()]

    items = both("1x4x64x64 epsilon eta=0", 10e-6, diffusers=105e-6, floor=5e-6)
    items += both("4x4x128x128 2M", 10e-6, diffusers=45e-6)
    items += both("16x4x128x128 epsilon eta=0", 300e-6, floor=225e-6)
    found = by_measure(items)
    ddim = found["CFG + DDIM step, 1x4x64x64, CPU, against diffusers"]
    assert (ddim.measured, ddim.target, ddim.met) == ("10x", ">= 10x", True)
    multistep = found["CFG + 2M step, 4x4x128x128, CPU, against diffusers"]
    assert (multistep.measured, multistep.met) == ("4.50x", False)
    copied = found["CFG + DDIM step, 16x4x128x128, CPU, over a copy of its bytes"]
    assert (copied.measured, copied.met) == ("1.33x", True)
    assert found["CFG + DDIM step, 64x16x128x128, of copy bandwidth"].measured == "needs a GPU"
    captured = {"device": "cuda", "captured": 100.0}
    items = [item("sampler_step 64x16x128x128 epsilon eta=0", "fastlora", **captured)]
    items += [item("sampler_step 64x16x128x128 epsilon eta=0", "floor", device="cuda", captured=90)]
    found = by_measure(items, gpu="H200")
    share = found["CFG + DDIM step, 64x16x128x128, of copy bandwidth"]
    assert (share.measured, share.met) == ("90 %", True)
    assert found["CFG + DDIM step, 1x4x64x64, CPU, against diffusers"].measured == (
        "needs a run without a GPU"
    )


def test_files():
    load = "load SDXL rank 16, attention and feed-forward"
    extract = "extract rank 32, 8 layers of SD 1.5 float16"
    items = [
        item(load, "floor", 0.1, file_bytes=1000, peak_bytes=1001),
        item(load, "fastlora", 0.3, file_bytes=1000, peak_bytes=1006),
        item(load, "diffusers", 1.8, file_bytes=1000, peak_bytes=4000),
        item(extract, "floor", 5.0, over_floor=1.0),
        item(extract, "fastlora", 7.0, over_floor=1.19),  # rounds' ratios, not of the medians
        item("inspect 1 GB, FLUX-like rank 64 bfloat16", "floor", 0.4),
        item("inspect 1 GB, FLUX-like rank 64 bfloat16", "fastlora", 1.01),
    ]
    measures = {
        "load SDXL r=16, CPU, against diffusers": (">= 5.00x", "6.00x", True),
        "load SDXL r=16, CPU, peak memory over the model, in file sizes": (
            "<= 1.00", "1.01", False
        ),
        "extract rank 32, CPU, over the SVDs alone": ("<= 1.20x", "1.19x", True),
        "inspect of a 1 GB file, CPU": ("<= 1.00 s", "1.01 s", False),
    }  # fmt: skip
    found = by_measure(items)
    for measure, expected in measures.items():
        assert (found[measure].target, found[measure].measured, found[measure].met) == expected
    items[1]["extra_info"]["peak_bytes"] = None  # not on Linux
    row = by_measure(items)["load SDXL r=16, CPU, peak memory over the model, in file sizes"]
    assert (row.measured, row.met) == ("not run", None)
    nothing, on_gpu = by_measure([]), by_measure([], gpu="H200")
    assert {nothing[m].measured for m in measures} == {"not run"}
    assert {on_gpu[m].measured for m in measures} == {"needs a run without a GPU"}
    slow = by_measure([item(load, "fastlora", 0.3), item(load, "diffusers", 1.4)])
    assert slow["load SDXL r=16, CPU, against diffusers"].met is False
    assert slow["load SDXL r=16, CPU, peak memory over the model, in file sizes"].met is None
