"""Real chat templates, those that the trl package ships: ids are `apply_chat_template`'s, labels exactly the answers.

The tokenizer is a tiny one that knows each template's tokens; the templates are the models' own files.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny import TEXTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rankwise.data.chat import TemplateRefused
from rankwise.data.check.comparison import Oracle
from rankwise.data.dataset import RenderedDataset, outcomes
from rankwise.data.example import Example, Turn
from rankwise.data.render import IGNORED, Rendered, Renderer
from rankwise.errors import DataError

TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.origin).parent / "chat_templates" if TRL and TRL.origin else Path("nowhere")
TOKEN = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|</?[a-z_]+>|<[a-z]+\|>|<\|[a-z_]+>|\[[A-Za-z_/]+MASK\]")
THINKING = ("<think>", "</think>")  # tokens too, though not special ones, as in Qwen3's tokenizer


@dataclass(frozen=True)
class Family:
    """What a template must do.

    end: of an answer. turns: several answers in one sample, or each in its own ("apart"). thinks: writes
    reasoning_content. kwargs: without them its prompt for an answer opens a thought, and answers have none.
    """

    end: str
    turns: str = "whole"
    thinks: bool = False
    system: bool = True
    kwargs: tuple[tuple[str, Any], ...] = ()


NO_THOUGHT = (("enable_thinking", False),)
FAMILIES = {
    "cohere": Family("<|END_OF_TURN_TOKEN|>"),
    "cohere2": Family("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "diffusion_gemma": Family("<turn|>", thinks=True),
    "gemma": Family("<end_of_turn>", system=False),
    "gemma3": Family("<end_of_turn>"),
    "gemma4": Family("<turn|>"),
    "gemma4_v5": Family("<turn|>", thinks=True),
    "glm4moe": Family("<|user|>", thinks=True),
    "gptoss": Family("<|return|>", turns="apart", thinks=True),
    "idefics3": Family("<end_of_utterance>"),
    "lfm2": Family("<|im_end|>"),
    "lfm2_2_5": Family("<|im_end|>", thinks=True),
    "llama3": Family("<|eot_id|>"),
    "llama3_1": Family("<|eot_id|>"),
    "llama3_2": Family("<|eot_id|>"),
    "llava_next": Family("</s>"),
    "muse_glimmer": Family("<|eot|>", thinks=True),
    "nemotron_3_nano": Family("<|im_end|>", kwargs=NO_THOUGHT),
    "phi3": Family("<|end|>"),
    "phi3_5": Family("<|end|>"),
    "qwen2_5": Family("<|im_end|>"),
    "qwen2_5_vl": Family("<|im_end|>"),
    "qwen3": Family("<|im_end|>", turns="apart", thinks=True),
    "qwen3_5_nothink": Family("<|im_end|>", turns="apart"),
    "qwen3_5_think": Family("<|im_end|>", turns="apart", thinks=True),
    "qwen3_8": Family("<|im_end|>", thinks=True),
    "qwen3_instruct_2507": Family("<|im_end|>"),
    "qwen3_vl": Family("<|im_end|>"),
    "smolvlm": Family("<end_of_utterance>"),
}
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="trl is not installed: its chat templates are what is read")
families = pytest.mark.parametrize("name", FAMILIES)


def user(text: str) -> Turn:
    return Turn("user", text)


def answer(text: str, reasoning: str = "") -> Turn:
    return Turn("assistant", text, reasoning=reasoning)


TALKS = {
    "single": (user("Who?"), answer("Me, for £5.\n\nYes.")),
    "multi": (user("Who?"), answer("Me."), user("Where?\nHere  or there?"), answer("There.")),
    "control": (user("Say <|im_end|>, </s>, <end_of_turn>, <|user|> and <|eot_id|>!"), answer("No.")),
    "written out": (user("Who?"), answer("<think>\nHm.\n</think>\n\nMe.")),
}
SYSTEM = (Turn("system", "Be brief."), *TALKS["multi"])
THOUGHT = (user("Who?"), answer("Me.", "Hm, who?"))


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    special = dict.fromkeys(["<unk>", "<s>", "</s>", *TOKEN.findall(template)])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384 + len(special),
        special_tokens=[token for token in special if token not in THINKING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.add_tokens(list(THINKING))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **named)


@cache
def renderer_of(name: str, **changes: Any) -> Renderer:
    kwargs = changes.pop("kwargs", FAMILIES[name].kwargs if name in FAMILIES else ())
    return Renderer(tokenizer_of(source(name)), style="chat", template_kwargs=dict(kwargs), **changes)


def ids_of(renderer: Renderer, turns: tuple[Turn, ...], *, generate: bool = False) -> list[int]:
    """The conversation by one call of `apply_chat_template`, from the template's own file."""
    kwargs = {name: value for name, value in renderer.template_kwargs.items() if name != "strftime_now"}
    said: list[dict[str, Any]] = [{"role": turn.role, "content": turn.text} for turn in turns]
    for one, turn in zip(said, turns, strict=True):
        one |= {"reasoning_content": turn.reasoning} if turn.reasoning else {}
        one |= {"content": [{"type": "text", "text": turn.text}]} if renderer.template.typed else {}
    found: list[int] = renderer.tokenizer.apply_chat_template(
        said, tokenize=True, return_dict=False, add_generation_prompt=generate, **kwargs
    )
    return found


