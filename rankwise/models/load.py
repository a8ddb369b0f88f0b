"""From a name to a model, a tokenizer, or a model's structure without its weights. The only place that does this."""

from __future__ import annotations

import importlib
import inspect
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from rankwise.errors import DataError, UsageError, need
from rankwise.files.atomic import about_to_write, read_object
from rankwise.files.checkpoint import HUB_ID, INDEX, NAMES, model_fingerprint, resolve
from rankwise.files.processes import announce
from rankwise.models.sites import outside_language, tower_prefixes
from rankwise.options.sections import ModelSection

COMMIT_LENGTH, PIXELS = 40, "pixel_values"
ROWS, INNER, OUTER = 64, 576, 1536  # a product of the size that small models' are; 6 ms where it is emulated
RUNS = 4
SLOW = 2.0  # times as slow; below that, the measurement may be what differs
UNFIT = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, StrictDataclassError)
# Architectures that transformers lacks: model_type → the module whose import makes their classes known to it.
OURS = {"isaac": "rankwise.models.isaac"}


def check_remote_code(name: str, trust_remote_code: bool, revision: str | None) -> None:
    """Remote code runs only when asked for, and from the hub only at a pinned commit."""
    if trust_remote_code and not Path(name).exists() and len(revision or "") != COMMIT_LENGTH:
        raise UsageError(
            f"{name}: --trust_remote_code runs the repository's own code; pin it with --revision and the full "
            f"{COMMIT_LENGTH}-character commit hash that you have read"
        )


def register_ours(folder: Path) -> None:
    """Register our model classes for a folder that holds one; OSError for a config that is no JSON."""
    if (folder / "config.json").is_file():
        content, _ = PreTrainedConfig.get_config_dict(folder)
        if home := OURS.get(str(content.get("model_type"))):
            importlib.import_module(home)


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's config. Never prompts: a repository that needs its own code is an error that says so."""
    check_remote_code(name, trust_remote_code, revision)
    folder = resolve(name, revision, code=trust_remote_code)
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no config.json, so this is not a Hugging Face model folder")
    try:
        register_ours(folder)
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except UNFIT as error:
        if "trust_remote_code" in str(error):
            raise DataError(
                f"{name}: this model needs code from its repository; read that code, then pass "
                "--trust_remote_code --revision COMMIT to `finetune` or `train` (`ranks --deltas` needs no model)"
            ) from error
        raise DataError(f"{folder}/config.json: {error}") from error


def described_folder(name: str | None) -> Path | None:
    """The folder with the config.json of a model that is on this machine, a hub id's in its cache; else None."""
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(name):
        cached = try_to_load_from_cache(name, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder if (folder / "config.json").is_file() else None


def another_base(what: str, recorded: str | None, base: str | None) -> list[str]:
    """The note that an adapter, plan or run (`what`) records another base than the one it is used with; none where it
    records none, or where both are here and have the same configuration and weights."""
    if not recorded or not base or recorded == base:
        return []
    here = [folder for name in (recorded, base) if (folder := described_folder(name))]
    if len(here) == 2 and len({model_fingerprint(folder) for folder in here}) == 1:
        return []
    return [f"{what} records the base {recorded}; used with {base}, whose names and shapes fit"]


def model_class(config: Any) -> Any:
    """The class that the config names, else the task's auto class."""
    home = importlib.import_module(OURS[config.model_type]) if config.model_type in OURS else transformers
    for name in config.architectures or ():
        found = getattr(home, name, None)
        if found is not None:
            return found
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def new_model(config: Any, **options: Any) -> PreTrainedModel:
    """A model with random weights. options: of an auto class's `from_config`."""
    found = model_class(config)
    model = found.from_config(config, **options) if hasattr(found, "from_config") else found(config)
    assert isinstance(model, PreTrainedModel)
    return model


def forward_inputs(config: Any) -> frozenset[str] | None:
    """Input names of a vision-language model's forward; None if the class is unknown before loading."""
    found = model_class(config)
    if not issubclass(found, nn.Module):
        found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return found and frozenset(inspect.signature(found.forward).parameters)


def main_input(config: Any) -> str:
    """The main input of the bare model: input_ids, pixel_values, input_features …"""
    if type(config) not in MODEL_MAPPING:
        return "input_ids"
    found = MODEL_MAPPING[type(config)]
    return str((found[0] if isinstance(found, list | tuple) else found).main_input_name)


def meta_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules without weights: its site names, for a few kilobytes."""
    config = load_config(name, revision, trust_remote_code)
    try:
        with torch.device("meta"):
            return new_model(config, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise UsageError(f"{name}: the model needs a package: {error}") from error
    except UNFIT as error:
        raise DataError(f"{name}/config.json: cannot build a model from it: {error}") from error


def embedding_paths(model: PreTrainedModel) -> list[str]:
    """Paths of the modules with a row per token: the input embeddings, and the output head where there is one."""
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    return [path for path, module in model.named_modules() if any(module is end for end in ends)]


def weightless_model(name: str) -> PreTrainedModel:
    """`meta_model` whose buffers are real: what a forward pass needs beside weights that come and go."""
    config = load_config(name)
    with init_empty_weights(include_buffers=False):
        return new_model(config)


def unquantized_modules(model: PreTrainedModel) -> list[str] | None:
    """Modules that a quantized base keeps as they are; None: transformers' own choice, which a list would replace."""
    towers = outside_language(model)
    return ["lm_head", *towers] if towers else None


def quantized_linears(model: PreTrainedModel) -> frozenset[str]:
    """Paths of the linear layers that bitsandbytes quantizes: all but those, and nothing else (no fused experts)."""
    skip = unquantized_modules(model) or get_keys_to_not_convert(model)
    linear = (path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    return frozenset(path for path in linear if should_convert_module(path, skip))


def quantization_config(kind: str, model: PreTrainedModel) -> Any:
    """bitsandbytes settings: NF4 with double quantization, or int8. Head, vision tower and projector stay as they are:
    they hold few of the weights, and may train in full. `model` may be on the meta device."""
    need("bitsandbytes", extra="quant")
    modules = unquantized_modules(model)
    if kind == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=modules)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        llm_int8_skip_modules=modules,
    )


