"""Random access to frames equals decoding in order, on H.264 (with reordered frames too) and AV1; faults; the cache."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_port.data import frame_cache
from openpi_port.data.frame_cache import FrameCache
from openpi_port.data.video import Video, Videos, nearest_frame
from openpi_port.errors import UserError

FRAMES, GOP, FPS = 47, 12, 25
KINDS = {
    "h264": ("libx264", {"g": str(GOP), "bf": "0", "sc_threshold": "0"}),
    "h264_reordered": ("libx264", {"g": str(GOP), "bf": "3", "sc_threshold": "0", "x264-params": "open-gop=1"}),
    "av1": ("libsvtav1", {"g": str(GOP), "preset": "12", "svtav1-params": "log-level=0"}),
}


def write_video(path: Path, kind: str, frames: int = FRAMES, faststart: bool = False) -> Path:
    codec, options = KINDS[kind]
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(frames):
            image = np.full((64, 96, 3), 5 * i, np.uint8)
            image[:, (2 * i) % 90 : (2 * i) % 90 + 6] = 255 - 5 * i
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode_all(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


@pytest.fixture(scope="module", params=list(KINDS))
def video(request, tmp_path_factory) -> tuple[Video, list[np.ndarray]]:
    path = write_video(tmp_path_factory.mktemp("video") / "v.mp4", request.param)
    return Video(path), decode_all(path)


@settings(max_examples=15, deadline=None)
@given(order=st.lists(st.integers(0, FRAMES - 1), min_size=1, max_size=8))
def test_any_order_equals_decoding_in_order(video, order):
    file, expected = video
    assert len(expected) == len(file.index.pts) == FRAMES
    for frame in order:
        np.testing.assert_array_equal(file.read(frame), expected[frame])


def test_decodes_only_from_the_keyframe_and_goes_on_from_where_it_stands(video):
    file, expected = Video(video[0].path), video[1]
    for frame in (FRAMES - 1, 0, 20, 7):
        passed: dict[int, np.ndarray] = {}
        file.read(frame, lambda n, picture, passed=passed: passed.update({n: picture.to_ndarray(format="rgb24")}))
        keyframe = max(k for k in file.index.keyframes if k <= frame)
        assert set(passed) == set(range(keyframe, frame)) and len(passed) <= GOP
        for number, image in passed.items():
            np.testing.assert_array_equal(image, expected[number])
    steps: list[int] = []
    file.read(9, lambda n, _: steps.append(n))  # stands behind 7
    assert steps == [8]


def test_real_av1(shared):
    path = next((shared / "data" / "g1_lerobot_v30").rglob("*.mp4"))
    file, expected = Video(path), decode_all(path)
    for frame in (487, 0, 221, 220, 100, 333):
        np.testing.assert_array_equal(file.read(frame), expected[frame])


def test_nearest_frame():
    times = np.arange(10) / 25
    assert [nearest_frame(times, t, 0.01, "v") for t in (0.0, 0.041, 0.039, 0.36, 0.3699)] == [0, 1, 1, 9, 9]
    for seconds in (0.06, 0.4, -0.02):
        with pytest.raises(UserError, match=r"clip\.mp4: video file has no frame at"):
            nearest_frame(times, seconds, 0.01, "clip.mp4")


@pytest.mark.parametrize("arrival", [0, -1])
def test_a_demuxer_that_arrives_early_or_late(video, arrival, monkeypatch):
    """At another keyframe than asked for, the first time."""
    file, expected = Video(video[0].path), video[1]
    asked, passed = [], []

    class Container:
        def __init__(self, container):
            self._container = container

        def seek(self, pts, **kwargs):
            asked.append(pts)
            if len(asked) == 1:
                pts = int(file.index.pts[file.index.keyframes[arrival]])
            self._container.seek(pts, **kwargs)

        def decode(self, stream):
            return self._container.decode(stream)

    monkeypatch.setattr(file, "_container", Container(file._container))
    np.testing.assert_array_equal(file.read(30, lambda n, _: passed.append(n)), expected[30])
    assert len(asked) == (1 if arrival == 0 else 2)
    assert passed == list(range(passed[0], 30)) and passed[0] in file.index.keyframes and passed[0] > 0


@pytest.mark.parametrize("faststart", [False, True])
def test_truncated(tmp_path, faststart):
    path = write_video(tmp_path / "cut.mp4", "h264", faststart=faststart)
    content = path.read_bytes()
    for share in (0.9, 0.5, 0.01):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match=r"cut\.mp4: video file (is|can't)"):
            Video(path)


def test_cut_exactly_between_two_frames(tmp_path):
    path = write_video(tmp_path / "cut.mp4", "h264", faststart=True)
    with av.open(str(path)) as container:
        end = [packet.pos + packet.size for packet in container.demux(video=0) if packet.pts is not None][30]
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(UserError, match=r"cut\.mp4: video file is cut off: it has 31 of 47 frames"):
        Video(path)


def test_damaged_in_the_middle(tmp_path):
    path = write_video(tmp_path / "bad.mp4", "h264", faststart=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.mp4"):
        Video(path).read(FRAMES - 1)


def test_missing_and_not_a_video(tmp_path):
    with pytest.raises(UserError, match=r"gone\.mp4: video file is missing"):
        Video(tmp_path / "gone.mp4")
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    with pytest.raises(UserError, match=r"text\.mp4: video file can't be opened"):
        Video(tmp_path / "text.mp4")


def test_few_files_stay_open_and_threads_do_not_mix(tmp_path):
    paths = [write_video(tmp_path / f"{i}.mp4", "h264", frames=10 + i) for i in range(4)]
    expected = {path: decode_all(path) for path in paths}
    videos, failures = Videos(max_open=2), []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            path = paths[rng.integers(4)]
            frame = int(rng.integers(10))
            with videos.use(path) as file:
                if not np.array_equal(file.read(frame), expected[path][frame]):
                    failures.append((path, frame))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(videos._open) <= 2


def test_another_process_opens_its_own(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", "h264")
    videos = Videos()
    with videos.use(path) as mine:
        mine.read(29)
    assert not pickle.loads(pickle.dumps(videos))._open, "a spawned process starts with nothing"
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as a forked one sees it
    with videos.use(path) as other:
        np.testing.assert_array_equal(other.read(30), decode_all(path)[30])
    assert other is not mine


# The cache


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source.mp4"
    path.write_bytes(b"content")
    return path


def test_cache_keeps_frames_and_is_sparse(tmp_path, source):
    cache = FrameCache(16, 1.0, tmp_path / "cache")
    assert cache.entry(source) is None
    entry = cache.create(source, np.arange(5000) / 30)
    assert cache.get(entry, 4000) is None and cache.wants(entry, 4000)
    cache.put(entry, 4000, image(1))
    np.testing.assert_array_equal(cache.get(entry, 4000), image(1))
    assert not cache.wants(entry, 4000)
    stat = entry.path.stat()
    assert stat.st_size > 3_000_000 and stat.st_blocks * 512 < 200_000
    again = pickle.loads(pickle.dumps(cache)).entry(source)  # as another process sees it
    np.testing.assert_array_equal(again.times, np.arange(5000) / 30)
    np.testing.assert_array_equal(FrameCache(16, 1.0, tmp_path / "cache").get(again, 4000), image(1))
    assert os.listdir(tmp_path / "cache") == [entry.path.name], "no temporary file stays"
    assert FrameCache(8, 1.0, tmp_path / "cache").entry(source) is None, "of another size"


def test_half_written_frames_are_absent(tmp_path, source):
    cache = FrameCache(16, 1.0, tmp_path / "cache")
    entry = cache.create(source, np.arange(3.0))
    cache.put(entry, 1, image(1))
    with entry.path.open("r+b") as file:
        file.seek(entry.records + cache._record + 300)
        file.write(b"\0" * 50)
    assert cache.get(entry, 1) is None
    cache.put(entry, 1, image(1))
    np.testing.assert_array_equal(cache.get(entry, 1), image(1))


def test_all_black_frames_are_kept(tmp_path, source):
    cache = FrameCache(16, 1.0, tmp_path / "cache")
    entry = cache.create(source, np.arange(3.0))
    cache.put(entry, 0, np.zeros((16, 16, 3), np.uint8))
    assert cache.get(entry, 0) is not None and cache.get(entry, 1) is None


def test_changed_and_removed_videos_lose_their_frames(tmp_path, source):
    cache = FrameCache(16, 1.0, tmp_path / "cache")
    first = cache.create(source, np.arange(3.0)).path
    source.write_bytes(b"other content")
    cache = FrameCache(16, 1.0, tmp_path / "cache")
    assert cache.entry(source) is None
    cache.plan({(source, ""): 3})
    assert not first.exists()
    second = cache.create(source, np.arange(3.0)).path
    source.unlink()
    cache.plan({})
    assert not second.exists()


def test_bounded_in_bytes(tmp_path, source):
    record = 4 + 16 * 16 * 3
    cache = FrameCache(16, 40 * record / 1e9, tmp_path / "cache")
    cache.plan({(source, ""): 100})
    entry = cache.create(source, np.arange(100.0))
    for frame in range(100):
        cache.put(entry, frame, image(frame))
    assert sum(cache.get(entry, frame) is not None for frame in range(100)) == 40
    other = tmp_path / "other.mp4"
    other.write_bytes(b"x")
    cache = FrameCache(16, 40 * record / 1e9, tmp_path / "cache")
    cache.plan({(other, ""): 100})
    assert not entry.path.exists(), "another data set's frames make room"
    assert cache.get(entry, 0) is None, "and a run that used them goes on without"


def test_full_disk_ends_storing_not_training(tmp_path, source, monkeypatch, caplog):
    cache = FrameCache(16, 1.0, tmp_path / "cache")
    entry = cache.create(source, np.arange(3.0))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frame_cache.os, "pwritev", full)
    cache.put(entry, 0, image(0))
    cache.put(entry, 1, image(1))
    assert cache.get(entry, 0) is None and caplog.text.count("No space left") == 1


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_gb=0"):
        FrameCache(16, 1.0, tmp_path / "file" / "below")


def _write_many(directory: Path, source: Path) -> None:
    cache = FrameCache(16, 1.0, directory)
    entry = cache.entry(source) or cache.create(source, np.arange(60.0))
    for frame in range(60):
        cache.put(entry, frame, image(frame))


def test_concurrent_writers(tmp_path, source):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(tmp_path / "cache", source), daemon=True) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    cache = FrameCache(16, 1.0, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for frame in range(60):
        np.testing.assert_array_equal(cache.get(cache.entry(source), frame), image(frame))
