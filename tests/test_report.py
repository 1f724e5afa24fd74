"""Reports: the notebook and the page, for any set of runs; the page in a real browser, without a network, by mouse and by axe."""
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_lab import CHROMIUM, QUIET, Page, stop, wait_for

from mainrun_nb import cli, report
from mainrun_nb.compare import find_runs, incomparable, recipes
from mainrun_nb.config import InputError, flatten, save_config, tiny
from mainrun_nb.page import axis_of_values
from mainrun_nb.report import importance, make_report, watch, write_html
from mainrun_nb.search import Leaderboard, Trial

SETTINGS = ("hyperparams.lr", "hyperparams.optimizer", "model_configs.gpt.n_layer")
HOSTILE = '</script><img src=x onerror="document.title=1">'


def made_up(number: int) -> Trial:
    """A trial with a loss that depends on its learning rate alone."""
    lr = 10 ** (-4 + number / 10)
    loss = 1.5 + 0.1 * np.log10(lr / 1e-3) ** 2
    params = dict(zip(SETTINGS, (lr, ["adamw", "adagrad"][number % 2], 1 + number % 3), strict=True))
    return Trial(number, params, "complete", loss, seconds=5.0 + number, evaluations=[3.0, loss],
                 metrics={"val/loss": loss, "val/coverage": 0.875, "val/challenge_loss": loss * 0.875})


def write_run(folder: Path, loss: float, seed: int = 1337, split: str = "5" * 64, steps: int = 60, **more) -> Path:
    """A finished run's folder, as `train` leaves it but for the weights."""
    folder.mkdir(parents=True)
    cfg = tiny(f"hyperparams.seed={seed}", f"hyperparams.max_steps={steps}", *more.pop("overrides", ()))
    save_config(cfg, folder / "config.yaml")
    data = {"source": "synthetic", "n_titles": 2000, "sha256": split, "reference/bigram": 1.37, "reference/kneser_ney": 1.28}
    events = [{"event": "hyperparameters_configured", **flatten(cfg)}, {"event": "dataset_info", **data},
              {"event": "memory_estimate", "method": "formula", "predicted_bytes": 123000000}]
    for step in range(1, steps + 1):
        events.append({"event": "training_step", "step": step, "max_steps": steps, "seconds": 0.5, "skipped": int(step > 40),
                       "train/nats_per_char": loss + 2 / step})
        if step % 20 == 0:
            events.append({"event": "validation_step", "step": step, "seconds": step / 2, "val/loss": loss + 1 / step - 1 / steps})
    result = {"val/loss": loss, "val/challenge_loss": loss * 0.95, "val/coverage": 0.95, "parameters": 45000, "tokens_per_second": 9000.0,
              "train_seconds": 30.0, "peak_memory_bytes": 4e8, "data": data, "versions": {"torch": "2.13.0"}, "commit": "abc123", **more}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "samples.txt").write_text("Show HN: A title\n" + HOSTILE + "\n")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sweep's folder with twenty-four trials, of which four did not end well."""
    out = tmp_path / "my <sweep>"
    out.mkdir()
    for trial in [*map(made_up, range(20)), Trial(20, {"hyperparams.lr": 9.0}, "failed", error="exploded & <died>"),
                  Trial(21, {}, "skipped", error="memory: a step needs 9 GB"), Trial(22, {}, "invalid", error="heads"),
                  Trial(23, {"hyperparams.lr": 1.0}, "pruned", 2.9, evaluations=[2.9])]:  # fmt: skip
        trial.save(out)
        if trial.status == "complete":
            write_run(trial.folder(out) / "run", trial.value, overrides=[f"{k}={v}" for k, v in trial.params.items()])
    (out / "sweep.json").write_text(json.dumps({"metric": "val/loss", "goal": "minimize"}))
    return out


