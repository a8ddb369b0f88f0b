"""What each check of `export` is for: files of a converter that goes wrong, on the command's path, and exit 6.

The converter's place is taken by one that gives the files of a sound export (conftest.py), changed by a fault. What is
wrong in the float32 file is wrong in all of them: rounded from it, as a converter would.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rankwise.cli import main
from rankwise.files.adapter import LoraPair
from rankwise.gguf import lora, metadata, view
from rankwise.gguf.converter import Conversion, Converter
from rankwise.gguf.metadata import Vocabulary
from rankwise.gguf.splitting import SCORES
from rankwise.models.load import load_model

gguf = pytest.importorskip("gguf")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from shipbench_gguf import Draft, altered  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Fault = Callable[[Draft], Any]
Export = Callable[..., tuple[int, str]]
QUERIES, KEYS, VALUES, OUT = (f"blk.0.attn_{name}.weight" for name in ("q", "k", "v", "output"))
UP, NORM, EMBEDDING = "blk.1.ffn_up.weight", "blk.0.attn_norm.weight", "token_embd.weight"
ALL = ("f32", "f16", "q8_0")


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    """Run the command on the model beside a finished export; its exit code and what it says went wrong.

    text, vision: what goes wrong in the files of the text model, and of the vision side. only: forms in which it does.
    """

    def run(
        sound: Path, *words: str, text: Fault | None = None, vision: Fault | None = None, only: tuple[str, ...] = ALL
    ) -> tuple[int, str]:
        def convert_all(self: Converter, model: Path, jobs: list[Conversion], name: str) -> None:
            for job in jobs:
                job.outfile.parent.mkdir(parents=True, exist_ok=True)
                own, fault = sound / job.outfile.name, vision if job.mmproj else text
                if fault is None or job.outtype not in only:
                    shutil.copyfile(own, job.outfile)
                elif only == ALL:
                    rounded_again(own, sound / job.outfile.name.replace(job.outtype, "f32"), fault, job.outfile)
                else:
                    with altered(own, job.outfile) as draft:
                        fault(draft)

        monkeypatch.setattr(Converter, "convert_all", convert_all)
        base, out = sound.parent / "base", tmp_path / "out"
        code = main(["export", str(sound.parent / "model"), "--base_model", str(base), "-o", str(out), *words])
        assert code == 0 or not (out / "export.json").exists(), "nothing wrong bears the name"
        shutil.rmtree(out, ignore_errors=True)
        return code, capsys.readouterr().err

    return run


def rounded_again(own: Path, exact: Path, fault: Fault, target: Path) -> None:
    """The fault made on float32 values, and those written in each tensor's own type."""
    source, draft = Draft(exact), Draft(own)
    fault(source)
    kinds = {name: kind for name, (_, kind) in draft.tensors.items()}
    draft.values, draft.types, draft.tensors = source.values, source.types, {}
    for name, (values, kind) in source.tensors.items():
        draft.tensors[name] = (values, kinds.get(name, kind))
        draft.put(name, values)
    draft.write(target)


def changed(name: str, change: Callable[[Any], Any]) -> Fault:
    return lambda draft: draft.put(name, change(draft.floats(name)))


def stray(name: str, *shape: int) -> Fault:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return lambda draft: draft.tensors.update({name: (values, gguf.GGMLQuantizationType.F32)})


