#!/bin/sh
# Ask an LLM through the broker with curl, over OpenAI's API, and print the answer as it arrives.
#
#   examples/chat.sh "Why is the sky blue?"
#
# Needs curl and jq. Environment: GPUMANAGER_URL (the broker), GPUMANAGER_API_KEY (your key), MODEL.
set -eu
url=${GPUMANAGER_URL:-http://127.0.0.1:8770}
[ $# -gt 0 ] || { echo "usage: $0 QUESTION" >&2; exit 2; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT INT TERM

# The key is in a file, so that it does not show in the list of processes.
: > "$dir/headers"
[ -z "${GPUMANAGER_API_KEY:-}" ] || printf 'Authorization: Bearer %s\n' "$GPUMANAGER_API_KEY" > "$dir/headers"

jq -n --arg model "${MODEL:-llama3.2}" --arg text "$*" \
  '{model: $model, stream: true, messages: [{role: "user", content: $text}]}' > "$dir/job"

# What is no event of the stream is an error: it has no `data:` before it.
{ curl --silent --show-error --no-buffer -H "@$dir/headers" -H 'Content-Type: application/json' \
    --data-binary "@$dir/job" "$url/v1/chat/completions" || echo "no broker answers at $url"; } |
  while IFS= read -r line; do
    case $line in
      'data: [DONE]'*) ;;
      data:*) printf '%s' "${line#data:}" | jq -j '.choices[0].delta.content // empty' ;;
      ?*) printf '%s\n' "$line" >&2; : > "$dir/failed" ;;
    esac
  done
echo
[ ! -e "$dir/failed" ]
