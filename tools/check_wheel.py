"""Installs a wheel without its dependencies into a fresh environment, and runs the demo and the compiled part from it.

The dependencies are those of the environment that runs this: a path file adds its packages, so that torch is not
downloaded again. Path files of that environment are not read, so an editable install in it cannot hide the wheel.
"""

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

CHECKS = """
import sys, pathlib, torch, obfuscatune
from obfuscatune.protocol.native import kernel
from obfuscatune.studies.bundled import BUNDLED_FAMILIES, model_directory
from transformers import AutoModelForCausalLM
package = pathlib.Path(obfuscatune.__file__).parent
assert package.is_relative_to(sys.prefix), f"the package is {package}, not the wheel's"
assert kernel() is not None, "the wheel has no compiled kernel that loads here"
for family in BUNDLED_FAMILIES:
    model_directory(family)
model = AutoModelForCausalLM.from_pretrained(model_directory())
tokens = torch.arange(1, 9)[None]
with torch.no_grad():
    plain = model(tokens).logits
    with obfuscatune.protect(model, profile="shared") as protected:  # what the kernel computes
        apart = (protected.model(tokens).logits - plain).abs().max().item()
assert apart < 1e-3, f"logits of shared are {apart} from the plain ones"
print(f"obfuscatune {obfuscatune.__version__} of the wheel: logits of shared are {apart:.1e} from the plain ones")
"""


def main(folder: Path) -> None:
    """Check the one wheel in ``folder``."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        compiled = [name for name in archive.namelist() if name.endswith(".so")]
    if compiled != [expected := f"obfuscatune/protocol/c/kernel{sysconfig.get_config_var('EXT_SUFFIX')}"]:
        raise SystemExit(f"{wheel.name} has {compiled}, expected {expected} alone")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "environment"
        venv.create(home, with_pip=True)
        python = home / "bin" / "python"
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
        subprocess.run([*pip, wheel.resolve()], check=True)  # noqa: S603
        (packages,) = home.glob("lib/python*/site-packages")
        (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
        subprocess.run([python, "-I", "-c", CHECKS], check=True, cwd=name)  # noqa: S603
        command = [home / "bin" / "obfuscatune", "demo", "--max_steps", "4", "--output_dir", Path(name) / "demo"]
        subprocess.run(command, check=True, cwd=name, stdout=subprocess.DEVNULL)  # noqa: S603
        if not (Path(name) / "demo" / "report.html").is_file():
            raise SystemExit("the demo of the wheel wrote no report")
    print(f"{wheel.name}: the demo runs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
