"""The documented command lines run, in their order, on tiny models and data under the documented names.

Only numbers of steps, epochs, ranks of features and answer lengths are smaller (`documented_world.shrunk`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from documented import DOCS, Line, lines
from documented_world import TINYLLAMA, made, shrunk
from installs import unasked
from test_android_recipe import can_convert

from rankwise import cli
from rankwise.cli import main
from rankwise.labels.teacher.loopback import LoopbackTeacher

SCRIPTS, *PAGES = (
    lines(DOCS / f"{name}.md") for name in ("from-the-scripts", "recipes", "first-plan", "photos-to-phone")
)
ELSEWHERE = {  # lines that other tests run: the way of both recipes, running in the background, a batch of presets
    "rankwise run quickstart": ("test_android_recipe.py", '"run", "quickstart"'),
    "rankwise run smolvlm_android --background": ("test_run_logging.py", '"--background"'),
    "rankwise batch e2e_attention e2e_mlp -o runs/batch --set train.max_steps=500": (
        "test_presets.py",
        '"batch", "e2e_attention", "e2e_mlp"',
    ),
    "rankwise compare runs/batch/e2e_attention runs/batch/e2e_mlp -o runs/batch/comparison": (
        "test_presets.py",
        'call("compare", *runs',
    ),
    "rankwise doctor": ("test_doctor.py", '"doctor", "--json"'),
    "rankwise demo": ("test_demo.py", '"demo", "--quick"'),
    "rankwise run smolvlm_android --background -o runs/phone": ("test_run_logging.py", '"--background"'),
    "rankwise bundle --replay runs/quickstart/bundle": ("test_bundle.py", '"bundle", "--replay"'),
    "rankwise bundle --replay runs/phone/bundle --answers phone.jsonl": ("test_app_answers.py", '"--answers"'),
}
NEEDS_CONVERTER = ("export", "validate")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # what tiny data make libraries say is no matter here
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("world"))


def before(section: str) -> None:
    """What a section takes for granted."""
    if section == "Experiments on text tasks":
        trained = "train --task wikisql --data_path data/wikisql --adapter_folder final_model -o results/exp --lora_r 2"
        assert main([*trained.split(), "--model_name", TINYLLAMA, "--max_steps", "1", "--no_plots"]) == 0
    if section == "Android: fine-tuning":
        assert main("label photos --from_folders -o dataset --image_size 64".split()) == 0


def why_not(line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Why a line failed; nothing where it ran."""
    words, variables = shrunk(line)
    if line.words[0] == "train":  # the page shows other ways to the same folder
        shutil.rmtree(cli.resolve("train", words[1:])[0].output_dir, ignore_errors=True)
    with monkeypatch.context() as environment, unasked(environment) as late:
        for name, value in variables.items():
            environment.setenv(name, value)
        code = main(words)
    if late:
        return f"{line.text}\n    needs {', '.join(late)}, and did not ask for it before it read anything"
    said = capsys.readouterr().err
    missed = code == 6 and "below --min_accuracy" in said  # of a random model
    return "" if code == 0 or missed else f"{line.text}\n    exit {code}: {said.strip()[-600:]}"


def runs_here(line: Line) -> bool:
    return line.text not in ELSEWHERE and (can_convert() or line.words[0] not in NEEDS_CONVERTER)


SECTIONS = [pytest.param(SCRIPTS, name, id=name) for name in dict.fromkeys(line.section for line in SCRIPTS)]


@pytest.mark.parametrize(("page", "section"), [*SECTIONS, *(pytest.param(page, "", id=page[0].page) for page in PAGES)])
def test_the_documented_lines_run(
    page: list[Line],
    section: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In their order; of the page of the scripts section by section."""
    monkeypatch.chdir(shutil.copytree(world, tmp_path / "here"))
    before(section)
    with LoopbackTeacher() as teacher:
        monkeypatch.setenv("OPENAI_BASE_URL", teacher.url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        chosen = [line for line in page if not section or line.section == section]
        whys = (why_not(line, monkeypatch, capsys) for line in chosen if runs_here(line))
        failed = next(filter(None, whys), "")  # lines need those before them
    assert not failed, failed


def test_what_runs_elsewhere_does() -> None:
    written = {line.text for page in (SCRIPTS, *PAGES) for line in page}
    for text, (file, words) in ELSEWHERE.items():
        assert text in written
        (path,) = Path(__file__).parent.rglob(file)
        assert words in path.read_text(encoding="utf-8")
