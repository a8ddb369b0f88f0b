"""`rankwise train --estimate`: laws of the arithmetic, traces against real steps, the command and its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_finetune import restaurants
from tiny import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rankwise import cli
from rankwise.errors import UsageError
from rankwise.files.atomic import read_object
from rankwise.models.adapt import adapt
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.arguments import build_arguments
from rankwise.train.estimate.cost import Curve, Fixed, Profile, Speed, Work, run_length
from rankwise.train.estimate.gpus import CARDS, GIB, Card, cards, gib
from rankwise.train.estimate.shapes import Hardware, Rows, Shapes, Traced, Way, measure_way
from rankwise.train.estimate.trace import Trace, empty, trace_step

AS_GIVEN = Way("as given", "", None, False)
SAVING = Way("", "", None, True)
FOUR_BIT = Way("", "", "4bit", False)
GPU = Hardware((CARDS["rtx4090"],), torch.bfloat16, torch.bfloat16)
CPU = Hardware((Card("cpu", 8 * GIB, 1e11, 1e11, 1e10, measured=True, cpu=True),), None, torch.float32)


def small_llama(**changes: int) -> PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 400} | changes
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def shapes_of(rank: int = 8, dropout: float = 0.0, **changes: int) -> Shapes:
    with torch.device("meta"):
        base = small_llama(**changes)
    plan = uniform_plan(choose_sites(model_sites(base)), rank, None, False, "tiny")
    return Shapes(base, plan, LoraSection(lora_dropout=dropout), (), None)


def found(shapes: Shapes, way: Way, place: Hardware, folder: Path, length: int = 64, **more: object) -> Traced:
    arguments = build_arguments(folder, 1, {"use_cpu": True, **more})
    return measure_way(shapes, way, place, Rows(None, 0, None, length), arguments)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traced]:
    folder, shapes = tmp_path_factory.mktemp("out"), shapes_of(dropout=0.05)
    ways = {"given": AS_GIVEN, "saving": SAVING, "4bit": FOUR_BIT}
    return {name: found(shapes, way, GPU, folder) for name, way in ways.items()}


def batch_of(count: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 300, (count, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trace_without_weights_is_that_of_a_real_step(autocast: torch.dtype | None, checkpointing: bool) -> None:
    """Same operations, the same bytes after each of them, the same work: the shapes alone decide them."""
    traces = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            base = small_llama()
        model = adapt(
            base, uniform_plan(choose_sites(model_sites(base)), 4, None, False, "x"), LoraSection(lora_dropout=0.1)
        )
        model.config.use_cache = False
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model = empty(model, torch.float32) if device == "meta" else model
        traces.append(trace_step(model, batch_of(2, 24), autocast=autocast))
    assert traces[0].operations == traces[1].operations
    assert traces[0].flops == traces[1].flops
    assert traces[0].peak == pytest.approx(traces[1].peak, rel=0.01)
    assert traces[0].moved == pytest.approx(traces[1].moved, rel=0.01)


def test_what_autograd_saves_is_what_is_held_before_the_backward_pass() -> None:
    """torch's own hooks name every saved tensor: parameters apart, they and nothing much else are alive then."""
    base = small_llama()
    model = adapt(
        base, uniform_plan(choose_sites(model_sites(base)), 4, None, False, "x"), LoraSection(lora_dropout=0.0)
    )
    model.config.use_cache = False
    model.train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.append(storage)
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch_of(2, 48))
    peak = trace_step(model, batch_of(2, 48)).peak
    logits = 4 * 2 * 48 * 400
    assert sum(saved.values()) <= peak <= sum(saved.values()) + 3 * logits


