"""Text and images together: a prompt with one `<|image_pad|>` per image becomes ids with one per image token.

    processor(text=["<|im_start|>user\\n<|image_pad|>What is this?<|im_end|>\\n"], images=[image])

`<image>`, which people and data sets write, is never tokenised: the data layer cuts it out, and the chat template
turns an image part into the placeholder.
"""

from __future__ import annotations

from typing import Any

from transformers.processing_utils import ProcessorMixin

from rankwise.models.isaac.image_processing import IsaacImageProcessor

IMAGE_TOKEN = "<|image_pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class IsaacProcessor(ProcessorMixin):
    """Tokenizer and image processor.

    Chat template: plain ChatML, ours unless one is given. The released folder's own drops the parts of a message
    that has images and writes a think block into the last answer, so it is not read from there.
    """

    def __init__(
        self,
        image_processor: IsaacImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    @classmethod
    def get_processor_dict(cls, name: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Saved settings; of a folder that no processor was saved in, none, so not its chat template either."""
        settings, kwargs = super().get_processor_dict(name, **kwargs)
        return (settings if "processor_class" in settings else {}), kwargs

    @classmethod
    def _get_arguments_from_pretrained(cls, name: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        subfolder = kwargs.pop("subfolder", "")
        images = IsaacImageProcessor.from_pretrained(name, subfolder=subfolder, **kwargs)
        return [images, cls._load_tokenizer_from_pretrained("tokenizer", name, subfolder=subfolder, **kwargs)]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholder once for each token of an image."""
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        scale = int(self.image_processor.pixel_shuffle_scale)
        return self.image_token * (patches // scale**2)
