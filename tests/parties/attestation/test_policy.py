"""Policy files: the strict defaults, every fault said, and nothing accepted that pins no code."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.errors import UsageError
from obfuscatune.parties.attestation import dcap
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
    assert not policy.require_alias_check and policy.guest_svn is None
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


TPM = f'[platform]\nkinds = ["tpm"]\n[tpm]\nkeys = {HASH}\n[measurements]\n'
AZURE = f'[platform]\nkinds = ["azure"]\n{TCB}[measurements]\n'
PCR = 'pcr{} = ["' + "a5" * 32 + '"]\n'


def pcrs(*numbers: int) -> str:
    return "".join(PCR.format(number) for number in numbers)


@pytest.mark.parametrize(
    "numbers", [(4,), (8,), (9,), (11,), (4, 8), (4, 9), (4, 11), (4, 12), (4, 13), (8, 9, 11), (8, 9, 11, 12, 13)]
)
def test_pcrs_that_other_systems_can_set_do_not_pin_code(numbers: tuple[int, ...], tmp_path: Path) -> None:
    """Only PCR 4 is extended before what is booted runs, and it says nothing of what that takes from outside."""
    for head in (TPM, f"{AZURE}measurement = {LONG}\n"):
        with pytest.raises(
            UsageError, match=r"expected measurements\.pcr4 with pcr8 with pcr9 or pcr4 with pcr12 with"
        ):
            load(tmp_path, head + pcrs(*numbers))


def test_pcr_4_with_what_its_program_takes_from_outside_pins_code(tmp_path: Path) -> None:
    nothing = f"pcr12 = {HASH}\npcr13 = {HASH}\n"  # zeros: the stub has taken nothing
    for head, kind in ((TPM, "tpm"), (f"{AZURE}measurement = {LONG}\n", "azure")):
        assert load(tmp_path, head + pcrs(4, 8, 9)).pins(kind)
        assert load(tmp_path, head + pcrs(4) + nothing).pins(kind)
        assert load(tmp_path, head + pcrs(4) + nothing + f"pcr8 = {HASH}\n").pins(kind)  # no GRUB has run
        for zero, rest in ((4, pcrs(8, 9)), (8, pcrs(4, 9)), (9, pcrs(4, 8))):
            for values in (HASH, HASH.replace("]", f', "{"a5" * 32}"]')):
                with pytest.raises(UsageError, match=rf"zeros in pcr{zero} pin nothing"):
                    load(tmp_path, f"{head}{rest}pcr{zero} = {values}\n")
        with pytest.raises(UsageError, match="zeros in pcr4 pin nothing"):
            load(tmp_path, f"{head}pcr4 = {HASH}\n{nothing}")


def test_who_signed_a_paravisor_pins_it_together_with_its_version(tmp_path: Path) -> None:
    booted = AZURE + pcrs(4, 12, 13)
    signer = f'id_key_digest = ["{"a5" * 48}"]\n'
    with pytest.raises(UsageError, match=r"expected measurements\.measurement or id_key_digest with guest_svn or mrtd"):
        load(tmp_path, booted + signer)
    policy = load(tmp_path, f"{booted}{signer}guest_svn = 5\n")
    assert policy.pins("azure") and policy.guest_svn == 5
    with pytest.raises(UsageError, match="zeros in id_key_digest pin nothing"):
        load(tmp_path, f"{booted}id_key_digest = {LONG}\nguest_svn = 5\n")  # nobody has signed it
    assert load(tmp_path, f"{SNP}guest_svn = 4294967295\n").guest_svn == 4294967295
    with pytest.raises(UsageError, match=r"measurements\.guest_svn: expected a number from 0 to 4294967295"):
        load(tmp_path, f"{SNP}guest_svn = 4294967296\n")


def test_a_td_that_should_be_started_again_may_be_allowed(tmp_path: Path) -> None:
    """The library knows these statuses too: they are in its text."""
    statuses = ("TDRelaunchAdvised", "TDRelaunchAdvisedConfigurationNeeded")
    named = f'tcb_status = ["{statuses[0]}", "{statuses[1]}"]\n[measurements]'
    policy = load(tmp_path, TDX.replace("[measurements]", named))
    assert policy.tcb_status == statuses
    found = {"tcb": {"status": "", "advisory_ids": []}, "platform": {"pck": dict.fromkeys(dcap._OPTIONS, "False")}}
    library = Path(dcap.dcap_qvl.__file__).parent.glob("*.so")
    text = b"".join(path.read_bytes() for path in library)
    for status in statuses:
        found["tcb"]["status"] = status
        assert dcap._platform(found, policy)[0].passed and not dcap._platform(found, load(tmp_path, TDX))[0].passed
        assert status.encode() in text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"{TDX}pcr4 = {HASH}", "measurements.pcr4"),
        (f"{TDX}measurement = {LONG}", "measurements.measurement"),
        (f"{SNP}rtmr1 = {LONG}", "measurements.rtmr1"),
        (f"{TDX}isv_svn = 3", "measurements.isv_svn"),
        (f"{SNP}isv_prod_id = [1]", "measurements.isv_prod_id"),
        (f"{TDX}guest_svn = 0", "measurements.guest_svn"),
        (TDX.replace("[measurements]", "require_alias_check = true\n[measurements]"), "platform.require_alias_check"),
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
    policies = [load(tmp_path, text) for text in texts]
    genuine = [policy for policy in policies if "tdx" in policy.kinds and not policy.allow_simulation]
    # RTMR0 has the ACPI tables, whose code the guest's kernel runs and which the host makes.
    assert genuine and all({"rtmr0", "rtmr1", "rtmr2"} <= set(policy.measurements) for policy in genuine)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.binary(max_size=200), st.text(max_size=200), st.integers(0, len(TDX) - 1)))
def test_any_text_is_a_policy_or_a_usage_error(text: bytes | str | int, tmp_path: Path) -> None:
    if isinstance(text, int):
        text = TDX[:text] + TDX[text + 1 :]
    with contextlib.suppress(UsageError):
        assert load(tmp_path, text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
