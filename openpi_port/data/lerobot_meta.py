"""What a LeRobot directory says about itself: finds it, reads meta/ of versions 2.0, 2.1 and 3.0 into one form.

v2: one parquet and one mp4 per episode, episodes and tasks as JSON lines. v3.0: many episodes per file, tables that say
where each episode lies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openpi_port import host
from openpi_port.errors import UserError, near

ASSETS = Path(__file__).resolve().parent.parent / "assets"
VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclasses.dataclass(frozen=True)
class Episode:
    """One demonstration.

    Attributes:
      index: its number in the data set.
      length: frames.
      data: parquet file with its rows, perhaps among others'.
      videos: {camera key: (file, when the episode starts in it, seconds)}.
    """

    index: int
    length: int
    data: Path
    videos: Mapping[str, tuple[Path, float]]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """A data set without its frames.

    Attributes:
      root: its directory.
      version: "v2.0", "v2.1" or "v3.0".
      robot: the robot's name as recorded, or "".
      fps: frames (and actions) per second.
      features: {key: {"dtype", "shape", "names", ...}} as in info.json.
      tasks: {task index: instruction}.
      episodes: in order.
    """

    root: Path
    version: str
    robot: str
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[int, str]
    episodes: tuple[Episode, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of all episodes."""
        return tuple(episode.index for episode in self.episodes)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Keys of the images, stored as video or embedded in the tables."""
        return tuple(k for k, f in self.features.items() if f["dtype"] in ("video", "image"))

    def feature(self, key: str, what: str) -> Mapping[str, Any]:
        """A feature by key.

        Raises:
          UserError: there is none; `what` ("state column", "camera") says what was looked for.
        """
        camera = what == "camera"
        known = self.cameras if camera else [k for k in self.features if k not in self.cameras]
        if key not in known:
            raise UserError(f"{self.root}: no {what} {key!r}; {near(key, known) if known else 'there is none'}")
        return self.features[key]


def resolve(repo_id: str, root: str | None = None) -> Path:
    """The directory of a data set, downloaded if need be.

    Args:
      repo_id: a data set that ships here ("aloha_sim_transfer_cube"), a local directory, `user/name` from LeRobot's
        home directory or else from the Hugging Face hub, or `hf://user/name`, which is the hub's in any case.
      root: where data sets are kept; None takes LeRobot's home directory, and the hub's own cache.

    Raises:
      UserError: there is no such directory, or the hub can't give it.
    """
    if (path := find_local(repo_id, root)) is not None:
        return path
    if not repo_id.startswith("hf://") and not _is_name(repo_id):
        shipped = ", ".join(_shipped()) or "none"
        raise UserError(
            f"{repo_id}: no such directory, and no data set that ships here ({shipped}); give a directory, user/name "
            "or hf://user/name"
        )
    # Imported here: it takes 0.3 s that a local data set need not wait for.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(_hub_name(repo_id), repo_type="dataset", cache_dir=root))
    except HFValidationError as error:
        raise UserError(f"{repo_id}: not a name on the Hugging Face hub; expected hf://user/name") from error
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError) as error:
        # The first line only: the hub's messages run over many.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{repo_id}: no such local directory, and the Hugging Face hub can't give it ({reason}); check the name, "
            "the network and, for a private data set, `hf auth login`"
        ) from error


def find_local(repo_id: str, root: str | None = None) -> Path | None:
    """The directory of a data set that is on this machine, the hub's cache left aside; None where it is not.

    Args:
      repo_id, root: see `resolve`.
    """
    if repo_id in _shipped():
        return ASSETS / repo_id
    if repo_id.startswith("hf://"):
        return None
    path = Path(repo_id).expanduser()
    if path.is_dir():
        return path
    if not _is_name(repo_id):
        return None
    kept = (Path(root).expanduser() if root else _lerobot_home()) / repo_id
    return kept if (kept / "meta" / "info.json").is_file() else None


def _shipped() -> list[str]:
    return sorted(p.parent.parent.name for p in ASSETS.glob("*/meta/info.json"))


def _is_name(repo_id: str) -> bool:
    """Whether it could be a `user/name` on the hub."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) is not None and not repo_id.startswith((".", "~"))


def _hub_name(repo_id: str) -> str:
    return repo_id.removeprefix("hf://").removeprefix("datasets/").strip("/")


def _lerobot_home() -> Path:
    """Where LeRobot records data sets, and downloads them to."""
    hub = os.environ.get("HF_HOME") or host.cache() / "huggingface"
    return Path(os.environ.get("HF_LEROBOT_HOME") or f"{hub}/lerobot").expanduser()


