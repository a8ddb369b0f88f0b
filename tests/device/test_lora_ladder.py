"""`rankwise validate --adapter_gguf`: a base's GGUF with `--lora` against the adapter in transformers, and every way in
which that goes wrong, on the command's own path: exit 6, the rung, and a reason that names the adapter.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import once, session_root
from peft import LoraConfig, get_peft_model
from test_before import kind

from rankwise.cli import main
from rankwise.demo.restaurants import write_task
from rankwise.device.bundle import validation_doubts
from rankwise.device.llama.client import LoadedLora, Refusal, ServerRuntime
from rankwise.device.llama.runtime import LlamaServer
from rankwise.device.lora.files import lora_files
from rankwise.device.lora.page import lora_failures, lora_verdict
from rankwise.device.lora.settings import loaded_ids, settings
from rankwise.device.scores import DOCUMENT
from rankwise.device.sides import LoraFile
from rankwise.device.validation_page import summary
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import read_adapter
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.converter import Converter
from rankwise.gguf.lora import HALVES, held_factors, sites_in
from rankwise.gguf.metadata import config_of
from rankwise.gguf.reading import EXPORT, read_export
from rankwise.models.load import load_model
from rankwise.options.commands import BundleConfig, ValidateConfig
from rankwise.report.report import build_report

pytest.importorskip("xllamacpp")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from shipbench_gguf import altered

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
SITES = ["q_proj", "v_proj", "down_proj"]
FROZEN = Path(__file__).parents[1] / "data" / "validated_adapters.json"
BY_SITE = {"rank_pattern": {"v_proj": 2, "down_proj": 8}, "alpha_pattern": {"q_proj": 24, "down_proj": 3}}


def tuned_adapter(base: Path, folder: Path, seed: int, **patterns: Any) -> Path:
    """A random LoRA on a base, as PEFT saves it."""
    model = get_peft_model(
        load_model(str(base), torch.float32), LoraConfig(r=4, lora_alpha=8, target_modules=SITES, **patterns)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class World:
    """first, second: adapters with scales by site, exported by us; plain: one of one scale, by llama.cpp's converter
    and in float16. rows: E2E items."""

    base: Path
    model: Path
    first: Path
    second: Path
    plain: Path
    rows: Path

    def file(self, adapter: Path) -> Path:
        return adapter.parent / f"{adapter.name}-gguf" / f"{adapter.name}-lora-f32.gguf"

    @property
    def own(self) -> Path:
        return self.plain.parent / "own.gguf"


@pytest.fixture(scope="module")
def world(text_export: Path, converter: Converter, tmp_path_factory: pytest.TempPathFactory) -> World:
    model = text_export.parent / "model"

    def make(folder: Path) -> None:
        folder.mkdir()
        write_task(folder / "rows.csv", random.Random(0), count=10, references=1, held_out=False)
        for seed, name in enumerate(("first", "second")):
            adapter = tuned_adapter(model, folder / name, seed, **BY_SITE)
            assert main(["export", "--adapter_gguf", str(adapter), "-o", str(folder / f"{name}-gguf")]) == 0
        converter.convert_adapter(tuned_adapter(model, folder / "plain", 2), model, folder / "own.gguf", "f16")

    folder = once(session_root(tmp_path_factory) / "loras", make)
    return World(text_export, model, *(folder / name for name in ("first", "second", "plain")), folder / "rows.csv")


class Validating:
    """`rankwise validate` of the base's f16 file with LoRAs."""

    def __init__(self, world: World, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.world, self.out, self.capsys = world, out, capsys

    def __call__(self, *loras: Path, more: tuple[str, ...] = (), base: str | None = None) -> tuple[int, dict[str, Any]]:
        """Exit code, and validation.json."""
        shutil.rmtree(self.out, ignore_errors=True)
        given = [base or str(self.world.base), "--adapter_gguf", ",".join(map(str, loras)), "--task", "e2e_nlg"]
        given += ["--data_path", str(self.world.rows), "--split", "dev", "--max_new_tokens", "5", "--num_samples", "6"]
        form = [] if "--outtype" in more else ["--outtype", "f16"]
        code = main(["validate", *given, *form, "--threads", "1", "-o", str(self.out), *more])
        self.said = self.capsys.readouterr()
        return code, DOCUMENT.read(self.out) if code in (0, 6, 7) else {}


@pytest.fixture
def validate(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Validating:
    return Validating(world, tmp_path / "validation", capsys)


def broken(content: dict[str, Any], form: str = "f16") -> dict[str, str | None]:
    """Setting → the first rung that breaks."""
    found = {"scale 1": content["parity"][form]["first_broken"]}
    return found | {one["setting"]: one["first_broken"] for one in content["adapters"]["settings"][form]}


def why(ladder: dict[str, Any]) -> str:
    return next(rung["why"] for rung in ladder["rungs"] if rung["name"] == ladder["first_broken"])


def setting(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in content["adapters"]["settings"]["f16"] if one["setting"] == name)


# --- sound -----------------------------------------------------------------------------------------------------------


def test_two_adapters_on_one_server_are_those_of_transformers(world: World, validate: Validating) -> None:
    """Each against its own reference, which `export` recorded; in half precision and in Q8_0."""
    loras = world.file(world.first), world.file(world.second)
    code, content = validate(*loras, more=("--outtype", "f16,q8_0"))
    assert code == 0, validate.said.err
    names = ["scale 1", "scale 0", "scale 1 again", f"{loras[0].name} by request", "the base by request"]
    for form in ("f16", "q8_0"):
        assert broken(content, form) == dict.fromkeys([*names, f"{loras[1].name} by request"])
    assert [one["file"]["status"] for one in content["adapters"]["files"]] == ["ok", "ok"]
    assert content["adapters"]["effect"]["told_apart"] == {"f16": True, "q8_0": True}
    assert content["adapters"]["effect"]["kl_mean"] > 1e-2
    (line,) = content["verdict"]
    assert line.startswith(f"{loras[0].name} in llama.cpp is the adapter at scale 1 (f16, q8_0; mean KL")
    assert line.endswith("the base at scale 0, itself again after that, and chosen by request: no rung is broken.")
    said = "\n".join(summary(content))
    assert line in said and f"{loras[1].name} by request" in said and "scale 1 again" in said
    page = build_report(validate.out).read_text()
    assert "scale 1 again" in page and loras[1].name in page
    assert kind(content["adapters"]) == kind(json.loads(FROZEN.read_text())["adapters"])
    (doubt,) = validation_doubts(BundleConfig(validation=str(validate.out)), read_export(world.base), "f16", content)
    assert "--adapter_gguf" in doubt
    home = str(world.first.parent)
    assert home not in (validate.out / DOCUMENT.name).read_text(), "adapters are called by name"


def test_a_lora_says_where_its_adapter_lies_once(world: World) -> None:
    """`validate --adapter_gguf` finds it by that; neither the GGUF nor the rest says where anything lies."""
    file = world.file(world.first)
    content = EXPORT.read(file.parent)
    assert content["adapter"].pop("path") == str(world.first) and content["adapter"]["base"] == world.model.name
    assert str(world.first.parent) not in json.dumps(content)
    for home in (world.first.parent, world.model.parent):
        assert str(home).encode() not in file.read_bytes()


def test_what_was_frozen_is_read_and_shown() -> None:
    content = DOCUMENT.read(FROZEN)
    assert "scale 1 again" in "\n".join(summary(content))


def test_a_reason_is_told_once() -> None:
    """Whatever it breaks besides; that it cannot be told from its base is no verdict where something is broken."""
    content = DOCUMENT.read(FROZEN)
    adapters, parity = content["adapters"], content["parity"]
    adapters["effect"]["told_apart"] = {"f16": False, "q8_0": False}
    for ladder in (parity["f16"], *adapters["settings"]["f16"][:2]):
        ladder["first_broken"] = "logprobs"
        rung = next(rung for rung in ladder["rungs"] if rung["name"] == "logprobs")
        rung |= {"status": "broken", "why": "its scale is lost"}
    content["verdict"] = lora_verdict(adapters, parity)
    content["failures"] = ["f16: the rung `logprobs` is broken: its scale is lost", *lora_failures(adapters, parity)]
    assert content["verdict"][0] == "f16, scale 1, breaks at the rung `logprobs`: its scale is lost"
    assert content["verdict"][-1].startswith("Cannot tell first-lora-f32.gguf from its base")
    said = "\n".join(summary(content))
    assert (said.count("scale is lost"), said.count("f16: broken too: scale 0, scale 1 again")) == (1, 1)
    content["failures"].append("f16: accuracy 0.100 is below --min_accuracy 0.9")
    assert "Failed: f16: accuracy 0.100" in "\n".join(summary(content))
    assert "the adapter first" in said and "/here/loras/first" not in said, "long paths leave no room for the table"


def test_a_file_of_llama_cpps_own_converter(world: World, validate: Validating) -> None:
    """Nothing records its adapter."""
    code, content = validate(world.own, more=("--reference", str(world.plain)))
    assert code == 0, validate.said.err
    assert content["adapters"]["files"][0]["file"]["status"] == "ok"
    assert set(broken(content).values()) == {None}


# --- red -------------------------------------------------------------------------------------------------------------


def started_with(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[str]], list[str]]) -> None:
    """llama.cpp is started with another command line than the product's."""
    command = LlamaServer._command
    monkeypatch.setattr(LlamaServer, "_command", lambda self: change(command(self)))


