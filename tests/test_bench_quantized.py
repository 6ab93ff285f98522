"""``python -m bench quantized``: a tiny run."""

import json

from bench.__main__ import main


def test_tiny_run(tmp_path, capsys):
    path = tmp_path / "quantized.json"
    assert main(["quantized", "--tiny", "--dtypes", "bf16", "--products", "tiled", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(r["bits"], r["group"]) for r in rows] == [(8, 0), (8, 128), (8, 64), (4, 0), (4, 128), (4, 64)]
    assert all(len(r["ratios"]) == len(r["rows"]) == 2 and min(r["ratios"]) > 0 for r in rows)
    assert "| bf16 | tiled | 4 bits, groups of 64 |" in capsys.readouterr().out
