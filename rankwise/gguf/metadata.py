"""What a GGUF states about its model, against the config, the processor and the tokenizer in transformers.

    llama.rope.freq_base = 10000          ◀── config.json, text_config.rope_parameters.rope_theta
    clip.vision.image_mean = [0.5 …]      ◀── processor_config.json, image_processor.image_mean
    tokenizer.ggml.tokens, …              ◀── tokenizer.json ◀── must agree ──▶ tokenizer.model

Tensors can all be right and the model another one: theta, epsilons and the pixels' mean stand beside them. Only keys
whose meaning is certain are compared; of families that the tables don't know, those that mean the same everywhere.

Of the tokenizer there are two traps: a `tokenizer.model`, which the converter reads, that differs from the
`tokenizer.json` beside it, which transformers trained with; and a start token that llama.cpp adds by default before a
prompt whose template has one already. Whether texts are then split alike is compared in splitting.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import CONFIG_MAPPING

from rankwise.data.device import DeviceTarget, tiles
from rankwise.errors import VerificationError, need
from rankwise.files.atomic import read_object
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.mixture import SOFTMAX, expert_numbers
from rankwise.gguf.splitting import (
    BYTE_LEVEL,
    SCORES,
    SENTENCEPIECE,
    SPACE,
    SPACED,
    SPACES,
    SPECIAL_TYPES,
    merge_scores,
    probing_texts,
)
from rankwise.models.load import load_processor, load_tokenizer
from rankwise.models.vocabulary import token_count
from rankwise.page.text import plural

SAME = 1e-5  # relative; float32 in the file, float64 in the config
PLAIN = frozenset(["llama", "qwen2", "qwen2vl", "qwen3", "qwen3vl"])  # one kind of layer, whole rotary heads
IDEFICS, QWEN_MERGER = "idefics3", "qwen2.5vl_merger"
UNSCALED = frozenset(["default", "llama3"])  # llama3's factors are a tensor
EVERYWHERE = {"embedding_length": "hidden_size", "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
OF_PLAIN = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
OF_TOWERS = {  # by the file's clip.projector_type
    IDEFICS: {
        "vision.block_count": "num_hidden_layers",
        "vision.embedding_length": "hidden_size",
        "vision.feed_forward_length": "intermediate_size",
        "vision.attention.head_count": "num_attention_heads",
        "vision.patch_size": "patch_size",
        "vision.image_size": "image_size",
        "vision.attention.layer_norm_epsilon": "layer_norm_eps",
    },
    QWEN_MERGER: {
        "vision.block_count": "depth",
        "vision.embedding_length": "hidden_size",
        "vision.feed_forward_length": "intermediate_size",
        "vision.attention.head_count": "num_heads",
        "vision.patch_size": "patch_size",
    },
}
# llama.cpp's GELU is the tanh approximation, for both of transformers' names; with neither flag it is QuickGELU.
ACTIVATIONS = {
    "gelu_pytorch_tanh": (True, False),
    "gelu": (True, False),
    "gelu_new": (True, False),
    "silu": (False, True),
    "quick_gelu": (False, False),
}


def check_numbers(file: GGUFFile, wanted: Mapping[str, Any]) -> None:
    """VerificationError, listing every key of the file that says otherwise. wanted: by key without architecture."""
    wrong = []
    for key, value in wanted.items():
        stated = file.of_architecture(key)
        if not agree(default_of(file, key) if stated is None else stated, value):
            told = "is not stated" if stated is None else f"is {shorter(stated)}"
            wrong.append(f"{file.architecture}.{key} {told}, and {shorter(value)} in the model")
    if wrong:
        raise VerificationError(f"{file.path}: not the model's config: {'; '.join(wrong)}")


def default_of(file: GGUFFile, key: str) -> Any:
    """What llama.cpp takes where a file does not state the key; None where it has nothing of its own."""
    return {
        "rope.freq_base": 10000.0,
        "attention.head_count_kv": file.of_architecture("attention.head_count"),
        "expert_gating_func": SOFTMAX,
    }.get(key)


def agree(stated: Any, wanted: Any) -> bool:
    if wanted is None or isinstance(wanted, bool):
        return bool(stated) is bool(wanted)
    if isinstance(wanted, list):
        return isinstance(stated, list) and len(stated) == len(wanted) and all(map(agree, stated, wanted))
    return isinstance(stated, int | float) and isclose(stated, wanted, rel_tol=SAME)


def shorter(value: Any) -> str:
    if isinstance(value, list):
        return str([float(f"{one:.6g}") for one in value])
    return str(value) if value is None or isinstance(value, bool | str) else f"{value:.6g}"


def config_of(model: Path) -> Any:
    """The config with its class's defaults; None where transformers has no class for it."""
    content = read_object(model / "config.json")
    kind = content.get("model_type")
    return CONFIG_MAPPING[kind].from_dict(content) if kind in CONFIG_MAPPING else None


