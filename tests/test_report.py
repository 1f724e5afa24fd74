"""Reports: the notebook and the page, for a sweep and for a single run; the page in a real browser, without a network."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mainrun_nb import report
from mainrun_nb.config import InputError, tiny
from mainrun_nb.report import importance, make_report, write_html
from mainrun_nb.search import Leaderboard, Trial, read_board

SETTINGS = ("hyperparams.lr", "hyperparams.optimizer", "model_configs.gpt.n_layer")


def made_up(number: int) -> Trial:
    """A trial with a loss that depends on its learning rate alone."""
    lr = 10 ** (-4 + number / 10)
    loss = 1.5 + 0.1 * np.log10(lr / 1e-3) ** 2
    params = dict(zip(SETTINGS, (lr, ["adamw", "adagrad"][number % 2], 1 + number % 3), strict=True))
    return Trial(number, params, "complete", loss, seconds=5.0 + number, evaluations=[3.0, loss],
                 metrics={"val/loss": loss, "val/coverage": 0.875, "val/challenge_loss": loss * 0.875})


pytest.importorskip("plotly", reason="the figures of a page are plotly's: make .venv/.all")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sweep's folder with twenty-four trials, of which four did not end well."""
    out = tmp_path / "my <sweep>"
    out.mkdir()
    for trial in [*map(made_up, range(20)), Trial(20, {"hyperparams.lr": 9.0}, "failed", error="exploded & <died>"),
                  Trial(21, {}, "skipped", error="memory: a step needs 9 GB"), Trial(22, {}, "invalid", error="heads"),
                  Trial(23, {"hyperparams.lr": 1.0}, "pruned", 2.9, evaluations=[2.9])]:  # fmt: skip
        trial.save(out)
    (out / "sweep.json").write_text(json.dumps({"metric": "val/loss", "goal": "minimize"}))
    return out


def test_the_page_has_what_it_should(folder):
    text = write_html(folder).read_text()
    for part in ("1 failed, 1 invalid, 1 pruned, 1 skipped", "20 complete", "<th>coverage</th>", "0.8750",
                 "exploded &amp; &lt;died&gt;", "my &lt;sweep&gt;", "Importance", "All settings", "Against time",
                 "Against hyperparams.lr", "Distribution", "Along the way"):  # fmt: skip
        assert part in text, part
    assert "<died>" not in text and text.count("Plotly.newPlot(") >= 8
    assert "<script src=" not in text and "<link" not in text, "not self-contained"


def test_the_learning_rate_is_what_matters(folder):
    shares = importance(read_board(folder))
    assert list(shares) == ["hyperparams.lr"] and shares["hyperparams.lr"] > 0.6


def planted(n: int, seed: int, others: int, effect: float, noise: float) -> Leaderboard:
    """Random trials with a valley over the learning rate's logarithm, noise, and other settings that do nothing."""
    rng, trials = np.random.default_rng([seed, n]), []
    for number in range(n):
        lr = 10 ** rng.uniform(-4, -1)
        idle = {"optimizer": ["adamw", "adagrad", "sgd"][rng.integers(3)], "n_layer": int(rng.integers(1, 5)),
                "decay": float(rng.uniform(0, 0.2)), "shuffle": bool(rng.integers(2))}
        loss = 1.5 + effect * (np.log10(lr) + 2.5) ** 2 + noise * rng.normal()
        trials.append(Trial(number, {"lr": lr, **dict(list(idle.items())[:others])}, "complete", float(loss)))
    return Leaderboard(trials)


@pytest.mark.parametrize("others", [2, 3, 4])
@pytest.mark.parametrize("n", [12, 16, 20])
def test_importance_names_what_was_planted_and_nothing_in_noise(n, others):
    named = [next(iter(importance(planted(n, seed, others, 0.3, 0.08))), None) for seed in range(20)]
    assert named.count("lr") >= 19, named
    assert sum(not importance(planted(n, seed, others, 0.0, 0.08)) for seed in range(20)) >= 16
    assert not importance(Leaderboard(planted(n, 0, others, 0.3, 0.0).trials[:11])), "too few trials to say anything"


def test_importance_is_leave_one_out():
    """Against leaving each trial out by hand; a value that only one trial has is predicted by the mean of the others."""
    y = np.array([1.0, 2.0, 4.0, 3.0, 7.0])
    axis = report.axis_of("a", [Trial(i, {"a": v}) for i, v in enumerate("xxyyz")])
    missed, by_mean = np.array([-1.0, 1.0, 1.0, -1.0, 4.5]), y - (y.sum() - y) / 4
    assert report.explained(axis.design, y[:, None])[0] == pytest.approx(1 - (missed**2).sum() / (by_mean**2).sum())


