"""What the emoji base knows: 40 objects drawn by 5 hands, on 5 backgrounds, and the words for them.

`export.py` writes this domain as `domain.json` beside the weights, where `esd_lora` reads it: objects and styles are
what the judge can name, templates are how prompts are worded, and the held-out pairs were never shown to the base.
"""

# Word used in captions -> icon name, the same in every package.
OBJECTS = {
    "cat": "cat-face",
    "dog": "dog-face",
    "pig": "pig-face",
    "frog": "frog",
    "panda": "panda",
    "rabbit": "rabbit-face",
    "fox": "fox",
    "tiger": "tiger-face",
    "penguin": "penguin",
    "owl": "owl",
    "fish": "tropical-fish",
    "whale": "spouting-whale",
    "snail": "snail",
    "butterfly": "butterfly",
    "bee": "honeybee",
    "turtle": "turtle",
    "apple": "red-apple",
    "banana": "banana",
    "strawberry": "strawberry",
    "pineapple": "pineapple",
    "watermelon": "watermelon",
    "carrot": "carrot",
    "mushroom": "mushroom",
    "pizza": "pizza",
    "burger": "hamburger",
    "cake": "birthday-cake",
    "car": "automobile",
    "bus": "bus",
    "bicycle": "bicycle",
    "rocket": "rocket",
    "sailboat": "sailboat",
    "house": "house",
    "guitar": "guitar",
    "umbrella": "umbrella",
    "key": "key",
    "balloon": "balloon",
    "crown": "crown",
    "cactus": "cactus",
    "robot": "robot",
    "ghost": "ghost",
}

# Style word -> npm package and version (hashes in fetch.py).
STYLES = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "blob": ("@iconify-json/noto-v1", "1.2.5"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "ink": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
}

BACKGROUNDS = {
    "white": (255, 255, 255),
    "yellow": (255, 236, 150),
    "blue": (168, 208, 255),
    "green": (178, 230, 178),
    "pink": (255, 196, 214),
}

# `{a}` is the object with its article ("a cat", "an apple").
TEMPLATES = {
    "both": [
        "{a} in {style} style",
        "{a}, {style} style",
        "a {style} drawing of {a}",
        "a picture of {a} in {style} style",
        "an emoji of {a}, drawn by {style}",
        "{style} {object}",
    ],
    "object": ["{a}", "{object}", "a drawing of {a}", "a picture of {a}", "an emoji of {a}"],
    "style": ["{style} style", "an emoji in {style} style", "a {style} drawing", "a picture in {style} style"],
    "any": ["an emoji", "a drawing", "a picture"],
    "background": " on a {background} background",
}


def held_out_pairs() -> list[tuple[str, str]]:
    """10 % of the object x style pairs, spread evenly: every object at most once, every style four times."""
    styles = list(STYLES)
    return [(name, styles[(i // 2) % len(styles)]) for i, name in enumerate(OBJECTS) if i % 2 == 1]


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
