"""Check a rendered Gramine manifest: ``python deploy/manifest.py FILE``, as gramine/build.sh does before it signs.

Exits with 1, and says why, where a line of it weakens the enclave. It computes no hashes: gramine-sgx-sign does.
"""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parent / "gramine" / "obfuscatune.manifest.template"
# What a build on Debian would pass; another place gives another MRENCLAVE, but no other security.
EXAMPLE = {
    "entrypoint": "/usr/bin/python3.11",
    "python_version": "python3.11",
    "site_packages": "/opt/obfuscatune/lib/python3.11/site-packages",
    "arch_libdir": "/lib/x86_64-linux-gnu",
    "state_dir": "/var/lib/obfuscatune/state",
    "parties_dir": "/etc/obfuscatune/parties",
    "worker": "tcp://127.0.0.1:7000",
    "arguments": "",
    "enclave_size": "16G",
    "max_threads": "64",  # gramine-manifest passes text
}


class _Gramine:
    """The names that gramine-manifest gives a template."""

    libos = "/usr/lib/x86_64-linux-gnu/gramine/libsysdb.so"

    def runtimedir(self) -> str:
        return "/usr/lib/x86_64-linux-gnu/gramine/runtime/glibc"


def render_manifest(**values: str) -> str:
    """Return the template rendered as gramine-manifest does it; an undefined variable is an error."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701
    return environment.from_string(TEMPLATE.read_text()).render(gramine=_Gramine(), **{**EXAMPLE, **values})


def manifest_faults(text: str) -> list[str]:
    """Return what would make a rendered manifest (TOML) insecure; empty where nothing does."""
    try:
        manifest = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return [f"not TOML: {error}"]
    faults = [f"{key}: insecure keys are never set" for key in _keys(manifest) if "insecure__" in key]

    def expect(path: str, expected: Any) -> None:
        got = _at(manifest, path)
        if type(got) is not type(expected) or got != expected:
            faults.append(f"{path}: got {got!r}, expected {expected!r}")

    expect("sgx.debug", False)
    expect("sgx.remote_attestation", "dcap")
    expect("sgx.file_check_policy", "strict")
    expect("sys.disallow_subprocesses", True)
    expect("loader.log_level", "error")
    argv = _at(manifest, "loader.argv")
    if not isinstance(argv, list) or not argv or argv[0] != _at(manifest, "libos.entrypoint"):
        faults.append("loader.argv: must be there and begin with libos.entrypoint")
    for path in ("loader.argv_src_file", "loader.env_src_file", "sgx.enable_stats", "sgx.profile"):
        if _at(manifest, path):
            faults.append(f"{path}: must not be set")
    mounts = {mount.get("path"): mount for mount in _at(manifest, "fs.mounts") or [] if isinstance(mount, dict)}
    parties = mounts.get("/etc/obfuscatune/parties", {}).get("uri")
    for uri in _at(manifest, "sgx.allowed_files") or []:
        if str(uri).rstrip("/") != parties:
            faults.append(f"sgx.allowed_files: nothing but the parties' directory, not {uri}")
    for name, value in (_at(manifest, "loader.env") or {}).items():
        if isinstance(value, dict) and "passthrough" in value:
            faults.append(f"loader.env.{name}: comes from the host")
    threads = _at(manifest, "sgx.max_threads")
    if type(threads) is not int or threads < 8:
        faults.append("sgx.max_threads: must be set, to 8 or more (four are Gramine's own)")
    temporary, state = mounts.get("/tmp", {}), mounts.get("/state", {})  # noqa: S108 - inside the enclave
    if temporary.get("type") != "tmpfs":
        faults.append("fs.mounts: /tmp must be a tmpfs")
    if (state.get("type"), state.get("key_name")) != ("encrypted", "_sgx_mrenclave"):
        faults.append("fs.mounts: /state must be encrypted with _sgx_mrenclave")
    return faults


def _keys(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield f"{prefix}{key}"
            yield from _keys(part, f"{prefix}{key}.")
    elif isinstance(value, list):
        for part in value:
            yield from _keys(part, prefix)


def _at(manifest: Any, path: str) -> Any:
    for key in path.split("."):
        manifest = manifest.get(key) if isinstance(manifest, dict) else None
    return manifest


def main(arguments: list[str]) -> int:
    """Check one manifest; 0 without a fault, 1 with one, 2 for misuse."""
    if len(arguments) != 1:
        print("usage: manifest.py FILE", file=sys.stderr)
        return 2
    faults = manifest_faults(Path(arguments[0]).read_text())
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