def in_halves(weight: Any, heads: int) -> Any:
    """llama.cpp's pairs of a head back in transformers' two halves."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def in_pairs(weight: Any, heads: int) -> Any:
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def test_sound_files_pass(text_export: Path, vision_export: Path, export: Export) -> None:
    for sound in (text_export, vision_export):
        assert export(sound, "--outtype", "f32,f16,q8_0", text=lambda draft: None, vision=lambda draft: None) == (0, "")


# --- every tensor of the float32 file is the checkpoint's ------------------------------------------------------------

TEXT_FAULTS: dict[str, tuple[Fault, str]] = {
    "another tensor": (lambda draft: draft.swap(UP, UP.replace("up", "gate")), "ffn_"),
    "rows turned round": (changed(UP, lambda weight: weight[::-1]), f"{UP} is not"),
    "transposed": (changed(OUT, lambda weight: weight.T), f"{OUT} is not"),
    "one value": (changed(UP, lambda weight: weight + 1e-6 * (np.arange(weight.size).reshape(weight.shape) == 7)), UP),
    "queries as transformers has them": (changed(QUERIES, lambda weight: in_halves(weight, 8)), f"{QUERIES} is not"),
    "keys of half the heads": (changed(KEYS, lambda weight: in_pairs(in_halves(weight, 8), 4)), f"{KEYS} is not"),
    "values rotated": (changed(VALUES, lambda weight: in_pairs(weight, 8)), f"{VALUES} is not"),
    "a norm plus one": (changed(NORM, lambda weight: weight + 1), f"{NORM} is not"),
    "a bias from nowhere": (stray("blk.0.attn_q.bias", 128), "blk.0.attn_q.bias is in no tensor"),
    "a matrix from nowhere": (stray("blk.0.ffn_gate_inp.weight", 32, 128), "ffn_gate_inp.weight is in no tensor"),
    "fewer tokens": (changed(EMBEDDING, lambda weight: weight[:-32]), f"{EMBEDDING} is not"),
    "a tensor left out": (lambda draft: draft.tensors.pop(UP), "in no GGUF file: model.layers.1.mlp.up_proj.weight"),
}
VISION_FAULTS: dict[str, tuple[Fault, str]] = {
    "queries and keys": (lambda draft: draft.swap("v.blk.0.attn_q.weight", "v.blk.0.attn_k.weight"), "v.blk.0.attn_"),
    "colours": (changed("v.patch_embd.weight", lambda weight: weight[:, ::-1]), "v.patch_embd.weight is not"),
    "places": (changed("v.position_embd.weight", lambda weight: weight[::-1]), "v.position_embd.weight is not"),
    "transposed": (changed("v.blk.0.attn_out.weight", lambda weight: weight.T), "v.blk.0.attn_out.weight is not"),
    "the projector's rows": (changed("mm.model.fc.weight", lambda weight: weight[::-1]), "mm.model.fc.weight is"),
    "a bias from nowhere": (stray("mm.model.fc.bias", 128), "mm.model.fc.bias is in no tensor"),
    "a tensor left out": (lambda draft: draft.tensors.pop("v.blk.1.ffn_up.weight"), "in no GGUF file: "),
}


@pytest.mark.parametrize("name", TEXT_FAULTS)
def test_a_text_model_that_is_not_the_checkpoint(name: str, text_export: Path, export: Export) -> None:
    fault, said = TEXT_FAULTS[name]
    code, error = export(text_export, text=fault)
    assert code == 6 and said in error


@pytest.mark.parametrize("name", VISION_FAULTS)
def test_a_vision_side_that_is_not_the_checkpoint(name: str, vision_export: Path, export: Export) -> None:
    fault, said = VISION_FAULTS[name]
    code, error = export(vision_export, vision=fault)
    assert code == 6 and said in error


# --- the other files are the float32 one, rounded --------------------------------------------------------------------


def nearly(weight: Any) -> Any:
    """One entry of a block off by a little more than its rounding."""
    flat = weight.copy().reshape(-1)
    place = int(np.abs(flat[:32]).argmax())
    flat[place] *= 1 + 2**-6
    return flat.reshape(weight.shape)


ROUNDED = {
    "another tensor": (lambda draft: draft.swap(UP, UP.replace("up", "gate")), "not the values that were converted"),
    "an entry": (changed(UP, nearly), "not the values that were converted"),
    "nothing at all": (changed(NORM, lambda weight: weight * np.nan), "not the values that were converted"),
    "left out": (lambda draft: draft.tensors.pop(UP), "missing: blk.1.ffn_up.weight"),
    "put in": (stray("blk.0.attn_q.bias", 128), "unknown: blk.0.attn_q.bias"),
    "cut": (changed(UP, lambda weight: weight[:-1]), "of another shape: blk.1.ffn_up.weight"),
}


@pytest.mark.parametrize("form", ["f16", "q8_0"])
@pytest.mark.parametrize("name", ROUNDED)
def test_a_form_that_is_not_the_float32_file(name: str, form: str, text_export: Path, export: Export) -> None:
    fault, said = ROUNDED[name]
    code, error = export(text_export, text=fault, only=(form,))
    assert code == 6 and f"model-{form}.gguf" in error and said in error


def test_a_type_that_was_not_asked_for(text_export: Path, tmp_path: Path, export: Export) -> None:
    sound = Path(shutil.copytree(text_export.parent, tmp_path / "sound")) / "export"
    shutil.copyfile(sound / "model-q8_0.gguf", sound / "model-f16.gguf")
    code, error = export(sound, "--outtype", "f16")
    assert code == 6 and "of a type that f16 does not have" in error


def test_a_file_that_is_cut_off(text_export: Path, tmp_path: Path, export: Export) -> None:
    sound = Path(shutil.copytree(text_export.parent, tmp_path / "sound")) / "export"
    file = sound / "model-q8_0.gguf"
    file.write_bytes(file.read_bytes()[:-4096])
    code, error = export(sound)
    assert code == 6 and "model-q8_0.gguf: not a whole GGUF file" in error


# --- the tuning is in it -------------------------------------------------------------------------------------------


def test_the_base_under_the_merged_models_name(text_export: Path, tmp_path: Path, export: Export) -> None:
    """The merge wrote nothing: base and model are one, and so are their files."""
    sound = Path(shutil.copytree(text_export.parent, tmp_path / "sound")) / "export"
    shutil.rmtree(sound.parent / "base")
    shutil.copytree(sound.parent / "model", sound.parent / "base")
    code, error = export(sound)
    assert code == 6 and "no tensor differs from the base" in error


def test_a_tuning_that_rounding_swallows(
    text_export: Path, tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every entry within its rounding, and yet all of them the base's: a change below half a step of the type, of which
    a writer that starts from the base keeps nothing."""
    sound = Path(shutil.copytree(text_export.parent, tmp_path / "sound")) / "export"
    tensors = load_file(sound.parent / "base" / "model.safetensors")
    key, name = "model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"
    exact = torch.from_numpy(Draft(sound / "model-f32.gguf").floats(name))
    half = exact.half().float()
    tensors[key] = half + (half - exact) * 1e-3  # rounds to the same float16; the model lies between it and the base
    save_file(tensors, sound.parent / "base" / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_file(sound.parent / "model" / "model.safetensors")[key], exact)
    code, error = export(sound, "--outtype", "f16")
    assert code == 6 and f"{name}: nearer to the base's weights than to the tuned ones" in error


