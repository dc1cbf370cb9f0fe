"""The table of targets, by name.

A target imports its parser when it is built, so that one that is missing or was renamed is an error and never a target
that is skipped.
"""

from collections.abc import Callable
from pathlib import Path

import attested
import formats
import links
from target import Target

TARGETS: dict[str, Callable[[Path], Target]] = {
    build.__name__: build
    for build in (
        formats.canonical,
        formats.identity,
        formats.sealed_file,
        formats.sealed_header,
        formats.archive,
        formats.tensor_header,
        formats.job,
        formats.terms,
        formats.card,
        formats.succession,
        formats.membership,
        formats.upgrade,
        formats.hand_over,
        formats.escrow,
        formats.certificate_of_hand_over,
        formats.channel_frame,
        formats.query,
        formats.answer,
        formats.protocol_frame,
        formats.drawn_tensors,
        links.worker_replies,
        links.enclave_requests,
        formats.state,
        formats.log_copy,
        formats.log_entry,
        attested.claims,
        attested.evidence,
        attested.policy,
        attested.certificate,
        attested.worker_certificate,
        attested.judged_tdx,
        attested.judged_snp,
        attested.judged_tpm,
        attested.tpm_quote,
        attested.tpm_signature,
        attested.event_log,
        attested.hcl_report,
        attested.nitro_document,
        attested.gpu_report,
    )
}