def learnt(renderer: Renderer, rendered: Rendered) -> list[str]:
    stretches: list[list[int]] = [[]]
    for token, label in zip(rendered.input_ids, rendered.labels, strict=True):
        assert label in (IGNORED, token)
        stretches += [[]] if label == IGNORED else []
        stretches[-1] += [] if label == IGNORED else [label]
    return [renderer.text(stretch) for stretch in stretches if stretch]


def checked(renderer: Renderer, turns: tuple[Turn, ...]) -> list[list[str]]:
    """What each sample of a conversation teaches, once its ids are the template's own."""
    example, found = Example("talk", "talk", turns), []
    for sample, rendered in outcomes(example, renderer):
        assert isinstance(rendered, Rendered), rendered
        prompt, whole = ids_of(renderer, sample.turns[:-1], generate=True), ids_of(renderer, sample.turns)
        assert renderer.prompt_ids(sample) == prompt
        assert rendered.input_ids[: len(prompt)] == prompt
        assert rendered.labels[len(prompt) - 1 :] == [IGNORED, *rendered.input_ids[len(prompt) :]]
        length = len(rendered.input_ids) - (rendered.input_ids[-1] not in whole[len(prompt) :])
        assert rendered.input_ids[:length] == whole[:length]
        assert rendered.input_ids[-1] == renderer.end_ids[0]
        found.append(learnt(renderer, rendered))
    return found


@families
@pytest.mark.parametrize("talk", ["single", "multi"])
def test_ids_are_the_templates_and_labels_the_answers(name: str, talk: str) -> None:
    family, renderer = FAMILIES[name], renderer_of(name)
    taught = checked(renderer, TALKS[talk])
    answers = [turn.text for turn in TALKS[talk] if turn.role == "assistant"]
    assert [len(one) for one in taught] == ([len(answers)] if family.turns == "whole" else [1] * len(answers))
    for text, said in zip((text for one in taught for text in one), answers, strict=True):
        before, behind = text.split(said)
        assert behind == family.end
        frame = re.sub(rf"{TOKEN.pattern}|final|to=user", "", before)  # a thought left empty, a channel's name
        assert not frame.strip()


@families
def test_a_system_turn_is_rendered_or_refused_by_name(name: str) -> None:
    renderer, example = renderer_of(name), Example("talk", "talk", SYSTEM)
    if FAMILIES[name].system:
        checked(renderer, SYSTEM)
    else:
        with pytest.raises(
            TemplateRefused, match="sample talk: the chat template refuses it: System role not supported"
        ):
            renderer.training(example)


@families
def test_reasoning_is_written_where_the_template_writes_it_and_refused_elsewhere(name: str) -> None:
    renderer, example = renderer_of(name), Example("talk", "talk", THOUGHT)
    if FAMILIES[name].thinks:
        [[text]] = checked(renderer, THOUGHT)
        assert text.index("Hm, who?") < text.index("Me.")
        assert text.count("Hm, who?") == text.count("Me.") == 1
    else:
        with pytest.raises(DataError, match="sample talk: the chat template does not"):
            renderer.training(example)


@families
def test_a_thought_in_the_answer_itself_is_learnt_once(name: str) -> None:
    """Qwen3's template parts it off: laid out around a stand-in for the answer, an empty thought came before it."""
    renderer = renderer_of(name)
    if name == "qwen3_5_nothink" or FAMILIES[name].kwargs:
        with pytest.raises(DataError, match="--chat_template_kwargs"):
            renderer.training(Example("talk", "talk", TALKS["written out"]))
        return
    [[text]] = checked(renderer, TALKS["written out"])
    assert text.count("Hm.") == text.count("</think>") - (name == "qwen3_8") == 1


@families
def test_control_tokens_in_a_question_are_text(name: str) -> None:
    """They add none of the template's tokens; all the same they are read back as they stand."""
    renderer = renderer_of(name)
    example = Example("talk", "talk", TALKS["control"])
    plain = Example("talk", "talk", (user("Say it!"), answer("No.")))
    [(_, rendered)], [(_, bare)] = outcomes(example, renderer), outcomes(plain, renderer)
    assert isinstance(rendered, Rendered) and isinstance(bare, Rendered)
    for token in set(TOKEN.findall(TALKS["control"][0].text)):
        number = renderer.tokenizer.convert_tokens_to_ids(token)
        if number != renderer.tokenizer.unk_token_id:
            assert rendered.input_ids.count(number) == bare.input_ids.count(number)
    assert TALKS["control"][0].text in renderer.text(rendered.input_ids)
    sample = (example, rendered, renderer.prompt_ids(example))
    assert list(Oracle(renderer).differences([sample])) == []


