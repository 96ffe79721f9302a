#!/bin/sh
# Submit a job for each line of a file, and end. Run again, in the morning, it fetches what is there.
#
#   examples/overnight.sh KIND|/PATH jobs.jsonl FOLDER [SUFFIX]
#   examples/overnight.sh /v1/audio/speech sentences.jsonl out wav
#
# Each line is a request's JSON. Its answer is written to FOLDER/NUMBER.SUFFIX. A line is submitted under a
# key made of its number and its content, so that none is submitted twice, however often this is run.
# Exit code 0: all answers are there; 5: some are not yet; 1: some failed, or the broker refused one.
# Needs gpumanager, jq and cksum. Environment: GPUMANAGER_URL (the broker), GPUMANAGER_API_KEY (your key).
set -eu
[ $# -ge 3 ] || { echo "usage: $0 KIND|/PATH jobs.jsonl FOLDER [SUFFIX]" >&2; exit 2; }
target=$1 jobs=$2 folder=$3 suffix=${4:-out}
mkdir -p "$folder"

number=0 left=0 failed=0
while IFS= read -r line || [ -n "$line" ]; do
  number=$((number + 1))
  out=$folder/$number.$suffix
  [ ! -e "$out" ] || continue
  key=$number-$(printf '%s' "$target $line" | cksum | tr ' ' -)
  job=$(printf '%s' "$line" | gpumanager submit "$target" - --json --idempotency-key "$key") ||
    { echo "line $number was not taken; those before it were" >&2; exit 1; }
  case $(printf '%s' "$job" | jq -r .state) in
    waiting | preparing | running) left=$((left + 1)) ;;
    *) gpumanager result "$(printf '%s' "$job" | jq -r .id)" -o "$out" || failed=$((failed + 1)) ;;
  esac
done < "$jobs"

echo "$number jobs: $left not over yet, $failed failed, the other answers are in $folder"
[ "$failed" -eq 0 ] || exit 1
[ "$left" -eq 0 ] || exit 5
