"""What a resumed run is held to: whatever decides the weights is part of it, and another run is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_finetune import restaurants
from test_towers_full import bases  # noqa: F401
from tiny import tiny_llama
from towered import Bases
from transformers import TrainingArguments

from rankwise.cli import main
from rankwise.options.commands import TrainConfig
from rankwise.options.field import flatten
from rankwise.train.arguments import build_arguments
from rankwise.train.checkpoints import DECISIVE, MAY_RISE, identity_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Training arguments that leave the weights as they are, or say which of them are kept: evaluation, logging, saving,
# memory and speed. A field that a new transformers brings must be put here or into DECISIVE.
FREE = """
    output_dir bf16_full_eval fp16_full_eval activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    liger_kernel_config use_cache torch_empty_cache_steps logging_strategy logging_steps logging_first_step
    log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
    eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy
    save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo
    hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model
    greater_is_better restore_callback_states_from_checkpoint full_determinism use_cpu parallelism_config
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names length_column_name
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
    fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
""".split()
# The command's own options that do the same, or that only say where something is read or written; arms have checks of
# their own (test_arms.py).
OPTIONS_FREE = """
    output_dir adapter_folder val_path resume_from_checkpoint allow_partial_resume estimate gpu usd_per_hour utilisation
    yes estimate_out log_frequency no_plots select select_by early_stopping skip_bad allow_outside allow_urls download
    revision trust_remote_code depth_cache training arms