# --- the text model --------------------------------------------------------------------------------------------------


def text_numbers(file: GGUFFile, model: Path) -> dict[str, Any]:
    """What the file of the text model must state, by key without the architecture."""
    config = config_of(model)
    if config is None:
        return {}
    text = config.get_text_config()
    plain = file.architecture in PLAIN
    wanted = from_config(text, EVERYWHERE | (OF_PLAIN if plain else {}))
    # A key that other families leave out on purpose (another kind of norm, say) says nothing.
    known = {key: value for key, value in wanted.items() if plain or file.of_architecture(key) is not None}
    return known | (dict(rope_numbers(text)) if plain else {}) | expert_numbers(file, text)


def from_config(config: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    values = {key: getattr(config, name, None) for key, name in keys.items()}
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def rope_numbers(text: Any) -> Iterator[tuple[str, Any]]:
    rope = getattr(text, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        yield "rope.freq_base", rope["rope_theta"]
    kind = rope.get("rope_type", "default")
    if kind in UNSCALED or "mrope_section" in rope:
        yield "rope.scaling.factor", None
    elif kind in ("linear", "yarn"):
        yield "rope.scaling.factor", rope.get("factor")


# --- the vision tower ------------------------------------------------------------------------------------------------


def vision_numbers(file: GGUFFile, model: Path, target: DeviceTarget | None) -> dict[str, Any]:
    """The same for the mmproj file. target: what the device scales images to, before what the processor says."""
    config, processor = config_of(model), load_processor(str(model))
    wanted: dict[str, Any] = dict(pixel_numbers(processor.image_processor))
    family = str(file.metadata.get("clip.projector_type"))
    if config is None or family not in OF_TOWERS:
        return wanted
    tower = config.vision_config
    wanted |= from_config(tower, OF_TOWERS[family])
    if tower.hidden_act in ACTIVATIONS:
        wanted |= dict(zip(("use_gelu", "use_silu"), ACTIVATIONS[tower.hidden_act], strict=True))
    if family == IDEFICS:
        wanted["vision.projector.scale_factor"] = config.scale_factor
    if tiles(processor):
        edge = target.longest_edge if target else None
        wanted["vision.preproc_image_size"] = edge or int(processor.image_processor.size["longest_edge"])
    return wanted


def pixel_numbers(images: Any) -> Iterator[tuple[str, list[float]]]:
    if getattr(images, "do_normalize", False):
        yield "vision.image_mean", [float(value) for value in images.image_mean]
        yield "vision.image_std", [float(value) for value in images.image_std]


# --- the tokenizer ---------------------------------------------------------------------------------------------------

MODEL = "tokenizer.model"
ADD_BOS = "tokenizer.ggml.add_bos_token"


@dataclass(frozen=True)
class Vocabulary:
    """How transformers' tokenizer behaves, as far as a GGUF states it.

    tokens: by id, None where an id is unused. added: ids that a text holds as one token, whatever is around them.
    add_bos, add_eos: whether encoding a text adds them. spaced: whether a space is put before a text. scores: of the
    ordinary pieces of `tokenizer.model`, by id, else of a BPE's merges. merges: of byte-level BPE, in their order.
    """

    tokens: tuple[str | None, ...]
    added: Mapping[int, str]
    special: frozenset[int]
    bos: int | None
    eos: int | None
    pad: int | None
    add_bos: bool
    add_eos: bool
    template: str | None
    spaced: bool
    scores: Mapping[int, float]
    merges: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, sees: bool = False) -> Vocabulary:
        """The tokenizer of a model folder; sees: the processor's, whose chat template it then has."""
        tokenizer = load_processor(str(folder)).tokenizer if sees else load_tokenizer(str(folder))
        ids = tokenizer("a")["input_ids"]
        template = tokenizer.chat_template
        return cls(
            tokens=tuple(tokenizer.convert_ids_to_tokens(list(range(token_count(tokenizer))))),
            added={index: token.content for index, token in tokenizer.added_tokens_decoder.items()},
            special=frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special),
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
            add_bos=bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
            add_eos=bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
            template=template.get("default") if isinstance(template, dict) else template,
            spaced="".join(tokenizer.tokenize("a")).startswith(SPACES),
            scores=piece_scores(folder, tokenizer),
            merges=merges_of(tokenizer),
        )


