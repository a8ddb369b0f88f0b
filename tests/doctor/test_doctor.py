"""`rankwise doctor` here, and in environments that are broken for real: a line and an exit code each, no traceback.

Modules that are not what a test is about are empty stand-ins on the path: the real ones take ten seconds to import.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from test_no_telemetry import GUARD

import rankwise
from rankwise.doctor import command
from rankwise.doctor.probes import PROBES, packages
from rankwise.gguf.converter import MANIFEST, PIN
from rankwise.pipeline.extras import EXTRAS

REPOSITORY = Path(rankwise.__file__).parents[1]
TORCH = """
__version__ = "2.15.0"
class version: cuda = hip = None
class cuda: device_count = staticmethod(lambda: {devices})
class backends:
    class mps: is_available = staticmethod(lambda: False)
def get_num_threads(): return 64
def ones(*_, device): raise RuntimeError("CUDA error: no kernel image is available")
"""
SMALL = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o "$0" none "$1" && cd "$1" && shift && exec "$@"']


def stand_ins(folder: Path, **contents: str) -> Path:
    """A folder for PYTHONPATH with a module for each package; contents: of those that are not empty."""
    for row in packages():
        name = command.module_of(row["name"])
        if row["installed"] and name not in ("psutil", "safetensors", "filelock", "tqdm", "yaml", "huggingface_hub"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            text = {"torch": TORCH.format(devices=0)} | contents
            (folder / name / "__init__.py").write_text(text.get(name, ""))
    return folder


def doctor(*path: Path, before: list[str] | None = None, python: str = sys.executable, **variables: str) -> Any:
    """(exit code, what stands on the error stream, {line: state, found, remedy}) in an environment of its own."""
    ours = ("OMP_", "MKL_", "RANKWISE_", "HF_", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment = kept | {"PYTHONPATH": os.pathsep.join(map(str, (*path, REPOSITORY))), **variables}
    line = [*(before or []), python, "-m", "rankwise", "doctor", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    told = json.loads(done.stdout)
    assert told["format"] == "rankwise-doctor/1" and told["problems"] == sum(
        check["state"] == "problem" for check in told["checks"]
    )
    assert (done.returncode, bool(done.stderr)) == ((1, True) if told["problems"] else (0, False)), done.stderr
    return done.returncode, done.stderr, {check.pop("name"): check for check in told["checks"]}


def bounds(*names: str) -> str:
    """Base packages as pip is given them."""
    wanted = {row["name"]: row["wanted"] for row in packages() if not row["extra"]}
    return " ".join(shlex.quote(name + wanted[name]) for name in names)


def problems(lines: Any) -> set[str]:
    return {name for name, line in lines.items() if line["state"] == "problem"}


def test_here_everything_that_is_needed_is_found(tmp_path: Path) -> None:
    """On the installation that the tests run in; nobody is called."""
    (tmp_path / "sitecustomize.py").write_text(GUARD)
    _, _, lines = doctor(tmp_path, ATTEMPTS=str(tmp_path / "attempts"))
    assert not (tmp_path / "attempts").exists()
    assert not problems(lines) - {"working folder", "memory"}, lines
    assert re.match(r"(\d+) of \1 base packages are within bounds", lines["packages"]["found"])
    assert lines["torch"]["state"] == "ok" and "build); devices: cpu" in lines["torch"]["found"]
    for name in ("extra eval", "extra plots", "extra device", "extra harness", "extra label", "llama.cpp", "converter"):
        assert lines[name]["state"] == "ok", lines[name]
    vllm = lines["extra vllm"]
    if vllm["state"] == "note":
        assert vllm["found"].startswith(
            "not installed: vllm; without it, out of use: --engine vllm (evaluate); install"
        )
        assert "in an environment of its own" in vllm["found"]
        assert vllm["remedy"] == "pip install 'rankwise[vllm]'"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "raise ImportError('libcudart.so.13: cannot open shared object file')",
            "ImportError: libcudart.so.13: cannot",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed (SIGSEGV)"),
    ],
)
def test_torch_that_cannot_be_imported(content: str, said: str, tmp_path: Path) -> None:
    """What imports it fails for the same reason, which is said once."""
    path = stand_ins(tmp_path / "path", torch=content, peft="import torch")
    code, _, lines = doctor(path)
    assert code == 1 and problems(lines) == {"torch, peft"}
    assert said in lines["torch, peft"]["found"]
    assert lines["torch, peft"]["remedy"] == f"pip install --force-reinstall {bounds('torch', 'peft')}"
    assert lines["extra plots"]["state"] == "ok" and "cannot be told" in lines["threads"]["found"], "the rest goes on"


def test_a_version_below_its_bound(tmp_path: Path) -> None:
    path = stand_ins(tmp_path / "path")
    for name, version in (("peft", "0.1.0"), ("accelerate", "1.99")):
        (path / f"{name}-{version}.dist-info").mkdir()
        (path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    code, said, lines = doctor(path)
    assert code == 1 and problems(lines) == {"peft"} and "found a problem: peft" in said
    assert lines["peft"] == {
        "state": "problem",
        "found": f"0.1.0, outside {bounds('peft')[5:-1]}",
        "remedy": f"pip install {bounds('peft')}",
    }
    assert re.search(r"not the tested version: accelerate 1.99 \(tested: [\d.]+\)", lines["packages"]["found"])
    assert lines["packages"]["remedy"] == f"pip install -c {REPOSITORY / 'constraints.txt'} rankwise"


def test_a_home_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, lines = doctor(stand_ins(tmp_path / "path"), HOME=str(tmp_path / "file"))
    assert code == 1 and problems(lines) == {"cache", "hub cache"}
    assert "file/.cache/rankwise: cannot be read and written: Not a directory" in lines["cache"]["found"]
    assert lines["hub cache"]["remedy"] == "export HF_HUB_CACHE=/path/with/space"


def test_a_cache_that_takes_no_file_and_too_little_disk(tmp_path: Path) -> None:
    """File systems of their own: root may write whatever the permission bits say."""
    place, path = tmp_path / "small", stand_ins(tmp_path / "path")
    place.mkdir()
    for options, wanted in (("size=1m", {"working folder"}), ("ro", {"working folder", "cache"})):
        before = [*SMALL, options, str(place)]
        if not shutil.which("unshare") or subprocess.run([*before, "true"], capture_output=True).returncode:
            pytest.skip("no file systems can be mounted here (unshare -rm)")
        code, _, lines = doctor(path, before=before, RANKWISE_CACHE=str(place / "cache"))
        assert code == 1 and problems(lines) == wanted, lines
        if options == "ro":
            assert "cache: cannot be read and written: Read-only file system" in lines["cache"]["found"]
        else:
            assert "0.0 GiB free; a model needs 1 GiB at least" in lines["working folder"]["found"]
            assert lines["cache"]["state"] == "note"


def test_what_is_optional_and_broken_is_a_note(tmp_path: Path) -> None:
    """A plotting library that fails, a GPU that does not work, more threads than cores."""
    contents = {"matplotlib": "import no_such_module", "torch": TORCH.format(devices=1)}
    code, _, lines = doctor(stand_ins(tmp_path / "path", **contents), OMP_NUM_THREADS="64")
    assert code == 0 and not problems(lines)
    assert "matplotlib cannot be imported: ModuleNotFoundError" in lines["extra plots"]["found"]
    assert "without it, out of use: the pictures (ranks, compare" in lines["extra plots"]["found"]
    assert lines["extra plots"]["remedy"] == "pip install --force-reinstall matplotlib"
    assert "cuda:0 fails: RuntimeError: CUDA error: no kernel image" in lines["torch"]["found"]
    assert "64 on" in lines["threads"]["found"] and "export OMP_NUM_THREADS=" in lines["threads"]["remedy"]


def test_half_a_converter_and_half_a_wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tmp_path / "cache" / "llama.cpp" / PIN.version
    half.mkdir(parents=True)
    (half / MANIFEST.name).write_text(
        json.dumps({"format": MANIFEST.format, "files": {"gone.py": "0"}, "version": "1"})
    )
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    told = command.ask("converter_place", "converter", "wordnet")
    line = command.converter_line(told["converter_place"], told["converter"])
    assert line.state == "note" and "gone.py has changed since it was installed" in line.found
    assert line.remedy == f"rm -r {half} && rankwise export --install-converter"
    line = command.wordnet_line(told["wordnet"])
    assert line.state == "note" and f"WNSEARCHDIR: {tmp_path} holds no WordNet" in line.found


def test_nothing_is_installed(tmp_path: Path) -> None:
    """A bare Python and a checkout on its path."""
    venv.create(tmp_path / "bare", with_pip=False)
    code, _, lines = doctor(python=str(tmp_path / "bare" / "bin" / "python"))
    assert code == 1 and "packages" in problems(lines)
    assert "No module named 'packaging'" in lines["packages"]["found"]
    assert lines["packages"]["remedy"] == "pip install --upgrade rankwise"


def test_lines_are_text_with_the_remedy_last() -> None:
    line = str(command.Diagnosis("extra plots", "note", "not installed: matplotlib", "pip install 'rankwise[plots]'"))
    assert line == "note    extra plots       not installed: matplotlib  → pip install 'rankwise[plots]'"


def test_every_package_has_a_module_and_every_module_of_an_extra_a_package() -> None:
    """Of what is installed here. The table of optional packages names extras that bring the module, so that what a
    missing package takes away is found in it."""
    rows = [row for row in packages() if row["extra"] not in command.NOT_FOR_USERS]
    assert [
        row["name"] for row in rows if row["installed"] and not util.find_spec(command.module_of(row["name"]))
    ] == []
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        name: texts for name, texts in project["optional-dependencies"].items() if name not in command.NOT_FOR_USERS
    }
    names = {(f"[{extra}]", re.split(r"[<>=!~ ;]", text)[0]) for extra, texts in extras.items() for text in texts}
    brought = {(row.brings, row.module.partition(".")[0]) for row in EXTRAS if row.brings.startswith("[")}
    unknown = brought - {(extra, command.module_of(name)) for extra, name in names}
    assert unknown == set()
    assert {brings for brings, _ in brought} == {f"[{extra}]" for extra in extras}
    assert len({probe.__name__ for probe in PROBES}) == len(PROBES)


def test_the_home_folder_is_left_alone(tmp_path: Path) -> None:
    """matplotlib makes its folder in the home where it is imported, unless MPLCONFIGDIR says otherwise."""
    place = "os.environ.get('MPLCONFIGDIR') or os.path.expanduser('~/.config/matplotlib')"
    makes = f"import os; os.makedirs({place}, exist_ok=True)"
    _, _, lines = doctor(stand_ins(tmp_path / "path", matplotlib=makes), HOME=str(tmp_path / "home"))
    assert lines["extra plots"]["state"] == "ok" and not (tmp_path / "home").exists()
