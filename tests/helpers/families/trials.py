"""Questions that run commands: training each tower, two steps, merging, checking. See `questions`."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file

from families.commands import command, usable
from families.questions import NEAR, QUESTIONS, question
from families.subject import Subject
from families.talks import TALKS
from rankwise.models.load import load_model

__all__ = ["QUESTIONS", "refused_by_train"]

PROJECTING = ("project", "merger", "connector", "mlp_AR", "aligner", "resampler", "generation")
PROJECTING += ("vision_embedding.1", "vision_embedding.3")  # Isaac's
UNASKED = {"isaac": {"language", "projector"}}  # as docs/isaac.md has it
SEEING = ("vision", "visual", "vqmodel", "image_tower", "video_tower")


@question("towers")
def towers(subject: Subject) -> str:
    """Each choice of tower trains that tower's matrices and no other, through the command."""
    sites = linear_sites(subject)
    for tower in ("language", "vision", "projector"):
        wanted = {path for path in sites if tower_by_name(path) == tower}
        out = subject.work / f"tower_{tower}"
        more = f" --lora {tower}{'' if tower == 'language' else ' --freeze language'}"
        code, said = train(subject, out, more)
        if not wanted and code == 2:
            continue  # a tower without linear layers is refused by name
        if code:
            return f"{tower}: {said}"
        moved = moved_sites(out)
        if still := sorted(path for path, value in moved.items() if not value > 0):
            idle = [path for path in still if path not in unused_sites(subject)]
            if idle:
                return f"{tower}: {len(idle)} of {len(moved)} matrices got no gradient: {idle[0]}"
        if other := sorted(moved.keys() - wanted):
            return f"{tower}: {len(other)} matrices of another tower train: {other[0]}"
        if not moved:
            return f"{tower}: nothing trains"
    return ""


def tower_by_name(path: str) -> str:
    """By what families call their modules, above the layers of a tower."""
    outer = re.split(r"\.(?:encoder|layers?|blocks?|resblocks)\.", path)[0]
    if "language_model" in outer:
        return "language"
    if any(name in outer for name in PROJECTING):
        return "projector"
    return "vision" if any(name in outer for name in SEEING) else "language"


def linear_sites(subject: Subject) -> list[str]:
    """Linear layers, and modules that hold a layer's experts."""
    modules = subject.family.model.named_modules()
    return [name for name, module in modules if isinstance(module, torch.nn.Linear) or has_experts(name, module)]


def has_experts(name: str, module: torch.nn.Module) -> bool:
    return name.endswith("experts") and any(value.dim() == 3 for value in module.parameters(recurse=False))


def unused_sites(subject: Subject) -> set[str]:
    """Linear layers without gradient from what follows the images: what a last layer adds to the images' places."""
    model = subject.family.model
    model.zero_grad(set_to_none=True)
    given = subject.family.inputs(TALKS["one image"], answered=True)
    model(**given).logits[0, -1].float().logsumexp(-1).backward()
    found = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (module.weight.grad is None or not module.weight.grad.any())
    }
    model.zero_grad(set_to_none=True)
    return found


def moved_sites(out: Path) -> dict[str, float]:
    """Path → largest entry of B, which begins at zero; of the pairs of one module's experts the smaller one."""
    weights = load_file(out / "adapter_model.safetensors")
    ends, found = ".lora_B.weight", {}
    for name, value in weights.items():
        if name.endswith(ends):
            path = name.removeprefix("base_model.model.").removesuffix(ends).replace(".base_layer", "")
            found[path] = min(found.get(path, math.inf), value.abs().max().item())
    return found


