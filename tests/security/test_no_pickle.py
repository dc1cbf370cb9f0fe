"""No source file of the package can be made to run code by what it reads: no pickle, no eval."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import obfuscatune

PACKAGE = Path(str(obfuscatune.__file__)).parent
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
OF_TORCH = {"load", "save", "package"}


def faults_of(source: str) -> Iterator[str]:
    """Line and name of each use of a forbidden module, builtin or torch function."""
    tree = ast.parse(source)
    torches = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            torches |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names if alias.name.split(".")[0] in MODULES]
            case ast.ImportFrom(module=module, names=names):
                parts = (module or "").split(".")
                found = [module or ""] if parts[0] in MODULES else []
                found += [f"{module}.{alias.name}" for alias in names if alias.name in OF_TORCH and module == "torch"]
                found += [str(module)] if module in ("torch.serialization", "torch.package") else []
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in torches and name in OF_TORCH:
                found = [f"torch.{name}"]
            case ast.Attribute(value=ast.Attribute(attr="serialization"), attr=name):
                found = [f"torch.serialization.{name}"]
            case ast.Name(id=name) if name in BUILTINS:
                found = [name]
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                found = ["allow_pickle=True"]
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=False)):
                continue  # said, because transformers asks on the terminal where it is not
            case ast.keyword(arg="weights_only" | "trust_remote_code"):
                found = [str(node.arg)]
            case _:
                continue
        yield from (f"{getattr(node, 'lineno', '?')}: {name}" for name in found)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_source_file_runs_no_code_that_it_reads(path: Path) -> None:
    assert list(faults_of(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import marshal, json",
        "from shelve import open",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.save({}, 'x')",
        "from torch import load",
        "from torch.serialization import load",
        "import torch\nf = torch.load",
        "import torch\ntorch.serialization.load('x')",
        "def f():\n    import dill",
        "eval('1')",
        "exec('1')",
        "[*map(eval, ['1'])]",
        "np.load('x', allow_pickle=True)",
        "load(path, weights_only=False)",
        "from_pretrained(name, trust_remote_code=True)",
        "from_pretrained(name, trust_remote_code=asked)",
    ],
)
def test_the_walk_sees_it(source: str) -> None:
    assert len(list(faults_of(source))) == 1


def test_the_walk_lets_the_harmless_pass() -> None:
    assert list(faults_of("import json\nmodel.eval()\njson.load(f)\nre.compile('x')\nmodel.save('x')")) == []
