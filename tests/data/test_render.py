"""The renderer: training starts with the evaluation prompt, labels are the answers and end tokens and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rankwise.data.chat import TurnsApart
from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.example import Example, Examples, Turn, one_per_prompt
from rankwise.data.render import IGNORED, Overlong, Renderer
from rankwise.data.sources.load import load
from rankwise.errors import DataError, UsageError

FACTS = "name[Alimentum], area[city centre]"
ANSWER = "Alimentum is in the city centre."
ONE = Example(
    "one",
    "g",
    (Turn("user", "Describe.", "Instruction"), Turn("user", FACTS, "Input"), Turn("assistant", ANSWER, "Output")),
)
TALK = Example(
    "talk",
    "g",
    (
        Turn("system", "Be brief."),
        Turn("user", "Who?"),
        Turn("assistant", "Me."),
        Turn("user", "Where?\nHere  or there?"),
        Turn("assistant", "There, for £5.\n\nYes."),
    ),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=CHAT_TEMPLATE)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def learnt(tokenizer: PreTrainedTokenizerBase, renderer: Renderer, example: Example) -> list[str]:
    """The unmasked stretches of the labels, as texts."""
    rendered = renderer.training(example)
    assert all(label in (IGNORED, token) for token, label in zip(rendered.input_ids, rendered.labels, strict=True))
    stretches: list[list[int]] = [[]]
    for label in rendered.labels:
        if label == IGNORED:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [decode(tokenizer, stretch) for stretch in stretches if stretch]


# --- sections ----------------------------------------------------------------------------------------------------


def test_sections_form(tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(tokenizer)
    expected = f"<s>### Instruction:\nDescribe.\n\n### Input:\n{FACTS}\n\n### Output:\n"
    assert renderer.text(renderer.prompt_ids(ONE)) == expected
    assert decode(tokenizer, renderer.training(ONE).input_ids) == f"{expected}{ANSWER}</s>"


@pytest.mark.parametrize("style", ["sections", "chat"])
@pytest.mark.parametrize("example", [ONE, TALK], ids=["one", "talk"])
def test_labels_are_every_answer_and_its_end(tokenizer: PreTrainedTokenizerBase, style: str, example: Example) -> None:
    answers = [f"{turn.text}</s>" for turn in example.turns if turn.role == "assistant"]
    assert learnt(tokenizer, Renderer(tokenizer, style=style), example) == answers


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ue000\ue001"), max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(texts=st.lists(TEXT.filter(str.strip), min_size=2, max_size=6), style=st.sampled_from(["sections", "chat"]))
def test_training_starts_with_the_evaluation_prompt(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], style: str
) -> None:
    texts = texts[: len(texts) // 2 * 2]
    turns = tuple(Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts))
    example, renderer = Example("x", "g", turns), Renderer(tokenizer, style=style, max_length=4000)
    prompt, whole = renderer.prompt_ids(example), renderer.training(example)
    assert whole.input_ids[: len(prompt)] == prompt
    assert whole.labels[len(prompt) - 1] == IGNORED
    assert whole.labels[len(prompt) :] == whole.input_ids[len(prompt) :]
    assert decode(tokenizer, whole.input_ids[len(prompt) :]) == texts[-1] + "</s>"
    assert whole.input_ids.count(tokenizer.bos_token_id) == 1


def test_no_begin_token_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    plain = tiny_tokenizer(tmp_path, add_bos=False)
    ids = Renderer(plain).training(ONE).input_ids
    assert plain.bos_token_id not in ids
    assert ids[-1] == plain.eos_token_id


def test_real_tokenizers_in_the_sections_form(shared_data: Path) -> None:
    rows = one_per_prompt(load("e2e_nlg", shared_data / "e2e_nlg", "dev"))[:40]
    folders = [
        shared_data / "tiny_weights" / "stories260K" / "hf_converted",
        shared_data / "model_configs" / "TinyLlama-1.1B-Chat-v1.0",
        shared_data / "model_configs" / "gpt2",
        shared_data / "model_configs" / "Qwen2.5-VL-7B-Instruct",
    ]
    for tokenizer in map(AutoTokenizer.from_pretrained, folders):
        renderer = Renderer(tokenizer)
        for row in rows:
            prompt, whole = renderer.prompt_ids(row), renderer.training(row).input_ids
            assert whole[: len(prompt)] == prompt
            [text] = learnt(tokenizer, renderer, row)
            assert text.strip() == row.answer + tokenizer.eos_token


# --- chat templates ----------------------------------------------------------------------------------------------


def test_qwen_renders_as_its_own_template(shared_data: Path) -> None:
    """Ids equal transformers' own, except that nothing follows the last end token."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "model_configs" / "Qwen2.5-VL-7B-Instruct")
    renderer = Renderer(tokenizer, style="chat")
    messages = [{"role": turn.role, "content": turn.text} for turn in TALK.turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert renderer.prompt_ids(TALK) == prompt
    ours = renderer.training(TALK).input_ids
    assert ours == whole[: len(ours)]
    assert decode(tokenizer, whole[len(ours) :]).strip() == ""
    assert learnt(tokenizer, renderer, TALK) == ["Me.<|im_end|>", "There, for £5.\n\nYes.<|im_end|>"]


def test_smolvlm_wants_typed_parts_and_a_space_that_belongs_to_the_answer(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "model_configs" / "SmolVLM-256M-Instruct")
    renderer = Renderer(tokenizer, style="chat")
    text = renderer.text(renderer.prompt_ids(TALK))
    assert text.endswith("<end_of_utterance>\nAssistant:")
    assert learnt(tokenizer, renderer, TALK) == [" Me.<end_of_utterance>", " There, for £5.\n\nYes.<end_of_utterance>"]


def test_the_token_behind_an_answer_is_its_end_whatever_the_tokenizers_is(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<pad>\n{% endfor %}assistant:"
    tokenizer = tiny_tokenizer(tmp_path, chat_template=template)
    renderer = Renderer(tokenizer, style="chat")
    assert learnt(tokenizer, renderer, TALK) == [" Me.<pad>", " There, for £5.\n\nYes.<pad>"]
    assert renderer.end_ids == (tokenizer.convert_tokens_to_ids("<pad>"), tokenizer.eos_token_id)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] }}{% endfor %}",
        "{{ messages[0]['content'] }}",
        None,
    ],
)
def test_a_template_that_loses_texts_is_refused(tmp_path: Path, template: str | None) -> None:
    with pytest.raises(UsageError, match="--prompt sections"):
        Renderer(tiny_tokenizer(tmp_path, chat_template=template), style="chat").training(TALK)