def test_an_adapter_that_is_not_applied(world: World, validate: Validating, monkeypatch: pytest.MonkeyPatch) -> None:
    file = world.file(world.first)

    def at_zero(words: list[str]) -> list[str]:
        place = words.index(str(file))
        return [*words[: place + 1], "0", *words[place + 2 :]]

    started_with(monkeypatch, at_zero)
    code, content = validate(file)
    assert code == 6
    assert {name for name, rung in broken(content).items() if rung} == {"scale 1"}
    assert content["parity"]["f16"]["first_broken"] == "logprobs"
    said = why(content["parity"]["f16"])
    assert said.startswith(f"{file.name}, where it has to be the adapter {world.first.name}: mean KL")
    assert "the answers are the base's (mean KL" in said
    assert "loaded and not applied" in said
    assert said in validate.said.err


def test_an_adapter_that_is_applied_twice(world: World, validate: Validating, monkeypatch: pytest.MonkeyPatch) -> None:
    file = world.file(world.first)
    started_with(monkeypatch, lambda words: [*words, "--lora", str(file), "1"])
    code, content = validate(file)
    assert (code, content["parity"]["f16"]["first_broken"]) == (6, "logprobs")
    assert f"the answers are those of {file.name} applied twice" in why(content["parity"]["f16"])


