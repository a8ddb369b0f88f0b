"""Isaac: Qwen3's decoder with positions (t, h, w), fed with text and the vision tower's tokens.

    input_ids ──▶ embed_tokens ──┐
    pixel_values ─▶ vision_embedding ─▶ in place of the image tokens ──▶ Qwen3 layers ──▶ norm ──▶ lm_head

Written from the architecture's description; modules are named as in the released checkpoint, so its files load and
are saved as they are. Inputs are the usual tensors: batches, padding on either side, several images and generation
with a cache work as in any model of transformers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3RMSNorm
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from rankwise.models.depth.estimator import LoadsWithDepth
from rankwise.models.isaac.configuration import IsaacConfig
from rankwise.models.isaac.vision import VisionEmbedding


def position_ids(images: Tensor, grids: Tensor | None, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of a batch, and what to add to a token's plain position in cached generation.

    Args:
        images: (batch, length) bool, true at image tokens.
        grids: (images, 2) rows and columns of each image's tokens, in the order of the batch; None: no images.
        attended: (batch, length) bool, false at padding, which may be on either side.

    Returns:
        (3, batch, length) int64, 0 at padding; and (batch, 1) shifts, -(tokens − 1) for each image.

    Raises:
        ValueError: the grids do not fill the image tokens, or an image would run from one sequence into the next.
    """
    first, down, across = places(images, grids)
    steps = attended & (first | ~images)
    time = (steps.cumsum(-1) - 1).masked_fill(~attended, 0)
    positions = torch.stack([time, torch.where(images, down, time), torch.where(images, across, time)])
    shifts = steps.sum(-1, keepdim=True) - attended.sum(-1, keepdim=True)
    return positions, shifts