def test_work_is_two_products_per_frozen_weight_and_three_per_trained_one() -> None:
    """Kaplan et al. 2020: 2 FLOPs per weight and token forward; backward the same again through the activations, and a
    third time for the gradients of what trains. Without the quadratic term of attention."""
    shapes = shapes_of(rank=8)
    empty(shapes.model, torch.float32)
    trace = trace_step(shapes.model, batch_of(2, 8))
    sites = model_sites(small_llama())
    frozen = sum(m * n for m, n in (site.shape for site in sites.values())) + 64 * 400
    trained = sum(8 * (m + n) for m, n in (site.shape for site in sites.values()))
    tokens = 16
    # The first layer's inputs need no gradient: q, k, v and nothing before them is differentiated.
    bound = tokens * (4 * frozen + 6 * trained)
    assert 0.85 * bound < trace.flops < 1.1 * bound


def test_more_rows_and_longer_rows_take_more(both: dict[str, Traced], tmp_path: Path) -> None:
    totals = [both["given"].profile.needs(batch).total for batch in (1, 2, 4, 8)]
    assert totals == sorted(set(totals))
    longer = found(shapes_of(dropout=0.05), AS_GIVEN, GPU, tmp_path, length=128)
    assert longer.profile.needs(2).total > both["given"].profile.needs(2).total


def test_checkpointing_takes_less_memory_and_more_work(both: dict[str, Traced]) -> None:
    given, saving = both["given"], both["saving"]
    for batch in (1, 4, 16):
        assert saving.profile.needs(batch).total < given.profile.needs(batch).total
    assert saving.work.flops.at(64) > given.work.flops.at(64)


def test_four_bit_weights_are_smaller_and_the_head_stays(both: dict[str, Traced], tmp_path: Path) -> None:
    small, given = both["4bit"].profile.fixed, both["given"].profile.fixed
    assert small.weights < given.weights
    assert (small.trained, small.optimizer) == (given.trained, given.optimizer)
    whole = 4 * (2 * 400 * 64 + 64 * (2 * 2 + 1))  # embeddings, head and norms are cast to float32
    linear = given.weights / 2 - whole / 4
    assert small.weights == pytest.approx(whole + linear * (0.5 + 1 / 64 + 1 / 4096), rel=1e-6)


def test_the_fixed_part_is_exact(tmp_path: Path) -> None:
    shapes = shapes_of(rank=8)
    fixed = found(shapes, AS_GIVEN, CPU, tmp_path, optim="adamw_torch").profile.fixed
    pairs = 4 * sum(8 * (m + n) for m, n in (site.shape for site in model_sites(small_llama()).values()))
    assert (fixed.trained, fixed.gradients, fixed.optimizer) == (pairs, pairs, 2 * pairs)
    assert fixed.weights == 4 * sum(parameter.numel() for parameter in small_llama().parameters())
    assert found(shapes, AS_GIVEN, CPU, tmp_path, optim="adafactor").profile.fixed.optimizer == 0


def test_accumulated_gradients_are_held_all_the_time(tmp_path: Path) -> None:
    shapes = shapes_of(rank=32)
    once = found(shapes, AS_GIVEN, CPU, tmp_path).profile.needs(4).total
    four = found(shapes, AS_GIVEN, CPU, tmp_path, gradient_accumulation_steps=4).profile.needs(4).total
    assert once <= four <= once + 2 * shapes.counts[0] * 4


