"""What stands around a class name in a prompt: templates by data set, and sentences that describe a class.

The templates are those of the data sets that are known by name (`rar data`), which CoOp (arXiv 2109.01134) made customary: one
a data set, so that numbers can be held against the literature's. `imagenet_seven` are those that CLIP's prompt notebook (arXiv
2103.00020) picks out of its eighty.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence

from rar import storage
from rar.corpus.datasets.known import known
from rar.schema import UserError

SEVEN = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
SHORT = {  # other names of data sets
    "aircraft": "fgvc_aircraft",
    "cars": "stanford_cars",
    "cub": "cub200",
    "birds": "cub200",
    "dogs": "stanford_dogs",
    "flowers": "oxford_flowers",
    "food": "food101",
    "objects365": "coco",
    "pets": "oxford_pets",
    "rafdb": "raf_db",
    "sun": "sun397",
}


def by_data_set() -> dict[str, Sequence[str]]:
    """Templates by name: those of the data sets that are known by name, under shorter names, too, and ImageNet's seven."""
    named = {name: one.templates for name, one in known().items()}
    return {**named, **{short: named[name] for short, name in SHORT.items()}, "imagenet_seven": SEVEN}


def templates_of(spec: str | Sequence[str]) -> list[str]:
    """encoder.templates as a list: a data set's by name, a text file's lines (`{c}` as clip_benchmark writes for `{}`), or own.

    Raises UserError; each must hold `{}` exactly once.
    """
    if isinstance(spec, str) and storage.suffix(spec) == ".txt":
        with storage.explained("encoder.templates", spec), storage.open_file(spec) as stream:
            lines = stream.read().decode("utf-8-sig").splitlines()
        spec = [line.strip().replace("{c}", "{}") for line in lines if line.strip()]
    if isinstance(spec, str):
        if spec not in by_data_set():
            raise UserError(f"encoder.templates: {_advice(spec)}")
        return list(by_data_set()[spec])
    for template in spec:
        if template.count("{}") != 1:
            raise UserError(f"encoder.templates: {template!r} needs {{}} exactly once, where the class name goes")
    return list(spec)


def _advice(name: str) -> str:
    if "{" in name:
        return f"put the template into a list: [{name!r}]"
    (nearest,) = difflib.get_close_matches(name, by_data_set(), n=1, cutoff=0.0)
    return f"no data set is called {name!r}; did you mean {nearest!r}? There are {', '.join(by_data_set())}; or give a list"


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
