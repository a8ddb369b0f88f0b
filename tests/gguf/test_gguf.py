"""Laws of reading GGUF: every promised byte is there or it is an error; damage is told from rounding."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from rankwise.errors import VerificationError
from rankwise.files.checkpoint import Checkpoint, open_checkpoint
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.export import (
    changed_keys,
    compare_tensors,
    kept_wider,
    rounding,
    stored_otherwise,
    tuning_kept,
    tuning_of,
)
from rankwise.gguf.provenance import Origin, holds, origins, relation, require_complete, rope_order
from rankwise.gguf.reading import gguf_names

gguf = pytest.importorskip("gguf")

HEADS, HEADS_KV, WIDTH = 4, 2, 64
TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0"}
LAYER = "model.layers.0."
NAMES = {  # a Llama of one layer, and what llama.cpp calls its tensors
    "model.embed_tokens.weight": ("token_embd.weight", (96, WIDTH)),
    LAYER + "self_attn.q_proj.weight": ("blk.0.attn_q.weight", (WIDTH, WIDTH)),
    LAYER + "self_attn.k_proj.weight": ("blk.0.attn_k.weight", (WIDTH // 2, WIDTH)),
    LAYER + "mlp.down_proj.weight": ("blk.0.ffn_down.weight", (WIDTH, 2 * WIDTH)),
    LAYER + "input_layernorm.weight": ("blk.0.attn_norm.weight", (WIDTH,)),
}
ROTATED = {"blk.0.attn_q.weight": HEADS, "blk.0.attn_k.weight": HEADS_KV}


def write(path: Path, tensors: dict[str, Tensor], kind: str = "F32") -> Path:
    """A GGUF of a one-layer Llama by the gguf package; one-dimensional tensors stay F32, as the converter has it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS_KV)
    writer.add_chat_template("{{ messages }}")
    writer.add_token_list(["<unk>", "a", "b"])
    for name, tensor in tensors.items():
        stored = gguf.GGMLQuantizationType[kind if tensor.dim() > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, (_, shape) in NAMES.items()}


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As llama.cpp's converter writes a Llama."""
    named = {NAMES[key][0]: tensor for key, tensor in state.items()}
    return {name: rope_order(tensor, ROTATED[name]) if name in ROTATED else tensor for name, tensor in named.items()}


def checkpoint(folder: Path, state: dict[str, Tensor]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_tensors_come_back_as_the_package_decodes_them(tmp_path: Path, kind: str) -> None:
    tensors = converted(weights())
    file = GGUFFile(write(tmp_path / "x.gguf", tensors, kind))
    assert list(file.tensors) == list(tensors)
    for name, tensor in tensors.items():
        info, read = file.tensors[name], file.tensor(name)
        assert info.shape == tuple(tensor.shape) == tuple(read.shape)
        assert read.dtype == torch.float32 and info.type == (kind if tensor.dim() > 1 else "F32")
        assert bool(((read - tensor).abs() <= rounding(tensor, info.type) * 1.001).all())
    assert file.of_architecture("attention.head_count_kv") == HEADS_KV
    assert file.metadata["tokenizer.ggml.tokens"] == ["<unk>", "a", "b"]


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = GGUFFile(write(tmp_path / "x.gguf", converted(weights())))
    with pytest.raises(VerificationError, match=r"has no tensor blk\.7\.attn_q\.weight"):
        file.tensor("blk.7.attn_q.weight")


def test_every_truncation_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", converted(weights()), "Q8_0").read_bytes()
    generator, cut = random.Random(0), tmp_path / "cut.gguf"
    used = len(whole.rstrip(b"\0"))  # the file ends with padding that no tensor needs
    for length in [0, 3, 4, 20, used - 33, *(generator.randrange(used - 32) for _ in range(60))]:
        cut.write_bytes(whole[:length])
        with pytest.raises(VerificationError, match=r"cut\.gguf"):
            GGUFFile(cut)


def test_damage_is_an_error_of_ours_or_harmless(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", converted(weights())).read_bytes()
    generator, refused = random.Random(1), 0
    for _ in range(80):
        content, place = bytearray(whole), generator.randrange(1200)
        content[place : place + 8] = generator.randbytes(8)
        (tmp_path / "bad.gguf").write_bytes(content)
        try:
            file = GGUFFile(tmp_path / "bad.gguf")
            assert file.metadata and all(all(info.shape) for info in file.tensors.values())
        except VerificationError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a model", b"GGUF" + b"\xff" * 40])
def test_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(VerificationError, match="not a whole GGUF file"):
        GGUFFile(tmp_path / "x.gguf")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="cannot be read"):
        GGUFFile(tmp_path / "none.gguf")


# --- rounding ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(-12, 4), st.sampled_from(["F16", "BF16", "Q8_0"]))
def test_no_type_rounds_further_than_its_bound(seed: int, exponent: int, kind: str) -> None:
    """The gguf package's own quantizers, equal to ggml's bit for bit, are the oracle; sizes as weights have them."""
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    values[0, ::5] = 0
    stored = gguf.GGMLQuantizationType[kind]
    back = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), stored), stored))
    assert bool(((back.float() - values).abs() <= rounding(values, kind) * 1.001).all())


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_the_bound_is_tight(kind: str) -> None:
    """A bound that no rounding comes near would let damage through."""
    values = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    stored = gguf.GGMLQuantizationType[kind]
    back = torch.from_numpy(np.array(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), stored), stored)))
    assert float(((back.float() - values).abs() / rounding(values, kind)).max()) > 0.8


