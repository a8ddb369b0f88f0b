"""What `rankwise extract` writes: factors, and what is carried whole; compared with the tuned model before it is there.

published(folder, adapter, both, plan, fidelity).require()
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.files.adapter import LoraAdapter, LoraPair, write_adapter
from rankwise.files.checkpoint import open_checkpoint, resolve
from rankwise.models.adapters import publish
from rankwise.models.sites import tower_of, tower_prefixes
from rankwise.models.vocabulary import Whole, whole_modules
from rankwise.nets.both import Both, Makers, with_tied
from rankwise.nets.pair import folder_of
from rankwise.ship.merging.beside import tokenizer_files
from rankwise.ship.merging.promised import Proof, prove
from rankwise.stages.fidelity import Fidelity
from rankwise.stages.left_out import RESIZED, LeftOut


def carried_whole(both: Both, rest: Sequence[LeftOut], pairs: Mapping[str, LoraPair]) -> Whole:
    """The embeddings, heads, norms and biases that training changed."""
    return whole_modules(both.model, [row.name for row in rest], list(pairs))


def tensors_of(whole: Whole, both: Both) -> dict[str, Tensor]:
    """The tuned model's tensors by PEFT's names for them: a bias lies in the layer that an adapted one holds."""
    names = {name: name for name in whole.names(both.model)}
    names |= {name: name.removesuffix("bias") + "base_layer.bias" for name in whole.biases}
    return {key: both.tuned[name]() for name, key in names.items()}


def as_settings(whole: Whole) -> dict[str, Any]:
    return {"modules_to_save": list(whole.modules) or None, "bias": "lora_only" if whole.biases else "none"}


def published(
    folder: Path, adapter: LoraAdapter, both: Both | None, plan: RankPlan, fidelity: Fidelity
) -> Proof | None:
    """Write the adapter, whole or not at all: loaded by PEFT, it must give the logits that `fidelity` says it has.

    VerificationError where it does not. None: not compared, for want of a base with a config.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as temporary:
        written = write_adapter(temporary, adapter)
        proof = None
        if both:
            towers = tower_prefixes(both.model)
            names = [*adapter.pairs, *fidelity.whole]
            sees = any(tower_of(name, towers) in ("vision", "projector") for name in names)
            proof = prove(both, written, expected_weights(both, adapter.pairs, plan, fidelity), sees)
            proof.require()
        publish(written, folder)
    return proof


def expected_weights(both: Both, pairs: Mapping[str, LoraPair], plan: RankPlan, fidelity: Fidelity) -> Makers:
    """The tuned model's weights; of sites base + B·A, of what is left out the base's."""
    names = [f"{row.site.path}.weight" for row in plan.sites] + [row.name for row in fidelity.left_out]
    made = with_tied(both.model, {name: both.base[name] for name in names if name in both.base})
    sites = {f"{row.site.path}.weight": row.site for row in plan.sites if row.site.path in pairs}
    made |= {name: partial(with_pair, both.base[name], pairs[site.path], site) for name, site in sites.items()}
    return both.tuned | made


def with_pair(base: Callable[[], Tensor], pair: LoraPair, site: Site) -> Tensor:
    product = pair.factors().product()
    return base().float() + (product.T if site.transposed else product)


def tokenizer_of(tuned: str | None, rest: Sequence[LeftOut], fidelity: Fidelity, folder: Path) -> dict[str, Path]:
    """The tuned model's tokenizer, copied where the adapter carries embeddings of another size than the base's."""
    resized = [row.name for row in rest if row.why == RESIZED and row.name in fidelity.whole]
    files = tokenizer_files(folder_of(open_checkpoint(resolve(tuned)))) if tuned and resized else []
    return {file.name: Path(shutil.copyfile(file, folder / file.name)) for file in files}
