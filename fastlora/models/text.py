"""Text for the small models: a word-level tokenizer and a tiny CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import CLIPTextModel

LENGTH = 16
# Never seen in pretraining: for subjects that a personalisation method teaches ("a v1 three").
RARE = ("v1", "v2", "v3", "v4")
# Neither, but grammar for them: "a v1 three on the left and a v2 seven on the right".
LINKS = ("and", "on", "with", "very")
WORDS = (
    *("a", "an", "the", "picture", "drawing", "of", "digit", "number"),
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *(
        "thin",
        "medium",
        "thick",
        "dim",
        "bright",
        "leaning",
        "standing",
        "left",
        "upright",
        "right",
    ),
    *RARE,
    *LINKS,
)


class Tokenizer:
    """Lower-case words of a closed vocabulary to ids; `<start> words... <end>`, filled up with
    `<end>` as CLIP does.
    """

    def __init__(self, words: Sequence[str] = WORDS, length: int = LENGTH) -> None:
        self.words = (*words, "<start>", "<end>")
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.length = length

    @property
    def start(self) -> int:
        return self.ids["<start>"]

    @property
    def end(self) -> int:
        return self.ids["<end>"]

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, captions: str | Sequence[str]) -> torch.Tensor:
        """int64 [B, length]. Raises ValueError for a word that is not in the vocabulary or too many
        words.
        """
        captions = [captions] if isinstance(captions, str) else captions
        rows = [self._row(caption) for caption in captions]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.length)

    def _row(self, caption: str) -> list[int]:
        words = caption.lower().replace(",", " ").split()
        unknown = [word for word in words if self.ids.get(word, self.start) >= self.start]
        if unknown:
            raise ValueError(
                f"caption {caption!r}: expected words of the vocabulary, got {unknown};"
                f" it has: {' '.join(self.words[:-2])}"
            )
        if len(words) > self.length - 2:
            raise ValueError(
                f"caption {caption!r}: expected at most {self.length - 2} words, got {len(words)}"
            )
        row = [self.start, *(self.ids[word] for word in words)]
        return row + [self.end] * (self.length - len(row))

    def decode(self, ids: torch.Tensor) -> list[str]:
        """The captions behind ids [B, length], without the special tokens."""
        return [" ".join(self.words[i] for i in row if i < self.start) for row in ids.tolist()]


def text_encoder(
    tokenizer: Tokenizer, dim: int = 64, layers: int = 2, heads: int = 4
) -> CLIPTextModel:
    """A `transformers.CLIPTextModel` of tiny configuration with fresh weights.

    Raises ImportError with the remedy where transformers is missing.
    """
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError as error:
        raise ImportError(
            "the small models' text encoder needs transformers: pip install transformers"
        ) from error
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=2 * dim,
        projection_dim=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.length,
        bos_token_id=tokenizer.start,
        eos_token_id=tokenizer.end,
        pad_token_id=tokenizer.end,
    )
    return CLIPTextModel(config)
