"""How pi0-FAST chooses tokens: whole chunks and nothing else, drawn alike in both frameworks."""

from __future__ import annotations

import importlib
import logging

import numpy as np
import pytest
from frameworks import NAMES, Framework, golden_reference
from tiny_fast import TINY, batch_of_prompts, grammar, sequence

from openpi_port import grammar as grammars
from openpi_port import init
from openpi_port.grammar import EOS, Grammar
from openpi_port.tokenizers.fast import MalformedTokens


@pytest.fixture(scope="module", params=NAMES)
def framework(request):
    return Framework(request.param)


def test_frameworks_draw_the_same_tokens(golden):
    reference = golden_reference(golden / "openpi" / "pi0_fast")
    models = [Framework(n).load(reference.config, reference.weights) for n in NAMES]
    batch = {**reference.batch, "image_mask": {c: np.ones(2, bool) for c in reference.batch["image_mask"]}}
    drawn = {}
    for temperature, rng in [(1.0, 0), (1.0, 1), (0.3, 0), (5.0, 2)]:
        a, b = (m.decode(batch, 12, temperature, rng) for m in models)
        np.testing.assert_array_equal(a, b)
        drawn[temperature, rng] = a
    assert not np.array_equal(drawn[1.0, 0], drawn[1.0, 1])
    greedy = models[1].decode(batch, 12)
    np.testing.assert_array_equal(models[1].decode(batch, 12, 1e-4), greedy)
    a = models[1].decode(batch, 12, 1.0, np.random.default_rng(7))
    np.testing.assert_array_equal(a, models[1].decode(batch, 12, 1.0, np.random.default_rng(7)))


def test_choose_follows_the_distribution(framework):
    """Draws spread over the probabilities; what is forbidden never comes, at no draw."""
    choose = importlib.import_module(f"openpi_port.pi_{framework.name}.pi0_fast").choose
    probs = np.array([0.5, 0.0, 0.25, 0.125, 0.125], np.float32)
    draws = np.append((np.arange(1000) + 0.5) / 1000, [0, 1 - 2**-20]).astype(np.float32)
    scores = np.log(probs, where=probs > 0, out=np.full(5, -np.inf, np.float32))[None].repeat(len(draws), 0)
    allowed = np.ones_like(scores, bool)
    count = lambda t: np.bincount(framework.numpy(t)[:1000], minlength=5)  # noqa: E731
    arrays = framework.array((scores, allowed, draws))
    np.testing.assert_array_equal(count(choose(arrays[0], arrays[1], 1.0, arrays[2])), [500, 0, 250, 125, 125])
    allowed[:, [0, 4]] = False
    arrays = framework.array((scores, allowed, draws))
    tokens = framework.numpy(choose(arrays[0], arrays[1], 1.0, arrays[2]))
    assert set(tokens) == {2, 3}
    squared = count(choose(arrays[0], arrays[1], 0.5, arrays[2]))  # a quarter against a sixteenth
    np.testing.assert_allclose(squared / 1000, [0, 0, 0.8, 0.2, 0], atol=1e-3)


def malformed(tokens: np.ndarray) -> int:
    """How many rows are no chunk."""
    count = 0
    for row in tokens:
        try:
            sequence().decode_actions(grammars.until_end(row), TINY.action_horizon, TINY.action_dim)
            count += EOS not in row
        except MalformedTokens:
            count += 1
    return count


