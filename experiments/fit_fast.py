"""Fits a FAST tokenizer to a config's actions, and writes a report on how faithful it is.

    python -m experiments.fit_fast --config=pi0_aloha [--out=fast_tokenizer] [--scale=10] [--vocab_size=1024]

Writes the tokenizer in the Hugging Face processor's format, and `report.html` beside it. Actions are normalised by
quantiles, as pi0-FAST's are, whatever the config says for flow matching. Fits on the training episodes, measures
on the validation episodes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import fast_report
from experiments.flags import config, run
from openpi_port import normalize, transforms
from openpi_port.config import Train
from openpi_port.data import dimensions
from openpi_port.data.datasets import open_datasets
from openpi_port.data.frames import Frames
from openpi_port.data.stats import compute
from openpi_port.errors import UserError
from openpi_port.tokenizers import paligemma
from openpi_port.tokenizers.fast import FastTokenizer
from openpi_port.whole import directory, refuse_existing

OUT = flags.DEFINE_string("out", "fast_tokenizer", "directory for the tokenizer and its report; must not exist yet")
SCALE = flags.DEFINE_float("scale", 10.0, "of the tokenizer that is kept; the report compares others with it", 0.001)
VOCAB = flags.DEFINE_integer("vocab_size", 1024, "action tokens", 1)
LIMIT = flags.DEFINE_integer("limit", 250, "tokens that prompt, state and actions may take together", 1)
CHUNKS = flags.DEFINE_integer("max_chunks", 20000, "chunks to fit on, spread over the data", 1)

SCALES = (2.0, 5.0, 10.0, 20.0, 50.0)


def main() -> None:
    """Fits, measures, writes."""
    train = config()
    refuse_existing(out := Path(OUT.value))
    data = dataclasses.replace(train.data, norm="quantile")
    training, validation = open_datasets(data, horizon=train.model.action_horizon)
    before = transforms.before_normalize(data, images=False)
    stats = compute(training, before)
    if warning := normalize.before_training(stats, "quantile", data.repo_id):
        print(f"warning: {warning}")
    steps = (*before, transforms.Normalize(stats, "quantile"))
    fit_on = collect(training, steps, train)
    measure_on = fit_on if validation is None else collect(validation, steps, train)

    results = []
    for scale in tqdm(sorted({*SCALES, SCALE.value}), "scales", unit=" fits"):
        try:
            tokenizer = FastTokenizer.fit(fit_on.actions, scale=scale, vocab_size=VOCAB.value)
        except UserError as error:  # a fine scale needs a larger alphabet than the vocabulary has
            tqdm.write(f"scale {scale:g} left out: {error}")
            continue
        results.append(fast_report.measure(tokenizer, measure_on, stats["actions"]))
    kept = next((r for r in results if r.scale == SCALE.value), None)
    if kept is None:
        raise UserError(f"--vocab_size={VOCAB.value} is too small for --scale={SCALE.value:g}")

    where = "training episodes (there are no others)" if validation is None else "validation episodes"
    names = dimensions.numbered(training, data.actions, fit_on.actions.shape[-1])
    page = fast_report.page(data.repo_id, where, fit_on.actions, measure_on.actions, results, kept, LIMIT.value, names)
    out.parent.mkdir(parents=True, exist_ok=True)
    with directory(out) as part:
        kept.tokenizer.save(part)
        (part / "report.html").write_text(page, encoding="utf-8")
    print(kept)
    print(fast_report.recommendation(results, LIMIT.value))
    print(f"saved {out} and {out / 'report.html'}")


def collect(dataset: Frames, steps: tuple[transforms.Transform, ...], train: Train) -> fast_report.Chunks:
    """Normalised chunks, evenly spread over all episodes, `CHUNKS` at most."""
    stride = max(1, -(-len(dataset) // CHUNKS.value))
    text = paligemma.load(train.tokenizer)
    actions, prefix = [], []
    seen = 0
    for episode in tqdm(dataset.iterate_numbers(), "chunks", len(dataset.episodes), unit=" episodes", delay=2):
        for sample in episode[-seen % stride :: stride]:
            sample = transforms.forward(steps, sample)
            actions.append(sample["actions"])
            prefix.append(len(text.fast_prefix(sample["prompt"], sample["state"])))
        seen += len(episode)
    return fast_report.Chunks(np.stack(actions), np.array(prefix))


if __name__ == "__main__":
    run(main)
