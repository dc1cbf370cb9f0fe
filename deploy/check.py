"""Check what is in this folder as far as a machine without a TEE can: ``make check-deploy``.

Prints what was checked, what was skipped and why, and each fault; exits with 1 where there is one. Nothing here runs in
a TEE.
"""

import configparser
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from manifest import manifest_faults, render_manifest

HERE = Path(__file__).parent
EXPOSURE = {"obfuscatune-worker.service": 10, "obfuscatune-enclave.service": 25}  # of 100, by systemd-analyze security
UNIT_LINES = (
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "PrivateTmp=yes",
    "LimitCORE=0",
    "MemorySwapMax=0",
    "SystemCallArchitectures=native",
    "RestartPreventExitStatus=2",
)
COMMAND_LINE = (
    "systemd.gpt_auto=no",
    "systemd.swap=no",
    "systemd.import_credentials=no",
    "rd.shell=0",
    "rd.emergency=halt",
    "lockdown=confidentiality",
)
# Written while the image is built; two builds that differed differed in these.
TIMES = ("/var/cache/ldconfig/aux-cache", "/var/log/*.log")
INSTRUCTIONS = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD", "VOLUME", "EXPOSE"}
_SECRET = re.compile(r"(secret|passw|token|private|\.key\b|\.pem\b|\.env\b|id_rsa)", re.IGNORECASE)


def dockerfile_faults(text: str) -> list[str]:
    """Return what makes a Dockerfile's image unpinned, privileged or leaky."""
    faults: list[str] = []
    stages: set[str] = set()
    required: set[str] = set()
    user = "root"
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    for line in filter(str.strip, joined.splitlines()):
        name, _, rest = line.strip().partition(" ")
        if name not in INSTRUCTIONS:
            faults.append(f"{name}: not one of {', '.join(sorted(INSTRUCTIONS))}")
        if name == "ARG" and "=" not in rest:
            required.add(rest.strip())
        if name == "FROM":
            image, _, stage = rest.partition(" AS ")
            digest = re.search(r"@sha256:(?:[0-9a-f]{64}|\$\{(\w+)\})$", image)
            if image not in stages and (digest is None or (digest[1] is not None and digest[1] not in required)):
                faults.append(f"FROM {image}: no digest, or one with a default")
            stages.add(stage.strip())
            user = "root"
        if name == "COPY" and rest.split()[0] in (".", "./"):
            faults.append("COPY .: takes whatever lies there")
        if name in ("COPY", "ENV", "ARG") and _SECRET.search(rest):
            faults.append(f"{name} {rest}: looks like a secret")
        if name in ("ENTRYPOINT", "CMD"):
            try:
                json.loads(rest)
            except ValueError:
                faults.append(f"{name}: a shell would be its first process")
        if name == "VOLUME" and not all(f"-o 65532 -g 65532 {path}" in joined for path in json.loads(rest)):
            faults.append(f"VOLUME {rest}: belongs to root")
        user = rest.strip() if name == "USER" else user
    if user.partition(":")[0] in ("root", "0"):
        faults.append("USER: root")
    return faults


def unit_faults(name: str, text: str) -> list[str]:
    """Return the hardening lines that a unit lacks."""
    lines = {line.strip() for line in text.splitlines()}
    return [f"{name}: {line} is missing" for line in UNIT_LINES if line not in lines]


def drop_in_faults(folder: Path) -> list[str]:
    """Return which of its unit's variables a drop-in's command leaves out: other drop-ins would set them in vain."""
    faults: list[str] = []
    for unit in sorted(folder.glob("*.service")):
        who = unit.name.removeprefix("obfuscatune-").removesuffix(".service")
        (wanted,) = _variables(unit)
        for drop_in in sorted((folder / "drop-ins").glob(f"{who}-*.conf")):
            left_out = [name for found in _variables(drop_in) for name in sorted(wanted - found)]
            faults += [f"{drop_in.name}: the command leaves out {name}" for name in left_out]
    return faults


