"""The parity ladder against a runtime that is transformers itself: sound on every rung, and every fault on its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import gguf
import numpy as np
import pytest
import torch
from exported import vision_model
from hf_runtime import HFRuntime
from hypothesis import given
from hypothesis import strategies as st
from parity_models import Scene, exported_pair, renderer_of, scene_in
from PIL import Image
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from torch.nn import functional as F

from rankwise.core.geometry import letterbox
from rankwise.data.device import MARKER, encoded
from rankwise.data.render import Renderer
from rankwise.device.parity.cases import BLIND, pick, stratum_of
from rankwise.device.parity.floor import (
    LEAST_KL,
    Divergence,
    Floor,
    Position,
    Thresholds,
    chance,
    compare,
    divergence,
    joined,
    measure_floor,
    top_of,
)
from rankwise.device.parity.known_good import q8_0, rounding
from rankwise.device.parity.ladder import NAMES, Embedder, Ladder, climb, verdict
from rankwise.device.parity.pixels import unavailable
from rankwise.device.parity.reference import HFReference, Observed
from rankwise.device.parity.rungs import RUNGS
from rankwise.device.scores import change, gain_kept
from rankwise.errors import ServiceError
from rankwise.gguf.reading import read_export
from rankwise.models.load import load_model

# --- how far apart two distributions are -----------------------------------------------------------------------------


def log_probs(places: int, vocabulary: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(places, vocabulary, generator=generator)).double().log_softmax(-1)


@given(st.integers(0, 1000), st.integers(2, 60))
def test_with_all_tokens_it_is_the_kl_and_with_fewer_never_more(seed: int, named: int) -> None:
    first, second = log_probs(1, 60, seed)[0], log_probs(1, 60, seed + 5000)[0]
    true = float(F.kl_div(second, first, log_target=True, reduction="sum"))
    whole = divergence(first, dict(enumerate(second.tolist())))
    assert whole == pytest.approx(true, rel=1e-6, abs=1e-9)
    lumped = divergence(first, top_of(second[None], named)[0])
    assert -1e-12 <= lumped <= true + 1e-9


def test_equal_distributions_are_0_apart_though_rounded_to_single_precision() -> None:
    rows = log_probs(20, 400, 0)
    found = compare(rows, top_of(rows.float(), 10))
    assert found.max < 1e-12
    assert found.agreement == 1
    assert found.margin_difference < 1e-5


def test_a_flip_counts_by_how_sure_the_reference_was() -> None:
    rows = torch.tensor([[0.6, 0.3, 0.1], [0.41, 0.4, 0.19]]).log()
    tops = [{0: math.log(0.3), 1: math.log(0.6)}, {0: math.log(0.4), 1: math.log(0.41)}]
    found = compare(rows, tops)
    assert [position.flipped for position in found.positions] == [True, True]
    assert [flip.margin for flip in found.flips] == pytest.approx([math.log(2), math.log(0.41 / 0.4)], rel=1e-5)
    assert len(found.flips_above(0.1)) == 1
    numbers = found.as_dict(0.1)
    assert (numbers["flips_within_noise"], numbers["flips_beyond_noise"]) == (1, 1)
    assert found.interval == pytest.approx(proportion_confint(0, 2, method="wilson"), abs=1e-9)


def test_a_stored_reference_that_knows_some_tokens_compares_on_those() -> None:
    row = log_probs(1, 50, 1)[0]
    known = torch.full_like(row, math.nan)
    best = row.topk(20).indices
    known[best] = row[best]
    other = log_probs(1, 50, 2)[0]
    bins = torch.cat([row[best].exp(), (1 - row[best].exp().sum()).reshape(1)])
    others = torch.cat([other[best].exp(), (1 - other[best].exp().sum()).reshape(1)])
    expected = float((bins * (bins / others).log()).sum())
    assert divergence(known, dict(enumerate(other.tolist()))) == pytest.approx(expected, rel=1e-6)


def test_mean_p99_and_largest_are_those_of_all_places_together() -> None:
    rows, others = log_probs(30, 40, 3), log_probs(30, 40, 4)
    parts = [compare(rows[:10], top_of(others[:10], 40), "a"), compare(rows[10:], top_of(others[10:], 40), "b")]
    both = joined(parts)
    true = F.kl_div(others, rows, log_target=True, reduction="none").sum(-1).numpy()
    assert (both.mean, both.p99, both.max) == pytest.approx((true.mean(), np.quantile(true, 0.99), true.max()))
    assert both.of(["a"]).mean == pytest.approx(true[:10].mean())


# --- the floor -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene_in(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def floor(scene: Scene) -> Floor:
    return measure_floor(scene.reference, scene.cases)


@pytest.fixture(scope="module")
def limits(floor: Floor) -> Thresholds:
    return floor.thresholds("f16")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return load_model(str(vision_model(tmp_path_factory.mktemp("other"), seed=1)), torch.float32).eval()


def test_q8_0_is_the_rounding_of_gguf() -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    weights = torch.randn(40, 96) * torch.logspace(-6, 3, 40)[:, None]
    weights[3, :32] = 0
    expected = gguf.quants.dequantize(gguf.quants.quantize(weights.numpy(), kind), kind)
    assert torch.equal(q8_0(weights), torch.from_numpy(expected))


def test_the_floor_leaves_the_model_as_it_was(scene: Scene, floor: Floor) -> None:
    fresh = load_model(str(scene.folder / "model"), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(scene.model.parameters(), fresh.parameters(), strict=True))
    hooks = [[len(module._forward_pre_hooks) for module in model.modules()] for model in (scene.model, fresh)]
    assert hooks[0] == hooks[1]
    with pytest.raises(RuntimeError, match="stopped"), rounding(scene.model, q8_0, q8_0):
        raise RuntimeError("stopped")
    assert all(torch.equal(a, b) for a, b in zip(scene.model.parameters(), fresh.parameters(), strict=True))


def test_coarser_arithmetic_is_farther_away(floor: Floor) -> None:
    mean = {name: row["kl_mean"] for name, row in floor.as_dict().items()}
    assert set(mean) == {"attention", "padded", "float16", "bfloat16", "q8_0"}
    assert max(mean["attention"], mean["padded"]) < 1e-9
    assert 1e-9 < mean["float16"] < mean["bfloat16"]
    assert mean["float16"] < mean["q8_0"]


def test_limits_are_k_floors_of_what_the_form_explains(floor: Floor) -> None:
    f16, q8 = floor.thresholds("f16", k=4), floor.thresholds("q8_0", k=4)
    assert f16.kl_mean == pytest.approx(max(LEAST_KL, 4 * floor.paths["float16"].mean))
    assert q8.kl_mean == pytest.approx(4 * floor.paths["q8_0"].mean)
    explained = [floor.paths[name].margin_difference for name in ("attention", "padded", "float16", "q8_0")]
    assert q8.margin == pytest.approx(2 * max(explained)), "KL is quadratic in the logits' difference"
    assert f16.margin < q8.margin
    assert floor.thresholds("f32") == floor.thresholds("f16")  # what is stored exactly is not computed exactly


# --- the ladder ------------------------------------------------------------------------------------------------------


def first(ladder: Ladder) -> str:
    assert ladder.first_broken
    return ladder.first_broken.name


def test_a_runtime_that_is_the_same_holds_every_rung(scene: Scene, limits: Thresholds) -> None:
    ladder = climb(scene.reference, HFRuntime(scene.model, scene.renderer), scene.cases, limits)
    status = {rung.name: rung.status for rung in ladder.rungs}
    assert tuple(status) == NAMES
    assert status.pop("embeddings") == "not measured"
    assert status.pop("pixels") == ("not measured" if unavailable() else "ok")
    assert set(status.values()) == {"ok"}, ladder.first_broken
    kinds = set(ladder["logprobs"].measured["by_kind"])
    assert kinds == {"wide RGB", "tall RGB", "tall RGB turned", "square L", BLIND}
    assert ladder["pixels"].measured["pictures"] == 8
    assert ladder["logprobs"].measured["cases_not_told"] == 0
    assert ladder["text"].measured["cases"] == 6
    assert ladder["image tokens"].measured["reference"] == ladder["image tokens"].measured["runtime"] != []
    assert ladder["logprobs"].measured["kl_max"] < 1e-10


def test_a_text_model_has_no_rungs_about_pictures(scene: Scene, limits: Thresholds) -> None:
    renderer = replace(scene.renderer, sight=None)
    reference = HFReference(scene.model, renderer, 4)
    cases = [case for case in scene.cases if not case.images]
    ladder = climb(reference, HFRuntime(scene.model, renderer), cases, limits)
    assert [rung.status for rung in ladder.rungs] == ["not measured"] * 2 + ["ok", "not measured", "ok", "ok"]


def resent(scene: Scene, change) -> list:
    """The cases with other pictures sent: change(photo) → picture."""
    photos = scene.renderer.sight.reader.reader
    return [
        replace(case, images=tuple(encoded(change(photos.open(name)), "PNG") for name in case.example.images))
        if case.images
        else case
        for case in scene.cases
    ]


def test_another_filter_breaks_the_pixels(scene: Scene, limits: Thresholds) -> None:
    def lanczos(photo: Image.Image) -> Image.Image:
        size = scene.target.image_size
        place = letterbox(*photo.size, size)
        square = Image.new("RGB", (size, size))
        square.paste(photo.resize((place.width, place.height), Image.Resampling.LANCZOS), (place.left, place.top))
        return square

    ladder = climb(scene.reference, HFRuntime(scene.model, scene.renderer), resent(scene, lanczos), limits)
    assert first(ladder) == "pixels"
    assert "filter" in ladder["pixels"].why


def test_white_padding_breaks_the_pixels_in_the_margin_only(scene: Scene, limits: Thresholds) -> None:
    def white(photo: Image.Image) -> Image.Image:
        picture = np.array(scene.target.resize(photo))
        place = letterbox(*photo.size, scene.target.image_size)
        inside = np.zeros(picture.shape[:2], bool)
        inside[place.top : place.top + place.height, place.left : place.left + place.width] = True
        picture[~inside] = 255
        return Image.fromarray(picture)

    ladder = climb(scene.reference, HFRuntime(scene.model, scene.renderer), resent(scene, white), limits)
    assert first(ladder) == "pixels"
    assert "margin only" in ladder["pixels"].why
    assert "6 cases" in ladder["pixels"].why  # the square picture has no margin


def test_a_picture_sent_as_it_is_breaks_the_pixels(scene: Scene, limits: Thresholds) -> None:
    runtime = HFRuntime(scene.model, scene.renderer)
    ladder = climb(scene.reference, runtime, resent(scene, lambda photo: photo), limits)
    assert first(ladder) == "pixels"
    assert "size of pictures" in ladder["pixels"].why


def test_other_tiles_break_the_image_tokens(scene: Scene, limits: Thresholds) -> None:
    whole = replace(scene.target, tiling="processor")
    renderer = renderer_of(scene.folder / "model", scene.folder / "photos", whole)
    ladder = climb(HFReference(scene.model, renderer, 4), HFRuntime(scene.model, scene.renderer), scene.cases, limits)
    assert first(ladder) == "image tokens"
    reference, runtime = (ladder["image tokens"].measured[name] for name in ("reference", "runtime"))
    assert reference[0] < runtime[0]
    assert f"{reference[0]} tokens in training and {runtime[0]}" in ladder["image tokens"].why


def test_a_marker_left_literal_breaks_the_image_tokens(scene: Scene, limits: Thresholds) -> None:
    cases = [replace(case, prompt=case.prompt.replace(MARKER, "<IMAGE>")) for case in scene.cases]
    ladder = climb(scene.reference, HFRuntime(scene.model, scene.renderer), cases, limits)
    assert first(ladder) == "image tokens"
    assert "read as words" in ladder["image tokens"].why


def test_a_second_bos_breaks_the_ids(scene: Scene, limits: Thresholds) -> None:
    begin = scene.renderer.tokenizer.bos_token
    cases = [replace(case, prompt=begin + case.prompt) for case in scene.cases]
    for runtime in (HFRuntime(scene.model, scene.renderer), HFRuntime(scene.model, scene.renderer, begin=3)):
        ladder = climb(scene.reference, runtime, cases, limits)
        assert first(ladder) == "token ids"
        assert "second BOS" in ladder["token ids"].why
    sound = climb(scene.reference, HFRuntime(scene.model, scene.renderer, begin=3), scene.cases, limits)
    assert sound.holds


def test_another_template_breaks_the_ids(scene: Scene, limits: Thresholds) -> None:
    ladder = climb(scene.reference, HFRuntime(scene.model, scene.renderer, template=" "), scene.cases, limits)
    assert first(ladder) == "token ids"
    assert "chat template in the GGUF" in ladder["token ids"].why
    cases = [replace(case, prompt=case.prompt.replace("User:", "user\n")) for case in scene.cases]
    ladder = climb(scene.reference, HFRuntime(scene.model, scene.renderer), cases, limits)
    assert first(ladder) == "token ids"
    assert "runtime reads 'user" in ladder["token ids"].why


def test_other_weights_break_the_logprobs(scene: Scene, limits: Thresholds, other_model: torch.nn.Module) -> None:
    ladder = climb(scene.reference, HFRuntime(other_model, scene.renderer), scene.cases, limits)
    assert first(ladder) == "logprobs"
    assert "language weights are not those" in ladder["logprobs"].why
    assert ladder["text"].status == "broken"


def test_another_vision_tower_is_told_from_other_language_weights(
    scene: Scene, limits: Thresholds, other_model: torch.nn.Module
) -> None:
    mixed = copy.deepcopy(scene.model)
    mixed.model.vision_model = other_model.model.vision_model
    ladder = climb(scene.reference, HFRuntime(mixed, scene.renderer), scene.cases, limits)
    assert first(ladder) == "logprobs"
    assert "mmproj" in ladder["logprobs"].why


@dataclass(frozen=True)
class Embeds:
    """A file's embeddings of pictures, by transformers."""

    model: torch.nn.Module
    renderer: Renderer

    def of(self, images: Sequence[bytes]) -> list[np.ndarray]:
        runtime = HFRuntime(self.model, self.renderer)
        found = [self.model.model.get_image_features(**runtime.read(MARKER, [image])[1]) for image in images]
        return [torch.cat(tuple(one.pooler_output)).flatten(0, -2).detach().numpy() for one in found]


