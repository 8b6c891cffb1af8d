"""Trains the small SentencePiece model that ships: `python -m openpi_port.tokenizers.train_small`.

512 pieces instead of PaliGemma's 257,152, for sizes that train on a laptop: an embedding table that large would be
most of the model. The text is composed here, instructions as robot data sets have them and states as pi0.5 writes
them, so the model is ours to ship. Any other text still encodes without loss, byte by byte. Special ids and
normalisation are PaliGemma's (pad 0, eos 1, bos 2, unk 3, no dummy prefix, spaces kept).
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

OUT = Path(__file__).parent.parent / "assets" / "tokenizers" / "small.model"
VOCAB_SIZE = 512

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


def train() -> bytes:
    """The model file's bytes; the same at every call with the same version of sentencepiece."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=out,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        user_defined_symbols=list(SYMBOLS),
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
    """Writes the file that ships."""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_bytes(train())
    model = sentencepiece.SentencePieceProcessor(model_file=str(OUT))
    for text in ("Transfer cube", "pick up the red cube", " 131 200 177 147 34 173 66 226 14 115"):
        print(f"{text!r}: {model.encode(text, out_type=str)}")
    print(f"{OUT}: {OUT.stat().st_size} bytes, {model.vocab_size()} pieces")


if __name__ == "__main__":
    main()
