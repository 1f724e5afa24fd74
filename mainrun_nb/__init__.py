"""A book of notebooks that is also a library: train, tune and honestly measure small language models on short titles."""
__version__ = "0.2.0"

# Names of version 0.1 that have moved to a later chapter: old module -> name -> where it is now. Scripts that import them still run.
MOVED = {
    "models": dict.fromkeys(("export_gpt2", "import_gpt2", "hf_tokenizer"), "hub"),
    "sparsek": dict.fromkeys(("SparseKAttention", "SparseKCache", "sparsek_fast"), "sparsek_stream"),
    "sweep": dict.fromkeys(("make_report", "write_html", "importance"), "report"),
}


def moved(module: str):
    """The `__getattr__` of a module whose old names live in a later one, which is imported when such a name is asked for."""
    def get(name: str):
        from importlib import import_module

        if name not in MOVED[module]:
            raise AttributeError(f"module 'mainrun_nb.{module}' has no attribute '{name}'")
        return getattr(import_module(f"mainrun_nb.{MOVED[module][name]}"), name)

    return get
