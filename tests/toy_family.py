"""A model family in one file, with toy modules of its own: all that a new architecture takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from esd_lora.families.family import CheckpointKind, ModelFamily, PublishedModel
from esd_lora.families.layer_names import OriginalLayer
from esd_lora.trajectory import Condition

WIDTH, TEXT_WIDTH, TOKENS = 8, 6, 12


class Attention(nn.Module):
    """Attention from one sequence to another, without residual."""

    def __init__(self, context_width: int):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k = nn.Linear(context_width, WIDTH)
        self.to_v = nn.Linear(context_width, WIDTH)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return scaled_dot_product_attention(self.to_q(x), self.to_k(context), self.to_v(context))


class ToyTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """One block on the pixels of the latents: self-attention, then attention to the text."""

    @register_to_config
    def __init__(self, in_channels: int = 4, sample_size: int = 4):  # noqa: ARG002
        super().__init__()
        self.proj_in = nn.Linear(in_channels, WIDTH)
        self.toy_blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention(WIDTH), "attn2": Attention(TEXT_WIDTH)})])
        self.proj_out = nn.Linear(WIDTH, in_channels)

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x = self.proj_in(x_t.flatten(2).mT) + t.view(-1, 1, 1) / 1000
        for block in self.toy_blocks:
            x = x + block["attn1"](x, x)
            x = x + block["attn2"](x, text)
        return self.proj_out(x).mT.reshape(x_t.shape)


class ToyPipeline(DiffusionPipeline):
    """The toy transformer and a schedule; text needs no model, for prompts are read as bytes."""

    vae_scale_factor = 8

    def __init__(self, transformer: ToyTransformer, scheduler: DDIMScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


def toy_pipeline() -> ToyPipeline:
    """Return a toy pipeline with random weights that predicts v."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ToyPipeline(ToyTransformer(), DDIMScheduler(prediction_type="v_prediction"))


class ToyFamily(ModelFamily):
    """Six linears a block, three of them of cross-attention."""

    name = "toy"
    pipelines = ("ToyPipeline",)
    denoiser = "transformer"
    tags = ("toy-diffusion",)
    text_layers = r"\.attn2\.to_[kv]$"
    scopes: ClassVar[Mapping[str, str]] = {
        "xattn": r"\.attn2\.",
        "xattn-kv": r"\.attn2\.to_[kv]$",
        "selfattn": r"\.attn1\.",
        "noxattn": r"^toy_blocks\.(?!.*\.attn2\.)",
        "full": r"^toy_blocks\.",
    }
    multiple = 1
    published = (PublishedModel("toy_v1", "toy-diffusion-v1", "32x32", text_width=TEXT_WIDTH),)
    metadata_pattern = "toy"
    checkpoints = (CheckpointKind("Toy Diffusion", prediction_type="v_prediction"),)

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        embeddings = torch.randn(256, TEXT_WIDTH, generator=torch.Generator().manual_seed(0))
        tokens = torch.tensor([list(prompt.encode()[:TOKENS].ljust(TOKENS)) for prompt in prompts])
        return {"prompt_embeds": embeddings[tokens].to(pipe.transformer.device)}

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return pipe.transformer(x_t, t, condition["prompt_embeds"])

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:  # noqa: ARG002
        """Return the places in an original that joins the queries, keys and values of self-attention, as most do."""
        joined = {f"toy_blocks.0.attn1.to_{which}": OriginalLayer("layers.0.qkv", i, total=3) for i, which in enumerate("qkv")}
        return joined | {f"toy_blocks.0.attn2.to_{which}": OriginalLayer(f"layers.0.text.{which}") for which in "qkv"}

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:
        return self.checkpoints[0] if "layers.0.text.q.weight" in shapes else None