def data_of(page: str) -> dict:
    """What the page's script is given."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page)[1])


def frame(page: str) -> str:
    """The page without its scripts."""
    return page.split('<script type="application/json"')[0]


def test_the_page_has_what_it_should(folder):
    text = write_html(folder).read_text()
    for part in ("24 runs of 23 recipes (20 finished", "20 complete", "coverage", "95.0%", "exploded &amp; &lt;died&gt;",
                 "my &lt;sweep&gt;", "hyperparams.lr explains", "1.28", "memory predicted", "0.123 GB, by formula", "skipped steps"):
        assert part in text, part
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert {"All settings", "Against hyperparams.lr", "Against the time of a trial", "What matters"} <= set(titles)
    assert "<died>" not in frame(text) and not re.search(r'<link|(src|href)="(?!#)', frame(text)), "not self-contained"


def test_nothing_in_a_run_becomes_markup(tmp_path):
    """Name, error, settings, results, events and samples that would be tags; the page has as many tags as without them."""
    def tags(evil: str, where: str) -> list[str]:
        place = tmp_path / where / evil.replace("/", "")
        run = write_run(place / evil.replace("/", ""), 1.5, commit=evil, versions={"torch": evil, evil: evil})
        write_run(place / "other", 1.6, data={"sha256": evil, "source": evil})
        with (run / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"event": evil, "why": evil, evil: 1}) + "\n")
        (run / "samples.txt").write_text(evil)
        with (place / "results.csv").open("w", newline="") as ledger:
            csv.writer(ledger).writerows([["study", "name", "seed", "status", "val/loss", "error", "command"],
                                          [evil, evil, 1, "failed", "", evil, evil]])
        text = write_html(place, tmp_path / f"{where}.html").read_text()
        assert text.count("</script>") == 3
        return re.findall(r"<[a-z/][^<>]{0,10}", frame(text))

    assert tags(HOSTILE, "evil") == tags("plain", "plain")


def test_what_does_not_compare_is_said(tmp_path):
    write_run(tmp_path / "a", 1.5)
    write_run(tmp_path / "b", 1.3, split="6" * 64)
    write_run(tmp_path / "c", 1.2, **{"val/coverage": 0.5, "lossless": False})
    runs = find_runs([tmp_path])
    said = " ".join(incomparable(runs))
    assert "2 different sets" in said and "Not lossless: c" in said and "from 50.0% to 95.0%" in said
    assert [r.name for r in recipes(runs)] == ["a", "c", "b"], "neither the lossy one nor the one on other titles is the best"
    page = write_html([tmp_path], tmp_path / "page.html").read_text()
    assert "Not everything here compares" in page and "not lossless" in page


def test_seeds_are_grouped_and_paired(tmp_path):
    for seed, noise in [(1, 0.0), (2, 0.05), (3, 0.1)]:
        write_run(tmp_path / f"a-{seed}", 1.4 + noise, seed)
        write_run(tmp_path / f"b-{seed}", 1.5 + noise, seed, overrides=["hyperparams.lr=0.5"])
    page = frame(write_html(tmp_path, tmp_path / "page.html").read_text())
    assert "6 runs of 2 recipes" in page and "1.4500 ± 0.0289 nats per character (mean of 3 seeds)" in page
    assert "+0.1000 ± 0.0000 (3 seeds)" in page, "the noise that both have is gone"


def test_every_recipe_has_a_name_and_a_colour_of_its_own(tmp_path):
    """Two recipes with the same seeds in one sweep, as search/seeds makes them, and runs whose names end in what is also their seed."""
    out = tmp_path / "seeds"
    for number in range(10):
        trial = Trial(number, {"hyperparams.seed": 1 + number // 2, "hyperparams.shuffle": bool(number % 2)}, "complete", 1.5)
        trial.save(out)
        write_run(trial.folder(out) / "run", 1.5 + 0.1 * (number % 2), trial.params["hyperparams.seed"],
                  overrides=[f"hyperparams.shuffle={number % 2 == 1}"])
    (out / "sweep.json").write_text(json.dumps({"metric": "val/loss", "goal": "minimize"}))
    write_run(tmp_path / "d512", 1.7, seed=2, overrides=["hyperparams.lr=0.5"])
    names = ["seeds/trial, shuffle=false", "seeds/trial, shuffle=true", "d512"]
    found = recipes(find_runs([out, tmp_path / "d512"]))
    assert [(r.name, len(r.seeds)) for r in found] == list(zip(names, (5, 5, 1), strict=True))
    assert report.colours_of(found) == dict(zip(names, ("var(--c0)", "var(--c1)", "var(--c2)"), strict=True))
    page = frame(write_html([out, tmp_path / "d512"], tmp_path / "page.html").read_text())
    assert "11 runs of 3 recipes" in page and all(name in page for name in names)


@pytest.mark.parametrize("damage", ["", "[]", "{", "null", "\x00\xff", '{"val/loss": "high", "data": [1], "versions": 3, "device": null}',
                                    '{"val/loss": 1e999, "parameters": -1}', "[" * 200_000])
@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "config.yaml", "samples.txt", "../trial.json", "../../sweep.json",
                                  "../../base.yaml"])
def test_damage_is_a_line_on_the_page(tmp_path, name, damage):
    trial = Trial(0, {"hyperparams.lr": 0.1}, "complete", 1.5)
    trial.save(tmp_path / "sweep")
    run = write_run(tmp_path / "sweep" / "trial-0000" / "run", 1.5)
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"metric": "val/loss", "goal": "minimize"}))
    write_run(tmp_path / "sound", 1.4)
    (run / name).write_bytes(damage.encode("latin-1"))
    page = write_html(tmp_path, tmp_path / "page.html").read_text()
    assert "2 runs" in page and "1.4000" in page and "sweep/trial-0000" in page


@pytest.mark.parametrize("event", [
    {"event": "training_step"}, {"event": "training_step", "step": "a", "train/nats_per_char": 1}, {"event": 3},
    {"event": "validation_step", "step": 1, "val/loss": None}, {"event": "dataset_info", "tokenizer": 5},
    {"event": "hyperparameters_configured", "hyperparams.batch_size": "many", "a.b": {"c": [1]}},
    {"event": "run_resumed", "step": 5}, {"event": "memory_estimate", "predicted_bytes": "much"}])
def test_half_a_log_is_no_error(tmp_path, event):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(event) + "\n" + '{"event": "training_st')
    assert "1 run" in write_html(tmp_path / "run").read_text()


def test_the_learning_rate_is_what_matters(folder):
    shares = importance(report.boards(find_runs([folder]))[0])
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
    axis = axis_of_values("a", list("xxyyz"))
    missed, by_mean = np.array([-1.0, 1.0, 1.0, -1.0, 4.5]), y - (y.sum() - y) / 4
    assert report.explained(report.design(axis), y[:, None])[0] == pytest.approx(1 - (missed**2).sum() / (by_mean**2).sum())


@pytest.mark.parametrize("trials", [[], [Trial(0, {"hyperparams.lr": 0.1}, "failed", error="x")], [made_up(1)], [made_up(1)] * 8])
def test_little_to_show_is_no_error(tmp_path, trials):
    board = Leaderboard(list(trials))
    for draw in (report.plot_overview, report.plot_settings, report.plot_parallel):
        draw(board).savefig(tmp_path / "x.png")
    assert importance(board) == {}


def test_what_is_no_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for make in (write_html, make_report):
        with pytest.raises(InputError, match="neither the folder of a sweep nor that of a run"):
            make(tmp_path)
        with pytest.raises(InputError, match="nowhere: no such file or folder"):
            make(tmp_path / "nowhere")
        with pytest.raises(InputError, match="a report needs"):
            make([])
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="is no ledger"):
        write_html(tmp_path / "notes.csv")
    run = write_run(tmp_path / "run", 1.5)
    with pytest.raises(InputError, match="is a folder"):
        write_html(run, tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        write_html(run, tmp_path / "no" / "page.html")
    (tmp_path / "sweeps").mkdir()
    shutil.copy(Path(__file__).parents[1] / "sweeps/report.ipynb", tmp_path / "sweeps")
    with pytest.raises(InputError, match="would replace the template"):
        make_report(run, tmp_path / "sweeps" / "report.html")
    assert (tmp_path / "sweeps/report.ipynb").read_bytes() == (Path(__file__).parents[1] / "sweeps/report.ipynb").read_bytes()


def test_where_the_page_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = (write_run(tmp_path / "runs" / name, 1.5) for name in "ab")
    assert write_html(a) == a / "report.html"
    assert write_html([a, b]) == write_html("runs") == Path("report.html")
    assert write_html([a, a, "runs"]).read_text().count('<details id="run-') == 2, "each run once"


def test_two_runs_side_by_side(tmp_path, capsys):
    a = write_run(tmp_path / "a", 1.5)
    b = write_run(tmp_path / "b", 1.4, split="6" * 64, overrides=["hyperparams.lr=0.5"])
    cli.report_cli(str(a), str(b), diff=True)
    said = capsys.readouterr().out
    assert re.search(r"hyperparams\.lr +0\.003 +0\.5", said) and re.search(r"val/loss +1\.5 +1\.4", said) and "different sets" in said
    assert "n_layer" not in said and "versions and machine: no difference" in said
    for folders in ([str(a)], [str(a), str(a)], [str(tmp_path), str(a), str(write_run(tmp_path / "c", 1.3))]):
        with pytest.raises(SystemExit) as stopped:
            cli.report_cli(*folders, diff=True)
        assert stopped.value.code == 2 and "--diff: needs the folders of two runs" in capsys.readouterr().err


def test_it_is_small_and_large_sets_are_cut(tmp_path, monkeypatch):
    for i in range(50):
        write_run(tmp_path / "runs" / f"run-{i}", 1.5 + i / 1000, overrides=[f"hyperparams.lr={0.001 * (i + 1)}"], steps=200)
    page = write_html(tmp_path / "runs", tmp_path / "page.html")
    assert page.stat().st_size < 2_000_000
    monkeypatch.setattr(report, "MOST_RUNS", 10)
    text = write_html(tmp_path / "runs", page).read_text()
    assert "The first 10 of 50" in text and text.count('<details id="run-') == 10 and text.count("<tr data-runs=") == 50


def test_watching_ends_with_ctrl_c(tmp_path):
    """The command itself: the page is there at once and reloads, follows the run, and stays still after Ctrl-C."""
    run = write_run(tmp_path / "run", 1.5)
    (run / "result.json").rename(tmp_path / "later.json")
    code = "import sys; sys.argv[0] = 'mainrun-report'; from mainrun_nb.cli import report_cli; report_cli()"
    process = subprocess.Popen([sys.executable, "-c", code, str(run), "--watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().strip() == str(run / "report.html")
        text = (run / "report.html").read_text()
        assert data_of(text)["live"] > 0 and "none has finished yet" in text
        (tmp_path / "later.json").rename(run / "result.json")
        wait_for(lambda: "The best loss is 1.5000" in (run / "report.html").read_text(), 60)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, process.stderr.read()
        assert data_of((run / "report.html").read_text())["live"] == 0
    finally:
        stop(process)


def test_watching_outlives_a_folder_that_goes(tmp_path, monkeypatch):
    run, looks = write_run(tmp_path / "run", 1.5), []

    def look(seconds):
        looks.append((tmp_path / "page.html").exists())
        if len(looks) == 1:
            run.rename(tmp_path / "moved")
        elif len(looks) == 2:
            (tmp_path / "moved").rename(run)
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", look)
    assert watch(run, tmp_path / "page.html", told=lambda page: None).exists() and looks == [True] * 3


@pytest.mark.slow
def test_the_notebook_and_the_page_of_a_sweep_a_run_and_the_ledger(folder, tmp_path):
    page = make_report([folder, write_run(tmp_path / "run", 1.45), Path(__file__).parents[1] / "sweeps/results.csv"], tmp_path / "all.html")
    cells = json.loads((tmp_path / "all.ipynb").read_text())["cells"]
    shown = json.dumps([c.get("outputs", []) for c in cells])
    assert page == tmp_path / "all.html" and shown.count('"image/png"') == 5 and "coverage" in shown and "exploded" in shown
    assert '"name": "stderr"' not in shown and "full/final" in page.read_text()


# --- in a browser ---


def axe() -> str | None:
    """axe-core's code, where npm has put it: beside this checkout's tests, or where NODE_PATH says."""
    roots = [Path(__file__).parents[1] / "node_modules", *map(Path, filter(None, os.environ.get("NODE_PATH", "").split(os.pathsep)))]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(["npm", "root", "--global"], capture_output=True, text=True, timeout=60, check=True).stdout
        roots.append(Path(said.strip()))
    return next((p.read_text() for root in roots if (p := root / "axe-core/axe.min.js").is_file()), None)


class Tab(Page):
    """A page with a size and a colour scheme, whose console and requests are kept."""

    def __init__(self, port: int, path: Path, width: int, scheme: str) -> None:
        super().__init__(port, "about:blank")
        self.console, self.requests = [], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=f"file://{path}")
        self.ready()

    def ready(self) -> None:
        wait_for(lambda: self.evaluate("(document.documentElement || {dataset: {}}).dataset.ready || ''"), 60)

    def call(self, method: str, **params) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            if answer.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.console.append(answer["params"])
            elif answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
        return answer.get("result", answer)

    def evaluate(self, code: str):
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def hover(self, selector: str) -> str:
        """What is said under the mouse over the middle of an element."""
        x, y = self.evaluate(f"""(() => {{ const d = document.querySelector('{selector}'); d.scrollIntoView({{block: 'center'}});
            const r = d.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }})()""")
        for dx in (4, 0):
            self.mouse("mouseMoved", x + dx, y)
        said = "(document.querySelector('#vg-tooltip-element.visible') || {}).textContent || ''"
        return wait_for(lambda: self.evaluate(said), 15)

    def type(self, text: str) -> None:
        """Into the filter of the table."""
        self.evaluate("document.getElementById('find').focus()")
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector('{selector}').click()")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[int]:
    if CHROMIUM is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    profile = tmp_path_factory.mktemp("chromium")
    command = [str(CHROMIUM), *QUIET.split(), "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    port = profile / "DevToolsActivePort"
    try:
        wait_for(lambda: port.exists() and port.read_text().splitlines()[1:], 60)
        yield int(port.read_text().splitlines()[0])
    finally:
        stop(process)


@pytest.fixture
def shown(folder, tmp_path) -> Path:
    """A page of everything there is: a sweep, runs with seeds, one on other titles, one under way, one with a hostile name, a ledger."""
    for seed in (1, 2, 3):
        write_run(tmp_path / "set" / f"wide-{seed}", 1.45 + seed / 100, seed, overrides=["hyperparams.lr=0.02"])
    write_run(tmp_path / "set" / "elsewhere", 1.1, split="6" * 64)
    write_run(tmp_path / "set" / HOSTILE.replace("/", ""), 1.7, overrides=["hyperparams.lr=0.04"])
    (write_run(tmp_path / "set" / "open", 1.6, overrides=["hyperparams.lr=0.03"]) / "result.json").unlink()
    return write_html([folder, tmp_path / "set", Path(__file__).parents[1] / "sweeps/results.csv"], tmp_path / "page.html")


NAMES = "[...document.querySelectorAll('.board tbody tr')].filter(r => !r.hidden).map(r => r.querySelector('th').textContent.trim())"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(browser, shown, width, scheme):
    tab = Tab(browser, shown, width, scheme)
    charts = tab.evaluate("""[...document.querySelectorAll('main > section > figure .chart, .charts .chart')].map(
        c => [c.dataset.chart, c.dataset.state, c.querySelectorAll('svg path').length, c.querySelector('svg').clientWidth])""")
    assert len(charts) >= 8 and all(state == "drawn" and paths > 5 and wide <= width for _, state, paths, wide in charts), charts
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "wider than the screen"
    # a point, a line and a run's own part
    assert "my <sweep>/trial-0010" in tab.hover("[data-chart=sweep-0-history] .mark-symbol path:last-child")
    names = tab.evaluate(NAMES)
    tab.click(".board tbody tr:nth-child(2) button")
    assert tab.evaluate("document.getElementById('said').textContent").startswith("Only ")
    faded = "[...document.querySelectorAll('[data-chart=curves] .mark-line path')].filter(p => p.getAttribute('opacity') < .2).length"
    wait_for(lambda: tab.evaluate(faded) > 3, 10)
    tab.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))")
    assert tab.evaluate("document.getElementById('said').textContent") == ""
    tab.click("#runs details:has(.chart) summary")
    wait_for(lambda: tab.evaluate("document.querySelector('#runs .chart').dataset.state == 'drawn'"), 15)
    # sorted both ways, and filtered
    tab.click(".board thead th:nth-child(2) button")
    losses = "[...document.querySelectorAll('.board tbody tr')].map(r => parseFloat(r.cells[1].dataset.value)).filter(v => !isNaN(v))"
    assert tab.evaluate(losses) == sorted(tab.evaluate(losses))
    tab.click(".board thead th:nth-child(2) button")
    assert tab.evaluate(losses) == sorted(tab.evaluate(losses), reverse=True)
    assert tab.evaluate("document.querySelector('.board thead th:nth-child(2)').getAttribute('aria-sort')") == "descending"
    tab.click(".board thead th:nth-child(2) button")
    assert tab.evaluate(NAMES) == names
    tab.type("lr=0.02 FINISHED")
    assert "wide" in tab.evaluate(NAMES) and len(tab.evaluate(NAMES)) < len(names)
    # another axis
    tab.evaluate("document.querySelector('input[value=minutes]').click()")
    wait_for(lambda: "minutes" in tab.evaluate("document.querySelector('[data-chart=curves] svg').textContent"), 10)
    assert tab.console == [] and [r for r in tab.requests if not r.startswith(("file:", "data:"))] == []
    assert tab.evaluate("document.title") != "1" and tab.evaluate("document.images.length") == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing(browser, shown, width, scheme):
    code = axe()
    if code is None:
        pytest.skip("needs axe-core: npm install --global axe-core")
    tab = Tab(browser, shown, width, scheme)
    tab.click("#runs details:has(.chart) summary")
    tab.click("#runs details summary")
    tab.click(".board tbody tr:nth-child(2) button")
    tab.evaluate(code + ";0")
    found = tab.evaluate("axe.run().then(r => r.violations.map(v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 200)]))")
    assert found == []
    assert tab.evaluate("axe.run().then(r => r.passes.length)") > 15


@pytest.mark.slow
def test_a_live_page_comes_back_as_it_was(browser, shown, tmp_path):
    page = tmp_path / "live.html"
    write_html(tmp_path / "set", page, live=2)
    tab = Tab(browser, page, 1280, "light")
    tab.click(".board thead th:nth-child(2) button")
    tab.type("wide")
    tab.evaluate("document.querySelector('input[value=tokens]').click(), window.before = true")
    write_run(tmp_path / "set" / "wide-4", 1.3, 4, overrides=["hyperparams.lr=0.02"])
    write_html(tmp_path / "set", page)
    wait_for(lambda: not tab.evaluate("window.before || false"), 30)
    tab.ready()
    assert tab.evaluate(NAMES) == ["wide"]
    assert tab.evaluate("document.querySelector('.board tbody tr:not([hidden])').cells[2].textContent") == "4"
    assert tab.evaluate("document.querySelector('input[value=tokens]').checked")
    assert tab.evaluate("document.querySelector('[aria-sort=ascending]').textContent").startswith("loss")


def test_a_page_replaces_nothing_but_a_page(tmp_path):
    run = write_run(tmp_path / "run", 1.45)
    mine = {name: (tmp_path / name) for name in ("titles.txt", "page.html", "analysis.ipynb")}
    for path in mine.values():
        path.write_text('{"mine": 1}')
    for out, why in ((run / "config.yaml", "ends in .html"), (run / "result.json", "ends in .html"), (mine["titles.txt"], "ends in .html"),
                     (mine["page.html"], "no page of today's mainrun-report"), (tmp_path / "analysis.html", "notebook beside the page")):
        with pytest.raises(InputError, match=why):
            make_report(run, out)
    assert all(path.read_text() == '{"mine": 1}' for path in mine.values()) and not (tmp_path / "analysis.html").exists()
    assert write_html(run, tmp_path / "new.html") == write_html(run, tmp_path / "new.html")
