"""`dynamoe demo` start to end, on a tiny base in place of the download."""

from dynamoe_hf import demo
from dynamoe_hf.folder import read_json


def test_the_whole_way(dense_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "obtain_model", lambda folder: dense_folder)
    monkeypatch.setattr(demo, "ROUTER_TOKENS", 2048)
    rows = demo.run_demo(out=str(tmp_path / "demo"), budgets=(0.9, 0.75), max_tokens=2048)
    assert [row["budget"] for row in rows] == [0.9, 0.75, 1.0]
    shown = capsys.readouterr().out
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert f"| {row['budget']:.0%} | {row['mean_share']:.1%} |" in shown
    assert len(read_json(tmp_path / "demo" / "trained" / "results.json")["evaluations"]) == 3
    assert (tmp_path / "demo" / "trained" / "report" / "index.html").is_file()
