"""llama.cpp's own converter: find or install it, list the architectures it supports, run it as a subprocess.

    --llama_cpp_dir ──┐
    $LLAMA_CPP_DIR ───┼──▶ Converter(folder, version, sha256) ── convert(model, "m-q8_0.gguf", "q8_0") ──▶ GGUF
    the cache ────────┘
       ▲ install_converter(): the pinned source package, by pip from the user's own index, hash checked

Only the converter comes out of the source package (two scripts, `conversion/`, `gguf-py/`, licence): nothing is built.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from zlib import error as ZlibError

from filelock import FileLock

from rankwise.errors import DataError, ServiceError, UsageError, VerificationError
from rankwise.files.atomic import about_to_write, atomic_files, atomic_folder, cache, digest_of, sha256
from rankwise.files.document import Document
from rankwise.gguf.quantize import VARIABLE
from rankwise.options.sections import OUTTYPES
from rankwise.page.progress import progress

SCRIPT, ADAPTER_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
KEPT = (SCRIPT, ADAPTER_SCRIPT, "LICENSE", "conversion/", "gguf-py/gguf/", "gguf-py/LICENSE")
INSIDE_PACKAGE = Path("vendor/llama.cpp")  # where llama-cpp-python's source package has it
INSTALL = "rankwise export --install-converter"
MANIFEST = Document("converter.json", "rankwise-converter/1", "an installed converter", INSTALL, ("files", "version"))
REGISTRIES = {False: "TEXT_MODEL_MAP", True: "MMPROJ_MODEL_MAP"}
WRITTEN = re.compile(r"Writing:\s+(\d+)%")  # the converter's own bar
TAIL = 15  # lines of a failed subprocess that an error shows


@dataclass(frozen=True)
class Pin:
    """The source package that the converter comes from. sha256: of the archive, as the package index states it."""

    package: str = "llama-cpp-python"
    version: str = "0.3.36"
    sha256: str = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"


PIN = Pin()
# The converter's own main, once for every file.
DRIVER = """
import json, sys
import convert_hf_to_gguf as script
for words in json.loads(sys.argv[1]):
    sys.argv = ["convert_hf_to_gguf.py", *words]
    script.main()
