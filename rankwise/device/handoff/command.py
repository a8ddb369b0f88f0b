"""rankwise validate by reference: is what an OpenAI-compatible server, or an app, answers the tuned model?

rankwise validate --reference TUNED --base_model BASE --data_path rows.jsonl --server http://HOST/v1
rankwise validate --reference TUNED --base_model BASE --data_path rows.jsonl --write_cases cases
rankwise validate --cases cases --answers got.jsonl

cases: read, or prepared from the two models ── answers: read, or asked ──▶ judge, API by API ── conclude ──▶
handoff.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankwise.data.sources.load import check_data, settle
from rankwise.device.handoff.answers import Heard, by_api, longer, read_answers
from rankwise.device.handoff.ask import OpenAIServer
from rankwise.device.handoff.cases import HandoffCases, read_cases, write_cases
from rankwise.device.handoff.page import HANDOFF, handoff_blocks
from rankwise.device.handoff.prepare import prepared
from rankwise.device.handoff.scale import require_known, require_natural
from rankwise.device.handoff.verdict import TUNED, UNDECIDED, Conclusion, as_dict, conclude, judge
from rankwise.errors import UndecidedError, UsageError, VerificationError
from rankwise.files.atomic import about_to_write, write_text
from rankwise.files.document import lines_of
from rankwise.files.processes import announce
from rankwise.files.run_folder import RunFolder, without_places
from rankwise.options.commands import ValidateConfig
from rankwise.options.sections import OUTTYPES
from rankwise.page.blocks import drawn, into, lines, pictures
from rankwise.page.canvas import drawable
from rankwise.page.text import plural
from rankwise.pipeline.idle import refuse_idle

ANSWERS = "answers.jsonl"


def run(config: ValidateConfig) -> dict[str, Any]:
    """Run the command; returns the content of handoff.json, {} where cases are only written.

    After everything is written: VerificationError where it is not the tuned model that answers, UndecidedError where
    the rows do not tell.
    """
    config = check(config)
    if not (config.server or config.answers):
        written(config, prepared(config))
        return {}
    cases = read_cases(Path(config.cases)) if config.cases else None
    answers = read_answers(Path(config.answers), cases) if config.answers and cases else None
    found = concluded(config, cases, answers) if cases and answers else None
    out = RunFolder(config.output_dir)
    with out.lock(), out.recording("validate", inputs(config)) as record:
        cases = cases or quietly(config)
        if config.write_cases:
            written(config, cases)
        server, answers = (None, answers) if answers else asked(config, cases)
        found = found or concluded(config, cases, answers)
        content = described(config, cases, found, server)
        if server:
            record.outputs["answers"] = write_text(out / ANSWERS, lines_of(one.as_row() for one in answers))
        record.outputs["handoff"] = HANDOFF.write(out, content)
        if drawable("the plot is"):
            record.outputs |= pictures(drawn(handoff_blocks(content), into(out / "plots")))
        out.save_config(config)
    for line in lines(handoff_blocks(content)):
        announce(line)
    announce(f"results in {out.path}")
    if found.kind == UNDECIDED:
        raise UndecidedError(found.line)
    if found.kind != TUNED:
        raise VerificationError(found.line)
    return content


def quietly(config: ValidateConfig) -> HandoffCases:
    """The cases; what is said meanwhile goes to the error stream, since the first line of the output is the verdict."""
    with redirect_stdout(sys.stderr):
        return prepared(config)


def check(config: ValidateConfig) -> ValidateConfig:
    """The config with its data's task; options that do not go together are refused before anything is read."""
    refuse_idle(config)
    if config.answers and config.server:
        raise UsageError("--answers are what an app has told; a --server is asked: give one of them")
    if config.answers and not config.cases:
        raise UsageError(
            "--answers are to the prompts of --cases FOLDER, which `rankwise validate --write_cases` makes"
        )
    if config.cases and not (config.answers or config.server):
        raise UsageError("--cases need what was answered: --answers FILE, or --server http://HOST/v1")
    if config.cases:
        return config
    config = settle(config)
    check_data(config.data, "validate")
    if not config.reference:
        raise UsageError("give the tuned model, an adapter or a merged one, with --reference TUNED")
    return config


def inputs(config: ValidateConfig) -> dict[str, str | None]:
    models = {"reference": config.reference, "base": config.base_model, "data": config.data.data_path}
    return {"cases": config.cases, "answers": config.answers} if config.cases else models


def written(config: ValidateConfig, cases: HandoffCases) -> None:
    about_to_write()
    folder = write_cases(Path(str(config.write_cases)), cases)
    counted = plural(len(cases.cases), "case"), plural(sum(len(case.places) for case in cases.cases), "place")
    announce(f"{', '.join(counted)} to ask, {len(cases.candidates.hypotheses)} hypotheses in {folder}")
    if not config.server:
        announce(
            f"what is answered is judged with --cases {folder} --answers FILE (docs/handoff.md: what a line holds)"
        )


def asked(config: ValidateConfig, cases: HandoffCases) -> tuple[OpenAIServer, list[Heard]]:
    server = OpenAIServer.of(str(config.server), config.served_model, config.top)
    return server, list(server.answers(cases, config.api))


def concluded(config: ValidateConfig, cases: HandoffCases, answers: Sequence[Heard]) -> Conclusion:
    """The verdict. DataError for answers that are no log-probabilities of this model's tokens."""
    strict = bool(config.outtype) and all(one in OUTTYPES for one in config.outtype)
    require_known(cases, answers)
    findings = [
        judge(api, cases.candidates, places, config.tolerance, strict=strict, longer=longer(cases, answers, api))
        for api, places in by_api(cases, answers).items()
    ]
    for one in findings:
        require_natural(cases, answers, one)
    return conclude(findings)


def described(
    config: ValidateConfig, cases: HandoffCases, found: Conclusion, server: OpenAIServer | None
) -> dict[str, Any]:
    return {
        "verdict": found.line,
        "kind": found.kind,
        "api": found.route,
        "more": list(found.more),
        "reference": cases.reference,
        "base": cases.base,
        "server": server.talk.url if server else None,
        "served_model": without_places(server.model) if server else None,
        "left_out": dict(server.left_out) if server else {},
        "tolerance": config.tolerance,
        "hypotheses": [asdict(one) for one in cases.candidates.hypotheses],
        "apis": [as_dict(one) for one in found.routes],
        "made_from": dict(cases.made_from),
    }


def describe(config: ValidateConfig) -> list[str]:
    whose = f"{config.reference} and its base" if not config.cases else "the models that the cases were made from"
    if not (config.server or config.answers):
        return [f"write prompts, forced answers and what {whose} would answer to {config.write_cases}"]
    what = f"ask {config.server} for next tokens" if config.server else f"read the answers in {config.answers}"
    return [f"{what} and compare them with {whose}", "exit with 6 where it is not the tuned model, with 7 undecided"]
