#!/usr/bin/env bash
# Build the image, take kernel, initrd and command line out of it, and print what a policy has to allow. Needs mkosi (25 or later),
# objcopy, and, as PYTHON, an interpreter with obfuscatune[measure]. Who builds from the same inputs and recipe (inputs.sha256 has their
# hashes), the same MIRROR and SOURCE_DATE_EPOCH, with tools of the same versions (they are printed), should get the same roothash.
#   WHEELS=wheels MIRROR=... SOURCE_DATE_EPOCH=1767225600 WORKER=tls://192.0.2.2:7000#5d0c... \
#   OVMF=OVMF.amdsev.fd VCPUS=8 VCPU_TYPE=EPYC-v4 deploy/cvm/build.sh
# WHEELS: made once, by the image's Python (3.13) on x86-64, with `pip wheel`, as docs/deployment.md says, and shared.
# MIRROR: the archive of the distribution's packages, fixed to one time, with dists/ in it; there is no default, because today's packages
# are not tomorrow's.
# WORKER: address of the worker, by number, as the image asks no name server, and with the fingerprint of its identity.
# PLATFORM (configfs, tpm or azure) and ARGUMENTS (further options of `enclave serve`, for instance "--escrow") may be left out.
# These three are written into the image, and so are measured: an image with --take_over is another image.
set -euo pipefail

: "${WHEELS:?directory of wheels}"
: "${MIRROR:?package snapshot, fixed to one time}"
: "${SOURCE_DATE_EPOCH:?seconds since 1970, the same for all builders}"
: "${WORKER:?address of the worker, tls://HOST:PORT#FINGERPRINT}"
platform=${PLATFORM:-configfs}
refuse() { echo "$1" >&2; exit 2; }
[[ $WORKER =~ ^tls://[^/#[:space:]]+:[0-9]+#[0-9a-f]{64}$ ]] || refuse "WORKER: tls://HOST:PORT#FINGERPRINT with its 64 digits, not $WORKER"
[[ $platform =~ ^(configfs|tpm|azure)$ ]] || refuse "PLATFORM: configfs, tpm or azure, not $platform"
[[ ! $WORKER =~ [\"\'\\%[:cntrl:]] ]] || refuse "WORKER: no quotes, backslashes and per cent signs"
[[ ! ${ARGUMENTS:-} =~ [\"\'\\%[:cntrl:]] ]] || refuse "ARGUMENTS: no quotes, backslashes and per cent signs"
export SOURCE_DATE_EPOCH
here=$(cd "$(dirname "$0")" && pwd)
inputs=$here/inputs
output=$here/mkosi.output

rm -rf "$inputs"
mkdir -p "$inputs/wheels" "$output"
cp "$WHEELS"/*.whl "$inputs/wheels/"
cp "$here"/../systemd/{obfuscatune-enclave.service,obfuscatune.sysusers} "$inputs/"
{
  echo "[Service]"
  echo "Environment=\"OBFUSCATUNE_WORKER=$WORKER\" OBFUSCATUNE_PLATFORM=$platform \"OBFUSCATUNE_ARGUMENTS=${ARGUMENTS:-}\""
  [ "$platform" = configfs ] || echo "DeviceAllow=/dev/tpmrm0 rw"
} > "$inputs/image.conf"
(cd "$here" && find inputs build.sh mkosi.conf mkosi.postinst.chroot mkosi.repart mkosi.extra -type f | LC_ALL=C sort | xargs sha256sum) \
  > "$output/inputs.sha256"
for tool in mkosi systemd-repart mkfs.erofs veritysetup objcopy; do
  echo "$tool: $( ("$tool" --version 2>&1 || echo "not found here") | head -n 1)"
done
"${PYTHON:-python3}" "$here/../check.py"

# mkosi's own list would have the archives of updates and of debugging too, at places that no snapshot has.
mkdir -p "$here/mkosi.sandbox/etc/apt/sources.list.d"
cat > "$here/mkosi.sandbox/etc/apt/sources.list.d/mkosi.sources" <<END
Types: deb
URIs: $MIRROR
Suites: $(sed -n 's/^Release=//p' "$here/mkosi.conf")
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
mkosi --directory "$here" --mirror "$MIRROR" --source-date-epoch "$SOURCE_DATE_EPOCH" --force build

# The initrd as it is booted has parts that only the unified image has; the command line, the roothash.
uki=$output/obfuscatune-enclave.efi
for section in linux initrd cmdline; do
  objcopy --dump-section ".$section=$output/$section" "$uki" "$output/copy"  # it must write one: it fails at /dev/null
done
rm "$output/copy"
# The section may end in a zero byte; the measured string is what the machine is started with.
tr -d '\0\n' < "$output/cmdline" > "$output/cmdline.txt"
(cd "$output" && sha256sum inputs.sha256 obfuscatune-enclave.efi linux initrd cmdline.txt)

if [ -n "${OVMF:-}" ]; then
  "${PYTHON:-python3}" "$here/../measure.py" snp --firmware "$OVMF" --vcpus "${VCPUS:?number of virtual processors}" \
    --vcpu-type "${VCPU_TYPE:?for instance EPYC-v4}" --kernel "$output/linux" --initrd "$output/initrd" --append-file "$output/cmdline.txt"
fi