# --- compared with the float32 file --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GGUFFile]:
    folder = tmp_path_factory.mktemp("pair")
    return folder, GGUFFile(write(folder / "f32.gguf", converted(weights())))


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_a_sound_file_passes_with_small_errors(pair: tuple[Path, GGUFFile], outtype: str) -> None:
    folder, reference = pair
    file = GGUFFile(write(folder / f"{outtype}.gguf", converted(weights()), outtype.upper()))
    rows = compare_tensors(file, reference, outtype)
    limit = {"f32": 0.0, "f16": 3e-4, "bf16": 3e-3, "q8_0": 8e-3}[outtype]
    assert len(rows) == len(NAMES) and max(row.rms for row in rows) <= limit
    assert kept_wider(file, outtype) == {}


def damaged(state: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    name, tensors = "blk.0.ffn_down.weight", converted(state)
    changed = tensors[name].clone()
    if fault == "missing":
        return {other: tensor for other, tensor in tensors.items() if other != name}
    if fault == "unknown":
        return tensors | {"blk.0.extra.weight": changed}
    if fault == "shape":
        return tensors | {name: changed[:32]}
    if fault == "value":
        changed[3, 7] += 0.05
    if fault == "nan":
        changed[3, 7] = float("nan")
    if fault == "rows":
        changed = changed.flip(0)
    return tensors | {name: changed}


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "value", "nan", "rows"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_each_fault_is_found_and_named(pair: tuple[Path, GGUFFile], fault: str, outtype: str) -> None:
    folder, reference = pair
    state = damaged(weights(), fault)
    file = GGUFFile(write(folder / f"{fault}-{outtype}.gguf", state, outtype.upper()))
    with pytest.raises(VerificationError, match=r"extra|ffn_down"):
        compare_tensors(file, reference, outtype)


def test_another_type_than_asked_for_is_found(pair: tuple[Path, GGUFFile]) -> None:
    folder, reference = pair
    file = GGUFFile(write(folder / "wrong.gguf", converted(weights()), "Q8_0"))
    with pytest.raises(VerificationError, match="of a type that f16 does not have"):
        compare_tensors(file, reference, "f16")
    assert set(kept_wider(reference, "q8_0")) == {name for name, shape in NAMES.values() if len(shape) > 1}


# --- compared with the checkpoint ----------------------------------------------------------------------------------


def test_names_lead_to_keys(pair: tuple[Path, GGUFFile]) -> None:
    found = gguf_names(NAMES, pair[1])
    assert found == {name: key for key, (name, _) in NAMES.items()}
    inside = [key.replace("model.", "model.text_model.", 1) for key in NAMES]
    assert set(gguf_names(inside, pair[1])) == set(found)


def test_a_converted_llama_is_its_checkpoint_up_to_the_rope_order(pair: tuple[Path, GGUFFile], tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", weights())
    found = origins(pair[1], model)
    assert {name: (origin.how, origin.heads) for name, origin in found.found.items()} == {
        name: ("rope order", ROTATED[name]) if name in ROTATED else ("same", None) for name, _ in NAMES.values()
    }
    assert found.counts() == {"same": 3, "rope order": 2} and require_complete(model, [found]) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_exact_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in weights().items()}
    file = GGUFFile(write(tmp_path / "x.gguf", converted({key: tensor.float() for key, tensor in state.items()})))
    assert len(origins(file, checkpoint(tmp_path / "model", state)).found) == len(NAMES)


def broken_conversion(fault: str) -> dict[str, Tensor]:
    state = weights()
    tensors = converted(state)
    if fault == "unpermuted":
        return tensors | {"blk.0.attn_q.weight": state[LAYER + "self_attn.q_proj.weight"]}
    if fault == "wrong heads":
        return tensors | {"blk.0.attn_q.weight": rope_order(state[LAYER + "self_attn.q_proj.weight"], 2) * 1.0001}
    if fault == "queries' heads":
        return tensors | {"blk.0.attn_k.weight": rope_order(state[LAYER + "self_attn.k_proj.weight"], HEADS)}
    if fault == "base":
        return tensors | {"blk.0.ffn_down.weight": weights(1)[LAYER + "mlp.down_proj.weight"]}
    return tensors | {"blk.0.attn_norm.weight": tensors["blk.0.attn_norm.weight"] * 2}


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("unpermuted", "attn_q"),
        ("wrong heads", "attn_q"),
        ("queries' heads", "attn_k"),
        ("base", "ffn_down"),
        ("norm", "attn_norm"),
    ],
)
def test_a_wrong_conversion_is_named(tmp_path: Path, fault: str, name: str) -> None:
    file = GGUFFile(write(tmp_path / "x.gguf", broken_conversion(fault)))
    with pytest.raises(VerificationError, match=rf"x\.gguf is not .*blk\.0\.{name}\.weight is not"):
        origins(file, checkpoint(tmp_path / "model", weights()))


