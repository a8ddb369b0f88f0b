"""Mixtures of experts in GGUF: every expert is proved its own and a wrong one is named, on the command's path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experts import FAMILIES
from exported_experts import MORE, SQUARE
from safetensors.torch import load_file, save_file

pytest.importorskip("gguf")
from test_proofs_export import Draft, Export, Fault, changed, export

from rankwise.cli import main
from rankwise.files.checkpoint import open_checkpoint
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.export import changed_keys, compare_tensors, tuning_kept
from rankwise.gguf.provenance import origins

__all__ = ["export"]  # the fixture
ALL = [*FAMILIES, *MORE, *SQUARE.values()]
GATE, UP, DOWN = (f"blk.1.ffn_{name}_exps.weight" for name in ("gate", "up", "down"))
HOW = {
    "mixtral": {"joined": 6},
    "qwen3_moe": {"joined": 6},
    "olmoe": {"joined": 6},
    "deepseek_v3": {"joined": 6, "by heads": 6},
    "granitemoe": {"stacked": 2, "half": 4},
    "gpt_oss": {"stacked": 4, "alternate rows": 8},
    "llama4_text": {"stacked": 2, "half": 4},
    "qwen2_moe": {"joined": 6},
    "granitemoeshared": {"stacked": 2, "half": 8},  # two of each shared expert
}


@pytest.mark.parametrize("family", ALL)
def test_every_expert_of_a_sound_file_is_its_own(family: str, mixtures: Path, tmp_path: Path, export: Export) -> None:
    """Against the float32 file of the real converter; the parameters that were tuned keep their tuning, one by one."""
    sound = mixtures / family / "export"
    assert export(sound, "--outtype", "f32,f16,q8_0", text=lambda draft: None) == (0, "")
    model, base = (open_checkpoint(mixtures / family / name) for name in ("model", "base"))
    file = GGUFFile(sound / "model-f32.gguf")
    found = origins(file, model)
    counted = found.counts()
    wanted = HOW[family.partition(",")[0]]
    assert {
        name: count for name, count in counted.items() if name in ("joined", "stacked", "half", "alternate rows")
    } == {name: count for name, count in wanted.items() if name != "by heads"}
    assert counted.get("by heads", 0) == wanted.get("by heads", 0)
    rows = tuning_kept(file, found, base, model, changed_keys(base, model))
    first = next(name for name in file.tensors if name.endswith("ffn_up_exps.weight"))
    experts = file.tensors[first].shape[0]
    assert {row.name for row in rows} >= {f"{first}, expert {number}" for number in range(experts)}
    assert all(row.kept == pytest.approx(1, abs=1e-4) for row in rows)


def swapped(values: Any) -> Any:
    return values[[0, 2, 1, *range(3, len(values))]]


def with_one(number: int, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed_one(values: Any) -> Any:
        values = values.copy()
        values[number] = change(values[number])
        return values

    return changed_one


FAULTS: dict[str, tuple[Fault, str]] = {
    "two experts exchanged": (changed(DOWN, swapped), f"{DOWN}, expert 1, is {DOWN}, expert 2"),
    "gate and up exchanged": (lambda draft: draft.swap(GATE, UP), f"{GATE}, expert 0, is {UP}, expert 0"),
    "one expert's gate for its up": (
        lambda draft: draft.put(UP, np.stack([draft.floats(GATE)[0], *draft.floats(UP)[1:]])),
        f"{UP}, expert 0, is {GATE}, expert 0",
    ),
    "rows of one expert": (
        changed(DOWN, with_one(3, lambda matrix: np.roll(matrix, 5, axis=0))),
        f"{DOWN}, expert 3, has the rows of",
    ),
    "one value of one expert": (
        changed(UP, with_one(2, lambda matrix: matrix + np.eye(*matrix.shape) * 1e-6)),
        f"{UP}, expert 2, is not",
    ),
    "one expert twice": (changed(GATE, with_one(0, lambda matrix: matrix * 0)), f"{GATE}, expert 0, is not"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "granitemoe", *SQUARE.values()])
def test_a_wrong_expert_is_named(family: str, fault: str, mixtures: Path, export: Export) -> None:
    change, said = FAULTS[fault]
    block = 1 if not family.startswith("mixtral") else 0

    def there(draft: Draft) -> None:
        change(Elsewhere(draft, block))

    code, error = export(mixtures / family / "export", text=there)
    assert code == 6 and said.replace("blk.1.", f"blk.{block}.") in error


class Elsewhere:
    """A draft whose names are those of another layer."""

    def __init__(self, draft: Draft, block: int) -> None:
        self.draft, self.block = draft, block

    def named(self, name: str) -> str:
        return name.replace("blk.1.", f"blk.{self.block}.")

    def floats(self, name: str) -> Any:
        return self.draft.floats(self.named(name))

    def put(self, name: str, values: Any) -> None:
        self.draft.put(self.named(name), values)

    def swap(self, first: str, second: str) -> None:
        self.draft.swap(self.named(first), self.named(second))


OWN: dict[str, tuple[str, Fault, str]] = {
    "halves for alternate rows": (
        "gpt_oss",
        lambda draft: draft.put(GATE, np.concatenate([draft.floats(GATE)[:, :24], draft.floats(UP)[:, :24]], axis=1)),
        f"{GATE}, expert 0, is not",
    ),
    "biases exchanged": (
        "gpt_oss",
        lambda draft: draft.swap(GATE.replace("weight", "bias"), UP.replace("weight", "bias")),
        f"{GATE.replace('weight', 'bias')}, expert 0, is {UP.replace('weight', 'bias')}, expert 0",
    ),
    "one expert's bias": (
        "gpt_oss",
        changed(DOWN.replace("weight", "bias"), swapped),
        f"{DOWN.replace('weight', 'bias')}, expert 1, is",
    ),
    "sinks of another layer": (
        "gpt_oss",
        lambda draft: draft.swap("blk.0.attn_sinks.weight", "blk.1.attn_sinks.weight"),
        "blk.0.attn_sinks.weight is not",
    ),
    "stored as the checkpoint has it": (
        SQUARE["llama4_text"],
        changed(DOWN, lambda values: values.swapaxes(1, 2).reshape(values.shape)),
        f"{DOWN}, expert 0, is not",
    ),
    "heads of latent attention": (
        "deepseek_v3",
        changed("blk.1.attn_k_b.weight", swapped),
        "blk.1.attn_k_b.weight, is not",
    ),
    "keys not turned": (
        "deepseek_v3",
        changed("blk.2.attn_k_b.weight", lambda values: values.swapaxes(1, 2).reshape(values.shape)),
        "blk.2.attn_k_b.weight, is not",
    ),
    "the choice's bias of another layer": (
        "deepseek_v3",
        lambda draft: draft.swap("blk.1.exp_probs_b.bias", "blk.2.exp_probs_b.bias"),
        "blk.1.exp_probs_b.bias is not",
    ),
    "the shared expert's": (
        "deepseek_v3",
        lambda draft: draft.swap("blk.1.ffn_gate_shexp.weight", "blk.1.ffn_up_shexp.weight"),
        "blk.1.ffn_gate_shexp.weight is not",
    ),
    "the halves of a fused shared expert": (
        "granitemoeshared",
        lambda draft: draft.swap("blk.1.ffn_gate_shexp.weight", "blk.1.ffn_up_shexp.weight"),
        "blk.1.ffn_gate_shexp.weight, is blk.1.ffn_up_shexp.weight",
    ),
    "routers exchanged": (
        "olmoe",
        lambda draft: draft.swap("blk.0.ffn_gate_inp.weight", "blk.1.ffn_gate_inp.weight"),
        "blk.0.ffn_gate_inp.weight is not",
    ),
    "scores as softmax": (
        "deepseek_v3",
        lambda draft: draft.remove("deepseek2.expert_gating_func"),
        "deepseek2.expert_gating_func is not stated, and 2 in the model",
    ),
    "fewer experts a token": (
        "mixtral",
        lambda draft: draft.values.update({"llama.expert_used_count": 1}),
        "llama.expert_used_count is 1, and 2 in the model",
    ),
}


@pytest.mark.parametrize("fault", OWN)
def test_what_is_a_familys_own(fault: str, mixtures: Path, export: Export) -> None:
    family, change, said = OWN[fault]
    code, error = export(mixtures / family / "export", text=change)
    assert code == 6 and said in error


@pytest.mark.parametrize("form", ["f16", "q8_0"])
def test_a_rounded_file_names_the_expert_too(form: str, mixtures: Path, export: Export) -> None:
    code, error = export(mixtures / "mixtral" / "export", text=changed(UP, swapped), only=(form,))
    assert code == 6 and f"model-{form}.gguf: {UP}, expert 1, {UP}, expert 2: not the values" in error


def test_a_rounded_stack_is_compared_expert_by_expert(mixtures: Path) -> None:
    """The same figures as of the whole tensor at once."""
    folder = mixtures / "mixtral" / "export"
    files = [GGUFFile(folder / f"model-{form}.gguf") for form in ("q8_0", "f32")]
    (row,) = [one for one in compare_tensors(files[0], files[1], "q8_0") if one.name == UP]
    rounded, exact = (file.tensor(UP) for file in files)
    assert row.max_abs == float((rounded - exact).abs().max()) and 0 < row.share <= 1
    assert row.rms == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-6)
    assert torch.equal(torch.stack(list(files[0].parts(UP))), rounded)


def test_tuning_that_one_expert_has_lost_is_named(mixtures: Path, tmp_path: Path) -> None:
    """All other experts of the stack keep theirs."""
    model, base = (open_checkpoint(mixtures / "mixtral" / name) for name in ("model", "base"))
    exact = GGUFFile(mixtures / "mixtral" / "export" / "model-f32.gguf")
    found = origins(exact, model)
    (cut,) = (cut for cut in found.found[UP].cuts if cut.expert == 2)

    class Lost(GGUFFile):
        def part(self, name: str, number: int) -> torch.Tensor:
            lost = name == UP and number == 2
            return base.tensor(cut.key) if lost else super().part(name, number)

    with pytest.raises(Exception, match=rf"{UP}, expert 2: nearer to the base"):
        tuning_kept(Lost(exact.path), found, base, model, changed_keys(base, model))


# --- before anything is converted ------------------------------------------------------------------------------------


def without(model: Path, folder: Path, drop: str = "", **config: Any) -> Path:
    shutil.copytree(model, folder)
    weights = {
        key: value for key, value in load_file(folder / "model.safetensors").items() if not drop or drop not in key
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | config))
    return folder


@pytest.mark.parametrize(
    ("drop", "named"),
    [
        ("layers.1.block_sparse_moe.experts.2.", "model.layers.1.block_sparse_moe.experts.2; "),
        ("layers.0.block_sparse_moe.experts.3.w2", "model.layers.0.block_sparse_moe.experts.3.w2.weight; "),
        ("experts.3.w1", "model.layers.0.block_sparse_moe.experts.3.w1.weight, model.layers.1."),
    ],
)
def test_a_missing_expert_is_named_before(
    drop: str, named: str, mixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = without(mixtures / "mixtral" / "model", tmp_path / "model", drop)
    assert main(["export", str(model), "-o", str(tmp_path / "out")]) == 3
    assert f"experts are missing: {named}" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        (
            "qwen3_moe",
            {"norm_topk_prob": False},
            "its norm_topk_prob is False, and llama.cpp computes as if it were True",
        ),
        ("olmoe", {"norm_topk_prob": True}, "its norm_topk_prob is True, and llama.cpp computes as if it were False"),
        ("llama4_text", {"moe_layers": [1]}, "its experts are in the layers [1]"),
    ],
)
def test_routing_that_llama_cpp_does_not_have_is_refused(
    family: str,
    config: dict[str, Any],
    said: str,
    mixtures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every tensor would be right, and the logits wrong (measured in llama.cpp: 4e-5 nats where 1e-13 is exact)."""
    model = without(mixtures / family / "model", tmp_path / "model", **config)
    assert main(["export", str(model), "-o", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
