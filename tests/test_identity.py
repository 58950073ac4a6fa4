"""What decides a prediction counts, what does not is left out, and what differs is said in words.

Not covered: a real hub; its cache is a folder of the real layout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rar import config, identity
from rar.config import Config, Ranker
from rar.engine import client

TUNE = {  # decides an adapter, which has an identity of its own
    "preset": st.sampled_from(["rar", "paper-code"]),
    "corpus": st.none() | st.builds(lambda uri: {"uri": uri}, st.sampled_from(["photos", "drawings"])),
    "others": st.sampled_from([{}, {"birds": "birds.yaml"}]),
    "lengths": st.lists(st.integers(2, 9), max_size=2),
    "loss": st.sampled_from(["labels", "text"]),
    "weights": st.sampled_from(["lora", "full"]),
    **{key: st.booleans() for key in ("shuffle", "gradient_checkpointing", "merged")},
    "vision": st.sampled_from([False, True, "only"]),
    **{key: st.floats(0.1, 0.4) for key in ("novel_classes", "held_out", "easy", "rejections", "anchor", "mass", "listwise")},
    **{key: st.integers(2, 9) for key in ("judged", "max_list", "lora_rank", "lora_alpha", "epochs", "max_steps")},
    **{key: st.integers(1, 9) for key in ("batch_size", "accumulate", "check_every", "workers")},
    "learning_rate": st.floats(1e-6, 1.0),
    "num_gpus": st.none() | st.floats(0, 8),
}
SPEED = {
    "ranker.timeout_s": st.sampled_from([5.0, 60.0]),
    "ranker.attempts": st.integers(1, 9),
    "ranker.cache": st.none() | st.just("answers"),
    "encoder.workers": st.integers(1, 64),
    "encoder.max_workers": st.none() | st.integers(1, 64),
    **{f"{model}.num_cpus": st.none() | st.floats(0, 8) for model in ("encoder", "ranker")},
    **{f"{model}.resources": st.sampled_from([{}, {"large": 0.5}]) for model in ("encoder", "ranker")},
    "encoder.num_gpus": st.none() | st.floats(0, 8),
    "ranker.keep": st.booleans(),
    "run.patience_s": st.floats(1, 900),
    "ranker.min_replicas": st.integers(1, 8),
    "ranker.max_replicas": st.integers(1, 64),
    "ranker.num_gpus": st.floats(0, 8),
    "ranker.in_flight": st.integers(1, 64),
    "ranker.concurrency": st.integers(1, 64),
    "ranker.max_calls": st.none() | st.integers(1, 64),
    "ranker.token_budget": st.none() | st.integers(1, 64),
    "memory.token": st.none() | st.text(max_size=8),
    "serve.host": st.sampled_from(["127.0.0.1", "0.0.0.0"]),
    "serve.endpoints": st.sampled_from([["rank"], ["rank", "recognize"]]),
    "serve.url_prefixes": st.sampled_from([[], ["https://example.org/"]]),
    "serve.support_pictures": st.integers(0, 8),
    "serve.adapters": st.sampled_from([{}, {"birds": "adapters/birds"}]),
    **{
        f"serve.{key}": st.integers(1024, 9999)
        for key in ("port", "max_body_bytes", "max_pixels", "max_candidates", "max_boxes", "max_pictures", "max_queued")
    },
    **{f"serve.{key}": st.integers(1, 9) for key in ("min_gateways", "max_gateways")},
    **{f"serve.{key}": st.floats(0.1, 9) for key in ("timeout_s", "upscale_delay_s", "downscale_delay_s")},
    **{f"tune.{key}": values for key, values in TUNE.items()},
}
RESULT = {
    "corpus": st.none() | st.builds(lambda uri: {"uri": uri}, st.sampled_from(["photos", "drawings"])),
    "encoder.model": st.sampled_from(["miniature", "ViT-B-16/openai"]),
    "encoder.batch_size": st.integers(1, 64),
    "encoder.templates": st.lists(st.sampled_from(["a {}.", "the {}."]), min_size=1, max_size=2),
    "memory.uri": st.sampled_from(["runs/memory.milvus", "http://milvus:19530"]),
    "memory.shots": st.none() | st.integers(1, 16),
    "memory.index.ef": st.integers(8, 512),
    "retriever.mode": st.sampled_from(["fused", "knn"]),
    "retriever.top_k": st.integers(1, 10),
    "ranker.batch_size": st.integers(1, 64),
    "ranker.method": st.sampled_from(["letters", "generate", "none"]),
    "route.mode": st.sampled_from(["calibrated", "always"]),
    "run.shard_size": st.integers(1, 512),
    "run.seed": st.integers(0, 9),
}
METRICS = {
    "detect.score": st.sampled_from(["product", "class"]),
    "detect.style": st.sampled_from(["coco", "lvis"]),
    "detect.classes_per_box": st.integers(1, 9),
    "run.max_failed_fraction": st.floats(0, 1),
    "run.sentence_encoder": st.none() | st.just("all-mpnet-base-v2"),
}


def some_of(values: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.lists(st.sampled_from(sorted(values)), unique=True, max_size=4).flatmap(
        lambda keys: st.fixed_dictionaries({key: values[key] for key in keys})
    )


def with_values(values: dict[str, Any]) -> Config:
    return config.validated(config.Config, {}, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def fingerprint(of: Config) -> str:
    return identity.fingerprint(identity.of_run(of))


@settings(max_examples=25)
@given(some_of(SPEED), some_of(METRICS), some_of(RESULT))
def test_what_decides_speed_or_metrics_alone_is_left_out(
    speed: dict[str, Any], metrics: dict[str, Any], result: dict[str, Any]
) -> None:
    assert identity.of_run(with_values({**speed, **metrics, **result})) == identity.of_run(with_values(result))


@settings(max_examples=25)
@given(some_of(RESULT), some_of(RESULT))
def test_anything_else_changes_the_identity_and_is_named(first: dict[str, Any], second: dict[str, Any]) -> None:
    one, other = with_values(first), with_values(second)
    told = identity.differences(identity.of_run(one), identity.of_run(other))
    assert (not told) == (one == other) == (fingerprint(one) == fingerprint(other))
    changed = {key for key in {*first, *second} if first.get(key) != second.get(key)}
    assert one == other or any(line.startswith(tuple(changed)) for line in told)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_every_other_key_changes_the_identity() -> None:
    """Key by key, so that a key left out by mistake, or a section left out of the hash, is seen."""
    full = Config.model_validate(
        {
            "corpus": {"uri": "a"},
            "memory": {"support": {"uri": "a"}, "classes": ["a"]},
            "detect": {"detector": {"model": "a"}},
            "tune": {"corpus": {"uri": "a"}},
        }
    )
    kept: set[str] = set()
    for key in config._known_keys(Config):
        value = full
        for part in key.split("."):
            value = getattr(value, part)
        if not isinstance(value, config.Strict) and key != "ranker.prompts":  # of that, what the file says counts
            changed = full.model_copy(update=_changed(full, key.split(".")))
            kept |= {key} if fingerprint(changed) == fingerprint(full) else set()
    left_out = {key for key in config._known_keys(Config) if key in identity.SPEED or key.startswith(("serve.", "tune."))}
    left_out -= {"serve", "tune", "tune.corpus"}
    assert kept == left_out | set(identity.METRICS)
    of_detector = {f"detect.detector.{name}" for name in ("workers", "max_workers", "num_gpus", "num_cpus", "resources")}
    named = {*SPEED, *of_detector}  # the table above names them all
    assert named >= {key for key in left_out if not key.startswith("tune.corpus.")}


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_what_decides_an_adapter_is_in_the_identity_of_a_tuning(tmp_path: Path) -> None:
    plain = Config()
    kept = set()
    for key in set(config.Tune.model_fields) - {"others"}:
        changed = plain.model_copy(update=_changed(plain, ["tune", key]))
        kept |= {key} if identity.of_tuning(changed) == identity.of_tuning(plain) else set()
    assert kept == {"workers", "num_gpus", "accumulate", "gradient_checkpointing", "merged"}
    file = tmp_path / "other.yaml"
    file.write_text("run: {seed: 1}")
    first = identity.of_tuning(with_values({"tune.others": {"other": str(file)}}))
    file.write_text("run: {seed: 2}")
    (line,) = identity.differences(first, identity.of_tuning(with_values({"tune.others": {"other": str(file)}})))
    assert line.startswith("tune.others.other was")
    assert identity.of_verb("classify", plain) == identity.of_run(plain)


def test_metrics_have_an_identity_of_their_own() -> None:
    plain = identity.of_metrics(Config())
    assert plain == identity.of_metrics(with_values({"ranker.in_flight": 9, "run.seed": 3, "run.max_failed_fraction": 0.5}))
    for key, value in {"detect.score": "class", "detect.style": "lvis", "detect.classes_per_box": 2}.items():
        assert identity.of_metrics(with_values({key: value})) != plain


def test_the_judge_of_guessed_names_counts_by_what_its_folder_holds(tmp_path: Path) -> None:
    for name, said in (("one", "a"), ("copy", "a"), ("other", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(said)

    def judged_by(name: str, free: bool = True) -> identity.Identity:
        return identity.of_metrics(with_values({"run.vocabulary_free": free, "run.sentence_encoder": str(tmp_path / name)}))

    assert judged_by("one") == judged_by("copy") != judged_by("other")
    assert judged_by("one", free=False) == identity.of_metrics(Config()) != judged_by("one")


def test_prompts_count_by_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "same.yaml").write_text("version: 1\n")
    (tmp_path / "other.yaml").write_text("version: 1\npicture: the photo\n")
    same, other = (Config.model_validate({"ranker": {"prompts": str(tmp_path / f"{n}.yaml")}}) for n in ("same", "other"))
    assert fingerprint(same) == fingerprint(Config()) != fingerprint(other)
    assert identity.differences(identity.of_run(same), identity.of_run(other)) == ["the words of the prompts have changed"]
    answers = [identity.of_answers(one.ranker) for one in (Config(), same, other)]
    assert answers[0] == answers[1] != answers[2]


def _changed(section: config.Strict, keys: list[str]) -> dict[str, Any]:
    """The update that puts "changed" in place of one value, without validation."""
    if len(keys) == 1:
        return {keys[0]: "changed"}
    inner = getattr(section, keys[0])
    return {keys[0]: inner.model_copy(update=_changed(inner, keys[1:]))}


def test_an_identity_that_was_written_down_is_the_same() -> None:
    chosen = with_values({"corpus": {"uri": "photos"}, "run.seed": 3})
    again = Config.model_validate(json.loads(json.dumps(chosen.model_dump(mode="json"), sort_keys=True)))
    assert json.loads(json.dumps(identity.of_run(chosen))) == identity.of_run(again)
    assert len(fingerprint(chosen)) == 16 and int(fingerprint(chosen), 16) >= 0


def weights(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    return folder


def test_weights_count_by_content_wherever_they_lie(tmp_path: Path) -> None:
    old, copy, new = (weights(tmp_path / name, bytes(200_000) + tail) for name, tail in (("a", b"1"), ("b", b"1"), ("c", b"2")))
    assert identity.folder_digest(old) == identity.folder_digest(copy) != identity.folder_digest(new)
    (copy / "README.md").write_text("words")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "lock").touch()
    assert identity.folder_digest(old) == identity.folder_digest(copy)
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    assert identity.folder_digest(old) != identity.folder_digest(copy)


def test_weights_replaced_in_their_folder_are_named(tmp_path: Path) -> None:
    chosen = Config.model_validate(
        {
            "encoder": {"model": str(weights(tmp_path / "clip", b"one"))},
            "ranker": {"model": str(weights(tmp_path / "mllm", b"one")), "adapter": str(weights(tmp_path / "lora", b"one"))},
            "detect": {"detector": {"model": str(weights(tmp_path / "owl", b"one"))}},
        }
    )
    before, app, answers = identity.of_run(chosen), client.app_name(chosen.ranker), identity.of_answers(chosen.ranker)
    for folder, name in (("clip", "encoder"), ("mllm", "ranker"), ("lora", "adapter"), ("owl", "detector")):
        weights(tmp_path / folder, b"two")
        assert identity.differences(before, identity.of_run(chosen)) == [f"the weights of the {name} have changed"]
        asked = name in ("ranker", "adapter")
        assert (client.app_name(chosen.ranker) != app) == (identity.of_answers(chosen.ranker) != answers) == asked
        weights(tmp_path / folder, b"one")
    assert identity.of_run(chosen) == before and client.app_name(chosen.ranker) == app


def test_a_name_is_told_without_joining_a_ray_that_is_about(tmp_path: Path) -> None:
    code = """
