"""What `extract` leaves out is said and counted; what `--save_modules` carries makes base + adapter the tuned model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_extract import tiny_gpt2
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rankwise.cli import main
from rankwise.models.load import load_model
from rankwise.ranks import extract as extracted_adapter
from rankwise.ranks import proof
from rankwise.ranks.deltas import DELTAS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def tiny_qwen2(folder: Path) -> Path:
    """Tied, with biases on q, k, v."""
    tiny_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=384, tie_word_embeddings=True, **sizes, **heads)).save_pretrained(folder)
    return folder


def tied_llama(folder: Path) -> Path:
    return tiny_llama(folder, tie_word_embeddings=True)


def tuned_on(
    base: Path, folder: Path, *, rows: int = 0, own_head: bool = False, only: tuple[str, ...] = (), **config: Any
) -> Path:
    """Every weight moved (or `only` the sites and some others), with `rows` added tokens, and a head of its own."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if rows:
        tokenizer.add_tokens([f"<new{index}>" for index in range(rows)])
        model.resize_token_embeddings(len(tokenizer))
    if own_head:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not only or name in only or "_proj" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def extract(base: Path, tuned: Path, out: Path, *words: str) -> int:
    return main(["extract", str(base), str(tuned), "--rank", "1000", "-o", str(out), *words])


def fidelity(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "fidelity.json").read_text())
    return content


def logits(model: nn.Module, rows: int = 384) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(rows - 32, rows).reshape(2, 16)).logits
    return found


PAIRS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "untied": (tiny_llama, {}),
    "tied": (tied_llama, {}),
    "conv1d": (tiny_gpt2, {}),
    "biases": (tiny_qwen2, {}),
    "grown": (tiny_llama, {"rows": 8}),
    "grown and tied": (tied_llama, {"rows": 8}),
    "own head": (tied_llama, {"own_head": True}),
    "grown, with an own head": (tiny_qwen2, {"rows": 8, "own_head": True}),
}


