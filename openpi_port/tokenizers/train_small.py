"""Trains the small SentencePiece models that ship: `python -m openpi_port.tokenizers.train_small`.

512 pieces instead of PaliGemma's 257,152, for sizes that train on a laptop: an embedding table that large would be
most of the model. The text is composed here, instructions as robot data sets have them and states as pi0.5 writes
them, so the model is ours to ship. Any other text still encodes without loss, byte by byte. Special ids and
normalisation are PaliGemma's (pad 0, eos 1, bos 2, unk 3, no dummy prefix, spaces kept).

`small_numbers` has 256 more pieces, so that every number of a state is one token and every joint has its place: what a
large model learns in spite of digits, a small one should not have to.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

OUT = Path(__file__).parent.parent / "assets" / "tokenizers"
VOCAB_SIZE = 512
NUMBERS = tuple(f"\u2581{i}" for i in range(-1, 256))  # the bins of a state, with the space before them

VERBS = (
    "pick up the|put the|place the|move the|push the|pull the|grasp the|lift the|transfer the|insert the|stack the|"
    "fold the|open the|close the|wipe the|pour the|hand over the|turn the|slide the|press the|take the|give me the"
)
COLOURS = "|red |green |blue |yellow |black |white |small |large "
OBJECTS = (
    "cube|block|ball|peg|bowl|cup|mug|plate|bottle|can|fork|spoon|knife|towel|cloth|shirt|drawer|door|lid|box|book|"
    "apple|banana|carrot|pot|pan|sponge|tape|cable|screw|button|handle|socket|lego brick|toy"
)
PLACES = (
    "| in the bin| into the box| on the plate| on the table| onto the shelf| in the bowl| in the drawer|"
    " to the left| to the right| in the sink| from the table| with the left arm| with the right arm|"
    " to the other arm| on top of the stove| into the basket| next to the cup| and put it down| inside"
)
WHOLE = (
    "Transfer cube",
    "Insert peg into socket",
    "Pick up the cube with the right arm and transfer it to the left arm",
)
# Always one token each: what the prompt formats of pi0.5 and pi0-FAST consist of.
SYMBOLS = ("\n", "Task:", "State:", "Action:", "|", ",", ";", ":")


def sentences(seed: int = 0) -> Iterator[str]:
    """About 6,000 instructions and 3,000 states, in an order and with numbers that depend on the seed alone."""
    rng = random.Random(seed)
    combinations = list(itertools.product(*(words.split("|") for words in (VERBS, COLOURS, OBJECTS, PLACES))))
    for verb, colour, thing, place in rng.sample(combinations, 5000):
        text = f"{verb} {colour}{thing}{place}"
        yield text if rng.random() < 0.5 else text.capitalize()
    for text in WHOLE * 300:
        yield text
    for _ in range(3000):
        yield " " + " ".join(str(rng.randint(0, 255)) for _ in range(rng.randint(6, 14)))


def train(whole: tuple[str, ...] = ()) -> bytes:
    """The model file's bytes; the same at every call with the same version of sentencepiece.

    Args:
      whole: what is one token each, beside the symbols; it makes the vocabulary larger by about as much.
    """
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=out,
        model_type="bpe",
        vocab_size=VOCAB_SIZE + len(whole),
        byte_fallback=True,
        user_defined_symbols=[*SYMBOLS, *whole],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def main() -> None:
    """Writes the files that ship."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name, whole in (("small", ()), ("small_numbers", NUMBERS)):
        path = OUT / f"{name}.model"
        path.write_bytes(train(whole))
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        for text in ("Transfer cube", "pick up the red cube", " 131 200 177 147 34 173 66 226 14 115"):
            print(f"{text!r}: {model.encode(text, out_type=str)}")
        print(f"{path}: {path.stat().st_size} bytes, {model.vocab_size()} pieces")


if __name__ == "__main__":
    main()