# --- what it states about the tokenizer ------------------------------------------------------------------------------

TOKENS = "tokenizer.ggml.tokens"


def stated(key: str, value: Any) -> Fault:
    return lambda draft: draft.__setitem__(key, value)


def edited(key: str, place: int, value: Any) -> Fault:
    def fault(draft: Draft) -> None:
        draft[key] = [value if number == place else one for number, one in enumerate(draft[key])]

    return fault


TOKENIZER = {
    "a token": (edited(TOKENS, 300, "changed"), "other tokens at 1 id, the first is 300"),
    "fewer tokens": (lambda draft: stated(TOKENS, draft[TOKENS][:-1])(draft), "tokens where the tokenizer has"),
    "a special token as text": (edited("tokenizer.ggml.token_type", 5, 1), "would be read as plain text"),
    "no kinds of tokens": (lambda draft: draft.remove("tokenizer.ggml.token_type"), "would be read as plain text"),
    "a score": (edited(SCORES, 300, -1e3), "other scores than the tokenizer's at 1 id, the first is 300"),
    "the start token": (stated("tokenizer.ggml.bos_token_id", 0), "start token 0 instead of"),
    "the end token": (stated("tokenizer.ggml.eos_token_id", 0), "end token 0 instead of"),
    "the padding token": (stated("tokenizer.ggml.padding_token_id", 0), "padding token 0 instead of"),
    "a start token put in": (stated("tokenizer.ggml.add_bos_token", True), "it adds a start token, and the tokenizer"),
    "nothing about a start token": (lambda draft: draft.remove("tokenizer.ggml.add_bos_token"), "leaves open whether"),
    "an end token put in": (stated("tokenizer.ggml.add_eos_token", True), "it says add_eos_token True"),
    "a space in front": (stated("tokenizer.ggml.add_space_prefix", True), "puts a space before every text"),
    "the template": (stated("tokenizer.chat_template", "{{ other }}"), "its chat template is not the tokenizer's"),
    "no template": (lambda draft: draft.remove("tokenizer.chat_template"), "its chat template is not the tokenizer's"),
}


@pytest.mark.parametrize("name", TOKENIZER)
@pytest.mark.parametrize("only", [ALL, ("q8_0",)], ids=["everywhere", "q8_0"])
def test_another_tokenizer(name: str, only: tuple[str, ...], vision_export: Path, export: Export) -> None:
    fault, said = TOKENIZER[name]
    code, error = export(vision_export, text=fault, only=only)
    assert code == 6 and said in error and "model-f32.gguf" not in error.split(":")[0] * (only != ALL)


