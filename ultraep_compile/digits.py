"""scikit-learn's handwritten digits for a vision-language model: rows of images, each followed by the question what it shows.

    [image] [image] .. [READ] [7]   [image] [image] .. [READ] [3]   [PAD] ..

A sample has one to three images, so microbatches are ragged as real data is. Only the answers count in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ultraep_compile.errors import OptionError

SIDE, PATCH = 8, 2  # pixels of an image, of a patch
PATCHES = (SIDE // PATCH) ** 2
IMAGE, READ, PAD = 10, 11, 12  # token ids after the ten digits
HELD_OUT = 360
MOST = 3  # images in a sample
LAYERS = 4  # of the language model
Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Digits:
    """pixels [n, 3, 8, 8] in -1..1, digits [n]; in an order that mixes writers and digits, the same everywhere."""

    pixels: Tensor
    digits: Tensor


def load() -> tuple[Digits, Digits]:
    """(to learn from, held out)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise OptionError(
            "demo --multimodal reads scikit-learn's digit images. Run: pip install 'ultraep-compile[demo]'"
        ) from missing
    data: Any = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    grey = torch.as_tensor(data.images, dtype=torch.float32)[order] / 8 - 1
    pixels, digits = grey[:, None].expand(-1, 3, -1, -1), torch.as_tensor(data.target, dtype=torch.long)[order]
    return Digits(pixels[HELD_OUT:], digits[HELD_OUT:]), Digits(pixels[:HELD_OUT], digits[:HELD_OUT])


def make_batch(data: Digits, chosen: Tensor, counts: Sequence[int]) -> Batch:
    """One sample for each of `counts`, with so many of the `chosen` images.

    >>> data = Digits(torch.zeros(4, 3, 8, 8), torch.tensor([7, 3, 5, 0]))
    >>> batch = make_batch(data, torch.tensor([2, 0, 1]), [1, 2])
    >>> batch["input_ids"].shape, batch["labels"][batch["labels"] >= 0].tolist()
    (torch.Size([2, 36]), [5, 7, 3])
    """
    length = max(counts) * (PATCHES + 2)
    ids = torch.full((len(counts), length), PAD)
    labels = torch.full_like(ids, -100)
    answers = iter(data.digits[chosen])
    for row, count in enumerate(counts):
        for at in range(0, count * (PATCHES + 2), PATCHES + 2):
            ids[row, at : at + PATCHES] = IMAGE
            ids[row, at + PATCHES] = READ
            ids[row, at + PATCHES + 1] = labels[row, at + PATCHES + 1] = next(answers)
    mask = (ids != PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": data.pixels[chosen]}


def batches(data: Digits, samples: int, steps: int) -> Iterator[Batch]:
    """`steps` batches, the same in every process. Samples have 1, 2, 3, 1, 2 .. images."""
    generator = torch.Generator().manual_seed(1)
    counts = [1 + n % MOST for n in range(samples)]
    for _ in range(steps):
        yield make_batch(data, torch.randint(len(data.digits), (sum(counts),), generator=generator), counts)


def find_transformers() -> Any:
    """The package."""
    try:
        import transformers
    except ImportError as missing:
        raise OptionError("the demo needs transformers. Run: pip install 'ultraep-compile[demo]'") from missing
    return transformers


def build_model() -> nn.Module:
    """A LLaVA of CPU size (CLIP, projector, Llama) with random weights, exactly as transformers makes it."""
    transformers = find_transformers()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**size, num_hidden_layers=2, image_size=SIDE, patch_size=PATCH),
            text_config=transformers.LlamaConfig(
                **size, vocab_size=PAD + 1, num_hidden_layers=LAYERS, num_key_value_heads=4, max_position_embeddings=64
            ),
            image_token_index=IMAGE,
        )
    ).train()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the images that the model reads rightly, each in a sample of its own, 0..1."""
    right = 0
    for chosen in torch.arange(len(data.digits)).split(120):
        batch = make_batch(data, chosen, [1] * len(chosen))
        answers = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, PATCHES].argmax(-1)
        right += int((answers == data.digits[chosen]).sum())
    return right / len(data.digits)
