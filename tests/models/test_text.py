"""Tokenizer and text encoder."""

from __future__ import annotations

import sys

import pytest
import torch

from fastlora.models.text import LENGTH, Tokenizer, text_encoder


def test_tokens_are_start_words_end_and_filled_up() -> None:
    tokenizer = Tokenizer(words=("a", "thick", "seven"), length=6)
    assert tokenizer(["a THICK seven", "", "seven,"]).tolist() == [
        [3, 0, 1, 2, 4, 4],
        [3, 4, 4, 4, 4, 4],
        [3, 2, 4, 4, 4, 4],
    ]
    assert len(tokenizer) == 5


def test_the_vocabulary_is_that_of_the_shipped_weights() -> None:
    ids = Tokenizer()("a bright thick seven leaning left")
    assert ids.tolist() == [[36, 0, 22, 20, 15, 23, 25, *[37] * 9]]
    assert Tokenizer().decode(ids) == ["a bright thick seven leaning left"]


def test_one_string_is_a_batch_of_one_and_none_is_a_batch_of_none() -> None:
    assert Tokenizer()("a seven").shape == (1, LENGTH)
    assert Tokenizer()([]).shape == (0, LENGTH)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a purple seven", r"expected words of the vocabulary, got \['purple'\]"),
        ("a <start> seven", r"got \['<start>'\]"),
        (" ".join(["a"] * 15), "expected at most 14 words, got 15"),
    ],
    ids=["unknown", "special", "long"],
)
def test_captions_that_cannot_be_read_are_refused(caption: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer()(caption)


def test_encoder_is_causal_and_tells_captions_apart() -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer()
    encoder = text_encoder(tokenizer).eval()
    hidden = encoder(input_ids=tokenizer(["a thick seven", "a thick nine"])).last_hidden_state
    assert hidden.shape == (2, LENGTH, 64)
    torch.testing.assert_close(hidden[0, :3], hidden[1, :3])
    assert (hidden[0, 3] - hidden[1, 3]).abs().max() > 0.1


def test_missing_transformers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        text_encoder(Tokenizer())
