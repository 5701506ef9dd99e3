"""How likely gold answers are, scored at once, by turns, or one by one."""

import jax
import numpy as np
import pytest

from seal_jax.inner.texts import text_of
from seal_jax.outer.answers import mean_logp
from seal_jax.sharding import make_mesh
from seal_jax.sources import load_model


def test_scores_do_not_depend_on_how_many_rows_there_are_at_once():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = load_model("random:byte-tiny", mesh=mesh)
    encode = model.tokenizer.encode
    asked = [["who built it?", "when?", "of what?"], ["where?"]]
    texts = []
    for i, group in enumerate(asked):
        prompts = [encode(question) for question in group]
        texts.append([text_of(p + encode(f"gold {i}", start=False), len(p)) for p in prompts])
    at_once = mean_logp(model, model.params, None, texts, mesh=mesh)
    by_turns = mean_logp(model, model.params, None, texts, mesh=mesh, max_rows=3)
    assert [len(group) for group in by_turns] == [3, 1]
    for found in (at_once, by_turns):
        for group, values in zip(texts, found, strict=True):
            alone = [mean_logp(model, model.params, None, [[t]], mesh=mesh)[0][0] for t in group]
            np.testing.assert_allclose(values, alone, rtol=1e-5)
    assert at_once[0][0] != pytest.approx(at_once[0][1])
