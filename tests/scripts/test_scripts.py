"""The documented Python snippets run with only their import lines changed, and say what the design's own types say."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rows import Rows, Watch, adapted_base
from tiny import tiny_llama
from transformers import Trainer, TrainingArguments

from rankwise import cli, scripts
from rankwise.core.phase import bind
from rankwise.core.schedule import parse_schedule, strategy
from rankwise.data.device import DeviceTarget
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.models.adapt import lora_layers
from rankwise.models.load import load_tokenizer, meta_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites
from rankwise.scripts import (
    ATTENTION_ONLY,
    BOTH,
    MLP_ONLY,
    PRESETS,
    DatasetType,
    DynamicLoRACallback,
    ExperimentConfig,
    GradientAnalysisConfig,
    GradientMeasuringTrainer,
    GradientNormCallback,
    GradientNormLog,
    create_layerwise_lora_config,
    create_phased_lora_config,
    evaluate_e2e,
    evaluate_wikisql,
    experiment_command,
    get_data_collator,
    load_and_preprocess_dataset,
    measure_gradient_norms,
    print_trainable_parameters,
    run_experiment,
    setup_model_with_lora,
)
from rankwise.scripts.phases import adapted_sites, schedule_of
from rankwise.scripts.running import phase_options

MEALS = ("Italian", "Thai", "French", "Indian")
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/e2e_nlg in the official form, where the documented calls look for it."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "data" / "e2e_nlg").mkdir(parents=True)
    for file, names in (("trainset.csv", "ABCDEFGHIJ"), ("devset.csv", "XY")):
        rows = [(f"name[{name}], food[{meal}]", f"{name} serves {meal} food.") for name in names for meal in MEALS]
        with open(folder / "data" / "e2e_nlg" / file, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("mr", "ref"), *rows])
    return folder


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    return TrainingArguments(output_dir=str(folder), **(settings | given))


def rows_for(base: Path, task: Path) -> Any:
    tokenizer = load_tokenizer(str(base))
    config = scripts.DataConfig(data_path=str(task / "data" / "e2e_nlg"))
    return load_and_preprocess_dataset(config, tokenizer)


# --- configuration -------------------------------------------------------------------------------------------------


def test_every_documented_name_is_there_and_explains_itself() -> None:
    documented = """ExperimentConfig LoRAConfig TrainingConfig DataConfig DynamicLoRAConfig DatasetType PRESETS
        ATTENTION_ONLY MLP_ONLY BOTH GradientNormLog GradientNormCallback GradientMeasuringTrainer
        measure_gradient_norms DynamicLoRACallback create_phased_lora_config create_layerwise_lora_config
        load_and_preprocess_dataset get_data_collator ModelEvaluator evaluate_e2e evaluate_samsum evaluate_wikisql
        evaluate_multi_nli setup_model_with_lora print_trainable_parameters plot_gradient_norms plot_layer_heatmap
        plot_layer_comparison plot_gradient_evolution plot_training_loss generate_summary_report resize_for_android
        ANDROID_IMAGE_SIZE ANDROID_MAX_TOKENS ANDROID_IMAGE_MARKER""".split()
    assert set(documented) <= set(scripts.__all__)
    for name in scripts.__all__:
        found = getattr(scripts, name)
        assert isinstance(found, (list, dict, int, str)) or (found.__doc__ or "").strip(), name


def test_the_snippet_of_the_configuration(base: Path) -> None:
    config = PRESETS["e2e_attention"]()
    assert config.lora.target_modules == ATTENTION_ONLY
    config = ExperimentConfig()
    config.data.dataset_type = DatasetType.WIKISQL
    config.lora.r = 4
    assert experiment_command(config)[experiment_command(config).index("--task") + 1] == "wikisql"
    config.lora.target_modules = ["q_proj", "up_proj"]
    assert experiment_command(config)[experiment_command(config).index("--target_modules") + 1] == "q_proj,up_proj"


def test_the_defaults_are_those_of_the_documents_and_of_the_recipe() -> None:
    config, preset = ExperimentConfig(), PRESETS["e2e_attention"]()
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (4, 32, 0.1)
    assert (config.training.lr, config.training.max_steps) == (2e-4, 1000)
    assert config.training == preset.training
    assert config.model == preset.model
    assert config.data.path == preset.data.path
    assert replace(PRESETS["samsum_phased"]().dynamic_lora, enabled=False) == config.dynamic_lora


def test_the_lists_of_modules_are_those_of_the_targets(base: Path) -> None:
    sites = model_sites(meta_model(str(base)))
    for target, listed in (("attention_only", ATTENTION_ONLY), ("mlp_only", MLP_ONLY), ("both", BOTH)):
        assert choose_sites(sites, target) == choose_sites(sites, names=listed)
        assert {site.projection for site in choose_sites(sites, target).values()} == set(listed)


# --- the Android app ------------------------------------------------------------------------------------------------


def test_the_snippet_of_the_android_geometry() -> None:
    """The documents' constants, and what the app does to a photo: into the square, black where it does not reach."""
    assert (scripts.ANDROID_IMAGE_SIZE, scripts.ANDROID_MAX_TOKENS) == (256, 32)
    assert scripts.ANDROID_IMAGE_MARKER == "<__media__>"
    image = Image.new("RGB", (512, 128), (200, 100, 50))
    image_256 = scripts.resize_for_android(image, 256)
    assert image_256.size == (256, 256) == scripts.resize_for_android(image).size
    assert (image_256.getpixel((128, 128)), image_256.getpixel((128, 60))) == ((200, 100, 50), (0, 0, 0))
    assert image_256.tobytes() == DeviceTarget().resize(image).tobytes()


