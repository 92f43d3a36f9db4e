"""Whether pictures show what a text says: CLIPScore, with a CLIP model that the user has.

References:
    CLIPScore: A Reference-free Evaluation Metric for Image Captioning, Hessel et al., 2021, arXiv 2104.08718
    Learning Transferable Visual Models From Natural Language Supervision, Radford et al., 2021, arXiv 2103.00020
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from antidiffusion.models.base import warn_of_cuts
from antidiffusion.pictures.tensors import check_pictures


class ClipScore:
    """Score pictures against texts.

    Arguments:
        model: Folder with transformers' CLIPModel and its tokenizer, safetensors only, or the hub id of one that is in
            the cache, such as "openai/clip-vit-large-patch14". Nothing is downloaded.
        device: Where the weights go.

    Raises:
        ValueError: If there is no such model on this machine.
    """

    def __init__(self, model: str, device: str | torch.device = "cpu") -> None:
        from transformers import CLIPModel, CLIPTokenizer

        try:
            self._model = CLIPModel.from_pretrained(model, local_files_only=True, use_safetensors=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(model, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"expected a CLIPModel in safetensors on this machine, got {model!r}: {reason}; hf download {model}"
            ) from error
        self._model.eval().requires_grad_(False).to(device)
        self._tokenizer.model_max_length = self._model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, x: Tensor, texts: Sequence[str]) -> Tensor:
        """Return 100 max(cos, 0), cos the similarity in [-1, 1] of a picture's embedding and its text's.

        That is the scale of torchmetrics. Hessel et al. write 2.5 max(cos, 0), which is this divided by 40, and put "A
        photo depicts" before each text; here the texts stay as they are. Text beyond the window is cut with a warning.

        Arguments:
            x: Pictures `(B, 3, H, W)` float in [0, 1]; see `prepare`.
            texts: B texts.

        Returns:
            `(B,)` float32 in [0, 100].

        Raises:
            ValueError: If these are no pictures in [0, 1], or there is another number of texts.
        """
        check_pictures(x)
        if isinstance(texts, str) or len(texts) != len(x):
            got = "a string" if isinstance(texts, str) else len(texts)
            raise ValueError(
                f"expected a list of {len(x)} texts, one for each picture, got {got}; repeat a common text"
            )
        warn_of_cuts(texts, self._tokenizer)
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self._model.device)
        output = self._model(**tokens, pixel_values=self._prepared(x))
        cosine = F.cosine_similarity(output.image_embeds.float(), output.text_embeds.float())
        return 100 * cosine.clamp(min=0)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Return what the model's vision tower says of pictures `(B, 3, H, W)` in [0, 1], `(B, d)` float32."""
        check_pictures(x)
        return self._model.vision_model(pixel_values=self._prepared(x)).pooler_output.float().cpu()

    def _prepared(self, x: Tensor) -> Tensor:
        return prepare(x.to(self._model.device), self._model.config.vision_config.image_size)


def prepare(x: Tensor, size: int) -> Tensor:
    """Bring pictures to CLIP's input: shorter side scaled to `size`, bicubic, centre square, CLIP's mean and deviation.

    transformers' image processor does the same with Pillow, which rounds to 8 bits after each direction. Here
    nothing is rounded: values differ by about one level of 255, by more where Pillow clips overshoot in between.

    Arguments:
        x: Pictures `(B, 3, H, W)` float in [0, 1].
        size: Side of the model's input in pixels.

    Returns:
        `(B, 3, size, size)` float32.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    height, width = x.shape[-2:]
    shorter = min(height, width)
    sides = (size * height // shorter, size * width // shorter)
    x = F.interpolate(x.float(), sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
    x = x[..., top : top + size, left : left + size]
    mean, std = (x.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (x - mean) / std
