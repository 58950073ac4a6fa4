from __future__ import annotations

import json
from pathlib import Path

import pytest

from rar.encoder.templates import by_data_set, filled, read_descriptions, templates_of, unused_descriptions
from rar.schema import UserError

OWLS = {"owl": ["Owls have a flat face.", "An owl turns its head."], "wren": ["A wren is round."]}


def test_a_data_set_by_name() -> None:
    assert templates_of("pets") == ["a photo of a {}, a type of pet."]
    assert templates_of("dtd") == ["{} texture."]
    assert templates_of("imagenet") == ["a photo of a {}."] and len(templates_of("imagenet_seven")) == 7


@pytest.mark.parametrize("name", by_data_set())
def test_every_data_set_has_sound_templates(name: str) -> None:
    found = templates_of(name)
    assert found and templates_of(found) == found and len(set(found)) == len(found)


def test_the_benchmarks_of_the_paper_are_there() -> None:
    few_shot = {
        "imagenet",
        "caltech101",
        "rafdb",
        "sun",
        "eurosat",
        "dtd",
        "ucf101",
        "flowers",
        "cars",
        "food",
        "pets",
        "aircraft",
    }
    assert few_shot | {"cub", "dogs", "lvis", "v3det"} <= set(by_data_set())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pet", "no data set is called 'pet'; did you mean 'pets'?"),
        ("Flowers102", "did you mean 'flowers'?"),
        ("", "no data set is called ''"),
        ("a photo of a {}.", r"put the template into a list: \['a photo of a {}.'\]"),
        (["a {}.", "a photo."], r"'a photo.' needs \{\} exactly once"),
        (["{} and {}"], "exactly once"),
        (["{name}"], "exactly once"),
    ],
)
def test_template_mistakes(spec: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        templates_of(spec)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("encoder.templates: ")


def test_filling() -> None:
    assert filled("a photo of a {}.", "aerosol_can") == "a photo of a aerosol can."
    assert filled("{} texture.", "{odd} {}") == "{odd} {} texture."


def test_descriptions(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    file.write_text(json.dumps(OWLS), encoding="utf-8-sig")
    assert read_descriptions(str(file)) == OWLS
    assert unused_descriptions(OWLS, ["owl", "crow"], "d.json") == 1
    assert unused_descriptions(OWLS, ["owl", "wren", "crow"], "d.json") == 0
    with pytest.raises(UserError, match=r"none of the 2 names in d.json is a class, e.g. 'owl'"):
        unused_descriptions(OWLS, ["Owl"], "d.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "d.json does not exist"),
        ("{", "cannot read .*d.json"),
        ("[]", "must hold an object"),
        ("{}", "must hold an object"),
        ('{"owl": "one sentence"}', "'owl' needs a list of sentences"),
        ('{"owl": ["fine"], "wren": []}', "'wren' needs a list of sentences"),
        ('{"owl": ["fine", " "]}', "none of them empty"),
        ('{"owl": [3]}', "'owl' needs a list of sentences"),
    ],
)
def test_description_mistakes(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "d.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_descriptions(str(file))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("encoder.descriptions: ")
