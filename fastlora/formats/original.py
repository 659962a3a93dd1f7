"""Files with the original model's names as they are: `diffusion_model.<path>.lora_A.weight`.

ComfyUI and ai-toolkit write them. They are kohya's but for the prefix, the dots of the path, and
the names that some have for the factors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fastlora.formats import kohya
from fastlora.formats._kohya_parts import KNOWN
from fastlora.formats.changes import AdapterFile
from fastlora.formats.files import FormatError

FACTORS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
_PARTS = "|".join(map(re.escape, sorted({*KNOWN, *FACTORS})))
KEY = re.compile(rf"diffusion_model\.(?P<path>.+)\.(?P<part>{_PARTS})")


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterFile:
    """What `kohya.unpack` makes of it, with the file's own keys. Raises FormatError as that does,
    and for two keys with one meaning."""
    keys: dict[str, str] = {}  # of the file, by kohya's
    unused: dict[str, str] = {}
    for key in tensors:
        match = KEY.fullmatch(key)
        if match is None:
            unused[key] = "not a key with an original name, diffusion_model.….lora_A.weight"
            continue
        part = FACTORS.get(match["part"], match["part"])
        known = f"lora_unet_{match['path'].replace('.', '_')}.{part}"
        if known in keys:
            raise FormatError(f"{key} and {keys[known]} are the same tensor")
        keys[known] = key
    file = kohya.unpack({known: tensors[key] for known, key in keys.items()}, metadata)
    unused.update({keys[known]: reason for known, reason in file.unused.items()})
    changes = {
        target: replace(change, keys=tuple(keys[known] for known in change.keys))
        for target, change in file.changes.items()
    }
    return replace(file, changes=changes, unused=unused)