def test_embeddings_are_compared_where_something_tells_them(scene: Scene, other_model: torch.nn.Module) -> None:
    reference = HFReference(scene.model, scene.renderer, 2, embeds=True)
    cases = scene.cases[:6]
    floor = measure_floor(reference, cases, names=["padded", "float16", "q8_0"])
    assert 0 < floor.embeddings["float16"] < floor.embeddings["q8_0"] < 0.1
    limits, runtime = floor.thresholds("f16"), HFRuntime(scene.model, scene.renderer)
    sound = climb(reference, runtime, cases, limits, embedder=Embeds(scene.model, scene.renderer))
    assert sound["embeddings"].status == "ok"
    assert sound["embeddings"].measured["pictures"] == 4
    assert sound["embeddings"].measured["largest_distance"] < 1e-5
    seen = [Observed.of(reference.expected(case), runtime, case, 2) for case in cases[:1]]
    for far, status in ((0.5, "ok"), (20, "broken")):  # within a hundred limits
        scaled = [replace(one, embeddings=one.expected.embeddings * (1 + far * limits.embeddings)) for one in seen]
        assert RUNGS["embeddings"](scaled, runtime, limits).status == status
    mixed = copy.deepcopy(scene.model)
    mixed.model.vision_model = other_model.model.vision_model
    wrong = HFRuntime(mixed, scene.renderer)
    ladder = climb(reference, wrong, cases, limits, embedder=Embeds(mixed, scene.renderer))
    assert first(ladder) == "embeddings"
    assert "mmproj" in ladder["embeddings"].why
    half = renderer_of(scene.folder / "model", scene.folder / "photos", replace(scene.target, tiling="processor"))
    fewer = climb(reference, runtime, cases, limits, embedder=Embeds(scene.model, half))
    assert first(fewer) == "embeddings"
    assert fewer["embeddings"].measured["largest_distance"] is None