# --- phases --------------------------------------------------------------------------------------------------------


def test_the_snippet_of_the_phases_is_the_recommended_strategy() -> None:
    phase_configs = create_phased_lora_config(
        phase1_steps=(0, 300),
        phase2_steps=(300, 600),
        phase3_steps=(600, None),
        phase1_modules=["attention", "mlp"],
        phase2_modules=["mlp"],
        phase3_modules=["attention"],
    )
    callback = DynamicLoRACallback(phase_configs, verbose=True)
    assert callback.phase_configs == parse_schedule(strategy("both->mlp->attn", 300, 600))
    assert create_phased_lora_config() == phase_configs == schedule_of(PRESETS["samsum_phased"]().dynamic_lora)


def test_layers_then_the_other_layers_to_the_end(base: Path) -> None:
    sites = model_sites(meta_model(str(base)))
    halves = create_layerwise_lora_config((0, 5), (5, None))
    named = create_layerwise_lora_config((0, 5), (5, None), (0, 0), (1, 1))
    wanted = bind(parse_schedule(strategy("early->late", 5, 9)), sites, 0)
    for form in (halves, named):
        bound = bind(form, sites, 0)
        assert [bound.active(step) for step in (0, 4, 5, 500)] == [wanted.active(step) for step in (0, 4, 5, 500)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"phase2_steps": (310, 600)}, "phase 2 begins at step 310; it must begin at 300"),
        ({"phase2_steps": (290, 600)}, "must begin at 300"),
        ({"phase1_steps": (1, 300)}, "phase 1 begins at step 1; it must begin at 0"),
        ({"phase2_steps": (300, None)}, "phase3_steps=None"),
        ({"phase3_steps": (600, 900)}, r"phase3_steps=\(600, None\)"),
        ({"phase2_steps": (300, 300)}, "phase 2 ends at step 300"),
        ({"phase3_steps": None}, r"phase2_steps=\(300, None\)"),
        ({"phase2_modules": ["atention"]}, "attention"),
        ({"phase2_modules": []}, "without modules"),
    ],
)
def test_phases_with_gaps_overlaps_or_ends_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        create_phased_lora_config(**given)


PHASES = {"phase1_steps": (0, 2), "phase2_steps": (2, 4), "phase3_steps": (4, None)}


