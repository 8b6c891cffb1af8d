"""Checkpoints at URLs, by the very clients that users run: the hub and Google's storage answer on this machine."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import threading
from urllib.parse import unquote

import commands
import pytest
from conftest import ROOT
from frameworks import opened
from remotes import Hub, Storage, serving

from convert import remote
from openpi_port.errors import UserError
from tests.test_tables import same

PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
URL = "gs://openpi-assets/checkpoints/pi05"


def arrays(path):
    return {name: tensor[...] for name, tensor in opened(path)[0].items()}


@pytest.fixture
def storage(golden, tmp_path, monkeypatch):
    """Google's storage with one of openpi's checkpoints, as its training leaves one."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    there = tmp_path / "buckets/openpi-assets/checkpoints/pi05"
    for part in ("params", "assets"):
        shutil.copytree(golden / "openpi/pi05" / part, there / part)
    (there / "train_state/d").mkdir(parents=True)
    (there / "train_state/d/moments").write_bytes(b"much")
    (there / "assets" / "").joinpath("notes.txt").write_text("")
    with serving(Storage, tmp_path / "buckets") as found:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", found.url)
        monkeypatch.setenv("OPENPI_PORT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(remote, "PIECE", 40_000)
        yield found


def test_what_openpi_publishes_is_fetched_once_and_without_credentials(storage, golden, tmp_path, capsys):
    path = remote.fetch(URL)
    assert same(arrays(path), arrays(golden / "openpi/pi05"))
    assert not (path / "train_state").exists()
    assert not any("Authorization" in headers for _, headers in storage.asked)
    assert any("bytes=40000-79999" in str(headers) for _, headers in storage.asked)
    assert "fetching gs://openpi-assets/checkpoints/pi05 to " in capsys.readouterr().err
    assert [p.name for p in path.parent.iterdir() if p.name != ".pi05.lock"] == ["pi05"]
    count = len(storage.asked)
    assert remote.fetch(URL + "/") == path
    assert len(storage.asked) == count
    assert remote.fetch(URL + "/params") == path / "params"  # which is what openpi's configs name
    assert len(storage.asked) == count
    assert (remote.fetch(f"{URL}/assets/golden_robot") / "norm_stats.json").exists()
    norm_stats = remote.fetch(f"{URL}/assets/golden_robot/norm_stats.json")
    assert json.loads(norm_stats.read_text()) == json.loads((path / "assets/golden_robot/norm_stats.json").read_text())


def break_after(storage, pieces):
    """Lets the storage refuse contents once it has sent so many pieces; a broken connection gcsfs would try again."""
    storage.asked.clear()
    storage.allowed = lambda headers: sum("Range" in h for _, h in storage.asked) <= pieces
    with pytest.raises(UserError, match="can't be fetched: .* what has come is kept, the same command goes on"):
        remote.fetch(URL)
    storage.allowed = lambda headers: True
    storage.asked.clear()
    return next(remote.cache().glob("*/.pi05.partial"))


def test_an_interrupted_download_goes_on(storage, golden):
    partial = break_after(storage, 14)
    kept = {str(f.relative_to(partial)): f.stat().st_size for f in partial.rglob("*") if f.is_file()}
    assert sum(kept.values()) > 50_000
    assert same(arrays(remote.fetch(URL)), arrays(golden / "openpi/pi05"))
    for path, headers in storage.asked:
        if "Range" in headers:
            name = unquote(path.partition("?")[0]).partition("checkpoints/pi05/")[2]
            assert int(headers["Range"].removeprefix("bytes=").partition("-")[0]) >= kept.get(name, 0), name


def test_what_changed_between_two_tries_is_fetched_anew(storage, golden):
    break_after(storage, 14)
    params = storage.root / "openpi-assets/checkpoints/pi05/params"
    shutil.rmtree(params)
    shutil.copytree(golden / "openpi/pi0/params", params)
    assert same(arrays(remote.fetch(URL)), arrays(golden / "openpi/pi0"))


def test_what_came_damaged_is_not_kept(storage):
    def spoilt(name, start, content):
        return b"\0" + content[1:] if "/d/" in name and start == 40_000 else content

    storage.sends = spoilt
    with pytest.raises(UserError, match="came damaged, its checksum is another; what has come is kept"):
        remote.fetch(URL)
    storage.sends = lambda name, start, content: content
    remote.fetch(URL)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("gs://openpi-assets/checkpoints/pi06", "nothing there"),
        ("gs://openpi-assets/checkpoints/pi05/train_state", "no checkpoint there"),
        ("gs://no-such-bucket/x", "nothing there"),
        ("s4://bucket/x", "Protocol not known: s4"),
    ],
)
def test_what_is_not_there(storage, url, words):
    with pytest.raises(UserError, match=words):
        remote.fetch(url)
    assert not list(remote.cache().glob("*/.*.partial"))


