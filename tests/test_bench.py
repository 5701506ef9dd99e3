"""The benchmarks' arithmetic and work; the timings themselves are nobody's to assert."""

import itertools
import json

import numpy as np
import pytest

from seal_jax.bench import inner, sample
from seal_jax.bench.timing import TooLarge, interleave, matmul_params
from seal_jax.commands.main import main
from seal_jax.inner.texts import row_length
from seal_jax.sources import load_model


@pytest.fixture(scope="module")
def model():
    return load_model("random:byte-tiny")


def test_the_work_is_like_the_published_one():
    """The authors' self-edits have 5 to 16 texts, the last of them the passage."""
    edits = inner.self_edits()
    assert len(edits) == 36
    assert 5 <= np.mean([len(texts) for texts in edits]) <= 10
    for texts in edits:
        assert all(sentence.split("\n")[1] in texts[-1] for sentence in texts)


def test_ratios_are_those_of_seconds_per_token(model):
    per_token = {
        "population_1_float32": 6.0,
        "population_8_float32": 3.0,
        "population_1_bfloat16": 4.0,
        "population_8_bfloat16": 2.0,
        "peft_float32": 8.0,
        "peft_bfloat16": 6.0,
        "padded_float32": 100.0,
    }
    peaks = {"float32": 1e9, "bfloat16": 2e9}
    figures = inner._figures(model, per_token, peaks, sizes=(1, 8))
    assert figures["ratios"] == {"as_published": 50.0, "tuned_peft": 3.0, "one_at_a_time": 2.0}
    assert figures["num_adapters"] == 8 and figures["dtype"] == "bfloat16"
    params = matmul_params(model.config)
    c = model.config
    layer = 2 * c.embed_dim * (c.num_heads + c.num_kv_heads) * c.head_dim
    layer += 3 * c.embed_dim * c.mlp_dim
    assert params == c.num_layers * layer + c.vocab_size * c.embed_dim
    # Each dtype's share is of its own peak.
    assert figures["share_of_peak"] == pytest.approx(4 * params / 3.0 / 1e9)
    assert figures["shares_of_peak"]["bfloat16"] == pytest.approx(4 * params / 2.0 / 2e9)
    without = {name: x for name, x in per_token.items() if name.startswith("population")}
    ratios = inner._figures(model, without, peaks, sizes=(1, 8))["ratios"]
    assert ratios["tuned_peft"] is None and ratios["as_published"] is None


def test_a_population_is_timed_on_its_own_texts(model):
    edits = [[list(range(1, n)) for n in (9, 30, 17)] for _ in range(3)]
    jobs = inner._jobs(edits, 5, num_epochs=1)
    assert len(jobs) == 5 and all(sum(map(row_length, job.rows)) == 53 for job in jobs)
    call, start, num_tokens, of_run = inner._population(model, edits, 5, num_tokens=200)
    _, losses = call()
    assert num_tokens >= 200 and np.isfinite(losses[0]).all()
    assert start()[1] == [] and of_run == 5 * 10 * 53


def test_a_contestant_without_memory_is_left_out(capsys):
    calls = []

    def too_large():
        raise TooLarge("CUDA out of memory")

    contestants = {"a": lambda: calls.append("a"), "b": too_large, "c": lambda: calls.append("c")}
    assert interleave(contestants, rounds=2).keys() == {"a", "c"}
    assert calls == ["a", "c"] * 3
    assert "b is left out: CUDA out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("timed", [1, 3])
def test_an_interrupted_benchmark_keeps_what_all_have(capsys, timed):
    """Of two contestants: the first round is not timed."""
    count = itertools.count()

    def call():
        if next(count) == 2 + timed:
            raise KeyboardInterrupt

    contestants = {"a": call, "b": call}
    if timed < 2:
        with pytest.raises(KeyboardInterrupt):
            interleave(contestants, rounds=9)
    else:
        assert interleave(contestants, rounds=9).keys() == {"a", "b"}
        assert "interrupted in round 2 of 9" in capsys.readouterr().out


def test_an_unknown_benchmark_is_refused(capsys):
    assert main(["bench", "outer"]) == 2
    assert "no benchmark 'outer'; there are inner" in capsys.readouterr().err


@pytest.mark.long
def test_the_quick_benchmark_writes_its_figures(tmp_path, capsys):
    assert main(["bench", "inner", "--quick", "--json", str(tmp_path / "inner.json")]) == 0
    figures = json.loads((tmp_path / "inner.json").read_text())
    assert figures["ratios"].keys() == {"as_published", "tuned_peft", "one_at_a_time"}
    assert figures["waste"] < 1.3 and figures["compiles"] <= 6
    assert "share of the float32 matmul peak" in capsys.readouterr().out


@pytest.mark.long
def test_the_quick_benchmark_of_a_sweep_writes_its_figures(tmp_path):
    """A population gives each setting the scores that it has alone."""
    assert main(["bench", "tune", "--quick", "--json", str(tmp_path / "tune.json")]) == 0
    figures = json.loads((tmp_path / "tune.json").read_text())
    assert figures["ratios"].keys() == {"one_by_one", "constants", "processes"}
    assert figures["num_settings"] == 4 and figures["largest_difference_of_scores"] < 1e-3


def test_all_write_the_same_number_of_tokens(model):
    works = sample.make_works(model, quick=True)
    assert works["many_edits"].num_rows == 12 and works["one_row"].num_rows == 1
    assert len(works["many_adapters"].prompts) == 8
    for name, work in works.items():
        work = work._replace(num_tokens=2)
        written = sample._write(model, work, sample._adapters(model, work))
        assert written.mask.shape == (work.num_rows, 2) and written.mask.all(), name


def test_a_decode_step_s_limit_is_memory_or_products(model):
    work = sample.Work([[[1] * 10] * 4], 22)  # one prompt of four rows, and half of what they write
    params, c = matmul_params(model.config), model.config
    cache = 2 * c.num_layers * c.num_kv_heads * c.head_dim * (10 + 4 * 11)
    slow_memory = sample._limit(model, work, bandwidth=1e3, peak=1e15)
    assert slow_memory == pytest.approx(4 * (params + cache) / 1e3)
    assert sample._limit(model, work, 1e15, peak=1e6) == pytest.approx(2 * params * 4 / 1e6)


@pytest.mark.long
def test_the_quick_benchmark_of_generation_writes_its_figures(tmp_path):
    assert main(["bench", "sample", "--quick", "--json", str(tmp_path / "sample.json")]) == 0
    figures = json.loads((tmp_path / "sample.json").read_text())
    assert figures["ratios"].keys() == {"many_edits", "many_adapters", "one_row"}
    assert figures["compiles"] <= 6 and figures["share_of_limit"] > 0