@pytest.mark.slow
def test_llama_cpp_python_gives_the_embeddings(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("llama_cpp")
    folder = exported_pair(tmp_path_factory) / "tuned"
    scene, exported = scene_in(folder), read_export(folder / "export")
    reference = HFReference(scene.model, scene.renderer, 2, embeds=True)
    for form in ("f16", "q8_0"):
        mmproj = exported.mmproj(form)
        assert mmproj
        embedder = Embedder(exported.text(form), mmproj)
        limits = measure_floor(reference, scene.cases[:4]).thresholds(form)
        runtime = HFRuntime(scene.model, scene.renderer)
        ladder = climb(reference, runtime, scene.cases[:4], limits, embedder=embedder)
        assert ladder["embeddings"].status == "ok", ladder["embeddings"]
        assert ladder["embeddings"].measured["largest_distance"] > 0


def test_agreement_that_was_asked_for_is_held(scene: Scene, floor: Floor) -> None:
    flipping = replace(floor.thresholds("q8_0", k=1e9), agreement=0.999)
    with_noise = copy.deepcopy(scene.model)
    with torch.no_grad():
        for parameter in with_noise.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0)
    ladder = climb(scene.reference, HFRuntime(with_noise, scene.renderer), scene.cases, flipping)
    agreement = ladder["logprobs"].measured["top1_agreement"]
    assert (ladder["logprobs"].status == "broken") == (agreement < 0.999)
    assert agreement < 0.999


