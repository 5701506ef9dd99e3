"""What is measured of one self-edit after another, what is remembered, and what is kept."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from seal_jax.continual import keeping, report
from seal_jax.continual.matrix import Record, differences, summarize
from seal_jax.continual.memory import (
    LOST,
    choose,
    drop_of,
    from_json,
    make_memory,
    mix,
    num_tokens,
    remember,
    replay_counts,
    replayed_in,
    rescore,
    to_json,
)
from seal_jax.continual.retrieval import make_index, route
from seal_jax.continual.sequences import make_sequences
from seal_jax.hosts.files import write_json
from seal_jax.inner.texts import Text, text_of
from seal_jax.tasks.task import Exam, Problem
from seal_jax.types import Adapters


def record_of(scores: np.ndarray, **other) -> Record:
    """Return a record of these scores, f[S N+1 N], with a control set and costs."""
    S, _, N = scores.shape
    fields = {
        "sequences": [[f"p{s}-{i}" for i in range(N)] for s in range(S)],
        "control": np.full((S, N + 1), 0.5),
        "perplexity": np.full((S, N + 1), 10.0),
        "seconds": np.full(N, 2.0),
        "num_bytes": np.full(N, 1e6),
    }
    return Record(scores=scores, **(fields | other))


def with_replay(rows, memory, share, key, extra=False):
    """Return a job's rows as an edit trains on them."""
    counts = replay_counts(rows, share, extra) if memory.entries else [0] * len(rows)
    old = choose(memory, key, num_texts=sum(counts)) if sum(counts) else ()
    return mix(rows, counts, [Text(entry.tokens, entry.loss_mask) for entry in old], extra)


def scores_of(S: int, N: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(S, N + 1, N))


def test_the_published_matrix_gives_the_published_figures(shared_data):
    """The authors did not ask of problems still to come: their file has 0 there."""
    found = json.loads((shared_data / "forgetting_reference.json").read_text())
    scores = np.array(found["mean_over_sequences"])[None]
    scores[0, 1:][np.triu_indices(8, 1)] = np.nan
    summary = summarize(record_of(scores))
    means = {name: one["mean"] for name, one in summary["figures"].items()}
    assert means["unedited"] == pytest.approx(0.307, abs=6e-4)
    assert means["diagonal"] == pytest.approx(0.415, abs=6e-4)
    assert means["final"] == pytest.approx(0.247, abs=6e-4)
    assert means["backward_transfer"] == pytest.approx(-0.191, abs=6e-4)
    ages = [100 * row["minus_unedited"]["mean"] for row in summary["by_age"]]
    published = [10.7, 5.2, -2.6, -6.6, -6.9, -10.0, -12.4, -14.2]
    assert ages == pytest.approx(published, abs=0.06)
    assert summary["figures"]["forward_transfer"]["why"] == "not asked"
    assert "benefit is gone after 2 more edit(s)" in report.to_markdown(
        summary | {"name": "the authors' runs", "notes": []}
    )


def test_figures_are_what_their_definitions_say():
    M = scores_of(4, 3)
    summary = summarize(record_of(M))
    N, means = 3, {name: one["mean"] for name, one in summary["figures"].items()}
    backward = [sum(m[N, i] - m[i + 1, i] for i in range(N - 1)) / (N - 1) for m in M]
    forward = [
        np.mean([np.mean([m[k, i] - m[0, i] for i in range(k, N)]) for k in range(1, N)]) for m in M
    ]
    assert means["backward_transfer"] == pytest.approx(np.mean(backward))
    assert means["forward_transfer"] == pytest.approx(np.mean(forward))
    assert summary["forward_rows"] == 2
    second = summary["by_age"][1]
    assert second["num_problems"] == 2
    aged = [np.mean([m[2, 0] - m[1, 0], m[3, 1] - m[2, 1]]) for m in M]
    assert second["minus_diagonal"]["mean"] == pytest.approx(np.mean(aged))
    # Student's t with 3 degrees of freedom: 3.182.
    half = 3.182446 * np.std(backward, ddof=1) / 2
    found = summary["figures"]["backward_transfer"]
    assert found["interval"] == pytest.approx([found["mean"] - half, found["mean"] + half])
    cell = M[:, 2, 1]
    assert summary["matrix"]["mean"][2][1] == pytest.approx(cell.mean())
    assert summary["matrix"]["half_width"][2][1] == pytest.approx(3.182446 * cell.std(ddof=1) / 2)
    json.dumps(summary, allow_nan=False)


