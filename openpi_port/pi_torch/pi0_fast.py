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

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openpi_port.batch import Batch
from openpi_port.config import Compute
from openpi_port.config import Pi0Fast as Config
from openpi_port.grammar import EOS, Grammar
from openpi_port.masks import attention_mask, positions
from openpi_port.pi_torch.gemma import Gemma, KVCache
from openpi_port.pi_torch.pi0 import Pi0, Tokens
from openpi_port.pi_torch.siglip import Siglip

BLOCK = 6272  # rows of the vocabulary whose scores exist at a time in training; PaliGemma's has 41 of them


class Prompt(NamedTuple):
    """What decoding goes on from.

    Attributes:
      hidden: [B, D], what the first generated token is chosen from.
      cache: keys and values, with room for all tokens to come; written in place.
      valid: bool [B, S], which tokens of images and prompt may be seen.
      length: int [B], how many those are.
    """

    hidden: Tensor
    cache: KVCache
    valid: Tensor
    length: Tensor


class Rules(NamedTuple):
    """How tokens are chosen.

    Attributes:
      table: [K, D], rows of the embedding that score.
      temperature: [], > 0.
      uniforms: float [B, G], see `Pi0Fast.decode`.
      grammar: see `Pi0Fast.decode`.
    """

    table: Tensor
    temperature: Tensor
    uniforms: Tensor | None
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

    prompt: Prompt
    cache: KVCache
    tokens: Tensor
    done: Tensor
    left: Tensor
    at: Tensor
    step: Tensor


