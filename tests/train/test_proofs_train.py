"""What `train` proves of itself: PEFT, a model or our own code goes wrong on the command's path, and it says so."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_finetune import restaurants
from tiny import tiny_llama
from transformers import LlamaForCausalLM

from rankwise.cli import main
from rankwise.files.adapter import LoraPair
from rankwise.models import adapt, adapters
from rankwise.models.adapt import ADAPTER
from rankwise.train import adalora as allocating
from rankwise.train import results as saving

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ADALORA = "--allocator adalora --lora_r 3 --max_steps 4 --allocator_init_warmup 1 --allocator_final_warmup 1".split()
Train = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return restaurants(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """Run the command; its exit code and what it says went wrong."""

    def run(*more: str) -> tuple[int, str]:
        own = f"train --model_name {base} --task e2e_nlg --data_path {data} -o {tmp_path / 'run'} --lr 1e-2 --use_cpu"
        steps = [] if "--max_steps" in more else ["--max_steps", "2"]
        code = main([*own.split(), "--batch_size", "4", "--save_strategy", "no", "--no_plots", *steps, *more])
        return code, capsys.readouterr().err

    return run


# --- what PEFT builds ------------------------------------------------------------------------------------------------


def test_peft_builds_another_rank_than_planned(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern that matches no site: its rank silently becomes the general one."""
    config = adapt.lora_config

    def lost(*given: Any) -> LoraConfig:
        found = config(*given)
        found.r += 1
        return found

    monkeypatch.setattr(adapt, "lora_config", lost)
    code, said = train("--lora_r", "4")
    assert code == 6 and "PEFT built 14 sites otherwise than planned" in said


def test_peft_adapts_other_modules_than_planned(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of names in place of anchored paths also matches what ends alike."""
    config = adapt.lora_config

    def loose(*given: Any) -> LoraConfig:
        found = config(*given)
        found.target_modules = {"q_proj", "k_proj"}
        return found

    monkeypatch.setattr(adapt, "lora_config", loose)
    code, said = train("--target_modules", "q_proj")
    assert code == 6 and "k_proj: planned None, built" in said


def test_peft_copies_other_modules_than_asked_for(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    config = adapt.lora_config

    def more(*given: Any) -> LoraConfig:
        found = config(*given)
        found.modules_to_save = ["lm_head"]
        return found

    monkeypatch.setattr(adapt, "lora_config", more)
    code, said = train()
    assert code == 6 and "modules to train in full: nothing; PEFT copied lm_head" in said


def test_the_allocator_starts_at_another_rank(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    config = adapt.adalora_config

    def wider(*given: Any) -> Any:
        found = config(*given)
        found.init_r += 1
        return found

    monkeypatch.setattr(adapt, "adalora_config", wider)
    code, said = train(*ADALORA)
    assert code == 6 and "PEFT built 14 sites otherwise than planned" in said


# --- what the allocator leaves ---------------------------------------------------------------------------------------


def test_a_masked_channel_that_still_acts(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out of the plain adapter, it would be lost."""
    pairs = saving.plain_pairs

    def unmasked(model: Any, kept: Any, scale: float) -> dict[str, LoraPair]:
        for layer in adapt.adalora_layers(model).values():
            layer.lora_E[ADAPTER].data.fill_(1.0)
        return pairs(model, kept, scale)

    monkeypatch.setattr(saving, "plain_pairs", unmasked)
    code, said = train(*ADALORA)
    assert code == 6 and "a masked rank channel is not zero" in said


def test_a_schedule_of_ranks_for_another_number_of_steps(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    length = allocating.run_length

    def doubled(*given: Any) -> Any:
        found = length(*given)
        return type("Length", (), {"updates": 2 * found.updates})()

    monkeypatch.setattr(allocating, "run_length", doubled)
    code, said = train(*ADALORA)
    assert code == 6 and "4 optimizer steps and the rank allocator planned for 8" in said


# --- what rows and models do -----------------------------------------------------------------------------------------


def test_a_model_that_lets_packed_samples_see_each_other(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    own = LlamaForCausalLM.forward

    @functools.wraps(own)
    def blind(self: Any, *args: Any, position_ids: Any = None, **rest: Any) -> Any:
        return own(self, *args, **rest)

    monkeypatch.setattr(LlamaForCausalLM, "forward", blind)
    code, said = train("--packing")
    assert code == 6 and "does not keep samples of one row apart" in said


# --- what is saved ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_is_converted_the_wrong_way_round(
    init: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """base + adapter would not be what was trained: what the start took from the base is given to it a second time."""
    assert train("--init_lora_weights", init, "--lora_r", "4") == (0, "")
    shutil.rmtree(tmp_path / "run")
    convert = adapters.subtract_pairs

    def added(now: Any, before: Any) -> dict[str, LoraPair]:
        back = {
            path: LoraPair(pair.lora_A, -pair.lora_B, pair.scale, pair.fan_in_fan_out) for path, pair in before.items()
        }
        return convert(now, back)

    monkeypatch.setattr(adapters, "subtract_pairs", added)
    code, said = train("--init_lora_weights", init, "--lora_r", "4")
    assert code == 6 and "is not what was trained: on the unmodified base 14 sites" in said


def test_a_start_that_is_not_converted_at_all(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth of what was there at the start stays in the adapter: far less than the weights, and not nothing."""
    convert = adapters.subtract_pairs

    def a_little(now: Any, before: Any) -> dict[str, LoraPair]:
        part = {path: LoraPair(p.lora_A, 0.999 * p.lora_B, p.scale, p.fan_in_fan_out) for path, p in before.items()}
        return convert(now, part)

    monkeypatch.setattr(adapters, "subtract_pairs", a_little)
    code, said = train("--init_lora_weights", "pissa", "--lora_r", "4")
    assert code == 6 and "is not what was trained" in said


# --- what is loaded --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    own = f"train --model_name {base} --task e2e_nlg --data_path {data} -o {out} --lr 1e-2 --use_cpu --max_steps 2"
    assert main([*own.split(), "--batch_size", "4", "--save_strategy", "no", "--no_plots", "--lora_r", "4"]) == 0
    return out


def fewer_sites(folder: Path) -> None:
    file = folder / "sites.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"sites": record["sites"][1:]}))


def other_targets(folder: Path) -> None:
    """One site less in config and weights, as another tool may leave it."""
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = json.loads(file.read_text())
    config["target_modules"] = config["target_modules"].replace(r"model\.layers\.0\.self_attn\.q_proj|", "")
    file.write_text(json.dumps(config))
    kept = {k: t for k, t in load_file(weights).items() if "layers.0.self_attn.q_proj" not in k}
    save_file(kept, weights, metadata={"format": "pt"})


def no_effect(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = {key: torch.zeros_like(one) if "lora_B" in key else one for key, one in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a site that nobody recorded": (fewer_sites, "1 sites differ from sites.json"),
    "a recorded site that is gone": (other_targets, "1 sites differ from sites.json"),
    "no effect": (no_effect, "every B·A is zero"),
}


@pytest.mark.parametrize("command", ["evaluate", "merge"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_not_the_one_recorded(
    name: str, command: str, trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = ADAPTERS[name]
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    change(copy)
    words = {
        "evaluate": ["--task", "e2e_nlg", "--data_path", str(data), "--num_samples", "1", "-o", str(tmp_path / "out")],
        "merge": ["-o", str(tmp_path / "out")],
    }
    code = main([command, str(copy), *words[command]])
    assert code == (6 if name == "no effect" and command == "merge" else 3)
    assert said in capsys.readouterr().err
