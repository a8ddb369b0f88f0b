"""Merges into families with images whose files transformers converts: experts in every layout, fused attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model

from rankwise.files.checkpoint import open_checkpoint
from rankwise.merge.command import run
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.options.commands import MergeConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*__array__ implementation:DeprecationWarning"),  # processors
]


@pytest.mark.parametrize("name", ["molmo2", "glm4v_moe", "qwen3_vl_moe", "ernie4_5_vl_moe", "llama4", "aria"])
def test_it_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    base = FAMILIES[name](tmp_path / "base")
    model = load_model(str(base), torch.float32)
    sites = [site for site in model_sites(model).values() if site.tower == "language"]
    experts = [site.weight for site in sites if site.experts]
    others = [site.path for site in sites if site.kind == "attention" and not site.experts]
    settings = {"target_modules": others, "target_parameters": experts or None}
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **settings))  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.05)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    run(MergeConfig(adapter=str(tmp_path / "adapter"), output_dir=str(tmp_path / "out")))
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before.shape(key) == after.shape(key) for key in before)
    expected = PeftModel.from_pretrained(load_model(str(base), torch.float32), str(tmp_path / "adapter"))
    wanted, found = (
        expected.merge_and_unload().state_dict(),
        load_model(str(tmp_path / "out"), torch.float32).state_dict(),
    )
    assert wanted.keys() == found.keys()
    assert max(float((wanted[key].float() - found[key].float()).abs().max()) for key in wanted) < 1e-6