def test_what_was_not_asked_is_not_a_figure():
    M = scores_of(3, 4)
    whole = summarize(record_of(M))
    M[:, 2, 3] = np.nan  # of forward transfer only
    M[:, 3, 0] = np.nan  # at age 2
    summary = summarize(record_of(M))
    for name in ("final", "diagonal", "unedited", "backward_transfer"):
        assert summary["figures"][name] == whole["figures"][name]
    assert (summary["forward_rows"], whole["forward_rows"]) == (2, 3)
    assert [row["num_problems"] for row in summary["by_age"]] == [4, 3, 1, 1]
    M[:, 4, 1] = np.nan
    figures = summarize(record_of(M))["figures"]
    for name in ("final", "backward_transfer", "final_minus_unedited"):
        assert figures[name]["mean"] is None and figures[name]["why"] == "not asked"
    assert figures["diagonal"] == whole["figures"]["diagonal"]


def test_one_edit_has_no_backward_transfer_and_a_diverged_model_no_perplexity():
    perplexity = np.array([[9.0, np.inf], [9.0, 9.0], [9.0, 9.0]])
    figures = summarize(record_of(scores_of(3, 1), perplexity=perplexity))["figures"]
    assert figures["backward_transfer"]["why"] == "not asked"
    assert figures["log_perplexity_change"]["why"] == "not finite"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": scores_of(2, 2)[:, :2]}, r"scores: expected shape \(2, 3, 2\)"),
        ({"control": np.full((2, 3), np.inf)}, "control: found an infinite value"),
        ({"seconds": np.array([1.0, np.nan])}, "seconds: expected a number for every edit"),
        ({"sequences": [["a"], ["b", "c"]]}, r"2 of lengths \[1, 2\]"),
        ({"sequences": []}, "found 0"),
        (
            {"scores": np.where(np.arange(12).reshape(2, 3, 2) == 11, np.nan, 0.5)},
            r"scores\[1, 2, 1\]: asked in sequence 1 or in sequence 0",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        summarize(record_of(scores_of(2, 2))._replace(**change))


def test_differences_are_paired_by_sequence():
    level = np.linspace(0.1, 0.8, 6)[:, None, None]  # sequences differ much
    one, other = (
        summarize(record_of(level + 0.01 * scores_of(6, 2, seed) + shift))
        for seed, shift in ((0, 0.05), (1, 0.0))
    )
    low, high = differences(one, other)["final"]["interval"]
    assert 0.03 < low < high < 0.07
    wide_low, wide_high = one["figures"]["final"]["interval"]
    assert wide_high - wide_low > 10 * (high - low)
    with pytest.raises(ValueError, match="different sequences"):
        differences(one, other | {"sequences": one["sequences"][::-1]})


def test_growth_of_cost_is_not_hidden_by_compilation():
    seconds = np.concatenate([[60.0], 1 + 0.1 * np.arange(1, 9)])
    cost = summarize(record_of(scores_of(2, 9), seconds=seconds))["cost"]
    assert cost["seconds"]["growth"] > 1.2
    assert cost["seconds"]["slope"] == pytest.approx(0.1, rel=0.2)
    assert cost["bytes"]["growth"] == 1.0 and cost["bytes"]["slope"] == 0.0


def test_the_report_says_what_it_shows(tmp_path):
    fall = np.linspace(1.0, 0.0, 12)[:, None] * np.ones((1, 11))
    scores = 0.01 * scores_of(3, 11) + 0.5 * fall[None]
    scores[:, 3, 7] = np.nan
    notes = ["The gate refused 2 of 33 edits."]
    report.write_report(
        record_of(scores), str(tmp_path), "plain merging", notes, num_refused=[0, 2, 0]
    )
    text = (tmp_path / "summary.md").read_text()
    assert "they know less than without any: -50." in text
    assert notes[0] in text and "9 of 10 rows" in text
    assert text.count("\n| 8 | 3 |") == 1  # at age 8 three problems, all ages in the table
    assert (tmp_path / "summary.png").read_bytes()[:4] == b"\x89PNG"
    assert report.read_summary(str(tmp_path))["num_refused"] == [0, 2, 0]
    with pytest.raises(ValueError, match="its own figures"):
        report.write_report(record_of(scores), str(tmp_path), "x", figures=1)


def test_runs_are_compared_with_a_named_one(tmp_path):
    folders = []
    for number, (name, shift) in enumerate((("plain", 0.0), ("replay", 0.2), ("gate", 0.0))):
        folder = tmp_path / name
        folder.mkdir()
        folders.append(str(folder))
        scores = 0.5 * scores_of(5, 3, seed=7)
        scores[:, 3] += shift + 0.001 * scores_of(5, 3, seed=number)[:, 0]
        record = record_of(scores, seconds=np.full(3, 2.0 + number))
        summary = summarize(record) | {"kind": report.KIND, "name": f"{name} rule"}
        write_json(folder / "summary.json", summary)
    text, found = report.compare(folders, f"{folders[0]}/")
    against = found["runs"][folders[1]]["differences"]
    assert against["final"]["mean"] == pytest.approx(0.2, abs=0.01)
    assert against["final"]["interval"][0] > 0.19
    assert against["diagonal"]["mean"] == pytest.approx(0.2 / 3, abs=0.01)
    assert found["runs"][folders[1]]["seconds_ratio"] == pytest.approx(1.5)
    assert "| replay rule (replay) |" in text and "| minus plain rule |" in text
    json.dumps(found, allow_nan=False)
    for folders_asked, minus, error, message in (
        ([folders[0], folders[0] + "/"], folders[0], ValueError, "asked for twice"),
        (folders, str(tmp_path), ValueError, "expected one of the runs"),
        ([str(tmp_path)], str(tmp_path), FileNotFoundError, "summary.json"),
    ):
        with pytest.raises(error, match=message):
            report.compare(folders_asked, minus)
    (tmp_path / "summary.json").write_text('{"arms": {}}')
    with pytest.raises(ValueError, match="expected the summary of `seal-jax continual`"):
        report.compare([str(tmp_path)], str(tmp_path))


def texts_of(edit: int, num: int, length: int = 4) -> list[tuple[str, Text]]:
    return [(f"{edit}.{i}", text_of(range(1, length + 1))) for i in range(num)]


def remembered(kind: str, edits: int, per_edit: int, max_tokens: int, seed: int = 0):
    memory = make_memory(kind, max_tokens)
    for edit in range(edits):
        memory = remember(memory, edit, texts_of(edit, per_edit), (seed, edit))
    return memory


@pytest.mark.parametrize("kind", ["reservoir", "per_problem", "most_forgotten"])
def test_a_memory_keeps_its_budget_and_is_read_again_as_it_was(kind):
    memory = remembered(kind, edits=9, per_edit=3, max_tokens=26)
    assert num_tokens(memory) == 24 and memory.num_seen == 27
    memory = rescore(memory, np.linspace(-1, -2, 6))
    again = from_json(json.loads(json.dumps(to_json(memory), allow_nan=False)), "state.json")
    assert again == memory
    grown = remember(memory, 9, texts_of(9, 3), (0, 9))
    assert remember(again, 9, texts_of(9, 3), (0, 9)) == grown
    # What is kept is as if all texts had been there at once.
    everything = remembered(kind, edits=10, per_edit=3, max_tokens=1000)
    kept = {entry.text for entry in grown.entries}
    first = sorted(everything.entries, key=lambda entry: entry.rank)[:6]
    if kind == "reservoir":
        assert kept == {entry.text for entry in first}
    else:
        assert {entry.edit for entry in grown.entries} <= set(range(10)) and len(kept) == 6
        assert len({entry.edit for entry in grown.entries}) == 6


def test_a_reservoir_is_uniform_and_per_problem_is_even():
    counts, early = np.zeros(8), 0
    for seed in range(400):
        for entry in remembered("reservoir", 8, 1, 8, seed).entries:
            counts[entry.edit] += 1
        for entry in remembered("per_problem", 3, 1, 4, seed).entries:
            early += entry.edit == 0
    assert np.abs(counts - 100).max() < 4.5 * math.sqrt(400 * 0.25 * 0.75)
    assert 100 < early < 167
    uneven = make_memory("per_problem", 24)
    for edit, num in enumerate((12, 1, 5)):
        uneven = remember(uneven, edit, texts_of(edit, num), (edit,))
    edits = [entry.edit for entry in uneven.entries]
    assert sorted(map(edits.count, (0, 1, 2))) == [1, 2, 3] and edits.count(1) == 1


def test_the_most_forgotten_come_first():
    memory = remembered("most_forgotten", edits=5, per_edit=1, max_tokens=100)
    memory = rescore(memory, [-1.0] * 5)
    now = {0: -1.1, 1: -3.0, 2: math.nan, 3: -0.5, 4: -2.0}
    memory = rescore(memory, [now[entry.edit] for entry in memory.entries])
    assert [entry.edit for entry in choose(memory, (1,), num_texts=7)] == [2, 1, 4, 0, 3, 2, 1]
    worst = choose(memory, (1,), num_texts=1)[0]
    assert worst.last == LOST and drop_of(worst) == pytest.approx(-1 - LOST)
    with pytest.raises(ValueError, match="4 scores for 5 texts"):
        rescore(memory, [0.0] * 4)


def test_choosing_is_decided_by_its_key():
    memory = remembered("reservoir", edits=6, per_edit=2, max_tokens=1000)
    one = choose(memory, (3, 1), num_texts=30)
    assert one == choose(memory, (3, 1), num_texts=30) != choose(memory, (3, 2), num_texts=30)
    times = [sum(entry.text == other.text for other in one) for entry in memory.entries]
    assert sorted(set(times)) == [2, 3]
    assert choose(make_memory("reservoir", 5), (0,), num_texts=3) == ()


@pytest.mark.parametrize("extra", [False, True])
def test_replay_keeps_its_share_with_the_same_shapes_in_every_sequence(extra):
    own = text_of([9] * 4)
    for batch, share in ((1, 0.25), (4, 0.1), (3, 0.5)):
        rows = [(own,) * batch] * 40
        shapes = []
        for kind, edits in (("reservoir", 1), ("per_problem", 7)):
            memory = remembered(kind, edits, per_edit=2, max_tokens=1000)
            mixed = with_replay(rows, memory, share, (5, edits), extra)
            old = sum(text != own for row in mixed for text in row)
            assert old == pytest.approx(share * sum(map(len, mixed)), abs=1)
            assert extra or list(map(len, mixed)) == [batch] * 40
            assert not extra or all(row.count(own) == batch for row in mixed)
            shapes.append([(len(row), row.count(own)) for row in mixed])
        assert shapes[0] == shapes[1]
    short = [(own,) * 4, (own,)]  # the rest of an epoch keeps a text of its own
    assert [row.count(own) for row in with_replay(short, memory, 0.5, (1,))] == [2, 1]
    assert with_replay(rows, make_memory("reservoir", 9), 0.5, (1,)) == tuple(rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_memory("reservoir", 0), "a memory of 0 tokens"),
        (lambda: make_memory("reservoir", -3), "a memory of -3 tokens"),
        (lambda: make_memory("newest", 9), "'newest': expected one of reservoir, per_problem"),
        (lambda: replayed_in(0, 4, 1.0), "share of 1.0"),
        (lambda: replayed_in(0, 4, math.nan), "share of nan"),
        (lambda: choose(make_memory("reservoir", 9), (0,), num_texts=0), "num_texts is 0"),
        (lambda: from_json({"kind": "reservoir"}, "state.json"), "state.json: no memory"),
        (
            lambda: remember(remembered("reservoir", 2, 1, 99), 1, texts_of(1, 1), (0,)),
            "edit 1 is in this memory already",
        ),
    ],
)
def test_a_memory_refuses_what_it_cannot_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_text_longer_than_the_memory_is_counted():
    memory = remember(make_memory("reservoir", 6), 0, [*texts_of(0, 1), *texts_of(0, 2, 7)], (0,))
    assert (len(memory.entries), memory.num_seen, memory.num_too_long) == (1, 3, 2)


