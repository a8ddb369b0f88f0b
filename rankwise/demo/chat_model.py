"""`demo --model`: sizes of the recipe's stages that fit a time, from one step and one answer of the model as measured.

model, rows ── measure ──▶ MeasuredCosts ── sizes_for(minutes) ──▶ FittingSizes ── changes ──▶ of the recipe
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import load
from rankwise.errors import UsageError
from rankwise.evaluate.generate import GenerationSettings, HFGenerator, pick_device
from rankwise.files.atomic import about_to_write, read_if_there, read_object, write_json
from rankwise.models.adapt import adapt
from rankwise.models.load import load_config, load_model, load_tokenizer, torch_dtype
from rankwise.models.targets import adaptable_sites, choose_sites, uniform_plan
from rankwise.options.sections import DataSection, LoraSection, ModelSection
from rankwise.page.text import duration

ROWS, RANK, TOKENS = 4, 8, 64  # rows of a step, largest rank, tokens of an answer: the recipe's
MEASURED = "sizes.json"
RUNS = 6  # of advise: three rates, one or two where they end at the edge, and one between the best
ADVICE, TRAINING, SCORES, PROOF = 0.3, 0.25, 0.08, 0.08  # of the time; what is left loads, merges and exports
LEAST = {"advise_steps": 8, "train_steps": 8, "scored": 8, "validated": 4}
MOST = {"advise_steps": 40, "train_steps": 600, "scored": 64, "validated": 16}


@dataclass(frozen=True)
class MeasuredCosts:
    """Seconds of a training step of `ROWS` rows, and of an answer of `TOKENS` tokens in a batch."""

    step: float
    answer: float


@dataclass(frozen=True)
class FittingSizes:
    """Steps of a short run and of the real one, rows that are scored before and after, rows that go through llama.cpp.
    seconds: what the parts that are sized should take."""

    advise_steps: int
    train_steps: int
    scored: int
    validated: int
    seconds: float

    def changes(self, minutes: float, rows: int) -> list[str]:
        """Of the recipe. rows: to train on."""
        return [
            f"advise.minutes={ADVICE * minutes:g}",
            f"advise.steps={self.advise_steps}",
            f"advise.num_epochs={self.train_steps * ROWS / rows:.4f}",
            f"before.num_samples={self.scored}",
            f"after.num_samples={self.scored}",
            f"validate.num_samples={self.validated}",
            f"validate.parity_samples={self.validated}",
            f"validate.threads={max(1, (os.cpu_count() or 1) // 2)}",  # more wait for each other beside other programs
        ]


def sizes_for(costs: MeasuredCosts, minutes: float) -> FittingSizes:
    """The largest that fit, within `LEAST` and `MOST`."""
    seconds = 60 * minutes
    wanted = {
        "advise_steps": ADVICE * seconds / RUNS / costs.step,
        "train_steps": TRAINING * seconds / costs.step,
        "scored": SCORES * seconds / 2 / costs.answer,
        "validated": PROOF * seconds / 4 / costs.answer,  # asked of two files and of the reference, and forced
    }
    counts = {name: int(min(max(count, LEAST[name]), MOST[name])) for name, count in wanted.items()}
    steps = RUNS * counts["advise_steps"] + counts["train_steps"]
    answers = 2 * counts["scored"] + 4 * counts["validated"]
    return FittingSizes(**counts, seconds=steps * costs.step + answers * costs.answer)


def fitting(model: str, data: Path, folder: Path, minutes: float) -> FittingSizes:
    """The sizes for this model and time: as found in this folder before, else measured now, and said."""
    asked = {"model": model, "minutes": minutes}
    if read_if_there(folder / MEASURED).get("asked") == asked:
        return FittingSizes(**read_object(folder / MEASURED)["sizes"])
    costs = measure(model, data)
    sizes = sizes_for(costs, minutes)
    print(f"a step of {ROWS} rows takes {costs.step:.2g} s, an answer {costs.answer:.2g} s: {described(sizes)}")
    if sizes.seconds > 60 * minutes:
        print(f"note: {minutes:g} minutes are too short; the least there is takes about {duration(sizes.seconds)}")
    write_json(folder / MEASURED, {"asked": asked, "costs": asdict(costs), "sizes": asdict(sizes)})
    return sizes


def described(sizes: FittingSizes) -> str:
    return (
        f"short runs of {sizes.advise_steps} steps, training of {sizes.train_steps}, {sizes.scored} rows scored, "
        f"{sizes.validated} in llama.cpp"
    )


def require_template(model: str) -> None:
    """UsageError for a model that is not one for chats."""
    if not load_tokenizer(model).chat_template:
        raise UsageError(f"--model {model}: has no chat template, so it is not a chat model; demo without --model")


def measure(model: str, data: Path) -> MeasuredCosts:
    """A LoRA step and a batch of answers, each the faster of two."""
    about_to_write()
    device = pick_device("auto")
    section = DataSection(task="e2e_nlg", data_path=str(data), prompt="chat")
    renderer = renderer_for(section, ModelSection(model_name=model), model, load_config(model))
    examples = load("e2e_nlg", data, "train").items[: 2 * ROWS]
    loaded: Any = load_model(model, torch_dtype("auto", trained=True, device=device)).to(device)
    generator = HFGenerator(loaded, renderer, GenerationSettings(max_new_tokens=TOKENS, batch_size=2 * ROWS))
    answers = quicker(lambda: list(generator.generate(examples)))
    sites = choose_sites(adaptable_sites(loaded, None), None)
    adapted: Any = adapt(loaded, uniform_plan(sites, RANK, None, False, model), LoraSection(lora_dropout=0.0)).train()
    rows = RenderedDataset(examples, renderer)
    batch = Collator.of(renderer.tokenizer, sight=renderer.sight)([rows[index] for index in range(ROWS)])
    given = {name: value.to(device) for name, value in batch.items() if name != "sample_index"}
    return MeasuredCosts(quicker(lambda: adapted(**given).loss.backward()), answers / len(examples))


def quicker(act: Callable[[], object]) -> float:
    """Seconds of the faster of two calls; the first one also warms up."""
    times = []
    for _ in range(2):
        started = time.monotonic()
        act()
        times.append(time.monotonic() - started)
    return min(times)