class Pi0Fast(nn.Module):
    """Images and text to the next text token."""

    embed_prefix = Pi0.embed_prefix  # all cameras, then the text

    def __init__(self, config: Config, compute: Compute) -> None:
        super().__init__()
        self.config = config
        self.compute = compute
        self.vision = Siglip(config.vision, config.language.width, compute)
        self.gemma = Gemma([config.language], [False], config.vocab_size, compute)

    def joint_inputs(self, batch: Batch) -> tuple[Tokens, Tensor, Tensor]:
        """Embedded images and text, positions [B, S] and mask [B, S, S] of one pass over a training batch."""
        x, valid, starts = self.embed_prefix(batch)
        starts[:, -self.config.max_token_len :] = batch["token_ar_mask"] > 0
        counted = valid if self.config.positions == "contiguous" else torch.ones_like(valid)
        return Tokens(x, valid, starts), positions(counted), attention_mask(valid, starts)

    def hidden(self, batch: Batch) -> Tensor:
        """The last layer's output at every text token but the last, [B, T - 1, D]; see `logits`."""
        tokens, pos, mask = self.joint_inputs(batch)
        (out,), _ = self.gemma([tokens.x[:, :-1]], [None], pos[:, :-1], mask[:, :-1, :-1])
        return out[:, 1 - self.config.max_token_len :]

    def logits(self, batch: Batch) -> Tensor:
        """Scores float32 [B, T - 1, V]: those at place t are of token t + 1. For small vocabularies; see `loss`."""
        return self.gemma.logits(self.hidden(batch))

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of the scored tokens, their mean per sample.

        Args:
          batch: observation with `token_ar_mask` and `token_loss_mask` [B, T].

        Returns:
          float32 [B]; 0 for a sample without scored tokens.
        """
        tokens, scored = (batch[key][:, 1:] for key in ("tokenized_prompt", "token_loss_mask"))
        return token_loss(self.gemma, self.hidden(batch), tokens, scored)

    def prefill(self, batch: Batch, lead: Tensor, max_steps: int) -> Prompt:
        """Runs images, prompt and the tokens that are given (`lead`) once.

        Args:
          batch: observation; of a training batch the prompt alone is taken.
          lead: int [N], the beginning of what is generated, the same for all samples.
          max_steps: G, N included.
        """
        x, valid, starts = self.embed_prefix(batch)
        text = self.config.max_token_len
        if "token_ar_mask" in batch:
            valid[:, -text:] &= batch["token_ar_mask"] == 0
        length, size, num = valid.sum(1), x.shape[0], lead.shape[0]

        given = torch.ones((size, num), dtype=torch.bool, device=x.device)
        x = torch.cat([x, self.gemma.embed(lead[None]).expand(size, num, x.shape[-1])], 1)
        mask = attention_mask(torch.cat([valid, given], 1), torch.cat([starts, given], 1))
        pos = torch.cat([positions(valid), self.position(length, torch.arange(num, device=x.device))], 1)
        (out,), cache = self.gemma([x], [None], pos, mask, return_cache=True)
        cache = KVCache(*(F.pad(c, (0, 0, 0, 0, 0, max_steps - num)) for c in cache))
        last = (
            valid.shape[1] - 1 - valid.flip(1).int().argmax(1) if num == 0 else torch.full_like(length, x.shape[1] - 1)
        )
        return Prompt(out[torch.arange(size, device=x.device), last], cache, valid, length)

    def position(self, length: Tensor, step: Tensor) -> Tensor:
        """Positions [B, N] of generated tokens number `step` [N] after prompts of `length` [B]."""
        return length[:, None] + step[None] + (self.config.positions == "openpi")

    def advance(self, prompt: Prompt, cache: KVCache, token: Tensor, step: Tensor) -> tuple[Tensor, KVCache]:
        """Feeds generated token [B] number `step`; returns what the next is chosen from, [B, D], and the cache."""
        start = prompt.valid.shape[1]
        written = torch.arange(cache.k.shape[2] - start, device=token.device) <= step
        mask = torch.cat([prompt.valid, written.expand(len(token), -1)], 1)
        x, pos = self.gemma.embed(token[:, None]), self.position(prompt.length, step[None])
        (out,), cache = self.gemma([x], [None], pos, mask[:, None], cache, write_at=start + step[None])
        return out[:, 0], cache

    def begin(self, batch: Batch, max_steps: int, rules: Rules) -> Decoding:
        """Runs the prompt and chooses the first token.

        Args:
          batch: observation.
          max_steps: G, how many tokens at most.
          rules: how tokens are chosen.
        """
        grammar, device = rules.grammar, self.gemma.embedding.device
        lead = torch.zeros(0, dtype=torch.int32, device=device) if grammar is None else grammar.lead
        prompt = self.prefill(batch, lead, max_steps)
        size, first = prompt.hidden.shape[0], lead.shape[0]
        tokens = torch.zeros((size, max_steps), dtype=torch.int32, device=device)
        tokens[:, :first] = lead
        decoding = Decoding(
            prompt,
            prompt.cache,
            tokens,
            done=torch.zeros(size, dtype=torch.bool, device=device),
            left=torch.full((size,), 0 if grammar is None else grammar.to_go.shape[0] - 1, device=device),
            at=torch.zeros(size, dtype=torch.int64, device=device),
            step=torch.full((), first, device=device),
        )
        return _write(decoding, rules, self.gemma.logits(prompt.hidden, rules.table))

    def step(self, decoding: Decoding, rules: Rules) -> Decoding:
        """Feeds the last token and chooses the next. Writes in place, in fixed shapes and without a look from the host,
        so that it can be compiled or captured once and repeated."""
        token = decoding.tokens.index_select(1, decoding.step[None])[:, 0]
        hidden, _ = self.advance(decoding.prompt, decoding.cache, token, decoding.step)
        decoding.step.add_(1)
        return _write(decoding, rules, self.gemma.logits(hidden, rules.table))

    @torch.no_grad()
    def decode(
        self,
        batch: Batch,
        max_steps: int,
        temperature: float = 1.0,
        uniforms: Tensor | None = None,
        grammar: Grammar | None = None,
    ) -> Tensor:
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
        count = max_steps - 1 - (0 if grammar is None else len(grammar.lead))
        for _ in range(count):
            if decoding.done.all():
                break
            self.step(decoding, rules)
        return decoding.tokens


def make_rules(gemma: Gemma, temperature: float, uniforms: Tensor | None, grammar: Grammar | None) -> Rules:
    """See `Pi0Fast.decode`; looks up the rows that score."""
    table = gemma.embedding if grammar is None else gemma.embedding[grammar.ids]
    return Rules(table, torch.full((), temperature, device=table.device), uniforms, grammar)


def token_loss(gemma: Gemma, hidden: Tensor, tokens: Tensor, scored: Tensor) -> Tensor:
    """Cross-entropy of the scored tokens, their mean per sample.

    Args:
      gemma: whose embedding scores.
      hidden: [B, T, D], what each token is predicted from.
      tokens: int [B, T].
      scored: bool [B, T].

    Returns:
      float32 [B]; 0 for a sample without scored tokens.
    """
    entropy = _CrossEntropy.apply(hidden[scored], gemma.embedding, tokens[scored].long())
    entropy = torch.zeros(scored.shape, device=entropy.device).masked_scatter(scored, entropy)
    return entropy.sum(-1) / scored.sum(-1).clamp(min=1)


def may_follow(grammar: Grammar, left: Tensor, at: Tensor, steps: Tensor) -> Tensor:
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
    return (rest >= 0) & (grammar.to_go[rest.clamp(min=0), grammar.after[at]] < steps)


def choose(scores: Tensor, allowed: Tensor, temperature: Tensor | float, draw: Tensor | None) -> Tensor:
    """One of K tokens by its score.

    Args:
      scores: float32 [B, K].
      allowed: bool [B, K].
      temperature: > 0.
      draw: [B] in [0, 1), the place in the cumulative distribution; None takes the best.

    Returns:
      int64 [B].
    """
    scores = torch.where(allowed, scores, -torch.inf)
    if draw is None:
        return scores.argmax(-1)
    total = torch.softmax(scores / temperature, dim=-1).cumsum(-1)
    total = torch.where(allowed, total, -1)  # rounding must not pick what is forbidden
    return (total > draw[:, None] * total.amax(-1, keepdim=True)).int().argmax(-1)


def _write(decoding: Decoding, rules: Rules, scores: Tensor) -> Decoding:
    """Chooses token number `step` by its scores [B, K], in place."""
    tokens, step, grammar = decoding.tokens, decoding.step[None], rules.grammar
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if grammar is not None:
        allowed = may_follow(grammar, decoding.left, decoding.at, tokens.shape[1] - decoding.step)
    draw = None if rules.uniforms is None else rules.uniforms.index_select(1, step)[:, 0]
    token = column = choose(scores, allowed, rules.temperature, draw)
    if grammar is not None:
        token, at = grammar.ids[column], decoding.at
        decoding.left.sub_(grammar.count[at, column])
        decoding.at.copy_(grammar.after[at, column])
    token = torch.where(decoding.done, 0, token.int())
    tokens.index_copy_(1, step, token[:, None])
    decoding.done.logical_or_(token == EOS)
    return decoding


class _CrossEntropy(torch.autograd.Function):
    """float32 [P] from hidden states [P, D] of P tokens, the embedding [V, D] and targets [P]; never holds [P, V].

    Goes through the vocabulary in blocks, and again in the backward pass, not through the tokens: so every block of the
    embedding's gradient is made once and lies where it stays, where chunks of tokens would each add to all of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        sums, picked = [], torch.zeros(len(x), device=x.device)
        for first in range(0, len(table), BLOCK):
            rows = table[first : first + BLOCK]
            logits = F.linear(x, rows.to(x.dtype)).float()
            sums.append(torch.logsumexp(logits, -1))
            place, inside = _place(targets, first, len(rows))
            picked = torch.where(inside, logits.gather(1, place[:, None])[:, 0], picked)
        total = torch.logsumexp(torch.stack(sums), 0)
        ctx.save_for_backward(x, table, targets, total)
        return total - picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, table, targets, total = ctx.saved_tensors
        of_x = torch.zeros_like(x, dtype=torch.float32)
        of_table = torch.empty_like(table) if ctx.needs_input_grad[1] else None  # else frozen
        for first in range(0, len(table), BLOCK):
            rows = table[first : first + BLOCK].to(x.dtype)
            of_logits = torch.exp(F.linear(x, rows).float() - total[:, None]) * gradient[:, None]
            place, inside = _place(targets, first, len(rows))
            of_logits.scatter_add_(1, place[:, None], torch.where(inside, -gradient, 0)[:, None])
            of_logits = of_logits.to(x.dtype)
            of_x += of_logits @ rows
            if of_table is not None:
                of_table[first : first + BLOCK] = of_logits.T @ x
        return of_x.to(x.dtype), of_table, None


def _place(targets: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Where the targets are within a block of the vocabulary, and whether they are in it."""
    place = targets - first
    return place.clamp(0, size - 1), (place >= 0) & (place < size)