def byte_level(folder: Path, texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in a model folder, in place of its SentencePiece one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(folder)
    return fast


def test_merges_in_another_order(text_export: Path, tmp_path: Path, export: Export) -> None:
    """Pieces alone do not say how byte-level BPE splits a text."""
    sound = Path(shutil.copytree(text_export.parent, tmp_path / "sound")) / "export"
    byte_level(sound.parent / "model", ["The Vaults pub near Café Adriatic has a 5 star rating."])
    own = Vocabulary.of(sound.parent / "model")
    assert len(own.merges) == len(own.tokens) - 256

    def as_converted(draft: Draft) -> None:
        for key in [key for key in draft.values if key.startswith("tokenizer.")]:
            draft.remove(key)
        texts, numbers = (
            [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING],
            [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32],
        )
        draft.types |= {TOKENS: texts, "tokenizer.ggml.merges": texts, "tokenizer.ggml.token_type": numbers}
        draft[TOKENS] = [*own.tokens, *(f"[PAD{place}]" for place in range(len(own.tokens), 400))]
        draft["tokenizer.ggml.token_type"], draft["tokenizer.ggml.merges"] = [1] * 400, list(own.merges)
        draft["tokenizer.ggml.model"], draft["tokenizer.ggml.add_bos_token"] = "gpt2", False
        draft["tokenizer.ggml.pre"] = "gpt-2"

    def by_default(draft: Draft) -> None:
        as_converted(draft)
        draft["tokenizer.ggml.pre"] = "default"

    def reordered(draft: Draft) -> None:
        as_converted(draft)
        first, second, *rest = draft["tokenizer.ggml.merges"]
        draft["tokenizer.ggml.merges"] = [second, first, *rest]

    assert export(sound, text=as_converted) == (0, "")
    code, error = export(sound, text=reordered)
    assert code == 6 and "merges are not the tokenizer's" in error
    code, error = export(sound, text=by_default)
    assert code == 6 and "it names no pre-tokenizer" in error


def test_a_second_form_of_the_tokenizer_that_disagrees(text_export: Path, tmp_path: Path, export: Export) -> None:
    sound = Path(shutil.copytree(text_export.parent, tmp_path / "sound")) / "export"
    file = sound.parent / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["▁the"], vocabulary["▁p"] = vocabulary["▁p"], vocabulary["▁the"]
    file.write_text(json.dumps(content))
    code, error = export(sound)
    assert code == 6 and "tokenizer.json and tokenizer.model disagree on" in error


def test_texts_that_llama_cpp_splits_otherwise(
    text_export: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that no key of the tokenizer contradicts, since none is known: Unigram's, say."""
    monkeypatch.setattr(metadata, "piece_scores", lambda *_: {})
    code, error = export(text_export, text=lambda draft: draft.__setitem__(SCORES, draft[SCORES][::-1]))
    assert code == 6 and "llama.cpp would split '" in error


def test_a_converter_that_is_told_nothing(
    vision_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real one, on the folder as it is: llama.cpp would add a start token, and read special tokens as text."""
    monkeypatch.setattr(view, "tokenizer_change", lambda *_: ({}, []))
    words = ["--outtype", "f16", "--mmproj", "False", "-o", str(tmp_path / "out")]
    assert main(["export", str(vision_export.parent / "model"), *words]) == 6
    error = capsys.readouterr().err
    assert "start token" in error and "would be read as plain text" in error


# --- the numbers beside the tensors --------------------------------------------------------------------------------

NUMBERS = {
    "text": {
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1.00002e-6,
        "llama.rope.freq_base": 1e4 * 1.00002,
        "llama.rope.scaling.factor": 4.0,
    },
    "vision": {
        "clip.vision.block_count": 2,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 32,
        "clip.vision.attention.head_count": 8,
        "clip.vision.attention.layer_norm_epsilon": 1e-5,
        "clip.vision.patch_size": 16,
        "clip.vision.image_size": 128,
        "clip.vision.image_mean": [0.4, 0.4, 0.40002],
        "clip.vision.image_std": [0.25, 0.25, 0.250005],
        "clip.vision.projector.scale_factor": 4,
        "clip.vision.preproc_image_size": 128,
        "clip.use_gelu": False,
        "clip.use_silu": True,
    },
}


@pytest.mark.parametrize(("side", "key"), [(side, key) for side, keys in NUMBERS.items() for key in keys])
def test_another_number_beside_the_tensors(side: str, key: str, vision_export: Path, export: Export) -> None:
    fault = stated(key, NUMBERS[side][key])
    if key.endswith("scaling.factor"):
        fault = lambda draft: (draft.types.update({key: [gguf.GGUFValueType.FLOAT32]}), stated(key, 4.0)(draft))  # noqa: E731
    code, error = export(vision_export, **{side: fault}, only=("q8_0",))
    assert code == 6 and f"not the model's config: {key} is" in error


# --- an adapter ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(text_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers' worth of sites of one shape and rank, with scales of their own."""
    base, folder = text_export.parent / "model", tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 3})
    model = get_peft_model(load_model(str(base), torch.float32), config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora_file(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora")
    assert main(["export", "--adapter_gguf", str(adapter), "--name", "sound", "-o", str(out)]) == 0
    return out / "sound-lora-f32.gguf"


def of_half(name: str, half: str, change: Callable[[Any], Any]) -> Fault:
    return changed(f"{name}.lora_{half}", change)


def without(name: str) -> Fault:
    return lambda draft: [draft.tensors.pop(f"{name}.lora_{half}") for half in "ab"]


def exchanged(first: str, second: str) -> Fault:
    return lambda draft: [draft.swap(f"{first}.lora_{half}", f"{second}.lora_{half}") for half in "ab"]


LORA: dict[str, tuple[Fault, str]] = {
    "another scale": (of_half(VALUES, "b", lambda factor: 1.01 * factor), "not the adapter's factors"),
    "another A": (of_half(VALUES, "a", lambda factor: factor[::-1]), "not the adapter's factors"),
    "another layer's": (exchanged(VALUES, VALUES.replace("0", "1")), "not the adapter's factors"),
    "queries not reordered": (of_half(QUERIES, "b", lambda factor: in_halves(factor, 8)), "not the adapter's factors"),
    "queries by other heads": (
        of_half(QUERIES, "b", lambda factor: in_pairs(in_halves(factor, 8), 4)),
        "not the adapter's factors",
    ),
    "values reordered": (of_half(VALUES, "b", lambda factor: in_pairs(factor, 8)), "not the adapter's factors"),
    "a site less": (without(VALUES), "5 of the adapter's 6 sites were written"),
    "another alpha": (stated("adapter.lora.alpha", 5.0), "alpha is 5.0, not 4"),
}


@pytest.mark.parametrize("name", LORA)
def test_an_adapter_file_that_is_not_the_adapter(
    name: str,
    adapter: Path,
    lora_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault, said = LORA[name]

    def convert_adapter(self: Converter, folder: Path, base: Path, outfile: Path) -> Path:
        with altered(lora_file, outfile) as draft:
            fault(draft)
        return outfile

    monkeypatch.setattr(Converter, "convert_adapter", convert_adapter)
    assert main(["export", "--adapter_gguf", str(adapter), "-o", str(tmp_path / "out")]) == 6
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_scales_that_are_not_folded_into_b(
    adapter: Path,
    lora_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Folded wrongly before the converter gets them: what it writes is what it was given."""

    def convert_adapter(self: Converter, folder: Path, base: Path, outfile: Path) -> Path:
        given = load_file(folder / "adapter_model.safetensors")
        with altered(lora_file, outfile) as draft:
            for site, name in (("q_proj", "attn_q"), ("v_proj", "attn_v")):
                for layer in range(3):
                    factor = given[f"base_model.model.model.layers.{layer}.self_attn.{site}.lora_B.weight"].numpy()
                    turned = in_pairs(factor, 8) if site == "q_proj" else factor
                    draft.put(f"blk.{layer}.{name}.weight.lora_b", turned)
        return outfile

    monkeypatch.setattr(Converter, "convert_adapter", convert_adapter)
    words = ["export", "--adapter_gguf", str(adapter), "-o", str(tmp_path / "out")]
    assert main(words) == 0
    right = lora.folded

    def off(pair: LoraPair, largest: int) -> LoraPair:
        found = right(pair, largest)
        return replace(found, lora_B=1.00001 * found.lora_B)

    monkeypatch.setattr(lora, "folded", off)
    assert main(words) == 6
    assert "not the adapter's factors" in capsys.readouterr().err
