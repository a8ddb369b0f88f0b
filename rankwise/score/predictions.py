"""The file of predictions: one JSON line each, on the disk as soon as it is known, with what made them beside it.

predictions.jsonl            {"id", "prompt", "prediction", "references"} per line
predictions.settings.json    engine, decoding, model and data that made them: others must not be mixed in
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rankwise.data import Example
from rankwise.errors import DataError, UsageError
from rankwise.score.generate import Generator
from rankwise.store.files import read_object, write_json


@dataclass(frozen=True)
class Prediction:
    """One generated text with what it was made from and is compared with."""

    id: str
    prompt: str
    prediction: str
    references: tuple[str, ...]


def predict(
    generator: Generator, examples: Sequence[Example], path: str | Path, made_from: Mapping[str, Any] | None = None
) -> list[Prediction]:
    """Texts for all samples, in their order; those already in the file are not generated again.

    made_from: fingerprints of model and data; with the generator's settings they must be those of the file.
    """
    path = Path(path)
    names = [example.id for example in examples]
    assert len(set(names)) == len(names), "ids must be unique"
    _claim(path, {"generator": dict(generator.settings), "made_from": dict(made_from or {})})
    done = _resume(path, {example.id: example.references for example in examples})
    missing = [example for example in examples if example.id not in done]
    bar = tqdm(total=len(names), initial=len(done), desc="generate", unit="text", disable=None)
    with path.open("a", encoding="utf-8", newline="\n") as file, bar:
        for generated in generator.generate(missing) if missing else ():
            example = missing[generated.position]
            prediction = Prediction(example.id, generated.prompt, generated.text, example.references)
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
            file.flush()
            done[example.id] = prediction
            bar.update()
    return [done[name] for name in names]


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Write what makes the predictions, or check that it is what made those already there."""
    record = path.with_suffix(".settings.json")
    settings = json.loads(json.dumps(settings))
    if not path.exists():
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


def _resume(path: Path, references: Mapping[str, tuple[str, ...]]) -> dict[str, Prediction]:
    """Predictions of the wanted samples that the file holds; a last line cut by a kill is taken off the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    done = {}
    for number, line in enumerate(content[:whole].decode("utf-8").split("\n")[:-1], 1):
        prediction = _read(line, path, number)
        if prediction.id not in references:
            continue
        if prediction.references != references[prediction.id]:
            raise UsageError(
                f"{path}, line {number}: the references of {prediction.id} are not those of the data; "
                "it was made from other data: delete it or choose another output folder"
            )
        done[prediction.id] = prediction
    return done


def _read(line: str, path: Path, number: int) -> Prediction:
    try:
        row = json.loads(line)
        return Prediction(row["id"], row["prompt"], row["prediction"], tuple(row["references"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}, line {number}: not a prediction ({error}); delete the file to start anew") from error