def adapters_of(S: int = 3, L: int = 2, fan_in: int = 5, fan_out: int = 4) -> Adapters:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(S, L, 2, fan_in)), rng.normal(size=(S, L, 2, fan_out))
    a, b = a.astype(np.float32), b.astype(np.float32)
    return Adapters({"attn": {"q_proj": {"a": a, "b": b}}}, np.array([1, 2, 3], np.float32))


def params_of(S: int = 3, L: int = 2, fan_in: int = 5, fan_out: int = 4) -> dict:
    rng = np.random.default_rng(1)
    kernels = rng.normal(size=(L, S, fan_in, fan_out)).astype(np.float32)
    layers = {
        f"layers_{i}": {"attn": {"q_proj": {"kernel": kernels[i]}, "norm": {"scale": kernels[0]}}}
        for i in range(L)
    }
    return layers | {"embed": kernels[0]}


def test_a_refused_edit_leaves_nothing_behind_even_if_it_is_not_finite():
    deltas = {"attn": {"q_proj": np.full((2, 1, 2, 2), np.nan, np.float32)}}
    found = np.asarray(keeping.scaled(deltas, np.array([0.0, 1.0]))["attn"]["q_proj"])
    assert (found[0] == 0).all() and np.isnan(found[1]).all()
    deltas["attn"]["q_proj"][:] = 3
    found = np.asarray(keeping.scaled(deltas, np.array([0.5, 2.0]))["attn"]["q_proj"])
    assert (found[0] == 1.5).all() and (found[1] == 6).all()


