"""Shows what a config or a checkpoint reads and is, on one HTML page: look at it before you train.

    python -m experiments.inspect --config=pi0_aloha:mini [--config.field=value ...] [--out=inspect.html]
    python -m experiments.inspect --checkpoint=DIR [--data='{"repo_id": "..."}'] [--robot=...] [--every_episode]

Images after augmentation with their masks, tokens by block, the attention mask as papers draw it, positions, chunks
before and after normalisation, statistics, parameters; what looks like a mistake is said at the top and here. Needs no
GPU, and no framework where the config's size is given.
"""

from __future__ import annotations

import time
from pathlib import Path

from absl import flags as absl_flags

from experiments import flags, inspect_page, inspect_subject, policy_flags
from openpi_port import whole
from openpi_port.errors import UserError

OUT = absl_flags.DEFINE_string("out", "inspect.html", "the page")
EVERY = absl_flags.DEFINE_bool("every_episode", False, "also look for the first and last pictures of all episodes")
SAMPLES = absl_flags.DEFINE_integer("samples", 4, "of the training data, spread evenly", 1)


def main() -> None:
    """Looks, writes the page, and prints what is odd."""
    begin = time.perf_counter()
    samples, findings = inspect_subject.look(subject := _subject(), SAMPLES.value)
    findings += inspect_subject.damaged(subject) if EVERY.value else []
    path = Path(OUT.value)
    whole.write_text(path, inspect_page.page(subject, samples, findings))
    for finding in findings:
        print(f"{'suspicious' if finding.level == 'bad' else 'note'}: {finding.text}")
    print(f"{path}: {len(samples)} sample{'s' * (len(samples) != 1)}, {time.perf_counter() - begin:.1f} s")


def _subject() -> inspect_subject.Subject:
    given = policy_flags.CHECKPOINT.value
    if (flags.CONFIG.value is None) == (given is None):
        raise UserError("give one of --config=NAME[:SIZE] and --checkpoint=DIR")
    if given is None:
        return inspect_subject.of_config(flags.config())
    return inspect_subject.of_checkpoint(given, **policy_flags.parts())


if __name__ == "__main__":
    flags.run(main)
