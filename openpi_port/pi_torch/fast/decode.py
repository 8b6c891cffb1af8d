"""pi0-FAST on packed weights: the prompt once, then a token at a time.

B batch, T text tokens, P tokens of images and prompt, G generated tokens, S = P + G keys, K tokens that can occur, D
width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openpi_port.grammar import EOS, Grammar
from openpi_port.pi_torch import device as devices
from openpi_port.pi_torch.fast import flow, ops, pack
from openpi_port.pi_torch.fast.flow import Language, Past
from openpi_port.pi_torch.pi0_fast import Pi0Fast, choose, may_follow


class Inputs(NamedTuple):
    """An observation on the device.

    Attributes:
      images: [B, C, height, width, 3], uint8, or float in [-1, 1].
      tokens: int [B, T].
      order: int [B * P], the rows of the prefix, valid ones first in every sample.
      length: int32 [B], how many those are.
      draws: float32 [B, G], for sampling; not looked at without.
    """

    images: Tensor
    tokens: Tensor
    order: Tensor
    length: Tensor
    draws: Tensor


class Decoder:
    """Decoding in one shape: all it needs lies in tensors that keep their place, so that a graph can hold every part.

    Args:
      module: of the weights that are not packed.
      language: the packed ones.
      size: B.
      prefix: P.
      max_steps: G.
      temperature: 0 takes the likeliest token at every step.
      grammar: what may be generated; None allows every token.

    Attributes:
      tokens, advances: see `graph.Writer`.
    """

    def __init__(
        self,
        module: Pi0Fast,
        language: Language,
        size: int,
        prefix: int,
        max_steps: int,
        temperature: float,
        grammar: Grammar | None,
    ) -> None:
        device = language.embedding.device
        self._given = grammar  # kept, so that its id stays its own
        self.grammar = grammar = None if grammar is None else Grammar(*devices.put(grammar, device))
        self.language, self._temperature = language, temperature
        self._prefix, self._max_steps = prefix, max_steps
        self.advances = max_steps - 1 - (0 if grammar is None else len(grammar.lead))
        self._heads = module.config.language.num_heads
        dim, layers = module.config.language.head_dim, len(language.blocks)
        self._skip = int(module.config.positions == "openpi")
        self._turns = pack.turns(prefix + max_steps + 1, dim, device)
        table = language.embedding if grammar is None else language.embedding[grammar.ids]
        self._table = table.to(language.dtype)
        shape = (layers, size, prefix + max_steps, dim)
        self._k, self._v = (torch.zeros(shape, dtype=language.dtype, device=device) for _ in range(2))
        self._length = torch.zeros(size, dtype=torch.int32, device=device)
        self._step = torch.zeros(1, dtype=torch.int32, device=device)
        self._draws = torch.zeros((size, max_steps), device=device)
        self._left, self._at = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(2))
        self._done = torch.zeros(size, dtype=torch.bool, device=device)
        self.tokens = torch.zeros((size, max_steps), dtype=torch.int32, device=device)

    def embed(self, inputs: Inputs) -> Tensor:
        """Tokens [B, P, D] of images and prompt."""
        return self.language.embed_prefix(inputs.images, inputs.tokens, inputs.order)

    def prefill(self, x: Tensor, inputs: Inputs) -> None:
        """Keys and values of images and prompt, [B, P, D]; overwrites x."""
        k, v = self.language.prefill(x, inputs.length, 0)
        self._k[:, :, : self._prefix], self._v[:, :, : self._prefix] = k, v
        self._length.copy_(inputs.length)

    def begin(self, *tensors: Tensor) -> Tensor:
        """Reads `Inputs`, and what the grammar gives, and chooses the first token; see `advance`."""
        inputs = Inputs(*tensors)
        self.prefill(self.embed(inputs), inputs)
        self._draws.copy_(inputs.draws)
        for tensor in (self.tokens, self._at, self._done):
            tensor.zero_()
        size, grammar = len(self.tokens), self.grammar
        given = 0 if grammar is None else len(grammar.lead)
        if given:
            lead = grammar.lead[None].expand(size, -1)
            self.tokens[:, :given] = lead
            extra = torch.arange(given, dtype=torch.int32, device=lead.device) + 1
            places = self._length[:, None] + extra - 1 + self._skip
        else:  # the last token of the prompt again, for what it leads to; it sees itself where it was
            images = self._prefix - inputs.tokens.shape[1]
            rows = torch.arange(size, device=inputs.order.device) * self._prefix
            last = inputs.order[rows + inputs.length - 1] - rows - images
            lead = inputs.tokens.gather(1, last[:, None].long())
            extra = torch.zeros(1, dtype=torch.int32, device=lead.device)
            places = self._length[:, None] - 1
        if grammar is not None:
            self._left.fill_(grammar.to_go.shape[0] - 1)
        self._step.fill_(given)
        return self._choose(self._run(lead, places, self._length, extra, given))

    def advance(self) -> Tensor:
        """Feeds the last token and chooses the next.

        Returns:
          bool [1], whether all samples have ended.
        """
        token = self.tokens.index_select(1, self._step - 1)
        past = self._length + self._step - 1
        return self._choose(self._run(token, past[:, None] + self._skip, past, torch.ones_like(self._step), 1))

    def _run(self, tokens: Tensor, places: Tensor, past: Tensor, extra: Tensor, most: int) -> ops.Residual:
        """Tokens [B, N] at positions [B, N] through all layers; what the last of each sample leads to."""
        x = self.language.embed(tokens)
        seen = ops.see(past, extra, most, self._k.shape[2], self._heads, x)
        past = Past(self._k, self._v, seen, self._turns[places].flatten(0, 1), None)
        blocks, norms = self.language.writing
        stream = flow.run(blocks, norms, ops.start(x.flatten(0, 1), norms[0].scale), past)
        last = slice(tokens.shape[1] - 1, None, tokens.shape[1])
        return ops.Residual(*(None if part is None else part[last] for part in stream[:3]))

    def _choose(self, stream: ops.Residual) -> Tensor:
        """The next token, and what follows from it."""
        scores, grammar = ops.normed_linear(stream, self._table, None).float(), self.grammar
        allowed = torch.ones_like(scores, dtype=torch.bool)
        if grammar is not None:
            allowed = may_follow(grammar, self._left, self._at, self._max_steps - self._step)
        draw = self._draws.index_select(1, self._step)[:, 0] if self._temperature else None
        column = choose(scores, allowed, self._temperature or 1.0, draw)
        token = column if grammar is None else grammar.ids[column]
        if grammar is not None:
            self._left.sub_(grammar.count[self._at, column])
            self._at.copy_(grammar.after[self._at, column])
        token = torch.where(self._done, 0, token.int())
        self.tokens.index_copy_(1, self._step.long(), token[:, None])
        self._done |= token == EOS
        self._step += 1
        return self._done.all()[None]