import ray
from rar import config
from rar.engine import client
print(client.app_name(config.Ranker()), ray.is_initialized())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.endswith(" False\n")


def test_large_weights_are_sampled_over_their_whole_length_and_read_once(tmp_path: Path) -> None:
    file = weights(tmp_path, b"") / "model.safetensors"
    size = 4 * identity.WHOLE_BYTES
    os.truncate(file, size)  # sparse: takes no room
    digests = [identity.folder_digest(tmp_path)]
    for place in (0, size // 2, size - 1):  # a stretch of 2 MiB, as a layer is, wherever it lies
        with file.open("r+b") as stream:
            stream.seek(max(0, place - (2 << 20)))
            stream.write(os.urandom(min(2 << 20, size - stream.tell())))
        os.utime(file, ns=(place + 1, place + 1))
        digests.append(identity.folder_digest(tmp_path))
    assert len(set(digests)) == 4
    read = identity._file_digest.cache_info().misses
    assert identity.folder_digest(tmp_path) == digests[-1]
    assert identity._file_digest.cache_info().misses == read  # known by path, size and time stamp


def test_hub_names_count_by_the_commit_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    chosen = Config(ranker=Ranker(model="maker/model"))
    identity._hub_commit.cache_clear()
    unknown = identity.of_run(chosen)
    assert unknown["weights"]["ranker"] is None
    refs = tmp_path / "models--maker--model" / "refs"
    refs.mkdir(parents=True)
    known = []
    for commit in ("c0ffee", "decade"):
        (refs / "main").write_text(commit)
        identity._hub_commit.cache_clear()
        known.append(identity.of_run(chosen))
    identity._hub_commit.cache_clear()
    assert known[0]["weights"]["ranker"] == "c0ffee"
    assert identity.differences(unknown, known[0]) == []  # fetched since
    assert identity.completed(unknown, known[0])["weights"] == known[0]["weights"]
    assert identity.differences(known[0], known[1]) == ["the weights of the ranker have changed"]


def test_weights_that_are_not_asked_do_not_count(tmp_path: Path) -> None:
    base = "http://127.0.0.1:1/v1"
    for unasked in (Ranker(method="none"), Ranker(method="endpoint", base_url=base)):
        assert identity.of_run(Config(ranker=unasked))["weights"].keys() == {"encoder"}
    assert identity.of_run(Config(encoder=config.Encoder(model="ViT-B-16/openai")))["weights"]["encoder"].startswith("ViT-B-16")


def test_code_and_memory_are_named(tmp_path: Path) -> None:
    known = {**identity.of_run(Config()), "memory": "a"}
    now = {**known, "code": {**known["code"], "crops": "0", "fusion": "0"}, "memory": "b"}
    assert identity.differences(known, now) == ["rar itself has changed (crops, fusion)", "the memory has changed (a, now b)"]
    assert identity.differences(identity.of_run(Config()), known) == []  # no memory is known yet
    assert {"ranker", "encoder", "engine/models"} <= known["code"].keys() and "evaluation" not in known["code"]


def test_answers_and_applications_share_what_decides_them() -> None:
    plain = Ranker(method="generate")
    same = Ranker(method="generate", in_flight=9, cache="elsewhere")
    others = [Ranker(method="letters"), Ranker(method="generate", max_new_tokens=3), Ranker(method="generate", model="x")]
    assert identity.of_answers(same) == identity.of_answers(plain) and client.app_name(same) == client.app_name(plain)
    for other in others:
        assert identity.of_answers(other) != identity.of_answers(plain) and client.app_name(other) != client.app_name(plain)
    assert identity.of_answers(plain, "prior") != identity.of_answers(plain)
    replicas = Ranker(method="generate", max_replicas=3)  # the same answers, but served by more
    assert identity.of_answers(replicas) == identity.of_answers(plain) and client.app_name(replicas) != client.app_name(plain)
    assert client.app_name(plain, config.Serve()).startswith("online-")