def load_metadata(root: str | Path) -> Metadata:
    """Reads meta/ of a data set.

    Raises:
      UserError: a file is missing or unreadable, or the version is not one of 2.0, 2.1, 3.0.
    """
    root = Path(root)
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise UserError(f"{path}: missing, so {root} is no LeRobot data set; give the directory that holds meta/")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error}); download the data set again") from error
    with _as_written(path):
        version = info.get("codebase_version", "none")
        if version not in VERSIONS:
            raise UserError(
                f"{path}: codebase_version {version} is not supported ({', '.join(VERSIONS)} are); convert the data "
                "set with LeRobot's own scripts"
            )
        missing = [key for key in ("fps", "features", "data_path") if not info.get(key)]
        if missing:
            raise UserError(f"{path}: no {', '.join(missing)}; download the data set again")
        fps, features = float(info["fps"]), info["features"]
        videos = {key: info.get("video_path") for key, feature in features.items() if feature["dtype"] == "video"}
        if not all(videos.values()):
            raise UserError(f"{path}: no video_path; download the data set again")
    read = _read_v3 if version == "v3.0" else _read_v2
    tasks, episodes = read(root, info, videos)
    if bad := next((episode for episode in episodes if episode.length < 0), None):
        raise UserError(f"{root / 'meta'}: episode {bad.index} has {bad.length} frames; download the data set again")
    return Metadata(
        root=root,
        version=version,
        robot=info.get("robot_type") or "",
        fps=fps,
        features=features,
        tasks=tasks,
        episodes=episodes,
    )


def _read_v2(root: Path, info: dict[str, Any], videos: Mapping[str, str]) -> tuple[dict[int, str], tuple[Episode, ...]]:
    path = root / "meta" / "tasks.jsonl"
    with _as_written(path):
        tasks = {row["task_index"]: row["task"] for row in _json_lines(path)}
    with _as_written(root / "meta" / "info.json"):
        chunk = int(info["chunks_size"])
    path, episodes = root / "meta" / "episodes.jsonl", []
    with _as_written(path):
        for row in _json_lines(path):
            index = int(row["episode_index"])
            names = {"episode_chunk": index // chunk, "episode_index": index}
            episodes.append(
                Episode(
                    index=index,
                    length=int(row["length"]),
                    data=root / info["data_path"].format(**names),
                    videos={k: (root / place.format(video_key=k, **names), 0.0) for k, place in videos.items()},
                )
            )
    return tasks, tuple(episodes)


def _read_v3(root: Path, info: dict[str, Any], videos: Mapping[str, str]) -> tuple[dict[int, str], tuple[Episode, ...]]:
    path = root / "meta" / "tasks.parquet"
    # LeRobot writes a pandas frame whose index is the text; pandas names an unnamed index like this.
    text = "task" if "task" in read_parquet(path).column_names else "__index_level_0__"
    table = read_parquet(path, ["task_index", text])
    tasks = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))

    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise UserError(f"{root / 'meta' / 'episodes'}: no parquet file; download the data set again")

    @functools.cache  # thousands of episodes share a file
    def place(template: str, chunk: int, file: int, key: str = "") -> Path:
        return root / template.format(chunk_index=chunk, file_index=file, video_key=key)

    episodes = []
    for path in files:
        # Column by column: of a hundred thousand episodes, rows as dictionaries take seconds.
        names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for key in videos:
            names += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        columns = [column.to_pylist() for column in read_parquet(path, names).columns]
        with _as_written(path):
            for index, length, chunk, file, *shown in zip(*columns, strict=True):
                where = {
                    key: (place(template, shown[3 * i], shown[3 * i + 1], key), float(shown[3 * i + 2]))
                    for i, (key, template) in enumerate(videos.items())
                }
                episodes.append(Episode(int(index), int(length), place(info["data_path"], chunk, file), where))
    return tasks, tuple(sorted(episodes, key=lambda e: e.index))


@contextlib.contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Turns what a file lacks, or holds in another form than LeRobot writes it, into one line that names the file."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}: no {error.args[0]!r}; download the data set again") from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not as LeRobot writes it ({error}); download the data set again") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); download the data set again") from error
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON lines ({error}); download the data set again") from error


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A parquet file.

    Raises:
      UserError: it is missing or damaged, or lacks a column.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: parquet file is missing; download the data set again, or leave its episodes out "
            "(config.data.skip, config.data.episodes)"
        )
    try:
        file = pq.ParquetFile(path, memory_map=True)
        lacking = [column for column in columns or [] if column not in file.schema_arrow.names]
        if lacking:
            raise UserError(f"{path}: no column {lacking[0]!r}; {near(lacking[0], file.schema_arrow.names)}")
        return file.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: parquet file is damaged ({error}); download the data set again") from error
