"""The vision demo's base model before it has seen anything: a SmolVLM of about a million parameters and its processor.

    picture of 64 × 64 ── 64 patches of 8 × 8 ── vision tower ── shuffled 2 × 2 ── projector ──▶ 16 image tokens

A released model's vision tower has learnt to see before a language model looks through it; here `Eye` is for that.

Everything `from_pretrained` needs is saved: weights, both forms of the tokenizer (as tiny.py has them), image
processor, chat template. Pictures are never cut into tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    LlamaTokenizer,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from rankwise.models.tiny import save_tokenizer as save_both_forms
from rankwise.models.tiny import vocabulary_and_merges

SIDE, PATCH = 64, 8  # pixels
WIDTH = 128
VISION = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "initializer_range": 0.06,
}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "initializer_range": 0.06,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
SHUFFLE = 2
IMAGE_TOKENS = (SIDE // PATCH // SHUFFLE) ** 2
START, END, PAD, IMAGE = "<|im_start|>", "<end_of_utterance>", "<|im_end|>", "<image>"
# The name of a tile is a token of its own, as in the family's vocabulary: llama.cpp cuts every image into tiles.
SPECIALS = (START, PAD, END, "<fake_token_around_image>", IMAGE, "<global-img>", "<row_1_col_1>")
BREAK = "\n\n"  # one token, as in the family's vocabulary; llama.cpp looks for it
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def save_tokenizer(folder: Path, texts: Sequence[str], vocab_size: int) -> LlamaTokenizer:
    """Both forms of a tokenizer for `texts` with the family's special tokens, in `folder`, compared as tiny.py's."""
    compared = [f"{START}User:{IMAGE}a{BREAK}b{END}\nAssistant: c"]
    more = {"add_dummy_prefix": False, "user_defined_symbols": [*SPECIALS, BREAK]}
    return save_both_forms(folder, texts, vocab_size, tokenizer_of, compared, **more)


def tokenizer_of(pieces: sentencepiece.SentencePieceProcessor) -> LlamaTokenizer:
    """The same vocabulary for transformers; the chat template says how a text begins."""
    tokenizer = LlamaTokenizer(
        **vocabulary_and_merges(pieces),
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        add_bos_token=False,
        add_prefix_space=False,
        extra_special_tokens=[special for special in SPECIALS if special not in (START, END, PAD)],
        chat_template=TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(BREAK, normalized=False)])
    return tokenizer


def processor_of(tokenizer: LlamaTokenizer) -> SmolVLMProcessor:
    """Pictures of `SIDE` pixels as they are, larger ones made smaller; no tiles."""
    sizes = {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}}
    half = {"image_mean": [0.4] * 3, "image_std": [0.25] * 3}
    return SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes, **half, do_image_splitting=False),
        tokenizer,
        SmolVLMVideoProcessor(**sizes, **half),
        image_seq_len=IMAGE_TOKENS,
        chat_template=TEMPLATE,
    )


def random_smolvlm(tokenizer: LlamaTokenizer, seed: int) -> SmolVLMForConditionalGeneration:
    """A SmolVLM with random weights (float32) for this vocabulary."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"model_type": "llama", "architectures": ["VLlama3ForCausalLM"], "vocab_size": len(tokenizer), **ids, **TEXT}
    config = SmolVLMConfig(
        text_config=text,
        vision_config=VISION,
        scale_factor=SHUFFLE,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmolVLMForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


class Eye(nn.Module):
    """Vision tower and projector of a model with a linear classifier: what is in each quarter of a picture.

    The classifier sees the mean of a quarter's image tokens, and is thrown away afterwards.

    classes: number of classes of every feature that it tells (kind of shape, colour …).
    """

    def __init__(self, model: SmolVLMForConditionalGeneration, classes: Sequence[int]) -> None:
        super().__init__()
        self.vision, self.projector = model.model.vision_model, model.model.connector
        self.classes = list(classes)
        self.classifier = nn.Linear(WIDTH, sum(classes))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """pixel_values: (pictures, 3, SIDE, SIDE). labels: (pictures, 4, features), class numbers. → loss, logits."""
        tokens = self.projector(self.vision(pixel_values).last_hidden_state)
        half = SIDE // PATCH // SHUFFLE // 2
        quarters = tokens.unflatten(1, (2, half, 2, half)).mean((2, 4)).flatten(1, 2)
        logits = self.classifier(quarters)
        told = logits.flatten(0, 1).split(self.classes, dim=1)
        wanted = labels.flatten(0, 1).unbind(1)
        loss = torch.stack([nn.functional.cross_entropy(*pair) for pair in zip(told, wanted, strict=True)]).sum()
        return {"loss": loss, "logits": logits}
