"""Gemma with experts: every layer holds one set of weights per expert, and all experts attend together.

B batch, T queries, S keys, N heads, K kv heads, H head dim, D width, F width of the MLP, L layers, V vocabulary.

Expert 0 is the language model of PaliGemma; pi0 adds expert 1 for state and actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from openpi_port.config import Compute
from openpi_port.config import Gemma as Config
from openpi_port.masks import Blocks
from openpi_port.pi_torch import lora
from openpi_port.pi_torch.attention import attention, prepare
from openpi_port.pi_torch.fast import norms, products
from openpi_port.pi_torch.layers import AdaRMSNorm, Angles, RMSNorm, add_gated, angles, kept, remat, rope, run, stack


class KVCache(NamedTuple):
    """Rotated keys and values of tokens already seen: [L, B, S, K, H] or L of [B, S, K, H], and one inside a layer."""

    k: Tensor | Sequence[Tensor]
    v: Tensor | Sequence[Tensor]


class Expert(nn.Module):
    """One expert's weights in one layer."""

    def __init__(self, config: Config, *, adarms: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        norm = AdaRMSNorm if adarms else RMSNorm
        width, heads, kv_heads = config.width, config.num_heads, config.num_kv_heads
        attn, mlp = config.lora_of("attn"), config.lora_of("mlp")
        self.norm_attn = norm(width)
        self.q = lora.to_heads(width, heads, config.head_dim, attn)
        self.k = lora.to_heads(width, kv_heads, config.head_dim, attn)
        self.v = lora.to_heads(width, kv_heads, config.head_dim, attn)
        self.o = lora.from_heads(heads, config.head_dim, width, attn)
        self.norm_mlp = norm(width)
        self.gate = lora.plain(width, config.mlp_dim, mlp)
        self.up = lora.plain(width, config.mlp_dim, mlp)
        self.down = lora.plain(config.mlp_dim, width, mlp)

    def qkv(self, x: Tensor, where: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled, rotated queries [B, T, N, H], rotated keys and values [B, T, K, H] of a normed x [B, T, D]."""
        q, k, v = (self._heads(y) for y in products.several(x, (self.q, self.k, self.v)))
        return rope(q * self.head_dim**-0.5, where), rope(k, where), v

    def keys_values(self, x: Tensor, where: Angles) -> KVCache:
        """Rotated keys and values [B, T, K, H] of a normed x [B, T, D]."""
        k, v = (self._heads(y) for y in products.several(x, (self.k, self.v)))
        return KVCache(rope(k, where), v.contiguous())  # as other layers give them: what reads them is compiled for it

    def mlp(self, x: Tensor) -> Tensor:
        """GeGLU."""
        gate, up = (kept(y) for y in products.several(x, (self.gate, self.up)))
        return self.down(F.gelu(gate, approximate="tanh") * up)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(kept(x), "B T (N H) -> B T N H", H=self.head_dim)


class Layer(nn.Module):
    """One layer of all experts."""

    def __init__(self, configs: Sequence[Config], adarms: Sequence[bool], compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.experts = nn.ModuleList([Expert(c, adarms=a) for c, a in zip(configs, adarms, strict=True)])

    def forward(
        self,
        xs: Sequence[Tensor | None],
        conds: Sequence[Tensor | None],
        where: Angles,
        mask: Any,
        cache: KVCache | None,
        write_at: Tensor | None = None,
        keys_only: bool = False,
    ) -> tuple[list[Tensor | None], KVCache]:
        """See `Gemma.forward`; `mask` is prepared, `where` stands for the positions.

        With `keys_only` computes only the keys and values, of the language model.

        Returns:
          The experts' outputs, and their tokens' keys and values.
        """
        if keys_only:
            expert = self.experts[0]
            return xs, expert.keys_values(expert.norm_attn(xs[0], conds[0])[0], where)
        return remat(self._forward, self.compute)(xs, conds, where, mask, cache, write_at)

    def _forward(
        self,
        xs: Sequence[Tensor | None],
        conds: Sequence[Tensor | None],
        where: Angles,
        mask: Any,
        cache: KVCache | None,
        write_at: Tensor | None,
    ) -> tuple[list[Tensor | None], KVCache]:
        present = [i for i, x in enumerate(xs) if x is not None]
        spans = _spans([xs[i].shape[1] for i in present])
        around, gates, qs, ks, vs = {}, {}, [], [], []
        for i, (start, stop) in zip(present, spans, strict=True):
            around[i], y, gates[i] = self._forked(self.experts[i].norm_attn, xs[i], conds[i])
            q, k, v = self.experts[i].qkv(y, where.of(start, stop))
            qs.append(q), ks.append(k), vs.append(v)
        q, new = torch.cat(qs, 1), KVCache(torch.cat(ks, 1), torch.cat(vs, 1))
        if write_at is not None:
            seen = new = KVCache(*(c.index_copy_(1, write_at, n) for c, n in zip(cache, new, strict=True)))
        else:
            seen = new if cache is None else KVCache(*(torch.cat(c, 1) for c in zip(cache, new, strict=True)))
        attended = kept(attention(q, seen.k, seen.v, mask, self.compute.attention))

        outs: list[Tensor | None] = [None] * len(xs)
        for i, (start, stop) in zip(present, spans, strict=True):
            expert = self.experts[i]
            x, y, gate = self._forked(expert.norm_mlp, around[i], conds[i], expert.o(attended[:, start:stop]), gates[i])
            outs[i] = add_gated(x, expert.mlp(y), gate)
        return outs, new

    def _forked(
        self,
        norm: RMSNorm | AdaRMSNorm,
        x: Tensor,
        cond: Tensor | None,
        more: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x + more or x + more * gate, which goes around what follows; that normed; and the gate of what follows."""
        if self.training and isinstance(norm, RMSNorm) and norms.usable(x):
            return *norms.fork(x, norm.scale, None, more), None
        x = x if more is None else kept(add_gated(x, more, gate))
        return x, *norm(x, cond)


class Gemma(nn.Module):
    """The stack of layers, the token embedding of expert 0 and the final norms.

    Attributes:
      sparse: whether the embedding's gradient holds only the rows that are looked up.
    """

    sparse = False

    def __init__(self, configs: Sequence[Config], adarms: Sequence[bool], vocab_size: int, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.head_dim = configs[0].head_dim
        self.embedding = nn.Parameter(torch.zeros(vocab_size, configs[0].width))
        self.layers = stack(Layer(configs, adarms, compute), configs[0].depth)
        self.norms = nn.ModuleList(
            [(AdaRMSNorm if a else RMSNorm)(c.width) for c, a in zip(configs, adarms, strict=True)]
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeds token ids [B, T], scaled by sqrt(D): [B, T, D] in the working dtype."""
        tokens = tokens.long() if self.sparse else tokens  # a sparse tensor counts so
        x = F.embedding(tokens, self.embedding, sparse=self.sparse).to(getattr(torch, self.compute.dtype))
        return x * x.new_full((), x.shape[-1] ** 0.5)  # rounded to the working dtype, as the reference

    def forward(
        self,
        xs: Sequence[Tensor | None],
        conds: Sequence[Tensor | None],
        positions: Tensor,
        mask: Tensor | Blocks,
        cache: KVCache | None = None,
        *,
        return_cache: bool = False,
        write_at: Tensor | None = None,
    ) -> tuple[list[Tensor | None], KVCache | None]:
        """Runs the tokens of every expert through all layers.

        Args:
          xs: tokens per expert, [B, T_i, D_i], None for an expert that takes no part.
          conds: condition per expert, [B, D_i] or [B, T_i, D_i], None where the norms take none.
          positions: int [B, T], of all tokens in the order of the experts.
          mask: bool [B, T, S], or its blocks; S counts the cache first, then the tokens.
          cache: keys and values that the tokens also see.
          return_cache: whether to keep the tokens' own keys and values.
          write_at: int [T], writes them into the cache, in place, at those indices of S, instead of appending them; S
            is then the length of the cache, and what is returned is the cache.

        Returns:
          The normed outputs per expert, and the tokens' keys and values [L, B, T, K, H] or None.
        """
        xs, new = self._run(self.layers, xs, conds, positions, mask, cache, write_at)
        outs = [None if x is None else norm(x, cond)[0] for x, cond, norm in zip(xs, conds, self.norms, strict=True)]
        if write_at is not None:
            return outs, cache
        return outs, KVCache(*map(torch.stack, zip(*new, strict=True))) if return_cache else None

    def keys_values(self, x: Tensor, positions: Tensor, mask: Tensor | Blocks) -> KVCache:
        """The keys and values that `forward` gives of the language model's tokens alone, L of [B, T, K, H].

        Leaves out what the last layer does after them.
        """
        others = [None] * (len(self.norms) - 1)
        xs, new = self._run(self.layers[:-1], [x, *others], [None, *others], positions, mask, None, None)
        _, last = self.layers[-1](xs, [None, *others], angles(positions, self.head_dim), None, None, keys_only=True)
        return KVCache(*zip(*new, last, strict=True))

    def logits(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """Scores of the vocabulary in float32, through the tied embedding: [..., D] to [..., V].

        Args:
          x: outputs of the language model.
          table: rows of the embedding [V, D], where not all are asked for.
        """
        table = self.embedding if table is None else table
        return F.linear(x, table.to(x.dtype)).float()

    def _run(
        self,
        layers: Sequence[Layer],
        xs: Sequence[Tensor | None],
        conds: Sequence[Tensor | None],
        positions: Tensor,
        mask: Tensor | Blocks,
        cache: KVCache | None,
        write_at: Tensor | None,
    ) -> tuple[list[Tensor | None], list[KVCache]]:
        """Runs through those layers; see `forward`."""
        mask, where = prepare(mask, self.compute.attention), angles(positions, self.head_dim)
        xs = [None if x is None else x.to(getattr(torch, self.compute.dtype)) for x in xs]

        def body(xs: list, inputs: tuple) -> tuple[list, KVCache]:
            layer, *seen = inputs
            return layer(xs, conds, where, mask, KVCache(*seen) if seen else None, write_at)

        inputs = zip(layers, *(() if cache is None else cache), strict=True)
        return run(body, xs, inputs, self.compute)


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Where each expert's tokens lie in the concatenated sequence."""
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
