"""What stacking and compressing refuse, and what they say about it."""

from __future__ import annotations

import pytest
import torch

from esd_lora.erasers.eraser import Eraser
from esd_lora.erasers.stacking import Strength, compress, outline, stack
from esd_lora.errors import EsdLoraError
from random_erasers import build_header, random_eraser


def changed(eraser: Eraser, **header: object) -> Eraser:
    return Eraser(eraser.pairs, eraser.header.model_copy(update=header))


@pytest.mark.parametrize(
    ("field", "first", "second", "words"),
    [
        ("family", "sd", "sdxl", "family 'sd' and 'sdxl'"),
        ("prediction_type", "epsilon", "v_prediction", "prediction type 'epsilon' and 'v_prediction'"),
        ("prefix", "unet", "transformer", "prefix 'unet' and 'transformer'"),
    ],
)
def test_members_of_different_kinds_are_named(field: str, first: str, second: str, words: str) -> None:
    a, b = random_eraser({"conv": 1}, "a cat"), random_eraser({"conv": 1}, "a hat")
    with pytest.raises(EsdLoraError) as caught:
        stack([changed(a, **{field: first}), changed(b, **{field: second})])
    message = str(caught.value)
    assert "['a cat']" in message
    assert "['a hat']" in message
    assert words in message
    assert message.endswith("Stack erasers that were trained on the same model.")


def test_members_of_different_weights_are_named() -> None:
    a = changed(random_eraser({"conv": 1}, "a cat"), base="one", base_hashes={"conv": "aa"})
    b = changed(random_eraser({"conv": 1}, "a hat"), base="other", base_hashes={"conv": "bb"})
    with pytest.warns(
        UserWarning, match=r"\['a cat'\] and \['a hat'\] were trained on different weights \('one' and 'other'\).*train one"
    ):
        stack([a, b])


def test_what_is_not_known_is_not_held_against_a_member() -> None:
    a, b = random_eraser({"conv": 1}), changed(random_eraser({"conv": 1}), prediction_type=None)
    for members in ([a, b], [b, a]):
        assert stack(members).header.prediction_type == "epsilon"
    assert stack([b, b]).header.prediction_type is None


def test_outline_is_the_stack_without_its_numbers() -> None:
    members = [
        random_eraser({"conv": 1, "shortcut": 2}, "a cat"),
        random_eraser({"mid.attn2.to_k": 3, "conv": 2}, "a hat", seed=1),
    ]
    whole, drawn = stack(members), outline(members)
    assert drawn.header == whole.header
    assert list(drawn.pairs) == list(whole.pairs)
    assert all(pair.shape == whole.pairs[path].shape for path, pair in drawn.pairs.items())
    other = Eraser({"conv": random_eraser({"shortcut": 1}, "a hat").pairs["shortcut"]}, members[0].header)
    with pytest.raises(EsdLoraError, match="layer conv has shapes"):
        outline([members[0], other])


def test_layers_of_different_shapes() -> None:
    a = random_eraser({"conv": 1})
    b = Eraser({"conv": random_eraser({"shortcut": 1}).pairs["shortcut"]}, build_header())
    with pytest.raises(EsdLoraError, match="layer conv has shapes"):
        stack([a, b])


def test_weights_for_each() -> None:
    a = random_eraser({"conv": 1})
    for weights in ([], [1.0, 2.0]):
        with pytest.raises(EsdLoraError, match="a weight for each"):
            stack([a], weights)
    with pytest.raises(EsdLoraError, match="at least one"):
        stack([])


def test_block_without_a_layer() -> None:
    with pytest.raises(EsdLoraError, match=r"\['a cat'\] has no layer in 'up.2'.*It has some in conv, mid.attn2"):
        stack([random_eraser({"conv": 1, "mid.attn2.to_k": 1})], [Strength(1, {"up.2": 0})])


def test_short_names_of_blocks() -> None:
    pair = random_eraser({"conv": 1}).pairs["conv"]
    modules = ("down_blocks.1.attentions.0.to_k", "down_blocks.10.to_k", "mid_block.to_k", "up_blocks.1.to_k")
    eraser = Eraser(dict.fromkeys(modules, pair), build_header())
    strength = Strength(2.0, {"down.1": 0.5, "mid": 0.0, "up_blocks": 3.0, "up.1": -1.0})
    factors = [pair.inner(other) / pair.norm() ** 2 for other in stack([eraser], [strength]).pairs.values()]
    assert factors == pytest.approx([1.0, 2.0, 0.0, -2.0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, "give one"), ({"rank": 0}, "1 or more"), ({"energy": 0.0}, "share"), ({"energy": 1.1}, "share")],
)
def test_compressing_to_what_cannot_be(settings: dict[str, float], words: str) -> None:
    with pytest.raises(EsdLoraError, match=words):
        compress(random_eraser({"conv": 1}), **settings)  # type: ignore[arg-type]


def test_compressing_never_multiplies_out() -> None:
    """A convolution of SDXL's size: its update has 15 million values, its factors half a million."""
    rank, out, width = 40, 1280, 1280
    small = random_eraser({"conv": 1}).pairs["conv"]
    pair = small._replace(down=torch.randn(rank, width, 3, 3), up=torch.randn(out, rank, 1, 1))
    seen: list[int] = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            result = super().__torch_function__(func, types, args, kwargs or {})
            seen.extend(
                part.numel() for part in (result if isinstance(result, tuple) else [result]) if isinstance(part, torch.Tensor)
            )
            return result

    watched = pair._replace(down=pair.down.as_subclass(Watched), up=pair.up.as_subclass(Watched))
    compressed = compress(Eraser({"conv": watched}, build_header()), rank=10)
    assert compressed.eraser.pairs["conv"].rank == 10
    assert 0 < max(seen) <= rank * width * 9
    assert 0 < compressed.overall < 1


def test_layer_without_an_update_stays() -> None:
    a = random_eraser({"conv": 2}, dtype=torch.float32)
    nothing = compress(stack([a, a], [1, 0]), energy=0.5).eraser.pairs["conv"]
    assert nothing.rank >= 1
    zero = compress(Eraser({"conv": a.pairs["conv"]._replace(up=torch.zeros(3, 2, 1, 1))}, a.header), energy=0.5)
    assert (zero.overall, zero.eraser.pairs["conv"].rank) == (0.0, 1)
    assert not zero.eraser.pairs["conv"].delta().any()
