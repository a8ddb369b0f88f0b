"""What can go wrong with a mixture of experts (docs/experts.md), by command line: message, exit code, nothing made.

The other two lines of that list: `test_expert_files.py` (an operation that is not known), `test_adapt_experts.py` (what
PEFT builds otherwise than planned).
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import experts
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import Tensor

from rankwise import cli
from rankwise.files.atomic import read_object, write_json
from rankwise.files.lineage import altered
from rankwise.models.load import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

Tensors = dict[str, Tensor]
EXPERT = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, tuned/ (all matrices of the layers changed), adapter/ and rows.jsonl."""
    folder = tmp_path_factory.mktemp("mixture")
    base = experts.saved("mixtral", folder / "base")
    changed(base, folder / "tuned", lambda name, weight: "layers" in name and weight.dim() > 1)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    how = LoraConfig(r=2, target_modules=[], target_parameters=targets)
    adapted = get_peft_model(load_model(str(base), torch.float32), how)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder / "adapter")
    rows = [
        {"messages": [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "one"}]}
        for number in range(8)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def changed(source: Path, target: Path, which: Callable[[str, Tensor], bool]) -> Path:
    """A copy of a model in which some tensors have moved."""
    shutil.copytree(source, target)
    draw = torch.Generator().manual_seed(1)

    def move(tensors: Tensors) -> None:
        for name, weight in tensors.items():
            if which(name, weight):
                tensors[name] = weight + 0.01 * torch.randn(weight.shape, generator=draw)

    return edited(target, move)