def check_quantizer(config: Any) -> None:
    """UsageError where the weights are stored quantized, and the package that reads them is missing."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    try:
        AutoHfQuantizer.from_config(given, pre_quantized=True).validate_environment(device_map=None)
    except ImportError as error:
        raise UsageError(f"the base is stored quantized: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError):
        return  # this machine lacks the device, say: loading tells


def is_mxfp4(quantization: Any) -> bool:
    """Whether a config's `quantization_config` is of a model with experts in MXFP4 (gpt-oss)."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return getattr(quantization, "quant_method", method) == "mxfp4"


def load_model(
    name: str,
    dtype: torch.dtype,
    *,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> PreTrainedModel:
    """The model with its weights, on the CPU (quantized ones where bitsandbytes puts them).

    dtype is explicit: transformers 5 would load a bf16 file as bf16 even on a CPU. Raises DataError where the
    files lack weights that the model has.
    """
    config = load_config(name, revision, trust_remote_code)
    extra: dict[str, Any] = {}
    if attn_implementation:
        extra["attn_implementation"] = attn_implementation
    if quantization:
        skeleton = meta_model(name, revision, trust_remote_code)
        extra["quantization_config"] = quantization_config(quantization, skeleton)
    elif is_mxfp4(getattr(config, "quantization_config", None)):
        extra["quantization_config"] = transformers.Mxfp4Config(dequantize=True)  # whatever this machine has
        announce(f"note: {name} stores its experts in MXFP4; they are used dequantized, as {dtype}")
    folder = resolve(name, revision, code=trust_remote_code)
    check_index(folder)
    about_to_write()
    try:
        model, info = model_class(config).from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code, **extra
        )
    except ImportError as error:
        raise UsageError(f"{folder}: the model needs a package: {error}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder}: cannot load the model: {error}") from error
    if info["missing_keys"]:
        shown = ", ".join(sorted(info["missing_keys"])[:5])
        raise DataError(f"{folder}: the files lack {len(info['missing_keys'])} weights of the model: {shown} …")
    return take_any_pixels(model)


