"""GGUF files for tests of the runtime, written straight from a tiny Llama without llama.cpp's converter.

`text_model()` and `text_gguf()` are made once per process and shared by all test files.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from exported import TEXTS
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rankwise.models import tiny

TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<s>{% endif %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if loud %} (loud){% endif %}{% endif %}"
)
KINDS = {"unknown": 2, "control": 3, "byte": 6}


@functools.cache
def root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="rankwise-served-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def text_model() -> Path:
    """A random Llama with weights wide enough that its answers differ; its tokenizer adds a start token."""
    folder = root() / "model"
    folder.mkdir()
    tokenizer = tiny.save_tokenizer(folder, TEXTS, 400)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = tiny.random_llama(tokenizer, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.7)
    model.save_pretrained(folder)
    return folder


@functools.cache
def text_gguf(form: str = "f32") -> Path:
    """The same model as GGUF. form: f32 or f16."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    path = root() / f"model-{form}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    model = AutoModelForCausalLM.from_pretrained(text_model(), dtype=torch.float32)
    add_sizes(writer, model, form)
    add_vocabulary(writer, text_model() / "tokenizer.model")
    for name, weight in model.state_dict().items():
        values = arranged(name, weight.numpy(), model.config)
        if name != "lm_head.weight":
            wide = form == "f32" or values.ndim == 1
            writer.add_tensor(llama_name(name), values.astype(np.float32 if wide else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_sizes(writer, model: LlamaForCausalLM, form: str) -> None:
    config = model.config
    assert config.tie_word_embeddings
    writer.add_file_type({"f32": 0, "f16": 1}[form])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_vocabulary(writer, path: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(pieces.get_piece_size())
    kinds = {"unknown": pieces.is_unknown, "control": pieces.is_control, "byte": pieces.is_byte}
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([pieces.id_to_piece(index) for index in ids])
    writer.add_token_scores([pieces.get_score(index) for index in ids])
    writer.add_token_types([next((KINDS[kind] for kind, has in kinds.items() if has(index)), 1) for index in ids])
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


def llama_name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight → blk.0.attn_q.weight"""
    parts = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "o_proj": "attn_output",
        **{f"{one}_proj": f"attn_{one}" for one in "qkv"},
        **{f"{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")},
    }
    *path, kind, _ = name.split(".")
    layer = f"blk.{path[2]}." if "layers" in path else ""
    return f"{layer}{parts[kind]}.weight"


def arranged(name: str, values: np.ndarray, config) -> np.ndarray:
    """Rows of query and key in llama.cpp's order: rotated pairs side by side, not in halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = [count for kind, count in heads.items() if kind in name]
    if not found:
        return values
    return values.reshape(found[0], 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
