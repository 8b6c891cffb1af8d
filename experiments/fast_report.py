"""The fidelity report of a FAST tokenizer: one HTML page with its numbers and pictures inside.

Axis letters: B chunks, A actions, J dimensions, F frequencies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from openpi_port import normalize, webpage
from openpi_port.tokenizers.fast import FastTokenizer

GOOD = 0.02  # RMS error of the worst dimension, normalised: 1 % of the range between the quantiles


@dataclasses.dataclass(frozen=True, eq=False)
class Chunks:
    """Normalised chunks [B, A, J], and how many tokens the prompt and state before each take, [B]."""

    actions: np.ndarray
    prefix: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One scale, measured.

    Attributes:
      tokens, total: [B], of the actions alone, and with prompt and state.
      ratio: numbers in a chunk per token; one token per number would be 1.
      rms, worst: [J], error of the decoded actions in the robot's units.
      rms_normalised: [J], the same in normalised units.
      clipped, coefficients: how many coefficients were outside the fitted range, of how many.
    """

    tokenizer: FastTokenizer
    scale: float
    tokens: np.ndarray
    total: np.ndarray
    ratio: float
    rms: np.ndarray
    worst: np.ndarray
    rms_normalised: np.ndarray
    clipped: int
    coefficients: int

    def truncated(self, limit: int) -> float:
        """Share of chunks that do not fit."""
        return float((self.total > limit).mean())

    def __str__(self) -> str:
        return (
            f"scale {self.scale:g}: {self.tokens.mean():.1f} tokens a chunk (at most {self.tokens.max()}), "
            f"{self.ratio:.1f}x compression, worst dimension's RMS error {self.rms_normalised.max():.4f} normalised, "
            f"{self.clipped} of {self.coefficients} coefficients clipped"
        )


def measure(tokenizer: FastTokenizer, chunks: Chunks, stats: normalize.Stats) -> Result:
    """How long and how faithful the tokens of these chunks are."""
    ids = tokenizer.encode(chunks.actions, out_of_range="clip")
    horizon, dim = chunks.actions.shape[1:]
    decoded = tokenizer.decode(ids, horizon, dim)
    error = normalize.unnormalize(decoded, stats, "quantile") - normalize.unnormalize(chunks.actions, stats, "quantile")
    tokens = np.array([len(i) for i in ids])
    return Result(
        tokenizer=tokenizer,
        scale=tokenizer.scale,
        tokens=tokens,
        total=chunks.prefix + tokens + 5,  # "Action: " takes up to three more, "|" and the end one each
        ratio=horizon * dim / tokens.mean(),
        rms=np.sqrt((error**2).mean(axis=(0, 1))),
        worst=np.abs(error).max(axis=(0, 1)),
        rms_normalised=np.sqrt(((decoded - chunks.actions) ** 2).mean(axis=(0, 1))),
        clipped=tokenizer.clipped,
        coefficients=chunks.actions.size,
    )


def recommended(results: Sequence[Result]) -> Result:
    """The coarsest scale that is good enough, or the finest."""
    return next((r for r in results if r.rms_normalised.max() <= GOOD), results[-1])


