#!/usr/bin/env bash
# Render, check, sign and measure the enclave for SGX. Needs gramine, a signing key (gramine-sgx-gen-private-key) and the package
# installed with its dependencies in SITE_PACKAGES. Both owners run this on the same files and compare MRENCLAVE; only the operator's
# signature has to be the operator's.
#   SITE_PACKAGES=/opt/obfuscatune/lib/python3.11/site-packages PARTIES=/etc/obfuscatune/parties \
#   WORKER=tcp://127.0.0.1:7000 SIGNING_KEY=enclave-key.pem deploy/gramine/build.sh [OUTPUT_DIR]
set -euo pipefail

: "${SITE_PACKAGES:?directory with obfuscatune and its dependencies}"
: "${PARTIES:?directory with the public identities of the parties}"
: "${WORKER:?address of the worker, tcp://HOST:PORT}"
: "${SIGNING_KEY:?PEM of the RSA-3072 key that signs the enclave}"
python=${PYTHON:-$(readlink -f "$(command -v python3)")}
state=${STATE:-/var/lib/obfuscatune/state}
size=${ENCLAVE_SIZE:-16G}
threads=${MAX_THREADS:-64}
libdir=${ARCH_LIBDIR:-/lib/$(gcc -dumpmachine 2>/dev/null || echo x86_64-linux-gnu)}
here=$(cd "$(dirname "$0")" && pwd)
output=${1:-.}

manifest=$output/obfuscatune.manifest
gramine-manifest \
  -Dentrypoint="$python" -Dsite_packages="$SITE_PACKAGES" -Dpython_version="$(basename "$python")" -Darch_libdir="$libdir" \
  -Dstate_dir="$state" -Dparties_dir="$PARTIES" -Dworker="$WORKER" -Denclave_size="$size" -Dmax_threads="$threads" \
  "$here/obfuscatune.manifest.template" "$manifest"
"$python" "$here/../manifest.py" "$manifest"
gramine-sgx-sign --key "$SIGNING_KEY" --manifest "$manifest" --output "$manifest.sgx"
"$python" "$here/../manifest.py" "$manifest.sgx"
PYTHONPATH=$SITE_PACKAGES "$python" "$here/../measure.py" sgx "$output/obfuscatune.sig"
