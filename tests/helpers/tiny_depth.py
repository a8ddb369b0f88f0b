"""Tiny Depth Anything estimators, and the original's own file layout written out independently of the converter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config


def tiny_depth_config(layers: int = 4) -> DepthAnythingConfig:
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    return DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )


def tiny_depth_model(seed: int = 0) -> DepthAnythingForDepthEstimation:
    """Random, with a head that answers above 0 everywhere and differently from place to place."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DepthAnythingForDepthEstimation(tiny_depth_config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.15)
            model.head.conv3.bias.fill_(5.0)
    return model


def tiny_estimator(folder: Path, seed: int = 0) -> Path:
    """Saved as a Hugging Face folder."""
    tiny_depth_model(seed).save_pretrained(folder)
    return folder


def original_layout(layers: int, width: int, neck: tuple[int, ...], fusion: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a `.pth` as Depth Anything V2's own code saves it (ViT of DINOv2, DPT head)."""
    shapes: dict[str, tuple[int, ...]] = {
        "pretrained.cls_token": (1, 1, width),
        "pretrained.pos_embed": (1, 37 * 37 + 1, width),
        "pretrained.mask_token": (1, width),
        "pretrained.patch_embed.proj.weight": (width, 3, 14, 14),
        "pretrained.patch_embed.proj.bias": (width,),
        "pretrained.norm.weight": (width,),
        "pretrained.norm.bias": (width,),
    }
    for block in range(layers):
        at = f"pretrained.blocks.{block}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{at}.{norm}.weight": (width,), f"{at}.{norm}.bias": (width,)}
        shapes |= {f"{at}.attn.qkv.weight": (3 * width, width), f"{at}.attn.qkv.bias": (3 * width,)}
        shapes |= {f"{at}.attn.proj.weight": (width, width), f"{at}.attn.proj.bias": (width,)}
        shapes |= {f"{at}.ls1.gamma": (width,), f"{at}.ls2.gamma": (width,)}
        shapes |= {f"{at}.mlp.fc1.weight": (4 * width, width), f"{at}.mlp.fc1.bias": (4 * width,)}
        shapes |= {f"{at}.mlp.fc2.weight": (width, 4 * width), f"{at}.mlp.fc2.bias": (width,)}
    for level, channels in enumerate(neck):
        shapes |= {f"depth_head.projects.{level}.weight": (channels, width, 1, 1)}
        shapes |= {f"depth_head.projects.{level}.bias": (channels,)}
        shapes |= {f"depth_head.scratch.layer{level + 1}_rn.weight": (fusion, channels, 3, 3)}
    for level, kernel in ((0, 4), (1, 2), (3, 3)):
        channels = neck[level]
        shapes |= {f"depth_head.resize_layers.{level}.weight": (channels, channels, kernel, kernel)}
        shapes |= {f"depth_head.resize_layers.{level}.bias": (channels,)}
    for level in (1, 2, 3, 4):
        at = f"depth_head.scratch.refinenet{level}"
        shapes |= {f"{at}.out_conv.weight": (fusion, fusion, 1, 1), f"{at}.out_conv.bias": (fusion,)}
        for unit in (1, 2):
            for conv in (1, 2):
                name = f"{at}.resConfUnit{unit}.conv{conv}"
                shapes |= {f"{name}.weight": (fusion, fusion, 3, 3), f"{name}.bias": (fusion,)}
    head = "depth_head.scratch"
    shapes |= {f"{head}.output_conv1.weight": (fusion // 2, fusion, 3, 3), f"{head}.output_conv1.bias": (fusion // 2,)}
    shapes |= {f"{head}.output_conv2.0.weight": (32, fusion // 2, 3, 3), f"{head}.output_conv2.0.bias": (32,)}
    shapes |= {f"{head}.output_conv2.2.weight": (1, 32, 1, 1), f"{head}.output_conv2.2.bias": (1,)}
    return shapes


def as_original(model: DepthAnythingForDepthEstimation) -> dict[str, Tensor]:
    """The model's tensors under the original's names: transformers → original, block by block and level by level."""
    state = model.state_dict()
    embeddings = "backbone.embeddings."
    found = {
        "pretrained.cls_token": state[f"{embeddings}cls_token"],
        "pretrained.mask_token": state[f"{embeddings}mask_token"],
        "pretrained.pos_embed": state[f"{embeddings}position_embeddings"],
    }
    for kind in ("weight", "bias"):
        found[f"pretrained.patch_embed.proj.{kind}"] = state[f"{embeddings}patch_embeddings.projection.{kind}"]
        found[f"pretrained.norm.{kind}"] = state[f"backbone.layernorm.{kind}"]
        for block in range(model.config.backbone_config.num_hidden_layers):
            ours, theirs = f"backbone.encoder.layer.{block}", f"pretrained.blocks.{block}"
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{theirs}.{name}.{kind}"] = state[f"{ours}.{name}.{kind}"]
            joined = [state[f"{ours}.attention.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{theirs}.attn.qkv.{kind}"] = torch.cat(joined)
            found[f"{theirs}.attn.proj.{kind}"] = state[f"{ours}.attention.o_proj.{kind}"]
            for index in (1, 2):
                found[f"{theirs}.ls{index}.gamma"] = state[f"{ours}.layer_scale{index}.lambda1"]
        for level in range(4):
            reassemble = f"neck.reassemble_stage.layers.{level}"
            found[f"depth_head.projects.{level}.{kind}"] = state[f"{reassemble}.projection.{kind}"]
            if level != 2:
                found[f"depth_head.resize_layers.{level}.{kind}"] = state[f"{reassemble}.resize.{kind}"]
            fusion, theirs = f"neck.fusion_stage.layers.{level}", f"depth_head.scratch.refinenet{4 - level}"
            found[f"{theirs}.out_conv.{kind}"] = state[f"{fusion}.projection.{kind}"]
            for unit in (1, 2):
                for conv in (1, 2):
                    inner = f"residual_layer{unit}.convolution{conv}"
                    found[f"{theirs}.resConfUnit{unit}.conv{conv}.{kind}"] = state[f"{fusion}.{inner}.{kind}"]
        found[f"depth_head.scratch.output_conv1.{kind}"] = state[f"head.conv1.{kind}"]
        found[f"depth_head.scratch.output_conv2.0.{kind}"] = state[f"head.conv2.{kind}"]
        found[f"depth_head.scratch.output_conv2.2.{kind}"] = state[f"head.conv3.{kind}"]
    for level in range(4):
        found[f"depth_head.scratch.layer{level + 1}_rn.weight"] = state[f"neck.convs.{level}.weight"]
    return {name: value.clone() for name, value in found.items()}
