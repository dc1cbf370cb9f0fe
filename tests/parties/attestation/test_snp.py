"""SEV-SNP on real reports, and what is refused of them."""

import datetime
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation import simulated_snp as simulated_snp_module
from obfuscatune.parties.attestation import snp as module
from obfuscatune.parties.attestation.certificates import Certificate, read_chain, to_pem
from obfuscatune.parties.attestation.evidence import Quote
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulated_pki import Flaws
from obfuscatune.parties.attestation.simulated_snp import SimulatedSnp
from obfuscatune.parties.attestation.verify import judge, judge_quote

from .enclaves import NONCE, TLS_KEY, evidence, policy, root
from .samples import (
    DEBUG_POLICY,
    SNP_POLICY,
    SNP_TIME,
    changed,
    failed,
    google,
    load,
    needs_samples,
    rules,
    virtee,
    with_extra,
)

pytestmark = needs_samples
TCB_RULES = ["tcb", "launch tcb", "committed tcb"]


def verdict(quote: Quote, policy: Policy = SNP_POLICY, now: float = SNP_TIME):
    return judge_quote(quote, policy, now=now)


def test_the_samples_verify_or_are_refused_as_their_readme_says() -> None:
    genuine = verdict(virtee())
    assert not genuine.failed, str(genuine)
    assert not genuine.simulation
    assert failed(verdict(google())) == ["debug"]
    assert not verdict(google(), DEBUG_POLICY).failed


def test_a_genuine_chain_of_turin_with_a_report_of_milan_is_refused() -> None:
    found = verdict(virtee("turin"))
    assert rules(found)["certificates"] is True
    assert failed(found) == ["signature"]


def test_a_report_of_another_chip_is_refused() -> None:
    found = verdict(Quote("snp", virtee().quote, google().extras))
    assert rules(found)["certificates"] is True
    assert failed(found) == ["signature"]


@pytest.mark.parametrize("at", [0x04, 0x08, 0x38, 0x50, 0x90, 0xC0, 0x180, 0x1A0, 0x29F, 0x2A0, 0x2A0 + 72])
def test_a_changed_report_is_refused(at: int) -> None:
    assert failed(verdict(changed(virtee(), at)))[0] == "signature"


def test_what_is_not_signed_must_be_zero() -> None:
    assert failed(verdict(changed(virtee(), 0x330))) == ["format"]
    assert failed(verdict(changed(virtee(), 0x49F))) == ["format"]


@pytest.mark.parametrize("version", [0, 1, 6, 0xFF])
def test_unknown_versions_are_refused(version: int) -> None:
    quote = virtee()
    raw = bytes([version]) + quote.quote[1:]
    assert failed(verdict(Quote("snp", raw, quote.extras))) == ["format"]


@pytest.mark.parametrize("part", ["bootloader", "tee", "snp", "microcode"])
def test_an_outdated_platform_is_refused(part: str) -> None:
    least = {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115}
    assert not verdict(virtee(), replace(SNP_POLICY, min_tcb=least)).failed
    stricter = replace(SNP_POLICY, min_tcb={**least, part: least[part] + 1})
    assert failed(verdict(virtee(), stricter)) == TCB_RULES
    assert "tcb" in failed(verdict(virtee(), replace(SNP_POLICY, min_tcb=None)))


def test_smt_is_refused_by_default() -> None:
    assert failed(verdict(virtee(), replace(SNP_POLICY, allow_smt=False))) == ["platform"]


def test_certificates_outside_their_life_are_refused() -> None:
    for now in (1_600_000_000, 2_000_000_000, -1e30, 1e30):
        assert failed(verdict(virtee(), now=now))[0] == "certificates"


def test_swapped_missing_and_foreign_certificates_are_refused() -> None:
    leaf, ask, ark = (to_pem(certificate.der) for certificate in read_chain(virtee().extras["certificates"], "test"))
    turin = [to_pem(certificate.der) for certificate in read_chain(virtee("turin").extras["certificates"], "test")]
    for chain in (
        [leaf, ark, ask],
        [ask, leaf, ark],
        [leaf, ask, ask],
        [leaf, ark, ark],
        [leaf, turin[1], ark],
        [leaf, ask, turin[2]],
        [leaf, turin[1], turin[2]],
        [ark, ark, ark],
    ):
        assert "certificates" in failed(verdict(with_extra(virtee(), "certificates", b"".join(chain))))
    for chain in ([], [leaf], [leaf, ask], [leaf, ask, ark, ark], [b"\n", leaf, ask, ark], [leaf, b"x", ask, ark]):
        assert failed(verdict(with_extra(virtee(), "certificates", b"".join(chain)))) == ["format"]
    assert failed(verdict(Quote("snp", virtee().quote))) == ["format"]


