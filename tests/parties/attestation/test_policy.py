"""Policy files: the strict defaults, every fault said, and nothing accepted that pins no code."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.errors import UsageError
from obfuscatune.parties.attestation.policy import Policy

TDX = f'[platform]\nkinds = ["tdx"]\n[measurements]\nmrtd = ["{"A0" * 48}"]\n'
DOCUMENT = Path(__file__).parents[3] / "docs" / "attestation.md"


def load(tmp_path: Path, text: str | bytes) -> Policy:
    path = tmp_path / "policy.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Policy.load(path)


def test_the_defaults_are_strict(tmp_path: Path) -> None:
    policy = load(tmp_path, TDX)
    assert policy == Policy(("tdx",), measurements={"mrtd": frozenset({"a0" * 48})})
    assert (policy.tcb_status, policy.advisories, policy.max_age_seconds) == (("UpToDate",), (), 600)
    flags = ("debug", "simulation", "dynamic_platform", "cached_keys", "smt")
    assert not any(getattr(policy, f"allow_{flag}") for flag in flags)
    assert policy.simulation_roots == () and not policy.any_measurement


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "platform.kinds is missing"),
        ('[platform]\nkinds = ["tdx"]', "no measurement pins the code of tdx: expected measurements.mrtd"),
        ('[platform]\nkinds = ["tdx"]\n[measurements]\nmrtd = []', "measurements.mrtd allows no value"),
        (TDX.replace("A0", "A"), "measurements.mrtd: expected a list of texts of 96 hex digits"),
        (TDX.replace("mrtd", "rtmr1"), "no measurement pins the code of tdx"),
        (TDX.replace("mrtd", "mrenclave"), "measurements.mrenclave: expected a list of texts of 64 hex digits"),
        (TDX.replace('"tdx"', '"tdx", "snp"'), "no measurement pins the code of snp"),
        (TDX.replace('"tdx"', '"tdx", "snp"'), "platform.min_tcb is missing"),
        (TDX.replace('"tdx"', '"sev"'), "platform.kinds: expected a list of texts of sgx, tdx, snp, tpm"),
        (TDX + "[platfrom]\n", "platfrom: unknown key"),
        (TDX.replace("[measurements]", "allow_debgu = true\n[measurements]"), "platform.allow_debgu: unknown key"),
        (TDX.replace("[measurements]", 'allow_debug = "yes"\n[measurements]'), "platform.allow_debug: expected true"),
        (TDX.replace("[measurements]", "max_age_seconds = 0\n[measurements]"), "max_age_seconds: expected a number"),
        (TDX.replace("[measurements]", 'tcb_status = ["Revoked"]\n[measurements]'), "platform.tcb_status: expected"),
        (TDX.replace("[measurements]", 'collateral = "no.json"\n[measurements]'), "cannot read the file 'no.json'"),
        (TDX.replace("[measurements]", "min_tcb = {snp = 1}\n[measurements]"), "platform.min_tcb.bootloader: expected"),
        (TDX + "any_measurement = true", "any_measurement is for simulation.allow = true only"),
        (TDX + "[simulation]\nallow = true", "simulation.allow without simulation.root"),
        (TDX + '[simulation]\ntpm_keys = ["' + "00" * 32 + '"]', "without simulation.allow = true"),
        ('[platform]\nkinds = ["tpm"]\n[measurements]\npcr4 = ["' + "00" * 32 + '"]', "tpm.keys is missing"),
        (
            '[platform]\nkinds = ["tpm"]\n[measurements]\npcr0 = ["' + "00" * 32 + '"]',
            "pins the code of tpm: expected meas",
        ),
        ('[platform]\nkinds = ["sgx"]\n[measurements]\nmrsigner = ["' + "00" * 32 + '"]', "pins the code of sgx"),
        ("platform = 3", "platform: expected a table"),
        ("[platform", "policy is not TOML"),
        (b"\xff", "policy is not TOML"),
        ("a = " + "[" * 20_000, "policy is not TOML"),
    ],
)
def test_a_faulty_policy_is_refused_and_says_why(text: str | bytes, fault: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(fault)):
        load(tmp_path, text)


HASH, LONG = f'["{"00" * 32}"]', f'["{"00" * 48}"]'
TCB = "min_tcb = { bootloader = 1, tee = 0, snp = 1, microcode = 1 }\n"
SNP = f'[platform]\nkinds = ["snp"]\n{TCB}[measurements]\nmeasurement = {LONG}\n'


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"{TDX}pcr4 = {HASH}", "measurements.pcr4"),
        (f"{TDX}measurement = {LONG}", "measurements.measurement"),
        (f"{SNP}rtmr1 = {LONG}", "measurements.rtmr1"),
        (f"{TDX}isv_svn = 3", "measurements.isv_svn"),
        (f"{SNP}isv_prod_id = [1]", "measurements.isv_prod_id"),
        (TDX.replace("[measurements]", f"{TCB}[measurements]"), "platform.min_tcb"),
        (f"{TDX}[tpm]\nkeys = {HASH}", "tpm.keys"),
    ],
)
def test_what_no_kind_is_judged_by_is_refused(text: str, name: str, tmp_path: Path) -> None:
    """Such a rule would hold for nothing, and whoever wrote it would rely on it."""
    with pytest.raises(UsageError, match=rf"{re.escape(name)} is judged of none of platform\.kinds"):
        load(tmp_path, text)
    assert load(tmp_path, SNP.replace('"snp"', '"snp", "tdx"') + f"mrtd = {LONG}\nrtmr1 = {LONG}\n")


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, '[platform]\nkinds = ["abacus"]\nmax_vmpl = 9\n[tpm]\nkeys = "all"\n')
    assert all(name in str(caught.value) for name in ("platform.kinds", "platform.max_vmpl", "tpm.keys"))


def test_a_signer_pins_code_together_with_product_and_version(tmp_path: Path) -> None:
    pin = (
        '[platform]\nkinds = ["sgx"]\n[measurements]\nmrsigner = ["'
        + "00" * 32
        + '"]\nisv_svn = 3\nisv_prod_id = [1]\n'
    )
    policy = load(tmp_path, pin)
    assert policy.pins("sgx") and (policy.isv_svn, policy.isv_prod_id) == (3, frozenset({1}))


def test_files_are_relative_to_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path / "deep", TDX.replace("[measurements]", 'collateral = "c.json"\n[measurements]')).collateral


def test_a_simulation_root_is_certificates(tmp_path: Path, simulated_tdx, simulated_snp) -> None:
    (tmp_path / "root.pem").write_bytes(simulated_tdx.root.read_bytes() + simulated_snp.root.read_bytes())
    text = TDX + '[simulation]\nallow = true\nroot = "root.pem"\n'
    assert len(load(tmp_path, text).simulation_roots) == 2
    (tmp_path / "root.pem").write_text("no certificate")
    with pytest.raises(UsageError, match=r"simulation\.root"):
        load(tmp_path, text)


def test_the_policies_of_the_document_are_policies(tmp_path: Path, simulated_tdx) -> None:
    (tmp_path / "simulation-root.pem").write_bytes(simulated_tdx.root.read_bytes())
    (tmp_path / "collateral.json").write_text("{}")
    texts = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(texts) >= 4
    for text in texts:
        load(tmp_path, text)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.binary(max_size=200), st.text(max_size=200), st.integers(0, len(TDX) - 1)))
def test_any_text_is_a_policy_or_a_usage_error(text: bytes | str | int, tmp_path: Path) -> None:
    if isinstance(text, int):
        text = TDX[:text] + TDX[text + 1 :]
    with contextlib.suppress(UsageError):
        assert load(tmp_path, text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
