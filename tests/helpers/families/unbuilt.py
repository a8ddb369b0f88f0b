"""Image-text families of transformers that have no tiny model here, and why: the table calls them untested."""

from __future__ import annotations

REASONS = {
    "needs timm for its vision tower": ("fast_vlm", "gemma3n", "perception_lm"),
    "encoder and decoder: no conversation is continued": (
        "florence2",
        "pix2struct",
        "pp_formulanet",
        "t5gemma2",
        "udop",
        "vision-encoder-decoder",
    ),
    "its processor takes no chat template": (
        "blip",
        "blip-2",
        "fuyu",
        "git",
        "idefics",
        "instructblip",
        "instructblipvideo",
    ),
    "images are tokens of a codebook": ("chameleon", "emu3"),
    "made for something else than talk about pictures": ("diffusion_gemma", "evolla", "pi0", "shieldgemma2"),
    "its processor needs audio": ("nemotron_h_omni",),
    "a part of a model that also hears or speaks": ("cosmos3_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
}
NOT_YET = "no tiny model has been made of it"
UNBUILT = {name: reason for reason, names in REASONS.items() for name in names}

# Exact within a limit that the product keeps by refusing what is beyond it: such a family trains with a warning.
LIMITED = {
    "paligemma": "rows of one prompt and one answer with images (--prompt raw), others are refused; exact there",
    "mllama": "rows of one batch must have equally many images, others are refused; a batch size of 1 is exact",
}

# Built and not exact, in words; without a line here the table quotes what differs.
REFUSED = {
    "hunyuan_vl": "its processor takes an image token only between its tokens of begin and end",
    "got_ocr2": "its processor takes no conversation with images: its own chat call raises an error",
}