def test_scales_of_sites_that_are_lost(
    world: World, validate: Validating, converter: Converter, tmp_path: Path
) -> None:
    """As llama.cpp's converter writes an adapter with scales by site: one alpha for all."""
    file = converter.convert_adapter(world.first, world.model, tmp_path / "flat.gguf")
    code, content = validate(file, more=("--reference", str(world.first)))
    assert (code, content["parity"]["f16"]["first_broken"]) == (6, "logprobs")
    said = why(content["parity"]["f16"])
    assert f"the answers are those of {file.name} with one scale for all sites" in said
    assert "another scale than the adapter's at 6" in content["adapters"]["files"][0]["file"]["why"]
    assert any(line.startswith(f"{file.name} does not hold the adapter") for line in content["failures"])


def test_half_of_the_tensors_missing(world: World, validate: Validating, tmp_path: Path) -> None:
    source, file = world.file(world.first), tmp_path / "half.gguf"
    with altered(source, file) as draft:
        for name in [name for name in draft.tensors if not name.startswith(("blk.0.", "blk.1."))]:
            del draft.tensors[name]
    code, content = validate(file, more=("--reference", str(world.first)))
    assert (code, content["parity"]["f16"]["first_broken"]) == (6, "logprobs")
    assert "it lacks " in content["adapters"]["files"][0]["file"]["why"]
    assert "it lacks " in why(content["parity"]["f16"]), "the reason of the ladder says what the file lacks"


def test_another_adapters_file(world: World, validate: Validating) -> None:
    file = world.file(world.second)
    code, content = validate(file, more=("--reference", str(world.first)))
    assert (code, content["parity"]["f16"]["first_broken"]) == (6, "logprobs")
    assert "neither the base nor" in why(content["parity"]["f16"])
    assert "other factors than the adapter's at 9" in content["adapters"]["files"][0]["file"]["why"]
    assert broken(content)["scale 0"] is None, "the base under it is right"