def test_a_root_of_the_simulation_does_not_vouch_for_real_reports_nor_the_real_one_for_simulated(simulated_snp) -> None:
    both = replace(SNP_POLICY, allow_simulation=True, simulation_roots=(root(simulated_snp),))
    real = verdict(virtee(), both)
    assert not real.failed and not real.simulation
    forged = simulated_snp.attester.quote(bytes(64))
    assert failed(judge_quote(forged, SNP_POLICY)) == ["certificates"]
    assert judge_quote(forged, both).simulation
    real_chain = Quote("snp", forged.quote, virtee().extras)
    assert failed(verdict(real_chain, both)) == ["signature"]


def test_a_serial_number_of_zero_is_read_without_a_warning_and_checked_as_it_is() -> None:
    """pytest makes every warning an error; the signature over the changed bytes would not verify."""
    der = load("snp/virtee_vcek_milan.der")
    certificate = Certificate(der)
    assert certificate.signed in der
    assert certificate.fields.serial_number == 1
    assert certificate.fields.tbs_certificate_bytes not in der
    ask = Certificate(read_chain(load("snp/virtee_cert_chain_milan"), "test")[0].der)
    assert ask.signed == ask.fields.tbs_certificate_bytes


@pytest.mark.parametrize(
    "respell",
    [
        lambda pem: pem.replace(b"\n", b"", 3).replace(b"-----", b"-----\n", 2),
        lambda pem: pem.replace(b"-----\nMI", b"-----\nM\nI"),
        lambda pem: pem.replace(b"-----BEGIN", b"X: y\n-----BEGIN", 1),
        lambda pem: pem.replace(b"==\n", b"=\n"),
        lambda pem: pem + b"x",
    ],
)
def test_a_chain_has_one_spelling(respell) -> None:
    pem = load("snp/virtee_cert_chain_milan")
    assert len(read_chain(pem, "test")) == len(read_chain(pem.replace(b"\n", b"\r\n"), "test")) == 2
    assert respell(pem) != pem
    with pytest.raises(FormatError):
        read_chain(respell(pem), "test")


def test_turin_reads_its_own_layout_of_the_tcb() -> None:
    report = bytearray(module.REPORT_BYTES)
    report[0x180:0x188] = bytes([9, 1, 2, 3, 0, 0, 0, 4])
    turin = {"bootloader": 1, "tee": 2, "snp": 3, "microcode": 4}
    milan = {"bootloader": 9, "tee": 1, "snp": 0, "microcode": 4}
    assert module._tcb(bytes(report), 0x180, "Turin") == {"fmc": 9, **turin}
    assert module._tcb(bytes(report), 0x180, "Milan") == milan


def test_every_part_of_turins_tcb_is_judged(tmp_path: Path) -> None:
    """Its first one too, which the other products do not have: a policy that says nothing of it accepts nothing."""
    report = bytearray(module.REPORT_BYTES)
    for at in (0x180, 0x1E0, 0x1F0):
        report[at : at + 8] = bytes([2, 1, 0, 3, 0, 0, 0, 4])
    (tmp_path / "policy.toml").write_text(
        f'''[platform]
kinds = ["snp"]
min_tcb = {{ fmc = 2, bootloader = 1, tee = 0, snp = 3, microcode = 4 }}
[measurements]
measurement = ["{"00" * 48}"]
'''
    )
    enough = Policy.load(tmp_path / "policy.toml")
    least = dict(enough.min_tcb or {})
    without = {part: value for part, value in least.items() if part != "fmc"}
    for minimum, failing in (
        (least, []),
        ({**least, "fmc": 3}, TCB_RULES),
        (without, TCB_RULES),
    ):
        found = module._platform(bytes(report), replace(enough, min_tcb=minimum), "Turin")
        assert [rule.name for rule in found if not rule.passed] == failing
    assert found[-1].expected == "min_tcb fmc missing, bootloader 1, tee 0, snp 3, microcode 4"
    for at in (0x180, 0x1E0, 0x1F0):
        report[at : at + 8] = bytes([1, 0, 0, 0, 0, 0, 3, 4])  # Milan has no such part
    assert all(rule.passed for rule in module._platform(bytes(report), replace(enough, min_tcb=without), "Milan"))


