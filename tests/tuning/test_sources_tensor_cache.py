"""The folder that sources keep rows in: rows by their contents, in whole chunks within a bound, filled by several."""

from __future__ import annotations

import errno
import pickle
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdgraph.errors import TuningError
from sdgraph.runtime.digest import hash_text
from sdgraph.tuning.sources.tensor_cache import RECORD, TensorCache

COUNT, SIZE = 10, 4


def kept(folder: Path, recipe: str = "this", limit: int = 10**6) -> TensorCache:
    return TensorCache(folder, {"thing": recipe}, [f"row{row}" for row in range(COUNT)], SIZE, limit)


def numbers(rows: Sequence[int]) -> dict[str, Tensor]:
    return {"number": torch.tensor(list(rows)), "square": torch.tensor([[float(row**2)] for row in rows])}


def chunk(folder: Path, row: int) -> Path:
    """The file with a row."""
    names = [f"row{i}" for i in range(row // SIZE * SIZE, min(row // SIZE * SIZE + SIZE, COUNT))]
    return folder / f"rows-{hash_text(*names)}.safetensors"


def test_rows_come_back(tmp_path: Path) -> None:
    rows = kept(tmp_path / "new" / "folder")
    rows.fill(numbers, "test")
    found = rows.rows([9, 0, 5, 5])
    assert found["number"].tolist() == [9, 0, 5, 5]
    assert found["square"].tolist() == [[81], [0], [25], [25]]
    assert rows.rows([3], "square").keys() == {"square"}
    assert rows.rows([]) == {}


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    """An error in the middle is as a kill there: chunks appear by renaming."""
    asked: list[Sequence[int]] = []

    def stopping(rows: Sequence[int]) -> dict[str, Tensor]:
        asked.append(rows)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return numbers(rows)

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path).fill(stopping, "test")
    chunk(tmp_path, 4).with_suffix(".new").write_bytes(b"half")  # what a kill while writing leaves
    kept(tmp_path).fill(stopping, "test")
    kept(tmp_path).fill(stopping, "test")
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [8, 9]]
    assert kept(tmp_path).rows(range(COUNT))["number"].tolist() == list(range(COUNT))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", RECORD, *(chunk(tmp_path, i).name for i in (0, 4, 8))}


def test_processes_share_the_work(tmp_path: Path) -> None:
    """The first waits within its first chunk until the second has computed the others."""
    asked: dict[str, list[int]] = {"first": [], "second": []}
    begun, done = threading.Event(), threading.Event()

    def first(rows: Sequence[int]) -> dict[str, Tensor]:
        asked["first"].append(rows[0])
        begun.set()
        assert done.wait(20)
        return numbers(rows)

    def second(rows: Sequence[int]) -> dict[str, Tensor]:
        asked["second"].append(rows[0])
        if rows[0] == 8:
            done.set()
        return numbers(rows)

    other = threading.Thread(target=lambda: kept(tmp_path).fill(first, "first"))
    other.start()
    assert begun.wait(20)
    kept(tmp_path).fill(second, "second")
    other.join(20)
    assert asked == {"first": [0], "second": [4, 8]}
    assert kept(tmp_path).rows(range(COUNT))["number"].tolist() == list(range(COUNT))


def test_bounds_are_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TuningError, match=r"10 rows take 1.2e-07 GB(.|\n)*raise cache_limit to 121 bytes"):
        kept(tmp_path, limit=119).fill(numbers, "test")
    kept(tmp_path, limit=120).fill(numbers, "test")
    shutil.rmtree(tmp_path)
    usage = shutil.disk_usage(tmp_path.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(TuningError, match="the disk has 1e-07 GB left"):
        kept(tmp_path).fill(numbers, "test")
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_full_disk_keeps_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = safetensors.torch.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if path.stem == chunk(tmp_path, 4).stem:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(TuningError, match="cannot be written: No space left on device"):
        kept(tmp_path).fill(numbers, "test")
    assert [path.name for path in tmp_path.glob("rows-*")] == [chunk(tmp_path, 0).name]
    monkeypatch.undo()
    kept(tmp_path).fill(numbers, "test")
    assert kept(tmp_path).rows([0, 4])["number"].tolist() == [0, 4]


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    kept(tmp_path / "mine").fill(numbers, "test")
    with pytest.raises(TuningError, match="another thing: this then, that now"):
        kept(tmp_path / "mine", "that").fill(numbers, "test")
    (tmp_path / "mine" / RECORD).write_text("{")
    with pytest.raises(TuningError, match="is not JSON"):
        kept(tmp_path / "mine").fill(numbers, "test")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").touch()
    with pytest.raises(TuningError, match=r"holds other files, such as 1.png"):
        kept(tmp_path / "photos").fill(numbers, "test")
    with pytest.raises(TuningError, match="cannot be written: Not a directory"):
        kept(tmp_path / "photos" / "1.png" / "folder").fill(numbers, "test")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    kept(tmp_path).fill(numbers, "test")
    damaged = chunk(tmp_path, 4)
    damaged.write_bytes(b"nothing")
    with pytest.raises(TuningError, match=r"cannot be read(.|\n)*rows-(.|\n)*delete it"):
        kept(tmp_path).rows([5])
    damaged.unlink()
    kept(tmp_path).fill(numbers, "test")
    assert kept(tmp_path).rows([5])["number"].tolist() == [5]


# -- rows that come and go --------------------------------------------------------------------------------------------

Compute = Callable[[Sequence[int]], dict[str, Tensor]]


def recorded(keys: list[str], asked: list[str]) -> Compute:
    """Computes the number in the key of a row, and notes which keys were asked for."""

    def compute(rows: Sequence[int]) -> dict[str, Tensor]:
        asked.extend(keys[row] for row in rows)
        return {"number": torch.tensor([int(keys[row]) for row in rows])}

    return compute


@pytest.mark.law("Every row of a cache is computed once.")
@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=15), min_size=1, max_size=5))
def test_every_row_is_computed_once_however_rows_come_and_go(states: list[list[int]]) -> None:
    """A state is the rows that are wanted, in an order and with repetitions."""
    known: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for state in states:
            keys, asked = [str(number) for number in state], list[str]()
            rows = TensorCache(Path(folder), {"thing": "this"}, keys, SIZE, 10**6)
            rows.fill(recorded(keys, asked), "test")
            assert sorted(asked) == sorted(set(keys) - known)
            known |= set(keys)
            for source in (rows, pickle.loads(pickle.dumps(rows))):  # as another process gets it
                assert source.rows(range(len(keys)))["number"].tolist() == state


def test_rows_that_are_no_longer_read_count_for_the_limit(tmp_path: Path) -> None:
    kept(tmp_path, limit=120).fill(numbers, "test")
    other = TensorCache(tmp_path, {"thing": "this"}, ["row0", "new"], SIZE, 131)
    with pytest.raises(TuningError, match=r"11 rows take(.|\n)*133 bytes(.|\n)*9 of them are of other data"):
        other.fill(numbers, "test")


def test_a_row_that_is_gone_is_named(tmp_path: Path) -> None:
    rows = kept(tmp_path)
    rows.fill(numbers, "test")
    chunk(tmp_path, 4).unlink()
    with pytest.raises(TuningError, match="row 5 are gone"):
        kept(tmp_path).rows([5])