def test_a_template_that_drops_earlier_answers_makes_each_a_sample(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    tokenizer = tiny_tokenizer(tmp_path, chat_template=template)
    assert Renderer(tokenizer, style="chat").training(ONE)
    with pytest.raises(TurnsApart, match="talk"):
        Renderer(tokenizer, style="chat").training(TALK)
    rows = RenderedDataset([TALK], Renderer(tokenizer, style="chat"))
    assert [rows.sample_id(index) for index in range(len(rows))] == ["talk#1", "talk#2"]


# --- end tokens, empty answers, images ---------------------------------------------------------------------------


def test_without_an_end_token_there_is_no_training(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="end token"):
        Renderer(tokenizer)
    assert Renderer(tokenizer, generation_eos=3).training(ONE).labels[-1] == 3


def test_an_answer_that_holds_a_control_token_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    spoilt = replace(ONE, turns=(*ONE.turns[:-1], Turn("assistant", "It ends</s> here", "Output")))
    with pytest.raises(DataError, match="sample one: its answer holds </s>, a control token"):
        Renderer(tokenizer).training(spoilt)


def test_image_slots_are_never_text(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = (Turn("user", "<image>\nWhat is <b>this</b>?"), Turn("assistant", "A pub."))
    renderer = Renderer(tokenizer)
    assert "<image>" not in renderer.text(renderer.prompt_ids(Example("x", "g", turns, images=("a.jpg",))))
    assert "<image>" in renderer.text(
        renderer.prompt_ids(Example("x", "g", turns))
    )  # without an image it is just a word


# --- length ------------------------------------------------------------------------------------------------------


def long(words: int, name: str = "long") -> Example:
    return Example(name, name, (Turn("user", "Say.", "Instruction"), Turn("user", "word " * words), ONE.turns[-1]))


def test_the_limit_is_the_smaller_of_flag_and_model(tokenizer: PreTrainedTokenizerBase) -> None:
    assert Renderer(tokenizer, max_length=100, positions=64).limit == 64
    assert Renderer(tokenizer, max_length=50, positions=64).limit == 50
    with pytest.raises(UsageError, match="max_new_tokens"):
        Renderer(tokenizer, max_length=50, reserve=50)


def test_overlong_is_an_error_that_names_sample_and_length(tokenizer: PreTrainedTokenizerBase) -> None:
    needed = len(Renderer(tokenizer).training(long(50)).input_ids)
    with pytest.raises(Overlong, match=f"sample long needs {needed} tokens, the limit is 64"):
        Renderer(tokenizer, max_length=64).training(long(50))
    assert len(Renderer(tokenizer, max_length=needed).training(long(50)).input_ids) == needed


def test_truncation_cuts_the_source_only_and_as_little_as_it_can(tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(tokenizer, max_length=96, overlong="truncate_source")
    rendered = renderer.training(long(200))
    assert rendered.truncated
    assert 96 - 6 <= len(rendered.input_ids) <= 96
    assert learnt(tokenizer, renderer, long(200)) == [f"{ANSWER}</s>"]
    text = decode(tokenizer, rendered.input_ids)
    assert text.startswith("<s>### Instruction:\nSay.\n\n### User:\nword word")
    assert f"\n\n### Output:\n{ANSWER}</s>" in text
    assert not renderer.training(ONE).truncated


def test_a_prompt_leaves_room_for_what_is_generated(tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(tokenizer, max_length=96, reserve=30, overlong="truncate_source")
    assert 60 <= len(renderer.prompt_ids(long(200))) <= 66


def test_a_source_that_cannot_shrink_enough_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Overlong, match=r"without its source .* or pass --overlong drop$"):
        Renderer(tokenizer, max_length=20, overlong="truncate_source").training(long(200))


# --- data set and batches ----------------------------------------------------------------------------------------


def empty(name: str) -> Example:
    return Example(name, name, (Turn("user", "q"), Turn("assistant", " ")))


def test_dataset_keeps_ids_and_counts_what_it_leaves_out(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = Examples((long(100, "l1"), ONE, empty("e1"), TALK))
    data = RenderedDataset(examples, Renderer(tokenizer, max_length=128, overlong="drop"))
    assert [data.sample_id(item["sample_index"]) for item in data] == ["one", "talk"]
    assert [len(item["input_ids"]) for item in data] == list(data.lengths)
    notes = "\n".join(data.notes())
    assert "1 samples dropped, longer than the limit: l1" in notes
    assert "1 samples refused, nothing to learn: e1" in notes


def test_dataset_refuses_overlong_samples_with_their_number(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"2 of 3 samples are longer than 128 tokens; the longest, l2, needs"):
        RenderedDataset([long(100, "l1"), ONE, long(120, "l2")], Renderer(tokenizer, max_length=128))


def test_a_dataset_with_nothing_to_learn_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="none of 2 samples can be used"):
        RenderedDataset([empty("e1"), empty("e2")], Renderer(tokenizer))


def test_batches_are_masked_by_length_though_pad_is_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = RenderedDataset([ONE, TALK], Renderer(tokenizer))
    batch = Collator.of(tokenizer, multiple_of=8)([data[0], data[1]])
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["sample_index"].tolist() == [0, 1]
    for row, item in enumerate((data[0], data[1])):
        length = len(item["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert batch["input_ids"][row, :length].tolist() == item["input_ids"]
        assert batch["labels"][row, length - 1] == tokenizer.eos_token_id  # the end is learnt …
        assert torch.all(batch["labels"][row, length:] == IGNORED)  # … the padding is not
