"""The networks that predict factors: what rank means, what their documented sizes are, what a file of one must hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankwise import scripts
from rankwise.errors import DataError, UsageError
from rankwise.features.approximation import best_errors, normalised, singular_values
from rankwise.features.measures import relative_error
from rankwise.features.nets import ARCHITECTURES, build
from rankwise.features.nets.base import Factorizer, FactorizerSettings
from rankwise.features.nets.row_column import (
    AdaptiveLowRankProjAdaLoRA,
    LowRankProjMLP,
    LowRankProjSymmetric,
    SVDLinear,
)
from rankwise.features.trained import load_factorizer, save_factorizer
from rankwise.options.features import canonical

TOKENS, CHANNELS, RANK = 12, 20, 4
DOCUMENTED = ("ResMLP", "MLP", "AdaLoRA")


def settings_of(arch: str, **changes: object) -> FactorizerSettings:
    return FactorizerSettings(**{"arch": arch, "tokens": TOKENS, "channels": CHANNELS, "rank": RANK, **changes})


def made(arch: str, **changes: object) -> Factorizer:
    torch.manual_seed(0)
    return build(settings_of(arch, **changes)).eval()


def planted(count: int = 40, seed: int = 0) -> Tensor:
    """Normalised matrices of rank 3 in directions that all share, a common mean, and noise."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(99)
    mean, basis = torch.randn(TOKENS, CHANNELS, generator=shared), torch.randn(3, CHANNELS, generator=shared)
    tokens = torch.randn(count, TOKENS, 3, generator=generator)
    noise = torch.randn(count, TOKENS, CHANNELS, generator=generator)
    return normalised(mean + tokens @ basis + 0.3 * noise)


def train(net: Factorizer, features: Tensor, steps: int, lr: float) -> Factorizer:
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    for _ in range(steps):
        loss = (net(features).factors.product() - features).square().mean() + 1e-3 * net.orthogonality()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def trained() -> dict[str, Factorizer]:
    """Each network after 120 steps on 40 matrices; tests must not change them."""
    return {arch: train(made(arch), planted(), 120, 3e-3) for arch in ARCHITECTURES}


@torch.no_grad()
def errors(net: Factorizer, features: Tensor) -> Tensor:
    return relative_error(features, net(features).factors.product())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("refine", [False, True])
def test_shapes(arch: str, refine: bool) -> None:
    found = made(arch, refine=refine)(planted(3))
    assert found.factors.left.shape == (3, TOKENS, RANK)
    assert found.factors.right.shape == (3, RANK, CHANNELS)
    assert found.activation.shape == (3, TOKENS, RANK)
    assert (found.refined is not None) == refine
    if found.refined is not None:
        assert found.refined.shape == (3, TOKENS, CHANNELS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_product_has_the_rank_and_never_beats_the_svd(arch: str, trained: dict[str, Factorizer]) -> None:
    features = planted(10, seed=5)
    best = best_errors(singular_values(features))[:, RANK - 1]
    for net in (made(arch, refine=True), trained[arch]):
        with torch.no_grad():
            product = net(features).factors.product()
        assert int(torch.linalg.matrix_rank(product, rtol=1e-4).max()) <= RANK
        assert bool((errors(net, features) >= best - 1e-5).all())


@pytest.mark.parametrize("arch", DOCUMENTED)
def test_training_explains_much_more_of_matrices_never_seen(arch: str, trained: dict[str, Factorizer]) -> None:
    unseen = planted(20, seed=7)
    before, after = (1 - errors(net, unseen).square().mean() for net in (made(arch), trained[arch]))
    assert before < 0.3
    assert after > 0.6


@pytest.mark.parametrize("arch", DOCUMENTED)
def test_the_start_is_small_beside_the_features(arch: str) -> None:
    net = build(FactorizerSettings(arch, 64, 256, 32)).eval()
    features = normalised(torch.randn(4, 64, 256))
    with torch.no_grad():
        found = net(features)
    assert 0.5 < float(found.activation.square().mean()) < 2
    assert 0.01 < float(found.factors.product().square().mean()) < 0.3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_factors_have_both_signs(arch: str) -> None:
    factors = made(arch)(planted(4)).factors
    for side in (factors.left, factors.right):
        assert 0.2 < float((side < 0).float().mean()) < 0.8


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_parameter_gets_a_gradient(arch: str) -> None:
    net = made(arch, refine=True).train()
    features = planted(4)
    found = net(features)
    assert found.refined is not None
    loss = (found.factors.product() - features).square().mean() + (found.refined - features).square().mean()
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_refining_changes_neither_the_product_nor_its_gradients(arch: str) -> None:
    plain, refining = made(arch), made(arch, refine=True)
    refining.load_state_dict(plain.state_dict(), strict=False)
    features = planted(4)
    found = refining(features)
    assert torch.equal(found.factors.product(), plain(features).factors.product())
    found.refined.square().sum().backward()
    assert all(
        (parameter.grad is not None) == name.startswith("refinement.")
        for name, parameter in refining.named_parameters()
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(2, 13, 20), (2, 12, 21), (12, 20)])
def test_other_shapes_are_refused_by_name(arch: str, shape: tuple[int, ...]) -> None:
    found = " × ".join(map(str, shape[1:] if len(shape) == 3 else shape))
    with pytest.raises(DataError, match=f"{arch} network takes matrices of 12 tokens × 20 channels.*are {found}:"):
        made(arch)(torch.zeros(shape))


