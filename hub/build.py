"""Writes the operations as a kernel of the `kernels` hub: pure Python, relative imports only, operators of its own.

    python -m hub.build build/hub

makes build/hub/build/torch-cuda, torch-rocm and torch-cpu, alike but for their metadata. Each is what transformers
loads, from a repository on the hub or from that local path: KernelConfig({"causal_conv1d_fn": "/abs/build/hub:causal_conv1d_fn"}).
Only the modules that the layers need go in. The operators' namespace carries a hash of the sources, so that a kernel
can be loaded beside the installed package and beside other versions of itself.
"""

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("oracle", "triton_impl")
START = "hub.layers"
NAME, VERSION, BACKENDS = "twinconv", 1, ("cuda", "rocm", "cpu")
# What `triton_impl.call` imports by name, where Triton is installed: its tuple KERNELS, read without torch.
KERNELS = tuple(
    f"triton_impl.{name}"
    for node in ast.parse((ROOT / "triton_impl" / "call.py").read_text()).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "KERNELS"
    for name in ast.literal_eval(node.value)
)
ENTRY = '''"""The causal conv1d of Mamba, Gated DeltaNet, KDA and LFM2 layers: {version}."""

from . import layers
from .triton_impl.api import causal_conv1d_fn, causal_conv1d_update
from .triton_impl.functional import causal_conv1d

__all__ = ["causal_conv1d", "causal_conv1d_fn", "causal_conv1d_update", "layers"]
'''


def main(arguments=None):
    """Writes the layout to the folder that is named, which is emptied first."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    print(build(parser.parse_args(arguments).folder))


def build(folder):
    """Writes the layout to `folder` and returns the hash that its operators carry."""
    sources = {module: file.read_text() for module, file in sorted(modules().items())}
    version = re.search(r'__version__ = "(.+)"', (ROOT / "oracle" / "__init__.py").read_text())[1]
    digest = hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:12]
    shutil.rmtree(folder, ignore_errors=True)
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        for module, text in sources.items():
            place = module.removeprefix("hub.").split(".")
            file = variant.joinpath(*place).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            for package in [*file.relative_to(variant).parents][:-1]:
                (
                    variant / package / "__init__.py"
                ).touch()  # packages without the imports of the installed ones
            file.write_text(relative(text, len(place), digest))
        (variant / "__init__.py").write_text(ENTRY.format(version=version))
        metadata = {
            "id": f"_{NAME}_{backend}_{digest}",
            "name": NAME,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "README.md").write_text(f"---\nlibrary_name: kernels\nlicense: apache-2.0\n---\n\n{__doc__}")
    return digest


def modules(start=START):
    """Returns {module: file} of all modules of ours that `start` imports, itself among them."""
    found, open_ends = {}, [start, *KERNELS]
    while open_ends:
        module = open_ends.pop()
        file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        if module in found or not file.exists():  # a package: what it exports is imported from its modules
            continue
        found[module] = file
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import) and any(a.name.partition(".")[0] in PACKAGES for a in node.names):
                raise ValueError(f"{file}: expected `from package import name`, got `{ast.unparse(node)}`")
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
                open_ends += [node.module, *[f"{node.module}.{alias.name}" for alias in node.names]]
    return found


def relative(text, depth, digest):
    """The text of a module `depth` names below the root, with imports relative to it and operators of its own."""
    for package in PACKAGES:
        text = re.sub(rf"^(\s*)from {package}\b", rf"\1from {'.' * depth}{package}", text, flags=re.MULTILINE)
    return re.sub(rf'(?<=ops\.){NAME}\b|(?<="){NAME}(?=::|")', f"{NAME}_{digest}", text)


if __name__ == "__main__":
    main()
