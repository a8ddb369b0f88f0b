"""Laws of a model in a GGUF file: it is the model that was exported, to the bit or within its type's rounding, and
splits texts alike; what would be another model is refused before anything is made."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import TEXTS
from installs import hide_modules
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rankwise import cli
from rankwise.data.sources.load import load
from rankwise.data.template import sections
from rankwise.demo.restaurants import write_task
from rankwise.errors import DataError
from rankwise.files import gguf as models
from rankwise.files.gguf import GGUFFile, unpacked
from rankwise.models.load import load_config, load_model
from rankwise.options.field import options_of
from rankwise.pipeline.preflight import MODELS, unpacked_models
from rankwise.pipeline.table import COMMANDS

gguf = pytest.importorskip("gguf", reason="extra: device")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this module's own; the converter stays where it is."""
    folder = tmp_path_factory.getbasetemp() / "gguf-cache"
    monkeypatch.setenv("RANKWISE_CACHE", str(folder))
    return folder


def rewritten(file: Path, out: Path, changes: Mapping[str, Any], more: Mapping[str, Any] = {}, drop: str = "") -> Path:
    """A copy of a GGUF file with other metadata (text or integer) and further tensors."""
    source = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, str(changes.get("general.architecture", "llama")))
    kept = {name: field for name, field in source.fields.items() if not name.startswith("GGUF.")}
    for name, field in kept.items():
        if name not in changes and name != "general.architecture":
            kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), kind, inner)
    for name, value in changes.items():
        if name != "general.architecture":
            kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
            writer.add_key_value(name, value, kind)
    for tensor in source.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, values in more.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


STORED = {"f32": torch.float32, "f16": torch.float16, "q8_0": torch.float32}


@pytest.mark.parametrize(("outtype", "dtype"), STORED.items())
def test_what_was_exported_is_read_back(outtype: str, dtype: torch.dtype, text_export: Path, tmp_path: Path) -> None:
    model, file = text_export.parent / "model", text_export / f"model-{outtype}.gguf"
    folder = unpacked(file)
    before, after = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert {value.dtype for value in after.values()} == {dtype}
    for name, value in before.items():
        if outtype == "q8_0" and value.dim() == 2:
            blocks = value.reshape(-1, 32)  # each rounds to its greatest ÷ 127, which is stored as float16
            step = (blocks.abs().amax(1, keepdim=True) / 127).expand_as(blocks).reshape(value.shape)
            assert ((after[name] - value).abs() <= step * 0.5 + value.abs() * 2**-10 + 1e-9).all(), name
        else:
            assert torch.equal(after[name].float(), value.to(dtype).float()), name
    first, second = load_config(str(model)), load_config(str(folder))
    for name in ("rms_norm_eps", "rope_parameters", "head_dim", "num_key_value_heads", "max_position_embeddings"):
        assert getattr(first, name) == getattr(second, name)
    write_task(tmp_path / "devset.csv", random.Random(0), count=20, references=1, held_out=False)
    prompts = [sections(example, "").before[-1] for example in load("e2e_nlg", tmp_path, "dev")]
    one, other = (AutoTokenizer.from_pretrained(place) for place in (model, folder))
    for text in [*TEXTS, *prompts, " a", "two\n\nbreaks  £5", "Ü漢", ""]:
        assert one(text)["input_ids"] == other(text)["input_ids"]
        assert one.decode(one(text)["input_ids"]) == other.decode(other(text)["input_ids"])


