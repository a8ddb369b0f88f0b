"""Laws of llama.cpp's converter as a tool: found in order, installed whole or not at all, failing without a trace."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rankwise.cli import main
from rankwise.errors import DataError, ServiceError, UsageError, VerificationError
from rankwise.gguf import command as stage
from rankwise.gguf import converter as installing
from rankwise.gguf.converter import (
    Conversion,
    Converter,
    Pin,
    find_converter,
    install_converter,
    installed,
    own_converter,
    streamed,
    unpack,
)

NAME = "some_package-1.0"
INSIDE = f"{NAME}/vendor/llama.cpp/"
# The package's own build must never run: it would raise.
PROJECT = '[build-system]\nrequires = ["not-there"]\nbuild-backend = "scikit_build_core.build"\n[project]\nname = "x"\n'
TABLES = """
raise SystemExit("read, never run")
TEXT_MODEL_MAP: dict[str, str] = {"Known": "a"}
MMPROJ_MODEL_MAP = {"Sees": "b"}
"""
# Stands for convert_hf_to_gguf.py: writes what it was told; "breaks" fails after a part.
SCRIPT = """
import sys
from pathlib import Path
def main():
    words = sys.argv[1:]
    out = Path(words[words.index("--outfile") + 1])
    out.write_text(" ".join(words))
    if "breaks" in words[0]:
        print("first line")
        sys.exit("model type not understood")
    if "silent" in words[0]:
        out.unlink()
"""
FILES = {
    f"{NAME}/pyproject.toml": PROJECT,
    f"{NAME}/PKG-INFO": "Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n",
    INSIDE + "convert_hf_to_gguf.py": SCRIPT,
    INSIDE + "convert_lora_to_gguf.py": "",
    INSIDE + "LICENSE": "MIT",
    INSIDE + "conversion/__init__.py": TABLES,
    INSIDE + "gguf-py/gguf/__init__.py": "",
    INSIDE + "src/llama.cpp": "int main() {}",
    INSIDE + "gguf-py/tests/test_x.py": "",
}


def archive(folder: Path, files: dict[str, str] = FILES, *more: tarfile.TarInfo) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            file.addfile(member, io.BytesIO(text.encode()))
        for member in more:
            file.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def pin_of(path: Path) -> Pin:
    return Pin("some-package", "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no converter named by the environment."""
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip looks in one folder, and nowhere else: the user's own settings decide where it looks."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def checkout(folder: Path, script: str = SCRIPT) -> Path:
    (folder / "conversion").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(script)
    (folder / "conversion" / "__init__.py").write_text(TABLES)
    return folder


# --- found -------------------------------------------------------------------------------------------------------


def test_found_by_option_then_variable_then_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="rankwise export --install-converter"):
        find_converter()
    path = archive(tmp_path / "index")
    unpack(path, cache / "llama.cpp" / "0.3.36", pin_of(path))
    assert find_converter().folder == cache / "llama.cpp" / "0.3.36"
    monkeypatch.setenv("LLAMA_CPP_DIR", str(checkout(tmp_path / "variable")))
    assert find_converter().folder == tmp_path / "variable"
    assert find_converter(str(checkout(tmp_path / "option"))).folder == tmp_path / "option"


def test_an_unpacked_source_package_is_taken_with_its_version(tmp_path: Path) -> None:
    with tarfile.open(archive(tmp_path)) as file:
        file.extractall(tmp_path, filter="data")
    found = find_converter(str(tmp_path / NAME))
    assert (found.folder, found.version) == (tmp_path / NAME / "vendor" / "llama.cpp", "1.0")


def test_a_folder_without_the_script_is_refused_by_the_name_of_the_option(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--llama_cpp_dir.*convert_hf_to_gguf"):
        find_converter(str(tmp_path))


def test_what_it_knows_is_read_without_running_it(tmp_path: Path) -> None:
    found = own_converter(checkout(tmp_path / "x"), "--llama_cpp_dir")
    assert (found.knows("Known"), found.knows("Sees"), found.knows("Sees", mmproj=True)) == (True, False, True)
    (tmp_path / "x" / "conversion" / "__init__.py").unlink()
    assert found.knows("Known") is None


def test_the_hash_tells_two_converters_apart(tmp_path: Path) -> None:
    one, same = (own_converter(checkout(tmp_path / name), "x").sha256 for name in "ab")
    other = own_converter(checkout(tmp_path / "c", SCRIPT + "# changed"), "x").sha256
    assert one == same != other


# --- installed ---------------------------------------------------------------------------------------------------


def test_installing_keeps_the_converter_only_and_needs_the_index_once(cache: Path, local_index: Path) -> None:
    path = archive(local_index)
    found = install_converter(pin_of(path))
    names = {file.relative_to(found.folder).as_posix() for file in found.folder.rglob("*") if file.is_file()}
    kept = {name.removeprefix(INSIDE) for name in FILES if name.startswith(INSIDE)}
    assert names == kept - {"src/llama.cpp", "gguf-py/tests/test_x.py"} | {"converter.json"}
    path.unlink()
    assert install_converter(pin_of(archive(local_index.parent / "elsewhere"))) == found


def test_two_installations_at_once_download_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = archive(tmp_path / "index"), []
    monkeypatch.setattr(installing, "download", lambda pin, folder: calls.append(pin) or path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(install_converter, [pin_of(path)] * 4))
    assert len(calls) == 1 and len(set(found)) == 1


def test_another_archive_under_the_same_name_is_refused(cache: Path, local_index: Path) -> None:
    archive(local_index)
    with pytest.raises(DataError, match="did not return the pinned archive"):
        install_converter(Pin("some-package", "1.0", "0" * 64))
    assert not (cache / "llama.cpp" / "1.0").exists()


def test_an_index_without_the_package_is_a_service_error_that_names_the_way_out(cache: Path, local_index: Path) -> None:
    local_index.mkdir()
    with pytest.raises(ServiceError, match="--llama_cpp_dir"):
        install_converter(Pin("some-package", "1.0", "0" * 64))
    assert not (cache / "llama.cpp" / "1.0").exists()


def test_without_pip_it_says_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"rankwise\[device\]"):
        installing.download(Pin(), tmp_path)


