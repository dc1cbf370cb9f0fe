"""The Gramine manifest: rendered, parsed, and what would weaken it is refused by the script that users run."""

import tomllib
from pathlib import Path
from types import ModuleType

import jinja2
import pytest

Scripts = dict[str, ModuleType]


@pytest.fixture
def manifest(scripts: Scripts) -> ModuleType:
    return scripts["manifest"]


def test_the_rendered_template_has_the_keys_that_protect(manifest: ModuleType) -> None:
    text = manifest.render_manifest()
    assert manifest.manifest_faults(text) == []
    parsed = tomllib.loads(text)
    assert parsed["sgx"]["debug"] is False
    assert parsed["sgx"]["remote_attestation"] == "dcap"
    assert parsed["sgx"]["file_check_policy"] == "strict"
    assert parsed["sgx"]["allowed_files"] == ["file:/etc/obfuscatune/parties/"]  # public, and good for nothing later
    assert parsed["sys"]["disallow_subprocesses"] is True
    assert "insecure" not in text.replace("insecure__ key anywhere", "")
    mounts = {mount["path"]: mount for mount in parsed["fs"]["mounts"]}
    assert mounts["/tmp"]["type"] == "tmpfs"  # noqa: S108
    assert (mounts["/state"]["type"], mounts["/state"]["key_name"]) == ("encrypted", "_sgx_mrenclave")


def test_the_command_is_fixed_and_asks_for_the_gramine_platform(manifest: ModuleType) -> None:
    argv = tomllib.loads(manifest.render_manifest())["loader"]["argv"]
    assert argv[argv.index("enclave") :] == [
        *("enclave", "serve", "--listen", "tls://0.0.0.0:7443", "--state", "/state"),
        *("--worker", "tcp://127.0.0.1:7000", "--platform", "gramine", "--parties", "/etc/obfuscatune/parties"),
        *("--max_connections", "16"),  # each may cost a thread, of which the enclave has 64
    ]
    more = tomllib.loads(manifest.render_manifest(arguments="--escrow --max_store_gb 20"))["loader"]["argv"]
    assert more == [*argv, "--escrow", "--max_store_gb", "20"]


def test_every_file_of_the_enclave_is_measured(manifest: ModuleType) -> None:
    parsed = tomllib.loads(manifest.render_manifest())
    trusted = parsed["sgx"]["trusted_files"]
    for part in (
        f"file:{manifest.EXAMPLE['site_packages']}/",
        "file:/usr/bin/python3.11",
    ):
        assert part in trusted


def test_a_forgotten_variable_is_an_error(manifest: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(manifest.EXAMPLE, "worker")
    with pytest.raises(jinja2.UndefinedError, match="worker"):
        manifest.render_manifest()


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("sgx.debug = false", "sgx.debug = true", "sgx.debug"),
        ("sgx.debug = false", "", "sgx.debug"),
        ("sgx.debug = false", "sgx.debug = 0", "sgx.debug"),
        ("sgx.debug = false", "sgx.debug = false\nloader.insecure__use_cmdline_argv = true", "insecure__use_cmdline"),
        ("sgx.debug = false", "sgx.debug = false\nsys.insecure__allow_eventfd = false", "insecure__allow_eventfd"),
        ("sgx.debug = false", 'sgx.debug = false\nfs.insecure__keys.default = "00"', "insecure__keys"),
        ("allowed_files = [", 'allowed_files = ["file:/etc/hosts", ', "allowed_files"),
        ('allowed_files = ["file:/etc/obfuscatune/', 'allowed_files = ["file:/etc/', "allowed_files"),
        ("sgx.debug = false", 'sgx.debug = false\nloader.argv_src_file = "file:argv"', "argv_src_file"),
        ('= "dcap"', '= "none"', "remote_attestation"),
        ('= "strict"', '= "allow_all_but_log"', "file_check_policy"),
        ("disallow_subprocesses = true", "disallow_subprocesses = false", "disallow_subprocesses"),
        ('log_level = "error"', 'log_level = "debug"', "log_level"),
        ('env.HOME = "/tmp"', "env.LD_PRELOAD = { passthrough = true }", "LD_PRELOAD"),
        ("_sgx_mrenclave", "_sgx_mrsigner", "/state"),
        ('type = "encrypted", ', "", "/state"),
        ('type = "tmpfs", path', 'uri = "file:/tmp", path', "must be a tmpfs"),
        ("sgx.max_threads = 64", "sgx.max_threads = 4", "max_threads"),
        ("loader.argv = [", "loader.spare = [", "loader.argv"),
        ("loader.argv = [", "loader.argv = ", "not TOML"),
    ],
)
def test_a_weaker_manifest_is_refused(
    manifest: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, names: str
) -> None:
    text = "\n".join(line for line in manifest.render_manifest().splitlines() if not line.lstrip().startswith("#"))
    assert manifest.manifest_faults(text) == []
    assert old in text
    path = tmp_path / "weak.manifest"
    path.write_text(text.replace(old, new))
    assert manifest.main([str(path)]) == 1
    assert names in capsys.readouterr().err