def places(images: Tensor, grids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of every image token whether it is its image's first, its row and its column; each (batch, length)."""
    grids = torch.zeros(0, 2, dtype=torch.long) if grids is None else grids
    grids = grids.to(images.device)
    lengths = grids.prod(-1)
    ends = lengths.cumsum(0)
    total = int(lengths.sum())
    found = images.nonzero()
    if len(found) != total:
        raise ValueError(f"{len(found)} image tokens in the text, but the images have {total}")
    if not torch.equal(found[ends - lengths, 0], found[ends - 1, 0]):
        raise ValueError("an image's tokens run from one sequence into the next: images and texts are out of order")
    inside = torch.arange(total, device=images.device) - (ends - lengths).repeat_interleave(lengths)
    columns = grids[:, 1].repeat_interleave(lengths)
    spread = torch.zeros(3, *images.shape, dtype=torch.long, device=images.device)
    spread[:, images] = torch.stack([(inside == 0).long(), inside // columns, inside % columns])
    return spread[0].bool(), spread[1], spread[2]


def plain_positions(attention_mask: Tensor | None, batch: int, length: int, past: int) -> Tensor:
    """(batch, length) positions of the last `length` tokens of sequences without images; padding is 0."""
    if attention_mask is None:
        return torch.arange(past, past + length).expand(batch, -1)
    positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
    return positions[:, -length:]


class Rotary(nn.Module):
    """Angles of the rotary embedding from (t, h, w).

    The half-frequencies θ^(−2k/d), k < d/2, are split 2:1:1 as contiguous blocks (64 into 32, 16, 16): the first,
    fastest block turns with t, the next with h, the last with w. Where the three are equal this is Qwen3's rotary,
    bit for bit. They are computed on each call and on the CPU, as Qwen3's are: a buffer that is not saved would
    stay uninitialised after loading on the meta device.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def frequencies(self) -> Tensor:
        """(head_dim / 2,) float32."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        return 1.0 / self.theta**exponents

    def axes(self) -> list[int]:
        """Which of t, h, w turns each half-frequency."""
        eighth = self.head_dim // 8
        return [0] * (2 * eighth) + [1] * eighth + [2] * eighth

    @torch.no_grad()
    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each (batch, length, head_dim), in the dtype and on the device of `like`."""
        turned = positions.to(like.device)[self.axes()].permute(1, 2, 0).float()
        angles = turned * self.frequencies().to(like.device)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def check_no_image(images: Tensor) -> None:
    if images.any():
        raise ValueError("an image after the first call of a cached sequence: pass the whole sequence without a cache")


class IsaacPreTrainedModel(PreTrainedModel):
    config_class = IsaacConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Qwen3DecoderLayer", "IsaacVisionEmbeddings", "IsaacVisionLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar = {"hidden_states": Qwen3DecoderLayer, "attentions": Qwen3Attention}


class IsaacModel(IsaacPreTrainedModel):
    """Decoder and vision tower without the output head."""

    def __init__(self, config: IsaacConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([Qwen3DecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        assert config.rope_parameters is not None
        self.rotary_emb = Rotary(config.head_dim, config.rope_parameters["rope_theta"])
        self.vision_embedding = VisionEmbedding(config)
        self.rope_deltas: Tensor | None = None
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """The image tokens' features.

        Args:
            pixel_values: (patches, channels · size²) of all images, one behind the other.
            image_grid_thw: (images, 3), 1 and the rows and columns of patches.

        Returns:
            pooler_output: per image (tokens, hidden), row-major. last_hidden_state: before the projector.
        """
        sizes = [(rows, columns) for _, rows, columns in image_grid_thw.tolist()]
        features, projected = self.vision_embedding(pixel_values, sizes)
        lengths = self.token_grids(image_grid_thw).prod(-1).tolist()
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=projected.split(lengths))

    def token_grids(self, image_grid_thw: Tensor) -> Tensor:
        """(images, 2) rows and columns of image tokens."""
        factor: int = self.config.vision_config.pixel_shuffle_scale_factor
        return image_grid_thw[:, 1:] // factor

    def image_places(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """(batch, length) bool: where image tokens stand; by their embedding where there are no ids."""
        token: int = self.config.image_token_id
        if input_ids is not None:
            return input_ids == token
        embedded: Tensor = self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
        return (inputs_embeds == embedded).all(-1)

    def positions(
        self, images: Tensor, image_grid_thw: Tensor | None, attention_mask: Tensor | None, past: int
    ) -> Tensor:
        """(3, batch, length) positions of the new tokens; a prompt's shifts are remembered for what follows it."""
        batch, length = images.shape
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            attention_mask = None
        if past == 0:
            attended = torch.ones_like(images) if attention_mask is None else attention_mask.bool()
            grids = None if image_grid_thw is None else self.token_grids(image_grid_thw)
            positions, self.rope_deltas = position_ids(images, grids, attended)
            return positions
        check_no_image(images)
        plain = plain_positions(attention_mask, batch, length, past).to(images.device)
        if self.rope_deltas is not None:
            beams = batch // self.rope_deltas.shape[0]
            plain = plain + self.rope_deltas.repeat_interleave(beams, dim=0).to(plain.device)
        return plain.expand(3, -1, -1)

    def insert_features(self, inputs_embeds: Tensor, images: Tensor, features: BaseModelOutputWithPooling) -> Tensor:
        """The embeddings with the images' features at the image tokens."""
        tokens = torch.cat(list(features.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
        if len(tokens) != int(images.sum()):
            raise ValueError(f"{int(images.sum())} image tokens in the text, but the images have {len(tokens)}")
        return inputs_embeds.masked_scatter(images[..., None].to(inputs_embeds.device), tokens)

    def check_length(self, tokens: int) -> None:
        if tokens > self.config.max_sequence_length:
            raise ValueError(f"{tokens} tokens: Isaac takes at most {self.config.max_sequence_length}")

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Last hidden states (batch, length, hidden) of a batch.

        position_ids may be (batch, length), as text has them, or (3, batch, length); None: from the image tokens and
        the attention mask. mm_encoder_outputs: features that `generate` has computed beforehand.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        self.check_length(past + inputs_embeds.shape[1])
        features = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, image_grid_thw, return_dict=True)
        if features is not None or position_ids is None:
            images = self.image_places(input_ids, inputs_embeds)
            if features is not None:
                inputs_embeds = self.insert_features(inputs_embeds, images, features)
            if position_ids is None:
                position_ids = self.positions(images, image_grid_thw, attention_mask, past)
        hidden = self.decode(
            inputs_embeds, attention_mask, position_ids, past_key_values, use_cache=use_cache, **kwargs
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values if use_cache else None)

    def decode(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """Through Qwen3's layers. Plain positions also tell the mask where packed texts begin, as in Qwen3."""
        if isinstance(attention_mask, dict):  # generate with a static cache has made it
            mask = attention_mask["full_attention"]
        else:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=positions if positions.dim() == 2 else None,
            )
        angles = self.rotary_emb(hidden, positions.expand(3, *positions.shape[-2:]))
        for layer in self.layers:
            hidden = layer(
                hidden, attention_mask=mask, position_embeddings=angles, past_key_values=past_key_values, **kwargs
            )
        normed: Tensor = self.norm(hidden)
        return normed


class IsaacForConditionalGeneration(LoadsWithDepth, IsaacPreTrainedModel, GenerationMixin):
    """Isaac with its output head. `towers` names the parts for rank plans: the longest prefix of a path wins."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    towers: ClassVar[dict[str, str]] = {
        "model.vision_embedding.0": "vision",
        "model.vision_embedding": "projector",
        "model": "language",
    }

    def __init__(self, config: IsaacConfig) -> None:
        super().__init__(config)
        self.model = IsaacModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See IsaacModel.get_image_features."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, length, vocabulary) and, with labels, the mean loss over labels other than −100.

        See IsaacModel.forward for the inputs.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """(3, batch, length) of the prompt; `generate` counts on from the last of each row and repeats them for
        beams."""
        plain: Tensor = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        ids, embeds = model_kwargs.get("input_ids", inputs_tensor), model_kwargs.get("inputs_embeds")
        given = ids.dim() == 2 and ids.shape[1] > 0
        images = self.model.image_places(ids if given else None, inputs_tensor if embeds is None else embeds)
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past == 0:
            grids, mask = model_kwargs.get("image_grid_thw"), model_kwargs.get("attention_mask")
            return self.model.positions(images, grids, mask, past)
        check_no_image(images[:, past:] if images.shape[1] == plain.shape[1] else images)
        return plain if self.model.rope_deltas is None else (plain + self.model.rope_deltas).expand(3, -1, -1)