def edited(model: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def without_one_expert(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".experts.3." in name]:
        del tensors[name]


def without_one_file(tensors: Tensors) -> None:
    del tensors[EXPERT]


def with_nan(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][0, 0] = float("nan")

    return change


def split(model: Path) -> None:
    """Two shards, of which the second is lost."""
    names = list(load_file(model / "model.safetensors"))
    places = {name: f"{'a' if index < 10 else 'b'}.safetensors" for index, name in enumerate(names)}
    (model / "model.safetensors").rename(model / "a.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    assert cli.main([str(word) for word in words]) == code
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_one_expert, r"mlp\.experts\.gate_up_proj has 3 experts .* where the model has 4, in the tuned"),
        (without_one_file, r"model\.layers\.0\.mlp\.experts\.gate_up_proj .*2.* in the tuned checkpoint"),
        (with_nan(EXPERT), r"model\.layers\.0\.mlp\.experts\.gate_up_proj, expert 2: the delta has NaN"),
    ],
)
def test_a_broken_mixture_is_named_by_parameter_and_expert(
    place: Path, tmp_path: Path, change: Callable[[Tensors], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = edited(Path(shutil.copytree(place / "tuned", tmp_path / "broken")), change)
    assert re.search(message, refused(capsys, 3, "ranks", place / "base", broken, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_lost_shard_is_named_with_its_experts(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split(Path(shutil.copytree(place / "tuned", tmp_path / "broken")))
    said = refused(capsys, 3, "ranks", place / "base", tmp_path / "broken", "-o", tmp_path / "out")
    assert "1 of 2 shards are missing: b.safetensors (with model.layers.0.block_sparse_moe.experts" in said


@pytest.mark.parametrize(
    "words",
    [
        ["advise", "--placements", "attention,eva"],
        *(["study", "--arms", f"uniform,{arm}", "--primary", f"{arm} vs uniform"] for arm in ("loss", "eva", "warm")),
        *(["study", "--arms", f"uniform,{arm}", "--primary", f"{arm} vs uniform"] for arm in ("plan-warm", "compress")),
        ["study", "--kind", "phases"],
    ],
)
def test_what_needs_modules_is_refused_whatever_the_rows_are(
    place: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight rows are too few for a study, which would be exit 3: that the arm is for no mixture comes first."""
    data = ["--model_name", place / "base", "--data_path", place / "rows.jsonl", "--task", "conversations"]
    said = refused(capsys, 2, *words, *data, "-o", tmp_path / "out")
    assert words[-1].split(" vs ")[0].split(",")[-1] in said and "is a parameter" in said
    assert "--target attention_only" in said
    assert not (tmp_path / "out").exists()


def test_experts_are_refused_for_vllm_though_it_is_not_installed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    data = ["--task", "conversations", "--data_path", place / "rows.jsonl", "-o", tmp_path / "out"]
    said = refused(capsys, 2, "evaluate", place / "adapter", "--engine", "vllm", *data)
    assert "adapts parameters by name (experts)" in said and "rankwise merge" in said and "pip install" not in said
    said = refused(capsys, 2, "evaluate", place / "base", "--engine", "vllm", "--num_beams", "2", *data)
    assert "--num_beams needs --engine transformers" in said


@pytest.mark.parametrize("kind", ["mixture", "dense"])
def test_a_pair_that_differs_in_nothing_gets_no_plan(
    kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = place / "base" if kind == "mixture" else tiny_llama(tmp_path / "dense")
    same = shutil.copytree(base, tmp_path / "same")
    outside = changed(base, tmp_path / "outside", lambda name, _: "embed" in name or "norm" in name)
    for words in (["ranks"], ["ranks", "--budget", "uniform:2"], ["extract", "--rank", "2"]):
        said = refused(capsys, 3, *words, base, same, "-o", tmp_path / "out")
        assert re.search(r"none of the \d+ sites has changed; nor has any other tensor\. Check", said), said
        said = refused(capsys, 3, *words, base, outside, "-o", tmp_path / "out")
        assert re.search(r"none of the \d+ sites has changed; outside them \d+ tensors changed \(model\.", said), said
        assert not (tmp_path / "out").exists()


def test_a_part_that_has_not_changed_is_said(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = changed(place / "base", tmp_path / "part", lambda name, _: "layers.0" in name and "experts" in name)
    assert cli.main(["ranks", str(place / "base"), str(part), "-o", str(tmp_path / "out"), "--no_plots"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: 10 of 12 sites changed in nothing (model.layers.0.self_attn.q_proj …)" in said


def test_the_energy_is_reached_within_ranks_that_sites_have(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest rank of a 32 × 64 matrix is 21, whatever --max_rank is, and its delta has full rank."""
    pair = [str(place / "base"), str(place / "tuned")]
    assert cli.main(["ranks", *pair, "-o", str(tmp_path / "out"), "--no_plots"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "12 of 12 sites (100 %) saturate: 90 % of the energy is not reached within their largest ranks, 21 to 38"
        in said
    )
    assert "128" not in said


def test_saved_deltas_are_not_taken_for_a_checkpoint(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data_path", place / "rows.jsonl", "--task", "conversations", "--subset_ratio", "1"]
    words += ["--learning_rate", "1e-2", "--gradient_accumulation", "1", "--num_epochs", "2"]
    run = tmp_path / "run"
    assert cli.main([str(w) for w in ["finetune", "--model_name", place / "base", *words, "-o", run]]) == 0
    capsys.readouterr()
    for tuned in (run, run / "deltas"):
        said = refused(capsys, 3, "ranks", place / "base", tuned, "-o", tmp_path / "out")
        assert f"give it as --deltas {tuned}" in said
    assert (
        cli.main(["ranks", "--deltas", str(run), "-o", str(tmp_path / "out"), "--no_plots", "--include", "down"]) == 0
    )


@pytest.mark.parametrize("name", [EXPERT, QUERY, "model.embed_tokens.weight"])
def test_nan_in_the_base_is_never_merged(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though nothing is compared, and whether the adapter changes that tensor or not."""
    broken = edited(Path(shutil.copytree(place / "base", tmp_path / "broken")), with_nan(name))
    words = ["merge", place / "adapter", "--base_model", broken, "--no_verify", "-o", tmp_path / "out"]
    said = refused(capsys, 3, *words)
    assert "in the base" in said and "NaN" in said
    assert ("gate_up_proj, expert 2" if name == EXPERT else name) in said
    assert not (tmp_path / "out").exists()


def test_a_merged_model_that_was_changed_is_not_exported(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One entry of one expert, which shows in few logits; `evaluate` says so and goes on."""
    monkeypatch.setattr("rankwise.gguf.command.find_converter", lambda folder: None)
    merged = tmp_path / "merged"
    assert cli.main(["merge", str(place / "adapter"), "-o", str(merged)]) == 0
    assert altered(merged, "merge") is None
    (merged / "tokenizer_config.json").write_text((merged / "tokenizer_config.json").read_text() + "\n")
    assert altered(merged, "merge") is None, "what is compared by itself when it is read"

    def change(tensors: Tensors) -> None:
        tensors[EXPERT][1, 1] += 1

    edited(merged, change)
    capsys.readouterr()
    said = refused(capsys, 6, "export", merged, "-o", tmp_path / "out")
    assert "model.safetensors is not what `rankwise merge` wrote: run it again" in said
    assert not (tmp_path / "out").exists()
    data = ["--task", "conversations", "--data_path", str(place / "rows.jsonl"), "-o", str(tmp_path / "scores")]
    cli.main(["evaluate", str(merged), *data, "--max_new_tokens", "2"])
    found = capsys.readouterr()
    assert "warning" in found.out + found.err and "is not what `rankwise merge` wrote" in found.out + found.err
    assert "merge" in read_object(merged / "manifest.json")["stages"]


@pytest.mark.parametrize("row", [{"path": "model.safetensors"}, {"fingerprint": "0"}, "model.safetensors", None])
def test_an_output_that_a_manifest_does_not_describe_is_no_change(tmp_path: Path, row: object) -> None:
    outputs = {"model.safetensors": row} if row else None
    write_json(tmp_path / "manifest.json", {"format": "rankwise-manifest/1", "stages": {"merge": {"outputs": outputs}}})
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert altered(tmp_path, "merge") is None