@pytest.mark.parametrize(
    ("at", "byte", "rule", "allowing"),
    [
        (0x0A, 0x07, "migration", {}),
        (0x0A, 0x0B, "debug", {"allow_debug": True}),
        (0x30, 1, "vmpl", {"max_vmpl": 1}),
        (0x33, 0xFF, "vmpl", {}),
        (0x40, 1, "platform", {"allow_smt": True}),
        (0x48, 1 << 2, "certificates", {}),
        (0x48, 7 << 2, "certificates", {}),
        (0x180, 5, "chip", {}),
        (0x1A0, None, "chip", {}),
        (0x1F0, 2, "launch tcb", {"min_tcb": {"bootloader": 2, "tee": 0, "snp": 8, "microcode": 115}}),
        # Firmware that is not committed: the host may go back to the one before while the guest runs.
        (0x1E0, 2, "committed tcb", {"min_tcb": {"bootloader": 2, "tee": 0, "snp": 8, "microcode": 115}}),
    ],
)
def test_each_field_of_a_signed_report_is_judged(
    at: int, byte: int | None, rule: str, allowing: dict, simulated_snp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports that are signed as they are, of firmware or of a chip that they should not come from."""
    attester = simulated_snp.attester
    make = attester._report

    def report(report_data: bytes) -> bytes:
        made = bytearray(make(report_data))
        made[at] = made[at] ^ 1 if byte is None else byte
        return bytes(made)

    monkeypatch.setattr(attester, "_report", report)
    allow_smt = rule != "platform"
    strict = policy(simulated_snp, allow_smt=allow_smt, measurements={})
    forged = attester.quote(bytes(64))
    assert failed(judge_quote(forged, strict)) == [rule]
    if allowing:
        assert not judge_quote(forged, replace(strict, **allowing)).failed


@pytest.mark.parametrize(
    ("version", "flags", "got"),
    [(2, 1 << 5, "not told in reports of version 2"), (3, 0xFF ^ 1 << 5, "not done"), (3, 1 << 5, ""), (5, 0xFF, "")],
)
def test_a_policy_may_demand_that_memory_is_checked_for_aliases(
    version: int, flags: int, got: str, simulated_snp, monkeypatch: pytest.MonkeyPatch
) -> None:
    attester = simulated_snp.attester
    make = attester._report

    def report(report_data: bytes) -> bytes:
        made = bytearray(make(report_data))
        made[0], made[0x40] = version, flags
        return bytes(made)

    monkeypatch.setattr(attester, "_report", report)
    demanding = policy(simulated_snp, measurements={}, require_alias_check=True)
    found = judge_quote(attester.quote(bytes(64)), demanding)
    assert failed(found) == (["alias check"] if got else []) and got in str(found)
    assert not judge_quote(attester.quote(bytes(64)), replace(demanding, require_alias_check=False)).failed


def test_the_version_of_the_guest_is_judged_where_the_policy_names_it(
    simulated_snp, monkeypatch: pytest.MonkeyPatch
) -> None:
    attester = simulated_snp.attester
    make = attester._report
    monkeypatch.setattr(
        attester, "_report", lambda data: make(data)[:4] + (1 << 31).to_bytes(4, "little") + make(data)[8:]
    )
    found = evidence(simulated_snp)
    for least, refused in ((None, []), (0, []), (1 << 31, []), ((1 << 31) + 1, ["guest_svn"])):
        judged = judge(found, policy(simulated_snp, guest_svn=least), nonce=NONCE, tls_key=TLS_KEY)
        assert failed(judged) == refused and ("guest_svn" in rules(judged)) is (least is not None)
    assert module.peek(found.quote.quote)["guest_svn"] == str(1 << 31)


def test_peeking_refuses_what_is_no_report() -> None:
    assert len(module.peek(virtee().quote)["measurement"]) == 96
    with pytest.raises(FormatError):
        module.peek(b"no report")


# Own hardware: the host hands out no certificates, the policy has them


def test_certificates_of_the_policy_serve_a_report_that_comes_without(tmp_path: Path) -> None:
    quote, certificates = virtee(), virtee().extras["certificates"]
    bare = Quote("snp", quote.quote)
    assert failed(verdict(bare)) == ["format"] and "platform.certificates" in str(verdict(bare))
    others = to_pem(load("snp/goog_vcek.testcer"))  # a policy lists the chips of a fleet; the report says which it is
    for pem in (certificates, others + certificates):
        assert not verdict(bare, replace(SNP_POLICY, certificates=pem)).failed
    assert failed(verdict(bare, replace(SNP_POLICY, certificates=google().extras["certificates"]))) == ["signature"]
    assert failed(verdict(bare, replace(SNP_POLICY, certificates=others))) == ["format"]
    leaf = Quote("snp", quote.quote, {"certificates": to_pem(load("snp/virtee_vcek_milan.der"))})
    assert not verdict(leaf, replace(SNP_POLICY, certificates=certificates)).failed
    (tmp_path / "chain.pem").write_bytes(certificates)
    (tmp_path / "policy.toml").write_text(
        f'''[platform]
kinds = ["snp"]
certificates = "chain.pem"
min_tcb = {{ bootloader = 0, tee = 0, snp = 0, microcode = 0 }}
[measurements]
measurement = ["{"00" * 48}"]
'''
    )
    assert Policy.load(tmp_path / "policy.toml").certificates == certificates


def test_of_one_chips_vceks_the_one_that_has_signed_is_taken(simulated_snp) -> None:
    """A chip has a VCEK for each TCB: around an update of a fleet's firmware a policy has both."""
    ark, keys = hardware(simulated_snp)
    chip, later = bytes(range(64)), {**keys, "vcek": generate_private_key(SECP384R1())}
    old, new = (
        SimulatedSnp(each, ark, bytes(48), chip, Flaws(outdated_tcb=outdated)).quote(bytes(64))
        for each, outdated in ((keys, True), (later, False))
    )
    vceks = [to_pem(read_chain(each.extras["certificates"], "chain")[0].der) for each in (old, new)]
    _, ask, root_ = read_chain(new.extras["certificates"], "chain")
    for order in (vceks, vceks[::-1]):
        fleet = policy(
            simulated_snp, measurements={}, certificates=b"".join([*order, to_pem(ask.der), to_pem(root_.der)])
        )
        assert not judge_quote(Quote("snp", new.quote), fleet).failed
        assert failed(judge_quote(Quote("snp", old.quote), fleet)) == TCB_RULES


@pytest.mark.parametrize(
    ("product", "known"), [("Siena", True), ("Bergamo-A1", True), ("Genoa-B1", True), ("Rome", False)]
)
def test_products_under_the_authorities_of_genoa(
    product: str, known: bool, simulated_snp, monkeypatch: pytest.MonkeyPatch
) -> None:
    issue = simulated_snp_module.issue
    monkeypatch.setattr(simulated_snp_module, "PRODUCT", product)
    monkeypatch.setattr(
        simulated_snp_module,
        "issue",
        lambda title, *rest, **options: issue(title.replace("Milan", "Genoa"), *rest, **options),
    )
    ark, keys = hardware(simulated_snp)
    quote = SimulatedSnp(keys, ark, bytes(48), bytes(range(64)), Flaws()).quote(bytes(64))
    assert failed(judge_quote(quote, policy(simulated_snp, measurements={}))) == ([] if known else ["certificates"])


# A provider's key in place of the chip's


@pytest.fixture(scope="module")
def loaned(simulated_snp) -> SimulatedSnp:
    """A platform that signs with the VLEK of a provider, and otherwise as the simulated one."""
    root_, keys = hardware(simulated_snp)
    return SimulatedSnp(keys, root_, bytes(48), bytes(range(64)), Flaws(), "Cloud One")


def hardware(simulated_snp) -> tuple[x509.Certificate, dict]:
    stored = json.loads((Path(simulated_snp.root).parent / "hardware.key").read_text())["keys"]
    keys = {name: load_pem_private_key(text.encode(), None) for name, text in stored.items()}
    return x509.load_der_x509_certificate(root(simulated_snp)), keys


def test_a_vlek_is_accepted_of_the_providers_that_the_policy_names(loaned: SimulatedSnp, simulated_snp) -> None:
    named = policy(simulated_snp, measurements={}, vlek_providers=("Cloud Two", "Cloud One"))
    report = loaned.quote(bytes(64))
    found = judge_quote(report, named)
    assert not found.failed and rules(found)["provider"] is True, str(found)
    assert "any chip and TCB" in str(found)
    for others in ((), ("Cloud Two",), ("Cloud",)):
        found = judge_quote(report, replace(named, vlek_providers=others))
        assert failed(found) == ["provider"] and "VLEK of Cloud One" in str(found)
    assert "provider" not in rules(judge_quote(simulated_snp.attester.quote(bytes(64)), named))
    # The host hands out none: the policy's are of chips and of the provider, the report says which has signed it.
    vcek = read_chain(simulated_snp.attester.quote(bytes(64)).extras["certificates"], "chain")[0]
    own = replace(named, certificates=to_pem(vcek.der) + report.extras["certificates"])
    assert not judge_quote(Quote("snp", report.quote), own).failed


def test_a_vlek_is_not_taken_for_a_vcek_nor_the_other_way_round(loaned: SimulatedSnp, simulated_snp) -> None:
    """All keys are the same here, and every signature holds: what differs is what AMD says that the keys are for."""
    named = policy(simulated_snp, measurements={}, vlek_providers=("Cloud One",))
    borrowed, own = loaned.quote(bytes(64)), simulated_snp.attester.quote(bytes(64))
    for report, chain in ((borrowed, own), (own, borrowed)):
        swapped = judge_quote(with_extra(report, "certificates", chain.extras["certificates"]), named)
        assert failed(swapped) == ["certificates"] and "SEV-V" in str(swapped)
    parts, others = (read_chain(each.extras["certificates"], "chain") for each in (borrowed, own))
    mixed = b"".join(to_pem(each.der) for each in (parts[0], others[1], parts[2]))  # by the authority of the chips
    assert failed(judge_quote(with_extra(borrowed, "certificates", mixed), named)) == ["certificates"]


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_corruptions_of_a_report_by_a_vlek_are_refused(count: int, loaned: SimulatedSnp, simulated_snp) -> None:
    named = policy(simulated_snp, measurements={}, vlek_providers=("Cloud One",))
    report, generator = loaned.quote(bytes(64)), random.Random(7)
    for number in range(count):
        parts = {"": report.quote, "certificates": report.extras["certificates"]}
        name = ("", "certificates")[number % 2]
        data = bytearray(parts[name])
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        parts[name] = bytes(data)
        assert judge_quote(Quote("snp", parts[""], {"certificates": parts["certificates"]}), named).failed


# AMD's revocation list


def revocation(simulated_snp, *, serials=(), days=(-1, 30), key="root", encoding=Encoding.PEM) -> bytes:
    ark, keys = hardware(simulated_snp)
    signer, now = keys[key], datetime.datetime.now(datetime.UTC)
    start, end = (now + datetime.timedelta(days=n) for n in days)
    builder = x509.CertificateRevocationListBuilder(ark.subject, start, end)
    for serial in serials:
        revoked = x509.RevokedCertificateBuilder(serial, start).build()
        builder = builder.add_revoked_certificate(revoked)
    crl = builder.sign(signer, SHA384(), rsa_padding=PSS(MGF1(SHA384()), 48))
    return crl.public_bytes(encoding)


def test_amds_revocation_list_is_judged_where_the_policy_has_one(simulated_snp) -> None:
    found = evidence(simulated_snp)
    serial = read_chain(found.quote.extras["certificates"], "chain")[1].fields.serial_number

    def refused(**options) -> list[str]:
        crl = revocation(simulated_snp, **options)
        return failed(judge(found, policy(simulated_snp, amd_crl=crl), nonce=NONCE, tls_key=TLS_KEY))

    assert refused() == refused(serials=[serial + 1]) == []
    assert refused(serials=[serial]) == ["revocation"]
    assert refused(days=(1, 30)) == refused(days=(-30, -1)) == refused(key="ask") == ["revocation"]
    assert refused(encoding=Encoding.DER) == [] and refused(encoding=Encoding.DER, serials=[serial]) == ["revocation"]
    crl = revocation(simulated_snp)
    broken = policy(simulated_snp, amd_crl=crl[:200])
    assert failed(judge(found, broken, nonce=NONCE, tls_key=TLS_KEY))[0] == "format"


def test_a_policy_takes_the_revocation_list_as_amd_hands_it_out(simulated_snp, tmp_path: Path) -> None:
    """In DER, which is no text."""
    for encoding in (Encoding.DER, Encoding.PEM):
        crl = revocation(simulated_snp, encoding=encoding)
        (tmp_path / "crl").write_bytes(crl)
        (tmp_path / "policy.toml").write_text(
            f'''[platform]
kinds = ["snp"]
amd_crl = "crl"
min_tcb = {{ bootloader = 0, tee = 0, snp = 0, microcode = 0 }}
[measurements]
measurement = ["{"00" * 48}"]
'''
        )
        assert Policy.load(tmp_path / "policy.toml").amd_crl == crl