def test_an_altered_installation_is_noticed(cache: Path, tmp_path: Path) -> None:
    path = archive(tmp_path / "index")
    folder = cache / "llama.cpp" / "1.0"
    unpack(path, folder, pin_of(path))
    assert installed(folder).version == "1.0"
    (folder / "conversion" / "__init__.py").write_text("import os")
    with pytest.raises(VerificationError, match=r"conversion/__init__\.py has changed since it was installed"):
        installed(folder)


def link(name: str, to: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, to
    return member


def large(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (large(f"{NAME}/../../escaped", 3), "points outside"),
        (large("/etc/escaped", 3), "points outside"),
        (link(INSIDE + "conversion/evil.py", "/etc/passwd"), "not a regular file"),
        (large(INSIDE + "conversion/large.bin", 65 * 2**20), "more than 64 MiB"),
    ],
    ids=["traversal", "absolute", "link", "bomb"],
)
def test_a_hostile_archive_is_refused_whole(tmp_path: Path, member: tarfile.TarInfo, message: str) -> None:
    path = archive(tmp_path / "index", FILES, member)
    with pytest.raises(DataError, match=message):
        unpack(path, tmp_path / "out", pin_of(path))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("**/escaped"))


def test_a_cut_or_foreign_archive_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "index")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(path, tmp_path / "out", pin_of(path))
    other = archive(tmp_path / "other", {f"{NAME}/README": "hello"})
    with pytest.raises(DataError, match="holds no"):
        unpack(other, tmp_path / "out", pin_of(other))
    with pytest.raises(DataError, match="SHA-256"):
        unpack(other, tmp_path / "out", Pin("some-package", "1.0", "0" * 64))
    assert not (tmp_path / "out").exists()


# --- run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Converter:
    return own_converter(checkout(tmp_path_factory.mktemp("fake") / "llama.cpp"), "--llama_cpp_dir")


def test_every_file_of_a_model_comes_from_one_process(fake: Converter, tmp_path: Path) -> None:
    jobs = [Conversion(tmp_path / "a.gguf", "f16"), Conversion(tmp_path / "mmproj-a.gguf", "q8_0", mmproj=True)]
    fake.convert_all("some/model", jobs, name="shown")
    text, projector = (job.outfile.read_text().split() for job in jobs)
    assert text[:5] == ["some/model", "--model-name", "shown", "--outtype", "f16"] and "--mmproj" not in text
    assert projector[4] == "q8_0" and "--mmproj" in projector


def test_a_failing_conversion_shows_its_end_and_leaves_nothing(fake: Converter, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"(?s)breaks.*first line\nmodel type not understood"):
        fake.convert("breaks", tmp_path / "x.gguf", "f16")
    with pytest.raises(VerificationError, match="failed"):
        fake.convert("silent", tmp_path / "x.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_second_file_takes_the_first_with_it(tmp_path: Path) -> None:
    script = SCRIPT.replace('"breaks" in words[0]', '"--mmproj" in words')
    found = own_converter(checkout(tmp_path / "llama.cpp", script), "x")
    jobs = [Conversion(tmp_path / "a.gguf", "f16"), Conversion(tmp_path / "b.gguf", "f16", mmproj=True)]
    with pytest.raises(VerificationError, match="nothing was written"):
        found.convert_all("model", jobs)
    assert not list(tmp_path.glob("*.gguf"))


def test_the_folder_of_the_user_lends_no_modules(
    fake: Converter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "gguf.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert fake.convert("model", tmp_path / "x.gguf", "f16").is_file()


def test_an_unknown_type_is_a_usage_error(fake: Converter, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="q4_k_m"):
        fake.convert("model", tmp_path / "x.gguf", "q4_k_m")


def test_the_command_installs_without_a_model(
    cache: Path, local_index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pin = pin_of(archive(local_index))
    monkeypatch.setattr(stage, "install_converter", lambda: install_converter(pin))
    assert main(["export", "--install-converter"]) == 0
    assert str(cache) in capsys.readouterr().out and (cache / "llama.cpp" / "1.0" / "converter.json").is_file()


def test_the_pinned_package_knows_what_we_ship(converter: Converter) -> None:
    for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "VLlama3ForCausalLM"):
        assert converter.knows(name)
    for name in ("SmolVLMForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"):
        assert converter.knows(name, mmproj=True)
    assert converter.knows("IsaacForConditionalGeneration") is False


@pytest.mark.parametrize(
    ("status", "last"), [(0, "convert: done, 100 percent in"), (3, "convert: ended after 45 of 100")]
)
def test_the_converters_bar_is_ours(status: int, last: str, capfd: pytest.CaptureFixture[str]) -> None:
    """It overwrites its line, which in a log would be one line of thousands of characters."""
    code = f"import sys; sys.stderr.write('\\rWriting:   3%|x| 1/9\\rWriting:  45%|x| 4/9\\n'); sys.exit({status})"
    found, tail = streamed([sys.executable, "-c", code], os.environ, "convert", "percent")
    first, end = capfd.readouterr().err.splitlines()
    assert (found, first, tail.splitlines()[-1]) == (status, "convert: 100 percent", "Writing:  45%|x| 4/9")
    assert end.startswith(last)