@pytest.mark.parametrize("case", PAIRS)
def test_with_whole_modules_base_and_adapter_are_the_tuned_model(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, change = PAIRS[case]
    base, rows = make(tmp_path / "base"), 384 + change.get("rows", 0)
    tuned, out = tuned_on(base, tmp_path / "tuned", **change), tmp_path / "out"
    assert extract(base, tuned, out, "--save_modules") == 0
    shown = capsys.readouterr().out
    assert "verified: loaded by PEFT" in shown and "0.0% as far as the base" in shown
    assert "left out" not in shown.split("verified")[0]
    assert f"· {len(fidelity(out)['whole'])} tensors carried whole" in shown
    assert fidelity(out)["left_out"] == [] and fidelity(out)["energy_left_out"] == 0
    expected = logits(load_model(str(tuned), torch.float32), rows)
    model = load_model(str(base), torch.float32)
    model.resize_token_embeddings(rows)  # as PEFT wants it where the vocabulary has grown
    adapted = PeftModel.from_pretrained(model, str(out)).eval()
    torch.testing.assert_close(logits(adapted, rows), expected, rtol=1e-4, atol=1e-4)
    assert main(["merge", str(out), "-o", str(tmp_path / "merged")]) == 0
    merged = load_model(str(tmp_path / "merged"), torch.float32)
    torch.testing.assert_close(logits(merged, rows), expected, rtol=1e-4, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == rows


@pytest.mark.parametrize("case", PAIRS)
def test_what_is_left_out_is_said_and_counted(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`energy kept` alone would say 100 %."""
    make, change = PAIRS[case]
    base = make(tmp_path / "base")
    tuned, out = tuned_on(base, tmp_path / "tuned", **change), tmp_path / "out"
    assert extract(base, tuned, out) == 0
    before, after = (load_model(str(folder), torch.float32).state_dict() for folder in (base, tuned))
    sites = {row["path"] + ".weight" for row in fidelity(out)["sites"]}
    tied = (
        not change.get("own_head") and after.get("lm_head.weight") is not None and case != "untied" and case != "grown"
    )
    other = [name for name in after if name not in sites and not (tied and name == "lm_head.weight")]
    energy = {name: float((after[name][: len(before[name])] - before[name]).square().sum()) for name in after}
    left = {row["name"]: row for row in fidelity(out)["left_out"]}
    assert set(left) == set(other)
    for name in other:
        assert left[name]["energy_total"] == pytest.approx(energy[name], rel=1e-4)
    share = sum(energy[name] for name in other) / sum(energy[name] for name in {*other, *sites})
    shown = capsys.readouterr().out
    assert f"{len(other)} tensors outside these sites changed as well ({share:.1%} of all change)" in shown
    assert f"energy kept 100.0% (lowest: 100.0% at {fidelity(out)['sites'][0]['path'].split('.')[0]}" in shown
    assert f"{1 - share:.1%} of all change" in shown and "--save_modules carries" in shown
    if change.get("rows"):
        wide = [name for name in other if after[name].shape != before[name].shape]
        assert wide and all(
            f"{name} is (384, 32) in the base and (392, 32) in the tuned model" in shown for name in wide
        )
    facts = json.loads((out / "manifest.json").read_text())["stages"]["extract"]
    assert facts["left_out"]["tensors"] == len(other)
    assert facts["left_out"]["share_of_change"] == pytest.approx(share, rel=1e-4)
    assert facts["verification"]["error"] < 1e-5


def test_tensors_that_only_the_tuned_model_has_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_llama(tmp_path / "base")
    tuned = tuned_on(base, tmp_path / "tuned", only=(NORM,))
    tensors = load_file(tuned / "model.safetensors")
    save_file(tensors | {"v_head.summary.weight": torch.ones(1, 32)}, tuned / "model.safetensors")
    assert extract(base, tuned, tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "1 tensors are only in the tuned model (v_head.summary.weight)" in shown
    assert "1 tensors outside these sites changed as well" in shown and NORM in shown
    words = [str(base), str(tuned), "--out", str(tmp_path / "ranks"), "--no-plots"]
    assert main(["ranks", *words]) == 0
    assert "1 tensors are only in the tuned model (v_head.summary.weight)" in capsys.readouterr().out


def test_storage_in_another_precision_is_no_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_llama(tmp_path / "base")
    tuned = tuned_on(base, tmp_path / "tuned", only=("no other",))
    half = {key: t.bfloat16() for key, t in load_file(tuned / "model.safetensors").items()}
    save_file(half, tuned / "model.safetensors")
    assert extract(base, tuned, tmp_path / "out") == 0
    assert "outside these sites" not in capsys.readouterr().out


def test_a_change_below_the_bases_spacing_is_a_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tuned model in float32 over a bf16 base: a change of 1e-4 is a fortieth of what bf16 tells apart."""
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    tuned = tuned_on(base, tmp_path / "tuned", only=("no other",))
    wide = {key: t.float() for key, t in load_file(tuned / "model.safetensors").items()}
    assert not wide[NORM].bfloat16().ne((wide[NORM] * 1.0001).bfloat16()).any()
    wide[NORM] = wide[NORM] * 1.0001
    save_file(wide, tuned / "model.safetensors")
    assert extract(base, tuned, tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "1 tensors outside these sites changed as well" in shown and NORM in shown


def test_saved_deltas_count_and_carry_what_is_no_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_llama(tmp_path / "base")
    tuned = tuned_on(base, tmp_path / "tuned")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    folder = tmp_path / "run" / "deltas"
    folder.mkdir(parents=True)
    save_file({key: after[key] - before[key] for key in before}, folder / "model.safetensors")
    assert extract(base, tuned, tmp_path / "known") == 0
    known = fidelity(tmp_path / "known")["sites"]
    rows = [{"path": r["path"], "shape": r["shape"], "tower": "language", "transposed": False} for r in known]
    facts = {"sites": rows, "model_name": str(base), "base_energy": {}}
    DELTAS.write(folder, facts)
    words = ["extract", "--deltas", str(tmp_path / "run"), "--rank", "1000"]
    capsys.readouterr()
    assert main([*words, "-o", str(tmp_path / "some")]) == 0
    assert "7 tensors outside these sites changed as well" in capsys.readouterr().out
    assert main([*words, "-o", str(tmp_path / "all"), "--save_modules"]) == 0
    assert "0.0% as far as the base" in capsys.readouterr().out
    adapted = PeftModel.from_pretrained(load_model(str(base), torch.float32), str(tmp_path / "all")).eval()
    expected = logits(load_model(str(tuned), torch.float32))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_carried_whole_stays_out_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Matrices that the options leave out: a choice, not a module to save."""
    base = tiny_llama(tmp_path / "base")
    tuned, out = tuned_on(base, tmp_path / "tuned"), tmp_path / "out"
    assert extract(base, tuned, out, "--save_modules", "--include", "mlp") == 0
    assert "8 tensors outside these sites changed as well" in capsys.readouterr().out
    assert {row["name"].split(".")[-2] for row in fidelity(out)["left_out"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {EMBEDDING, HEAD, NORM} < set(fidelity(out)["whole"])


def test_it_needs_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_llama(tmp_path / "base")
    tuned = tuned_on(base, tmp_path / "tuned")
    (tuned / "config.json").unlink()
    (base / "config.json").unlink()
    assert extract(base, tuned, tmp_path / "out", "--save_modules") == 3
    assert "--save_modules needs the base's config.json" in capsys.readouterr().err


# --- the proof -------------------------------------------------------------------------------------------------------


def refused(base: Path, tuned: Path, out: Path, *words: str) -> bool:
    """Exit 6, and nothing is written."""
    code = extract(base, tuned, out, *words)
    return code == 6 and not (out / "adapter_config.json").exists() and not list(out.glob(".adapter-*"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tied_llama(tmp_path_factory.mktemp("base"))
    return base, tuned_on(base, tmp_path_factory.mktemp("tuned"))


@pytest.mark.parametrize("words", [(), ("--save_modules",)])
def test_a_tuned_model_with_another_config(
    words: tuple[str, ...], pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All tensors are carried, and the base's rotary frequencies are not the tuned model's."""
    other = tuned_on(pair[0], tmp_path / "other", rms_norm_eps=1e-3)
    assert refused(pair[0], other, tmp_path / "out", *words)
    assert "compare the two config.json" in capsys.readouterr().err
    assert extract(pair[0], other, tmp_path / "out", "--no_verify", *words) == 0
    assert "not verified (--no_verify)" in capsys.readouterr().out


def test_factors_that_are_not_the_deltas(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One site's A is another's: what is promised is what was factored, what is written is not."""
    written = extracted_adapter.write_adapter

    def swapped(folder: Any, adapter: Any) -> Path:
        first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
        adapter.pairs[first], adapter.pairs[second] = adapter.pairs[second], adapter.pairs[first]
        found = written(folder, adapter)
        adapter.pairs[first], adapter.pairs[second] = adapter.pairs[second], adapter.pairs[first]
        return found

    monkeypatch.setattr(extracted_adapter, "write_adapter", swapped)
    assert refused(*pair, tmp_path / "out")


def test_a_site_that_peft_does_not_find(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded with a module left out of its targets, as a wrong name does it silently."""
    attached = proof.layered_adapted

    def without_one(*given: Any) -> Any:
        adapted = attached(*given)
        layer = adapted.get_base_model().model.layers[0].mlp.up_proj
        nn.init.zeros_(layer.lora_B["default"].weight)
        return adapted

    monkeypatch.setattr(proof, "layered_adapted", without_one)
    assert refused(*pair, tmp_path / "out")


def test_a_small_change_is_held_to_its_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter's whole effect is below the tolerance of float32 logits; half of it missing is found."""
    base = tiny_llama(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    moved = {
        key: t + 1e-4 * t.abs().mean() * torch.randn_like(t) if "_proj" in key else t for key, t in tensors.items()
    }
    (tmp_path / "tuned").mkdir()
    save_file(moved, tmp_path / "tuned" / "model.safetensors")
    assert extract(base, tmp_path / "tuned", tmp_path / "out") == 0
    attached = proof.layered_adapted

    def half(*given: Any) -> Any:
        adapted = attached(*given)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name and "layers.0" in name:
                nn.init.zeros_(parameter)
        return adapted

    monkeypatch.setattr(proof, "layered_adapted", half)
    assert refused(base, tmp_path / "tuned", tmp_path / "other")


def test_a_tied_head_left_behind(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings alone as a module to save: PEFT's copy of them is no longer the head's."""
    both = extracted_adapter.find_whole

    def embeddings_alone(*given: Any) -> Any:
        whole = both(*given)
        return type(whole)(tuple(path for path in whole.modules if path != "lm_head"), whole.biases)

    assert extract(*pair, tmp_path / "sound", "--save_modules") == 0
    monkeypatch.setattr("rankwise.ranks.extract.find_whole", embeddings_alone)
    assert refused(*pair, tmp_path / "out", "--save_modules")
