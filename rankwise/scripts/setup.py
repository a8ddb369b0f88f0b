"""A model with LoRA and rows for it, in the two calls of the documented scripts.

model, tokenizer = setup_model_with_lora(config.model, config.lora)
rows = load_and_preprocess_dataset(config.data, tokenizer)
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.render import Renderer
from rankwise.data.sources import load
from rankwise.models.adapt import LoraSettings, adapt, choose_sites, uniform_plan
from rankwise.models.load import load_model, load_tokenizer
from rankwise.models.sites import model_sites, torch_dtype
from rankwise.options.sections import MAX_SEQ_LENGTH
from rankwise.scripts.experiment import DataConfig, LoRAConfig, ModelConfig


def setup_model_with_lora(model_config: ModelConfig, lora_config: LoRAConfig) -> tuple[PeftModel, Any]:
    """The base, frozen, with an adapter of one rank at the named projections; and its tokenizer.

    The adapter's random start comes from torch's global generator: seed it before. Gradient checkpointing is on
    unless the config turns it off.
    """
    name = model_config.model_name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_model(name, torch_dtype(model_config.dtype, trained=False, device=device))
    sites = choose_sites(model_sites(base), names=lora_config.target_modules)
    plan = uniform_plan(sites, lora_config.r, lora_config.alpha, False, name)
    model = adapt(base, plan, LoraSettings(dropout=lora_config.dropout))
    if model_config.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.disable_input_require_grads()  # or backward would pass through every frozen layer
    return model, load_tokenizer(name)


def load_and_preprocess_dataset(
    data_config: DataConfig, tokenizer: PreTrainedTokenizerBase, split: str = "train"
) -> RenderedDataset:
    """The rows of a task as token ids and labels, rendered as training and evaluation render them.

    Args:
        data_config: `max_samples` takes the first rows here; `run_experiment` draws them.
        split: train, dev or test, of the official files. No share is held out for validation here: `run_experiment`
            does that, by group.
    """
    examples = load(data_config.dataset_type, data_config.path, split)
    rows = examples.items[: data_config.max_samples]
    return RenderedDataset(rows, Renderer(tokenizer, max_length=data_config.max_length or MAX_SEQ_LENGTH))


def get_data_collator(tokenizer: PreTrainedTokenizerBase) -> Collator:
    """Pads a batch on the right; labels are masked by length, never by comparing ids with the pad token."""
    return Collator.of(tokenizer)
