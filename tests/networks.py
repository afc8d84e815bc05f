"""Toy networks that look at pictures, saved as the real ones are: weights by chance, the real classes and file formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
)

from tiny import tiny_tokenizer

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of its channels."""


def save_alexnet(path: Path) -> Path:
    """AlexNet as torchvision saves it, its classifier too."""
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    random = torch.Generator().manual_seed(0)
    state = {"classifier.1.weight": torch.zeros(2, 2)}
    for i, (outputs, inputs, kernel) in shapes.items():
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=random)
        state[f"features.{i}.weight"] = weight * (2 / (inputs * kernel**2)) ** 0.5
        state[f"features.{i}.bias"] = 0.1 * torch.randn(outputs, generator=random)
    torch.save(state, path)
    return path


def save_clip(folder: Path) -> Path:
    tokenizer = tiny_tokenizer(10**6)  # some are saved without knowing how much the model reads
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)  # whose cosines are above 0
        model = CLIPModel(
            CLIPConfig(text_config=small | words, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def save_classifier(folder: Path, names: Sequence[str]) -> Path:
    """A ResNet of transformers that knows these classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNetForImageClassification(resnet_config(names))
    model.save_pretrained(folder)
    mean, deviation = IMAGENET  # as microsoft/resnet-50 has them
    ConvNextImageProcessor(size={"shortest_edge": 32}, image_mean=mean, image_std=deviation).save_pretrained(folder)
    return folder


def resnet_config(names: Sequence[str]) -> ResNetConfig:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return ResNetConfig(**sizes, layer_type="basic", id2label=dict(enumerate(names)))


class ToyInception(nn.Module):
    """Called like NVIDIA's script: whole numbers in, features or probabilities out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        x = self.linear(img.float().mean((2, 3)))
        return x if return_features else x.softmax(1)


def save_script(toy: ToyInception, path: Path) -> Path:
    """As TorchScript, which torch deprecates, and NVIDIA's Inception is published as nothing else."""
    torch.jit.script(toy).save(str(path))
    return path
