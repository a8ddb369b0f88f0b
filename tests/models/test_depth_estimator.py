"""The depth estimator: the original's files mean the same as transformers', and an image is seen as the original sees
it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_depth import as_original, original_layout, tiny_depth_config, tiny_depth_model, tiny_estimator
from tiny_vision import drawn_image
from transformers import DepthAnythingForDepthEstimation

from rankwise.core.geometry import estimator_size
from rankwise.errors import DataError
from rankwise.models.depth.estimator import (
    SIZES,
    DepthEstimator,
    config_of,
    fill_model,
    from_original,
    load_estimator,
    prepare_pixels,
    rename_tensors,
    size_of,
)

LARGE = (24, 1024, (256, 512, 1024, 1024), 256)
LAYOUTS = {
    "Small": (12, 384, (48, 96, 192, 384), 64),
    "Base": (12, 768, (96, 192, 384, 768), 128),
    "Large": LARGE,
}


def meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_of_the_real_layouts_has_its_place(name: str) -> None:
    weights = meta(original_layout(*LAYOUTS[name]))
    size = size_of(weights, Path("x.pth"))
    assert size.name == name
    with torch.device("meta"):
        wanted = DepthAnythingForDepthEstimation(config_of(size)).state_dict()
    found = rename_tensors(weights)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in wanted.items()}


def test_sizes_differ_in_what_the_head_reads() -> None:
    taps = {size.name: size.taps for size in SIZES}
    assert taps == {"Small": (3, 6, 9, 12), "Base": (3, 6, 9, 12), "Large": (5, 12, 18, 24)}


def test_original_names_give_bit_equal_depth() -> None:
    model = tiny_depth_model()
    again = fill_model(tiny_depth_config(), as_original(model), Path("x.pth")).eval()
    pixels = torch.randn(2, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(pixels).predicted_depth, again(pixels).predicted_depth
    assert torch.equal(expected, found)
    assert expected.std() > 1e-3


def test_query_key_and_value_are_not_mixed_up() -> None:
    weights = as_original(tiny_depth_model())
    joined = weights["pretrained.blocks.0.attn.qkv.weight"]
    found = rename_tensors(weights)
    for index, name in enumerate("qkv"):
        part = joined[32 * index : 32 * (index + 1)]
        assert torch.equal(found[f"backbone.encoder.layer.0.attention.{name}_proj.weight"], part)


def test_fingerprint_is_of_the_weights_not_of_the_format(tmp_path: Path) -> None:
    model = tiny_depth_model()
    folder = load_estimator(str(tiny_estimator(tmp_path / "hf")))
    original = DepthEstimator("x", fill_model(tiny_depth_config(), as_original(model), Path("x.pth")))
    assert folder.fingerprint == original.fingerprint
    assert folder.fingerprint != load_estimator(str(tiny_estimator(tmp_path / "other", seed=1))).fingerprint


def test_loaded_estimator_is_frozen_and_repeats_itself(tmp_path: Path) -> None:
    estimator = load_estimator(str(tiny_estimator(tmp_path)), input_size=56)
    assert not estimator.model.training
    assert not any(parameter.requires_grad for parameter in estimator.model.parameters())
    image = drawn_image(1, (90, 60))
    first, second = estimator.depth(image), estimator.depth(image)
    assert torch.equal(first, second)
    assert first.shape == (56, 84) and first.dtype == torch.float32 and not first.requires_grad


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    weights = {name: torch.zeros(shape) for name, shape in original_layout(12, 384, (48, 96, 192, 384), 64).items()}
    path = tmp_path / "depth_anything_v2_vits.pth"
    torch.save(weights, path)
    loaded = load_estimator(str(path), input_size=28)
    assert not loaded.model.training and loaded.model.config.backbone_config.hidden_size == 384
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.depth(drawn_image(0, (40, 30))).any(), "all weights are 0"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"depth_anything_v2_vits\.pth"):
        load_estimator(str(path))

    torch.save({"layer.weight": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="not the weights of Depth Anything"):
        load_estimator(str(path))

    lacking = {name: value for name, value in weights.items() if "refinenet3.out_conv" not in name}
    with pytest.raises(DataError, match=r"2 tensors .* are missing \(neck.fusion_stage.layers.1.projection"):
        from_original(lacking, path)
    with pytest.raises(DataError, match=r"are unexpected \(depth_head.readout"):
        from_original({**weights, "depth_head.readout.weight": torch.zeros(1)}, path)
    narrow = {**weights, "pretrained.norm.bias": torch.zeros(3)}
    with pytest.raises(DataError, match="different shapes"):
        from_original(narrow, path)
    short = {name: value for name, value in weights.items() if "blocks.11." not in name}
    with pytest.raises(DataError, match=r"384 × 11 layers"):
        from_original(short, path)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("boom",))

    torch.save({"pretrained.cls_token": Bomb()}, tmp_path / "x.pth")
    with pytest.raises(DataError, match="run code"):
        load_estimator(str(tmp_path / "x.pth"))


def test_other_models_and_metric_depth_are_refused(tmp_path: Path) -> None:
    config = tiny_depth_config()
    config.depth_estimation_type = "metric"
    DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path / "metric")
    with pytest.raises(DataError, match="metric depth"):
        load_estimator(str(tmp_path / "metric"))
    with pytest.raises(DataError, match="no such file"):
        load_estimator(str(tmp_path / "nothing.pth"))
    tiny_depth_config().backbone_config.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="dinov2 model, not Depth Anything"):
        load_estimator(str(tmp_path / "other"))


def test_size_follows_the_originals_lower_bound() -> None:
    # Worked by hand from the original's rule: scale by the larger of 518/h and 518/w, nearest multiple of 14, >= 518.
    assert estimator_size(480, 640, 518) == (518, 686)  # 690.67 / 14 = 49.3
    assert estimator_size(640, 480, 518) == (686, 518)
    assert estimator_size(1080, 1920, 518) == (518, 924)  # 920.9 / 14 = 65.8
    assert estimator_size(100, 100, 518) == (518, 518)
    assert estimator_size(300, 300, 20) == (28, 28)  # 20 lies nearer to 14, which is below it
    assert estimator_size(10, 5000, 518) == (518, 8 * 518)


def test_pixels_are_prepared_as_the_original_does() -> None:
    """Bicubic with a = −0.75, half-pixel centres, borders repeated and no antialiasing: OpenCV's INTER_CUBIC, worked
    out here point by point in float64."""
    image = drawn_image(3, (45, 30))
    found = prepare_pixels(image, 56)[0].double()
    assert found.shape == (3, 56, 84)
    source = np.asarray(image, dtype=np.float64) / 255

    def weights(at: float) -> tuple[list[int], list[float]]:
        base = int(np.floor(at))
        t, a = at - base, -0.75
        near = [(a + 2) * x**3 - (a + 3) * x**2 + 1 for x in (t, 1 - t)]
        far = [a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a for x in (1 + t, 2 - t)]
        return [base - 1, base, base + 1, base + 2], [far[0], near[0], near[1], far[1]]

    for row, column in ((0, 0), (17, 40), (55, 83), (30, 1)):
        ys, wy = weights((row + 0.5) * 30 / 56 - 0.5)
        xs, wx = weights((column + 0.5) * 45 / 84 - 0.5)
        value = sum(
            wy[i] * wx[j] * source[min(max(ys[i], 0), 29), min(max(xs[j], 0), 44)] for i in range(4) for j in range(4)
        )
        expected = (value - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        assert torch.allclose(found[:, row, column], torch.from_numpy(expected), atol=2e-5)


def test_the_mean_colour_becomes_zero() -> None:
    assert prepare_pixels(Image.new("RGB", (20, 20), (124, 116, 104)), 28).abs().max() < 0.02
