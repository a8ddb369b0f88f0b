"""What the language part gets of images: the same in all families, and replaceable in forward and in generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from tiny_isaac import tiny_isaac
from tiny_vision import FAMILIES, drawn_image
from torch import Tensor

from rankwise.data.vision_inputs import Sight
from rankwise.errors import UsageError
from rankwise.models.depth.encoder import DepthSettings, attach_depth
from rankwise.models.load import load_model, load_processor
from rankwise.models.vision_features import approximate_features, image_features, load_vision_side, seeing_part

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ALL: Mapping[str, Callable[[Path], Path]] = {**FAMILIES, "isaac": tiny_isaac}
TILED = ("smolvlm", "idefics3")
CPU = torch.device("cpu")


class Case:
    """A tiny model of a family, and a batch of two rows with a picture each, the second row padded on the left."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, ALL[name](folder)
        self.processor = load_processor(str(folder))
        self.processor.tokenizer.padding_side = "left"
        pictures: list[Any] = [drawn_image(0, (64, 48)), drawn_image(1, (64, 64))]
        token = self.processor.image_token
        self.batch: dict[str, Tensor] = dict(
            self.processor(
                text=[f"{token} What colour is it?", f"{token} It"],
                images=[[one] for one in pictures] if name in TILED else pictures,
                return_tensors="pt",
                padding=True,
            )
        )
        self.pictures = pictures

    def model(self) -> Any:
        return load_model(str(self.folder), torch.float32).eval()

    def generated(self, model: Any) -> Tensor:
        found: Tensor = model.generate(**self.batch, max_new_tokens=4, do_sample=False)
        return found


@pytest.fixture(scope="module", params=sorted(ALL))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def embedded(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """What stands at the image tokens before the first layer of the language part: (image tokens, D)."""
    (first,) = [
        module
        for name, module in model.named_modules()
        if name.endswith("layers.0") and "vision" not in name and "visual" not in name
    ]
    caught: list[Tensor] = []
    handle = first.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return caught[0][batch["input_ids"] == model.config.image_token_id]


def test_features_are_what_the_language_part_gets(case: Case) -> None:
    model = case.model()
    with torch.no_grad():
        features = image_features(model, case.batch)
    assert len({matrix.shape for matrix in features}) == 1
    assert torch.equal(torch.cat(features), embedded(model, case.batch))
    tiles = 5 if case.name in TILED else 1  # 2 × 2 tiles and the whole picture
    assert len(features) == 2 * tiles


def test_identity_changes_nothing_and_zero_does(case: Case) -> None:
    model = case.model()
    seen: list[torch.Size] = []

    def zero(features: Tensor) -> Tensor:
        seen.append(features.shape)
        return torch.zeros_like(features)

    with torch.no_grad():
        before = model(**case.batch).logits
        with approximate_features(model, lambda features: features.clone()):
            assert torch.equal(model(**case.batch).logits, before)
        with approximate_features(model, zero):
            assert not torch.allclose(model(**case.batch).logits, before, atol=1e-3)
            assert not embedded(model, case.batch).any()
        features = image_features(model, case.batch)
        assert torch.equal(model(**case.batch).logits, before), "the block has ended"
    assert seen == [(len(features), *features[0].shape)] * 2


def test_each_matrix_is_put_where_it_came_from(case: Case) -> None:
    model = case.model()
    with torch.no_grad():
        features = torch.stack(image_features(model, case.batch))
        factor = 1 + torch.arange(len(features))[:, None, None]
        with approximate_features(model, lambda given: given * factor):
            assert torch.equal(embedded(model, case.batch), (features * factor).flatten(0, 1))


def test_generate_sees_the_approximation(case: Case) -> None:
    model = case.model()
    calls: list[int] = []

    def zero(features: Tensor) -> Tensor:
        calls.append(len(features))
        return torch.zeros_like(features)

    before = case.generated(model)
    with approximate_features(model, lambda features: features):
        assert torch.equal(case.generated(model), before)
    with approximate_features(model, zero):
        case.generated(model)
    assert len(calls) == 1, "once, before the first token"


def test_through_an_adapter(case: Case) -> None:
    model = get_peft_model(case.model(), LoraConfig(target_modules=["q_proj", "qkv"], r=2))
    with torch.no_grad():
        before = model(**case.batch).logits
        with approximate_features(model, lambda features: features):
            assert torch.equal(model(**case.batch).logits, before)
        with approximate_features(model, torch.zeros_like):
            assert not torch.allclose(model(**case.batch).logits, before, atol=1e-3)
        assert torch.equal(model(**case.batch).logits, before)


def test_blocks_within_blocks_and_errors(case: Case) -> None:
    model = case.model()
    with torch.no_grad():
        plain = embedded(model, case.batch)
        with approximate_features(model, lambda features: features * 2):
            with approximate_features(model, lambda features: features * 3):
                assert torch.equal(embedded(model, case.batch), plain * 2 * 3)
            assert torch.equal(embedded(model, case.batch), plain * 2)
        with (
            pytest.raises(ValueError, match="came out as"),
            approximate_features(model, lambda features: features[:, :1]),
        ):
            model(**case.batch)
        assert torch.equal(embedded(model, case.batch), plain)
        assert "get_image_features" not in vars(seeing_part(model))


def test_the_vision_side_alone_gives_the_same(case: Case) -> None:
    pixels = Sight(case.processor, None).pixels([[each] for each in case.pictures])  # type: ignore[arg-type]
    for dtype in (torch.float32, torch.bfloat16):
        whole, side = load_model(str(case.folder), dtype).eval(), load_vision_side(str(case.folder), dtype, CPU)
        with torch.no_grad():
            pairs = list(zip(image_features(whole, pixels), image_features(side, pixels), strict=True))
        assert all(torch.equal(one, other) and other.dtype == dtype for one, other in pairs)
    empty = [name for name, parameter in side.named_parameters() if parameter.is_meta]
    assert any("embed_tokens" in name for name in empty), "the language tower is not in memory"


def test_with_depth_the_encoding_is_part_of_what_is_replaced(tmp_path: Path) -> None:
    case = Case("qwen25vl", tmp_path)
    model = attach_depth(case.model(), DepthSettings(gate="none"))
    tokens = int((case.batch["input_ids"] == model.config.image_token_id).sum())
    batch = {**case.batch, "depth": torch.linspace(0, 1, tokens)}
    with torch.no_grad():
        assert torch.equal(torch.cat(image_features(model, batch)), embedded(model, batch))
        with approximate_features(model, torch.zeros_like):
            assert not embedded(model, batch).any()


def test_a_text_model_has_none(tmp_path: Path) -> None:
    model = load_model(str(tiny_llama(tmp_path)), torch.float32)
    with pytest.raises(UsageError, match="no image features"), approximate_features(model, torch.zeros_like):
        pass
    with pytest.raises(UsageError, match="no image features"):
        load_vision_side(str(tmp_path), torch.float32, CPU)