@pytest.mark.parametrize("trials", [[], [Trial(0, {"hyperparams.lr": 0.1}, "failed", error="x")], [made_up(1)], [made_up(1)] * 8])
def test_little_to_show_is_no_error(tmp_path, trials):
    board = Leaderboard(list(trials))
    for draw in (report.plot_overview, report.plot_settings, report.plot_parallel):
        draw(board).savefig(tmp_path / "x.png")
    assert report.board_html(board) and report.sweep_charts(board) and importance(board) == {}


def test_a_folder_that_is_neither(tmp_path, monkeypatch):
    for make in (write_html, make_report):
        with pytest.raises(InputError, match="neither the folder of a sweep nor that of a run"):
            make(tmp_path)
    for name in ("plotly", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'mainrun_nb\[plotly\]'"):
        make_report(tmp_path)


def test_axes():
    axis = report.axis_of("a", [Trial(i, {"a": v}) for i, v in enumerate([1e-4, 1e-2, 1e-3])])
    assert axis.log and axis.unit.tolist() == pytest.approx([0, 1, 0.5])
    axis = report.axis_of("a", [Trial(i, {"a": v}) for i, v in enumerate([[2, 1], True, [1], None])])
    assert axis.labels == ["[1]", "[2, 1]", "null", "true"] and axis.places == [1, 3, 0, 2]


@pytest.mark.slow
def test_the_notebook_and_the_page_of_a_sweep_and_of_a_run(folder, tmp_path):
    from mainrun_nb.trainer import train

    page = make_report(folder)
    cells = json.loads((folder / "report.ipynb").read_text())["cells"]
    shown = json.dumps([c.get("outputs", []) for c in cells])
    assert page == folder / "report.html" and shown.count('"image/png"') == 3 and "coverage" in shown and "exploded" in shown
    assert '"name": "stderr"' not in shown
    cfg = tiny("hyperparams.max_steps=3", "model_configs.gpt.n_layer=1")
    train(cfg, tmp_path / "run", progress=False)
    text = make_report(tmp_path / "run").read_text()
    assert "val/coverage" in text and text.count("Plotly.newPlot(") >= 1


@pytest.mark.slow
def test_the_page_in_a_browser(folder, tmp_path):
    """Every figure is drawn; the mouse over a point brings up its trial; nothing is asked of the network."""
    from test_lab import CHROMIUM, QUIET, Page, stop, wait_for

    if CHROMIUM is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    import subprocess

    page_path = write_html(folder)
    plain = tmp_path / "report.html"
    plain.write_text(page_path.read_text())
    profile = tmp_path / "chromium"
    command = [CHROMIUM, *QUIET.split(), "--window-size=1000,900", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    port = profile / "DevToolsActivePort"
    try:
        wait_for(lambda: port.exists() and port.read_text().splitlines()[1:], 60)
        page = Page(int(port.read_text().splitlines()[0]), f"file://{plain}")
        figures = page_path.read_text().count('id="figure-')
        ready = "document.readyState == 'complete' && document.querySelectorAll('.js-plotly-plot .main-svg').length"
        wait_for(lambda: page.evaluate(ready) >= figures, 90)
        drawn = page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].map(d => d.querySelectorAll("
                              "'.scatterlayer path, .barlayer path').length)")
        assert len(drawn) == figures and all(n > 0 for n in drawn), drawn
        assert page.evaluate("performance.getEntriesByType('resource').filter(r => r.name.startsWith('http')).length") == 0
        x, y = page.evaluate("""(() => { const d = document.getElementById('figure-0'); d.scrollIntoView({block: 'center'});
            const r = d.querySelectorAll('.scatterlayer .points path')[5].getBoundingClientRect();
            return [r.x + r.width / 2, r.y + r.height / 2]; })()""")
        for dx in (3, 0):
            page.number += 1
            move = {"type": "mouseMoved", "x": x + dx, "y": y}
            page.socket.send(json.dumps({"id": page.number, "method": "Input.dispatchMouseEvent", "params": move}))
            while json.loads(page.socket.recv()).get("id") != page.number:
                pass
        hover = "[...document.querySelectorAll('#figure-0 .hoverlayer text')].map(t => t.textContent).join(' ')"
        wait_for(lambda: "trial" in page.evaluate(hover), 15)
        best = sorted(read_board(folder).ranked, key=lambda t: t.value)[5]
        assert f"trial {best.number}: complete" in page.evaluate(hover) and "coverage 87.5%" in page.evaluate(hover)
    finally:
        stop(process)
