"""Run the tests of this folder on a pretended GPU: python tests/cuda [--all | --memory] [--sm 90] [arguments of pytest].

The interpreter is one with the CUDA build of PyTorch; `make test-cuda` makes it. A C++ compiler builds the stand-in at the first call.
"""
import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT, SOURCES = HERE.parents[1], HERE / "standin"
OUT = Path(sys.prefix) / "standin"  # in the environment of its own, which holds the headers too
PARTS = {"libpretended.so": ["runtime.cpp", "cublas.cpp"], "libcuda.so.1": ["driver.cpp"], "libnvidia-ml.so.1": ["nvml.cpp"]}


def refuse(why: str) -> None:
    """End with one line."""
    sys.exit(f"tests/cuda: {why}")


def headers() -> Path:
    """The folder of CUDA's headers: Triton, which comes with the CUDA build of PyTorch, has them whole."""
    site = Path(sysconfig.get_paths()["platlib"])
    found = next(iter(sorted(site.glob("triton/backends/nvidia/include/driver_types.h"))), None)
    if found is None:
        refuse(f"{sys.executable} has no CUDA build of PyTorch; `make test-cuda` makes an environment that has")
    return found.parent


def build() -> None:
    """Compile what is older than its sources."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    newest = max(p.stat().st_mtime for p in SOURCES.iterdir())
    OUT.mkdir(exist_ok=True)
    for name, sources in PARTS.items():
        target = OUT / name
        if target.exists() and target.stat().st_mtime > newest:
            continue
        if compiler is None:
            refuse("needs a C++ compiler for the stand-in (Debian: apt-get install g++)")
        files = [str(SOURCES / s) for s in sources]
        flags = ["-std=c++17", "-O1", "-Wall", "-fPIC", "-shared", f"-I{headers()}", f"-Wl,-soname,{name}"]
        subprocess.run([*compiler.split(), *flags, "-o", str(target), *files, "-ldl"], check=True)
    (OUT / "libcuda.so").unlink(missing_ok=True)
    (OUT / "libcuda.so").symlink_to("libcuda.so.1")  # the name that Triton links against


def surroundings(sm: int = 90, nvml: bool = True, **more: str) -> dict[str, str]:
    """The environment of a process on a pretended GPU."""
    names = [name for name in PARTS if nvml or "nvidia-ml" not in name]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PRETEND_", "PYTORCH_"))}
    return {**kept, "LD_PRELOAD": " ".join(str(OUT / name) for name in names), "PRETEND_SM": str(sm), "TRITON_LIBCUDA_PATH": str(OUT),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **more}


def main() -> None:
    """One run of pytest per card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     usage="python tests/cuda [--all | --memory] [--sm SM] [arguments of pytest]")
    parser.add_argument("--all", action="store_true", help="the whole grid on sm_90, and twenty runs on each of sm_75, 80 and 89")
    parser.add_argument("--sm", type=int, help="one card alone: 75, 80, 89 or 90")
    parser.add_argument("--memory", action="store_true", help="the table of predicted memory, instead of tests")
    args, rest = parser.parse_known_args()
    build()
    if args.memory:
        sys.exit(subprocess.run([sys.executable, str(HERE / "memory.py"), *rest], env=surroundings(args.sm or 90), cwd=ROOT).returncode)
    cards = [args.sm] if args.sm else [90, 75, 80, 89] if args.all else [90]
    codes = []
    for sm in cards:
        print(f"== sm_{sm}", flush=True)
        env = surroundings(sm, MAINRUN_CUDA_ALL="1" if args.all else "")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(HERE), *rest]
        codes.append(subprocess.run(command, env=env, cwd=ROOT).returncode)
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