def test_another_end_token_breaks_the_text(scene: Scene, limits: Thresholds) -> None:
    """Training's end token is made the third token of the answers, so that there are answers that end."""
    ends = {case.id: scene.reference.expected(case).answer[2] for case in scene.cases}
    case = scene.cases[0]
    ending = replace(scene.renderer, generation_eos=ends[case.id])
    reference = HFReference(scene.model, ending, 5)
    assert climb(reference, HFRuntime(scene.model, ending), [case], limits).holds
    ladder = climb(reference, HFRuntime(scene.model, ending, end_ids=(5,)), [case], limits)
    assert first(ladder) == "text"
    assert "writes on" in ladder["text"].why
    early = HFRuntime(scene.model, ending, end_ids=(reference.expected(case).answer[0],))
    ladder = climb(reference, early, [case], limits)
    assert first(ladder) == "text"
    assert "ends answers where training goes on" in ladder["text"].why


def test_a_first_difference_within_the_noise_is_a_tie(scene: Scene, limits: Thresholds) -> None:
    runtime = HFRuntime(scene.model, scene.renderer)
    case = scene.cases[0]
    expected = scene.reference.expected(case)
    second = int(expected.log_probs[0].topk(2).indices[1])
    margin = float(expected.log_probs[0].topk(2).values.diff().abs())

    class Other(HFRuntime):
        def complete(self, prompt, images=(), **how):
            found = super().complete(prompt, images, **how)
            return found if how.get("force") else replace(found, tokens=(second, *found.tokens[1:]))

    other = Other(runtime.model, runtime.renderer)
    sure = climb(scene.reference, other, [case], replace(limits, margin=margin / 2))
    assert first(sure) == "text"
    unsure = climb(scene.reference, other, [case], replace(limits, margin=margin * 2))
    assert unsure.holds
    assert unsure["text"].measured["tie"] == 1