@pytest.mark.parametrize("density", [0.05, 0.3, 0.85])
def test_trimming_keeps_exactly_the_largest(density):
    rng = np.random.default_rng(2)
    values = rng.normal(size=(2, 3, 6, 7)).astype(np.float32)
    values[0, 0] = np.round(values[0, 0])  # many of one magnitude
    values[1, 1] = 0
    found = np.asarray(keeping.trim({"mlp": {"up_proj": values}}, density)["mlp"]["up_proj"])
    num = round(density * 42)
    for x, kept in zip(values.reshape(6, 42), found.reshape(6, 42), strict=True):
        first = np.argsort(-np.abs(x), kind="stable")[:num]  # of equal ones those that come first
        expected = np.zeros(42, np.float32)
        expected[first] = x[first]
        np.testing.assert_array_equal(kept, expected)


def test_an_average_moves_slowly_and_leaves_the_shared_alone():
    fast, slow = params_of(), params_of()
    slow["embed"] = fast["embed"]
    fast["layers_0"]["attn"]["q_proj"]["kernel"] = slow["layers_0"]["attn"]["q_proj"]["kernel"] + 1
    found = keeping.ema(slow, fast, 0.9)
    before = slow["layers_0"]["attn"]["q_proj"]["kernel"]
    np.testing.assert_allclose(
        found["layers_0"]["attn"]["q_proj"]["kernel"], before + 0.1, rtol=1e-5, atol=1e-6
    )
    assert found["embed"] is fast["embed"]
    same = found["layers_1"]["attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(same, slow["layers_1"]["attn"]["q_proj"]["kernel"])


def test_a_fresh_adapter_spans_what_the_last_one_read():
    last = adapters_of()
    fresh = keeping.init_from_last(last)
    a, b = (np.asarray(fresh.weights["attn"]["q_proj"][name]) for name in "ab")
    before = last.weights["attn"]["q_proj"]["a"]
    assert not b.any() and a.shape == before.shape
    for s, i in np.ndindex(3, 2):
        np.testing.assert_allclose(a[s, i] @ a[s, i].T, np.eye(2), atol=1e-6)
        np.testing.assert_allclose(before[s, i] @ a[s, i].T @ a[s, i], before[s, i], atol=1e-5)
        assert (np.diag(a[s, i] @ before[s, i].T) > 0).all()  # so it is unique
    with pytest.raises(ValueError, match="rank 2 is larger"):
        keeping.init_from_last(adapters_of(fan_in=1))


def test_the_gate_weighs_what_is_gained_against_what_is_lost():
    scales = (1.0, 0.0, 0.5)
    new = np.array([[0.9, 0.1, 0.6], [0.9, 0.1, 0.6], [0.1, 0.1, 0.1], [np.nan, 0.1, 0.2]])
    old = np.array([[0.7, 0.8, 0.8], [0.0, 0.8, 0.6], [0.8, 0.8, 0.8], [0.8, 0.8, 0.8]])
    gate = keeping.choose_scales(new, old, scales, weight=1.0)
    np.testing.assert_array_equal(gate.scales, np.float32([1.0, 0.5, 0.0, 0.5]))
    np.testing.assert_array_equal(gate.refused, [False, False, True, False])
    careful = keeping.choose_scales(new, old, scales, weight=10.0)
    np.testing.assert_array_equal(careful.scales, np.float32([0.5, 0.0, 0.0, 0.5]))
    assert careful.refused.sum() == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: keeping.choose_scales(z, z, (0.5, 1.0), 1), "expected 0 and others above"),
        (lambda z: keeping.choose_scales(z, z, (0.0, 0.0), 1), "each once"),
        (lambda z: keeping.choose_scales(z, z, (0.0, 1.0), -1), "weight is -1"),
        (lambda z: keeping.choose_scales(z, z, (0.0,), 1), r"scores of \[S 1\]"),
        (lambda z: keeping.choose_scales(z * np.nan, z, (0, 1.0), 1), "not all finite"),
        (lambda z: keeping.trim({}, 0.0), "density is 0.0"),
        (lambda z: keeping.ema(z, z, 1.0), "decay is 1.0"),
        (lambda z: keeping.time_scale(0), "number of an edit is 0"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.zeros((2, 2)))
    assert keeping.time_scale(4) == 0.5