@given(st.integers(0, 10**9), st.integers(1, 10**7), st.integers(1, 10**10))
@settings(deadline=None, max_examples=60)
def test_the_largest_batch_is_the_largest_that_fits(start: int, each: int, memory: int) -> None:
    two, three = (Trace(torch.tensor([start // 2, start + n * each, n * each]), torch.zeros(3), 1, 1) for n in (2, 3))
    profile = Profile.of(Fixed(1000, 10, 10, 20, 0), two, three)
    largest = profile.largest(memory, 4096)
    assert largest == 0 or profile.needs(largest).total <= memory
    assert largest == 4096 or profile.needs(largest + 1).total > memory


def test_a_curve_goes_through_its_points() -> None:
    curve = Curve.through((100, 5 * 100 + 2 * 100**2), (40, 5 * 40 + 2 * 40**2))
    assert (curve.linear, curve.square) == pytest.approx((5, 2))
    assert curve.at(70) == pytest.approx(5 * 70 + 2 * 70**2)


def test_a_slow_host_bounds_a_gpu_and_adds_on_a_cpu() -> None:
    work = Work(Curve(1e9, 0), Curve(0, 0), 0, 1000)
    alone = work.seconds(1, 100, Speed(1e11, 1e10))
    assert alone == pytest.approx(1.0)
    assert work.seconds(1, 100, Speed(1e15, 1e10)) > 1e-3
    assert work.seconds(1, 100, Speed(1e11, 1e10, on_cpu=True)) > alone


@pytest.mark.parametrize("drop", [False, True])
def test_steps_are_the_trainers(tmp_path: Path, drop: bool) -> None:
    more = {"gradient_accumulation_steps": 3, "num_train_epochs": 2, "dataloader_drop_last": drop, "use_cpu": True}
    length = run_length(26, 4, build_arguments(tmp_path, 1, more))
    assert length.updates == (4 if drop else 6)
    assert length.passes == (12 if drop else 14)
    assert run_length(26, 4, build_arguments(tmp_path, 1, {**more, "max_steps": 5})).passes == 15


def test_cards_by_name_and_by_memory() -> None:
    assert [card.name for card in cards("NVIDIA GeForce RTX 4090")] == ["rtx4090"]
    assert cards("A100_80GB")[0].memory == 80 * GIB
    alike = cards("24GB")
    assert {card.name for card in alike} >= {"rtx4090", "l4"} and {card.memory for card in alike} == {24e9}
    assert cards("24GiB")[0].memory == 24 * GIB
    assert cards("7GB")[0].bandwidth == 0, "no card of that size is known: no time, but memory"
    with pytest.raises(UsageError, match="rtx4090"):
        cards("rtx4091")
    with pytest.raises(UsageError, match="memory must be above 0"):
        cards("0GB")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "data").mkdir()
    base, data = tiny_llama(folder / "base", num_hidden_layers=1), restaurants(folder / "data")
    return f"train --model_name {base} --task e2e_nlg --data_path {data} -o {folder / 'out'} --use_cpu".split()


def test_the_command_prints_one_screen_and_writes_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--estimate", "--gpu", "rtx4090", "--usd-per-hour", "0.8", "--estimate_out", str(tmp_path / "e.json")]
    assert cli.main([*words, *more]) == 0
    printed = capsys.readouterr().out
    assert "Fits as given" in printed and "largest batch" in printed and "$0.00" in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert not Path(words[words.index("-o") + 1]).exists()
    record = read_object(tmp_path / "e.json")
    for column in record["columns"]:
        hours = column["seconds"][0] / 3600
        assert column["dollars"][0] == pytest.approx(0.8 * hours)
        assert hours > 0


def test_what_does_not_fit_is_answered_with_ways_out(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--estimate", "--gpu", "1GB"]) == 0
    printed = capsys.readouterr().out
    assert "Nothing fits" in printed and "Ways out" in printed, f"the allowance alone is {gib(GIB)}"


def test_without_rows_the_limit_is_the_length(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    base = words[words.index("--model_name") + 1]
    assert cli.main(["train", "--model_name", base, "--estimate", "--gpu", "24GB", "--max_seq_length", "32"]) == 0
    printed = capsys.readouterr().out
    assert "up to 32 tokens" in printed and "No time: give --data_path" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpu", "24GB"], "acts only with --estimate"),
        (["--estimate", "--gpu", "rtx40900"], "did you mean rtx4090"),
        (["--estimate", "--utilisation", "1.5"], "--utilisation is 1.5; give a number above 0 and at most 1"),
        (["--estimate", "--usd-per-hour", "-1"], "--usd_per_hour is -1.0; give a number of at least 0"),
        (["--estimate", "--fsdp", "full_shard"], "one GPU"),
    ],
)
def test_refusals(words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, *more]) == 2
    assert message in capsys.readouterr().err