def test_a_thousand_decodes(framework):
    """Random weights, hot and cold, with room and without: with the grammar every one is a chunk."""
    model = framework.load(TINY, init.Fresh(TINY, 0))
    whole = grammar()
    shortest = len(whole.lead) + int(whole.to_go[-1, 0])
    batch, free, bound = batch_of_prompts(100), 0, 0
    for i, temperature in enumerate([0.1, 0.3, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 5.0, 20.0]):
        max_steps = shortest if i == 3 else 40
        tokens = model.decode(batch, max_steps, temperature, i, whole)
        assert tokens.shape == (100, max_steps) and tokens.dtype == np.int32
        bound += malformed(tokens)
        ends = (tokens == EOS).argmax(1)
        assert all((row[end + 1 :] == 0).all() for row, end in zip(tokens, ends, strict=True))
    for temperature in (0.1, 1.0):
        free += malformed(model.decode(batch, 40, temperature, 0))
    logging.getLogger(__name__).warning("malformed: %d of 1000 with the grammar, %d of 200 without", bound, free)
    assert bound == 0 < free


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_is_one_graph(temperature):
    """The torch step works in place in fixed shapes, without a look from the host: traced once, it does all steps."""
    import torch

    from openpi_port.pi_torch import pi0_fast

    framework = Framework("torch")
    model = framework.load(TINY, init.Fresh(TINY, 1))
    whole = grammar()
    want = model.decode(batch_of_prompts(3), 40, temperature, 5, whole)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module = model.module
    draws = framework.array(grammars.check(whole, 40, temperature, 5, 3)) if temperature else None
    rules = pi0_fast.make_rules(module.gemma, temperature or 1.0, draws, Grammar(*framework.array(whole)))
    step = torch.compile(module.step, backend=backend, fullgraph=True)
    with torch.no_grad():
        decoding = module.begin(framework.array(batch_of_prompts(3)), 40, rules)
        for _ in range(39 - len(whole.lead)):
            step(decoding, rules)
    np.testing.assert_array_equal(decoding.tokens, want)
    assert len(graphs) == 1


def test_head_of_the_tokens_that_occur(framework):
    """Scoring only the tokens of the grammar gives the tokens that scoring the whole vocabulary gives."""
    model = framework.load(TINY, init.Fresh(TINY, 1))
    part = grammar()
    states, vocab = len(part.after), TINY.vocab_size
    assert len(set(part.ids.tolist())) == len(part.ids)
    count = np.zeros((states, vocab), np.int32)
    after = np.full((states, vocab), states - 1, np.int32)
    count[:, part.ids], after[:, part.ids] = part.count, part.after
    whole = Grammar(part.lead, np.arange(vocab, dtype=np.int32), count, after, part.to_go)
    for temperature in (0.0, 1.0):
        a, b = (model.decode(batch_of_prompts(16), 40, temperature, 5, g) for g in (part, whole))
        np.testing.assert_array_equal(a, b)


def test_given_tokens_at_once(framework):
    """Feeding "Action: " in one step is feeding it token by token."""
    model = framework.load(TINY, init.Fresh(TINY, 2))
    lead, steps = np.array(sequence().prompt_ids, np.int32), np.arange(10)

    def run(module, batch, lead, steps):
        at_once = module.prefill(batch, lead, 10)
        prompt = module.prefill(batch, lead[:0], 10)
        hidden, cache = prompt.hidden, prompt.cache
        for i in range(lead.shape[0]):
            token = lead[i : i + 1].repeat(4)
            hidden, cache = module.advance(prompt, cache, token, steps[i])
        return at_once.hidden, hidden

    a, b = framework.compiled(model, run)(batch_of_prompts(4), lead, steps)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_stops_where_it_ended(framework):
    """A sample that has ended writes zeros while others go on, and is not disturbed by them."""
    weights = dict(init.Fresh(TINY, 3))
    weights["gemma/embedding"] = weights["gemma/embedding"].copy()
    weights["gemma/embedding"][EOS] *= 2
    model = framework.load(TINY, weights)
    batch = batch_of_prompts(20)
    together = model.decode(batch, 60, 1.0, 3)
    ends = np.where((together == EOS).any(1), (together == EOS).argmax(1), 60)
    assert any(ends < 60) and len(set(ends.tolist())) > 1
    assert all(
        (row[end + 1 :] == 0).all() and (row[:end] != EOS).all() for row, end in zip(together, ends, strict=True)
    )
    first = {k: {c: x[:1] for c, x in v.items()} if isinstance(v, dict) else v[:1] for k, v in batch.items()}
    np.testing.assert_array_equal(model.decode(first, 60, 1.0, 3), together[:1])
