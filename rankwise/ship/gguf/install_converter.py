"""llama.cpp's converter into the cache, once: the pinned source package, from the index that the user's pip has.

    pip download (hash checked) ──▶ llama_cpp_python-….tar.gz ── the converter's files ──▶ cache/llama.cpp/<version>

pip wants name and version of a source package before it hands it over, and would install that package's build tools
for a minute to ask. A stand-in for the build backend answers at once, so nothing of the package runs or is built.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tarfile
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from zlib import error as ZlibError

from filelock import FileLock

from rankwise.errors import DataError, ServiceError, UsageError
from rankwise.files.atomic import about_to_write, atomic_folder, sha256, write_json
from rankwise.ship.gguf.converter import (
    FORMAT,
    INSIDE_PACKAGE,
    KEPT,
    MANIFEST,
    PIN,
    SCRIPT,
    Converter,
    Pin,
    converter_folder,
    hashes,
    installed,
    streamed,
)

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
        if not (folder / MANIFEST).is_file():
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
    status, output = streamed(command, environment, "")
    if MISMATCH in output:
        raise DataError(f"{pin.package} {pin.version}: what the index gave is not the pinned archive:\n{output}")
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
            manifest = {"format": FORMAT, "package": pin.package, "version": pin.version, "archive_sha256": pin.sha256}
            write_json(temporary / MANIFEST, manifest | {"files": hashes(temporary)})
    except (tarfile.TarError, ZlibError, EOFError) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); nothing was installed") from error


def chosen(archive: Path, members: list[tarfile.TarInfo]) -> list[tarfile.TarInfo]:
    """The plain files to keep, named by their place in the converter's folder."""
    found = []
    for member in members:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{archive}: the member {member.name!r} leads outside the archive; it is refused whole")
        parts = path.parts[1:]  # the first is the package's name and version
        if parts[:2] != INSIDE_PACKAGE.parts:
            continue
        inside = PurePosixPath(*parts[2:]).as_posix()
        if any(inside == kept or (kept.endswith("/") and inside.startswith(kept)) for kept in KEPT):
            if member.isdir():
                continue
            if not member.isreg():
                raise DataError(f"{archive}: {member.name} is not a plain file; the archive is refused")
            found.append(member.replace(name=inside, deep=False))
    if sum(member.size for member in found) > LARGEST:
        raise DataError(f"{archive}: its converter would take more than {LARGEST / 2**20:g} MiB; it is refused")
    if SCRIPT not in {member.name for member in found}:
        raise DataError(f"{archive}: holds no {INSIDE_PACKAGE.as_posix()}/{SCRIPT}")
    return found