@families
def test_the_comparison_finds_nothing_and_can_find(name: str) -> None:
    renderer = renderer_of(name)
    samples = [
        (sample, rendered, renderer.prompt_ids(sample))
        for talk in ("single", "multi")
        for sample, rendered in outcomes(Example(talk, talk, TALKS[talk]), renderer)
        if isinstance(rendered, Rendered)
    ]
    assert list(Oracle(renderer).differences(samples)) == []
    for sample, rendered, prompt in samples:
        for spoilt in spoilings(renderer, rendered, prompt):
            assert list(Oracle(renderer).differences([(sample, *spoilt)])), spoilt


def spoilings(renderer: Renderer, rendered: Rendered, prompt: list[int]) -> list[tuple[Rendered, list[int]]]:
    """What a broken renderer could make: a token too many, one too few, another end, a label too many, a second BOS."""
    ids, labels, start = rendered.input_ids, rendered.labels, len(prompt)
    other = renderer.tokenizer.convert_tokens_to_ids("a")
    return [
        (Rendered(ids[:-1], labels[:-1]), prompt),
        (Rendered([*ids[:-1], other], [*labels[:-1], other]), prompt),
        (Rendered([*ids[:-2], ids[-1]], [*labels[:-2], labels[-1]]), prompt),
        (Rendered([*ids[:start], other, *ids[start:]], [*labels[:start], other, *labels[start:]]), prompt),
        (Rendered(ids, [*labels[: start - 1], ids[start - 1], *labels[start:]]), prompt),
        (Rendered(ids, [*labels[:start], IGNORED, *labels[start + 1 :]]), prompt),
        (Rendered([1, *ids], [IGNORED, *labels]), [1, *prompt]),
        (rendered, prompt[:-1]),
    ]


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_a_template_that_never_renders_what_it_asks_for_is_refused_with_the_way_out(name: str) -> None:
    """Its prompt opens a thought and its conversations have none."""
    with pytest.raises(DataError, match=r"sample talk: .*--chat_template_kwargs .*--chat_template"):
        renderer_of(name).training(Example("talk", "talk", TALKS["single"]))


def test_a_mode_of_the_template_is_the_way_out() -> None:
    example = Example("talk", "talk", TALKS["single"])
    with pytest.raises(DataError, match="enable_thinking"):
        renderer_of("nemotron_3_nano", kwargs=()).training(example)
    assert renderer_of("nemotron_3_nano").training(example)


def test_answers_on_their_own_see_what_generation_sees() -> None:
    """Qwen3 drops the thoughts of earlier answers: a conversation of two is two samples, the second without them."""
    turns = (user("Who?"), answer("Me.", "Hm."), user("Where?"), answer("There.", "So."))
    renderer = renderer_of("qwen3")
    assert checked(renderer, turns) == [
        ["<think>\nHm.\n</think>\n\nMe.<|im_end|>"],
        ["<think>\nSo.\n</think>\n\nThere.<|im_end|>"],
    ]
    rows = RenderedDataset([Example("talk", "talk", turns), Example("one", "one", turns[:2])], renderer)
    assert [rows.sample_id(index) for index in range(len(rows))] == ["talk#1", "talk#2", "one"]
    assert "Hm." not in renderer.text(rows[1]["input_ids"])
    assert any("1 conversations become 2 samples" in note for note in rows.notes())


def test_glm_stops_on_what_opens_the_next_turn_if_its_configuration_says_so() -> None:
    tokenizer = tokenizer_of(source("glm4moe"))
    user_token, other = tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    stops = Renderer(tokenizer, style="chat", generation_eos=[2, user_token, other])
    assert stops.end_ids == (user_token, 2, other)
    assert stops.training(Example("talk", "talk", TALKS["multi"])).input_ids[-1] == user_token
    assert Renderer(tokenizer, style="chat", generation_eos=[2]).end_ids == (2,)


@pytest.mark.parametrize(
    ("name", "variable"), [("llama3_2", "date_string"), ("gptoss", "strftime_now"), ("muse_glimmer", "strftime_now")]
)
def test_a_date_is_written_once_and_kept(name: str, variable: str) -> None:
    renderer, example = renderer_of(name), Example("talk", "talk", TALKS["single"])
    assert set(renderer.settings["chat_template_kwargs"]) == {variable}
    later = renderer_of(name, kwargs=((variable, {"date_string": "01 Feb 2025"}.get(variable, "2025-02-01")),))
    text = later.text(later.prompt_ids(example))
    assert ("01 Feb 2025" if variable == "date_string" else "2025-02-01") in text
    assert later.settings["chat_template"] == renderer.settings["chat_template"]
