"""The fidelity report: its numbers against a direct computation, and the program from end to end."""

from __future__ import annotations

import commands
import numpy as np
import scipy.fft

from experiments import fast_report
from openpi_port.normalize import Stats
from openpi_port.tokenizers.fast import FastTokenizer


def results():
    rng = np.random.default_rng(0)
    fall = np.exp(-np.arange(16) / 3.0)[:, None]
    actions = scipy.fft.idct(rng.normal(size=(80, 16, 3)) * fall, axis=1, norm="ortho")
    stats = Stats(np.zeros(3), np.ones(3), np.array([-1.0, -2, -4]), np.array([1.0, 2, 4]))
    chunks = fast_report.Chunks(actions, np.arange(80))
    fits = [FastTokenizer.fit(actions, scale=s, vocab_size=400) for s in (2, 10, 50)]
    return chunks, [fast_report.measure(f, chunks, stats) for f in fits]


def test_numbers():
    chunks, measured = results()
    for r in measured:
        ids = r.tokenizer.encode(chunks.actions)
        error = r.tokenizer.decode(ids, 16, 3) - chunks.actions
        np.testing.assert_allclose(r.rms_normalised, np.sqrt((error**2).mean((0, 1))))
        np.testing.assert_allclose(r.rms, r.rms_normalised * [1, 2, 4], rtol=1e-5)
        np.testing.assert_allclose(r.worst, np.abs(error).max((0, 1)) * [1, 2, 4], rtol=1e-5)
        assert r.ratio == 48 / np.mean([len(i) for i in ids]) and r.clipped == 0
        assert r.truncated(60) == np.mean([n + len(i) + 5 > 60 for n, i in enumerate(ids)])
    assert [r.rms_normalised.max() for r in measured] == sorted(
        (r.rms_normalised.max() for r in measured), reverse=True
    )
    best = fast_report.recommended(measured)
    assert best.rms_normalised.max() <= fast_report.GOOD and best is not measured[0]
    assert f"scale {best.scale:g}" in fast_report.recommendation(measured, 250)


def test_page():
    chunks, measured = results()
    some, names = chunks.actions, ["0 shoulder", "1 elbow", "2 wrist"]
    text = fast_report.page("a <b> c", "validation episodes", some, some, measured, measured[1], 60, names)
    assert text.count("data:image/png;base64,") == 3 and "a &lt;b&gt; c" in text
    assert "<td>1 elbow</td>" in text
    assert f"{measured[1].ratio:.2f}x" in text and f"{measured[2].truncated(60):.2%}" in text


def test_the_program(tmp_path):
    out = tmp_path / "tokenizer"
    arguments = ["--config=pi0_aloha:debug", f"--out={out}", "--max_chunks=60"]
    done = commands.run("experiments.fit_fast", *arguments, MPLCONFIGDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "recommended: scale" in done.stdout and "<table>" in (out / "report.html").read_text()
    assert FastTokenizer.open(out).time_horizon == 50
    before = (out / "report.html").stat()
    again = commands.run("experiments.fit_fast", *arguments, MPLCONFIGDIR=str(tmp_path))
    assert again.returncode == 2 and "exists already and is not overwritten" in again.stderr
    assert (out / "report.html").stat() == before
