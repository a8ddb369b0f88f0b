"""Every tiny family against its own processor and model, and the committed table against what is installed.

Here the questions that take no command; `make matrix` asks all of them and writes the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import transformers
from families import FAMILIES
from families.commands import PLACE, command
from families.subject import Subject
from families.trials import QUESTIONS, refused_by_train
from families.unbuilt import LIMITED, UNBUILT
from family_matrix import BEGIN, END, MAPPING, PAGE, TABLE, markdown

from rankwise.files.atomic import read_object

FAMILY_TABLE = read_object(TABLE)
STATES = {name: row["state"] for name, row in FAMILY_TABLE["families"].items()}
EXACT = [name for name in FAMILIES if STATES[name] == "exact"]
ASKED = ("one image", "two images", "text only", "turns", "labels", "forward", "batch")
Subjects = Callable[[str], Subject]
pytestmark = pytest.mark.filterwarnings("ignore:.*__array__ implementation:DeprecationWarning")  # GLM's processors


@pytest.fixture(scope="module")
def subjects(family_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    """A family's tiny model and both sides; made once."""
    return cache(lambda name: Subject.of(name, family_models(name), tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("question", ASKED)
@pytest.mark.parametrize("name", EXACT)
def test_a_family_is_given_what_its_own_code_makes(subjects: Subjects, name: str, question: str) -> None:
    assert QUESTIONS[question](subjects(name)) == ""


@pytest.mark.parametrize("name", [name for name in FAMILIES if STATES[name] == "refused"])
def test_a_family_that_is_not_exact_is_refused(subjects: Subjects, name: str) -> None:
    assert FAMILY_TABLE["families"][name]["why"] in refused_by_train(subjects(name))


def test_the_table_holds_every_family_that_transformers_knows() -> None:
    """Under the pinned versions. With others the product warns; what is new there has to be asked."""
    if FAMILY_TABLE["versions"] != {"transformers": transformers.__version__}:
        pytest.skip(f"the table is of {FAMILY_TABLE['versions']}")
    missing = sorted(MAPPING.keys() - STATES.keys())
    assert not missing, f"`make matrix` has not seen {missing}"
    assert STATES.keys() <= MAPPING.keys() | FAMILIES.keys()


def test_the_table_is_of_the_families_that_are_built() -> None:
    assert {name for name, state in STATES.items() if state != "untested"} == FAMILIES.keys() - LIMITED.keys()
    assert FAMILIES.keys().isdisjoint(UNBUILT)
    assert UNBUILT.keys() <= MAPPING.keys()


def test_the_table_names_no_folder_of_the_machine_that_made_it(tmp_path: Path) -> None:
    assert not PLACE.search(TABLE.read_text(encoding="utf-8"))
    code, said = command(f"train --model_name {tmp_path}/gone --task e2e_nlg --data_path {tmp_path}", tmp_path / "run")
    assert code != 0 and str(tmp_path) not in said and "gone" in said


def test_exact_means_that_every_question_was_answered_with_yes() -> None:
    for name, row in FAMILY_TABLE["families"].items():
        if row["state"] == "exact":
            assert row["questions"].keys() == QUESTIONS.keys(), name
            assert set(row["questions"].values()) <= {"yes", "not taken"}, name
            assert row["questions"]["one image"] == row["questions"]["batch"] == "yes", name
        else:
            assert row["why"], name
    assert len(EXACT) >= 20


def test_the_docs_have_the_same_table() -> None:
    text = Path(PAGE).read_text()
    assert text.split(BEGIN)[1].split(END)[0].strip() == markdown(FAMILY_TABLE)