def take_any_pixels(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with vision towers that take pixels in any precision: most families cast them, Llama 4 does not."""
    for path, tower in tower_prefixes(model).items():
        if tower == "vision":
            model.get_submodule(path).register_forward_pre_hook(_in_own_precision, with_kwargs=True)
    return model


def _in_own_precision(tower: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a tower is called with, its floats in its own precision. Pixels come first, or by name."""
    dtype = next(tower.parameters()).dtype
    if not dtype.is_floating_point:
        return None

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(cast(value) for value in given), {name: cast(value) for name, value in named.items()}


def check_index(folder: Path) -> None:
    """DataError for an index of shards that transformers does not take, before it loads anything."""
    used = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    if used is not None and used.name.endswith(INDEX) and not isinstance(read_object(used).get("metadata"), dict):
        raise DataError(f'{used}: has no "metadata", without which transformers loads no shards; add "metadata": {{}}')


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer, with a pad token."""
    folder = resolve(name, revision, code=trust_remote_code)
    try:
        register_ours(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if main_input(load_config(name, revision, trust_remote_code)) == PIXELS:
            raise UsageError(
                f"{name} is a vision encoder, which takes no text; use it with `rankwise features capture`"
            ) from error
        raise DataError(f"{folder}: cannot load a tokenizer: {error}") from error
    return ensure_pad_token(tokenizer)


def load_processor(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The processor of a vision-language model: images and text. Its chat template is its tokenizer's too.

    DataError where the files make none; UsageError where torchvision, which processors need, is missing or broken.
    """
    check_torchvision()
    folder = resolve(name, revision, code=trust_remote_code)
    try:
        register_ours(folder)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot load a processor: {error}") from error
    if not hasattr(processor, "image_processor"):
        raise DataError(f"{folder}: no image processor there (preprocessor_config.json or processor_config.json)")
    if getattr(processor, "chat_template", None):
        processor.tokenizer.chat_template = processor.chat_template
    return ensure_pad_token(processor)


def check_torchvision() -> None:
    """UsageError where torchvision cannot be imported: a build that does not fit torch fails with a RuntimeError."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"torchvision cannot be used ({error}), and vision-language models need it; install torch and torchvision "
            "together, from one source: pip install --force-reinstall torch torchvision"
        ) from error


def ensure_pad_token(holder: Any) -> Any:
    """A pad token for a tokenizer, or for a processor's: its eos where it has none (padding is masked, never by id)."""
    tokenizer = getattr(holder, "tokenizer", holder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return holder


def load_structure(model: ModelSection, name: str) -> PreTrainedModel:
    """The model without weights: names and sizes, checked before anything large is read."""
    return meta_model(name, model.revision, model.trust_remote_code)


def load_readable_structure(model: ModelSection, name: str) -> PreTrainedModel:
    """The same of a model whose weights will be read: UsageError where a package for them is missing."""
    skeleton = load_structure(model, name)
    check_quantizer(skeleton.config)
    return skeleton


def load_weights(
    model: ModelSection, name: str, dtype: torch.dtype, quantization: str | None = None
) -> PreTrainedModel:
    return load_model(
        name,
        dtype,
        attn_implementation=model.attn_implementation,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        quantization=quantization,
    )


def torch_dtype(name: str, trained: bool, device: torch.device) -> torch.dtype:
    """`auto`: float32 for trained weights; frozen ones bf16 on a GPU and float32 on a CPU. A type that is slow on a CPU
    is warned about."""
    if name == "auto":
        return torch.float32 if trained or device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    if device.type == "cpu":
        warn_if_slow(dtype, "--dtype float32")
    return dtype


@cache
def warn_if_slow(dtype: torch.dtype, instead: str) -> None:
    """Say once that this type is slow on this CPU. instead: the option that gives float32."""
    if dtype != torch.float32 and slowdown(dtype) > SLOW:
        name = str(dtype).removeprefix("torch.")
        announce(
            f"warning: this CPU has no {name} units: a matrix product takes {slowdown(dtype):.0f} times as long as in "
            f"float32 (measured; a training step up to 35 times). {instead} computes in float32"
        )


@cache
def slowdown(dtype: torch.dtype) -> float:
    """Time of a matrix product in this type ÷ in float32, on this CPU; measured once, in hundredths of a second."""
    return seconds_of(dtype) / seconds_of(torch.float32)


def seconds_of(dtype: torch.dtype) -> float:
    """CPU time of the fastest of a few matrix products."""
    generator, times = torch.Generator().manual_seed(0), []
    rows, weight = (torch.randn(count, INNER, generator=generator).to(dtype) for count in (ROWS, OUTER))
    for _ in range(RUNS):
        started = time.process_time()
        linear(rows, weight)
        times.append(time.process_time() - started)
    return min(times)
