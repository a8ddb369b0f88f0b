"""What an adapter can carry besides factors: modules as a whole (PEFT's modules_to_save), and biases of adapted layers.

whole = whole_modules(model, changed_names, adapted_paths)
whole.modules, whole.biases          # ("model.norm", "lm_head"), ("model.layers.0.self_attn.q_proj.bias",)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from rankwise.nets.sites import model_sites
from rankwise.nets.vocabulary import embedding_paths


@dataclass(frozen=True)
class Whole:
    """`modules`: paths of modules to save; `biases`: names of the adapted layers' biases (all of them, or none)."""

    modules: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()

    def names(self, model: nn.Module) -> list[str]:
        """Names of the tensors."""
        inside = [f"{path}.{name}" for path in self.modules for name in model.get_submodule(path).state_dict()]
        return inside + list(self.biases)


def whole_modules(model: PreTrainedModel, changed: Collection[str], adapted: Collection[str]) -> Whole:
    """The modules that hold changed tensors and nothing else: embeddings, heads, norms, convolutions; no matrix that is
    a site, because leaving that out was a choice. Of a tied pair of embeddings and head both or none."""
    sites, paths = model_sites(model), dict(model.named_modules())
    holders = dict.fromkeys(name.rpartition(".")[0] for name in changed)
    modules = [path for path in holders if path in paths and path not in sites and not any(paths[path].children())]
    ends = embedding_paths(model)
    if model.all_tied_weights_keys and ends[0] in modules:
        modules += [path for path in ends if path not in modules]
    biased = any(name == f"{path}.bias" for path in adapted for name in changed)
    biases = [f"{path}.bias" for path in adapted if getattr(paths[path], "bias", None) is not None] if biased else []
    return Whole(tuple(path for path in paths if path in modules), tuple(biases))
