"""Which prompts a stack is made by: each member's own, and those to keep."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from esd_lora.erasers.eraser import Eraser


def keep_list(members: Sequence[Eraser], prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The prompts to keep, and those left out, because they name a member's concept or are erased by one.

    Args:
        members: Of the stack; what they preserved in training is kept too.
        prompts: To keep.
    """
    concepts = [concept for member in members for concept in member.header.concepts]
    erased = {prompt for concept in concepts for prompt, _ in concept.pairs}
    listed = sorted({*prompts, *(prompt for member in members for prompt in member.header.preserve)})
    dropped = [p for p in listed if p in erased or any(concept.named_in(p) for concept in concepts)]
    return [p for p in listed if p not in set(dropped)], dropped


def own_prompts(member: Eraser, kept: Sequence[str], dropped: Sequence[str]) -> list[str]:
    """A member's prompts: those it was trained on, and others that ask for the same.

    These are the prompts left out of the keep list that name its concepts, and its own in the place that another prompt has
    within a longer one of the list: beside "a dog" and "a dog in a park", "a cat" is asked for in a park too.

    Args:
        member: Whose; one that does not know its prompts is asked by its concepts' names.
        kept: From `keep_list`.
        dropped: From `keep_list`.
    """
    concepts = member.header.concepts
    trained = [prompt for concept in concepts for prompt, _ in concept.pairs] or member.names
    mentioning = [p for p in dropped if any(concept.named_in(p) for concept in concepts)]
    asked = dict.fromkeys([*trained, *mentioning])
    if len(trained) <= len(frames := frames_of([*kept, *dropped])):
        asked |= dict.fromkeys(frame.replace("{}", trained[i % len(trained)]) for i, frame in enumerate(frames))
    return list(asked)


def frames_of(prompts: Sequence[str]) -> list[str]:
    """What stands around a prompt in longer ones of the same list, with `{}` in its place, in order and without repetition.

    Where a prompt holds several others ("a bus in ink style", beside "a bus" and "ink style"), the frame counts that stands
    around most: "{} in ink style", as dogs and keys stand in it too, and not "a bus in {}". Among equals it is the first.
    """
    around: dict[str, list[str]] = {whole: [] for whole in prompts}
    for part in prompts:
        alone = re.compile(rf"(?<!\w){re.escape(part)}(?!\w)")
        for whole in prompts:
            if whole != part and part in whole and (frame := alone.sub("{}", whole, count=1)) != whole:
                around[whole].append(frame)
    holds = Counter(frame for frames in around.values() for frame in frames)
    best = [max(frames, key=lambda f: (holds[f], -f.index("{}"))) for frames in around.values() if frames]
    return list(dict.fromkeys(best))
