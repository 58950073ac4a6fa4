"""What stands around a class name in a prompt: templates by data set, and sentences that describe a class.

The templates are those that CoOp (arXiv 2109.01134, its hand-crafted prompts) and CLIP's prompt notebook (arXiv 2103.00020)
made customary: one a data set, so that numbers can be held against the literature's; ImageNet has the seven that the notebook
picks out of its eighty, and RAF-DB those of another set of facial expressions. Dogs, LVIS, V3Det and Objects365, which neither
covers, have prompts of the same make.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence

from rar import storage
from rar.schema import UserError

PLAIN = ["a photo of a {}."]
BIRD = ["a photo of a {}, a type of bird."]
DOG = ["a photo of a {}, a type of dog."]

TEMPLATES: Mapping[str, Sequence[str]] = {
    "aircraft": ["a photo of a {}, a type of aircraft."],
    "birds": BIRD,
    "caltech101": PLAIN,
    "cars": PLAIN,
    "coco": PLAIN,
    "cub": BIRD,
    "dogs": DOG,
    "dtd": ["{} texture."],
    "eurosat": ["a centered satellite photo of {}."],
    "flowers": ["a photo of a {}, a type of flower."],
    "food": ["a photo of {}, a type of food."],
    "imagenet": [
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ],
    "lvis": PLAIN,
    "objects365": PLAIN,
    "pets": ["a photo of a {}, a type of pet."],
    "rafdb": ["a photo of a {} looking face.", "a photo of a face showing the emotion: {}."],
    "sun": PLAIN,
    "ucf101": ["a photo of a person doing {}."],
    "v3det": PLAIN,
}


def templates_of(spec: str | Sequence[str]) -> list[str]:
    """encoder.templates as a list: a data set's by name, or one's own. Raises UserError; each must hold `{}` exactly once."""
    if isinstance(spec, str):
        if spec not in TEMPLATES:
            raise UserError(f"encoder.templates: {_advice(spec)}")
        return list(TEMPLATES[spec])
    for template in spec:
        if template.count("{}") != 1:
            raise UserError(f"encoder.templates: {template!r} needs {{}} exactly once, where the class name goes")
    return list(spec)


def _advice(name: str) -> str:
    if "{" in name:
        return f"put the template into a list: [{name!r}]"
    (nearest,) = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.0)
    return f"no data set is called {name!r}; did you mean {nearest!r}? There are {', '.join(TEMPLATES)}; or give a list"


def filled(template: str, name: str) -> str:
    """The prompt of a class. Underscores, of which some vocabularies are full, become spaces; braces in a name stay."""
    return template.replace("{}", name.replace("_", " "))


def read_descriptions(path: str) -> dict[str, list[str]]:
    """encoder.descriptions: a JSON object of class name -> sentences, as they are sent to the text tower.

    Raises UserError for another layout, and for a class with no sentence or an empty one.
    """
    with storage.explained("encoder.descriptions", path), storage.open_file(path) as stream:
        data = json.loads(stream.read().decode("utf-8-sig"))
    if not isinstance(data, dict) or not data:
        raise UserError(f'encoder.descriptions: {path} must hold an object {{"class name": ["sentence", ...]}}')
    for name, sentences in data.items():
        texts = sentences if isinstance(sentences, list) else []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"encoder.descriptions: {path}: {name!r} needs a list of sentences, none of them empty")
    return data


def unused_descriptions(descriptions: Mapping[str, Sequence[str]], classes: Iterable[str], path: str) -> int:
    """How many described names are no class, for a message; where none is one, the file is for other classes: UserError."""
    known = set(classes)
    unused = [name for name in descriptions if name not in known]
    if len(unused) == len(descriptions):
        raise UserError(
            f"encoder.descriptions: none of the {len(unused):,} names in {path} is a class, e.g. {unused[0]!r}; "
            "names must be those of memory.classes"
        )
    return len(unused)
