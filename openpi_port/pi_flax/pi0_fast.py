"""pi0-FAST: the vision-language model itself writes the actions, as tokens of the FAST tokenizer.

B batch, T text tokens (prompt, state, actions), D width, V vocabulary, S images and text, G generated tokens, N given
ones, K tokens that can occur.

    query \\ key             images + prompt + state   actions
    images+prompt+state                x
    actions                            x               causal

In training all tokens go through once. In decoding the prompt goes through once and leaves its keys and values; then
every step adds one token. Time has no part in it, and neither have noise and flow.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from openpi_port.batch import Batch
from openpi_port.config import Compute
from openpi_port.config import Pi0Fast as Config
from openpi_port.grammar import EOS, Grammar
from openpi_port.masks import attention_mask, positions
from openpi_port.pi_flax.gemma import Gemma, KVCache
from openpi_port.pi_flax.pi0 import Pi0, Tokens
from openpi_port.pi_flax.siglip import Siglip

BLOCK = 6272  # rows of the vocabulary whose scores exist at a time in training; PaliGemma's has 41 of them


class Prompt(NamedTuple):
    """What decoding goes on from.

    Attributes:
      hidden: [B, D], what the first generated token is chosen from.
      cache: keys and values, with room for all tokens to come.
      valid: bool [B, S], which tokens of images and prompt may be seen.
      length: int [B], how many those are.
    """

    hidden: jax.Array
    cache: KVCache
    valid: jax.Array
    length: jax.Array


class Rules(NamedTuple):
    """How tokens are chosen.

    Attributes:
      table: [K, D], rows of the embedding that score.
      temperature: [], > 0.
      uniforms: float [B, G], see `Pi0Fast.decode`.
      grammar: see `Pi0Fast.decode`.
    """

    table: jax.Array
    temperature: jax.Array
    uniforms: jax.Array | None
    grammar: Grammar | None


class Decoding(NamedTuple):
    """Where decoding stands.

    Attributes:
      prompt: what came before.
      cache: keys and values of prompt and generated tokens.
      tokens: int32 [B, G], 0 where nothing is generated yet.
      done: bool [B], who has ended.
      left: int [B], coefficients to come, of the grammar.
      at: int [B], its states.
      step: int [], the number of the last token.
    """

    prompt: Prompt | None
    cache: KVCache
    tokens: jax.Array
    done: jax.Array
    left: jax.Array
    at: jax.Array
    step: jax.Array


class Pi0Fast(nnx.Module):
    """Images and text to the next text token."""

    embed_prefix = Pi0.embed_prefix  # all cameras, then the text

    def __init__(self, config: Config, compute: Compute) -> None:
        self.config = config
        self.compute = compute
        self.vision = Siglip(config.vision, config.language.width, compute)
        self.gemma = Gemma([config.language], [False], config.vocab_size, compute)

    def joint_inputs(self, batch: Batch) -> tuple[Tokens, jax.Array, jax.Array]:
        """Embedded images and text, positions [B, S] and mask [B, S, S] of one pass over a training batch."""
        x, valid, starts = self.embed_prefix(batch)
        starts = starts.at[:, -self.config.max_token_len :].set(jnp.asarray(batch["token_ar_mask"]) > 0)
        counted = valid if self.config.positions == "contiguous" else jnp.ones_like(valid)
        return Tokens(x, valid, starts), positions(counted), attention_mask(valid, starts)

    def hidden(self, batch: Batch) -> jax.Array:
        """The last layer's output at every text token but the last, [B, T - 1, D]; see `logits`."""
        tokens, pos, mask = self.joint_inputs(batch)
        (out,), _ = self.gemma([tokens.x[:, :-1]], [None], pos[:, :-1], mask[:, :-1, :-1])
        return out[:, 1 - self.config.max_token_len :]

    def logits(self, batch: Batch) -> jax.Array:
        """Scores float32 [B, T - 1, V]: those at place t are of token t + 1. For small vocabularies; see `loss`."""
        return self.gemma.logits(self.hidden(batch))

    def loss(self, batch: Batch) -> jax.Array:
        """Cross-entropy of the scored tokens, their mean per sample.

        Args:
          batch: observation with `token_ar_mask` and `token_loss_mask` [B, T].

        Returns:
          float32 [B]; 0 for a sample without scored tokens.
        """
        tokens, scored = (jnp.asarray(batch[key])[:, 1:] for key in ("tokenized_prompt", "token_loss_mask"))
        return token_loss(self.gemma, self.hidden(batch), tokens, scored)

    def prefill(self, batch: Batch, lead: jax.Array, max_steps: int) -> Prompt:
        """Runs images, prompt and the tokens that are given (`lead`) once.

        Args:
          batch: observation; of a training batch the prompt alone is taken.
          lead: int [N], the beginning of what is generated, the same for all samples.
          max_steps: G, N included.
        """
        x, valid, starts = self.embed_prefix(batch)
        text = self.config.max_token_len
        if "token_ar_mask" in batch:
            valid = valid.at[:, -text:].set(valid[:, -text:] & (jnp.asarray(batch["token_ar_mask"]) == 0))
        length, size, num = valid.sum(1), x.shape[0], lead.shape[0]

        given = jnp.ones((size, num), bool)
        x = jnp.concatenate([x, jnp.broadcast_to(self.gemma.embed(lead[None]), (size, num, x.shape[-1]))], 1)
        mask = attention_mask(jnp.concatenate([valid, given], 1), jnp.concatenate([starts, given], 1))
        pos = jnp.concatenate([positions(valid), self.position(length, jnp.arange(num))], 1)
        (out,), cache = self.gemma([x], [None], pos, mask, return_cache=True)
        cache = KVCache(*(jnp.pad(c, [(0, 0), (0, 0), (0, max_steps - num), (0, 0), (0, 0)]) for c in cache))
        last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], 1) if num == 0 else jnp.full(size, x.shape[1] - 1)
        return Prompt(jnp.take_along_axis(out, last[:, None, None], 1)[:, 0], cache, valid, length)

    def position(self, length: jax.Array, step: jax.Array) -> jax.Array:
        """Positions [B, N] of generated tokens number `step` [N] after prompts of `length` [B]."""
        return length[:, None] + step[None] + (self.config.positions == "openpi")

    def advance(self, prompt: Prompt, cache: KVCache, token: jax.Array, step: jax.Array) -> tuple[jax.Array, KVCache]:
        """Feeds generated token [B] number `step`; returns what the next is chosen from, [B, D], and the cache."""
        start = prompt.valid.shape[1]
        written = jnp.arange(cache.k.shape[2] - start) <= step
        mask = jnp.concatenate([prompt.valid, jnp.broadcast_to(written, (len(token), len(written)))], 1)
        x, pos = self.gemma.embed(token[:, None]), self.position(prompt.length, step[None])
        (out,), cache = self.gemma([x], [None], pos, mask[:, None], cache, write_at=start + step)
        return out[:, 0], cache

    def begin(self, batch: Batch, max_steps: int, rules: Rules) -> Decoding:
        """Runs the prompt and chooses the first token.

        Args:
          batch: observation.
          max_steps: G, how many tokens at most.
          rules: how tokens are chosen.
        """
        grammar = rules.grammar
        lead = jnp.zeros(0, jnp.int32) if grammar is None else jnp.asarray(grammar.lead)
        prompt = self.prefill(batch, lead, max_steps)
        size, first = prompt.hidden.shape[0], lead.shape[0]
        decoding = Decoding(
            prompt,
            prompt.cache,
            jnp.zeros((size, max_steps), jnp.int32).at[:, :first].set(lead),
            done=jnp.zeros(size, bool),
            left=jnp.full(size, 0 if grammar is None else grammar.to_go.shape[0] - 1),
            at=jnp.zeros(size, jnp.int32),
            step=jnp.asarray(first),
        )
        return _write(decoding, rules, self.gemma.logits(prompt.hidden, rules.table))

    def step(self, decoding: Decoding, rules: Rules) -> Decoding:
        """Feeds the last token and chooses the next."""
        token = decoding.tokens[:, decoding.step]
        hidden, cache = self.advance(decoding.prompt, decoding.cache, token, decoding.step)
        decoding = decoding._replace(cache=cache, step=decoding.step + 1)
        return _write(decoding, rules, self.gemma.logits(hidden, rules.table))

    def decode(
        self,
        batch: Batch,
        max_steps: int,
        temperature: jax.Array | float = 1.0,
        uniforms: jax.Array | None = None,
        grammar: Grammar | None = None,
    ) -> jax.Array:
        """Generates tokens until every sample has ended.

        Args:
          batch: observation.
          max_steps: G, how many at most.
          temperature: of the sampling, > 0.
          uniforms: float [B, G], the draws (`grammar.draws`); None takes the likeliest token at every step.
          grammar: what may be generated; None allows everything and looks at the whole vocabulary.

        Returns:
          int32 [B, G], 0 after the end of sequence.
        """
        rules = make_rules(self.gemma, temperature, uniforms, grammar)
        decoding = self.begin(batch, max_steps, rules)
        prompt = decoding.prompt._replace(cache=None)  # what changes goes around the loop, the rest stays outside

        def going(decoding: Decoding) -> jax.Array:
            return (decoding.step + 1 < max_steps) & ~decoding.done.all()

        def body(decoding: Decoding) -> Decoding:
            return self.step(decoding._replace(prompt=prompt), rules)._replace(prompt=None)

        return jax.lax.while_loop(going, body, decoding._replace(prompt=None)).tokens


