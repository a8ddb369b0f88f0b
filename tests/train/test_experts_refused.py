"""What PEFT cannot do with parameters of experts is refused by name before a row is read; what it can is said."""

from __future__ import annotations

from pathlib import Path

import experts
import pytest
import torch
from experts_trained import FAMILIES
from peft.tuners.lora import ParamWrapper

from rankwise import cli
from rankwise.files.plan import write_plan
from rankwise.models.adapt import adapt, lora_layers
from rankwise.models.load import load_model, meta_model
from rankwise.models.sites import fused_experts, model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: experts.saved(family, folder / family) for family in FAMILIES}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Rows that no reader takes: who reads them exits with 3."""
    file = tmp_path / "rows.csv"
    file.write_text("nothing\nhere\n")
    return file


def planned(base: Path, folder: Path, target: str) -> Path:
    plan = uniform_plan(choose_sites(model_sites(meta_model(str(base))), target), 2, None, False, str(base))
    return write_plan(folder / "plan.json", plan)


CONFLICTS = {
    "--lora_dropout 0.05": "there is no dropout on a parameter",
    "--use_dora": "a parameter is not decomposed",
    "--lora_bias all": "has no bias",
    "--init_lora_weights pissa": "start as default or gaussian",
    "--init_lora_weights olora": "start as default or gaussian",
    "--init_lora_weights eva": "start as default or gaussian",
    "--init_lora_weights orthogonal": "start as default or gaussian",
    "--allocator adalora": "AdaLoRA adapts linear layers alone",
}


@pytest.mark.parametrize("options", CONFLICTS)
@pytest.mark.parametrize("by", ["target", "default", "plan"])
def test_options_that_do_not_go_with_experts(
    bases: dict[str, Path],
    broken: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: str,
    by: str,
) -> None:
    base = bases["mixtral"]
    words = ["train", "--model_name", str(base), "--task", "e2e_nlg", "--data_path", str(broken), *options.split()]
    if by == "plan":
        if "adalora" in options:
            pytest.skip("--lora_config does not go with it in any model")
        words += ["--lora_config", str(planned(base, tmp_path, "experts"))]
    words += ["--target", "experts"] if by == "target" else []
    assert cli.main([*words, "-o", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert CONFLICTS[options] in said
    assert options.split()[0] in said
    assert not (tmp_path / "run").exists()


def test_a_partial_plan_without_experts_keeps_its_dropout(
    bases: dict[str, Path], broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are read then, and are no rows."""
    plan = planned(bases["mixtral"], tmp_path, "attention_only")
    words = ["train", "--lora_config", str(plan), "--task", "e2e_nlg", "--data_path", str(broken), "--lora_dropout"]
    assert cli.main([*words, "0.1", "-o", str(tmp_path / "run")]) == 3


# --- quantized bases ---------------------------------------------------------------------------------------------


def train(base: Path, tmp_path: Path, rows: Path, *more: str) -> int:
    words = ["train", "--model_name", str(base), "--task", "e2e_nlg", "--data_path", str(rows), *more]
    return cli.main([*words, "-o", str(tmp_path / "run")])


def test_a_base_that_is_mostly_experts_is_not_quantized_unless_told(
    bases: dict[str, Path], broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = meta_model(str(bases["mixtral"]))
    held = sum(model.get_parameter(name).numel() for name in fused_experts(model))
    share = held / sum(parameter.numel() for parameter in model.parameters())
    more = ("--load_in_4bit", "--target", "experts")
    assert share > 0.4
    big = experts.saved("mixtral", tmp_path / "big", inner=160)
    assert train(big, tmp_path, broken, *more) == 2
    said = capsys.readouterr().err
    assert "its fused experts, stay in float32" in said
    assert "--yes" in said
    assert train(big, tmp_path, broken, *more, "--yes") == 3, "then the rows are read"
    assert "note: a base in 4bit" in capsys.readouterr().out


def test_linear_layers_by_parameter_cannot_be_quantized(
    bases: dict[str, Path], broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSeek's dense first layer and shared experts."""
    assert train(bases["deepseek_v3"], tmp_path, broken, "--load_in_4bit", "--target", "mlp_only") == 2
    assert "adapts it by its parameter, which holds packed bits" in capsys.readouterr().err


def test_the_least_memory_of_a_known_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen3-30B-A3B in 4 bit: about 61 GB a process, 95 % of it experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from rankwise.errors import UsageError
    from rankwise.options.commands import TrainConfig
    from rankwise.train.experts import report_unquantized

    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_hidden_layers": 48}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes, **heads))
    config = TrainConfig(lora=LoraSection(load_in_4bit=True))
    with pytest.raises(UsageError, match=r"95 % of the base's 30.5B parameters.* at least (60\.9|61) GB"):
        report_unquantized(config, model, torch.bfloat16)


def test_experts_of_a_quantized_base_keep_their_precision_and_their_pairs_are_float32(
    bases: dict[str, Path],
) -> None:
    model = load_model(str(bases["mixtral"]), torch.bfloat16, quantization="4bit")
    plan = uniform_plan(choose_sites(model_sites(model), "experts"), 2, None, False, "x")
    adapted = adapt(model, plan, LoraSection())
    layers = lora_layers(adapted)
    assert layers
    for layer in layers.values():
        assert isinstance(layer, ParamWrapper)
        assert layer.get_param().dtype == torch.bfloat16
        assert layer.lora_A["default"].weight.dtype == torch.float32
    norms = [value for name, value in adapted.named_parameters() if "norm" in name]
    assert norms
    assert all(value.dtype == torch.float32 for value in norms)
    ids = torch.arange(4, 44).reshape(2, 20)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(float(layer.lora_B["default"].weight.grad.norm()) > 0 for layer in layers.values())
