"""Laws of `export`: what bears the final name is the checkpoint, for llama.cpp as for transformers, or nothing does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import exported
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from rankwise.cli import main
from rankwise.data.device import DeviceTarget, read_target
from rankwise.device.llama.runtime import LlamaServer
from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.files.atomic import read_object, sha256, write_json
from rankwise.files.checkpoint import open_checkpoint
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.command import describe, run
from rankwise.gguf.converter import Conversion, Converter, own_converter
from rankwise.gguf.export import compare_tensors
from rankwise.gguf.lora import check_adapter, fold_scales, read_plain, write_adapter_gguf
from rankwise.gguf.metadata import (
    Vocabulary,
    check_forms,
    check_numbers,
    check_tokenizer,
    config_of,
    text_numbers,
    vision_numbers,
)
from rankwise.gguf.plan import ExportPlan, plan_export, require_space
from rankwise.gguf.provenance import origins
from rankwise.gguf.reading import read_export
from rankwise.gguf.view import changes_for, model_view
from rankwise.models.load import load_model
from rankwise.options.commands import ExportConfig

pytest.importorskip("gguf")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TABLES = """
TEXT_MODEL_MAP = {"LlamaForCausalLM": "a", "VLlama3ForCausalLM": "a"}
MMPROJ_MODEL_MAP = {"SmolVLMForConditionalGeneration": "b"}
"""
HALF = """
import sys
def main():
    with open(sys.argv[sys.argv.index("--outfile") + 1], "w") as file:
        file.write("GG")
    raise OSError("half")
"""
# llama.cpp with a LoRA, in a process of its own: the likeliest next tokens of a prompt, by log-probability.
ASK = """
import json, sys, urllib.request, xllamacpp
model, lora, prompt = sys.argv[1:]
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = model, 256, 1, -1
info = xllamacpp.CommonAdapterLoraInfo()
info.path, info.scale = lora, 1.0
settings.lora_adapters = [info]
server = xllamacpp.Server(settings)
body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 8, "post_sampling_probs": False}
request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode())
request.add_header("Content-Type", "application/json")
with urllib.request.urlopen(request) as answer:
    (first,) = json.load(answer)["completion_probabilities"]
