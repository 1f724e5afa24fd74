"""Package metadata, read from settings.ini: the one place where it is written."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = ini["DEFAULT"]


def lines(key: str) -> list[str]:
    """The non-empty lines of a multi-line value."""
    return [line.strip() for line in cfg[key].splitlines() if line.strip()]


extras = {k.removesuffix("_requirements"): lines(k) for k in cfg if k.endswith("_requirements")}
extras["all"] = sorted({req for reqs in extras.values() for req in reqs})

setup(
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    license_expression=cfg["license"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["mainrun_nb", "mainrun_nb.*"]), "mainrun_nb.sweeps"],
    package_dir={"mainrun_nb.sweeps": "sweeps"},  # in a wheel; in a checkout, editable or not, the folder is found where it is
    package_data={"mainrun_nb": ["py.typed", "static/*"],
                  "mainrun_nb.sweeps": ["base/*.yaml", "search/*.yaml", "assessed/*.yaml", "sota/*.yaml", "trial.ipynb", "report.ipynb"]},
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["mainrun_nb = mainrun_nb._modidx:d"]},
)