def make_rules(
    gemma: Gemma, temperature: jax.Array | float, uniforms: jax.Array | None, grammar: Grammar | None
) -> Rules:
    """See `Pi0Fast.decode`; looks up the rows that score."""
    table = gemma.embedding[...] if grammar is None else gemma.embedding[...][grammar.ids]
    grammar = None if grammar is None else Grammar(*(jnp.asarray(x) for x in grammar))
    return Rules(table, jnp.asarray(temperature), uniforms, grammar)


def token_loss(gemma: Gemma, hidden: jax.Array, tokens: jax.Array, scored: jax.Array) -> jax.Array:
    """Cross-entropy of the scored tokens, their mean per sample.

    Args:
      gemma: whose embedding scores.
      hidden: [B, T, D], what each token is predicted from.
      tokens: int [B, T].
      scored: bool [B, T].

    Returns:
      float32 [B]; 0 for a sample without scored tokens.
    """
    entropy = _cross_entropy(gemma, hidden, tokens)
    return (entropy * scored).sum(-1) / jnp.maximum(scored.sum(-1), 1)


def may_follow(grammar: Grammar, left: jax.Array, at: jax.Array, steps: jax.Array) -> jax.Array:
    """Which tokens lead to a whole chunk.

    Args:
      grammar: the tables.
      left: int [B], coefficients to come.
      at: int [B], states.
      steps: int [], tokens that may still be generated.

    Returns:
      bool [B, K].
    """
    rest = left[:, None] - grammar.count[at]
    return (rest >= 0) & (grammar.to_go[jnp.maximum(rest, 0), grammar.after[at]] < steps)


