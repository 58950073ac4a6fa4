"""The words of the ranker's prompts: what a file of prompt templates may say, and how a prompt is made of one.

The built-in file is `prompts.yaml`. A template is text with placeholders, no code. Pictures of candidates (exemplars) are part
of the text as PICTURE, one mark a picture, so that a template decides where they stand; whoever sends the prompt puts pictures
in their place.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rar.schema import UserError

BUILT_IN = Path(__file__).with_name("prompts.yaml")
LABELS = string.ascii_uppercase  # candidates are labelled A, B, C, ... in the `letters` method
PICTURE = "\ufffc"  # Unicode's object replacement character


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Template(Strict):
    """One question. The candidates are rendered each by `candidate` and joined by `between`."""

    ask: str = Field(min_length=1)
    candidate: str
    between: str

    @field_validator("ask")
    @classmethod
    def _ask(cls, text: str) -> str:
        return _checked(text, {"picture", "candidates"})

    @field_validator("candidate")
    @classmethod
    def _candidate(cls, text: str) -> str:
        return _needing("name", _checked(text, {"label", "name", "pictures"}))


class ListTemplate(Template):
    """A question that makes no sense without its candidates."""

    @field_validator("ask")
    @classmethod
    def _ask(cls, text: str) -> str:
        return _needing("candidates", _checked(text, {"picture", "candidates"}))


class YesNo(ListTemplate):
    """affirm, deny: the words that the two answers begin with ("yes" as a key would be true in YAML)."""

    affirm: str = Field(min_length=1)
    deny: str = Field(min_length=1)


class Wording(Strict):
    """All templates. Raises ValidationError where a file says something else."""

    version: int | str
    picture: str
    picture_with_exemplars: str
    none_of_these: str = Field(min_length=1)
    letters: ListTemplate
    generate: ListTemplate
    likelihood: Template
    yes_no: YesNo

    def fingerprint(self) -> str:
        """16 hex digits of every word and of the version; files of equal content are equal, wherever they lie."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def render(self, template: Template, names: Sequence[str], exemplars: Sequence[int] = ()) -> str:
        """The prompt for candidates `names`. exemplars: how many pictures each candidate has; each becomes one PICTURE."""
        counts = exemplars or [0] * len(names)
        items = [
            template.candidate.format(label=LABELS[place % len(LABELS)], name=name, pictures=PICTURE * count)
            for place, (name, count) in enumerate(zip(names, counts, strict=True))
        ]
        picture = self.picture_with_exemplars if any(counts) else self.picture
        return template.ask.format(picture=picture, candidates=template.between.join(items))


@cache
def standard_wording() -> Wording:
    return Wording.model_validate(yaml.safe_load(BUILT_IN.read_text(encoding="utf-8")))


def load_wording(path: str | None) -> Wording:
    """The templates of a file, completed by the built-in ones; None: the built-in ones. Raises UserError for a faulty file."""
    if path is None:
        return standard_wording()
    data, standard = _read(Path(path)), standard_wording().model_dump()
    if "version" not in data:
        raise UserError(f"ranker.prompts {path}: give the file a version, e.g. version: 1")
    for key, value in data.items():
        part = standard.get(key)
        standard[key] = {**part, **value} if isinstance(part, dict) and isinstance(value, dict) else value
    try:
        return Wording.model_validate(standard)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"ranker.prompts {path}: {where}: {fault['msg'].removeprefix('Value error, ')}") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"ranker.prompts: no such file: {file}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"ranker.prompts {file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"ranker.prompts {file} must hold a mapping like the built-in prompts.yaml")
    return data


def _placeholders(text: str) -> set[str]:
    """Names between braces. Raises ValueError for a brace on its own, and for anything in braces that is more than a name."""
    found = set()
    for _, name, form, conversion in string.Formatter().parse(text):
        if name is not None:
            if form or conversion or not name.isidentifier():
                raise ValueError(f"{{{name}}} must be a plain placeholder; double a brace that is meant as text")
            found.add(name)
    return found


def _checked(text: str, known: set[str]) -> str:
    if unknown := sorted(_placeholders(text) - known):
        raise ValueError(
            f"unknown placeholder {{{unknown[0]}}}; known are " + ", ".join(f"{{{name}}}" for name in sorted(known))
        )
    return text


def _needing(name: str, text: str) -> str:
    if name not in _placeholders(text):
        raise ValueError(f"{{{name}}} is missing")
    return text
