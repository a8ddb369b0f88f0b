"""The file of predictions: one JSON line each, on the disk as soon as it is known, with what made them beside it.

predictions.jsonl            {"id", "prompt", "prediction", "references"} per line, and "scores" of labels, "images"
predictions.settings.json    engine, decoding, model and data that made them: others must not be mixed in
predictions.part1.jsonl      what process 1 of several has made so far; the first process joins the parts at the end
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rankwise.data.example import Example
from rankwise.data.template import without_images
from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import read_object, write_json
from rankwise.files.processes import gathered, own_share, process_index
from rankwise.score.generate import Answering


@dataclass(frozen=True)
class Prediction:
    """One generated text, or chosen label, with what it was made from and is compared with.

    scores: log-likelihood of every label where the label was chosen by them. images: references as the data have
    them; question: the last user turn without its image slots, for rows with images.
    """

    id: str
    prompt: str
    prediction: str
    references: tuple[str, ...]
    scores: dict[str, float] | None = None
    images: tuple[str, ...] = ()
    question: str | None = None

    def line(self) -> str:
        row = asdict(self)
        if self.scores is None:
            del row["scores"]
        if not self.images:
            del row["images"], row["question"]
        return json.dumps(row, ensure_ascii=False) + "\n"


def predict(
    generator: Answering, examples: Sequence[Example], path: str | Path, made_from: Mapping[str, Any] | None = None
) -> list[Prediction]:
    """Texts for all samples, in their order; those already in the file are not generated again.

    Several processes (torchrun) share the samples; every process returns all of them.

    made_from: fingerprints of model and data; with the generator's settings they must be those of the file.
    """
    path = Path(path)
    names = [example.id for example in examples]
    assert len(set(names)) == len(names), "ids must be unique"
    rank, count = process_index()
    if rank == 0:
        _claim(path, {"generator": dict(generator.settings), "made_from": dict(made_from or {})})
        _join(path)
    gathered({rank: True})  # nobody reads the file before the first process has made it whole
    done = _read(path, {example.id: example.references for example in examples})
    missing = [example for example in examples if example.id not in done]
    own = own_share(missing, [_length(example) for example in missing]) if count > 1 else missing
    made = _generate(generator, own, path if count == 1 else _part(path, rank), len(done))
    done |= gathered(made)
    if rank == 0:
        _join(path)
    return [done[name] for name in names]


def _length(example: Example) -> int:
    return sum(len(turn.text) for turn in example.turns)


def _generate(generator: Answering, examples: Sequence[Example], path: Path, before: int) -> dict[str, Prediction]:
    """Predictions by id, each appended to the file as soon as it is known."""
    made: dict[str, Prediction] = {}
    quiet = True if process_index()[0] else None
    bar = tqdm(total=before + len(examples), initial=before, desc="generate", unit="text", disable=quiet)
    with path.open("a", encoding="utf-8", newline="\n") as file, bar:
        for generated in generator.generate(examples) if examples else ():
            example = examples[generated.position]
            scores = None if generated.scores is None else dict(generated.scores)
            answer = (generated.prompt, generated.text, example.references)
            prediction = Prediction(example.id, *answer, scores, example.images, _question(example))
            file.write(prediction.line())
            file.flush()
            made[example.id] = prediction
            bar.update()
    return made


def _question(example: Example) -> str | None:
    """What is asked about the pictures, for eyes: the prompt has it between the family's image tokens."""
    if not example.images:
        return None
    asked = [turn.text for turn in without_images(example).turns if turn.role == "user"]
    return asked[-1]


def _part(path: Path, rank: int) -> Path:
    return path.with_suffix(f".part{rank}{path.suffix}")


def _join(path: Path) -> None:
    """Make the file whole: the parts of several processes go to its end; lines that a kill cut short go."""
    for file in (path, *sorted(path.parent.glob(f"{path.stem}.part*{path.suffix}"))):
        _cut_back(file)
        if file != path and file.exists():
            with path.open("ab") as whole:
                whole.write(file.read_bytes())
            file.unlink()


def _cut_back(path: Path) -> None:
    """Take off a last line without its end, as a kill leaves it."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Write what makes the predictions, or check that it is what made those already there."""
    record = path.with_suffix(".settings.json")
    settings = json.loads(json.dumps(settings))
    parts = list(path.parent.glob(f"{path.stem}.part*{path.suffix}"))
    if not path.exists() and not parts:
        write_json(record, settings)
        return
    if not record.exists():
        raise UsageError(f"{path} exists, but {record.name} beside it does not: delete it or choose another folder")
    before = read_object(record)
    differences = [
        f"{name}: {before.get(part, {}).get(name)!r} then, {settings[part].get(name)!r} now"
        for part in settings
        for name in sorted({*before.get(part, {}), *settings[part]})
        if before.get(part, {}).get(name) != settings[part].get(name)
    ]
    if differences:
        listed = "\n    ".join(differences)
        raise UsageError(
            f"{path} holds predictions made otherwise:\n    {listed}\n  Delete it or choose another output folder."
        )


def _read(path: Path, references: Mapping[str, tuple[str, ...]]) -> dict[str, Prediction]:
    """Predictions of the wanted samples that the file holds."""
    done = {}
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        prediction = _parsed(line, path, number)
        if prediction.id not in references:
            continue
        if prediction.references != references[prediction.id]:
            raise UsageError(
                f"{path}, line {number}: the references of {prediction.id} are not those of the data; "
                "it was made from other data: delete it or choose another output folder"
            )
        done[prediction.id] = prediction
    return done


def _parsed(line: str, path: Path, number: int) -> Prediction:
    try:
        row = json.loads(line)
        answer = (row["prompt"], row["prediction"], tuple(row["references"]))
        seen = (tuple(row.get("images", ())), row.get("question"))
        return Prediction(row["id"], *answer, row.get("scores"), *seen)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}, line {number}: not a prediction ({error}); delete the file to start anew") from error