@question("train")
def trained(subject: Subject) -> str:
    """Two steps; the first loss is what the family's own logits give for the answers. Where no tower is chosen, the
    language tower trains."""
    out = subject.work / "run"
    code, said = train(subject, out)
    if code:
        return said
    with (out / "training_log.csv").open() as stream:
        losses = [float(row["loss"]) for row in csv.DictReader(stream) if row["loss"]]
    expected = own_loss(subject)
    if len(losses) != 2 or not all(map(math.isfinite, losses)):
        return f"losses are {losses}"
    if abs(losses[0] - expected) > 3e-4:
        return f"the first loss is {losses[0]:.5f}, the family's {expected:.5f}"
    if losses[1] == losses[0]:
        return "two steps change nothing"
    trains = {tower_by_name(path) for path in moved_sites(out)}
    return "" if trains == UNASKED.get(subject.name, {"language"}) else f"unasked, {', '.join(sorted(trains))} train"


def own_loss(subject: Subject) -> float:
    """Σ cross-entropy / Σ tokens over the answers of the rows, from the family's inputs and the texts alone."""
    total, count = 0.0, 0
    for name in subject.talks:
        talk = TALKS[name]
        ids = subject.family.inputs(talk, answered=True)["input_ids"][0]
        scores = subject.family.logits(talk).log_softmax(-1)
        for start, stop in answer_places(subject, name):
            for place in range(start, stop):
                total -= scores[place - 1, ids[place]].item()
                count += 1
    return total / count


def answer_places(subject: Subject, name: str) -> list[tuple[int, int]]:
    """(first, behind the end token) of each answer: where the family's prompt for it ends, up to the next special
    token. Images may take another number of tokens in that prompt, which has fewer of them."""
    talk, found = TALKS[name], []
    whole = subject.family.inputs(talk, answered=True)["input_ids"][0].tolist()
    special = subject.family.processor.tokenizer.added_tokens_decoder
    image = subject.family.image_token_id
    words = [place for place, token in enumerate(whole) if token != image]
    for number, (role, _) in enumerate(talk.turns):
        if role == "assistant":
            asked = subject.family.inputs(replace(talk, turns=talk.turns[: number + 1]))["input_ids"][0].tolist()
            start = words[sum(token != image for token in asked)]
            stop = next(place for place in range(start, len(whole)) if whole[place] in special) + 1
            found.append((start, stop))
    return found


@question("merge")
def merged(subject: Subject) -> str:
    """The merged model gives what PEFT gives with base and adapter, on the family's own inputs."""
    run, out = subject.work / "run", subject.work / "merged"
    if not (run / "adapter_model.safetensors").is_file() and (said := trained(subject)):
        return f"train: {said}"
    code, said = command(f"merge {run}", out)
    if code:
        return said
    given = subject.family.inputs(TALKS["one image"], answered=True)
    base = load_model(str(subject.folder), torch.float32).eval()
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, run)(**given).logits.float()
        found = load_model(str(out), torch.float32).eval()(**given).logits.float()
        before = subject.family.model(**given).logits.float()
    apart = (found - expected).abs().max().item()
    if not apart < NEAR:
        return f"logits differ by {apart:.2g}"
    return "" if (found - before).abs().max().item() > 10 * apart else "the adapter changes nothing"


@question("check")
def checked(subject: Subject) -> str:
    """`check` finds nothing in the way."""
    code, said = command(f"check --model_name {subject.folder} --data_path {usable(subject)}", subject.work / "check")
    return said if code else ""


def train(subject: Subject, out: Path, more: str = "") -> tuple[int, str]:
    """Two steps over all rows at once, without dropout or warm-up."""
    line = (
        f"train --model_name {subject.folder} --data_path {usable(subject)} --use_cpu --max_steps 2 --lr 1e-2 "
        "--lora_r 2 --lora_dropout 0 --lr_scheduler_type constant --per_device_train_batch_size 8 --logging_steps 1 "
        "--val_fraction 0 --eval_strategy no --save_strategy no --no_plots"
    )
    return command(line + more, out)


def refused_by_train(subject: Subject) -> str:
    """The sentence that `train` refuses the family's rows with; "" where it does not."""
    line = f"train --model_name {subject.folder} --data_path {subject.product.data} --use_cpu --max_steps 1 --no_plots"
    code, said = command(line, subject.work / "refused")
    return said.split("rankwise: ", 1)[-1] if code in (2, 3) else ""
