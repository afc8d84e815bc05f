"""Lumina Image 2.0: a single-stream DiT that predicts the flow, on Gemma 2.

Text passes through two refiner blocks of its own and then stands beside the picture in one sequence, which the other blocks
read with one set of weights. So `xattn` is what text alone passes through: the layer by which it enters and the context
refiner. How text acts on the picture is decided in the joint blocks, which are `selfattn` and `noxattn`.

Its time runs from noise (0) to picture (1) and its flow the same way, opposite to every other family's: `predict` turns both.
The pipeline scales guided predictions back to the prompted one's size (`cfg_normalization`); pictures are painted so, while
trajectories are guided as everywhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from esd_lora.families.family import CheckpointKind, ModelFamily, PublishedModel
from esd_lora.families.layer_names import OriginalLayer, bare_shapes
from esd_lora.trajectory import Condition, concatenate

_LUMINA_2 = CheckpointKind("Lumina 2")


class Lumina2(ModelFamily):
    """Lumina Image 2.0 (2.6B): 26 joint blocks, two refiners each of noise and text; 15 linears that text alone passes."""

    name = "lumina2"
    pipelines = ("Lumina2Pipeline",)
    denoiser = "transformer"
    text_layers = r"^time_caption_embed\.caption_embedder\.1$"
    scopes: ClassVar[Mapping[str, str]] = {
        "xattn": rf"^context_refiner\.|{text_layers}",
        "xattn-kv": r"^context_refiner\..*\.to_[kv]$",
        "selfattn": r"^(noise_refiner|layers)\..*\.attn\.",
        "noxattn": r"^(noise_refiner|layers)\.",
        "full": rf"^(noise_refiner|context_refiner|layers)\.|{text_layers}",
    }
    fixed_prediction_type = "flow"
    even_sigmas = True
    multiple = 2
    published = (PublishedModel("lumina2", "lumina-2", "1024x1024"),)
    metadata_pattern = "lumina"
    checkpoints = (_LUMINA_2,)

    def needs_own_scheduler(self, pipe: Any) -> bool:  # noqa: ARG002
        return True  # the pipeline hands it noise levels, which others do not take

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        # The pipeline puts a system prompt before every prompt, but not before the negative one.
        return concatenate(*(self.encode_text(pipe, [p]) if p else self.encode_opposite(pipe, [p]) for p in prompts))

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        text, mask, _, _ = pipe.encode_prompt(list(prompts), False, device=pipe.text_encoder.device)
        return {"prompt_embeds": text, "prompt_attention_mask": mask}

    def encode_opposite(self, pipe: Any, prompts: Sequence[str]) -> Condition:
        text, mask = pipe._get_gemma_prompt_embeds(list(prompts), pipe.text_encoder.device)
        return {"prompt_embeds": text, "prompt_attention_mask": mask}

    def as_read(self, pipe: Any, condition: Condition) -> Condition:
        norm, text = pipe.transformer.time_caption_embed.caption_embedder[0], condition["prompt_embeds"]
        return {**condition, "prompt_embeds": norm(text.to(norm.weight.device)).to(text.device)}

    def condition_shapes(self, pipe: Any) -> Mapping[str, tuple[int, ...]]:
        tokens = self.prompt_tokens(pipe)
        return {"prompt_embeds": (tokens, pipe.transformer.config.cap_feat_dim), "prompt_attention_mask": (tokens,)}

    def predict(self, pipe: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        mask = condition["prompt_attention_mask"]
        flow = pipe.transformer(
            hidden_states=x_t,
            timestep=1 - t / 1000,
            encoder_hidden_states=condition["prompt_embeds"],
            # The model asks for the lengths of texts, which memory planning has no values of: there each is the longest.
            encoder_attention_mask=torch.ones(mask.shape, dtype=torch.long, device="cpu") if mask.is_meta else mask.long(),
            return_dict=False,
        )[0]
        return -flow

    def original_layers(self, names: Collection[str] = ()) -> Mapping[str, OriginalLayer]:  # noqa: ARG002
        return _original_layers()

    def recognise(self, shapes: Mapping[str, Sequence[int]]) -> CheckpointKind | None:
        # Z-Image has the same blocks and another modulation; NewBie reads CLIP beside Gemma.
        bare = bare_shapes(shapes).keys()
        ours = {"context_refiner.0.attention.qkv.weight", "layers.0.adaLN_modulation.1.weight"} <= bare
        return _LUMINA_2 if ours and "clip_text_pooled_proj.0.weight" not in bare else None


@cache
def _original_layers() -> Mapping[str, OriginalLayer]:
    """Return the places of layers in Alpha-VLLM/Lumina-Image-2.0. Keys and values have a third of the queries' heads."""
    layers = {
        "x_embedder": OriginalLayer("x_embedder"),
        "time_caption_embed.caption_embedder.1": OriginalLayer("cap_embedder.1"),
        "time_caption_embed.timestep_embedder.linear_1": OriginalLayer("t_embedder.mlp.0"),
        "time_caption_embed.timestep_embedder.linear_2": OriginalLayer("t_embedder.mlp.2"),
        "norm_out.linear_1": OriginalLayer("final_layer.adaLN_modulation.1"),
        "norm_out.linear_2": OriginalLayer("final_layer.linear"),
    }
    whole = {"attn.to_out.0": "attention.out", "norm1.linear": "adaLN_modulation.1"}
    whole |= {f"feed_forward.linear_{i}": f"feed_forward.w{i}" for i in (1, 2, 3)}
    blocks = [f"layers.{i}" for i in range(64)]  # published are 26
    blocks += [f"{kind}_refiner.{i}" for kind in ("noise", "context") for i in range(2)]
    for block in blocks:
        layers |= {f"{block}.{part}": OriginalLayer(f"{block}.{name}") for part, name in whole.items()}
        for which, first, height in (("q", 0, 1), ("k", 1, 1 / 3), ("v", 4 / 3, 1 / 3)):
            layers[f"{block}.attn.to_{which}"] = OriginalLayer(f"{block}.attention.qkv", first, height, total=5 / 3)
    return layers