""".split()
Resume = Callable[..., tuple[int, str]]


# --- training arguments ----------------------------------------------------------------------------------------------


def test_every_training_argument_is_decisive_or_known_not_to_be() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert fields - set(DECISIVE) - set(FREE) == set(), "does it change which weights come out?"
    assert not set(DECISIVE) & set(FREE)


OTHERS: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "auto_find_batch_size": True,
    "num_train_epochs": 1,
    "max_steps": 3,
    "seed": 1,
    "data_seed": 1,
    "train_sampling_strategy": "sequential",
    "dataloader_drop_last": True,
    "learning_rate": 0.5,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 2,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "optim_target_modules": "q_proj",
    "weight_decay": 0.5,
    "max_grad_norm": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.5,
    "bf16": True,
    "fp16": True,
    "label_smoothing_factor": 0.5,
    "neftune_noise_alpha": 5.0,
    "average_tokens_across_devices": False,
    "ignore_data_skip": True,
    "accelerator_config": "another",
    "tf32": True,
    "use_liger_kernel": True,
}


@pytest.mark.parametrize("name", OTHERS)
def test_each_of_them_makes_another_run(name: str, tmp_path: Path) -> None:
    arguments = build_arguments(tmp_path, 42, {"max_steps": 4})
    before = identity_of(arguments)
    assert before.get(name) != json.loads(json.dumps(OTHERS[name]))
    setattr(arguments, name, OTHERS[name])
    after = identity_of(arguments)
    assert {key.partition(".")[0] for key in {*before, *after} if before.get(key) != after.get(key)} == {name}


# --- on the command's path -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, trainset.csv and run/ with checkpoints of its four steps."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_llama(folder / "base")
    restaurants(folder)
    assert main(words(folder)) == 0
    return folder


def words(folder: Path, *more: str) -> list[str]:
    own = (
        f"train --model_name {folder / 'base'} --task e2e_nlg --data_path {folder / 'trainset.csv'} -o {folder / 'run'}"
    )
    steps = "--max_steps 4 --save_strategy steps --save_steps 2 --eval_strategy no --use_cpu --no_plots --lora_r 4"
    return [*own.split(), *steps.split(), "--batch_size", "4", *more]


@pytest.fixture
def copy(material: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(material, tmp_path / "copy"))


@pytest.fixture
def resume(material: Path, capsys: pytest.CaptureFixture[str]) -> Resume:
    """Go on with the run, some things changed; the exit code and what is said to be wrong."""

    def run(*more: str, of: Path = material) -> tuple[int, str]:
        code = main([*words(of), "--resume_from_checkpoint", "true", *more])
        said = capsys.readouterr()
        return code, said.err + said.out

    return run


CHANGED: dict[str, tuple[str, str]] = {  # option → flags, and what the refusal names
    "prompt": ("--prompt raw", "prompt: sections in the checkpoint, raw now"),
    "max_seq_length": ("--max_seq_length 200", "max_seq_length: "),
    "overlong": ("--overlong drop", "overlong: error in the checkpoint, drop now"),
    "dtype": ("--dtype bfloat16", "dtype: torch.float32 in the checkpoint, torch.bfloat16 now"),
    "attn_implementation": ("--attn_implementation eager", "attn_implementation: None in the checkpoint, eager now"),
    "lora_r": ("--lora_r 8", "ranks.model.layers.0.mlp.down_proj: 4 in the checkpoint, 8 now"),
    "lora_alpha": ("--lora_alpha 12", "scales: [2.0] in the checkpoint, [3.0] now"),
    "lora_dropout": ("--lora_dropout 0.3", "lora.dropout: 0.05 in the checkpoint, 0.3 now"),
    "lora_bias": ("--lora_bias all", "lora.bias: none in the checkpoint, all now"),
    "target": ("--target mlp_only", "ranks.model.layers.0.self_attn.q_proj: 4 in the checkpoint, None now"),
    "target_modules": ("--target_modules q_proj", "ranks.model.layers.0.mlp.up_proj: 4 in the checkpoint, None now"),
    "use_rslora": ("--use_rslora", "lora.rslora: False in the checkpoint, True now"),
    "use_dora": ("--use_dora", "lora.dora: False in the checkpoint, True now"),
    "loraplus_lr_ratio": ("--loraplus_lr_ratio 8", "lora.loraplus_lr_ratio: None in the checkpoint, 8"),
    "init_lora_weights": ("--init_lora_weights orthogonal", "lora.init: default in the checkpoint, orthogonal now"),
    "load_in_4bit": ("--load_in_4bit", "quantization: None in the checkpoint, 4bit now"),
    "load_in_8bit": ("--load_in_8bit", "quantization: None in the checkpoint, 8bit now"),
    "allocator": ("--allocator adalora --lora_r 2", "allocator.method: None in the checkpoint, adalora now"),
    "language_lr": ("--language_lr 1e-3", "tower_rates.language: None in the checkpoint, 0.001 now"),
    "phase_strategy": (
        "--phase_strategy both-mlp-attn --phase1_end 1 --phase2_end 2",
        "schedule: None in the checkpoint",
    ),
    "schedule": ("--schedule mlp:2>attention", "schedule: None in the checkpoint, ['mlp:2 > attention', 'keep'] now"),
    "val_fraction": ("--val_fraction 0.3", "validation: 0.05 in the checkpoint, 0.3 now"),
    "max_samples": ("--max_samples 8", "samples: "),
    "max_val_samples": ("--max_val_samples 1", "max_val_samples: None in the checkpoint, 1 now"),
    "packing": ("--packing", "packing: False in the checkpoint, True now"),
    "seed": ("--seed 7", "seed: 42 in the checkpoint, 7 now"),
}


@pytest.mark.parametrize("option", CHANGED)
def test_another_run_is_refused_by_name(option: str, resume: Resume) -> None:
    flags, said = CHANGED[option]
    code, error = resume(*[part.replace("\x00", " ") for part in flags.split(" ")])
    assert code == 2 and "belongs to another run" in error and said in error


# Told apart by what follows from them, or only together with others above; of models that see, below.
FOLLOWS = """
    model_name task data_path chat_template chat_template_kwargs image_folder repeat_image image_first roles
    aux_reason device_target lora_config warm_start deltas allocator_keep_ratio allocator_init_warmup
    allocator_final_warmup allocator_mask_interval allocator_orth freeze lora full vision_lr projector_lr
    depth_checkpoint_path depth_control depth_maps use_depth depth_alpha depth_input_size depth_gate depth_lr
    depth_layout dynamic_lora phase1_end phase2_end phase_state balance