def test_a_matrix_from_nowhere_is_an_error_and_a_vector_is_listed(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", weights())
    made = converted(weights()) | {"rope_freqs.weight": torch.rand(8)}
    assert origins(GGUFFile(write(tmp_path / "x.gguf", made)), model).made == ("rope_freqs.weight",)
    strange = made | {"blk.0.strange.weight": torch.rand(8, 32)}
    with pytest.raises(VerificationError, match=r"blk\.0\.strange\.weight is in no tensor"):
        origins(GGUFFile(write(tmp_path / "y.gguf", strange)), model)


def test_what_was_not_shipped_needs_a_reason(tmp_path: Path, pair: tuple[Path, GGUFFile]) -> None:
    state = weights() | {
        "lm_head.weight": weights()["model.embed_tokens.weight"].clone(),
        LAYER + "self_attn.rotary_emb.inv_freq": torch.rand(8),
    }
    model = checkpoint(tmp_path / "model", state)
    reasons = require_complete(model, [origins(pair[1], model)])
    assert any("the same as model.embed_tokens.weight" in one for one in reasons) and len(reasons) == 2
    lost = checkpoint(tmp_path / "lost", state | {LAYER + "mlp.up_proj.weight": torch.rand(8, 8)})
    with pytest.raises(VerificationError, match=r"in no GGUF file: .*up_proj"):
        require_complete(lost, [origins(pair[1], lost)])
    sees = checkpoint(tmp_path / "sees", state | {"model.vision_model.patch.weight": torch.rand(8, 8)})
    reasons = require_complete(sees, [origins(pair[1], sees)], pair[1])
    assert any("without --mmproj" in one for one in reasons)


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (lambda w: w, "same"),
        (lambda w: rope_order(w, 4), "rope order"),
        (lambda w: w.flip(0), None),
        (lambda w: w[[1, 0, *range(2, 16)]], None),
        (lambda w: w.T.contiguous(), "transposed"),
        (lambda w: w[:8], "part of it"),
        (lambda w: w.reshape(4, 4, 24), "same"),
        (lambda w: w + 1e-6, None),
        (lambda w: w[:, torch.randperm(24, generator=torch.Generator().manual_seed(0))], None),
        (lambda w: torch.cat([w[:8], w[:8] + 1]), None),
    ],
)
def test_relations(make: Any, how: str | None) -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    found = relation(make(weight), weight, (4,))
    assert (found[0] if found else None) == how


