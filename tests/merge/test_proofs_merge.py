"""What each check of `merge` is for: the product's own code broken on the command's path, and exit 6."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge import TARGETS, adapter_on
from test_towers_full import bases  # noqa: F401
from tiny import tiny_llama
from torch import Tensor
from towered import Bases, adapted

from rankwise.cli import main
from rankwise.merge import logits, verify, write
from rankwise.merge import plan as planning
from rankwise.merge.plan import Entry, MergePlan
from rankwise.models.adapters import save_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

DOWN, EMBEDDING = "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"
DTYPES = ("float32", "float16", "bfloat16")
Merge = Callable[..., tuple[int, str]]
right_layer, right_tensor = write.merge_layer, write.make_tensor


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weak enough that a matrix left out is within the logits' tolerance in bfloat16."""
    return adapter_on(base, tmp_path_factory.mktemp("adapter"), TARGETS, std=0.05)


@pytest.fixture
def merge(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Merge:
    """Run the command; its exit code and what it says went wrong."""

    def run(*words: str, of: Path = adapter) -> tuple[int, str]:
        code = main(["merge", str(of), "-o", str(tmp_path / "out"), *words])
        assert code == 0 or not (tmp_path / "out" / "config.json").exists(), "nothing wrong bears the name"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return code, capsys.readouterr().err

    return run


def written_as(change: Callable[[Entry, Tensor], Tensor]) -> Callable[..., Tensor]:
    """In place of `make_tensor`: what it gives, changed."""

    def tensor(plan: MergePlan, entry: Entry, rounding: Any = None) -> Tensor:
        return change(entry, right_tensor(plan, entry, rounding))

    return tensor


# --- the files, entry by entry ---------------------------------------------------------------------------------------


def test_sound_merges_pass(merge: Merge) -> None:
    for dtype in DTYPES:
        assert merge("--dtype", dtype) == (0, "")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_that_was_not_merged(dtype: str, merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quarters of the effect are lost, and in bfloat16 the logits alone would let it pass."""
    merged = write.change_weight
    monkeypatch.setattr(
        write,
        "change_weight",
        lambda plan, name, weight: weight.float() if name == DOWN else merged(plan, name, weight),
    )
    code, said = merge("--dtype", dtype)
    assert code == 6 and f"{DOWN} is not base + adapter" in said


def test_large_matrices_are_looked_at_some_rows_at_a_time(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row alone is wrong."""
    monkeypatch.setattr(verify, "BLOCK", 100)
    assert merge() == (0, "")

    def wrong(entry: Entry, tensor: Tensor) -> Tensor:
        return tensor.index_fill(0, torch.tensor([len(tensor) - 1]), 0.5) if entry.key == DOWN else tensor

    monkeypatch.setattr(write, "make_tensor", written_as(wrong))
    code, said = merge()
    assert code == 6 and f"{DOWN} is not base + adapter" in said


def test_a_scale_a_little_off(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ten-thousandths: far below any tolerance of logits."""
    monkeypatch.setattr(
        write, "merge_layer", lambda layer, weight: weight + 1.0002 * (right_layer(layer, weight) - weight)
    )
    code, said = merge("--dtype", "float32")
    assert code == 6 and "4 tensors" in said


def test_digits_cut_off_in_place_of_rounding(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(plan: MergePlan, name: str, weight: Tensor) -> Tensor:
        whole = right_layer(plan.change.layers[name], weight)
        return (whole.view(torch.int32) & -65536).view(torch.float32)  # towards zero: up to a whole spacing off

    monkeypatch.setattr(write, "change_weight", cut)
    code, said = merge()
    assert code == 6 and "is not base + adapter" in said


def test_another_matrixs_factors(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    other = DOWN.replace("layers.0", "layers.1")
    merged = write.change_weight
    swapped = {DOWN: other, other: DOWN}
    monkeypatch.setattr(
        write, "change_weight", lambda plan, name, weight: merged(plan, swapped.get(name, name), weight)
    )
    code, said = merge()
    assert code == 6 and DOWN in said and other in said


def test_a_row_that_no_prompt_holds(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end token's embedding: random prompts never show it."""

    def wrong(entry: Entry, tensor: Tensor) -> Tensor:
        return tensor.index_fill(0, torch.tensor([2]), 0.5) if entry.key == EMBEDDING else tensor

    monkeypatch.setattr(write, "make_tensor", written_as(wrong))
    code, said = merge()
    assert code == 6 and f"{EMBEDDING} is not the base's" in said


def test_a_tensor_that_was_not_written(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write.write_shards

    def fewer(folder: Path, entries: Any, *rest: Any) -> Any:
        return whole(folder, [entry for entry in entries if entry.key != DOWN], *rest)

    monkeypatch.setattr(write, "write_shards", fewer)
    code, said = merge()
    assert code == 6 and f"{DOWN} is missing" in said


def test_a_vision_tower_that_an_adapter_of_the_language_leaves_alone(
    bases: Bases,  # noqa: F811
    tmp_path: Path,
    merge: Merge,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Text never reaches it, so no logit shows it."""
    base = bases("smolvlm")
    (tmp_path / "adapter").mkdir()
    save_adapter(adapted(base, ("language",)), tmp_path / "adapter", str(base))
    assert merge(of=tmp_path / "adapter") == (0, "")

    def wrong(entry: Entry, tensor: Tensor) -> Tensor:
        return tensor + 1 if "vision_model" in entry.key and "fc1.weight" in entry.key else tensor

    monkeypatch.setattr(write, "make_tensor", written_as(wrong))
    code, said = merge(of=tmp_path / "adapter")
    assert code == 6 and "vision_model" in said and "is not the base's" in said


# --- the logits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "epsilon"), [("float32", 3e-7), ("float16", 3e-5), ("bfloat16", 3e-4)])
@pytest.mark.parametrize("limit", ["1GB", "99KB"])
def test_a_config_that_is_not_the_bases(
    dtype: str, epsilon: float, limit: str, merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors are right, and the model is another; off by less than ten times the tolerance."""
    config = planning.merged_config
    monkeypatch.setattr(planning, "merged_config", lambda *given: config(*given) | {"rms_norm_eps": 1e-6 + epsilon})
    errors: list[float] = []
    relative = verify.relative
    monkeypatch.setattr(verify, "relative", lambda *given: (errors.append(relative(*given)), errors[-1])[1])
    code, said = merge("--dtype", dtype, "--max_memory", limit)
    assert code == 6 and "logits differ from base + adapter's" in said
    assert errors[1] < 10 * verify.TOLERANCE[getattr(torch, dtype)], "a looser tolerance would let it pass"


def test_an_adapter_that_changes_nothing(
    base: Path, tmp_path: Path, merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT puts it on the base without effect: the reference is then the base itself."""
    monkeypatch.setattr(logits.PeftModel, "from_pretrained", lambda model, _: model)
    code, said = merge()
    assert code == 6 and "no effect" in said


def test_an_effect_that_sums_in_another_order_have_as_well(tmp_path: Path, adapter: Path, merge: Merge) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file({k: t * (1e-6 if "lora_B" in k else 1) for k, t in tensors.items()}, copy / "adapter_model.safetensors")
    code, said = merge("--dtype", "float32", of=copy)
    assert code == 6 and "no effect" in said


def test_layers_that_get_another_layers_weights(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the reference: what is compared layer by layer is not the base then."""
    read = logits.FileWeights.__getitem__

    def other(self: logits.FileWeights, name: str) -> Tensor:
        merged = "merged" in str(self.checkpoint.path) or ".out." in str(self.checkpoint.path)
        return read(self, name if merged else name.replace("layers.1", "layers.0"))

    monkeypatch.setattr(logits.FileWeights, "__getitem__", other)
    code, said = merge("--max_memory", "99KB")
    assert code == 6 and "logits differ from base + adapter's" in said


def test_untied_weights_under_a_config_that_ties_them(
    tmp_path: Path, merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = adapter_on(base, tmp_path / "adapter", ["q_proj", "lm_head"])
    config = planning.merged_config
    monkeypatch.setattr(planning, "merged_config", lambda given, dtype, untie: config(given, dtype, False))
    code, said = merge(of=adapter)
    assert code == 6 and "always ties" in said