def test_what_is_not_for_everybody(storage, tmp_path, monkeypatch):
    """Without credentials first, then with those that there are, and the message says how to get some."""
    storage.allowed = lambda headers: "Authorization" in headers
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="not open to everybody.*gcloud auth application-default login"):
        remote.fetch(URL)
    from gcsfs.credentials import GoogleCredentials

    def connect(self):
        self.credentials = type("Token", (), {"valid": True, "expiry": None, "apply": apply})()

    def apply(self, headers):
        headers["Authorization"] = "Bearer mine"

    monkeypatch.setattr(GoogleCredentials, "_connect_google_default", connect)
    storage.asked.clear()
    remote.fetch(URL)
    assert "Authorization" not in storage.asked[0][1]


def test_no_host_and_no_room(storage, monkeypatch):
    """Both are said at once; gcsfs would try a host that is away for half a minute."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(UserError, match=r"0.0 GB to fetch, 0.0 GB free in .*OPENPI_PORT_CACHE"):
        remote.fetch(URL)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr("gcsfs.core.GCSFileSystem.find", lambda *args, **kwargs: pytest.fail("asked nevertheless"))
    with pytest.raises(UserError, match=r"127.0.0.1 can't be reached \(Connection refused\)"):
        remote.fetch(URL)


def test_two_processes_fetch_once(storage, golden, capsys):
    begun, go_on = threading.Event(), threading.Event()

    def slowly(name, start, content):
        begun.set()
        go_on.wait(20)
        return content

    storage.sends = slowly
    program = f"from convert import remote; print(remote.fetch({URL!r}))"
    other = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert begun.wait(30)
    with next(remote.cache().glob("*/.pi05.lock")).open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    threading.Timer(0.2, go_on.set).start()
    path = remote.fetch(URL)
    assert "waiting for another process" in capsys.readouterr().err
    assert other.communicate()[0].strip() == str(path) and other.returncode == 0
    media = [p for p, _ in storage.asked if p.endswith("alt=media")]
    assert len(media) == len({(p, h.get("Range")) for p, h in storage.asked if p.endswith("alt=media")})


def test_a_file_url_is_opened_in_place(golden, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_PORT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a b").symlink_to(golden)
    assert remote.fetch((tmp_path / "a b/openpi/pi05").as_uri()) == tmp_path / "a b/openpi/pi05"
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def hub(golden, tmp_path, monkeypatch):
    """The hub with a policy of LeRobot's, below a folder, beside what nobody wants."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(golden / "lerobot/pi0/pretrained", tmp_path / "repo/inner")
    (tmp_path / "repo/inner/optimizer.bin").write_bytes(b"not wanted")
    with serving(Hub, tmp_path / "repo") as found:
        yield found


def convert(hub, tmp_path, url, to="", **environment):
    """`python -m convert` in an environment where the hub is the one here."""
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", **environment}
    out = [str(tmp_path / to)] if to else []
    return commands.run("convert", url, *out, "--to=flax", "--model.vision.num_heads=2", "--quiet", **home)


def test_the_hub_gives_a_checkpoint_which_then_opens_without_it(hub, golden, tmp_path):
    done = convert(hub, tmp_path, "hf://user/pi/inner", "out")
    assert done.returncode == 0, done.stderr
    assert same(arrays(tmp_path / "out"), arrays(golden / "lerobot/pi0/pretrained"))
    assert not list((tmp_path / "home").rglob("*.bin"))
    count = len(hub.asked)
    assert convert(hub, tmp_path, "hf://user/pi/inner", HF_HUB_OFFLINE="1").returncode == 0
    assert len(hub.asked) == count
    done = convert(hub, tmp_path, "hf://user/pi/inner/model.safetensors")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("url", "environment", "words"),
    [
        ("hf://user/other", {}, "there is no user/other, or it is private: set HF_TOKEN or run `hf auth login`"),
        ("hf://user/pi@old", {}, "user/pi has no revision 'old'"),
        ("hf://user/pi/inner", {}, "user/pi is gated: accept its terms on its page, then set HF_TOKEN"),
        ("hf://user/pi/outer", {"HF_TOKEN": "hf_x"}, "user/pi has no outer"),
        ("hf://user/pi", {"HF_HUB_OFFLINE": "1"}, "the hub can't be reached (HF_HUB_OFFLINE is set)"),
        ("hf://user/pi", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub can't be reached (ConnectError: "),
        ("hf://pi", {}, "expected hf://user/name"),
    ],
)
def test_what_the_hub_does_not_give(hub, tmp_path, url, environment, words):
    hub.allowed = lambda headers: headers.get("Authorization") == "Bearer hf_x"
    done = convert(hub, tmp_path, url, **environment)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr.splitlines()[-1], done.stderr


def test_what_the_hub_gave_in_part_is_no_checkpoint(hub, tmp_path):
    """The weights are refused; then the machine is offline; then all is well."""
    hub.allowed = lambda headers: not hub.asked[-1][0].endswith("model.safetensors")
    assert convert(hub, tmp_path, "hf://user/pi/inner").returncode == 2
    offline = convert(hub, tmp_path, "hf://user/pi/inner", HF_HUB_OFFLINE="1")
    assert "(HF_HUB_OFFLINE is set) and its cache doesn't hold all of it" in offline.stderr, offline.stderr
    hub.allowed = lambda headers: True
    assert convert(hub, tmp_path, "hf://user/pi/inner").returncode == 0