def test_a_norm_may_be_stored_plus_one_and_a_kernel_in_slices() -> None:
    norm, kernel = torch.rand(16), torch.randn(8, 3, 2, 4, 4)
    found = relation(norm + 1, norm)
    assert found and found[0] == "plus one"
    assert holds(kernel, kernel[:, :, 1]) and not holds(kernel, kernel[:, :, 1] + 1)
    assert not holds(kernel, kernel[:, :, 1].flip(1)), "another order of colours"
    bias = torch.randn(24)  # query, key and value in one
    assert holds(bias, bias[16:20]) and not holds(bias, bias[16:20].flip(0)) and not holds(bias, bias)


def test_only_attention_weights_may_have_their_rows_in_another_order_and_only_by_heads() -> None:
    weight = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    quarters = weight.reshape(2, 3, 2, 2, 8).swapaxes(2, 3).reshape(24, 8)  # Kimi-VL's, in each of two heads
    fused = weight.reshape(4, 3, 2, 8).swapaxes(0, 1).reshape(24, 8)  # 4 · (q, k, v) · 2 → (q, k, v) · 4 · 2
    assert relation(quarters, weight, (2,), "v.blk.0.attn_q.weight") == ("rows reordered", None)
    assert relation(fused, weight, (4,), "blk.0.attn_qkv.weight") == ("rows reordered", None)
    for name in ("blk.0.ffn_up.weight", "mm.model.fc.weight"):
        assert relation(quarters, weight, (2,), name) is relation(fused, weight, (4,), name) is None
    for order in (weight.flip(0), weight[torch.randperm(24, generator=torch.Generator().manual_seed(1))]):
        assert relation(order, weight, (2,), "blk.0.attn_q.weight") is None
        assert relation(order, weight, (2,), "blk.0.attn_qkv.weight") is None


def test_a_patch_kernel_keeps_its_colours() -> None:
    kernel = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    linear = kernel.permute(0, 2, 3, 1).reshape(6, 48)
    assert relation(kernel, linear, (), "v.patch_embd.weight") == ("transposed", None)
    for source in (kernel, linear):
        assert relation(kernel.flip(1), source, (2,), "v.patch_embd.weight") is None