# ---- documented sizes -------------------------------------------------------------------------------------------


def linears(net: nn.Module) -> list[tuple[int, int]]:
    found = []
    for module in net.modules():
        if isinstance(module, nn.Linear):
            found.append((module.in_features, module.out_features))
        elif isinstance(module, SVDLinear):
            found.append((module.lora_A.shape[1], module.lora_B.shape[0]))
    return found


FULL = {"tokens": 256, "channels": 2048, "rank": 128}
RESIDUAL = [(2048, 1024), (1024, 1024), (1024, 128)], [(256, 1024), (1024, 1024), (1024, 128)]
SIZES = {
    "ResMLP": (*RESIDUAL, 6_070_528, 7.58),
    "MLP": ([(2048, 1024), (1024, 256), (256, 128)], [(256, 512), (512, 256), (256, 128)], 4_032_768, 2.43),
    "AdaLoRA": (*RESIDUAL, 3_810_944, 4.84),
}


@pytest.mark.parametrize("arch", DOCUMENTED)
def test_documented_widths_parameters_and_flops(arch: str) -> None:
    rows, columns, parameters, flops = SIZES[arch]
    with torch.device("meta"):
        net = build(settings_of(arch, **FULL)).eval()
        features = torch.empty(1, 256, 2048)
    assert linears(net.row_net) == rows
    assert linears(net.col_net) == columns
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(features)
    assert counter.get_total_flops() / 1e9 == pytest.approx(flops, abs=0.01)


def test_small_inputs_get_layers_of_at_most_four_times_their_size() -> None:
    for arch in DOCUMENTED:
        net = made(arch)
        assert max(size for _, size in linears(net.row_net)) == 4 * CHANNELS
        assert max(size for _, size in linears(net.col_net)) == 4 * TOKENS


# ---- names and settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "network"),
    [
        ("ResMLP", LowRankProjSymmetric),
        ("resmlp", LowRankProjSymmetric),
        ("LowRankProjSymmetric", LowRankProjSymmetric),
        ("mlp", LowRankProjMLP),
        ("AdaLoRA", AdaptiveLowRankProjAdaLoRA),
        ("adaptive_adalora", AdaptiveLowRankProjAdaLoRA),
        ("Adaptive", AdaptiveLowRankProjAdaLoRA),
    ],
)
def test_names(given: str, network: type[Factorizer]) -> None:
    net = made(given)
    assert type(net) is network
    assert net.settings.arch == canonical(given) == network.name


def test_an_unknown_name_gets_near_ones_and_all_there_are() -> None:
    with pytest.raises(UsageError, match=r"'resmlpp'; did you mean resmlp.*\? There are ResMLP, MLP, AdaLoRA"):
        canonical("ResMLPP")
    with pytest.raises(UsageError, match=r"unknown network 'xyz'\. There are"):
        canonical("xyz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 13}, r"--rank 13.*12 tokens × 20 channels.*1 to 12"),
        ({"rank": 0}, "--rank 0"),
        ({"dropout": 1.0}, "--dropout"),
        ({"tokens": 0}, "channels are empty"),
    ],
)
def test_settings_out_of_bounds(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_of("MLP", **changes)


def test_the_scripts_names() -> None:
    net = scripts.build_model("adaptive", tokens=TOKENS, channels=CHANNELS, rank=3, dropout=0.0)
    assert type(net) is scripts.AdaptiveLowRankProjAdaLoRA
    assert net(planted(2)).factors.rank == 3
    assert (net.settings.rank, net.settings.dropout) == (3, 0.0)
    with torch.device("meta"):
        whole = scripts.build_model()
    assert type(whole) is scripts.LowRankProjSymmetric
    assert whole.settings == FactorizerSettings("ResMLP", 256, 2048, 128)
    assert (scripts.LowRankProjMLP, scripts.SVDLinear) == (LowRankProjMLP, SVDLinear)


# ---- SVDLinear and masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "outputs", "rank", "expected"), [(5, 7, 3, 3), (5, 7, 64, 5), (9, 4, 4, 4)])
def test_svd_linear_is_its_dense_weight(inputs: int, outputs: int, rank: int, expected: int) -> None:
    torch.manual_seed(0)
    layer = SVDLinear(inputs, outputs, rank)
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.lora_E)
    x = torch.randn(6, inputs)
    p, q = layer.lora_B.detach(), layer.lora_A.detach()
    dense = p @ torch.diag(layer.lora_E.detach()[:, 0]) @ q
    assert layer.rank == expected
    assert torch.allclose(layer.weight(), dense, atol=1e-6)
    assert torch.allclose(layer(x), x @ dense.T + layer.bias, atol=1e-5)


