"""What the package chooses on cards, drivers and machines of many kinds, each pretended in a process of its own."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("tests_cuda_main", HERE / "__main__.py")
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)

PICK = """
import warnings
from mainrun_nb.config import InputError
from mainrun_nb.device import pick_device
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    print(pick_device("auto"))
print(*[w.message for w in said], sep="; ")
try:
    print(pick_device("cuda"))
except InputError as e:
    print(e)
"""


def python(program: str, *args: str, nvml: bool = True, sm: int = 90, **env: str) -> list[str]:
    """The lines that a program prints on a pretended machine."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, *args]
    done = subprocess.run(command, env=launcher.surroundings(sm, nvml, **env), cwd=launcher.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(("sm", "name"), [(60, "Tesla P100"), (70, "Tesla V100")])
def test_a_card_without_kernels(sm, name):
    device, said, refused = python(PICK, sm=sm, PRETEND_NAME=name)
    assert device == "cpu" and "although there is a GPU" in said and f"{name} is of compute capability {sm // 10}.0" in said
    assert refused.startswith("hyperparams.device: cuda was asked for") and "has code for sm_75" in refused


def test_an_old_driver():
    device, said, refused = python(PICK, PRETEND_DRIVER="12040")
    assert device == "cpu" and "although there is a GPU" in said and "too old" in said and "too old" in refused


def test_no_gpu_at_all_is_no_news():
    device, said, refused = python(PICK, CUDA_VISIBLE_DEVICES="", PRETEND_N="0")
    assert device == "cpu" and not said and "torch finds no CUDA device" in refused


@pytest.mark.parametrize("nvml", [True, False])
def test_expandable_segments_only_where_nvml_answers(nvml):
    program = ("import os, torch; from mainrun_nb.device import pick_device; d = pick_device('cuda'); torch.zeros(10**7, device=d);"
               "print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))")
    assert python(program, nvml=nvml) == ["expandable_segments:True" if nvml else "None"]


def test_a_process_stays_on_the_gpu_it_chose():
    program = ("import os, torch; from mainrun_nb.device import pick_device; torch.cuda.set_device(1); print(pick_device('auto'));"
               "os.environ['LOCAL_RANK'] = '2'; print(pick_device('auto'))")
    assert python(program, PRETEND_N="3") == ["cuda:1", "cuda:2"]


@pytest.mark.parametrize(("sm", "dtype"), [(75, "fp16"), (80, "bf16"), (90, "bf16")])
def test_the_16_bits_that_the_card_has(sm, dtype):
    program = ("from mainrun_nb.optim import half_precision, make_scaler; from mainrun_nb.config import Hyperparams;"
               "hp = Hyperparams(amp_bool=True); print(half_precision(hp, 'cuda'), make_scaler(hp, 'cuda') is not None)")
    assert python(program, sm=sm) == [f"{dtype} {dtype == 'fp16'}"]


def test_memory_that_others_hold_is_not_free():
    program = ("from mainrun_nb.memory import memory_budget; from mainrun_nb.config import load_config;"
               "from mainrun_nb.device import pick_device; pick_device('cuda'); print(memory_budget(load_config(), 'cuda'))")
    assert float(python(program, PRETEND_GB="10", PRETEND_USED_GB="6")[0]) == pytest.approx(4e9, rel=0.01)


TRAIN = """
import json, sys, torch
sys.path.insert(0, "tests/cuda")
torch.backends.cuda.enable_cudnn_sdp(False)
from mainrun_nb import generate, rescore, runtime, trainer
from mainrun_nb.config import load_config
from mainrun_nb.tokenizer import Tokenizer
from test_runs import SMALL
titles, folder, *over = sys.argv[1:]
read, measure, products = trainer.read_steps, trainer.validation_metrics, {}
trainer.read_steps = lambda taken: [{**row, "ok": True, "train/loss": 1.0, "grad_norm": 1.0} for row in read(taken)]
def measured(model, *args, **more):
    products["evaluation"] = next(model.parameters()).device.type
    return {**measure(model, *args, **more), "val/loss": 1.0}
trainer.validation_metrics = rescore.validation_metrics = measured
step = trainer.take_step
def stepped(*args):
    products["training"] = torch.backends.cuda.matmul.fp32_precision
    return step(*args)
trainer.take_step = stepped
if "broken" in over:
    over.remove("broken")
    trainer.write_titles = lambda *args, **more: torch.zeros(1)[3]
else:
    Tokenizer.decode = lambda self, ids: "title"
torch.backends.cuda.matmul.fp32_precision = "ieee"  # a user's own choice, through the new interface
cfg = load_config(None, [*SMALL, f"data.source={titles}", "hyperparams.compile=false", *over])
result = trainer.train(cfg, folder, progress=False).metrics
products["after"] = torch.backends.cuda.matmul.fp32_precision
products |= {k: result[k] for k in ("peak_memory_bytes", "float32_products", "deterministic")}
rescore.evaluate_run(folder)
generate.write_titles = lambda model, *args, **more: products.update(generation=model.device.type)
generate.generate(folder)
print(json.dumps(products))
"""


def trained(titles: str, folder: Path, *over: str, **env: str) -> dict:
    """What a training in a process of its own tells of itself."""
    return json.loads(python(TRAIN, titles, str(folder), *over, **env)[-1])


def test_a_run_multiplies_as_it_says_and_works_on_the_gpu_to_its_end(titles, tmp_path):
    found = trained(titles, tmp_path / "run", "hyperparams.deterministic=true")
    peak = found.pop("peak_memory_bytes")
    assert found == {"training": "tf32", "after": "ieee", "float32_products": "tf32", "deterministic": True,
                     "evaluation": "cuda", "generation": "cuda"}
    assert peak < 100e6  # not the 200 MB and more of the matrices that measure the machine


def test_a_machine_without_a_compiler_samples_all_the_same(titles, tmp_path):
    """PyTorch sends the product of two vectors to Triton, which would want to compile; sparse attention with a title mask meets it."""
    over = ["model_configs.gpt.attention_layer=sparse", "hyperparams.title_mask=true"]
    trained(titles, tmp_path / "run", *over, PATH="/nowhere", CC="")
    assert (tmp_path / "run/samples.txt").read_text() == "title\n" * 5


def test_samples_that_fail_cost_no_result(titles, tmp_path):
    trained(titles, tmp_path / "run", "broken")
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 4 and not (tmp_path / "run/samples.txt").exists()
