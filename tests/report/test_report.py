"""The report page: everything found is on it, nothing is asked of the network, hostile text stays text."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import torch

from rankwise.core.allocate import Rule, by_budget, parse_budget, plan_of, spectral_gains
from rankwise.core.plan import RankPlan
from rankwise.core.site import Site, describe
from rankwise.core.spectrum import Spectrum
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.options.commands import ReportConfig
from rankwise.page.blocks import each
from rankwise.page.grid import CellMap
from rankwise.pipeline.table import imported
from rankwise.ranks.plots import plot_decay
from rankwise.report import report as stage
from rankwise.report.contents import FINDINGS, Adapted, Contents, read_scores
from rankwise.report.report import build_report, compose
from rankwise.train.loss_plots import leading_metrics

SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (172, 64),
    "mlp.up_proj": (172, 64),
    "mlp.down_proj": (64, 172),
}
HOSTILE = '</dd><script>alert(1)</script><img src="http://x.example/y.png" onerror=alert(2)> | `code` \x1b[31m‮'


def random_spectra(layers: int) -> dict[Site, Spectrum]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in range(layers):
        for i, (name, shape) in enumerate(SHAPES.items()):
            steps = torch.arange(1, min(shape) + 1, dtype=torch.float64)
            noise = 0.02 * torch.rand(min(shape), generator=generator, dtype=torch.float64)
            values = (steps ** -(0.3 + 0.08 * i + 0.12 * layer) + noise).sort(descending=True).values
            site = describe(f"model.layers.{layer}.{name}", shape, "language")
            found[site] = Spectrum(values, float(values.square().sum()), shape, complete=True)
    return found


def random_plan(spectra: dict[Site, Spectrum]) -> RankPlan:
    budget = parse_budget("uniform:8", spectra)
    return plan_of(by_budget(spectral_gains(spectra), budget, Rule(max_rank=32)), spectra, "demo-llama-1M")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_manifest(folder: Path, **stages: dict[str, object]) -> None:
    versions = {"rankwise": "0.1.0", "torch": "2.15.0", "transformers": "5.23.0", "peft": "0.21.2"}
    entries = {
        name: {"stage": name, "versions": versions, "python": "3.11.9"} | entry for name, entry in stages.items()
    }
    write(folder / "manifest.json", json.dumps({"format": "rankwise-manifest/1", "stages": entries}))


def write_scores(folder: Path, bleu: float, answers: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"bleu": bleu, "bleu_1": min(99.0, bleu * 1.3 + 9), "rouge_l": bleu * 0.9 + 10, "meteor_exact_stem": bleu}
    intervals = {name: (value * 0.95, value * 1.05) for name, value in metrics.items()}
    why = {"meteor": "WordNet is not installed"}
    EvaluationResult("e2e_nlg", metrics, intervals, len(answers), unavailable=why).save(folder)
    prompts = ["name[The Vaults], eatType[pub], area[riverside]", "name[Aromi], food[Italian]", "name[Wildwood]", "x"]
    rows = [
        {"id": f"e2e-{i}", "prompt": prompt, "prediction": answer, "references": [f"Reference {i}."]}
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    write(folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def write_log(path: Path, steps: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate", "seconds"])
        table.writeheader()
        for step in range(0, steps + 1, 5):
            loss = 2.6 * math.exp(-step / 60) + 0.7 + 0.06 * math.sin(step)
            validation = f"{2.6 * math.exp(-step / 60) + 0.8 + step / 3000:.4f}" if step % 50 == 0 else ""
            table.writerow({"step": step, "loss": f"{loss:.4f}", "eval_loss": validation})


def demo_run(run: Path, layers: int = 6) -> Path:
    """A run folder as finetune → ranks → train → evaluate (twice) → compress leave it."""
    spectra = random_spectra(layers)
    plan = random_plan(spectra)
    write_manifest(
        run / "finetune",
        finetune={"started": "2026-11-20T10:00:00+00:00", "seconds": 41.2, "trainable_parameters": 1_180_000},
    )
    write_log(run / "finetune" / "training_log.csv", 100)
    write_manifest(run / "ranks", ranks={"started": "2026-11-20T10:01:00+00:00", "seconds": 3.4})
    write(run / "ranks" / "configs" / "lora_rank_config.json", plan.dumps())
    svd = run / "ranks" / "analysis_outputs" / "svd"
    for row in plan.sites[:2]:
        plot_decay(spectra[row.site], row, 0.9, svd / "plots" / f"{row.site.path}.png", null_edge=0.2)
    arms = [("plan", 0.641), ("uniform", 0.598), ("inverted", 0.5)] + [
        (f"shuffled {i}", 0.58 + i / 250) for i in range(8)
    ]
    gain = {"defined": True, "arms": [{"name": n, "kept": k, "low": k - 0.03, "high": k + 0.03} for n, k in arms]}
    write(svd / "raw_data" / "gain.json", json.dumps(gain))
    trained = {"trainable_parameters": plan.parameters, "peak_resident_bytes": 1_300_000_000}
    write_manifest(run / "trained", train={"started": "2026-11-20T10:02:00+00:00", "seconds": 77.0} | trained)
    sites = [{"path": row.site.path, "shape": list(row.site.shape), "rank": row.rank} for row in plan.sites]
    content = {"format": "rankwise-sites/1", "sites": sites, "left_out": ["lm_head"]}
    write(run / "trained" / "sites.json", json.dumps(content))
    write_log(run / "trained" / "training_log.csv", 400)
    write(run / "trained" / "resolved_config.json", json.dumps({"learning_rate": 2e-4, "openai_api_key": "sk-secret"}))
    write_scores(run / "evaluate_after", 61.42, ["The Vaults is a riverside pub.", "Aromi is Italian.", HOSTILE, "d"])
    write_scores(run / "evaluate_before", 3.12, ["name name pub pub", "[[[", "eat eat", ""])
    compressed = {"started": "2026-11-20T10:05:00+00:00", "seconds": 0.4}
    write_manifest(run / "compressed", compress=compressed)
    rows = [
        {"path": row.site.path, "rank_before": row.rank, "rank": 2, "energy_kept": 0.9 + i / 500, "parameters": 256}
        for i, row in enumerate(plan.sites)
    ]
    kept = {"format": "rankwise-fidelity/1", "energy_kept": 0.953, "parameters": 10_752, "sites": rows}
    write(run / "compressed" / "fidelity.json", json.dumps(kept))
    return run


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: Path) -> Page:
    return Page(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = demo_run(tmp_path_factory.mktemp("runs") / "demo", layers=3)
    build_report(run)
    return run


def test_headline_comes_first_then_stages_in_order_of_time(run: Path) -> None:
    text = read(run / "report.html").text.partition("Versions and settings")
    wanted = ["3.12 →", "% of full fine-tuning (1.18M)", "Rank of every site", "58.35, 64.49", "Aromi is Italian."]
    wanted += [
        "41 s",
        "3.4 s",
        "Every site",
        "uniform",
        "1 min 17 s",
        "21 sites adapted",
        "1 site of the plan left out",
    ]
    wanted += ["0.4 s", "95.30 %", "rank before"]
    positions = [text[0].find(part) for part in wanted]
    assert -1 not in positions and positions == sorted(positions)
    assert "peft 0.21.2" in text[2] and "peft" not in text[0]
    headings = re.findall(r"<h2>(.*?)(?:<|\s·)", (run / "report.html").read_text(encoding="utf-8"))
    assert headings == ["Scores", "finetune", "ranks", "train", "compress", "Versions and settings"]


def test_page_is_self_contained(run: Path) -> None:
    """One script, which the page's own policy allows by its hash; every image is in the page; links are to the run."""
    html, tags = (run / "report.html").read_text(encoding="utf-8"), read(run / "report.html").tags
    images = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(images) == 4  # gain, scores, two decays
    for source in images:
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    assert [attributes for tag, attributes in tags if tag == "script"] == [{}]
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(str(found["content"]) for _, found in tags if found.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert not {tag for tag, _ in tags} & {"link", "iframe", "object", "embed", "base", "form"}
    assert not any(name in attributes for _, attributes in tags for name in ("srcset", "action", "onerror", "onclick"))
    links = [str(attributes["href"]) for tag, attributes in tags if tag == "a"]
    assert len(links) > 10 and all("://" not in link and (run / unquote(link)).is_file() for link in links)
    assert "@import" not in html and "url(" not in html


def test_map_and_curves_have_every_number_without_a_script(run: Path) -> None:
    html, plan = (run / "report.html").read_text(encoding="utf-8"), random_plan(random_spectra(3))
    titles = re.findall(r'<td class="c\d" title="([^"]*)">(\d+)</td>', html)
    assert len(titles) == len(plan.sites)
    told = {title.partition("\n")[0]: (title, rank) for title, rank in titles}
    for row in plan.sites:
        title, rank = told[f"site: {row.site.path}"]
        assert rank == str(row.rank) and f"shape: {row.site.shape[0]} × {row.site.shape[1]}" in title
        assert "energy kept: " in title and f"parameters: {row.parameters:,}" in title
    assert html.count("<svg xmlns") == 4, "two losses, for a desktop and for a phone"
    assert "validation, least" in html
    assert re.search(r'<th scope="row"[^>]*>model.layers.2.mlp.down_proj</th>', html)


def test_page_away_from_its_run_names_files_and_tells_no_folder(run: Path, tmp_path: Path) -> None:
    page = read(build_report(run, tmp_path / "to_send" / "page.html"))
    assert "ranks/configs/lora_rank_config.json" in page.text
    assert not [found for tag, found in page.tags if tag == "a"]
    above = read(build_report(run, run.parent / "page.html"))
    links = [unquote(str(found["href"])) for tag, found in above.tags if tag == "a"]
    assert links and all((run.parent / link).is_file() for link in links)


def test_hostile_predictions_are_shown_as_text(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "</dd><script>alert(1)</script>" in read(run / "report.html").text
    assert html.count("<script") == 1
    assert "\x1b" not in html and "‮" not in html
    markdown = (run / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and "<img" not in markdown and "http://x" not in markdown
    assert r"\| \`code\`" in markdown  # the cell is not left, no code begins


def test_markdown_shows_the_same_numbers_and_its_pictures_exist(run: Path) -> None:
    markdown = (run / "report.md").read_text(encoding="utf-8")
    assert "61.42 \\[58.35, 64.49\\]" in markdown and "WordNet is not installed" in markdown
    pictures = re.findall(r"^!\[[^\]]*\]\(([^)]+)\)", markdown, flags=re.MULTILINE)
    assert len(pictures) == 6
    assert all((run / picture).is_file() for picture in pictures)
    curves = [run / picture for picture in pictures if picture.endswith(".svg")]
    assert len(curves) == 2 and all(ElementTree.parse(path).getroot().tag.endswith("svg") for path in curves)
    assert "| layer | q\\_proj | k\\_proj |" in markdown.replace("q_proj", "q\\_proj").replace("k_proj", "k\\_proj")
    assert "[trained/training_log.csv](trained/training_log.csv)" in markdown.replace("\\_", "_")
    assert {line.count(" | ") for line in markdown.splitlines() if line.startswith("| BLEU-")} == {2}


def test_second_report_does_not_show_the_first_ones_pictures(run: Path) -> None:
    first = (run / "report.html").read_text(encoding="utf-8")
    build_report(run)
    assert (run / "report.html").read_text(encoding="utf-8") == first


def test_secrets_in_settings_are_not_shown(run: Path) -> None:
    for name in ("report.html", "report.md"):
        text = (run / name).read_text(encoding="utf-8")
        assert "sk-secret" not in text and "learning_rate" in text


@pytest.mark.parametrize("same", [True, False])
def test_ranks_lead_the_page_only_where_they_were_trained(same: bool, tmp_path: Path) -> None:
    plan = random_plan(random_spectra(2))
    ranks = [row.rank if same else 1 + max(plan.ranks.values()) for row in plan.sites if row.rank]
    adapted = Adapted(ranks, 1000, 0)
    contents = Contents(tmp_path, plans=(("ranks/lora_rank_config.json", plan),), sites=(("train", adapted),))
    page = compose(contents, {}, {}, "")
    inner = [block.name for one in page.sections for block in each(one.blocks) if isinstance(block, CellMap)]
    assert [block.name for block in each(page.lead) if isinstance(block, CellMap)] == (
        ["ranks_heatmap"] if same else []
    )
    assert inner == ([] if same else ["ranks_heatmap"])


def test_a_plan_alone_makes_a_page_without_empty_parts(tmp_path: Path) -> None:
    plan = random_plan(random_spectra(2))
    write(tmp_path / "configs" / "lora_rank_config.json", plan.dumps())
    page = build_report(tmp_path, title="A <b>title</b>")
    html, text = page.read_text(encoding="utf-8"), read(page).text
    assert "A <b>title</b>" in text and "<b>" not in html
    assert f"{plan.parameters:,} trainable parameters" in text and "of the adapted matrices" in text
    for absent in ("Scores", "loss", "Versions", "None"):
        assert absent not in text.partition("use strict")[0]
    assert not re.search(r"<(p|td|div|section|table|tbody|figcaption)[^>]*>\s*</\1>", html)


def test_scores_alone_make_a_page(tmp_path: Path) -> None:
    EvaluationResult("e2e_nlg", {"bleu": 70.4}, {}, 630).save(tmp_path)
    text = read(build_report(tmp_path)).text
    assert (
        "70.40" in text
        and "→" not in text
        and "trainable" not in text
        and "interval" not in text.partition("</style>")[2].partition("use strict")[0]
    )


def test_every_result_of_several_is_in_one_table_with_the_base_first(tmp_path: Path) -> None:
    for name, bleu in (("after_uniform", 50.0), ("after_plan", 60.0), ("base", 2.0)):
        EvaluationResult("e2e_nlg", {"bleu": bleu}, {}, 10).save(tmp_path / name / "evaluation")
    assert_base_first(tmp_path)


def test_the_model_that_an_adapter_was_put_on_is_what_came_before(tmp_path: Path) -> None:
    made_from = {"model": "abc", "data": "d"}
    for name, bleu, more in (("x", 60.0, {"adapter": "a1"}), ("y", 50.0, {"adapter": "a2"}), ("llama", 2.0, {})):
        settings = {"made_from": made_from | more}
        EvaluationResult("e2e_nlg", {"bleu": bleu}, {}, 10, settings).save(tmp_path / name)
    assert_base_first(tmp_path, "llama")


def assert_base_first(folder: Path, name: str = "base") -> None:
    html = build_report(folder).read_text(encoding="utf-8")
    assert re.findall(r'<th scope="col" class="number">([^<]*)</th>', html)[0] == name
    assert "2.00 →" in html
    row = re.search(r'<th scope="row">BLEU</th>(.*?)</tr>', html)
    assert row and {"2.00", "60.00", "50.00"} == set(re.findall(r">([\d.]+)<", row[1]))


def test_plots_without_matplotlib_are_left_out_and_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo_run(tmp_path, layers=2)
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else real(name))
    page = read(build_report(tmp_path))
    assert "matplotlib is not installed" in page.text and "least" in page.text
    alone = tmp_path / "ranks" / "configs"
    assert "matplotlib" not in read(build_report(alone)).text, "a plan needs none"


def test_nothing_to_report_is_bad_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to report"):
        build_report(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        build_report(tmp_path / "missing")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("lora_rank_config.json", '{"a": ', "line 1"),
        ("evaluation_results.json", "{}", "not an evaluation result"),
        ("gain.json", '{"arms": [{"name": "plan"}]}', "kept, low and high"),
        ("training_log.csv", "step,loss\n1,abc\n", "not a number"),
        ("plots/ranks_heatmap.png", "not a PNG", "not a picture"),
        ("fidelity.json", '{"format": "rankwise-fidelity/1", "sites": [{"path": "x"}]}', "energy_kept"),
        ("sites.json", '{"format": "rankwise-sites/1", "sites": [1], "left_out": []}', "rank and shape"),
        ("manifest.json", '{"format": "rankwise-manifest/1", "stages": []}', "stages"),
    ],
)
def test_broken_file_is_named_and_no_page_is_left(tmp_path: Path, name: str, text: str, said: str) -> None:
    write(tmp_path / name, text)
    with pytest.raises(DataError, match=said):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_predictions_cut_by_a_kill_are_read_to_the_last_whole_line(tmp_path: Path) -> None:
    write_scores(tmp_path, 50.0, ["a", "b", "c", "d"])
    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write('{"id": "e2e-9", "predic')
    assert "Reference 0." in read(build_report(tmp_path)).text


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = write_outside(tmp_path / "outside")
    run = tmp_path / "run"
    write(run / "lora_rank_config.json", random_plan(random_spectra(1)).dumps())
    (run / "plots").mkdir()
    (run / "plots" / "secret.png").symlink_to(outside)
    assert "secret" not in build_report(run).read_text(encoding="utf-8")


def write_outside(folder: Path) -> Path:
    spectra = random_spectra(1)
    return plot_decay(next(iter(spectra.values())), random_plan(spectra).sites[0], 0.9, folder / "secret.png")


def test_stage_writes_where_it_is_told_and_checks_its_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run" / "lora_rank_config.json", random_plan(random_spectra(1)).dumps())
    out = tmp_path / "elsewhere" / "page.html"
    assert stage.run(ReportConfig(run=str(tmp_path / "run"), out=str(out))) == out
    assert str(out) in capsys.readouterr().out
    assert out.with_suffix(".md").is_file() and not (tmp_path / "run" / "report.html").exists()
    assert "page.html" in " ".join(stage.describe(ReportConfig(run="x", out="page.html")))
    with pytest.raises(UsageError, match="run folder"):
        stage.run(ReportConfig())
    with pytest.raises(UsageError, match="html"):
        stage.run(ReportConfig(run=str(tmp_path), out="page.pdf"))


def test_a_classification_shows_what_was_taken_for_what_and_forgetting_comes_last(tmp_path: Path) -> None:
    EvaluationResult("forgetting", {"kl": 0.125, "perplexity_ratio": 1.1}, {}, 7).save(tmp_path)
    (tmp_path / "evaluation_results.json").rename(tmp_path / "forgetting.json")
    scoring = {"labels": ["neutral", "entailment"], "confusion": [[31, 4, 0], [7, 29, 2]]}
    EvaluationResult("multi_nli", {"accuracy": 82.19}, {}, 73, {"scoring": scoring}).save(tmp_path)
    page = build_report(tmp_path).with_suffix(".md").read_text()
    assert page.index("Scores · multi_nli") < page.index("Scores · forgetting")
    assert "0.125" in page
    assert "What was taken for what" in page
    row = next(line for line in page.splitlines() if "entailment" in line and "29" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["entailment", "7", "29", "2"]


def test_the_method_stands_beside_a_score_and_before_is_by_the_same(tmp_path: Path) -> None:
    scoring = {"labels": ["a", "b"], "confusion": [[3, 0, 0], [0, 2, 0]], "classify": "how, in words"}
    for name, settings, value in (
        ("evaluate_before", {}, 40.0),
        ("after", {}, 80.0),
        ("other", {"classify": "likelihood"}, 100.0),
    ):
        (tmp_path / name).mkdir()
        result = EvaluationResult("labels", {"accuracy": value}, {}, 5, settings | {"scoring": scoring})
        result.save(tmp_path / name)
    page = build_report(tmp_path).with_suffix(".md").read_text()
    assert "| accuracy | 40.00 → **80.00** (by generation, n = 5) |" in page
    assert page.index("## Scores · labels by generation") < page.index("## Scores · labels by likelihood")


def test_what_a_validation_scored_stays_in_its_own_table(tmp_path: Path) -> None:
    result = EvaluationResult("labels", {"accuracy": 80.0, "precision_water": 50.0}, {}, n=5)
    for name in ("after", "validation/f16"):
        (tmp_path / name).mkdir(parents=True)
        result.save(tmp_path / name)
    files = sorted(tmp_path.rglob("*.json"))
    assert {one.folder for one in read_scores(tmp_path, files)} == {"after", "validation/f16"}
    files.append(tmp_path / "validation" / "validation.json")
    assert [one.folder for one in read_scores(tmp_path, files)] == ["after"]
    assert leading_metrics([result]) == ["accuracy"], "not one class's precision"


def test_findings_are_where_the_table_of_their_files_says() -> None:
    found = {name: getattr(imported(f"rankwise.{module}"), attribute) for name, (module, attribute) in FINDINGS.items()}
    assert {name: finding.file for name, finding in found.items()} == {name: name for name in FINDINGS}


def test_a_report_imports_no_trainer_and_no_model_before_a_file_asks_for_it() -> None:
    heavy = "peft transformers.trainer_callback transformers.modeling_utils torchvision".split()
    said = f"import sys, rankwise.report.report; print(*sorted(set({heavy}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout.split() == []