def test_svd_linear_keeps_the_size_of_what_passes() -> None:
    torch.manual_seed(0)
    for inputs, outputs in ((64, 256), (256, 64)):
        out = SVDLinear(inputs, outputs, 32, gain=0.5)(torch.randn(4000, inputs))
        assert float(out.detach().std()) == pytest.approx(0.5, rel=0.05)


def test_the_orthogonality_penalty_is_zero_for_orthonormal_sides_only() -> None:
    torch.manual_seed(0)
    layer = SVDLinear(8, 6, 4)
    assert float(layer.orthogonality().detach()) == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        layer.lora_E.mul_(17)
    assert float(layer.orthogonality().detach()) == pytest.approx(0, abs=1e-9), "Λ is free"
    for side in ("lora_A", "lora_B"):
        bent = SVDLinear(8, 6, 4)
        with torch.no_grad():
            getattr(bent, side).mul_(2)  # the Gram matrix is 4·I, so ‖4I − I‖² = 9·k, over 2k²
        assert float(bent.orthogonality().detach()) == pytest.approx(9 * 4 / (2 * 4**2), rel=1e-5)


def test_only_the_adaptive_network_has_orthonormal_parameters() -> None:
    for arch in ARCHITECTURES:
        net = made(arch)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.5)
        assert (float(net.orthogonality().detach()) > 0.01) == (arch == "AdaLoRA")


def test_lora_e_scales_the_channels_of_a_and_the_activation_comes_before_it() -> None:
    net = made("AdaLoRA")
    assert isinstance(net, AdaptiveLowRankProjAdaLoRA)
    features = planted(3)
    before = net(features)
    with torch.no_grad():
        net.lora_E.copy_(torch.tensor([[2.0], [-1.0], [0.5], [3.0]]))
    after = net(features)
    assert torch.equal(after.activation, before.activation)
    assert torch.allclose(after.factors.left, before.activation * torch.tensor([2.0, -1.0, 0.5, 3.0]))
    assert torch.equal(after.factors.right, before.factors.right)


def test_masked_channels_are_out_of_the_product_for_good() -> None:
    net = made("AdaLoRA")
    assert isinstance(net, AdaptiveLowRankProjAdaLoRA)
    assert net.current_effective_rank() == RANK
    features = planted(3)
    whole = net(features)
    keep = torch.tensor([True, False, True, False])
    net.mask_ranks(keep)
    assert net.effective_rank_mask().tolist() == keep.tolist()
    assert net.current_effective_rank() == 2
    with torch.no_grad():
        net.lora_E[1] = 5.0  # as an optimizer with momentum might
    found = net(features)
    assert torch.equal(found.factors.left[..., ~keep], torch.zeros(3, TOKENS, 2))
    assert torch.allclose(found.factors.product(), whole.factors.left[..., keep] @ whole.factors.right[:, keep])
    assert int(torch.linalg.matrix_rank(found.factors.product(), rtol=1e-4).max()) <= 2
    found.factors.product().square().sum().backward()
    assert net.lora_E.grad is not None
    assert torch.equal(net.lora_E.grad[~keep], torch.zeros(2, 1))
    net.mask_ranks(torch.ones(RANK, dtype=torch.bool))
    assert net.current_effective_rank() == 2, "what is out stays out"
    net.effective_rank_mask().fill_(True)
    assert net.current_effective_rank() == 2, "a copy"


