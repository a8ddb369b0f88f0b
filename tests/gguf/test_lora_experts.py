"""An adapter of a mixture's experts is no LoRA that llama.cpp's converter can write: refused before anything."""

from __future__ import annotations

from pathlib import Path

import experts
import pytest
from peft import LoraConfig, get_peft_model

from rankwise.cli import main

pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LAYER = "model.layers.1.mlp"
PARAMETERS = {
    "mixtral": f"{LAYER}.experts.down_proj",
    "gpt_oss": f"{LAYER}.experts.gate_up_proj",
}


def adapter_of(family: str, folder: Path) -> Path:
    """A base and an adapter of its experts, as PEFT writes it."""
    model = experts.built(family)
    model.save_pretrained(folder / "base")
    config = LoraConfig(r=2, target_modules=[], target_parameters=[PARAMETERS[family]])
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("family", PARAMETERS)
@pytest.mark.parametrize("command", ["export", "validate"])
def test_pairs_of_experts_are_refused(
    command: str, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of(family, tmp_path)
    (tmp_path / "lora.gguf").touch()
    file, task = str(tmp_path / "lora.gguf"), ("--task", "e2e_nlg", "--data_path", str(tmp_path))
    words = {
        "export": ["--adapter_gguf", str(adapter), "--base_model", str(tmp_path / "base")],
        "validate": [file, "--adapter_gguf", file, "--outtype", "f16", "--reference", str(adapter), *task],
    }[command]
    code = main([command, *words, "-o", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert code == 2 and not (tmp_path / "out").exists()
    assert f"adapts the experts of 1 parameter ({PARAMETERS[family]})" in said and "rankwise merge" in said
