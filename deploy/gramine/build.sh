#!/usr/bin/env bash
# Render, check, sign and measure the enclave for SGX. Needs gramine, a signing key (gramine-sgx-gen-private-key) and the package
# installed with its dependencies in SITE_PACKAGES. Both owners run this on the same files and compare MRENCLAVE; only the operator's
# signature has to be the operator's.
#   SITE_PACKAGES=/opt/obfuscatune/lib/python3.11/site-packages PARTIES=/etc/obfuscatune/parties \
#   WORKER=tcp://127.0.0.1:7000 SIGNING_KEY=enclave-key.pem deploy/gramine/build.sh [OUTPUT_DIR]
# ARGUMENTS: further options of `enclave serve`, for instance "--max_store_gb 20". They are measured, like WORKER.
set -euo pipefail

: "${SITE_PACKAGES:?directory with obfuscatune and its dependencies}"
: "${PARTIES:?directory with the public identities of the parties}"
: "${WORKER:?address of the worker, tcp://HOST:PORT}"
: "${SIGNING_KEY:?PEM of the RSA-3072 key that signs the enclave}"
tls='tls://[^/#[:space:]]+:[0-9]+#[0-9a-f]{64}'
[[ $WORKER =~ ^(tcp://127\.0\.0\.1:[0-9]+|$tls)$ ]] || { echo "WORKER: tcp://127.0.0.1:PORT or tls://HOST:PORT#FINGERPRINT, not $WORKER" >&2; exit 2; }
[[ ! ${ARGUMENTS:-} =~ [\"\'\\[:cntrl:]] ]] || { echo "ARGUMENTS: no quotes and no backslashes" >&2; exit 2; }
# Byte code would be measured with the rest of the folder, and it holds times.
export PYTHONDONTWRITEBYTECODE=1
if [ -n "$(find "$SITE_PACKAGES" -name __pycache__ -print -quit)" ]; then
  echo "SITE_PACKAGES has byte code: find $SITE_PACKAGES -name __pycache__ -prune -exec rm -r {} +" >&2
  exit 1
fi
python=${PYTHON:-$(readlink -f "$(command -v python3)")}
state=${STATE:-/var/lib/obfuscatune/state}
size=${ENCLAVE_SIZE:-16G}
threads=${MAX_THREADS:-64}
libdir=${ARCH_LIBDIR:-/lib/$(gcc -dumpmachine 2>/dev/null || echo x86_64-linux-gnu)}
here=$(cd "$(dirname "$0")" && pwd)
output=${1:-.}
mkdir -p "$output"

manifest=$output/obfuscatune.manifest
gramine-manifest \
  -Dentrypoint="$python" -Dsite_packages="$SITE_PACKAGES" -Dpython_version="$(basename "$python")" -Darch_libdir="$libdir" \
  -Dstate_dir="$state" -Dparties_dir="${PARTIES%/}" -Dworker="$WORKER" -Darguments="${ARGUMENTS:-}" -Denclave_size="$size" -Dmax_threads="$threads" \
  "$here/obfuscatune.manifest.template" "$manifest"
"$python" "$here/../manifest.py" "$manifest"
gramine-sgx-sign --key "$SIGNING_KEY" --manifest "$manifest" --output "$manifest.sgx"
"$python" "$here/../manifest.py" "$manifest.sgx"
PYTHONPATH=$SITE_PACKAGES "$python" "$here/../measure.py" sgx "$output/obfuscatune.sig"