def recommendation(results: Sequence[Result], limit: int) -> str:
    """In words: a scale and a length."""
    best = recommended(results)
    length = int(-(-best.total.max() // 8) * 8)
    why = "the coarsest whose worst dimension errs by at most 1 % of its range"
    if best.rms_normalised.max() > GOOD:
        why = "the finest tried, since with none the worst dimension errs by at most 1 % of its range"
    return (
        f"recommended: scale {best.scale:g}, {why}, and a length of {length} tokens, which fits every chunk measured "
        f"({best.truncated(limit):.1%} do not fit into {limit})"
    )


def page(
    name: str,
    where: str,
    fitted: np.ndarray,
    measured: np.ndarray,
    results: Sequence[Result],
    kept: Result,
    limit: int,
    names: Sequence[str],
) -> str:
    """The whole page.

    Args:
      name: of the data set.
      where: which episodes were measured.
      fitted, measured: normalised chunks [B, A, J].
      results: by rising scale.
      kept: the one that is saved.
      limit: tokens that a sequence may have.
      names: of the dimensions.
    """
    head = ("scale", "tokens a chunk: mean", "median", "95 %", "max", "compression", "RMS error, worst dimension",
            "truncated", "clipped")  # fmt: skip
    rows = [
        (f"{r.scale:g}", f"{r.tokens.mean():.1f}", f"{np.median(r.tokens):.0f}", f"{np.quantile(r.tokens, 0.95):.0f}",
         f"{r.tokens.max()}", f"{r.ratio:.2f}x", f"{r.rms_normalised.max():.4f}", f"{r.truncated(limit):.2%}",
         f"{r.clipped} of {r.coefficients}")
        for r in results
    ]  # fmt: skip
    dims = [(name, *(f"{r.rms[j]:.3g} / {r.worst[j]:.3g}" for r in results)) for j, name in enumerate(names)]
    _, horizon, dim = measured.shape
    title, e = f"FAST tokenizer for {name}", webpage.escape
    body = f"""<h1>{e(title)}</h1>
<p>Chunks of {horizon} actions x {dim} dimensions, normalised by quantiles. Fitted on {len(fitted)} chunks,
measured on {len(measured)} of the {e(where)}.
Kept: scale {kept.scale:g}, {len(kept.tokenizer.token_bytes)} tokens.</p>
<p><b>{e(recommendation(results, limit).capitalize())}</b></p>
<h2>Length and fidelity by scale</h2>{webpage.table(head, rows)}
<p>Compression counts numbers per token. Truncated: prompt, state and actions together exceed {limit} tokens.
Clipped: coefficients beyond what the training episodes had.</p>{webpage.picture(_by_scale(results))}
<h2>Error by dimension</h2><p>RMS / largest, in the robot's units.</p>
{webpage.table(("dimension", *(f"scale {r.scale:g}" for r in results)), dims)}
<h2>Tokens per chunk</h2>{webpage.picture(_lengths(kept, limit))}
<h2>One chunk on its way</h2>{webpage.picture(_one_chunk(kept, measured))}"""
    return webpage.page(title, [body])


def _by_scale(results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    scales = [r.scale for r in results]
    left.plot(scales, np.array([r.rms_normalised for r in results]), color="tab:blue", alpha=0.4)
    left.axhline(GOOD, color="gray", linestyle=":", label="1 % of the range")
    left.set(yscale="log", ylabel="RMS error, normalised", title="each dimension")
    right.plot(scales, [r.tokens.mean() for r in results], "o-", label="mean")
    right.plot(scales, [r.tokens.max() for r in results], "o--", label="max")
    right.set(ylabel="tokens a chunk", title="length")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="scale")
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axes.set_xticks([], minor=True)  # which would lie between them, with labels
        axes.legend()
    return figure


def _lengths(kept: Result, limit: int) -> Figure:
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.hist(kept.tokens, bins=40, alpha=0.6, label="actions")
    axes.hist(kept.total, bins=40, alpha=0.6, label="with prompt and state")
    axes.axvline(limit, color="gray", linestyle=":", label="limit")
    axes.set(xlabel="tokens", ylabel="chunks")
    axes.legend()
    return figure


def _one_chunk(kept: Result, measured: np.ndarray) -> Figure:
    """Actions, coefficients, quantised coefficients, tokens, reconstruction, of the chunk of median length."""
    chunk = measured[int(np.argsort(kept.tokens)[len(kept.tokens) // 2])]
    fast = kept.tokenizer
    quantised = fast.coefficients(chunk[None])[0]
    ids = fast.encode(chunk[None], "clip")[0]
    figure = Figure(figsize=(10, 11), layout="constrained")
    axes = figure.subplots(3, 2).reshape(-1)
    axes[0].plot(chunk)
    axes[0].set(title=f"actions: {chunk.size} numbers", xlabel="step")
    exact = np.abs(fast.transform(chunk))
    for place, values, title in (
        (1, exact, "coefficients, times the scale"),
        (2, np.abs(quantised), "quantised"),
    ):
        picture = axes[place].imshow(np.log1p(values).T, aspect="auto", cmap="viridis")
        axes[place].set(title=title, xlabel="frequency", ylabel="dimension")
        figure.colorbar(picture, ax=axes[place], label="log(1 + magnitude)")
    axes[2].set_title(f"quantised: {np.count_nonzero(quantised)} are not 0")
    axes[3].bar(range(len(ids)), [len(fast.token_bytes[i].decode(errors="replace")) for i in ids])
    axes[3].set(title=f"tokens: {len(ids)}", xlabel="token", ylabel="coefficients it stands for", yscale="log")
    decoded = fast.decode([ids], *chunk.shape)[0]
    axes[4].plot(decoded)
    axes[4].set(title="reconstruction", xlabel="step")
    axes[5].plot(decoded - chunk)
    axes[5].set(title="its error", xlabel="step")
    return figure