def test_a_swap_that_does_not_swap(world: World, validate: Validating, monkeypatch: pytest.MonkeyPatch) -> None:
    file = world.file(world.first)
    monkeypatch.setattr(ServerRuntime, "set_scales", lambda self, scales: None)
    code, content = validate(file)
    assert code == 6
    assert {name for name, rung in broken(content).items() if rung} == {"scale 0"}
    said = why(setting(content, "scale 0"))
    assert said.startswith(f"{file.name}, where it has to be the base: mean KL")
    assert f"those of {file.name} at scale 1" in said and "what is set does not reach the requests" in said
    assert "f16, scale 0, breaks at the rung `logprobs`" in content["verdict"][0]


def test_a_choice_by_request_that_is_ignored(
    world: World, validate: Validating, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = world.file(world.first), world.file(world.second)
    monkeypatch.setattr(ServerRuntime, "naming", lambda self, lora: self)
    code, content = validate(first, second)
    assert code == 6
    wanted = {f"{first.name} by request", "the base by request", f"{second.name} by request"}
    assert {name for name, rung in broken(content).items() if rung} == wanted
    assert f"{second.name}, where it has to be the adapter" in why(setting(content, f"{second.name} by request"))


def test_a_base_that_has_the_adapter_merged_in(world: World, validate: Validating, tmp_path: Path) -> None:
    lora, merged = GGUFFile(world.own), tmp_path / "merged-f16.gguf"
    with altered(read_export(world.base).text("f16"), merged) as draft:
        for name in sites_in(lora):
            lora_a, lora_b = (lora.tensor(name + half).numpy() for half in HALVES)
            draft.put(name, draft.floats(name) + 2 * lora_b @ lora_a)  # alpha / r
    code, content = validate(world.own, base=str(merged), more=("--reference", str(world.plain)))
    assert code == 6
    assert "applied twice" in why(content["parity"]["f16"])
    assert "merged in" in why(setting(content, "scale 0"))


# --- what is not offered, not known, not there -----------------------------------------------------------------------


def test_a_build_that_does_not_switch(world: World, validate: Validating, monkeypatch: pytest.MonkeyPatch) -> None:
    def loras(self: ServerRuntime) -> list[LoadedLora]:
        raise Refusal("http://phone/lora-adapters answers 404: File Not Found", "not_found_error")

    monkeypatch.setattr(ServerRuntime, "loras", loras)
    code, content = validate(world.file(world.first))
    assert code == 0
    assert all(not one["rungs"] and "404" in one["why"] for one in content["adapters"]["settings"]["f16"])
    assert "not measured otherwise" in content["verdict"][0]
    assert "scale 0 not measured: this build of llama.cpp does not tell its LoRAs" in validate.said.out


def test_an_adapter_that_does_too_little_to_be_told_from_its_base(
    world: World, validate: Validating, tmp_path: Path
) -> None:
    adapter, file = shutil.copytree(world.plain, tmp_path / "faint"), tmp_path / "faint.gguf"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1e-5}))
    with altered(world.own, file) as draft:
        draft["adapter.lora.alpha"] = 1e-5
    code, content = validate(file, more=("--reference", str(adapter)))
    assert code == 7
    assert content["adapters"]["effect"]["told_apart"] == {"f16": False}
    assert content["verdict"][0].startswith("Cannot tell faint.gguf from its base (f16)")


@pytest.fixture
def phone(world: World) -> Iterator[ServerRuntime]:
    file = read_export(world.base).text("f16")
    with LlamaServer(
        file, context=512, threads=1, loras=(world.file(world.second), world.file(world.first))
    ) as runtime:
        yield runtime


def test_a_server_elsewhere(world: World, validate: Validating, phone: ServerRuntime) -> None:
    """It serves the other adapter: found out; its scales are afterwards as they were."""
    before = phone.loras()
    assert [one.scale for one in before] == [1, 0]
    remote = ("--server", phone.talk.url, "--outtype", "f16")
    code, content = validate(world.file(world.first), more=remote)
    assert code == 6
    assert {name for name, rung in broken(content).items() if rung} == {"scale 1"}
    assert phone.loras() == before
    code, content = validate(world.file(world.second), more=remote)
    assert code == 0, validate.said.err
    assert phone.loras() == before
    assert validate(world.own, more=(*remote, "--reference", str(world.plain)))[0] == 3
    assert "has not loaded own.gguf" in validate.said.err