def test_questions_find_their_passage_among_distractors():
    passages = [
        "The ferry at Orrin is red. It has crossed the bay since 1901.",
        "The lighthouse at Orrin is white. Its keeper is called Mabel Tann.",
        "The ferry at Lundholm is blue. It has crossed the strait since 1954.",
        "",
    ]
    asked = {
        "What color is the ferry at Orrin?": 0,
        "Since when has the ferry crossed the strait at Lundholm?": 2,
        "Who is the KEEPER of the lighthouse?": 1,
        "Which river flows through the capital of Peru?": None,
        "?!": None,
    }
    found = route(make_index(passages), list(asked))
    assert [one.passage for one in found] == list(asked.values())
    assert route(make_index([]), ["What?"])[0].passage is None
    twins = make_index(["ferry red", "ferry red"])
    assert route(twins, ["ferry"])[0].passage == 0  # the earliest of equals
    with pytest.raises(ValueError, match="least_coverage is 2"):
        route(twins, ["ferry"], 2)


def problems_of(num: int) -> list[tuple[Problem, Exam]]:
    return [(Problem(f"p{i}", f"t{i}", f"passage {i}"), Exam(f"p{i}", ())) for i in range(num)]


def ids_of(pairs) -> list[str]:
    return [problem.id for problem, _ in pairs]


