"""A grid becomes cells, and a cell the config that a user would write."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rar import config
from rar.schema import UserError
from rar.sweep import grid, sources, state
from rar.sweep.plan import dry_run
from rar.sweep.state import chosen

TINY = {
    "base": {"ranker": {"method": "none"}},
    "datasets": {"a": {"config": {"corpus": {"uri": "x"}, "memory": {"support": {"uri": "y"}, "classes": ["one", "two"]}}}},
    "shots": [1, 2],
    "seeds": [0, 1],
    "arms": {
        "text": {"per_shots": False, "config": {"retriever": {"mode": "text"}}},
        "knn": {"config": {"retriever": {"mode": "knn"}}},
    },
}


def tiny(**changes: object) -> grid.Grid:
    return config.validated(grid.Grid, yaml.safe_load(yaml.safe_dump({**TINY, **changes})))


def test_every_combination_is_a_cell_and_names_are_unique() -> None:
    found = grid.cells(tiny(top_k=[3, 5], encoders={"b32": {}, "l14": {}}))
    assert len(found) == 2 * 2 * (1 + 2 * 2) == len({cell.name for cell in found})
    assert found[0].name == "a-0shot-seed0-b32-text-k3"


def test_a_cell_is_the_config_that_a_user_would_write() -> None:
    made = tiny()
    text, knn = grid.cells(made)[0], grid.cells(made)[-1]
    settings = grid.settings_of(made, knn, {}, "m.milvus")
    assert (settings.memory.shots, settings.run.seed, settings.retriever.mode, settings.memory.uri) == (2, 1, "knn", "m.milvus")
    assert settings.retriever.top_k == 5 and settings.ranker.method == "none"
    alone = grid.settings_of(made, text, {})
    assert alone.memory.support is None and alone.memory.classes == ["one", "two"]


def test_a_server_holds_each_memory_by_a_name_of_its_own() -> None:
    made = tiny(base={"ranker": {"method": "none"}, "memory": {"uri": "http://milvus:19530"}})
    settings = grid.settings_of(made, grid.cells(made)[-1], {}, "out/shared/memories/a-2shot-seed1.milvus")
    assert (settings.memory.uri, settings.memory.name) == ("http://milvus:19530", "sweep_a_2shot_seed1")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"arms": {"a-b": {}}}, "is no name"),
        ({"ours": "mine"}, "none of the arms"),
        ({"shot": [1]}, "did you mean 'shots'"),
        ({"datasets": {"a": {"arms": ["clip"]}}}, "none of the arms"),
    ],
)
def test_a_mistake_in_a_grid_is_one_line(change: dict, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted) as caught:
        tiny(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(grid.presets()))
def test_every_preset_gives_cells_with_valid_configs_or_names_what_is_missing(name: str) -> None:
    made = grid.load(name)
    for cell in grid.cells(made):
        source = {"memory": {"classes": ["a"]}, "corpus": {"uri": "x"}} if made.datasets[cell.dataset].config == {} else {}
        if made.datasets[cell.dataset].config and not cell.shots:
            source = {"memory": {"classes": ["a"]}}
        grid.settings_of(made, cell, source)


def test_the_presets_are_those_of_the_contract() -> None:
    assert {"paper-fewshot", "paper-fgvr", "paper-lvis", "paper-v3det", "ablations", "miniature"} <= set(grid.presets())
    with pytest.raises(UserError, match="neither a file nor a preset"):
        grid.load("paper-few")


def test_a_mistyped_key_of_a_piece_is_told_at_once_and_what_is_missing_is_not() -> None:
    sources.check(tiny())  # its pictures are not there
    sources.check(tiny(datasets={"b": {"recorded": "no/such.json"}}))
    wrong = {"retriever": {"mod": "knn"}}
    for change in ({"arms": {"knn": {"config": wrong}}}, {"base": wrong}, {"encoders": {"b32": wrong}}):
        with pytest.raises(
            UserError, match=r"^a-1shot-.*: config: unknown key 'retriever\.mod'; did you mean 'retriever\.mode'\?$"
        ):
            sources.check(tiny(**change))


def test_only_chooses_by_name_and_refuses_what_matches_nothing() -> None:
    every = grid.cells(tiny())
    assert {cell.arm for cell in chosen(every, ["*-knn-*"])} == {"knn"}
    with pytest.raises(UserError, match="matches no cell"):
        chosen(every, ["nothing"])


def test_what_only_leaves_out_has_not_failed(tmp_path: Path) -> None:
    first, second, third = grid.cells(tiny())[:3]
    sweep = state.Sweep(tiny(), tmp_path, {}, failed={first.name: "of another code", third.name: "broken"})
    state.set_aside(sweep, [first, second])
    assert sweep.left == {first.name: "of another code", second.name: "--only"} and sweep.failed == {third.name: "broken"}


def test_a_dry_run_counts_and_touches_nothing(tmp_path: Path) -> None:
    made = tiny()
    for part, name in (("corpus", "x"), ("support", "y")):
        (tmp_path / f"{name}.csv").write_text("uri,label\n" + "".join(f"{n}.jpg,one\n" for n in range(3)))
        config_ = made.datasets["a"].config
        (config_ if part == "corpus" else config_["memory"])[part] = {"uri": str(tmp_path / f"{name}.csv")}
    said = dry_run(made, tmp_path / "out", [], None)
    assert "5 cells, 0 done" in said and "5 memories" in said and "no rate is measured yet" in said
    assert "  a: 3 test pictures" in said and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text('{"done": {"a-1shot-seed0-knn-k5": 360.0}}')
    said = dry_run(made, tmp_path / "out", [], None)
    assert "5 cells, 1 done" in said and "about 0.40 hours" in said  # four more of three pictures, at two minutes each
    (tmp_path / "y.csv").unlink()
    said = dry_run(made, tmp_path / "out", [], None)
    assert "would run 0 cells" in said and "a is not there, and its cells would fail: " in said and "y.csv" in said


sections = st.dictionaries(st.sampled_from("abc"), st.dictionaries(st.sampled_from("xyz"), st.integers()))


@given(sections, sections)
def test_laying_one_piece_over_another_is_a_union_by_section_and_changes_neither(under: dict, over: dict) -> None:
    before = repr((under, over))
    made = grid.merged(under, over)
    assert made == {name: {**under.get(name, {}), **over.get(name, {})} for name in [*under, *over]}
    assert repr((under, over)) == before


@pytest.mark.parametrize(
    ("under", "over", "wanted"),
    [
        ({"a": {"x": 1}}, {"a": None}, {"a": None}),
        ({"a": 1}, {"a": {"x": 2}}, {"a": {"x": 2}}),
        ({"a": {"x": {"y": 1, "z": 2}}}, {"a": {"x": {"y": 3}}}, {"a": {"x": {"y": 3, "z": 2}}}),
    ],
)
def test_values_replace_and_only_mappings_are_joined(under: dict, over: dict, wanted: dict) -> None:
    assert grid.merged(under, over) == wanted
