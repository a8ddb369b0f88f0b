"""Few bits as a GGUF has them: what is rounded, along which axis, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import experts
import pytest
import torch
from exported_experts import SQUARE
from test_parity_experts import side
from torch import Tensor, nn

from rankwise.device.parity.known_good import in_q8_0, q8_0, rounding
from rankwise.files.gguf import GGUFFile
from rankwise.models.sites import router_paths


@pytest.mark.parametrize("family", [SQUARE["gpt_oss"], SQUARE["llama4_text"], "mixtral"])
def test_experts_and_routers_are_those_of_the_file(family: str, mixtures: Path) -> None:
    """Against the converter's own Q8_0: blocks along the inputs, also where experts are stored (in, out)."""
    file = GGUFFile(mixtures / family / "export" / "model-q8_0.gguf")
    model = side(mixtures / family / "model")[0].model
    layer = f"model.layers.{experts.LAYERS - 1}"
    owner = next(path for path, module in model.named_modules() if path.startswith(layer) and path.endswith("experts"))
    router = next(one for name, one in model.named_parameters() if name.startswith(layer) and name in routers(model))
    with in_q8_0(model):
        down = model.get_parameter(f"{owner}.down_proj").detach().clone()
        kept = router.detach().clone()
        biases = [one.detach().clone() for name, one in model.named_parameters() if name.endswith("proj_bias")]
    down = down.mT if family in SQUARE.values() else down
    for expert, matrix in enumerate(down):
        assert torch.equal(matrix, file.part("blk.1.ffn_down_exps.weight", expert))
    assert torch.equal(kept, file.tensor("blk.1.ffn_gate_inp.weight")) and not torch.equal(kept, q8_0(kept))
    after = [one for name, one in model.named_parameters() if name.endswith("proj_bias")]
    assert all(map(torch.equal, biases, after))


def routers(model: nn.Module) -> set[str]:
    paths = router_paths(model)
    return {name for name, one in model.named_parameters() if name.rpartition(".")[0] in paths and one.dim() == 2}


@pytest.mark.parametrize("family", experts.FAMILIES)
def test_inputs_of_experts_are_rounded_and_those_of_routers_are_not(family: str) -> None:
    """Whatever is rounded here becomes zero: so experts are given zeros, and routers go on choosing."""
    model = experts.built(family, inner=32)
    paths = router_paths(model)
    seen: dict[str, Tensor] = {}
    holders = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in ("experts", "input_linear")]
    tops = [path for path in paths if hasattr(model.get_submodule(path), "weight")]
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _, given, __, path=path: seen.update({path: given[0]}))
        for path in (*holders, *tops)
    ]
    with torch.no_grad(), rounding(model, lambda values: values, torch.zeros_like):
        model(torch.arange(3, 15)[None])
    for hook in hooks:
        hook.remove()
    assert holders and tops
    assert not any(bool(seen[path].any()) for path in holders)
    assert all(bool(seen[path].any()) for path in tops)