def choose(scores: jax.Array, allowed: jax.Array, temperature: jax.Array | float, draw: jax.Array | None) -> jax.Array:
    """One of K tokens by its score.

    Args:
      scores: float32 [B, K].
      allowed: bool [B, K].
      temperature: > 0.
      draw: [B] in [0, 1), the place in the cumulative distribution; None takes the best.

    Returns:
      int32 [B].
    """
    scores = jnp.where(allowed, scores, -jnp.inf)
    if draw is None:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    total = jnp.cumsum(jax.nn.softmax(scores / temperature, axis=-1), axis=-1)
    total = jnp.where(allowed, total, -1)  # rounding must not pick what is forbidden
    return jnp.argmax(total > draw[:, None] * total.max(-1, keepdims=True), axis=-1).astype(jnp.int32)


def _write(decoding: Decoding, rules: Rules, scores: jax.Array) -> Decoding:
    """Chooses token number `step` by its scores [B, K]."""
    tokens, step, grammar, left, at = decoding.tokens, decoding.step, rules.grammar, decoding.left, decoding.at
    allowed = jnp.ones_like(scores, bool)
    if grammar is not None:
        allowed = may_follow(grammar, left, at, tokens.shape[1] - step)
    draw = None if rules.uniforms is None else rules.uniforms[:, step]
    token = column = choose(scores, allowed, rules.temperature, draw)
    if grammar is not None:
        token, left, at = grammar.ids[column], left - grammar.count[at, column], grammar.after[at, column]
    token = jnp.where(decoding.done, 0, token)
    done = decoding.done | (token == EOS)
    return decoding._replace(tokens=tokens.at[:, step].set(token), done=done, left=left, at=at)


def _cross_entropy(gemma: Gemma, x: jax.Array, targets: jax.Array) -> jax.Array:
    """float32 [B, T] from hidden states [B, T, D]; never holds [B, T, V].

    Goes through the vocabulary in blocks, not through the tokens: so every block of the embedding's gradient is
    made once and lies where it stays, where chunks of tokens would each add to all of it.
    """
    dtype, table = x.dtype, gemma.embedding[...]
    x = x.astype(jnp.float32)  # so that its gradient is summed over the blocks in float32
    whole = len(table) // BLOCK * BLOCK

    def score(rows: jax.Array, first: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Log of the sum of exponentials over these rows, and the target's logit if it is one of them."""
        logits = gemma.logits(x.astype(dtype), rows)
        place = targets - first
        picked = jnp.take_along_axis(logits, jnp.clip(place, 0, len(rows) - 1)[..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits, -1), jnp.where((place >= 0) & (place < len(rows)), picked, 0)

    blocks = (table[:whole].reshape(-1, BLOCK, x.shape[-1]), jnp.arange(0, whole, BLOCK))
    score = jax.checkpoint(score, prevent_cse=False)
    _, (sums, picked) = jax.lax.scan(lambda _, block: (None, score(*block)), None, blocks)
    if whole < len(table):
        rest = score(table[whole:], whole)
        sums, picked = (jnp.concatenate([a, b[None]]) for a, b in zip((sums, picked), rest, strict=True))
    return jax.nn.logsumexp(sums, 0) - picked.sum(0)