"""


@dataclass(frozen=True)
class Conversion:
    """One file to make. mmproj: of the vision tower and the projector, else of the text model."""

    outfile: Path
    outtype: str
    mmproj: bool = False


@dataclass(frozen=True)
class Converter:
    """A folder with llama.cpp's converter. version: of its package, "unknown" for a folder of the user's own.

    sha256: of all its files together, so that two exports can be compared.
    """

    folder: Path
    version: str
    sha256: str

    def knows(self, architecture: str, mmproj: bool = False) -> bool | None:
        """Whether it supports this model class; None where its list cannot be read (an older llama.cpp)."""
        known = registry(self.folder, REGISTRIES[mmproj])
        return None if known is None else architecture in known

    def convert(
        self, model: Path | str, outfile: Path | str, outtype: str, mmproj: bool = False, name: str | None = None
    ) -> Path:
        """Write `model` (a Hugging Face folder) as GGUF; mmproj: its vision tower and projector instead of its text.

        name: what the file says the model is called [its folder]. UsageError for an unknown type; VerificationError,
        with the end of the converter's output, where it fails; then nothing bears the final name.
        """
        self.convert_all(model, [Conversion(Path(outfile), outtype, mmproj)], name)
        return Path(outfile)

    def convert_all(self, model: Path | str, jobs: Sequence[Conversion], name: str | None = None) -> None:
        """`convert` for several files of one model, in one process: its imports take longer than a small model."""
        for job in jobs:
            if job.outtype not in OUTTYPES:
                raise UsageError(f"--outtype: {job.outtype!r} is not one of {', '.join(OUTTYPES)}")
        called = ["--model-name", name or Path(model).resolve().name]
        with atomic_files(*(job.outfile for job in jobs)) as temporaries:
            lines = [
                [str(model), *called, "--outtype", job.outtype, "--outfile", str(path), *(["--mmproj"] * job.mmproj)]
                for job, path in zip(jobs, temporaries, strict=True)
            ]
            self._run(["-c", DRIVER, json.dumps(lines)], temporaries, str(model))

    def convert_adapter(self, adapter: Path, base: Path, outfile: Path, outtype: str = "f32") -> Path:
        """Write a LoRA as GGUF; of `base` only config and tokenizer are read. Errors as for `convert`."""
        script = str(self.folder / ADAPTER_SCRIPT)
        with atomic_files(outfile) as temporaries:
            options = ["--base", str(base), "--outtype", outtype, "--outfile", str(temporaries[0])]
            self._run([script, str(adapter), *options], temporaries, str(adapter))
        return outfile

    def _run(self, words: Sequence[str], outfiles: Sequence[Path], what: str) -> None:
        command = [sys.executable, "-P", *words]  # -P: nothing of the current folder is imported
        status, tail = streamed(command, converter_environment(self.folder), "convert", "percent")
        if status or not all(file.is_file() for file in outfiles):
            raise VerificationError(
                f"{what}: llama.cpp's converter failed (status {status}) and nothing was written; the end of its "
                f"output:\n{tail}"
            )


def converter_environment(folder: Path) -> dict[str, str]:
    """The converter imports its own gguf (PyPI's is older), and asks no hub for anything."""
    kept = {name: value for name, value in os.environ.items() if name != "NO_LOCAL_GGUF"}
    own = {"PYTHONPATH": os.pathsep.join([str(folder), str(folder / "gguf-py")]), "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | own | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def streamed(command: Sequence[str], environment: Mapping[str, str], desc: str, unit: str) -> tuple[int, str]:
    """Run a command; (its status, the end of its output), with a bar of its lines, or of its own bar's percentage."""
    last: deque[str] = deque(maxlen=TAIL)
    total = 100 if unit == "percent" else None
    with progress(total=total, desc=desc, unit=unit, leave=True) as bar:
        with subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process:
            assert process.stdout
            for line in process.stdout:
                if line.strip():
                    last.append(line.rstrip())
                if total is None:
                    bar.update()
                elif found := WRITTEN.match(line):
                    bar.update(int(found[1]) - bar.n)
        if total and not process.returncode:
            bar.update(total - bar.n)
    return process.returncode, "\n".join(last)


# --- where it is -------------------------------------------------------------------------------------------------


def find_converter(llama_cpp_dir: str | None = None) -> Converter:
    """The given folder's converter, else $LLAMA_CPP_DIR's, else the cache's.

    UsageError where a named folder has none or none is installed; VerificationError where the cache was altered.
    """
    for named, value in (("--llama_cpp_dir", llama_cpp_dir), (VARIABLE, os.environ.get(VARIABLE))):
        if value:
            return own_converter(Path(value).expanduser(), named)
    folder = converter_folder()
    if not (folder / MANIFEST.name).is_file():
        raise UsageError(
            f"llama.cpp's converter is not installed: {INSTALL} does it once, or point --llama_cpp_dir (or {VARIABLE}) "
            "to a checkout of llama.cpp"
        )
    return installed(folder)


def converter_folder(pin: Pin = PIN) -> Path:
    """Its place in the cache ($RANKWISE_CACHE, else $XDG_CACHE_HOME/rankwise, else ~/.cache/rankwise)."""
    return cache() / "llama.cpp" / pin.version


def own_converter(folder: Path, named: str) -> Converter:
    """A llama.cpp checkout, or an unpacked source package of llama-cpp-python."""
    for place in (folder, folder / INSIDE_PACKAGE):
        if (place / SCRIPT).is_file():
            return Converter(place.resolve(), package_version(folder), digest(hashes(place)))
    raise UsageError(f"{named} {folder}: no {SCRIPT} in it; it should be a checkout of llama.cpp")


def package_version(folder: Path) -> str:
    """What the source package's PKG-INFO states."""
    file = folder / "PKG-INFO"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = [line.removeprefix("Version: ") for line in lines if line.startswith("Version: ")]
    return found[0] if found else "unknown"


def installed(folder: Path) -> Converter:
    """The converter of the cache, its files as they were installed."""
    manifest, now = MANIFEST.read(folder), hashes(folder)
    changed = sorted(name for name, value in manifest["files"].items() if now.get(name) != value)
    if changed or len(now) != len(manifest["files"]):
        which = changed[0] if changed else sorted(set(now) - set(manifest["files"]))[0]
        raise VerificationError(
            f"{folder}: {which} has changed since it was installed; remove the folder and install it again: {INSTALL}"
        )
    return Converter(folder.resolve(), manifest["version"], digest(now))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that makes the converter, by its path in the folder."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(converter_files(folder))}


def converter_files(folder: Path) -> Iterator[Path]:
    for kept in KEPT:
        if not kept.endswith("/"):
            yield from [folder / kept] if (folder / kept).is_file() else []
            continue
        yield from (path for path in (folder / kept).rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def digest(files: Mapping[str, str]) -> str:
    return digest_of(sorted(files.items()))


def registry(folder: Path, name: str) -> frozenset[str] | None:
    """The architectures of one of the converter's tables, read from its source without running it."""
    source = folder / "conversion" / "__init__.py"
    if not source.is_file():
        return None
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign) and node.value
            return frozenset(ast.literal_eval(node.value))
    return None


LARGEST = 64 * 2**20  # bytes of the files that are kept; they have 3 MiB
BACKEND = "scikit_build_core"  # what the package's pyproject.toml names, as BACKEND.build
STAND_IN = """
from pathlib import Path

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = Path(metadata_directory) / "{package}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return folder.name
"""
MISMATCH = "DO NOT MATCH THE HASHES"


def install_converter(pin: Pin = PIN) -> Converter:
    """Download, check and unpack, unless it is there already. Two processes at once: the second waits.

    UsageError without pip; ServiceError where the index cannot be reached or lacks the package; DataError where the
    archive is not the pinned one. Nothing is left behind then.
    """
    about_to_write()
    folder = converter_folder(pin)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{pin.version}.lock"):
        if not (folder / MANIFEST.name).is_file():
            with TemporaryDirectory() as temporary:
                unpack(download(pin, Path(temporary)), folder, pin)
        return installed(folder)


def download(pin: Pin, folder: Path) -> Path:
    """The source package's archive in `folder`, by pip, whose settings (index, proxy, certificates) are the user's."""
    if importlib.util.find_spec("pip") is None:
        raise UsageError("pip is not installed here (uv leaves it out); it comes with: pip install 'rankwise[device]'")
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(wanted), "-d", str(folder / "archive")]
    environment = {**os.environ, "PYTHONPATH": str(stand_in(pin, folder))}
    status, output = streamed(command, environment, "install", "line")
    if MISMATCH in output:
        raise DataError(f"{pin.package} {pin.version}: the index did not return the pinned archive:\n{output}")
    found = list((folder / "archive").glob("*.tar.gz"))
    if status or len(found) != 1:
        raise ServiceError(
            f"pip could not download {pin.package} {pin.version} (status {status}). Without a network, unpack its "
            f"source package or llama.cpp elsewhere and use --llama_cpp_dir. pip said:\n{output}"
        )
    return found[0]


def stand_in(pin: Pin, folder: Path) -> Path:
    """A folder for PYTHONPATH whose build backend only tells the package's name and version."""
    package = folder / "stand_in" / BACKEND
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    text = STAND_IN.format(package=pin.package.replace("-", "_"), version=pin.version)
    (package / "build.py").write_text(text, encoding="utf-8")
    return package.parent


def unpack(archive: Path, folder: Path, pin: Pin) -> None:
    """The converter's files of the archive as `folder`, whole or not at all. DataError for any other archive."""
    if sha256(archive) != pin.sha256:
        raise DataError(f"{archive}: not {pin.package} {pin.version} (its SHA-256 differs); it was not unpacked")
    try:
        with tarfile.open(archive) as file, atomic_folder(folder) as temporary:
            members = chosen(archive, file.getmembers())
            file.extractall(temporary, members, filter="data")
            manifest = {"package": pin.package, "version": pin.version, "archive_sha256": pin.sha256}
            MANIFEST.write(temporary, manifest | {"files": hashes(temporary)})
    except (tarfile.TarError, ZlibError, EOFError) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); nothing was installed") from error


def chosen(archive: Path, members: list[tarfile.TarInfo]) -> list[tarfile.TarInfo]:
    """The plain files to keep, named by their place in the converter's folder."""
    found = []
    for member in members:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{archive}: the member {member.name!r} points outside the archive; nothing was unpacked")
        parts = path.parts[1:]  # the first is the package's name and version
        if parts[:2] != INSIDE_PACKAGE.parts:
            continue
        inside = PurePosixPath(*parts[2:]).as_posix()
        if any(inside == kept or (kept.endswith("/") and inside.startswith(kept)) for kept in KEPT):
            if member.isdir():
                continue
            if not member.isreg():
                raise DataError(f"{archive}: {member.name} is not a regular file; nothing was unpacked")
            found.append(member.replace(name=inside, deep=False))
    if sum(member.size for member in found) > LARGEST:
        raise DataError(f"{archive}: its converter takes more than {LARGEST / 2**20:g} MiB; nothing was unpacked")
    if SCRIPT not in {member.name for member in found}:
        raise DataError(f"{archive}: holds no {INSIDE_PACKAGE.as_posix()}/{SCRIPT}")
    return found