def test_what_the_runtime_refuses_breaks_a_rung_and_a_lost_one_raises(scene: Scene, limits: Thresholds) -> None:
    class Gone(HFRuntime):
        def complete(self, prompt, images=(), **how):
            raise ServiceError("cannot be reached")

    with pytest.raises(ServiceError, match="cannot be reached"):
        climb(scene.reference, Gone(scene.model, scene.renderer), scene.cases, limits)


# --- cases, gain, verdict --------------------------------------------------------------------------------------------


def test_rare_kinds_of_pictures_are_all_on_a_short_ladder(scene: Scene) -> None:
    folder = scene.folder / "photos"
    many = [replace(scene.examples[0], id=f"wide-{number}") for number in range(20)] + scene.examples[1:]
    chosen = pick(many, 5, folder)
    assert len(chosen) == 5
    assert len({stratum_of(one, folder) for one in chosen}) == 4
    assert [one for one in many if one in chosen] == chosen


def test_gain_kept_and_mcnemar() -> None:
    base = [False] * 40 + [True] * 20
    tuned = [True] * 50 + [False] * 10
    shipped = [True] * 45 + [False] * 15
    kept = gain_kept(base, tuned, shipped)
    assert kept.kept == pytest.approx((45 - 20) / (50 - 20))
    found = change(tuned, shipped)
    assert (found.lost, found.won) == (5, 0)
    assert found.p == pytest.approx(mcnemar([[45, 5], [0, 10]], exact=True).pvalue)
    assert found.difference == pytest.approx(-5 / 60)
    assert found.interval[0] < found.difference < found.interval[1]
    undefined = gain_kept(tuned, tuned, shipped)
    assert undefined.kept is None
    assert "not clearly above 0" in undefined.why


