#!/bin/sh
# Speak a sentence: render it through the broker, fetch the audio, and play it.
#
#   examples/speak.sh "Hello from the broker"
#   examples/speak.sh -o hello.wav "Hello from the broker"      # save, do not play
#
# Needs curl. Environment: GPUMANAGER_URL (the broker), GPUMANAGER_API_KEY (your key).
set -eu
url=${GPUMANAGER_URL:-http://127.0.0.1:8770}
out=
while getopts o: option; do
  case $option in
    o) out=$OPTARG ;;
    *) echo "usage: $0 [-o FILE] TEXT" >&2; exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || { echo "usage: $0 [-o FILE] TEXT" >&2; exit 2; }

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT INT TERM

# The key is in a file, so that it does not show in the list of processes.
: > "$dir/headers"
[ -z "${GPUMANAGER_API_KEY:-}" ] || printf 'Authorization: Bearer %s\n' "$GPUMANAGER_API_KEY" > "$dir/headers"

text=$(printf '%s' "$*" | tr -d '\000-\010\013\014\016-\037' | tr '\n\r\t' '   ' | sed 's/\\/\\\\/g; s/"/\\"/g')
status=$(printf '{"text": "%s"}' "$text" | curl --silent --show-error -H "@$dir/headers" \
  -H 'Content-Type: application/json' --data-binary @- -o "$dir/answer" -D "$dir/head" -w '%{http_code}' \
  "$url/v1/tts") || { echo "no broker answers at $url: is it running? (gpumanager doctor)" >&2; exit 1; }
if [ "$status" != 200 ]; then
  echo "the broker answered $status: $(cat "$dir/answer")" >&2
  exit 1
fi

# Some servers answer with the audio itself, others say where it is.
if grep -qi '^content-type: *audio/' "$dir/head"; then
  audio=$dir/answer
else
  path=$(sed -n 's/.*"audio_url": *"\([^"]*\)".*/\1/p' "$dir/answer")
  [ -n "$path" ] || { echo "the answer has no audio: $(cat "$dir/answer")" >&2; exit 1; }
  audio=$dir/audio
  curl --silent --show-error --fail -H "@$dir/headers" -o "$audio" "$url$path"
fi

if [ -n "$out" ]; then
  cp "$audio" "$out"
  exit
fi
for player in "pw-play" "paplay" "aplay -q" "ffplay -nodisp -autoexit -loglevel error" "afplay"; do
  if command -v "${player%% *}" >/dev/null; then
    $player "$audio"
    exit
  fi
done
echo "found no program that plays audio (pw-play, paplay, aplay, ffplay, afplay); use -o FILE" >&2
exit 1
