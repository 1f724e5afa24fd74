"""A book of notebooks that is also a library: train, tune and honestly measure small language models on short titles."""
import os
import signal
import sys
from typing import NoReturn

__version__ = "0.2.0"


def _interrupted(signum: int, frame: object) -> NoReturn:
    """End a command that is still importing, in one line."""
    try:
        os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode())
    finally:
        os._exit(130)


if os.path.basename((sys.argv or [""])[0]).startswith("mainrun-"):  # until the command itself runs (chapter 34)
    signal.signal(signal.SIGINT, _interrupted)

# Names of version 0.1 that have moved to another chapter: old module -> name -> where it is now. Scripts that import them still run.
MOVED = {
    "eda": dict.fromkeys(("plain_words", "duplicates", "ngrams", "overlap_plain", "RunIndex", "Overlap", "overlap", "overlap_rows",
                          "plot_overlap", "leak_rows"), "overlap"),
    "models": dict.fromkeys(("export_gpt2", "import_gpt2", "hf_tokenizer"), "hub"),
    "sources": dict.fromkeys(("write_forced", "force_folder", "atomic_write", "check_file_name"), "files"),
    "sparsek": dict.fromkeys(("SparseKAttention", "SparseKCache", "sparsek_fast"), "sparsek_stream"),
    "sweep": {**dict.fromkeys(("make_report", "write_html", "axis_of", "importance", "plot_overview", "plot_settings",
                               "plot_parallel"), "report"),
              **dict.fromkeys(("RayEngine", "wait_for_folder", "trial_command"), "trials")},
    "runtime": {"gpu_report": "gpu", "pick_device": "device"},
    "trainer": {"evaluate_run": "rescore"},
    "cli": {"evaluate_run": "rescore", "gpu_report": "gpu"},  # not imported there, so that --help is instant
}


def moved(module: str):
    """The `__getattr__` of a module whose old names live in another one, which is imported when such a name is asked for."""
    def get(name: str):
        from importlib import import_module

        if name not in MOVED[module]:
            raise AttributeError(f"module 'mainrun_nb.{module}' has no attribute '{name}'")
        return getattr(import_module(f"mainrun_nb.{MOVED[module][name]}"), name)

    return get
