"""JupyterLab for real: `make lab` as it is written, a headless Chromium, all cells of a chapter run, and no error found."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None)
pytestmark = pytest.mark.slow
QUIET = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"

# What the page is asked once the chapter is open. `jupyterapp` is there because the server is told to show it.
RUN_ALL = """(async () => {
  const panel = jupyterapp.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
  await jupyterapp.commands.execute('notebook:run-all-cells');
  const cells = panel.content.model.sharedModel.toJSON().cells.filter(c => c.cell_type === 'code');
  const kernel = panel.sessionContext.session.kernel;
  let where = '';
  const asked = kernel.requestExecute({code: 'import sys; print(sys.prefix)'});
  asked.onIOPub = m => { if (m.header.msg_type === 'stream') where += m.content.text; };
  await asked.done;
  return {where: where.trim(), kernel: panel.sessionContext.kernelDisplayName, cells};
})()"""
READY = "!!(window.jupyterapp && jupyterapp.shell.currentWidget && jupyterapp.shell.currentWidget.sessionContext \
&& jupyterapp.shell.currentWidget.sessionContext.session && jupyterapp.shell.currentWidget.sessionContext.session.kernel)"


def wait_for(what, seconds: float):
    """The first true answer of `what`, asked again and again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except OSError:
            pass
        time.sleep(0.3)
    raise TimeoutError(f"{what} was never true")


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A copy of the chapters."""
    home = tmp_path_factory.mktemp("lab")
    for name in ("nbs", "mainrun_nb", "sweeps"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs"))
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, home)
    return home


@pytest.fixture(scope="module")
def lab(home) -> Iterator[str]:
    """The address of a JupyterLab, started there by the Makefile's own line."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = f"--allow-root --no-browser --port={port} --IdentityProvider.token=t --LabApp.expose_app_in_browser=True"
    show = ["make", "--silent", "--just-print", "lab", f"ARGS={flags}"]
    said = subprocess.run(show, cwd=home, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
    line = said.splitlines()[-1]
    assert ".venv/bin/jupyter lab" in line
    line = "exec env " + line.replace(".venv/bin", str(BIN))
    env = {**os.environ, "PYTHONPATH": str(home), "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data")}
    with open(home / "log", "w") as log:
        server = subprocess.Popen(["bash", "-c", line], cwd=home, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: urllib.request.urlopen(f"{address}/api/status?token=t", timeout=5).status == 200, 60)
        yield address
    finally:
        stop(server)


class Page:
    """One page of a headless Chromium, driven through its DevTools protocol."""

    def __init__(self, port: int, url: str) -> None:
        import websocket

        request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?{url}", method="PUT")
        target = json.load(urllib.request.urlopen(request, timeout=30))
        self.socket = websocket.create_connection(target["webSocketDebuggerUrl"], timeout=240, suppress_origin=True)
        self.number = 0

    def evaluate(self, code: str):
        """The value of a JavaScript expression, awaited."""
        self.number += 1
        params = {"expression": code, "awaitPromise": True, "returnByValue": True}
        self.socket.send(json.dumps({"id": self.number, "method": "Runtime.evaluate", "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        assert "exceptionDetails" not in answer.get("result", {}), answer
        return answer["result"]["result"].get("value")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[int]:
    """The DevTools port of a headless Chromium."""
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


# What JupyterLab adds to a notebook that it opens, and what a run of its cells leaves.
LANGUAGE = {"codemirror_mode": {"name": "ipython", "version": 3}, "file_extension": ".py", "mimetype": "text/x-python", "name": "python",
            "nbconvert_exporter": "python", "pygments_lexer": "ipython3", "version": "3.12.3"}  # fmt: skip
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def contents(lab: str, path: str, model: dict | None = None) -> dict:
    """A file as the server gives it; with a model, saved as the page saves it."""
    data, head = (json.dumps(model).encode() if model else None), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{lab}/api/contents/{path}?token=t", data=data, headers=head, method="PUT" if model else "GET")
    return json.load(urllib.request.urlopen(request, timeout=30))


def test_what_lab_saves_is_what_was_there(lab, home):
    """Without a browser: every notebook is saved with what Lab adds, and no byte of it changes."""
    for path in sorted([*home.glob("nbs/*.ipynb"), *home.glob("sweeps/*.ipynb")]):
        before, name = path.read_bytes(), path.relative_to(home).as_posix()
        notebook = contents(lab, name)["content"]
        notebook["metadata"] = {"kernelspec": KERNEL, "language_info": LANGUAGE}
        for cell in notebook["cells"]:
            cell["metadata"] |= {"scrolled": True, "trusted": True}
            if cell["cell_type"] == "code":
                cell["execution_count"] = 7
        contents(lab, name, {"type": "notebook", "format": "json", "content": notebook})
        assert path.read_bytes() == before, name


def test_opening_and_saving_a_chapter_changes_no_byte(lab, browser, home):
    before = (home / "nbs/00a_config.ipynb").read_bytes()
    page = Page(browser, f"{lab}/lab/tree/nbs/00a_config.ipynb?token=t&reset")
    wait_for(lambda: page.evaluate(READY), 90)
    assert page.evaluate("(async () => { await jupyterapp.commands.execute('docmanager:save'); return 'saved'; })()") == "saved"
    assert "language_info" in page.evaluate("jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().metadata")
    assert (home / "nbs/00a_config.ipynb").read_bytes() == before


@pytest.mark.parametrize("chapter", ["00a_config", "10_attention"])
def test_a_chapter_runs_in_jupyterlab(lab, browser, chapter):
    page = Page(browser, f"{lab}/lab/tree/nbs/{chapter}.ipynb?token=t&reset")
    wait_for(lambda: page.evaluate(READY), 90)
    found = page.evaluate(RUN_ALL)
    assert found["where"] == sys.prefix, "the kernel is not the environment's own Python"
    ran = [c for c in found["cells"] if "".join(c["source"]).strip()]
    assert ran and all(c["execution_count"] for c in ran), "a cell was not run"
    for cell in ran:
        for out in cell["outputs"]:
            assert out["output_type"] != "error" and out.get("name") != "stderr", (cell["source"], out)