def seeing(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> tuple[GGUFFile, Checkpoint]:
    """Two layers of Qwen2.5-VL's vision side as its converter splits it, changed; and the checkpoint."""
    generator = torch.Generator().manual_seed(0)
    state = {"visual.patch_embed.proj.weight": torch.randn(8, 3, 2, 4, 4, generator=generator)}
    state |= {f"visual.blocks.{n}.attn.qkv.weight": torch.randn(24, 8, generator=generator) for n in range(2)}
    kernel = state["visual.patch_embed.proj.weight"]
    tensors = {"v.patch_embd.weight": kernel[:, :, 0], "v.patch_embd.weight.1": kernel[:, :, 1]}
    for layer in range(2):
        parts = state[f"visual.blocks.{layer}.attn.qkv.weight"].chunk(3)
        tensors |= {f"v.blk.{layer}.attn_{name}.weight": part for name, part in zip("qkv", parts, strict=True)}
    change(tensors)
    writer = gguf.GGUFWriter(folder / "x.gguf", "clip")
    writer.add_string("clip.projector_type", "qwen2.5vl_merger")
    writer.add_uint32("clip.vision.block_count", 2)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(folder / "x.gguf"), checkpoint(folder / "model", state)


def swapped(first: str, second: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({first: tensors[second], second: tensors[first]})


@pytest.mark.parametrize(
    "change",
    [
        swapped("v.blk.0.attn_q.weight", "v.blk.0.attn_k.weight"),
        swapped("v.blk.0.attn_v.weight", "v.blk.1.attn_v.weight"),
        swapped("v.patch_embd.weight", "v.patch_embd.weight.1"),
        lambda tensors: tensors.update({"v.blk.1.attn_k.weight": tensors["v.blk.1.attn_k.weight"][:-1]}),
    ],
)
def test_parts_of_a_fused_tensor_stand_under_their_own_names(tmp_path: Path, change: Any) -> None:
    (tmp_path / "sound").mkdir()
    file, model = seeing(tmp_path / "sound", lambda tensors: None)
    assert require_complete(model, [origins(file, model)]) == []
    with pytest.raises(VerificationError, match=r"v\.(blk|patch)"):
        origins(*seeing(tmp_path, change))


# --- the tuning -----------------------------------------------------------------------------------------------------


def tuned(state: dict[str, Tensor], size: float = 0.01) -> dict[str, Tensor]:
    key = LAYER + "self_attn.q_proj.weight"
    change = torch.randn(state[key].shape, generator=torch.Generator().manual_seed(5))
    return state | {key: state[key] + size * change}


def test_tuning_survives_rounding_and_a_base_tensor_is_found(tmp_path: Path) -> None:
    base, merged = checkpoint(tmp_path / "base", weights()), checkpoint(tmp_path / "merged", tuned(weights()))
    reference = GGUFFile(write(tmp_path / "f32.gguf", converted(tuned(weights()))))
    sources, changed = origins(reference, merged), changed_keys(base, merged)
    assert changed == [LAYER + "self_attn.q_proj.weight"]
    for kind in ("F16", "Q8_0"):
        file = GGUFFile(write(tmp_path / f"{kind}.gguf", converted(tuned(weights())), kind))
        (row,) = tuning_kept(file, sources, base, merged, changed)
        assert row.name == "blk.0.attn_q.weight" and abs(row.kept - 1) < 0.05
    shipped = GGUFFile(write(tmp_path / "base-q8_0.gguf", converted(weights()), "Q8_0"))
    with pytest.raises(VerificationError, match=r"attn_q\.weight: nearer to the base"):
        tuning_kept(shipped, sources, base, merged, changed)


def test_exporting_the_base_itself_is_found(tmp_path: Path) -> None:
    base, same = checkpoint(tmp_path / "base", weights()), checkpoint(tmp_path / "same", weights())
    with pytest.raises(VerificationError, match="no tensor differs from the base"):
        changed_keys(base, same)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("saved", [None, torch.float32])
def test_what_a_merge_only_rounded_was_not_tuned(tmp_path: Path, dtype: torch.dtype, saved: torch.dtype | None) -> None:
    """A frozen tower that is saved in half precision differs from the base everywhere, and has no tuning to keep."""
    cast = {key: tensor.to(dtype).to(saved or dtype) for key, tensor in tuned(weights()).items()}
    base, merged = checkpoint(tmp_path / "base", weights()), checkpoint(tmp_path / "merged", cast)
    assert changed_keys(base, merged) == [LAYER + "self_attn.q_proj.weight"]
    same = checkpoint(tmp_path / "same", {key: tensor.to(dtype) for key, tensor in weights().items()})
    with pytest.raises(VerificationError, match="no tensor differs from the base"):
        changed_keys(base, same)


def test_a_change_below_the_roundings_noise_is_no_alarm() -> None:
    """A cast between half-precision formats changes entries by far less than Q8_0 rounds: nothing can be said."""
    before = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    after = before + 1e-9
    noise = 1e-2 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    after[0, 0] += 1e-6
    row = tuning_of("x", after + noise, before, after)
    assert row.noise > 1 and not row.lost
    assert replace(row, kept=0.0, noise=0.01).lost


def test_an_origin_maps_the_base_as_the_converter_did() -> None:
    weight = torch.randn(16, 8)
    assert torch.equal(Origin("k", "rope order", 4).apply(weight), rope_order(weight, 4))
    assert Origin("k", "same").apply(weight) is weight and Origin("k", "transposed").apply(weight) is None


def test_what_the_base_stores_otherwise_is_not_taken_for_untuned(tmp_path: Path) -> None:
    """gpt-oss in MXFP4 has blocks and scales where the merged model has one tensor: nothing is known of its tuning."""
    key = LAYER + "self_attn.q_proj.weight"
    packed = {f"{name}_blocks" if name == key else name: tensor for name, tensor in weights().items()}
    base, merged = checkpoint(tmp_path / "base", packed), checkpoint(tmp_path / "merged", weights())
    assert changed_keys(base, merged) == [] and stored_otherwise(base, merged) == [key]
