#!/bin/sh
# Render a ComfyUI workflow through the broker, wait until it is done, and fetch the pictures.
#
#   examples/comfyui.sh workflow.json [FOLDER]
#
# workflow.json is what ComfyUI's "Export (API)" writes. The job waits in the broker's queue, and holds the
# GPU until it is rendered. The script fetches the pictures from ComfyUI itself, which needs no GPU.
# Needs curl and jq. Environment: GPUMANAGER_URL (the broker), GPUMANAGER_API_KEY (your key), COMFYUI_URL.
set -eu
url=${GPUMANAGER_URL:-http://127.0.0.1:8770}
comfyui=${COMFYUI_URL:-http://127.0.0.1:8188}
[ $# -ge 1 ] || { echo "usage: $0 workflow.json [FOLDER]" >&2; exit 2; }
folder=${2:-.}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT INT TERM
: > "$dir/headers"
[ -z "${GPUMANAGER_API_KEY:-}" ] || printf 'Authorization: Bearer %s\n' "$GPUMANAGER_API_KEY" > "$dir/headers"

jq '{prompt: .}' "$1" > "$dir/job" || { echo "$1 is no workflow: export it with ComfyUI's Export (API)" >&2; exit 1; }
answer=$(curl --silent --show-error -H "@$dir/headers" \
  -H 'Content-Type: application/json' --data-binary "@$dir/job" "$url/v1/image") ||
  { echo "no broker answers at $url: is it running? (gpumanager doctor)" >&2; exit 1; }
id=$(printf '%s' "$answer" | jq -r '.prompt_id // empty')
[ -n "$id" ] || { echo "$answer" >&2; exit 1; }

tries=0
until curl --silent --fail "$comfyui/history/$id" | jq -e --arg id "$id" '.[$id]' > "$dir/done"; do
  tries=$((tries + 1))
  [ $tries -lt 1200 ] || { echo "the job $id is not rendered after ten minutes" >&2; exit 1; }
  sleep 0.5
done

if [ "$(jq -r '.status.status_str // "success"' "$dir/done")" = error ]; then
  jq '.status.messages' "$dir/done" >&2
  exit 1
fi
jq -r '.outputs[]?.images[]? | [.filename, .subfolder, .type] | @tsv' "$dir/done" |
  while IFS="$(printf '\t')" read -r name subfolder type; do
    curl --silent --show-error --fail --get "$comfyui/view" --data-urlencode "filename=$name" \
      --data-urlencode "subfolder=$subfolder" --data-urlencode "type=$type" -o "$folder/${name##*/}"
    echo "$folder/${name##*/}"
  done
