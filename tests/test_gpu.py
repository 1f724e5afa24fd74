"""The GPU status check where nvidia-smi works, is missing, broken or hanging: it always answers, soon, and with a plain sentence."""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mainrun_nb import gpu

WORKS = """case "$1" in
*compute-apps*) echo "4242, 61440 MiB, /opt/venv/bin/python, train.py" ;;
*) echo "0, NVIDIA H100 80GB HBM3, 61444 MiB, 81559 MiB, 97 %, 61, 640.11 W"
   echo "1, NVIDIA H100 80GB HBM3, 3 MiB, 81559 MiB, 0 %, 30, 70.00 W" ;;
esac
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a pretended nvidia-smi (a shell script) first on the path; without a script there is none at all."""

    def put(script: str | None) -> None:
        for name in ("ps", "sh", "sleep"):
            (tmp_path / name).symlink_to(shutil.which(name))
        if script is not None:
            (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + script)
            (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    monkeypatch.setattr(gpu, "torch_view", lambda: "PyTorch sees no accelerator.")
    return put


def test_a_working_gpu(smi):
    smi(WORKS)
    text, well = gpu.gpu_report()
    assert well
    for word in ("NVIDIA H100 80GB HBM3", "61444 MiB", "97 %", "640.11 W", "4242", "/opt/venv/bin/python, train.py"):
        assert word in text


def test_an_idle_gpu(smi):
    smi('case "$1" in *compute-apps*) ;; *) echo "0, A, 1 MiB, 2 MiB, 0 %, 30, 70 W" ;; esac')
    assert "No process uses a GPU." in gpu.gpu_report()[0]


def test_whatever_ps_prints_there_is_a_table(smi, tmp_path):
    smi(WORKS)
    (tmp_path / "ps").unlink()
    (tmp_path / "ps").write_text("""#!/bin/sh
echo "   11    02:03  1.5  2048 python a.py, twice"
echo "   12    02:03  9.0  2048"
echo "   13 3-02:03:04  7,5 4096 python b.py"
echo "   14    02:03    -     - python of another kind"
printf '   15    02:03  0.0  1024 python c.py\\fon two\\n'
echo "error: a line that is no process"
echo "   16    02:03  0.0  0 "
""")
    (tmp_path / "ps").chmod(0o755)
    text, well = gpu.gpu_report()
    lines = [line for line in text[text.index("### Python") :].splitlines() if line.startswith("|")]
    assert well and [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]] == [
        ["13", "3-02:03:04", "7.5 %", "4 MiB", "python b.py"], ["11", "02:03", "1.5 %", "2 MiB", "python a.py, twice"],
        ["15", "02:03", "0.0 %", "1 MiB", "python c.py"]]


@pytest.mark.parametrize("answer", ["'0, A'", "'0, A | B, 1 MiB, 2 MiB, 0 %, 30, 70 W, and, more'", "''", "'[N/A], , ,'"])
def test_whatever_nvidia_smi_prints_there_is_a_table(smi, answer):
    smi(f"echo {answer}")
    assert gpu.gpu_report()[0].startswith("## GPU status")


def test_no_gpu_is_no_fault(smi):
    smi(None)
    text, well = gpu.gpu_report()
    assert well and "There is no NVIDIA driver on this machine" in text


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "exit code 18: Failed to initialize NVML"),
        ("exit 9", "exit code 9: no message"),
        ("kill -SEGV $$", "exit code -11"),
        ('case "$1" in *compute-apps*) exit 3 ;; *) echo "0, A, 1 MiB, 2 MiB, 0 %, 30, 70 W" ;; esac', "exit code 3"),
    ],
)
def test_a_broken_driver_is_named(smi, script, says):
    smi(script)
    text, well = gpu.gpu_report()
    assert not well and "not well" in text and says in text


@pytest.mark.parametrize("script", ["sleep 60", "trap '' TERM INT; sleep 60 & wait; sleep 60"])
def test_a_hanging_driver_does_not_hang_the_check(smi, script):
    smi(script)
    start = time.monotonic()
    text, well = gpu.gpu_report(timeout=0.5)
    assert time.monotonic() - start < 10 and not well and "did not answer within 0.5 s" in text


def test_a_hanging_driver_leaves_no_process_behind(smi, tmp_path):
    smi(f"echo $$ >{tmp_path}/pid; sleep 61")
    gpu.gpu_report(timeout=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_processes_are_listed_without_their_keys(smi):
    smi(None)
    code = "import sys, time; print('on', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code, "WANDB_API_KEY=abc123", "--token", "xyz789"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "on\n"
        text = gpu.python_processes()
        assert str(os.getpid()) not in text.split() and "abc123" not in text and "xyz789" not in text
    finally:
        child.kill()
        child.wait()
    assert f"| {child.pid} " in text


def test_pytorch_is_asked_in_a_process_of_its_own():
    assert " sees " in gpu.torch_view()
    assert "did not answer" in gpu.torch_view(timeout=0.01)


def test_a_pytorch_that_aborts_is_named_and_the_command_does_not_need_one(smi, tmp_path):
    """A driver that is ill may end the process that imports PyTorch; the report's own process does not."""
    smi("echo Failed to initialize NVML; exit 9")
    (tmp_path / "torch.py").write_text("import os\nos.abort()\n")
    env = {"PATH": str(tmp_path), "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).resolve().parents[1]}"}
    code = "import sys; sys.argv = ['mainrun-gpu']; from mainrun_nb.cli import gpu_cli; gpu_cli()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "Failed to initialize NVML" in done.stdout and "exit code -6" in done.stdout
    assert "### Python and W&B processes" in done.stdout and not done.stderr
