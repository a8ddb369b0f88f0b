"""The rungs about the prompt: as many tokens for a picture on both sides, and the same ids around it.

image tokens    tokens in place of the pictures, delimiters included
token ids       the text's ids; one BOS; the delimiters that the runtime writes; the GGUF's chat template
"""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.ship.llama.runtime import Runtime
from rankwise.ship.parity.floor import Thresholds
from rankwise.ship.parity.observed import Observed, common
from rankwise.ship.parity.rung import NO_PICTURE, NOT_MEASURED, Rung, judged, named

SHOWN_IDS, SHOWN_CHARACTERS = 6, 40


def image_tokens(seen: Sequence[Observed], _: Runtime, __: Thresholds) -> Rung:
    """The numbers are equal, case by case."""
    pictured = [one for one in seen if one.case.images or one.expected.expansions]
    if not pictured:
        return Rung("image tokens", NOT_MEASURED, why=NO_PICTURE)
    heard = [one for one in pictured if not one.refused]
    measured = {
        "reference": sorted({expected_span(one) for one in heard}),
        "runtime": sorted({one.span for one in heard}),
        "embeddings_in_reference": sorted({one.expected.image_tokens for one in pictured}),
    }
    return judged("image tokens", measured, {"difference": 0}, why_other_count(pictured, heard))


def why_other_count(pictured: Sequence[Observed], heard: Sequence[Observed]) -> str:
    slots = [one for one in pictured if one.case.prompt.count(one.case.marker) != len(one.case.images)]
    refused = [one for one in pictured if one.refused]
    wrong = [one for one in heard if expected_span(one) != one.span]
    if slots:
        return (
            f"{named(slots)}: the prompt does not hold one marker ({slots[0].case.marker}) for each picture; another "
            "text in its place is read as words"
        )
    if refused:
        return f"{named(refused)}: the runtime refuses the prompt: {refused[0].refused}"
    if wrong:
        return (
            f"{named(wrong)}: a picture is {expected_span(wrong[0])} tokens in training and {wrong[0].span} in the "
            "runtime, which cuts it into other tiles. Set longest_edge and tiling in device.json (`runtime` lays a "
            "picture out as llama.cpp does), train with that target, and export with it"
        )
    return ""


def expected_span(one: Observed) -> int:
    return sum(map(len, one.expected.expansions))


def token_ids(seen: Sequence[Observed], runtime: Runtime, _: Thresholds) -> Rung:
    """Equal ids, and the runtime read what it was meant to."""
    heard = [one for one in seen if not one.refused]
    refused = [one for one in seen if one.refused and not one.case.images]
    wrong = [one for one in heard if list(one.expected.ids) != one.whole_ids]
    read = [one for one in heard if one.free and echoed(one.free.prompt_text) != echoed(one.wanted)]
    asked = [one for one in seen if one.expected.template]
    templates = [one for one in asked if not same_template(one, runtime)]
    measured = {
        "cases": len(seen),
        "ids_equal": len(heard) - len(wrong),
        "read_as_written": len(heard) - len(read),
        "template_equal": not templates if asked else None,
    }
    if refused:
        why = f"{named(refused)}: the runtime refuses the prompt: {refused[0].refused}"
    elif wrong:
        why = f"{named(wrong)}: {ids_reason(wrong[0], runtime)}"
    elif read:
        why = f"{named(read)}: {text_reason(read[0])}"
    else:
        why = template_reason(templates[0], runtime) if templates else ""
    return judged("token ids", measured, {"different": 0}, why)


def echoed(prompt: str) -> str:
    """Without the space that SentencePiece puts before a prompt without BOS: llama.cpp's echo leaves it out."""
    return prompt.removeprefix(" ")


def ids_reason(one: Observed, runtime: Runtime) -> str:
    expected, found = list(one.expected.ids), one.whole_ids
    begin = one.expected.begin_id
    if found == [begin, *expected]:
        twice = "a second BOS" if expected[:1] == [begin] else "a BOS"
        return (
            f"the runtime reads {twice} at the beginning, which training never saw; set tokenizer.ggml.add_bos_token "
            "to false in the GGUF, or send the prompt without its own"
        )
    if [begin, *found] == expected:
        return "the BOS of training is missing; set tokenizer.ggml.add_bos_token to true in the GGUF"
    place = common(expected, found)
    ours, theirs = (repr(runtime.detokenize(ids[place : place + SHOWN_IDS])) for ids in (expected, found))
    return (
        f"from token {place} on, training has {ours} and the runtime reads {theirs}; is the prompt made by the same "
        "template, and are its special tokens parsed and not read as text?"
    )


def text_reason(one: Observed) -> str:
    assert one.free
    place = common([*map(ord, one.wanted)], [*map(ord, one.free.prompt_text)])
    wanted, read = (repr(text[place : place + SHOWN_CHARACTERS]) for text in (one.wanted, one.free.prompt_text))
    return (
        f"the runtime read another prompt than training has: at character {place} it has {read}, training {wanted} "
        "(delimiters of tiles are the runtime's own: see tiling in device.json)"
    )


def same_template(one: Observed, runtime: Runtime) -> bool:
    assert one.expected.template
    messages, text = one.expected.template
    begin, found = runtime.info.begin_text, runtime.apply_template(messages, one.expected.template_kwargs)
    return found.removeprefix(begin) == text.removeprefix(begin)


def template_reason(one: Observed, runtime: Runtime) -> str:
    assert one.expected.template
    messages, text = one.expected.template
    found = runtime.apply_template(messages, one.expected.template_kwargs)
    return (
        f"the chat template in the GGUF makes {found!r} where the model's own makes "
        f"{text!r}; an app that uses the GGUF's asks otherwise than training did. Export again from the merged folder"
    )