def test_the_verdict_tells_conversion_from_quantization(scene: Scene, limits: Thresholds, other_model) -> None:
    good = climb(scene.reference, HFRuntime(scene.model, scene.renderer), scene.cases[:2], limits)
    bad = climb(scene.reference, HFRuntime(other_model, scene.renderer), scene.cases[:2], limits)
    assert verdict({"f16": good, "q8_0": good})[0].startswith("What runs in llama.cpp is what was trained")
    assert verdict({"f16": bad, "q8_0": bad})[0].startswith("Conversion error: f16")
    assert verdict({"f16": good, "q8_0": bad})[0].startswith("Quantization damage: f16 does")
    assert "validate the f16 file too" in verdict({"q8_0": bad})[0]
    assert "`logprobs`" in " ".join(verdict({"q8_0": bad}))


def test_few_places_are_given_what_chance_explains() -> None:
    """The ratio of two means of squared noise: about one sound file in 200 is above, whatever the number of places."""
    generator = np.random.default_rng(0)
    for places in (2, 3, 6):
        squares = generator.standard_normal((2, 40_000, places)) ** 2
        ratio = squares[0].mean(1) / squares[1].mean(1)
        assert (ratio > chance(places)).mean() == pytest.approx(0.005, abs=0.002)
    assert chance(2) > chance(4) > 10 > chance(8)
    position = Position(1.0, 0, 0, 1.0, 0.0)
    even, uneven = Divergence((position,) * 8), Divergence((position, *(replace(position, kl=1e-9),) * 7))
    assert even.effective == pytest.approx(8) and uneven.effective == pytest.approx(1)


def test_a_floor_on_few_places_raises_its_limits() -> None:
    position = Position(1e-5, 0, 0, 1.0, 0.01)
    many, few = (Floor({"float16": Divergence((position,) * count)}).thresholds("f16") for count in (40, 3))
    assert many.k == 10 and many.kl_mean == pytest.approx(1e-4)
    assert few.k == pytest.approx(chance(3)) and few.kl_mean == pytest.approx(few.k * 1e-5)
