#!/usr/bin/env bash
# A worker and an enclave that know each other by their keys, over TLS. Both run here, as if they were two machines.
#
# usage: two_machines.sh [DIRECTORY]
# On two machines, run the lines marked `gpu` on one and those marked `lab` on the other, and carry the .pub files across.
set -euo pipefail
folder=${1:-obfuscatune-example-two-machines}
if [[ -e $folder ]]; then # keys are not made twice
  echo "error: $folder is there already; name another directory" >&2
  exit 2
fi
mkdir -p "$folder/gpu" "$folder/lab"
cd "$folder"
host=127.0.0.1 # the GPU machine's name

(cd gpu && obfuscatune identity new gpu1) # gpu: gpu1.key stays there
(cd lab && obfuscatune identity new lab)  # lab: lab.key stays there
cp lab/lab.pub gpu/                       # carried across; compare fingerprints by telephone: obfuscatune identity show lab.pub

# gpu: the worker lets in whom --allow names; port 0 takes a free port. Its first line is its address.
mkfifo gpu/said
(cd gpu && exec obfuscatune worker --listen "tls://$host:0" --identity gpu1.key --allow lab.pub) >gpu/said &
worker=$!
trap 'kill "$worker" 2>/dev/null || true; wait "$worker" 2>/dev/null || true' EXIT
exec 3<gpu/said
read -r line <&3
address=$(sed -E 's/^worker listening on ([^ ]+) .*/\1/' <<<"$line")
echo "$line"

# lab: the enclave refuses every worker but the one whose fingerprint the address names.
cd lab
obfuscatune demo --materials_only --output_dir . >/dev/null # a model and records; yours would be here already
obfuscatune finetune --model_name_or_path model --train_file records.jsonl --output_dir adapter --max_steps 20 \
  --learning_rate 3e-3 --max_length 40 --worker "$address" --identity lab.key
obfuscatune generate --model_name_or_path model --adapter_name_or_path adapter --worker "$address" --identity lab.key \
  --max_new_tokens 3 --prompt "we know that the colour of the strange bird company is"