# --- the two forms of one tokenizer ------------------------------------------------------------------------------


def check_forms(folder: Path) -> None:
    """VerificationError, with a text, where tokenizer.model and the tokenizer of transformers disagree on one that does
    not begin with a space."""
    if not (folder / MODEL).is_file():
        return
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    tokenizer = load_tokenizer(str(folder))
    words = (pieces.id_to_piece(i).replace(SPACE, " ") for i in ordinary_pieces(pieces) if pieces.get_score(i) != 0)
    for text in probing_texts(words):
        here, there = tokenizer(text, add_special_tokens=False)["input_ids"], pieces.encode(text)
        if here != there:
            raise VerificationError(
                f"{folder}: tokenizer.json and tokenizer.model disagree on {text!r}: {here} and {there}. transformers "
                f"trained with the first, the converter reads the second; make {MODEL} anew, or remove it if it is old"
            )


def piece_scores(folder: Path, tokenizer: Any) -> dict[int, float]:
    if not (folder / MODEL).is_file():
        return merge_scores(tokenizer)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    return {index: pieces.get_score(index) for index in ordinary_pieces(pieces)}


def merges_of(tokenizer: Any) -> tuple[str, ...]:
    """Pairs of pieces in the order in which BPE joins them, as a GGUF writes them: with a space between."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend else {}
    return tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", ()))


def ordinary_pieces(pieces: sentencepiece.SentencePieceProcessor) -> list[int]:
    kinds = (pieces.is_control, pieces.is_unknown, pieces.is_byte, pieces.is_unused)
    return [index for index in range(pieces.get_piece_size()) if not any(kind(index) for kind in kinds)]


def plain_in_model(folder: Path, vocabulary: Vocabulary) -> list[int]:
    """Added tokens that tokenizer.model holds as ordinary pieces: the converter would take them for plain text."""
    if not (folder / MODEL).is_file():
        return []
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    size, marked = pieces.get_piece_size(), (pieces.is_control, pieces.is_unknown, pieces.is_byte)
    return [index for index in vocabulary.added if index >= size or not any(kind(index) for kind in marked)]


def silence(path: Path) -> None:
    """State in a converted file that no start token goes before a text. The converter goes by the tokenizer's own
    post-processor, whatever tokenizer_config.json says; a tokenizer without it would not be recognised by its hash."""
    field = need("gguf", extra="device").GGUFReader(path, "r+").fields.get(ADD_BOS)
    if field is not None:
        field.parts[field.data[0]][0] = False


# --- what a GGUF states ------------------------------------------------------------------------------------------


def check_tokenizer(file: GGUFFile, vocabulary: Vocabulary) -> dict[str, Any]:
    """What was compared. VerificationError, listing all differences, where the GGUF states another tokenizer."""
    problems = [
        *token_problems(file, vocabulary),
        *id_problems(file, vocabulary),
        *splitting_problems(file, vocabulary),
    ]
    if file.metadata.get("tokenizer.chat_template") != vocabulary.template:
        problems.append("its chat template is not the tokenizer's")
    if problems:
        raise VerificationError(f"{file.path}: not the model's tokenizer: {'; '.join(problems)}")
    return {
        "tokens": len(vocabulary.tokens),
        "added_tokens": len(vocabulary.added),
        "bos": vocabulary.bos,
        "eos": vocabulary.eos,
        "add_bos": vocabulary.add_bos,
        "chat_template": vocabulary.template is not None,
    }


def token_problems(file: GGUFFile, vocabulary: Vocabulary) -> Iterator[str]:
    tokens: Sequence[str] = file.metadata.get("tokenizer.ggml.tokens", ())
    types: Sequence[int] = file.metadata.get("tokenizer.ggml.token_type", ())
    if len(tokens) < len(vocabulary.tokens):
        yield f"{len(tokens)} tokens where the tokenizer has {len(vocabulary.tokens)}"
        return
    other = [i for i, token in enumerate(vocabulary.tokens) if token is not None and plain(token) != plain(tokens[i])]
    if other:
        here, there = vocabulary.tokens[other[0]], tokens[other[0]]
        yield f"other tokens at {plural(len(other), 'id')}, the first is {other[0]}: {there!r} instead of {here!r}"
    split = [index for index in vocabulary.added if index >= len(types) or types[index] not in SPECIAL_TYPES]
    if split:
        yield (
            f"{plural(len(split), 'added token')} would be read as plain text, the first is "
            f"{vocabulary.added[split[0]]!r} ({split[0]})"
        )


def plain(token: str) -> str:
    """Without the sign that SentencePiece writes for a space (the converter takes it out of added tokens)."""
    return token.replace(SPACE, " ")


def id_problems(file: GGUFFile, vocabulary: Vocabulary) -> Iterable[str]:
    stated = {name: file.metadata.get(f"tokenizer.ggml.{name}") for name in STATED}
    if vocabulary.bos is not None and stated["bos_token_id"] != vocabulary.bos:
        yield f"start token {stated['bos_token_id']} instead of {vocabulary.bos}"
    if vocabulary.eos is not None and stated["eos_token_id"] != vocabulary.eos:
        yield f"end token {stated['eos_token_id']} instead of {vocabulary.eos}"
    if stated["padding_token_id"] not in (None, vocabulary.pad):
        yield f"padding token {stated['padding_token_id']} instead of {vocabulary.pad}"
    if stated["add_bos_token"] is not vocabulary.add_bos:
        told = {None: "leaves open whether to add", True: "adds", False: "does not add"}[stated["add_bos_token"]]
        yield f"it {told} a start token, and the tokenizer {'does' if vocabulary.add_bos else 'does not'}"
    if stated["add_eos_token"] not in (None, vocabulary.add_eos):
        yield f"it says add_eos_token {stated['add_eos_token']}, the tokenizer does otherwise"


def splitting_problems(file: GGUFFile, vocabulary: Vocabulary) -> Iterator[str]:
    """What else decides where a text is split: the space in front, and the order of merges, which scores give."""
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind in SPACED:
        spaced = file.metadata.get("tokenizer.ggml.add_space_prefix", SPACED[kind])
        if spaced is not vocabulary.spaced:
            ours, theirs = ("puts", "does not") if spaced else ("does not put", "does")
            yield f"it {ours} a space before every text (add_space_prefix), and the tokenizer {theirs}"
    if kind == BYTE_LEVEL:
        merges = tuple(file.metadata.get("tokenizer.ggml.merges", ()))
        if merges != vocabulary.merges:
            yield f"its {len(merges)} merges are not the tokenizer's {len(vocabulary.merges)}, or in another order"
        if file.metadata.get("tokenizer.ggml.pre") in (None, "default"):
            yield "it names no pre-tokenizer (tokenizer.ggml.pre), so llama.cpp would split texts by its default"
    scores = file.metadata.get(SCORES, ())
    if kind == SENTENCEPIECE and vocabulary.scores:
        other = [i for i, score in vocabulary.scores.items() if i not in vocabulary.added and not at(scores, i, score)]
        if other:
            yield f"other scores than the tokenizer's at {plural(len(other), 'id')}, the first is {other[0]}"


def at(scores: Sequence[float], index: int, score: float) -> bool:
    return index < len(scores) and isclose(scores[index], score, rel_tol=1e-6, abs_tol=1e-6)


STATED = ("bos_token_id", "eos_token_id", "padding_token_id", "add_bos_token", "add_eos_token")
