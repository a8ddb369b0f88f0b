"""The ladders of several forms put into words: conversion error, quantization damage, or what was trained.

{"f16": broken, …}           the conversion is wrong: nothing can be said about rounding yet
{"f16": ok, "q8_0": broken}  the conversion is right, and rounding costs more than rounding explains
{"q8_0": broken}             either; validate the f16 file too
"""

from __future__ import annotations

from collections.abc import Mapping

from rankwise.ship.parity.ladder import Ladder
from rankwise.ship.parity.rung import NO_PICTURE, NOT_MEASURED, WEAK

EXACT = ("f32", "f16", "bf16")  # forms that hold the weights, or all but all of them


def verdict(ladders: Mapping[str, Ladder]) -> list[str]:
    """Sentences, the most important first."""
    exact = [form for form in ladders if form in EXACT]
    rounded = [form for form in ladders if form not in EXACT]
    broken = {form: ladder.first_broken for form, ladder in ladders.items() if ladder.first_broken}
    if not broken:
        return [
            f"What runs in llama.cpp is what was trained ({', '.join(ladders)}): no rung is broken{unproven(ladders)}.",
            *cost(ladders),
        ]
    lines = []
    for form in [*exact, *rounded]:
        if rung := broken.get(form):
            lines.append(f"{form} breaks at the rung `{rung.name}`: {rung.why}")
    return [blame(exact, rounded, list(broken)), *lines, *cost(ladders)]


def unproven(ladders: Mapping[str, Ladder]) -> str:
    """What that does not show: rungs that were not measured, and those whose limits are wide."""
    rungs = [rung for ladder in ladders.values() for rung in ladder.rungs]
    missing = dict.fromkeys(rung.name for rung in rungs if rung.status == NOT_MEASURED and rung.why != NO_PICTURE)
    weak = dict.fromkeys(rung.name for rung in rungs if rung.note.startswith(WEAK))
    parts = [f"{', '.join(names)} {what}" for names, what in ((missing, "not measured"), (weak, "weak")) if names]
    return f" ({'; '.join(parts)})" if parts else ""


def blame(exact: list[str], rounded: list[str], broken: list[str]) -> str:
    wrong = [form for form in exact if form in broken]
    if wrong:
        beyond = f"; {', '.join(rounded)} says nothing about quantization until that is right" if rounded else ""
        return f"Conversion error: {', '.join(wrong)} keeps the weights, yet does not do what was trained{beyond}."
    if exact:
        return (
            f"Quantization damage: {', '.join(exact)} does what was trained, {', '.join(broken)} does not, by more "
            "than rounding explains in transformers."
        )
    return (
        f"{', '.join(broken)} is not what was trained; validate the f16 file too, which tells conversion from rounding."
    )


def cost(ladders: Mapping[str, Ladder]) -> list[str]:
    """What rounding costs, where there is an exact form to compare with."""
    measured = {form: ladder["logprobs"].measured.get("kl_mean") for form, ladder in ladders.items()}
    known = {form: value for form, value in measured.items() if value is not None}
    if len(known) < 2:
        return []
    return [
        "Mean KL from the trained model: "
        + ", ".join(f"{form} {value:.2g}" for form, value in known.items())
        + " nats."
    ]
