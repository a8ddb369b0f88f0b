"""Laws of where files hold experts: each one read alone is what transformers loads, and written back what it saves."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import experts
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

from rankwise.errors import DataError
from rankwise.files.checkpoint import Checkpoint, open_checkpoint
from rankwise.files.expert_weight import ExpertWeight
from rankwise.models.expert_weights import expert_weights, is_stacked, piece_of, target_names, unknown_operation
from rankwise.models.load import load_model, meta_model

E, ROWS, COLUMNS = 4, 12, 10


@pytest.fixture(scope="module", params=experts.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts.saved(request.param, tmp_path_factory.mktemp(request.param), inner=32)


def test_one_expert_and_all_are_what_transformers_loads(folder: Path) -> None:
    checkpoint, model = open_checkpoint(folder), load_model(str(folder), torch.float32)
    found = expert_weights(meta_model(str(folder)), checkpoint.keys())
    parameters = {name: value for name, value in model.named_parameters() if value.dim() == 3}
    assert found.weights.keys() == parameters.keys()
    assert not found.unknown
    for name, weight in found.weights.items():
        weight.check(checkpoint)
        assert torch.equal(weight.read(checkpoint), parameters[name])
        for expert in range(weight.shape[0]):
            assert torch.equal(weight.expert(checkpoint, expert), parameters[name][expert])


def test_each_file_is_its_block_of_its_expert(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for weight in expert_weights(meta_model(str(folder)), checkpoint.keys()).weights.values():
        for piece in weight.pieces:
            for expert in piece.experts(weight.shape[0]):
                stored = piece.stored(checkpoint, expert)
                block = piece.block(weight.expert(checkpoint, expert), stored.shape)
                assert torch.equal(block.reshape(stored.shape), stored)


def converters() -> dict[str, WeightConverter]:
    """Every converter of transformers' map that makes a parameter of experts, by what it says."""
    found = {}
    for rules in conversion_mapping._build_checkpoint_conversion_mapping().values():
        for rule in rules:
            if isinstance(rule, WeightConverter) and "experts" in rule.target_patterns[0]:
                text = f"{rule.source_patterns} {rule.operations} {rule.target_patterns}"
                found.setdefault(text, rule)
    return found


@pytest.mark.parametrize("converter", converters().values(), ids=list(converters()))
def test_every_converter_of_transformers_is_read_backwards_or_refused_by_name(converter: WeightConverter) -> None:
    operation = unknown_operation(converter)
    if operation:
        assert any(type(one).__name__ in operation for one in converter.operations)
        return
    first = "model.layers.0." + plain(converter.target_patterns[0])
    targets = target_names(converter, first)
    files = made_files(converter, len(targets))
    expected = loaded(converter, files, first)
    state = {name: expected[name] for name in targets}
    pieces: dict[str, list[Any]] = {name: [] for name in targets}
    for source, tensors in files.items():
        for number, key in enumerate(tensors):
            name, piece = piece_of(converter, source, key, number if is_stacked(converter) else None, targets, state)
            pieces[name].append(piece)
    checkpoint = Checkpoint(Path(), (), loaded={key: value for held in files.values() for key, value in held.items()})
    for name in targets:
        shape = tuple(state[name].shape)
        weight = ExpertWeight(name, shape, tuple(pieces[name]))  # type: ignore[arg-type]
        weight.check(checkpoint)
        assert torch.equal(weight.read(checkpoint), state[name])


def plain(pattern: str) -> str:
    return re.sub(r"\\(.)", r"\1", pattern).lstrip(".^").rstrip("$")


def made_files(converter: WeightConverter, targets: int) -> dict[str, dict[str, Tensor]]:
    """Source pattern → key → a random tensor: of single experts, or of all."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, Tensor]] = {}
    for source in converter.source_patterns:
        name = "model.layers.0." + plain(source)
        if is_stacked(converter):
            keys = {name.replace("*", str(number)): (ROWS, COLUMNS) for number in range(E * targets)}
        else:
            keys = {name: (E, ROWS, COLUMNS)}
        found[source] = {key: torch.randn(shape, generator=generator) for key, shape in keys.items()}
    return found


def loaded(converter: WeightConverter, files: dict[str, dict[str, Tensor]], first: str) -> dict[str, Tensor]:
    """What transformers makes of them."""
    tensors: Any = {source: list(held.values()) for source, held in files.items()}
    turned = SimpleNamespace(get_parameter=lambda name: torch.empty(E, COLUMNS, ROWS, device="meta"))
    for operation in converter.operations:
        tensors = operation.convert(
            tensors,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=first,
            model=turned,
            config=None,
        )
    names = dict(zip(converter.target_patterns, target_names(converter, first), strict=True))
    return {names[pattern]: one[0] if isinstance(one, list) else one for pattern, one in tensors.items()}


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    base = experts.saved("qwen3_moe", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(base)
    weights = expert_weights(meta_model(str(base)), checkpoint.keys()).weights
    weights["model.layers.0.mlp.experts.gate_up_proj"].check(checkpoint)
    with pytest.raises(DataError, match=r"expert 5 of model\.layers\.1\.mlp\.experts\.gate_up_proj is missing"):
        weights["model.layers.1.mlp.experts.gate_up_proj"].check(checkpoint)


def test_another_number_of_experts_and_another_shape_are_named(tmp_path: Path) -> None:
    base = experts.saved("llama4_text", tmp_path / "base")
    name = "model.layers.1.feed_forward.experts.down_proj"
    tensors = load_file(base / "model.safetensors")
    weight = expert_weights(meta_model(str(base)), list(tensors)).weights[name]
    for changed, said in ((tensors[name][:3], "holds 3 experts"), (tensors[name][:, 1:], "no part of expert 0")):
        checkpoint = Checkpoint(base, (), loaded={**tensors, name: changed})
        with pytest.raises(DataError, match=said):
            weight.check(checkpoint)


def test_an_operation_that_is_not_known_is_told_by_name() -> None:
    odd = WeightConverter("experts.*.w.weight", "experts.up_proj", operations=[MergeModulelist(dim=1)])
    assert "MergeModulelist(dim=1)" in str(unknown_operation(odd))
