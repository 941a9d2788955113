"""`sdgraph passes`."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdgraph.__main__ import main


def test_passes_lists_those_of_every_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "others-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[sdgraph.passes]\nTidy = tidy_passes:Tidy\nLost = not_there:Lost\n")
    (tmp_path / "tidy_passes.py").write_text(
        "from dataclasses import dataclass\nimport sdgraph\n\n"
        "@dataclass(frozen=True)\nclass Tidy(sdgraph.Pass):\n"
        '    """Tidy up. It does no more."""\n    level: int\n    contract = sdgraph.Contract.CLOSE(rtol=0.5)\n'
        "    may_change_nothing = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["passes"]) == 0
    said = capsys.readouterr().out
    titles = [part.partition("\n")[0] for part in said.split("\n\n")]
    assert {"CleanUp", "InheritFeatures", "MECondConv", "PruneBlocks", "Tidy, of others", "Lost, of others"} <= set(
        titles
    )
    assert "Tidy, of others\n  Tidy up.\n  contract  CLOSE(rtol=0.5, atol=1e-05)\n  options   level\n" in said
    assert "Lost, of others\n  cannot be loaded: No module named 'not_there'" in said
    assert "contract  EXACT, by default\n" in said  # that of MECondConv
    assert ".deep_cache(interval=3, branch=0)\n            DeepCache (Ma et al., 2023" in said
    assert main(["passes", "InheritFeatures"]) == 0
    said = capsys.readouterr().out
    assert "the number of calls from one computation of everything to the next" in said  # of a preset's option
    assert "\n  part is one of 'auto', 'branch', 'value', 'entry'\n" in said
    assert main(["passes", "Lost"]) == 2
    assert "repair or uninstall others" in capsys.readouterr().err
    assert main(["passes", "CleanUpp"]) == 2
    assert "did you mean 'CleanUp'" in capsys.readouterr().err