@pytest.mark.parametrize("ours", [True, False], ids=["GradientMeasuringTrainer", "transformers.Trainer"])
@pytest.mark.parametrize("verbose", [True, False])
def test_the_callback_trains_what_the_schedule_says(
    ours: bool, verbose: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same sites move in the same steps as PhaseKeeper's, in either Trainer; and all can train afterwards."""
    form, watch = create_phased_lora_config(**PHASES), Watch()
    model = adapted_base(base)
    wanted = bind(form, adapted_sites(model), 42)
    kind = GradientMeasuringTrainer if ours else Trainer
    callbacks = [DynamicLoRACallback(form, verbose=verbose), watch]
    kind(model=model, args=arguments(tmp_path), train_dataset=Tensors(), callbacks=callbacks).train()
    assert watch.moved == [wanted.active(step) for step in range(STEPS)]
    assert all(layer.lora_A["default"].weight.requires_grad for layer in lora_layers(model).values())
    rows = list(csv.DictReader((tmp_path / "phases.csv").read_text().splitlines()))
    assert [(row["step"], row["phase"]) for row in rows] == [("1", "both"), ("3", "mlp"), ("5", "attention")]
    assert ("phase from step 3: mlp" in capsys.readouterr().out) is verbose


class Tensors(Rows):
    """Rows without their index, for Trainers that do not know it."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        return {name: torch.tensor(row[name]) for name in ("input_ids", "labels")}


def test_what_a_plain_trainer_cannot_do_is_refused(base: Path, tmp_path: Path) -> None:
    model = adapted_base(base)
    for callback, said in (
        (DynamicLoRACallback(parse_schedule("norm:2")), "needs GradientMeasuringTrainer"),
        (GradientNormCallback(output_dir=tmp_path), "measures nothing in this Trainer"),
        (DynamicLoRACallback(parse_schedule("layers 0-7")), "names layer 7"),
    ):
        with pytest.raises(UsageError, match=said):
            Trainer(model=model, args=arguments(tmp_path), train_dataset=Tensors(), callbacks=[callback]).train()
    twice = [DynamicLoRACallback(create_phased_lora_config()), DynamicLoRACallback(create_phased_lora_config())]
    with pytest.raises(UsageError, match="at most"):
        GradientMeasuringTrainer(model=model, args=arguments(tmp_path), train_dataset=Tensors(), callbacks=twice)


# --- gradients -----------------------------------------------------------------------------------------------------


def test_the_snippet_of_the_gradients(base: Path, task: Path, tmp_path: Path) -> None:
    gradient_analysis_config = ExperimentConfig().gradient_analysis
    training_args, folder = arguments(tmp_path / "trainer"), tmp_path / "results" / "experiment"
    config = ExperimentConfig()
    config.model.model_name = str(base)
    model, tokenizer = setup_model_with_lora(config.model, config.lora)
    train_dataset = load_and_preprocess_dataset(scripts.DataConfig(data_path=str(task / "data/e2e_nlg")), tokenizer)
    dynamic_lora_callback = DynamicLoRACallback(create_phased_lora_config(**PHASES), verbose=True)

    grad_callback = GradientNormCallback(config=gradient_analysis_config, output_dir=str(folder))
    trainer = GradientMeasuringTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        gradient_callback=grad_callback,
        callbacks=[grad_callback, dynamic_lora_callback],
    )
    trainer.train()

    log = grad_callback.log
    table = list(csv.DictReader((folder / "gradient_analysis.group_norms.csv").read_text().splitlines()))
    assert [row["phase"] for row in table] == ["both", "both", "mlp", "mlp", "attention", "attention"]
    assert log.steps == GradientNormLog.load(folder).steps
    assert log.steps == list(range(1, STEPS + 1))
    trained = {name: [math.isfinite(norm) for norm in log.groups[f"{name}_norm"]] for name in ("attention", "mlp")}
    assert trained == {
        "attention": [True, True, False, False, True, True],
        "mlp": [True, True, True, True, False, False],
    }
    assert log.layers.keys() == {f"layer_{i}_{kind}" for i in (0, 1) for kind in ("attention", "mlp")}
    assert log.summary == json.loads((folder / "gradient_analysis.summary.json").read_text())
    for name in ("group_norms.csv", "layer_norms.csv", "summary.json"):
        assert (folder / f"gradient_analysis.{name}").is_file()


def test_norms_can_be_left_out_or_measured_now_and_then(base: Path, tmp_path: Path) -> None:
    for every, steps in ((0, None), (4, [4])):
        folder = tmp_path / str(every)
        callback = GradientNormCallback(GradientAnalysisConfig(log_frequency=every), folder)
        rows = {"train_dataset": Tensors(), "gradient_callback": callback}
        GradientMeasuringTrainer(model=adapted_base(base), args=arguments(tmp_path / "trainer"), **rows).train()
        assert (callback.log.steps if folder.exists() else None) == steps


def test_norms_of_a_model_after_any_backward(base: Path) -> None:
    model = adapted_base(base, dropout=0.0)
    ids = torch.arange(4, 12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    found = measure_gradient_norms(model)
    by_hand = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert found["total_norm"] == pytest.approx(by_hand, rel=1e-5)
    assert found["total_norm"] == pytest.approx(math.hypot(found["attention_norm"], found["mlp_norm"]), rel=1e-5)


def test_the_plots_are_drawn_from_a_run_s_folder(base: Path, tmp_path: Path) -> None:
    callback = GradientNormCallback(output_dir=tmp_path)
    GradientMeasuringTrainer(
        model=adapted_base(base), args=arguments(tmp_path), train_dataset=Tensors(), gradient_callback=callback
    ).train()
    names = ("gradient_norms", "layer_heatmap", "layer_comparison", "gradient_evolution", "training_loss")
    for name in names:
        path = getattr(scripts, f"plot_{name}")(tmp_path)
        assert path == tmp_path / "plots" / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
    assert scripts.plot_gradient_norms(tmp_path, tmp_path / "elsewhere.png") == tmp_path / "elsewhere.png"
    assert [path.suffix for path in scripts.generate_summary_report(tmp_path)] == [".txt", ".json"]


# --- model and rows ------------------------------------------------------------------------------------------------


def test_the_model_is_set_up_as_documented(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ExperimentConfig()
    config.model.model_name, config.lora.target_modules = str(base), list(ATTENTION_ONLY)
    model, tokenizer = setup_model_with_lora(config.model, config.lora)
    layers = lora_layers(model)
    assert {path.rsplit(".", 1)[1] for path in layers} == set(ATTENTION_ONLY)
    assert {(layer.r["default"], layer.scaling["default"]) for layer in layers.values()} == {(4, 8.0)}
    assert all("lora_" in name for name, value in model.named_parameters() if value.requires_grad)
    assert model.get_base_model().is_activation_checkpointing
    assert not model.get_input_embeddings()(torch.tensor([5])).requires_grad, "backward may end at frozen layers"
    assert tokenizer.pad_token_id is not None
    print_trainable_parameters(model)
    assert "trainable params: 896" in capsys.readouterr().out


TABLE = {"id": "1-1", "header": ["Name", "Age"], "types": ["text", "real"], "rows": [["Ann", 30], ["Bob", 41]]}
OFFICIAL = {
    "samsum/val.json": [
        {"id": str(i), "dialogue": f"Ann: Lunch at {i}?\r\nBob: Yes.", "summary": f"Lunch at {i}."} for i in (1, 2, 3)
    ],
    "wikisql/dev.tables.jsonl": [TABLE],
    "wikisql/dev.jsonl": [
        {"table_id": "1-1", "question": f"How old is {name}?", "sql": {"sel": 1, "agg": 0, "conds": [[0, 0, name]]}}
        for name in ("Ann", "Bob", "Eve")
    ],
    "multi_nli/multinli_1.0_dev_matched.jsonl": [
        {"pairID": f"{i}", "promptID": f"{i}", "sentence1": "It rains.", "sentence2": "It is dry.", "gold_label": label}
        for i, label in enumerate(("entailment", "neutral", "contradiction"))
    ],
}


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder holds data/<task> with three rows of each task in its official form."""
    for name, rows in OFFICIAL.items():
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(json.dumps(row) for row in rows)
        file.write_text(json.dumps(rows) if file.suffix == ".json" else lines + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("function", "metrics"),
    [
        ("evaluate_wikisql", {"exact_match"}),
        ("evaluate_multi_nli", {"accuracy"}),
        ("evaluate_samsum", {"bleu", "rouge_1", "rouge_l", "rouge_lsum"}),
    ],
)
def test_the_snippet_of_the_evaluation(
    function: str, metrics: set[str], base: Path, tmp_path: Path, official: None
) -> None:
    """Positional as in the documents; the result reads like the documented dictionary."""
    result = getattr(scripts, function)(str(base), None, 2, output_dir=tmp_path / "out", batch_size=8)
    assert result["num_samples"] == 2
    assert metrics <= set(result) and all(0 <= result[name] <= 100 for name in metrics)
    assert EvaluationResult.load(tmp_path / "out") == result


def test_rows_are_padded_by_their_collator(base: Path, task: Path) -> None:
    rows = rows_for(base, task)
    batch = get_data_collator(rows.renderer.tokenizer)([rows[0], rows[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert len(rows) == 40


# --- whole runs ----------------------------------------------------------------------------------------------------


def test_wrong_settings_are_refused_as_on_the_command_line(base: Path) -> None:
    config = ExperimentConfig()
    config.training.lr_scheduler_type = "cosin"
    with pytest.raises(UsageError, match="lr_scheduler_type"):
        run_experiment(config)
    with pytest.raises(DataError, match="data/wikisql does not exist"):
        evaluate_wikisql(str(base), None, 100)


@pytest.mark.slow
def test_an_experiment_is_the_command_s_run_and_is_scored(
    base: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(task)
    config = PRESETS["e2e_mlp"]()
    config.model.model_name, config.output_dir = str(base), str(tmp_path / "exp")
    config.training.batch_size, config.training.max_steps, config.training.eval_steps = 4, STEPS, 3
    config.training.lr = 1e-2
    config.dynamic_lora.enabled, config.lora.target_modules = True, list(BOTH)
    config.dynamic_lora.phase1_steps, config.dynamic_lora.phase2_steps = (0, 2), (2, 4)
    config.dynamic_lora.phase3_steps = (4, None)
    folder = run_experiment(config)
    config.output_dir = str(tmp_path / "command")
    assert cli.main(experiment_command(config)[1:]) == 0
    weights = [path / "final_model" / "adapter_model.safetensors" for path in (folder, tmp_path / "command")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert {"resolved_config.json", "results_summary.json"} <= {path.name for path in folder.iterdir()}

    e2e_result = evaluate_e2e(
        model_path=str(folder / "final_model"), base_model_id=str(base), num_samples=4, batch_size=4
    )
    assert dict(e2e_result)["num_samples"] == e2e_result["num_samples"] == 4
    assert {"bleu", "bleu_4", "rouge_1", "rouge_lsum"} <= set(e2e_result)
    assert (folder / "final_model" / "evaluation" / "e2e_nlg" / "evaluation_results.json").is_file()


@pytest.mark.parametrize(("config", "every"), [({}, None), ({"log_frequency": 5}, 5), ({"enabled": False}, 0)])
def test_the_long_table_of_gradient_norms_is_thinned_at_the_scripts_default(config: dict[str, Any], every: Any) -> None:
    """The two documented tables have every step either way."""
    analysis = GradientAnalysisConfig(**config)
    assert phase_options(ExperimentConfig(gradient_analysis=analysis))["log_frequency"] == every
