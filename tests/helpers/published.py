"""A run with everything that a model card reports.

trained_run(root)                          # root / "run": train, before, after, merged, gguf, validation
validated(root / "run" / "validation", broken="logprobs")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from test_merge import adapter_on
from tiny import tiny_llama

from rankwise.evaluate.predictions import EvaluationResult
from rankwise.files.run_folder import SITES, RunFolder
from rankwise.merge.command import run as merge
from rankwise.options.commands import MergeConfig

TRAINED = {"task": "e2e_nlg", "learning_rate": 2e-4, "num_train_epochs": 3.0, "lora_dropout": 0.05, "use_dora": False}
RUNGS = ("pixels", "image tokens", "token ids", "embeddings", "logprobs", "text")


def trained_run(root: Path) -> None:
    """A trained adapter, scores before and after, merged, exported, validated: in `root / "run"`, on a base in
    `root / "secret_place"`."""
    base = tiny_llama(root / "secret_place" / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    (root / "rows.json").write_text("[]")
    train = adapter_on(base, root / "run" / "train")
    with RunFolder(train).recording("train", {"model": str(base), "data": str(root / "rows.json")}) as record:
        RunFolder(train).save_config({**TRAINED, "hub_token": "hf_abcdefgh"})
        record.facts |= {"trainable_parameters": 1234, "total_parameters": 50_000, "steps": 40, "training_seconds": 61}
    (train / "checkpoint-40").mkdir()
    (train / "checkpoint-40" / "optimizer.pt").write_bytes(b"state")
    for name, value in (("before", 10.0), ("after", 61.25)):
        (root / "run" / name).mkdir()
        intervals = {"bleu": (value - 1, value + 1)}
        EvaluationResult("e2e_nlg", {"bleu": value}, intervals, 547).save(root / "run" / name)
    merge(MergeConfig(adapter=str(train), output_dir=str(root / "run" / "merged"), dtype="bfloat16"))
    sites = [{"path": f"s{rank}", "rank": rank, "shape": [32, 32]} for rank in (2, 6)]
    SITES.write(train, {"sites": sites, "left_out": []})
    exported(root / "run" / "gguf", root / "run" / "merged")
    validated(root / "run" / "validation")


def exported(folder: Path, model: Path, verification: Any = None) -> None:
    folder.mkdir()
    (folder / "tiny-q8_0.gguf").write_bytes(b"G" * 5_000_000)
    (folder / "device.json").write_text("{}")
    files = {"text": "tiny-q8_0.gguf", "mmproj": None, "bytes": {"text": 5_000_000}, "sha256": {"text": "c0ffee" * 9}}
    content = {
        "format": "rankwise-export/1",
        "model": {"path": str(model), "fingerprint": "0"},
        "converter": {"version": "0.3.36", "sha256": "832d"},
        "files": {"q8_0": files},
        "verification": {"errors": {}} if verification is None else verification,
    }
    (folder / "export.json").write_text(json.dumps(content))


def validated(folder: Path, broken: str | None = None) -> None:
    folder.mkdir(exist_ok=True)
    rungs = [{"name": name, "status": "broken" if name == broken else "ok"} for name in RUNGS]
    rungs[3]["status"] = "not measured"
    one = {"task": "labels", "method": "generation", "accuracy": 0.871, "interval": [0.801, 0.922], "n": 120}
    content = {
        "format": "rankwise-validation/1",
        "outtype": "q8_0",
        **one,
        "reference": one,
        "verdict": ["q8_0: as trained"],
        "by_outtype": {"q8_0": one},
        "parity": {"q8_0": {"first_broken": broken, "rungs": rungs}},
        "failures": [f"q8_0: the rung `{broken}` is broken"] if broken else [],
    }
    (folder / "validation.json").write_text(json.dumps(content))