""".split()


def test_every_option_of_train_is_looked_at() -> None:
    """A new option must be put into one of the three lists."""
    left = set(flatten(TrainConfig())) - set(CHANGED) - set(FOLLOWS) - set(OPTIONS_FREE) - set(DECISIVE)
    assert left == set(), "does it change which weights come out?"


def test_raised_lengths_go_on(copy: Path, resume: Resume) -> None:
    assert MAY_RISE == ("num_train_epochs", "max_steps")
    assert resume("--max_steps", "6", of=copy)[0] == 0
    code, said = resume("--max_steps", "3", of=copy)
    assert code == 2 and "max_steps: 6 in the checkpoint, 3 now" in said


def other_rows(folder: Path) -> None:
    file = folder / "trainset.csv"
    file.write_text(file.read_text().replace("is in the", "lies in the", 1))


def other_weights(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    save_file({key: 1.001 * one for key, one in load_file(file).items()}, file, metadata={"format": "pt"})


def other_tokens(folder: Path) -> None:
    """Two pieces in each other's places: the same rows are other ids."""
    file = folder / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    pieces = content["model"]["vocab"]
    first, second = sorted(pieces, key=lambda piece: pieces[piece])[-2:]
    pieces[first], pieces[second] = pieces[second], pieces[first]
    file.write_text(json.dumps(content))


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rows": (other_rows, "data.trainset.csv: "),
    "weights": (other_weights, "base.model.safetensors: "),
    "tokenizer": (other_tokens, "rows: "),
}


@pytest.mark.parametrize("what", FILES)
def test_other_files_under_the_same_names(what: str, copy: Path, resume: Resume) -> None:
    change, said = FILES[what]
    assert resume(of=copy)[0] == 0
    change(copy)
    code, error = resume(of=copy)
    assert code == 2 and said in error


def test_other_pictures_under_the_same_names(
    bases: Bases,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("one", "two"):
        shutil.copytree(bases.rows.parent / "images", tmp_path / name / "images")
    shutil.copyfile(bases.rows, tmp_path / "rows.json")
    own = f"train --model_name {bases('smolvlm')} --data_path {tmp_path / 'rows.json'} -o {tmp_path / 'run'} --lora_r 2"
    steps = (
        "--max_steps 1 --save_strategy steps --save_steps 1 --eval_strategy no --use_cpu --no_plots --val_fraction 0"
    )
    given = [*own.split(), *steps.split(), "--batch_size", "1", "--max_samples", "2", "--image_folder"]
    assert main([*given, str(tmp_path / "one" / "images")]) == 0
    for file in (tmp_path / "two" / "images").rglob("*.*"):
        content = bytearray(file.read_bytes())
        file.write_bytes(content + b"\0")
    capsys.readouterr()
    assert main([*given, str(tmp_path / "two" / "images"), "--resume_from_checkpoint", "true"]) == 2
    assert "rows: " in capsys.readouterr().err


# --- the checkpoint itself -------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def gone(file: Path) -> None:
    file.unlink()


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights cut": ("adapter_model.safetensors", cut, "bytes instead of"),
    "weights altered": ("adapter_model.safetensors", flipped, "adapter_model.safetensors was altered"),
    "weights gone": ("adapter_model.safetensors", gone, "adapter_model.safetensors is missing"),
    "optimizer altered": ("optimizer.pt", flipped, "optimizer.pt was altered"),
    "random state altered": ("rng_state.pth", flipped, "rng_state.pth was altered"),
    "unfinished": ("rankwise_manifest.json", gone, "it has no manifest"),
    "manifest cut": ("rankwise_manifest.json", cut, "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_aloud_and_refused_by_name(name: str, copy: Path, resume: Resume) -> None:
    file, damage, said = DAMAGES[name]
    newest = copy / "run" / "checkpoint-4"
    damage(newest / file)
    code, error = resume("--resume_from_checkpoint", str(newest), of=copy)
    assert code == 3 and "cannot be resumed from" in error and said in error
    code, printed = resume(of=copy)
    assert code == 0 and f"skipped {newest}" in printed and said in printed
    assert f"resuming from {copy / 'run' / 'checkpoint-2'}" in printed


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_state_that_is_gone(file: str, copy: Path, resume: Resume) -> None:
    (copy / "run" / "checkpoint-4" / file).unlink()
    code, said = resume(of=copy)
    assert code == 2 and f"lacks {file}, so training cannot go on exactly as before" in said
    code, said = resume("--allow_partial_resume", of=copy)
    assert code == 0 and f"warning: {file} missing" in said


def test_a_checkpoint_of_an_earlier_version_goes_on(copy: Path, resume: Resume) -> None:
    """What it did not record yet is no difference."""
    file = copy / "run" / "checkpoint-4" / "rankwise_manifest.json"
    content = json.loads(file.read_text())
    for name in ("rows", "tf32", "ignore_data_skip", "accelerator_config", "use_liger_kernel"):
        del content["identity"][name]
    file.write_text(json.dumps(content))
    assert resume(of=copy)[0] == 0
