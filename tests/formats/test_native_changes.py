"""fastlora's own files as changes, against the layers that wrote them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora.formats import detect, files, native
from fastlora.formats.changes import Change, Dense, LowRank, Shift, Target
from fastlora.formats.files import FormatError
from tests.formats.nets import TOKENS, changed_output, net, random_lora, randomize

PATHS = ["conv", "grouped", "blocks.0", "proj"]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize(
    "spec",
    [
        fastlora.LoRA(rank=4, alpha=3.0, ranks={"conv": 2}, alphas={"proj": 7.0}),
        fastlora.LoRA(rank=4, rank_stabilized=True, dropout=0.1),
        fastlora.LoRA(rank=4, alpha=3.0, dora=True),
    ],
    ids=["alphas", "rank stabilised", "DoRA"],
)
def test_what_is_saved_is_read(tmp_path: Path, spec: Any) -> None:
    base = net()
    model = copy.deepcopy(base)
    fastlora.inject(model, spec, where=PATHS)
    randomize(model, (".down", ".up", ".magnitude"))
    fastlora.save(model, tmp_path / "a.safetensors")
    file = detect.read(tmp_path / "a.safetensors")
    assert file.format == "fastlora" and not file.unused
    assert sorted(t.path for t in file.changes) == sorted(PATHS)
    expected = model.eval()(TOKENS)
    torch.testing.assert_close(changed_output(base, file.changes, TOKENS), expected, **CLOSE)

    packed = native.pack_changes(file.changes)
    files.write(tmp_path / "b.safetensors", packed.tensors, packed.metadata)
    again = copy.deepcopy(base)
    fastlora.load(again, tmp_path / "b.safetensors")
    torch.testing.assert_close(again.eval()(TOKENS), expected, **CLOSE)


def test_spectral_shifts_keep_the_hash_of_their_base(tmp_path: Path) -> None:
    base = net()
    model = copy.deepcopy(base)
    fastlora.decompose(model, PATHS)
    fastlora.inject(model, fastlora.Spectral(), where=PATHS)
    randomize(model, (".shift",))
    fastlora.save(model, tmp_path / "a.safetensors")
    file = detect.read(tmp_path / "a.safetensors")
    for change in file.changes.values():
        assert isinstance(change.weight, Shift) and len(change.weight.base_hash) == 5
    packed = native.pack_changes(file.changes)
    files.write(tmp_path / "b.safetensors", packed.tensors, packed.metadata)
    again = copy.deepcopy(base)
    fastlora.decompose(again, PATHS)
    fastlora.load(again, tmp_path / "b.safetensors")
    torch.testing.assert_close(again(TOKENS), model(TOKENS), **CLOSE)


def test_an_embedding_and_its_magnitudes(tmp_path: Path) -> None:
    base = net()
    changes = {Target("", "tokens"): random_lora(base.tokens, dora=True)}
    packed = native.pack_changes(changes)
    files.write(tmp_path / "a.safetensors", packed.tensors, packed.metadata)
    model = copy.deepcopy(base)
    fastlora.load(model, tmp_path / "a.safetensors")
    expected = changed_output(base, changes, TOKENS)
    torch.testing.assert_close(model(TOKENS), expected, **CLOSE)


def lora(**fields: Any) -> Change:
    return Change(LowRank(torch.ones(2, 3), torch.ones(4, 2)), **fields)


A, B = Target("unet", "a"), Target("unet", "b")
NOT_WRITTEN = {
    "two components": ({A: lora(), Target("vae", "a"): lora()}, "write each of .*unet.*vae"),
    "nothing": ({}, "got no changes"),
    "two kinds": ({A: lora(), B: Change(Shift(torch.ones(2)))}, "LoRAs or spectral shifts, got"),
    "a flat name": ({Target("", "a_b", True): lora()}, "a_b: .*load it into the model"),
    "full": (
        {A: Change(Dense(torch.ones(4, 3)))},
        "unet.a: .*got full; a lycoris file can hold it",
    ),
    "a bias": ({A: lora(bias=torch.ones(4))}, "got lora with a bias; a peft file can"),
    "norms of inputs": ({A: lora(magnitude=torch.ones(3), axis="in")}, "unet.a: .*not of inputs"),
}


@pytest.mark.parametrize(("changes", "message"), NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_what_cannot_be_written(changes: dict[Target, Change], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        native.pack_changes(changes)


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"alpha": "4"}, {}, "alpha: expected a finite number, got '4'"),
        ({"dropout": None}, {}, "dropout: expected a finite number, got None"),
        ({"rank": 3}, {}, r"down: expected rank 3, got \[2, 3\]"),
        ({"dora": True}, {}, "magnitude: expected a tensor, got nothing"),
        ({}, {"up": None}, "up: expected a tensor"),
        ({}, {"down": torch.ones(2)}, r"expected down \[rank, in\]"),
        ({}, {"up": torch.ones(4, 3)}, r"expected down .* got \[2, 3\] and \[4, 3\]"),
        (
            {},
            {"up": torch.ones(4, 1)},
            r"expected down .* got \[2, 3\] and \[4, 1\]",
        ),  # no convolution: no groups
        ({"dora": True}, {"magnitude": torch.ones(3)}, r"magnitude: expected \[4\], got \[3\]"),
    ],
)
def test_what_is_wrong_is_said(
    fields: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    own = {"down": torch.ones(2, 3), "up": torch.ones(4, 2), **tensors}
    named = {f"a.{k}": v for k, v in own.items() if v is not None}
    config = {"kind": "lora", "settings": {}, "modules": {"a": fields}}
    metadata = {"format": "fastlora", "version": "2", "config": json.dumps(config)}
    with pytest.raises(FormatError, match=f"^some file: a: {message}"):
        detect.unpack(named, metadata, source="some file")