def test_it_is_unpacked_once_and_computes_what_the_model_computes(
    text_export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = text_export / "model-f32.gguf"
    folder = unpacked(file)
    record = json.loads((folder / "gguf.json").read_text())
    assert (record["file"], record["type"]) == (file.name, "F32") and len(record["sha256"]) == 64
    assert folder.name == file.stem and not list(folder.parent.glob("*.tmp*"))
    ids = torch.arange(3, 60)[None]
    original, own = load_model(str(text_export.parent / "model"), torch.float32), load_model(str(file), torch.float32)
    assert torch.equal(original(ids).logits, own(ids).logits)
    models.say.cache_clear()
    capsys.readouterr()
    monkeypatch.setattr(models, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert unpacked(file) == unpacked(file) == folder
    assert capsys.readouterr().out.count("weights dequantized from F32") == 1


@pytest.mark.parametrize("name", list(COMMANDS))
def test_no_command_is_left_with_a_gguf_as_its_model(name: str, text_export: Path) -> None:
    file = str(text_export / "model-f32.gguf")
    folder = str(unpacked(Path(file)))

    def given(config: Any) -> Any:
        """Every option that may name a model, set to the file."""
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        nested = {key: given(value) for key, value in fields.items() if dataclasses.is_dataclass(value)}
        kinds = {field.name: field.metadata.get("path") for field in dataclasses.fields(config)}
        asked = {key: file for key, kind in kinds.items() if kind in MODELS and not isinstance(fields[key], list)}
        return dataclasses.replace(config, **nested, **asked)

    values = [option.default for option in options_of(unpacked_models(given(COMMANDS[name].config)))]
    assert file not in values
    assert any(option.path in ("model",) for option in options_of(COMMANDS[name].config)) <= (folder in values)


def test_a_run_on_a_gguf_names_it(text_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, rows = text_export / "model-q8_0.gguf", tmp_path / "rows.csv"
    write_task(rows, random.Random(0), count=8, references=1, held_out=False)
    options = f"--task e2e_nlg --data_path {rows} --max_seq_length 512 --val_fraction 0 --max_steps 1 --lora_r 2"
    assert cli.main(["train", "--model_name", str(file), *options.split(), "-o", str(tmp_path / "run")]) == 0
    assert "weights dequantized from Q8_0" in capsys.readouterr().out or models.say.cache_info().currsize
    entry = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["train"]
    assert [row["gguf"]["type"] for row in entry["inputs"].values() if "gguf" in row] == ["Q8_0"]
    base = Path(json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert AutoModelForCausalLM.from_pretrained(base).num_parameters() > 0, "and any other program finds it there"
    assert cli.main(["merge", str(tmp_path / "run"), "-o", str(tmp_path / "merged")]) == 0


def damaged(export: Path, place: Path) -> dict[str, tuple[Path, str]]:
    """Kind → a file that is no model to work with, and what is said of it."""
    file = export / "model-f16.gguf"
    cut, other = place / "cut.gguf", place / "other.gguf"
    cut.write_bytes(file.read_bytes()[:-4000])
    other.write_bytes(b"PK\x03\x04" * 100)
    names = ("part-00001-of-00002", "projector", "lora", "unknown", "scaled")
    paths = {name: place / f"{name}.gguf" for name in names}
    changes: list[dict[str, Any]] = [
        {"split.count": 2},
        {"general.architecture": "clip", "general.type": "mmproj"},
        {"general.type": "adapter"},
        {"general.architecture": "grok"},
        {"llama.rope.scaling.type": "yarn"},
    ]
    for path, change in zip(paths.values(), changes, strict=True):
        rewritten(file, path, change)
    said = ("llama-gguf-split", "mmproj", "'adapter', not a model", "architecture 'grok'", "yarn")
    return {
        "cut": (cut, "not a whole GGUF file"),
        "other": (other, "not a whole GGUF file"),
        **{name: (path, text) for (name, path), text in zip(paths.items(), said, strict=True)},
    }


def test_what_is_no_whole_model_is_refused_before_anything_is_made(
    text_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path / "rows.csv", random.Random(0), count=4, references=1, held_out=False)
    for kind, (file, text) in damaged(text_export, tmp_path).items():
        line = ["finetune", "--model_name", str(file), "--task", "e2e_nlg", "--data_path", str(tmp_path / "rows.csv")]
        assert cli.main([*line, "-o", str(tmp_path / "out")]) == DataError.exit_code, kind
        said = capsys.readouterr().err
        assert str(file) in said and text in said, kind
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
    # a dry run of a good one says what it would do, and unpacks nothing
    line = [
        "evaluate",
        str(text_export / "model-f32.gguf"),
        "--task",
        "e2e_nlg",
        "--data_path",
        str(tmp_path / "rows.csv"),
    ]
    assert cli.main([*line, "--dry_run"]) == 0
    assert "model-f32.gguf" in capsys.readouterr().out and not (tmp_path / "cache").exists()


def test_without_the_gguf_package_it_is_named(
    text_export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text("mr,ref\nname[x],x\n")
    (tmp_path / "model.gguf").write_bytes((text_export / "model-f32.gguf").read_bytes())
    models.reader_class.cache_clear()
    hide_modules(monkeypatch, ["gguf"])
    line = ["evaluate", str(tmp_path / "model.gguf"), "--task", "e2e_nlg", "--data_path", str(tmp_path / "rows.csv")]
    assert cli.main(line) == 2
    assert "rankwise[device]" in capsys.readouterr().err


def test_what_transformers_drops_is_restored_or_refused(
    text_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 3's rope scaling is a tensor in a GGUF; transformers' own function is the oracle."""
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    file = text_export / "model-f32.gguf"
    plain = load_config(str(text_export.parent / "model"))
    scaling = {**models.LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}
    theta = plain.rope_parameters["rope_theta"]
    scaled = LlamaConfig(**plain.to_dict() | {"rope_parameters": {**scaling, "rope_theta": theta}})
    width = plain.head_dim
    usual = 1 / theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    factors = (usual / ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))[0]).numpy()
    assert factors.min() == pytest.approx(1) and factors.max() == pytest.approx(32, rel=1e-5)
    read = load_config(str(rewritten(file, tmp_path / "llama3.gguf", {}, {models.ROPE: factors})))
    other = ROPE_INIT_FUNCTIONS["llama3"](read, torch.device("cpu"))[0]
    assert torch.allclose(other, ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))[0], rtol=1e-4)
    assert read.rope_parameters["rope_type"] == "llama3"
    with pytest.raises(DataError, match="not as Llama 3 does"):
        unpacked(rewritten(file, tmp_path / "longrope.gguf", {}, {models.ROPE: factors[::-1].copy() + 0.5}))
    extra = {"blk.0.attn_q.bias": np.ones(GGUFFile(file).tensors["blk.0.attn_q.weight"].shape[0], dtype=np.float32)}
    with pytest.raises(DataError, match="this would be another model"):
        unpacked(rewritten(file, tmp_path / "biased.gguf", {}, extra))
    with pytest.raises(DataError, match="lacks weights"):
        unpacked(rewritten(file, tmp_path / "lacking.gguf", {}, drop="blk.1.ffn_up.weight"))
    assert [folder.name for folder in (tmp_path / "cache" / "gguf").glob("*/*") if folder.is_dir()] == ["llama3"]


def test_a_type_is_named_as_llama_cpp_names_it(text_export: Path, tmp_path: Path) -> None:
    kinds: Callable[[Path], str] = lambda path: models.type_of(GGUFFile(path))  # noqa: E731
    file = text_export / "model-q8_0.gguf"
    assert kinds(rewritten(file, tmp_path / "k.gguf", {"general.file_type": 15})) == "Q4_K_M"
    assert kinds(rewritten(file, tmp_path / "odd.gguf", {"general.file_type": 999})) == "Q8_0", "of most bytes"
