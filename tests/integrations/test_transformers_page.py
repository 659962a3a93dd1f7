"""The Python of docs/transformers.md runs, block after block, as a reader would run it."""

import re
from pathlib import Path

import pytest
import torch

from tests.adapters.oracles import same_bits
from tests.integrations.transformers_cases import T, adapted, fresh, inputs, output

PAGE = Path(__file__).resolve().parents[2] / "docs" / "transformers.md"
NAME = "LlamaForCausalLM"


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastlora

    monkeypatch.chdir(tmp_path)  # they write files
    fastlora.save(adapted(NAME), "adapter", format="peft")
    names = {"model": fresh(NAME), "torch": torch, "ids": inputs(NAME)["input_ids"]}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for i, block in enumerate(blocks):
        exec(compile(block, f"transformers.md, Python block {i + 1}", "exec"), names)
    assert len(names["report"].applied) == len(fastlora.adapters(adapted(NAME))["default"].modules)
    read, info = T.LlamaForCausalLM.from_pretrained("base", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert same_bits(output(read.eval(), NAME), output(fresh(NAME), NAME))