print(json.dumps({one["id"]: one["logprob"] for one in first["top_logprobs"]}), flush=True)
"""


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Converter:
    """A converter that knows our models and fails after writing half a file."""
    folder = tmp_path_factory.mktemp("failing")
    (folder / "conversion").mkdir()
    (folder / "conversion" / "__init__.py").write_text(TABLES)
    (folder / "convert_hf_to_gguf.py").write_text(HALF)
    return own_converter(folder, "--llama_cpp_dir")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.text_model(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.vision_model(tmp_path_factory.mktemp("vision") / "model")


@pytest.fixture
def copied(text: Path, tmp_path: Path) -> Path:
    """The text model, to be broken."""
    return Path(shutil.copytree(text, tmp_path / "copied"))


def planned(model: Path, converter: Converter, **options: Any) -> ExportPlan:
    return plan_export(ExportConfig(model=str(model), **{"outtype": ["q8_0"]} | options), converter)


# --- what a whole export holds -----------------------------------------------------------------------------------


def test_the_files_are_those_that_export_json_lists(vision_export: Path) -> None:
    found = read_export(vision_export)
    assert found.outtypes == exported.OUTTYPES
    for outtype in found.outtypes:
        files = found.content["files"][outtype]
        for kind, path in (("text", found.text(outtype)), ("mmproj", found.mmproj(outtype))):
            assert path and path.name.endswith(f"model-{outtype}.gguf")
            assert files["sha256"][kind] == sha256(path) and files["bytes"][kind] == path.stat().st_size
    assert not list(vision_export.glob(".*"))
    with pytest.raises(UsageError, match="no q4_k_m files"):
        found.text("q4_k_m")


def test_the_proof_covers_every_tensor_and_the_tuning(vision_export: Path, text_export: Path) -> None:
    for folder, kinds in ((vision_export, {"text", "mmproj"}), (text_export, {"text"})):
        content = read_export(folder).content
        proof = content["verification"]
        tensors = len(open_checkpoint(folder.parent / "model"))
        assert set(proof["checkpoint"]["tensors"]) == kinds
        assert sum(proof["checkpoint"]["tensors"].values()) == tensors and proof["checkpoint"]["left_out"] == []
        assert proof["checkpoint"]["how"]["text"]["rope order"] == 6  # q and k of three layers
        worst = {kind: max(one["largest_rms"] for one in each.values()) for kind, each in proof["errors"].items()}
        assert worst["f32"] == 0 and worst["f16"] < 3e-4 < worst["q8_0"] < 8e-3
        tuned = {name: one for name, one in proof["tuned"].items() if "q8_0" in name}
        (rows,) = tuned.values()
        assert rows["tensors"] == 3 * len(exported.TUNED) and rows["least_kept"] > 0.9


def test_tensors_that_stay_wider_are_listed(vision_export: Path) -> None:
    kept = read_export(vision_export).content["kept_wider"]
    assert set(kept["mmproj-model-q8_0.gguf"]) == {"v.patch_embd.weight", "v.position_embd.weight"}
    assert kept["model-q8_0.gguf"] == {}


def test_the_device_target_goes_along(vision_export: Path, text_export: Path) -> None:
    assert read_object(vision_export / "device.json")["image_size"] == 64
    assert not (text_export / "device.json").exists()


def test_missing_files_of_an_export_are_named(text_export: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_export, tmp_path / "export"))
    (folder / "model-q8_0.gguf").unlink()
    with pytest.raises(DataError, match=r"lacks model-q8_0\.gguf"):
        read_export(folder)
    write_json(folder / "export.json", {"format": "something else"})
    with pytest.raises(DataError, match="not an export of this version"):
        read_export(folder)
    with pytest.raises(DataError, match=r"export\.json: no such file; `rankwise export` makes it"):
        read_export(tmp_path)


# --- tampering (row 34) --------------------------------------------------------------------------------------------


def tampered(export: Path, name: str, tmp_path: Path) -> tuple[Path, Any]:
    """A copy of one GGUF file, and its reader for writing."""
    gguf = pytest.importorskip("gguf")
    copy = Path(shutil.copyfile(export / name, tmp_path / name))
    return copy, gguf.GGUFReader(copy, "r+")


def test_a_truncated_file_is_named(text_export: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copyfile(text_export / "model-f16.gguf", tmp_path / "model-f16.gguf"))
    copy.write_bytes(copy.read_bytes()[:-4096])
    with pytest.raises(VerificationError, match=r"model-f16\.gguf: not a whole GGUF"):
        GGUFFile(copy)


def test_swapped_projector_tensors_are_found(vision_export: Path, tmp_path: Path) -> None:
    copy, reader = tampered(vision_export, "mmproj-model-f32.gguf", tmp_path)
    by_name = {tensor.name: tensor.data for tensor in reader.tensors}
    one, other = by_name["v.blk.0.attn_q.weight"], by_name["v.blk.0.attn_k.weight"]
    first, second = one.copy(), other.copy()
    one[:], other[:] = second, first
    reader.data.flush()
    with pytest.raises(VerificationError, match=r"v\.blk\.0\.attn_[qk]\.weight is not model\.vision_model"):
        origins(GGUFFile(copy), open_checkpoint(vision_export.parent / "model"))


@pytest.mark.parametrize(
    ("name", "axis"), [("mm.model.fc.weight", 0), ("v.patch_embd.weight", 1), ("v.position_embd.weight", 0)]
)
def test_rows_and_colours_in_another_order_are_found(vision_export: Path, tmp_path: Path, name: str, axis: int) -> None:
    copy, reader = tampered(vision_export, "mmproj-model-f32.gguf", tmp_path)
    data = next(tensor for tensor in reader.tensors if tensor.name == name).data
    data[:] = np.flip(data, axis).copy()
    reader.data.flush()
    with pytest.raises(VerificationError, match=rf"{re.escape(name)} is "):
        origins(GGUFFile(copy), open_checkpoint(vision_export.parent / "model"))


def test_one_changed_scale_of_one_block_is_found(text_export: Path, tmp_path: Path) -> None:
    copy, reader = tampered(text_export, "model-q8_0.gguf", tmp_path)
    data = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight").data
    data[5, 1] ^= 0x04  # a bit of the exponent of the block's float16 scale
    reader.data.flush()
    with pytest.raises(VerificationError, match=r"blk\.1\.ffn_up\.weight"):
        compare_tensors(GGUFFile(copy), GGUFFile(text_export / "model-f32.gguf"), "q8_0")


# --- the tokenizer -------------------------------------------------------------------------------------------------


def test_llama_cpp_reads_prompts_as_transformers_does(vision_export: Path, text_export: Path) -> None:
    """Special tokens are tokens; the start token stands once: by the template here, added by the tokenizer there."""
    pytest.importorskip("xllamacpp")
    prompt = "<|im_start|>User: What colour?\n\nRed<end_of_utterance>\nAssistant:<fake_token_around_image><global-img>"
    for folder, spoken in ((vision_export, prompt), (text_export, "name[The Vaults], near[Café Adriatic]")):
        tokenizer = AutoTokenizer.from_pretrained(folder.parent / "model")
        with LlamaServer(read_export(folder).text("q8_0"), threads=1) as runtime:
            assert runtime.tokenize(spoken, add_special=True) == tokenizer(spoken)["input_ids"]
            evaluated = runtime.complete(spoken, max_new_tokens=1).prompt_tokens
        assert evaluated == len(tokenizer(spoken)["input_ids"])


def test_the_model_that_adds_no_start_token_says_so(vision_export: Path, text_export: Path) -> None:
    stated = {folder: GGUFFile(folder / "model-q8_0.gguf").metadata for folder in (vision_export, text_export)}
    assert stated[vision_export]["tokenizer.ggml.add_bos_token"] is False
    assert stated[text_export]["tokenizer.ggml.add_bos_token"] is True
    assert any("no start token" in note for note in read_export(vision_export).content["notes"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"add_bos": True}, "does not add a start token, and the tokenizer does"),
        ({"template": "{{ other }}"}, "chat template"),
        ({"eos": 0}, "end token 5 instead of 0"),
        ({"bos": 0}, "start token 3 instead of 0"),
        ({"pad": 0}, "padding token 4 instead of 0"),
        ({"tokens": ("<unk>", "changed")}, "other tokens at 1 id, the first is 1: '<s>' instead of 'changed'"),
        ({"tokens": ("a",) * 4000}, "tokens where the tokenizer has 4000"),
        ({"added": {300: "plain"}}, "1 added token would be read as plain text, the first is 'plain'"),
    ],
)
def test_metadata_of_another_tokenizer_is_found(vision_export: Path, other: dict[str, Any], message: str) -> None:
    file = GGUFFile(vision_export / "model-f16.gguf")
    own = Vocabulary.of(vision_export.parent / "model", sees=True)
    assert check_tokenizer(file, own)["chat_template"]
    with pytest.raises(VerificationError, match=message):
        check_tokenizer(file, replace(own, **other))


def test_two_forms_that_disagree_are_refused_with_a_text(copied: Path, failing: Converter) -> None:
    content = json.loads((copied / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, other = "▁the", "▁p"
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (copied / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(VerificationError, match=r"tokenizer\.json and tokenizer\.model disagree on 'The quick"):
        planned(copied, failing)


def test_a_real_tokenizer_in_both_forms_agrees(shared_data: Path) -> None:
    check_forms(shared_data / "model_configs" / "TinyLlama-1.1B-Chat-v1.0")


# --- the numbers beside the tensors --------------------------------------------------------------------------------

TEXT_NUMBERS = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
}
VISION_NUMBERS = {
    "clip.vision.block_count": 2,
    "clip.vision.embedding_length": 32,
    "clip.vision.feed_forward_length": 32,
    "clip.vision.attention.head_count": 8,
    "clip.vision.attention.layer_norm_epsilon": 1e-5,
    "clip.vision.patch_size": 16,
    "clip.vision.image_size": 128,
    "clip.vision.image_mean": 0.5,
    "clip.vision.image_std": 0.5,
    "clip.vision.projector.scale_factor": 4,
    "clip.vision.preproc_image_size": 128,
    "clip.use_gelu": False,
}


def restated(export: Path, name: str, tmp_path: Path, key: str, value: Any) -> GGUFFile:
    """A copy of a file in which the first value under a key is another one."""
    copy, reader = tampered(export, name, tmp_path)
    field = reader.fields[key]
    assert field.parts[field.data[0]][0] != value
    field.parts[field.data[0]][0] = value
    reader.data.flush()
    return GGUFFile(copy)


@pytest.mark.parametrize("key", TEXT_NUMBERS)
def test_a_text_model_of_other_numbers_is_found(vision_export: Path, tmp_path: Path, key: str) -> None:
    name, model = "model-f16.gguf", vision_export.parent / "model"
    sound = GGUFFile(vision_export / name)
    check_numbers(sound, text_numbers(sound, model))
    other = restated(vision_export, name, tmp_path, key, TEXT_NUMBERS[key])
    with pytest.raises(VerificationError, match=rf"{re.escape(key)} is [^;]+$"):
        check_numbers(other, text_numbers(other, model))


@pytest.mark.parametrize("key", VISION_NUMBERS)
def test_a_vision_tower_of_other_numbers_is_found(vision_export: Path, tmp_path: Path, key: str) -> None:
    name, model = "mmproj-model-f16.gguf", vision_export.parent / "model"
    target = read_target(vision_export)
    sound = GGUFFile(vision_export / name)
    wanted = vision_numbers(sound, model, target)
    check_numbers(sound, wanted)
    with pytest.raises(VerificationError, match=rf"{re.escape(key)} is [^;]+$"):
        check_numbers(restated(vision_export, name, tmp_path, key, VISION_NUMBERS[key]), wanted)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"rope.freq_base": 5e5}, "rope.freq_base is not stated, and 500000 in"),
        ({"rope.freq_base": 1e4, "attention.head_count_kv": 8}, None),
        ({"attention.head_count_kv": 2}, "head_count_kv is not stated, and 2 in"),
        ({"attention.layer_norm_rms_epsilon": 1e-6}, "epsilon is not stated"),
        ({"rope.scaling.factor": None}, "rope.scaling.factor is 4, and None in"),
    ],
)
def test_a_silent_key_is_what_llama_cpp_takes_for_it(
    wanted: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_head_count(8)
    writer.add_rope_scaling_factor(4.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    with pytest.raises(VerificationError, match=message) if message else nullcontext():
        check_numbers(file, wanted)


def test_of_an_unknown_family_only_what_means_the_same_everywhere_is_compared(text: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma2")
    writer.add_embedding_length(read_object(text / "config.json")["hidden_size"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert set(text_numbers(GGUFFile(tmp_path / "x.gguf"), text)) == {"embedding_length"}


def test_a_space_in_front_and_other_scores_are_found(vision_export: Path, text_export: Path, tmp_path: Path) -> None:
    own = Vocabulary.of(vision_export.parent / "model", sees=True)
    name, key = "model-f16.gguf", "tokenizer.ggml.add_space_prefix"
    with pytest.raises(VerificationError, match=r"puts a space before every text .* the tokenizer does not"):
        check_tokenizer(restated(vision_export, name, tmp_path, key, True), own)
    with pytest.raises(VerificationError, match=r"does not put a space before every text .* the tokenizer does"):
        check_tokenizer(GGUFFile(vision_export / name), replace(own, spaced=True))
    silent = Vocabulary.of(text_export.parent / "model")
    assert silent.spaced and check_tokenizer(GGUFFile(text_export / name), silent)
    copy, reader = tampered(vision_export, name, tmp_path)
    field = reader.fields["tokenizer.ggml.scores"]
    field.parts[field.data[300]][0] -= 1
    reader.data.flush()
    with pytest.raises(VerificationError, match=r"other scores than the tokenizer's at 1 id, the first is 300"):
        check_tokenizer(GGUFFile(copy), own)


# --- what the converter is told ------------------------------------------------------------------------------------


def view_of(model: Path, converter: Converter, target: DeviceTarget | None = None) -> dict[str, Any]:
    sees = "vision_config" in read_object(model / "config.json")
    changes = changes_for(model, converter, Vocabulary.of(model, sees), target, mmproj=sees)
    with model_view(model, changes, "mine") as view:
        assert (view / "model.safetensors").is_symlink()
        files = {path.name: read_object(path) for path in view.glob("*.json")}
    assert not view.exists()
    return files


def test_the_model_folder_is_shown_and_left_as_it_is(vision: Path, failing: Converter) -> None:
    before = {path.name: sha256(path) for path in vision.iterdir()}
    files = view_of(vision, failing)
    added = files["tokenizer_config.json"]["added_tokens_decoder"]
    assert added["8"] == {"content": "<global-img>", "special": True}
    assert files["tokenizer_config.json"]["add_bos_token"] is False
    assert before == {path.name: sha256(path) for path in vision.iterdir()}


def test_a_tower_without_a_name_gets_the_one_that_the_converter_wants(
    vision: Path, tmp_path: Path, failing: Converter
) -> None:
    model = Path(shutil.copytree(vision, tmp_path / "model"))
    config = read_object(model / "config.json")
    del config["text_config"]["architectures"], config["vision_config"]["layer_norm_eps"]
    write_json(model / "config.json", config)
    shown_config = view_of(model, failing)["config.json"]
    assert shown_config["text_config"]["architectures"] == ["VLlama3ForCausalLM"]
    assert shown_config["vision_config"]["layer_norm_eps"] == 1e-6  # the class's; the converter would guess 1e-5
    notes = planned(model, failing).changes.notes
    assert sum("language tower" in note or "layer_norm_eps" in note for note in notes) == 2


def test_the_devices_image_size_reaches_the_projector(vision: Path, failing: Converter) -> None:
    files = view_of(vision, failing, DeviceTarget(longest_edge=128))
    assert files["processor_config.json"]["image_processor"]["size"] == {"longest_edge": 128}
    kept = view_of(vision, failing, DeviceTarget(longest_edge=64))
    assert kept["processor_config.json"] == read_object(vision / "processor_config.json")


# --- refused before anything is written ----------------------------------------------------------------------------


def set_config(model: Path, **values: Any) -> Path:
    write_json(model / "config.json", read_object(model / "config.json") | values)
    return model


def test_unknown_architectures_are_named(copied: Path, failing: Converter) -> None:
    with pytest.raises(UsageError, match=r"GPTNeoXForCausalLM cannot be exported: llama\.cpp's converter"):
        planned(set_config(copied, architectures=["GPTNeoXForCausalLM"]), failing)
    with pytest.raises(UsageError, match="names no architecture"):
        planned(set_config(copied, architectures=None), failing)


def test_isaac_is_refused_by_name(copied: Path, failing: Converter) -> None:
    with pytest.raises(UsageError, match=r"IsaacForConditionalGeneration cannot be exported: llama\.cpp has no Isaac"):
        planned(set_config(copied, architectures=["IsaacForConditionalGeneration"]), failing)


def test_a_model_that_takes_depth_is_refused(copied: Path, failing: Converter) -> None:
    write_json(copied / "depth.json", {})
    with pytest.raises(UsageError, match=r"which llama\.cpp does not support"):
        planned(copied, failing)


def test_quantized_weights_adapters_and_other_folders_are_refused(
    copied: Path, tmp_path: Path, failing: Converter
) -> None:
    with pytest.raises(UsageError, match="quantized"):
        planned(set_config(copied, quantization_config={"load_in_4bit": True}), failing)
    write_json(copied / "adapter_config.json", {})
    with pytest.raises(UsageError, match="rankwise merge"):
        planned(copied, failing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no config\.json"):
        planned(tmp_path / "empty", failing)


def test_a_projector_is_only_for_models_that_see(text: Path, vision: Path, failing: Converter) -> None:
    with pytest.raises(UsageError, match="no vision_config"):
        planned(text, failing, mmproj=True)
    assert planned(vision, failing).kinds == ("text", "mmproj")
    assert planned(vision, failing, mmproj=False).kinds == ("text",)


def test_a_disk_without_room_is_said_before(text: Path, failing: Converter, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(text, failing)
    free = type("Usage", (), {"free": plan.bytes - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(DataError, match=r"GiB are free.*--no_verify"):
        require_space(plan, Path("exported"))
    assert replace(plan, verify=False).bytes < plan.bytes
    require_space(replace(plan, verify=False), Path("exported"))


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_failing_converter_leaves_no_folder_and_exits_6(
    text: Path, failing: Converter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["export", str(text), "-o", str(out), "--llama_cpp_dir", str(failing.folder)]
    assert main(words) == 6
    said = capsys.readouterr().err
    assert not out.exists() and str(text) in said and "rankwise-view" not in said


def test_an_earlier_export_survives_a_failing_one(
    text: Path, failing: Converter, text_export: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(text_export, tmp_path / "out"))
    write_json(out / "manifest.json", {"format": "rankwise-manifest/1", "stages": {"export": {}}})
    with pytest.raises(VerificationError, match="half"):
        run(ExportConfig(model=str(text), output_dir=str(out), llama_cpp_dir=str(failing.folder)))
    assert read_export(out).text("q8_0").read_bytes() == read_export(text_export).text("q8_0").read_bytes()


def test_a_folder_with_other_things_is_not_replaced(text: Path, failing: Converter, tmp_path: Path) -> None:
    (tmp_path / "thesis.md").write_text("mine")
    with pytest.raises(UsageError, match=r"holds other files \(thesis\.md"):
        run(ExportConfig(model=str(text), output_dir=str(tmp_path), llama_cpp_dir=str(failing.folder)))


def test_options_are_checked_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    for config, message in (
        (ExportConfig(), "needs a merged model"),
        (ExportConfig(model="x", outtype=[]), "needs a quantization type"),
        (ExportConfig(adapter_gguf="x", mmproj=True), "--mmproj"),
    ):
        with pytest.raises(UsageError, match=message):
            run(config)
    assert main(["export", "x", "--outtype", "q4"]) == 2
    assert "outtype takes f32, f16" in (said := capsys.readouterr().err) and "got 'q4'" in said


def test_a_dry_run_tells_what_would_happen(text: Path) -> None:
    lines = " ".join(describe(ExportConfig(model=str(text), install_converter=True)))
    assert "f16, q8_0" in lines and "compare every tensor" in lines and "download" in lines
    assert "compare" not in " ".join(describe(ExportConfig(model="later/merged", no_verify=True)))


def with_more_tokens(model: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<more-{number}>" for number in range(3)])
    tokenizer.save_pretrained(model)
    return "tokenizer has 403 tokens (its highest id + 1) and the model 400 rows"


def with_another_vocab_size(model: Path) -> str:
    write_json(model / "config.json", read_object(model / "config.json") | {"vocab_size": 416})
    return "has 400 rows and the config is of 416"


@pytest.mark.parametrize("damage", [with_more_tokens, with_another_vocab_size])
def test_lengths_are_compared_before_converting(
    damage: Callable[[Path], str], copied: Path, failing: Converter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, out = damage(copied), tmp_path / "out"
    assert main(["export", str(copied), "-o", str(out), "--llama_cpp_dir", str(failing.folder)]) == 3
    printed = capsys.readouterr()
    assert said in printed.err and "converting" not in printed.out and not out.exists()


def test_a_failed_proof_speaks_of_the_folder_that_was_asked_for(
    text: Path, converter: Converter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def convert_all(self: Converter, model: Path, jobs: Sequence[Conversion], name: str | None = None) -> None:
        for job in jobs:
            job.outfile.write_bytes(b"GGUF, cut off")

    monkeypatch.setattr(Converter, "convert_all", convert_all)
    words = ["export", str(text), "--outtype", "f32", "-o", str(tmp_path / "out")]
    assert main(words) == 6
    said = capsys.readouterr().err
    assert str(tmp_path / "out" / "model-f32.gguf") in said and ".tmp" not in said


@pytest.mark.slow
def test_the_command_end_to_end(
    vision_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], converter: Converter
) -> None:
    model, out = vision_export.parent / "model", tmp_path / "out"
    write_json(out.parent / "device.json", read_object(vision_export / "device.json"))
    words = ["export", str(model), "--outtype", "q8_0", "--name", "tiny", "-o", str(out), "--target", str(tmp_path)]
    assert main([*words, "--base_model", str(vision_export.parent / "base")]) == 0
    printed = capsys.readouterr().out
    assert "keeps at least" in printed and "tiny-q8_0.gguf" in printed and "2 tensors wider than q8_0" in printed
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    files = {"tiny-q8_0.gguf", "mmproj-tiny-q8_0.gguf", "export.json", "device.json"}
    assert names == files | {"manifest.json", "resolved_config.json"}
    manifest = read_object(out / "manifest.json")["stages"]["export"]
    assert manifest["converter"]["sha256"] == converter.sha256
    assert GGUFFile(out / "tiny-q8_0.gguf").tensors == GGUFFile(read_export(vision_export).text("q8_0")).tensors


# --- an adapter as GGUF --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(text_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA of several ranks and scales on the exported text model."""
    base, folder = text_export.parent / "model", tmp_path_factory.mktemp("adapter")
    patterns = {"rank_pattern": {"k_proj": 2, "down_proj": 8}, "alpha_pattern": {"q_proj": 12, "down_proj": 3}}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"], **patterns)
    model = get_peft_model(load_model(str(base), torch.float32), config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_file(
    adapter: Path, text_export: Path, converter: Converter, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    outfile = tmp_path_factory.mktemp("lora") / "lora.gguf"
    return write_adapter_gguf(adapter, text_export.parent / "model", outfile, converter)


def test_sites_of_a_vision_tower_are_refused_before_converting(
    vision: Path, failing: Converter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(r=2, target_modules=r".*(vision_model|text_model).*\.q_proj")
    model = get_peft_model(load_model(str(vision), torch.float32), config)
    model.peft_config["default"].base_model_name_or_path = str(vision)
    model.save_pretrained(tmp_path / "adapter")
    words = ["export", "--adapter_gguf", str(tmp_path / "adapter"), "--llama_cpp_dir", str(failing.folder)]
    assert main([*words, "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.search(r"adapter: (\d+) of its (\d+) sites lie outside the text model \(model\.vision_model", said)
    assert ".tmp" not in said and not (tmp_path / "out").exists()


def test_folding_keeps_every_delta(adapter: Path) -> None:
    plain = read_plain(adapter)
    folded = fold_scales(plain)
    for site, pair in plain.pairs.items():
        assert torch.allclose(folded.pairs[site].factors().product(), pair.factors().product(), atol=1e-6)
        assert folded.pairs[site].scale == 8 / pair.rank
    assert {pair.rank for pair in plain.pairs.values()} == {2, 4, 8}


def test_an_adapter_on_its_base_answers_as_peft_does(adapter: Path, adapter_file: Path, text_export: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = text_export.parent / "model"
    prompt = "The Vaults pub near"
    command = [sys.executable, "-c", ASK, str(read_export(text_export).text("f32")), str(adapter_file), prompt]
    answered = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ids = AutoTokenizer.from_pretrained(model)(prompt, return_tensors="pt")["input_ids"]
    base = load_model(str(model), torch.float32)
    with torch.inference_mode():
        plain = base(ids).logits[0, -1].log_softmax(-1)
        adapted = PeftModel.from_pretrained(base, str(adapter)).eval()(ids).logits[0, -1].log_softmax(-1)
    difference = max(abs(float(adapted[int(token)]) - value) for token, value in answered.items())
    effect = max(abs(float(plain[int(token)]) - value) for token, value in answered.items())
    assert difference < 5e-3 < 0.1 < effect


def test_another_adapters_factors_are_found(adapter: Path, adapter_file: Path, text_export: Path) -> None:
    file, config = GGUFFile(adapter_file), config_of(text_export.parent / "model")
    plain = read_plain(adapter)
    check_adapter(file, plain, config)
    site, pair = next(iter(plain.pairs.items()))
    with pytest.raises(VerificationError, match="not the adapter's factors"):
        check_adapter(file, replace(plain, pairs={**plain.pairs, site: replace(pair, lora_B=2 * pair.lora_B)}), config)
    with pytest.raises(VerificationError, match="9 of the adapter's 10 sites"):
        check_adapter(file, replace(plain, pairs={**plain.pairs, "model.vision.x": pair}), config)