def test_sequences_share_as_little_as_the_data_allow():
    pairs = problems_of(30)
    found = make_sequences(pairs, num_sequences=4, length=6, num_control=5, seed=3)
    drawn = [name for one in found.problems for name in ids_of(one)]
    assert len(set(drawn)) == 24 and found.num_shared == 0
    assert not set(drawn) & set(ids_of(found.control))
    again = make_sequences(pairs, num_sequences=4, length=6, num_control=5, seed=3)
    assert again == found
    other = make_sequences(pairs, num_sequences=4, length=6, num_control=5, seed=4)
    assert other.problems != found.problems
    crowded = make_sequences(pairs, num_sequences=7, length=10, num_control=5, seed=3)
    assert crowded.control == found.control
    drawn = [name for one in crowded.problems for name in ids_of(one)]
    assert all(len(set(ids_of(one))) == 10 for one in crowded.problems)
    assert {drawn.count(name) for name in drawn} == {2, 3} and crowded.num_shared == 25


def test_a_sequence_longer_than_the_data_is_refused():
    pairs = [*problems_of(8), (Problem("twin", "t", "passage 0"), Exam("twin", ()))]
    with pytest.raises(ValueError, match="needs 9 problems; the task has 8, and 1 more"):
        make_sequences(pairs, num_sequences=1, length=7, num_control=2, seed=0)
    whole = make_sequences(pairs, num_sequences=1, length=6, num_control=2, seed=0)
    assert "twin" not in ids_of((*whole.problems[0], *whole.control))
    with pytest.raises(ValueError, match="length is 0"):
        make_sequences(pairs, num_sequences=1, length=0, num_control=2, seed=0)


def test_the_host_side_needs_no_jax():
    code = (
        "import sys\n"
        "sys.modules['jax'] = None\n"
        "from seal_jax.continual import matrix, memory, retrieval, sequences\n"
        "memory.make_memory('reservoir', 1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
