from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rar import config
from rar.config import Config
from rar.schema import UserError
from tests.conftest import SHARED_DATA


def written(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text)
    return file


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """`nested("a.b", 1)` is {"a": {"b": 1}}."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def complaint(data: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        config.validated(config.Config, data, overrides)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_file_is_read_over_the_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, "corpus: {uri: photos}\nretriever:\n  top_k: 7\nmemory: {classes: [cat, dog]}\n")
    settings = config.load(file)
    assert settings.corpus == config.Corpus(uri="photos")
    assert settings.retriever == config.Retriever(top_k=7)
    assert settings.memory.classes == ["cat", "dog"]
    assert settings.ranker == Config().ranker


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert config.load(written(tmp_path, "# nothing yet\n")) == Config()


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("encodr", "encoder"),
        ("encoder.modell", "encoder.model"),
        ("retriever.topk", "retriever.top_k"),
        ("detect.crop.sise", "detect.crop.size"),
        ("memory.support.urii", "memory.support.uri"),
        ("memory.index.efconstruction", "memory.index.ef_construction"),
        ("run.shardsize", "run.shard_size"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_valid_one(key: str, meant: str) -> None:
    data = nested(key, 1)
    if key.startswith("memory.support"):
        data["memory"]["support"]["uri"] = "photos"
    assert complaint(data) == f"config: unknown key {key!r}; did you mean {meant!r}?"


def test_every_key_is_known_and_none_else() -> None:
    known = config._known_keys(Config)
    assert len(known) == len(set(known))
    assert {"corpus.uri", "memory.support.uri", "memory.index.m", "detect.crop.outside", "run.seed"} <= set(known)

    def leaves(data: dict[str, Any], prefix: str = "") -> set[str]:
        below = [leaves(value, f"{prefix}{key}.") for key, value in data.items() if isinstance(value, dict)]
        return {prefix + key for key in data}.union(*below)

    full = Config.model_validate(
        {
            "corpus": {"uri": "a"},
            "memory": {"support": {"uri": "a"}},
            "detect": {"detector": {"model": "a"}},
            "tune": {"corpus": {"uri": "a"}},
        }
    ).model_dump(mode="json")
    assert set(known) == leaves(full)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("retriever.top_k=9", "retriever", "top_k", 9),
        ("retriever.mode=knn", "retriever", "mode", "knn"),
        (" encoder.model =ViT-B-16/openai", "encoder", "model", "ViT-B-16/openai"),
        ("encoder.templates=['a {}.', 'the {}.']", "encoder", "templates", ["a {}.", "the {}."]),
        ("encoder.templates=['a = b {}']", "encoder", "templates", ["a = b {}"]),
        ("encoder.compile=true", "encoder", "compile", True),
        ("memory.token=null", "memory", "token", None),
    ],
)
def test_set_overrides_one_key(override: str, section: str, key: str, value: Any) -> None:
    settings = config.validated(config.Config, {"retriever": {"n_neighbors": 3}}, [override])
    assert getattr(getattr(settings, section), key) == value
    assert settings.retriever.n_neighbors == 3


def test_set_reaches_sections_that_the_file_lacks() -> None:
    settings = config.validated(config.Config, {}, ["detect.crop.size=64", "corpus.uri=photos", "detect.crop.outside=grey"])
    assert settings.detect.crop == config.Crop(size=64, outside="grey")
    assert settings.corpus == config.Corpus(uri="photos")


def test_the_last_set_wins(tmp_path: Path) -> None:
    file = written(tmp_path, "run: {seed: 1}\n")
    assert config.load(file, ["run.seed=2", "run.seed=3"]).run.seed == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed", "--set needs dotted.key=value, got 'run.seed'"),
        ("run.seed.deeper=1", "--set run.seed.deeper: 'seed' is a value, not a section"),
        ("run.seed.much.deeper=1", "--set run.seed.much.deeper: 'seed' is a value, not a section"),
        ("encoder.templates=[a {}.]", "--set encoder.templates: '[a {}.]' is not valid YAML; put it in quotes"),
        ("run.sed=1", "config: unknown key 'run.sed'; did you mean 'run.seed'?"),
        ("run.seed=many", "config: run.seed: Input should be a valid integer"),
        ("run=1", "config: run: Input should be a valid dictionary"),
    ],
)
def test_mistakes_in_set(override: str, message: str) -> None:
    assert complaint({"run": {"seed": 0}}, override).startswith(message)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        config.load(tmp_path / "nowhere.yaml")
    assert str(raised.value) == f"config file not found: {tmp_path / 'nowhere.yaml'}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [1", " is not valid YAML: "),
        ("run: {seed: 1}\n\tcorpus: 2\n", " is not valid YAML: "),
        ("- run\n- corpus\n", " must hold a mapping of settings, not a list"),
        ("run\n", " must hold a mapping of settings, not a str"),
    ],
)
def test_a_file_of_something_else(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError) as raised:
        config.load(file)
    assert str(raised.value).startswith(f"{file}{message}")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(UserError, match="is not valid YAML"):
        config.load(file)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "run.seed",
            "many",
            "config: run.seed: Input should be a valid integer, unable to parse string as an integer, got 'many'",
        ),
        ("retriever.top_k", 0, "config: retriever.top_k: Input should be greater than or equal to 1, got 0"),
        (
            "retriever.mode",
            "magic",
            "config: retriever.mode: Input should be 'fused', 'text', 'knn', 'centroid', 'tip', 'lda' or 'all', got",
        ),
        ("corpus", "photos", "config: corpus: Input should be a valid dictionary or instance of Corpus, got 'photos'"),
        ("corpus.limit", "a\nb", "config: corpus.limit: Input should be a valid integer"),
        ("encoder.templates", [], "config: encoder.templates: Value should have at least 1 item"),
        ("memory.name", "no dashes-please", "config: memory.name: String should match pattern"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_key(key: str, value: Any, message: str) -> None:
    assert complaint(nested(key, value)).startswith(message)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"encoder": {"model": "precomputed"}}, "config: encoder.model precomputed leaves no pictures to rank"),
        ({"route": {"mode": "always", "coverage": 0.9}}, "config: route.coverage needs route.mode: calibrated"),
        ({"detect": {"proposals": "a.json", "detector": {"model": "b"}}}, "config: set detect.proposals (a file) or"),
        ({"ranker": {"method": "endpoint"}}, "config: ranker.method endpoint needs ranker.base_url"),
    ],
)
def test_settings_that_contradict_each_other(data: dict[str, Any], wanted: str) -> None:
    assert complaint(data).startswith(wanted)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("memory: {name: a}\nrun: {}\nmemory: {uri: b}\n", "'memory' stands twice, in lines 1 and 3; put both parts under one"),
        ("memory:\n  shots: 4\n  shots: 8\n", "'shots' stands twice, in lines 2 and 3; put both parts under one"),
    ],
)
def test_a_key_that_stands_twice_is_told(tmp_path: Path, text: str, told: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError) as raised:
        config.load(file)
    assert str(raised.value) == f"{file}: {told}"


@pytest.mark.parametrize(
    ("text", "where", "read"),
    [
        ("memory: {classes: [yes, no, unsure]}", "memory.classes.0", "True"),
        ("memory: {classes: [se, dk, no]}", "memory.classes.2", "False"),
        ("memory: {classes: [off, lamp]}", "memory.classes.0", "False"),
        ("memory: {classes: [1, 2]}", "memory.classes.0", "1"),
        ("memory: {classes: [cat, ~]}", "memory.classes.1", "None"),
        ("memory: {classes: [cat, 2024-01-31]}", "memory.classes.1", "datetime.date"),
        ("memory: {name: on}", "memory.name", "True"),
        ("serve: {adapters: {no: folder}}", "serve.adapters", "False"),
    ],
)
def test_words_that_yaml_takes_for_values_are_to_be_quoted(tmp_path: Path, text: str, where: str, read: str) -> None:
    with pytest.raises(UserError) as raised:
        config.load(written(tmp_path, text))
    assert str(raised.value).startswith(f"config: {where}") and f"YAML reads {read}" in str(raised.value)
    assert "put it in quotes" in str(raised.value) and "\n" not in str(raised.value)


def test_yes_is_no_number_and_home_is_found_wherever_a_path_stands(tmp_path: Path) -> None:
    for text in ("retriever: {top_k: yes}", "corpus: {uri: a, limit: on}", "run: {max_failed_fraction: no}"):
        with pytest.raises(UserError, match=r"^config: [\w.]+: a number is needed, and YAML reads (True|False)"):
            config.load(written(tmp_path, text))
    found = config.load(written(tmp_path, "corpus: {uri: ~/photos}\nserve: {adapters: {birds: ~/birds}}"))
    assert found.corpus is not None and found.corpus.uri == str(Path.home() / "photos")
    assert found.serve.adapters == {"birds": str(Path.home() / "birds")}


def test_the_reference_loads_as_the_defaults_and_holds_every_key(tmp_path: Path) -> None:
    text = config.reference()
    assert config.load(written(tmp_path, text)) == Config()
    for key in config._known_keys(Config):
        assert f"{key.rpartition('.')[2]}:" in text
    sections = [one for one in vars(config).values() if isinstance(one, type) and issubclass(one, config.Strict)]
    for section in sections:
        for name, field in section.model_fields.items():
            assert field.description or section is Config or isinstance(field.default, config.Strict), (section, name)


@pytest.mark.skipif(not (SHARED_DATA.parent / "cases").exists(), reason="needs ../shared/cases")
@pytest.mark.parametrize(("name", "told"), [("norway", "put it in quotes"), ("section_twice", "'memory' stands twice")])
def test_configs_as_people_have_them(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        config.load(SHARED_DATA.parent / "cases" / "config" / f"{name}.yaml")


@pytest.mark.parametrize("corpus", [{}, {"uri": ""}, {"uri": "a", "dataset": "oxford_pets", "root": "b", "split": "test"}])
def test_a_corpus_has_one_source(corpus: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"give uri \(where the images lie\) or dataset"):
        config.validated(config.Config, {"corpus": corpus})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory.uri", "http://root:planted@milvus:19530"),
        ("ranker.base_url", "[http://one/v1, https://me:planted@two/v1]"),
        ("corpus.uri", "s3://key:planted@bucket/photos"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(key: str, value: str) -> None:
    with pytest.raises(UserError, match="environment") as caught:
        config.validated(config.Config, {}, [f"{key}={value}"])
    assert key in str(caught.value) and "planted" not in str(caught.value)
