"""What a LeRobot directory says about itself: finds it, reads meta/ of versions 2.0, 2.1 and 3.0 into one form.

v2: one parquet and one mp4 per episode, episodes and tasks as JSON lines. v3.0: many episodes per file, tables that say
where each episode lies.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openpi_port.errors import UserError, near

ASSETS = Path(__file__).resolve().parent.parent / "assets"
VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclasses.dataclass(frozen=True)
class Episode:
    """One demonstration.

    Attributes:
      index: its number in the data set.
      length: frames.
      tasks: instructions given in it.
      data: parquet file with its rows, perhaps among others'.
      videos: {camera key: (file, when the episode starts in it, seconds)}.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
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
            raise UserError(f"{self.root}: no {what} {key!r}; {near(key, known)}")
        return self.features[key]


def resolve(repo_id: str, root: str | None = None) -> Path:
    """The directory of a data set, downloaded if need be.

    Args:
      repo_id: a data set that ships here ("aloha_sim_transfer_cube"), a local directory, `user/name` or
        `hf://user/name` on the Hugging Face hub.
      root: where data sets from the hub are kept; None takes the hub's own cache.

    Raises:
      UserError: there is no such directory, or the hub can't give it.
    """
    shipped = sorted(p.parent.parent.name for p in ASSETS.glob("*/meta/info.json"))
    if repo_id in shipped:
        return ASSETS / repo_id
    if not repo_id.startswith("hf://"):
        path = Path(repo_id).expanduser()
        if path.is_dir():
            return path
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or repo_id.startswith((".", "~")):
            raise UserError(
                f"{repo_id}: no such directory, and no data set that ships here ({', '.join(shipped) or 'none'}); "
                "give a directory, user/name or hf://user/name"
            )
    name = repo_id.removeprefix("hf://").removeprefix("datasets/").strip("/")
    # Imported here: it takes 0.3 s that a local data set need not wait for.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", cache_dir=root))
    except HFValidationError as error:
        raise UserError(f"{repo_id}: not a name on the Hugging Face hub; expected hf://user/name") from error
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError) as error:
        # The first line only: the hub's messages run over many.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{repo_id}: no such local directory, and the Hugging Face hub can't give it ({reason}); check the name, "
            "the network and, for a private data set, `hf auth login`"
        ) from error


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
    version = info.get("codebase_version", "none")
    if version not in VERSIONS:
        raise UserError(
            f"{path}: codebase_version {version} is not supported ({', '.join(VERSIONS)} are); convert the data set "
            "with LeRobot's own scripts"
        )
    missing = [key for key in ("fps", "features", "data_path") if not info.get(key)]
    if missing:
        raise UserError(f"{path}: no {', '.join(missing)}; download the data set again")
    videos = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    read = _read_v3 if version == "v3.0" else _read_v2
    tasks, episodes = read(root, info, videos)
    return Metadata(
        root=root,
        version=version,
        robot=info.get("robot_type") or "",
        fps=float(info["fps"]),
        features=info["features"],
        tasks=tasks,
        episodes=episodes,
    )


def _read_v2(root: Path, info: dict[str, Any], videos: list[str]) -> tuple[dict[int, str], tuple[Episode, ...]]:
    tasks = {row["task_index"]: row["task"] for row in _json_lines(root / "meta" / "tasks.jsonl")}
    episodes = []
    for row in _json_lines(root / "meta" / "episodes.jsonl"):
        index = row["episode_index"]
        names = {"episode_chunk": index // info["chunks_size"], "episode_index": index}
        episodes.append(
            Episode(
                index=index,
                length=row["length"],
                tasks=tuple(row["tasks"]),
                data=root / info["data_path"].format(**names),
                videos={k: (root / info["video_path"].format(video_key=k, **names), 0.0) for k in videos},
            )
        )
    return tasks, tuple(episodes)


def _read_v3(root: Path, info: dict[str, Any], videos: list[str]) -> tuple[dict[int, str], tuple[Episode, ...]]:
    table = read_parquet(root / "meta" / "tasks.parquet")
    # LeRobot writes a pandas frame whose index is the text; pandas names an unnamed index like this.
    text = "task" if "task" in table.column_names else "__index_level_0__"
    tasks = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))

    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise UserError(f"{root / 'meta' / 'episodes'}: no parquet file; download the data set again")
    columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    for key in videos:
        columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    rows = [row for file in files for row in read_parquet(file, columns).to_pylist()]

    def place(template: str, row: dict[str, Any], kind: str, **names: str) -> Path:
        chunk, file = row[f"{kind}/chunk_index"], row[f"{kind}/file_index"]
        return root / template.format(chunk_index=chunk, file_index=file, **names)

    def episode(row: dict[str, Any]) -> Episode:
        return Episode(
            index=row["episode_index"],
            length=row["length"],
            tasks=tuple(row["tasks"]),
            data=place(info["data_path"], row, "data"),
            videos={
                key: (
                    place(info["video_path"], row, f"videos/{key}", video_key=key),
                    row[f"videos/{key}/from_timestamp"],
                )
                for key in videos
            },
        )

    return tasks, tuple(sorted(map(episode, rows), key=lambda e: e.index))


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
        raise UserError(f"{path}: parquet file is missing; download the data set again, or leave the episode out")
    try:
        file = pq.ParquetFile(path, memory_map=True)
        lacking = [column for column in columns or [] if column not in file.schema_arrow.names]
        if lacking:
            raise UserError(f"{path}: no column {lacking[0]!r}; {near(lacking[0], file.schema_arrow.names)}")
        return file.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: parquet file is damaged ({error}); download the data set again") from error