def test_ids_are_those_of_the_server() -> None:
    loaded = [LoadedLora(3, "/a/x.gguf", 0), LoadedLora(5, "C:\\b\\y.gguf", 1), LoadedLora(7, "/b/x.gguf", 1)]
    files = [LoraFile(Path("/b/x.gguf")), LoraFile(Path("/here/y.gguf"))]
    assert loaded_ids(files, loaded) == [7, 5]
    with pytest.raises(DataError, match=r"has not loaded z\.gguf \(LoRAs that it has: /a/x\.gguf"):
        loaded_ids([LoraFile(Path("z.gguf"))], loaded)
    with pytest.raises(DataError, match="cannot be told apart"):
        loaded_ids([LoraFile(Path("/here/x.gguf")), LoraFile(Path("/there/x.gguf"))], loaded)


def test_every_setting_names_the_other_adapters() -> None:
    """The one that is asked for answers though the server's own scales are another's."""
    found = {one.name: one for one in settings([LoraFile(Path("a")), LoraFile(Path("b"))])}
    assert (found["a by request"].scales, found["a by request"].asked) == ({0: 0, 1: 1}, {0: 1})
    assert (found["b by request"].scales, found["b by request"].asked) == ({0: 1, 1: 0}, {1: 1})
    assert found["the base by request"].asked == {0: 0, 1: 0}, "llama.cpp takes an empty list for none given"


def test_what_cannot_be_compared_is_refused(world: World, tmp_path: Path) -> None:
    file, other = world.file(world.first), world.file(world.second)
    loose = shutil.copy(file, tmp_path / "loose.gguf")

    def asked(*loras: Path | str, reference: str | None = None) -> tuple[LoraFile, ...]:
        return lora_files(ValidateConfig(adapter_gguf=list(map(str, loras)), reference=reference))

    assert asked(file.parent, other) == (LoraFile(file, str(world.first)), LoraFile(other, str(world.second)))
    assert asked(file, loose) == (LoraFile(file, str(world.first)), LoraFile(Path(loose), None))
    assert asked(loose, other, reference=f"{world.first},{world.second}")[1].reference == str(world.second)
    for loras, reference, said in (
        ([loose], None, "give it with --reference"),
        ([file], f"{world.first},{world.second}", "2 adapters for 1 file of"),
        ([file, file], None, "names a file twice"),
        ([world.base], None, "a model's export"),
        ([file], str(world.model), "not an adapter"),
    ):
        with pytest.raises(UsageError, match=said):
            asked(*loras, reference=reference)
    with pytest.raises(DataError, match="no file"):
        asked(tmp_path / "missing.gguf", reference=str(world.first))
    moved = shutil.copytree(file.parent, tmp_path / "moved")
    record = json.loads((moved / "export.json").read_text())
    record["adapter"]["path"] = str(tmp_path / "gone")
    (moved / "export.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"gone, the adapter that first-lora-f32\.gguf was made from, is missing"):
        asked(moved)


def test_factors_are_compared_whatever_wrote_them(world: World) -> None:
    """The file of an adapter, held to it with one site's scale, factor or presence changed."""
    file, adapter, config = GGUFFile(world.file(world.first)), read_adapter(world.first), config_of(world.model)
    assert held_factors(file, adapter, config).why == ""
    site, pair = next(iter(adapter.pairs.items()))
    turned = replace(pair, lora_A=pair.lora_A.flip(1))
    fewer = {path: each for path, each in adapter.pairs.items() if path != site}
    for pairs, said in (
        (
            {**adapter.pairs, site: replace(pair, scale=pair.scale / 2)},
            f"another scale than the adapter's at 1 ({site} ×2)",
        ),
        ({**adapter.pairs, site: turned}, f"other factors than the adapter's at 1 ({site})"),
        ({**adapter.pairs, "model.layers.9.mlp.up_proj": turned}, "it lacks 1 of 10 sites"),
        (fewer, "1 site that the adapter does not have"),
    ):
        assert said in held_factors(file, replace(adapter, pairs=pairs), config).why