def test_the_allocator_scores_what_makes_a_channel() -> None:
    net = made("AdaLoRA")
    assert isinstance(net, AdaptiveLowRankProjAdaLoRA)
    parts = net.rank_parameters()
    assert list(parts) == ["scale", "left", "right"]
    assert all(part.shape[0] == RANK for part in parts.values())
    net(planted(2)).factors.product()[..., 0].sum().backward()
    assert all(part.grad is not None for part in parts.values())
    features = planted(2)
    before = net(features).factors
    with torch.no_grad():
        parts["left"][1] += 1
        parts["right"][2] += 1
    after = net(features).factors
    assert [bool((before.left[..., k] != after.left[..., k]).any()) for k in range(RANK)] == [False, True, False, False]
    assert [bool((before.right[:, k] != after.right[:, k]).any()) for k in range(RANK)] == [False, False, True, False]


def test_without_masks_there_is_none() -> None:
    assert made("ResMLP").rank_mask is None
    assert "rank_mask" not in made("ResMLP").state_dict()
    assert "rank_mask" in made("AdaLoRA").state_dict()


# ---- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("refine", [False, True])
def test_saving_and_loading_is_exact(arch: str, refine: bool, tmp_path: Path) -> None:
    net = made(arch, refine=refine, dropout=0.3)
    if isinstance(net, AdaptiveLowRankProjAdaLoRA):
        net.mask_ranks(torch.tensor([True, True, False, True]))
    assert save_factorizer(net, tmp_path / "run") == tmp_path / "run" / "best_model.safetensors"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["best_model.json", "best_model.safetensors"]
    state = torch.get_rng_state()
    loaded = load_factorizer(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state), "loading draws nothing"
    assert type(loaded) is type(net)
    assert loaded.settings == net.settings
    assert not loaded.training
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(planted(2)).factors.product(), net(planted(2)).factors.product())
    if isinstance(loaded, AdaptiveLowRankProjAdaLoRA):
        assert loaded.current_effective_rank() == 3


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_factorizer(made("MLP"), tmp_path)
    return tmp_path


def test_a_missing_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"best_model\.json: no such file; `rankwise features train` makes it"):
        load_factorizer(tmp_path)


def test_missing_weights_are_named(run: Path) -> None:
    (run / "best_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"best_model\.safetensors: cannot be read"):
        load_factorizer(run)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_cut_weights_are_refused(run: Path, kept: int) -> None:
    file = run / "best_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"best_model\.safetensors: "):
        load_factorizer(run)


def test_one_altered_byte_is_found(run: Path) -> None:
    file = run / "best_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"best_model\.safetensors: not the weights that best_model\.json"):
        load_factorizer(run)


def test_weights_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_factorizer(build(settings_of("MLP")), tmp_path / "other")
    (tmp_path / "other" / "best_model.safetensors").replace(run / "best_model.safetensors")
    with pytest.raises(DataError, match="from two runs"):
        load_factorizer(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1"),
        ("[]", "expected an object"),
        ("{}", "format None"),
        ('{"format": "rankwise-factorizer/1"}', "settings: missing"),
    ],
)
def test_broken_settings_are_named(run: Path, text: str, message: str) -> None:
    (run / "best_model.json").write_text(text)
    with pytest.raises(DataError, match=rf"best_model\.json.*{message}"):
        load_factorizer(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": True}, r"best_model\.json: .*settings: rank: True is not int"),
        ({"tokens": "12"}, r"best_model\.json: .*settings: tokens: '12' is not int"),
        ({"wide": 1}, r"best_model\.json: .*settings: wide: unknown"),
        ({"rank": 99}, r"best_model\.json: --rank 99"),
        ({"arch": "CNN"}, r"best_model\.json: --arch: unknown network"),
        ({"rank": 3}, r"best_model\.safetensors: .* where the network in best_model\.json has"),
        ({"arch": "ResMLP"}, r"best_model\.safetensors: .* is missing: not the weights"),
        ({"refine": True}, r"best_model\.safetensors: refinement.* is missing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(run: Path, changes: dict[str, object], message: str) -> None:
    file = run / "best_model.json"
    content = json.loads(file.read_text())
    content["settings"] |= changes
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_factorizer(run)


def test_weights_of_another_type_are_refused(run: Path) -> None:
    file = run / "best_model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file)
    content = json.loads((run / "best_model.json").read_text())
    content["weights_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (run / "best_model.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"float16 where the network in best_model\.json has .* torch\.float32"):
        load_factorizer(run)


def test_older_weights_are_read_as_tensors_only(run: Path) -> None:
    (run / "best_model.safetensors").unlink()
    torch.save(made("MLP").state_dict(), run / "best_model.pt")
    assert torch.equal(load_factorizer(run)(planted(2)).factors.left, made("MLP")(planted(2)).factors.left)
    torch.save(made("MLP"), run / "best_model.pt")
    with pytest.raises(DataError, match=r"best_model\.pt: loading it would run code"):
        load_factorizer(run)
