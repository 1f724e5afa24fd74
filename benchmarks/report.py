"""The page of many runs: seconds to write it, its size, and seconds until a browser shows it.

    python benchmarks/report.py [--runs 200]        writes benchmarks/results/report.json

The runs are made-up folders: 500 training steps and 20 evaluations each. Shown means that every picture is drawn, in a headless Chromium.
"""
import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def write_run(folder: Path, number: int) -> None:
    """A finished run as a folder: log and result."""
    from mainrun_nb.config import flatten, tiny

    folder.mkdir(parents=True)
    cfg = tiny(f"hyperparams.lr={0.0001 * (1 + number // 3)}", f"hyperparams.seed={number % 3}")
    loss = 1.3 + 0.001 * number
    events = [{"event": "hyperparameters_configured", **flatten(cfg)}]
    for step in range(1, 501):
        events.append({"event": "training_step", "step": step, "max_steps": 500, "seconds": 0.1, "train/nats_per_char": loss + 2 / step})
        if step % 25 == 0:
            events.append({"event": "validation_step", "step": step, "seconds": step / 10, "val/loss": loss + 1 / step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    result = {"val/loss": loss, "val/coverage": 0.95, "data": {"sha256": "5" * 64, "reference/kneser_ney": 1.2855}}
    (folder / "result.json").write_text(json.dumps(result))


def seconds_to_show(page: Path, profile: Path) -> float:
    """From the browser's being asked for the page until every picture is drawn."""
    from test_lab import CHROMIUM, QUIET, Page, stop, wait_for

    command = [str(CHROMIUM), *QUIET.split(), "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process, port = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), profile / "DevToolsActivePort"
    try:
        wait_for(lambda: port.exists() and port.read_text().splitlines()[1:], 60)
        began = time.perf_counter()
        tab = Page(int(port.read_text().splitlines()[0]), f"file://{page}")
        wait_for(lambda: tab.evaluate("(document.documentElement || {dataset: {}}).dataset.ready || ''"), 120)
        return time.perf_counter() - began
    finally:
        stop(process)


def main() -> None:
    from test_lab import CHROMIUM

    from mainrun_nb.report import write_html

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    folder = Path(tempfile.mkdtemp())
    try:
        for number in range(runs):
            write_run(folder / "runs" / f"run-{number}", number)
        began = time.perf_counter()
        page = write_html(folder / "runs", folder / "report.html")
        found = {"runs": runs, "seconds_to_write": round(time.perf_counter() - began, 2), "bytes": page.stat().st_size,
                 "seconds_to_show": round(seconds_to_show(page, folder / "profile"), 2) if CHROMIUM else None}
    finally:
        shutil.rmtree(folder)
    (ROOT / "benchmarks/results/report.json").write_text(json.dumps({**found, "machine": platform.machine()}, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    main()
