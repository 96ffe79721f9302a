#!/bin/sh
# Transcribe a recording through the broker, and print its text.
#
#   examples/transcribe.sh hello.wav
#   MODEL=Systran/faster-whisper-small examples/transcribe.sh hello.wav
#
# Sends the form that whisper.cpp's server and all servers with OpenAI's API accept. Needs curl.
# Environment: GPUMANAGER_URL (the broker), GPUMANAGER_API_KEY (your key), MODEL.
set -eu
url=${GPUMANAGER_URL:-http://127.0.0.1:8770}
[ $# -eq 1 ] || { echo "usage: $0 FILE" >&2; exit 2; }
[ -f "$1" ] && [ -r "$1" ] || { echo "$1 cannot be read" >&2; exit 1; }

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT INT TERM

# The key is in a file, so that it does not show in the list of processes; the recording is copied, since
# curl cannot send a file with a comma in its name.
: > "$dir/headers"
[ -z "${GPUMANAGER_API_KEY:-}" ] || printf 'Authorization: Bearer %s\n' "$GPUMANAGER_API_KEY" > "$dir/headers"
cp "$1" "$dir/recording"

status=$(curl --silent --show-error -H "@$dir/headers" -F "file=@$dir/recording;filename=recording.wav" \
  -F "model=${MODEL:-whisper-1}" -F response_format=text -o "$dir/answer" -w '%{http_code}' "$url/v1/stt") ||
  { echo "no broker answers at $url: is it running? (gpumanager doctor)" >&2; exit 1; }
if [ "$status" != 200 ]; then
  echo "the broker answered $status: $(cat "$dir/answer")" >&2
  exit 1
fi
cat "$dir/answer"
