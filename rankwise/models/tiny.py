"""Untrained base models of the demos: a million or three of random parameters, and a vocabulary.

    texts ──▶ SentencePiece vocabulary ──▶ Llama, Mixtral                               demo
    picture of 64 × 64 ── 64 patches ── vision tower ── shuffled 2 × 2 ── projector ──▶ 16 image tokens ──▶ SmolVLM

Tokenizers are stored in both forms that exist, `tokenizer.model` (the GGUF converter reads it) and `tokenizer.json`
(transformers reads it), made from one vocabulary and compared on the whole corpus. Everything `from_pretrained` needs
is saved: weights, tokenizer, image processor, chat template. Pictures are never cut into tiles. A released model's
vision tower has learnt to see before a language model looks through it; here `Eye` is for that.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import sentencepiece
import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from rankwise.errors import VerificationError
from rankwise.files.atomic import atomic_write

Model = TypeVar("Model", bound=nn.Module)

WIDTH = 128
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
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
SIDE, PATCH, SHUFFLE = 64, 8, 2  # pixels, pixels, patches
IMAGE_TOKENS = (SIDE // PATCH // SHUFFLE) ** 2
VISION = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "initializer_range": 0.06,
}
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


def tokenizer_of(pieces: SentencePieceProcessor) -> LlamaTokenizer:
    """The same vocabulary for transformers."""
    return LlamaTokenizer(**vocabulary_and_merges(pieces), pad_token="<unk>", add_bos_token=True)


def vocabulary_and_merges(pieces: SentencePieceProcessor) -> dict[str, Any]:
    """As transformers takes them: `vocab` and `merges`, these in the order of the pieces, which is their rank."""
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for index, piece in enumerate(vocabulary)
        if not (pieces.is_control(index) or pieces.is_byte(index) or pieces.is_unknown(index))
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return {"vocab": vocabulary, "merges": merges}


def save_tokenizer(
    folder: Path,
    texts: Sequence[str],
    vocab_size: int,
    made: Callable[[SentencePieceProcessor], LlamaTokenizer] = tokenizer_of,
    compared: Sequence[str] = (),
    **more: Any,
) -> LlamaTokenizer:
    """Both forms of a tokenizer for `texts`, in `folder`; VerificationError where they would disagree on any text.

    made: the one of transformers. compared: further texts to compare on. more: options of SentencePiece's trainer.
    """
    model = train_vocabulary([line for text in texts for line in text.splitlines()], vocab_size, **more)
    pieces = SentencePieceProcessor(model_proto=model)
    tokenizer = made(pieces)
    check_same_ids(pieces, tokenizer, [*texts, *compared])
    tokenizer.save_pretrained(folder)
    with atomic_write(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(model)
    return tokenizer


def train_vocabulary(texts: Sequence[str], vocab_size: int, **more: Any) -> bytes:
    """A SentencePiece model (byte-pair merges, byte fallback, no normalisation: as Llama's) of `texts`.

    more: options of SentencePiece's trainer.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **more,
    )
    return model.getvalue()


def check_same_ids(pieces: SentencePieceProcessor, tokenizer: LlamaTokenizer, texts: Iterable[str]) -> None:
    for text in texts:
        here, there = tokenizer(text, add_special_tokens=False)["input_ids"], pieces.encode(text)
        if here != there:
            raise VerificationError(f"tokenizer.json and tokenizer.model disagree on {text!r}: {here} and {there}")


def random_llama(tokenizer: LlamaTokenizer, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights (float32) for this vocabulary."""
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**text_settings(tokenizer))), seed)


def random_mixtral(tokenizer: LlamaTokenizer, seed: int) -> MixtralForCausalLM:
    """A Mixtral with random weights (float32) for this vocabulary: three layers of eight experts, two for a token."""
    return seeded(lambda: MixtralForCausalLM(MixtralConfig(**text_settings(tokenizer), **EXPERTS)), seed)


def text_settings(tokenizer: LlamaTokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
        **TEXT,
        "initializer_range": 0.08,
    }


def seeded(made: Callable[[], Model], seed: int) -> Model:
    """What is made with random numbers of this seed; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made()


def save_vision_tokenizer(folder: Path, texts: Sequence[str], vocab_size: int) -> LlamaTokenizer:
    """Both forms of a tokenizer for `texts` with the family's special tokens, in `folder`, compared as tiny.py's."""
    compared = [f"{START}User:{IMAGE}a{BREAK}b{END}\nAssistant: c"]
    more = {"add_dummy_prefix": False, "user_defined_symbols": [*SPECIALS, BREAK]}
    return save_tokenizer(folder, texts, vocab_size, vision_tokenizer, compared, **more)


def vision_tokenizer(pieces: SentencePieceProcessor) -> LlamaTokenizer:
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


def vision_processor(tokenizer: LlamaTokenizer) -> SmolVLMProcessor:
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
    model = seeded(lambda: SmolVLMForConditionalGeneration(config), seed)
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