def _variables(path: Path) -> list[set[str]]:
    commands = re.findall(r"^ExecStart=(\S.*)$", path.read_text(), re.MULTILINE)
    return [set(re.findall(r"\$\{?(\w+)", command)) for command in commands]


def systemd_faults(folder: Path) -> Iterator[str]:
    """Yield what ``systemd-analyze verify`` and ``security`` say of the units, alone and with each drop-in."""
    for unit in sorted(folder.glob("*.service")):
        who = unit.name.removeprefix("obfuscatune-").removesuffix(".service")
        for drop_in in [None, *sorted((folder / "drop-ins").glob(f"{who}-*.conf"))]:
            with tempfile.TemporaryDirectory() as scratch:
                # The program is not installed here: any that is there stands for it.
                copy = Path(scratch) / unit.name
                copy.write_text(_installed(unit.read_text()))
                if drop_in is not None:
                    extra = Path(scratch) / f"{unit.name}.d" / drop_in.name
                    extra.parent.mkdir()
                    extra.write_text(_installed(drop_in.read_text()))
                done = _run("systemd-analyze", "verify", "--man=no", str(copy))
            about = unit.name + (f" with {drop_in.name}" if drop_in else "")
            if done.returncode or done.stderr.strip():
                yield f"{about}: {done.stderr.strip() or 'refused'}"
        done = _run("systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE[unit.name]}", str(unit))
        if done.returncode:
            yield f"{unit.name}: {done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()}"


def image_faults(folder: Path) -> list[str]:
    """Return what the confidential VM's recipe lacks."""
    config = configparser.ConfigParser(strict=False, interpolation=None)
    config.optionxform = str  # type: ignore[assignment, method-assign]
    config.read(folder / "mkosi.conf")
    content = config["Content"]
    words = content["KernelCommandLine"].split()
    faults = [f"command line: {word} is missing" for word in COMMAND_LINE if word not in words]
    faults += [f"command line: {word} opens a console" for word in words if word.startswith("console=")]
    faults += [f"{key} must be no" for key in ("Ssh", "Autologin") if content.get(key) != "no"]
    removed = content.get("RemoveFiles", "").split()
    faults += [f"RemoveFiles: {path} holds times, so that two builds differ" for path in TIMES if path not in removed]
    faults += [f"package {name} has no place there" for name in content["Packages"].split() if "ssh" in name]
    for name, side in (("10-root", "data"), ("11-root-verity", "hash")):
        partition = configparser.ConfigParser(strict=False)
        partition.read(folder / "mkosi.repart" / f"{name}.conf")
        if partition["Partition"].get("Verity") != side:
            faults.append(f"{name}: not the {side} side of verity")
    return faults


def check_all() -> list[str]:
    """Check the whole folder, print what was done, return the faults."""
    faults: list[str] = []

    def report(what: str, found: list[str]) -> None:
        print(f"{'ok' if not found else 'FAULT'}: {what}")
        faults.extend(f"{what}: {fault}" for fault in found)

    report("gramine manifest", manifest_faults(render_manifest()))
    for path in sorted((HERE / "docker").glob("Dockerfile*")):
        report(path.name, dockerfile_faults(path.read_text()))
    for path in sorted((HERE / "systemd").glob("*.service")):
        report(path.name, unit_faults(path.name, path.read_text()))
    report("drop-ins together", drop_in_faults(HERE / "systemd"))
    if shutil.which("systemd-analyze"):
        report("systemd-analyze verify and security", list(systemd_faults(HERE / "systemd")))
    else:
        print("skipped: systemd-analyze is not installed")
    report("mkosi recipe", image_faults(HERE / "cvm"))
    for path in sorted([*HERE.glob("*/*.sh"), HERE / "cvm" / "mkosi.postinst.chroot"]):
        done = _run("bash", "-n", str(path))
        report(f"bash -n {path.relative_to(HERE)}", [done.stderr.strip()] if done.returncode else [])
    return faults


def _installed(unit: str) -> str:
    return unit.replace("/opt/obfuscatune/bin/obfuscatune", "/bin/true")


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603


def main() -> int:
    """Check everything; 0 without a fault, 1 with one."""
    faults = check_all()
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
